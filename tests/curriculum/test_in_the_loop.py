"""Every sampler inside the training loop: rounds of a real run, and the probes between them."""

import jax
import numpy as np
import pytest
from loops import ARMS, CFG, RECORDS, Synthetic, begin, fit, lines, one_device, recipe
from ml_collections import ConfigDict

from coincide_jax import curriculum
from coincide_jax.core import artifacts, axes
from coincide_jax.core.errors import UserError
from coincide_jax.dataset import batches
from coincide_jax.models import vlm
from coincide_jax.training import loop, probe
from coincide_jax.training import steps as compiled
from configs import common

pytestmark = pytest.mark.usefixtures("quick_compile")

ONLINE = [name for name in curriculum.SAMPLERS if name not in curriculum.OFFLINE]
ROWS = {name: {"name": name} for name in curriculum.SAMPLERS}
ROWS |= {f"{name} with rehearsal": {"name": name, "rehearsal": 0.25} for name in ONLINE}
ROWS |= {
    "progress by a probe": {"name": "progress", "probe": 2},
    "progress by exact answers": {"name": "progress", "probe": 2, "objective": "accuracy"},
    "skill_it by a probe": {"name": "skill_it", "probe": 2},
    "arms drawn per step": {"name": "coincide_plus", "draw": "step"},
}
IN_SHORT = ("static", "hard_to_easy", "coincide_plus", "progress by exact answers", "skill_it by a probe",
            "exp3_ix with rehearsal", "arms drawn per step")  # fmt: skip


def run(out, row: dict, mesh, count=RECORDS, watched=None, **changes):
    """Nine steps in three rounds over `count` records; parameters and summary."""
    settings = ConfigDict(dict(common.defaults().curriculum) | {"round_steps": 3, "gamma": 0.2} | row)
    records, arm, arms = np.arange(count), np.arange(count) % ARMS, ARMS
    if row["name"] in curriculum.ONE_ARM:
        arm, arms = np.zeros(count, np.int64), 1
    difficulty = np.asarray([number % 7 for number in range(count)], float)
    sampler, rank = curriculum.prepare(settings, records, arm, arms, difficulty)
    more = {"arm": arm, "arms": arms, "rank": rank}
    if sampler.probe:
        more["probed"] = probe.choose(records, arm, arms, settings.probe, 0)
    if watched is not None:
        more["watched"] = watched
    objective = "accuracy" if settings.objective == "accuracy" else "nll"
    return fit(out, mesh, sampler=sampler, more=more, objective=objective, records=count, total=72, **changes)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_SHORT else pytest.mark.long) for name in ROWS]
)
def test_three_rounds(name, tmp_path):
    _, summary = run(tmp_path, ROWS[name], one_device())
    rounds = lines(tmp_path, "curriculum.jsonl")
    assert len(rounds) == 3 and summary["steps"] == 9 and summary["records"] == 72
    for line in rounds:
        p = np.asarray(line["probabilities"])
        assert (p >= 0).all() and p.sum() == pytest.approx(1.0, abs=1e-5)
    assert summary["moved"] > 0 or ROWS[name]["name"] not in ONLINE


def test_how_far_a_probability_moved():
    even = np.array([[0.25, 0.25, 0.25, 0.25], [0.25, 0.35, 0.2, 0.2]])
    assert loop.moved(even) == pytest.approx(0.4)  # by 0.1, of 1/4
    ran_out = np.array([[0.25, 0.25, 0.25, 0.25], [1 / 3, 1 / 3, 0.0, 1 / 3]])
    assert loop.moved(ran_out) == pytest.approx(0.0, abs=1e-12)
    assert loop.moved(np.ones((5, 1))) == 0


def test_a_step_of_one_arm(tmp_path):
    run(tmp_path, ROWS["arms drawn per step"], one_device(), count=240)  # no arm runs out
    for line in lines(tmp_path, "curriculum.jsonl"):
        assert all(count % 8 == 0 for count in line["draws"]) and sum(line["draws"]) == 24


def test_a_run_with_probes_goes_on_where_it_stopped(tmp_path):
    """The second half of a run, from the checkpoint of its fourth step."""
    whole, _ = run(tmp_path / "whole", ROWS["progress by a probe"], one_device(), keep=3)
    halves = tmp_path / "halves"
    artifacts.write_json(halves / "run.json", artifacts.read_json(tmp_path / "whole" / "run.json"))
    (halves / "checkpoints").mkdir()
    for name in ("metrics.jsonl", "curriculum.jsonl", "arms.jsonl"):
        (halves / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    (tmp_path / "whole" / "checkpoints" / "4").rename(halves / "checkpoints" / "4")
    again, _ = run(halves, ROWS["progress by a probe"], one_device())
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(whole))
    assert lines(halves) == lines(tmp_path / "whole")
    for name in ("curriculum.jsonl", "arms.jsonl"):
        assert lines(halves, name) == lines(tmp_path / "whole", name)
    told = lines(halves, "arms.jsonl")
    assert [line["step"] for line in told] == [0, 3, 6, 9] and [("probe" in line) for line in told] == [1, 1, 1, 0]


