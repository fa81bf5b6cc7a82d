"""The skill graph: what short runs say of it, learned once, and Skill-it trained on it."""

import functools

import jax
import numpy as np
import pytest
from loops import CFG, Synthetic, begin, one_device, recipe
from ml_collections import ConfigDict

from coincide_jax import training
from coincide_jax.training import asking, probe, skills
from configs import common

NAMES = ("box", "caption", "count")


def test_linear_is_the_loss_that_one_task_takes_from_the_others():
    before = np.asarray([4.0, 2.0, 3.0], np.float32)
    after = np.asarray([[2.0, 1.5, 3.5], [4.0, 2.5, 3.0], [3.9, np.nan, 1.0]], np.float32)
    expected = [[1, 0.25, 0], [0, 1, 0], [0.05, 0, 1]]
    np.testing.assert_allclose(skills.linear(before, after), expected, atol=1e-6)


def test_a_task_that_helps_another_more_than_itself_keeps_its_diagonal():
    found = skills.linear(np.asarray([2.0, 2.0]), np.asarray([[1.5, 1.0], [2.0, 2.0]]))
    np.testing.assert_allclose(found, [[1, 1], [0, 1]])


def test_brute_compares_a_task_alone_with_two_together():
    alone = np.asarray([[2.0, 9.0], [9.0, 4.0]])
    found = skills.brute(alone, {(0, 1): np.asarray([2.5, 3.0])})
    np.testing.assert_allclose(found, [[1, 0.25], [0, 1]])  # 0 helps 1 by a quarter; 1 harms 0


def trial(mesh, stop, params, **changes):
    records = np.arange(40)
    draw = asking.Draw(records[3:], records[3:] % 3, 3, 30, probed=np.asarray([[0], [1], [2]]))
    settings = ConfigDict(dict(common.defaults().curriculum) | {"graph_steps": 2, "round_steps": 2} | changes)
    return skills.Trial(params, CFG, Synthetic(), draw, recipe(), settings, 2, mesh, stop)


@pytest.mark.parametrize(("kind", "runs"), [("linear", 3), ("brute", 6)])
def test_learning_it(tmp_path, monkeypatch, kind, runs):
    mesh, made = one_device(), []
    original = skills.fit
    monkeypatch.setattr(skills, "fit", lambda **keys: made.append(keys["members"]["records"]) or original(**keys))
    with jax.set_mesh(mesh), training.Termination() as stop:
        params = begin(mesh)
        graph, cost = skills.learn(trial(mesh, stop, params, graph=kind), NAMES, tmp_path)
        assert cost == 2 * runs and len(made) == runs
        assert all(len(rows) == 16 and not set(rows) & {0, 1, 2} for rows in made)  # what is held out stays so
        assert [set(rows % 3) for rows in made[:3]] == [{0}, {1}, {2}]
        assert np.diag(graph).tolist() == [1, 1, 1] and graph.min() >= 0 and graph.max() <= 1
        assert (graph > 0).sum() > 3, "nothing was learned of another task"
        # again: from the file; killed before the graph was written: from the runs that have ended
        again, _ = skills.learn(trial(mesh, stop, params, graph=kind), NAMES, tmp_path)
        (tmp_path / "graph.npy").unlink()
        (tmp_path / "losses" / "1.npy").unlink()
        third, _ = skills.learn(trial(mesh, stop, params, graph=kind), NAMES, tmp_path)
    assert len(made) == runs + 1 and not (tmp_path / "run").exists()
    np.testing.assert_array_equal(again, graph)
    np.testing.assert_array_equal(third, graph)


def test_a_row_is_the_fall_of_the_probes_losses(tmp_path):
    """Against the same runs made one by one and measured apart."""
    mesh = one_device()
    with jax.set_mesh(mesh), training.Termination() as stop:
        params = begin(mesh)
        given = trial(mesh, stop, params, graph="linear")
        graph, _ = skills.learn(given, NAMES, tmp_path)
        judge = skills.compiled.compile_steps(CFG, recipe(), skills.bandits.UNIFORM).judge
        measure = functools.partial(
            probe.measure, dataset=Synthetic(), chosen=given.draw.probed, batch=8, micro=8, threads=1, mesh=mesh
        )
        before = measure(lambda batch: judge(params, {}, batch, "nll"))
        after = np.load(tmp_path / "losses" / "1.npy")
    drop = np.maximum(before - after, 0)
    expected = drop / drop.max()
    expected[1] = 1
    np.testing.assert_allclose(graph[1], expected, rtol=1e-5)