def test_watching_measures_and_changes_nothing(tmp_path):
    """Losses by arm are those of the steps; watched records leave weights and lines of the run as they are."""
    watched = np.asarray([50, 51, 52, 53])
    bare, _ = run(tmp_path / "bare", ROWS["coincide_plus"], one_device())
    seen, _ = run(tmp_path / "seen", ROWS["coincide_plus"], one_device(), watched=watched)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(bare), jax.device_get(seen))
    assert lines(tmp_path / "bare") == lines(tmp_path / "seen")
    without, told = (lines(tmp_path / name, "arms.jsonl") for name in ("bare", "seen"))
    assert [line["step"] for line in told] == [0, 3, 6, 9] and [line["step"] for line in without] == [3, 6, 9]
    assert [line["losses"] for line in without] == [line["losses"] for line in told[1:]]
    first, last = (np.asarray(told[line]["watch"]["nll"]) for line in (0, -1))
    assert last.mean() < first.mean() and set(told[0]["watch"]["exact"]) <= {0.0, 1.0}
    draws = np.asarray(lines(tmp_path / "seen", "curriculum.jsonl")[0]["draws"])
    assert [loss is not None for loss in told[1]["losses"]] == (draws > 0).tolist()
    mean = np.average([loss or 0.0 for loss in told[1]["losses"]], weights=draws)
    steps = lines(tmp_path / "seen")[:3]
    assert 0.8 < mean / np.mean([line["loss"] for line in steps]) < 1.25  # the steps' mean is over tokens


def test_which_answers_are_right():
    asked = np.arange(40) < np.array([[16], [16], [17], [17], [40], [0]])
    right = asked & (np.arange(40) >= np.array([[0], [1], [8], [9], [20], [0]]))
    accuracy, tokens = compiled.graded(asked, right, "accuracy")
    assert accuracy.tolist() == [1, 0, 1, 0, 1, 1] and tokens.tolist() == [16, 16, 17, 17, 40, 0]
    assert compiled.graded(asked, right, "exact")[0].tolist() == [1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("kind", ["nll", "exact"])
def test_what_a_probe_measures(kind):
    """Against logits of the whole batch in float64."""
    mesh, data, records = one_device(), Synthetic(), np.arange(12)
    chosen = probe.choose(records, records % ARMS, ARMS, 3, seed=1)
    assert [set(row % ARMS) for row in chosen] == [{0}, {1}, {2}] and all(len(set(row)) == 3 for row in chosen)
    sampler = curriculum.make(ConfigDict(dict(common.defaults().curriculum)))
    with jax.set_mesh(mesh):
        params, judge = begin(mesh), compiled.compile_steps(CFG, recipe(), sampler).judge
        found = probe.measure(
            lambda batch: judge(params, {}, batch, kind), data, chosen, batch=8, micro=4, threads=1, mesh=mesh
        )
        scores_of = jax.jit(lambda params, batch: vlm.logits(params, vlm.forward(params, batch, CFG).hidden, CFG))
        expected = np.full(chosen.shape, np.nan)
        (rows,) = batches.planned(data, chosen.reshape(1, -1), micro=9, threads=1)
        for batch in rows:
            logits = np.asarray(scores_of(params, axes.put_batch(batch, mesh)), np.float64)
            for row, slot in enumerate(batch["slot"]):
                places = np.flatnonzero(batch["labels"][row])
                said, right = logits[row, places - 1], batch["tokens"][row, places]
                if len(places):
                    nll = np.log(np.exp(said).sum(1)) - said[np.arange(len(places)), right]
                    expected.flat[slot] = (said.argmax(1) == right).all() if kind == "exact" else nll.mean()
    np.testing.assert_allclose(found, np.nanmean(expected, axis=1), rtol=1e-5, atol=1e-6)


def test_clusters_without_a_record_are_no_arms():
    """As a coreset leaves them: `training.run` hands in the filled ones, numbered anew."""
    settings = ConfigDict(dict(common.defaults().curriculum) | {"name": "exp3"})
    filled, arm = np.unique([0, 0, 2], return_inverse=True)
    sampler, _ = curriculum.prepare(settings, np.arange(3), arm, len(filled))
    assert sampler.probabilities(sampler.init(2), np.ones(2, bool)).shape == (2,)
    with pytest.raises(UserError, match="arm 1 of 3 has no record"):
        curriculum.prepare(settings, np.arange(3), np.asarray([0, 0, 2]), 3)
