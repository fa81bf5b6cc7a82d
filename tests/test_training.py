"""The training loop on a model of width 32: same numbers on any mesh, after any stop, with each shape compiled once."""

import collections
import dataclasses
import os
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import ARMS, CFG, RECORDS, Synthetic, begin, fit, lines, one_device, recipe
from ml_collections import ConfigDict

from coincide_jax import curriculum
from coincide_jax.core import artifacts, axes, precision
from coincide_jax.core.errors import UserError
from coincide_jax.dataset import batches
from coincide_jax.kernels import bandits
from coincide_jax.models import vlm
from coincide_jax.models.flops import Costs
from coincide_jax.training import log as logs
from coincide_jax.training import loop, stages
from coincide_jax.training import state as states
from coincide_jax.training import steps as compiled
from coincide_jax.training.arms import ArmLog
from coincide_jax.training.state import Schedule
from configs import common

pytestmark = pytest.mark.usefixtures("quick_compile")


def assert_equal(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Parameters and folder of whole runs, by lag."""
    found = {}
    for lag in (0, 1):
        out = tmp_path_factory.mktemp(f"lag{lag}")
        found[lag] = jax.device_get(fit(out, one_device(), lag=lag)[0]), out
    return found


def test_three_steps_are_the_same_on_1_and_8_devices(tmp_path, undisturbed):
    params, summary = fit(tmp_path, axes.make_mesh(2))  # 4 × 2: rows, weights and heads are all shared
    there, here = lines(tmp_path), lines(undisturbed[0][1])
    for key in ("loss", "gradient_norm"):
        np.testing.assert_allclose([row[key] for row in there[:3]], [row[key] for row in here[:3]], rtol=1e-5)
    assert [row["tokens"] for row in there] == [row["tokens"] for row in here] and summary["records"] == RECORDS
    assert len(params["decoder"]["head"].sharding.device_set) == 8


def test_loss_is_the_mean_over_the_tokens_of_the_step_before_its_update(undisturbed):
    out, mesh = undisturbed[0][1], one_device()
    assert sum(lines(out, "curriculum.jsonl")[0]["draws"]) == 24
    with jax.set_mesh(mesh):
        params, data, nll, tokens = begin(mesh), Synthetic(), 0.0, 0
        scores_of = jax.jit(lambda params, batch: vlm.logits(params, vlm.forward(params, batch, CFG).hidden, CFG))
        for batch in next(batches.planned(data, np.arange(8)[None], micro=8, threads=1)):
            logits = np.asarray(scores_of(params, axes.put_batch(batch, mesh)), np.float64)
            for row in range(8):
                for t in np.flatnonzero(batch["labels"][row]):
                    scores = logits[row, t - 1]
                    nll += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[batch["tokens"][row, t]]
                    tokens += 1
    single = out.parent / "single"
    single.mkdir()
    fit(single, mesh, total=8, records=8)  # every record once, whatever the sampler
    line = lines(single)[0]
    assert line["tokens"] == tokens
    np.testing.assert_allclose(line["loss"], nll / tokens, rtol=1e-5)


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """Parameters and folder of the same run by micro-batches of two, and how often which shape was traced."""
    out, traced, forward = tmp_path_factory.mktemp("divided"), collections.Counter(), vlm.forward

    def counting(params, batch, *args, **options):
        traced[batch["tokens"].shape] += 1
        return forward(params, batch, *args, **options)

    compiled._of_model.cache_clear()  # what a test before traced would not be counted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlm, "forward", counting)
        params, _ = fit(out, one_device(), micro_batch=2)
    return params, out, traced


def test_micro_batches_add_up(divided, undisturbed):
    params, out, _ = divided
    for row, other in zip(lines(out), lines(undisturbed[0][1]), strict=True):
        np.testing.assert_allclose(row["loss"], other["loss"], rtol=2e-5)
    np.testing.assert_allclose(params["projector"]["w1"], undisturbed[0][0]["projector"]["w1"], atol=1e-4)


def test_each_bucket_compiles_once(divided):
    assert divided[2] == {(2, 16): 1, (2, 24): 1}


def interrupt(monkeypatch, at: int, action):
    """Does `action` before optimiser step number `at` of the next run."""
    original = loop.compiled.compile_steps

    def wrapped(*args):
        run, done = original(*args), []

        def apply(*arguments):
            done.append(0)
            if len(done) == at:
                action()
            return run.apply(*arguments)

        return run._replace(apply=apply)

    monkeypatch.setattr(loop.compiled, "compile_steps", wrapped)


@pytest.mark.parametrize(("lag", "at"), [(0, 3), (1, 2)])
def test_sigterm_saves_and_the_rerun_ends_bitwise_the_same(tmp_path, undisturbed, monkeypatch, capsys, lag, at):
    with monkeypatch.context() as patch:
        interrupt(patch, at, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            fit(tmp_path, one_device(), lag=lag)
    assert stopped.value.code == 143 and len(lines(tmp_path)) == at
    assert f"saved at step {at} of 5" in capsys.readouterr().out
    params, _ = fit(tmp_path, one_device(), lag=lag)
    assert f"goes on at step {at} of 5" in capsys.readouterr().out
    assert_equal(jax.device_get(params), undisturbed[lag][0])
    for name in ("metrics.jsonl", "curriculum.jsonl"):
        assert lines(tmp_path, name) == lines(undisturbed[lag][1], name)


def test_a_kill_after_the_last_checkpoint_loses_nothing(tmp_path, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 5, lambda: (_ for _ in ()).throw(RuntimeError("killed")))
        opened, original = [], loop.checkpoint.Checkpoints
        patch.setattr(loop.checkpoint, "Checkpoints", lambda *args: opened.append(original(*args)) or opened[-1])
        with pytest.raises(RuntimeError, match="killed"):
            fit(tmp_path, one_device())
        opened[0].close()  # a killed process would not go on writing beside the next one
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 77.0}\n{"step": 6, "lo')  # written after the checkpoint, the last one torn
    params, _ = fit(tmp_path, one_device())
    assert_equal(jax.device_get(params), undisturbed[0][0])
    assert lines(tmp_path) == lines(undisturbed[0][1])


def test_lag_one_draws_a_round_earlier(undisturbed):
    early, late = (lines(undisturbed[lag][1], "curriculum.jsonl") for lag in (1, 0))
    assert [row["drawn_at"] for row in late] == [0, 3]
    assert [row["drawn_at"] for row in early] == [0, 0, 3]
    assert late[0]["probabilities"] == early[0]["probabilities"] == early[1]["probabilities"]
    assert late[1]["probabilities"] != late[0]["probabilities"]


def test_a_folder_of_another_run_is_refused(undisturbed):
    with pytest.raises(UserError, match=r"holds a run with seed = 0, now 1; take another folder"):
        fit(undisturbed[0][1], one_device(), seed=1)


def test_lora_trains_adapters_and_projector_and_leaves_the_base_alone(tmp_path):
    mesh = one_device()
    with jax.set_mesh(mesh):
        params = begin(mesh)
        before = jax.device_get(params)
    lora = {"rank": 2, "alpha": 4.0, "dropout": 0.1, "targets": ("wq", "down")}
    merged, summary = fit(tmp_path, mesh, params=params, mode="lora", lora=lora, projector_learning_rate=1e-2)
    assert_equal(jax.device_get(params), before)
    changed = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(merged), jax.tree.leaves(before), strict=True)
        if not np.array_equal(new, old)
    }
    assert changed == {"decoder.blocks.wq", "decoder.blocks.down"} | {
        f"projector.{name}" for name in ("w1", "b1", "w2", "b2")
    }
    assert np.isfinite(summary["loss"])


def test_the_projector_alone(tmp_path):
    mesh = one_device()
    with jax.set_mesh(mesh):
        params = begin(mesh)
    trained, summary = fit(tmp_path, mesh, params=params, mode="projector", projector_learning_rate=1e-2)
    for top in ("vision", "decoder"):
        assert_equal(trained[top], params[top])
    assert not any(np.array_equal(trained["projector"][name], params["projector"][name]) for name in ("w1", "w2"))
    kept = jax.eval_shape(lambda: states.divide(params, CFG, recipe(mode="projector"), jax.random.key(0), mesh)[0])
    assert set(kept) == {"projector"} and np.isfinite(summary["loss"])


def test_steps_take_nothing_from_the_host_unasked(tmp_path, monkeypatch):
    """Nor does a round: whatever they are handed lies on the devices, put there by a call that says so."""

    def closed(function):
        def call(*arguments):
            with jax.transfer_guard("disallow"):
                return function(*arguments)

        return function and call

    real = compiled.compile_steps
    monkeypatch.setattr(compiled, "compile_steps", lambda *a: compiled.Steps(*map(closed, real(*a))))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
        closed(jax.jit(lambda number: number + 1))(np.int32(1))
    lora = {"rank": 2, "alpha": 4.0, "dropout": 0.1, "targets": ("wq",)}
    probed = {"probed": np.arange(2 * ARMS).reshape(2, ARMS).T}
    sampler = curriculum.make(ConfigDict(dict(common.defaults().curriculum) | {"name": "skill_it", "probe": 2}))
    fit(tmp_path, axes.make_mesh(), mode="lora", lora=lora, sampler=sampler, more=probed)


def test_the_projector_has_its_own_learning_rate(tmp_path):
    mesh = one_device()
    with jax.set_mesh(mesh):
        params = begin(mesh)
    trained, _ = fit(tmp_path, mesh, params=params, projector_learning_rate=0.0)
    assert_equal(trained["projector"], params["projector"])
    assert not np.array_equal(trained["vision"]["patch"], params["vision"]["patch"])


def test_a_last_step_with_empty_slots_counts_only_its_records(tmp_path):
    _, summary = fit(tmp_path, one_device(), total=19, micro_batch=2)
    assert [row["records"] for row in lines(tmp_path)] == [8, 8, 3] and summary["records"] == 19
    assert all(np.isfinite(row["loss"]) for row in lines(tmp_path))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(UserError, match=r"train: loss .* at step \d \(steps 1–\d were checked\)"):
        fit(tmp_path, one_device(), learning_rate=1e30, clip=1e30)


HALF = dataclasses.replace(CFG, precision=precision.choose("float16"))
SCALED = {"cfg": HALF, "steps": 32, "round_steps": 8, "sampler": bandits.UNIFORM, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def overflown(tmp_path_factory):
    """A float16 run whose first scale is far too large: parameters, lines, summary."""
    out = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "FIRST_SCALE", 2.0**22)
        params, summary = fit(out, one_device(), **SCALED)
    return jax.device_get(params), lines(out), summary


def test_float16_skips_overflowing_steps_and_recovers(overflown):
    params, found, summary = overflown
    skipped = [line["skipped"] for line in found]
    count = sum(skipped)
    assert 3 <= count <= 16 and skipped[:3] == [1] * 3 and skipped[-8:] == [0] * 8 and summary["skipped"] == count
    # halved by every step that overflows; near the border one may after another did not
    assert [line["loss_scale"] for line in found] == [2.0 ** (22 - sum(skipped[:step])) for step in range(32)]
    assert all((line["gradient_norm"] is None) == bool(line["skipped"]) for line in found)
    losses = [line["loss"] for line in found]
    assert np.mean(losses[-4:]) < np.mean(losses[:count]) - 0.3  # it learns once the scale fits
    assert all(leaf.dtype == np.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_skipped_step_leaves_parameters_and_optimiser_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**22)
    mesh = one_device()
    with jax.set_mesh(mesh):
        params = begin(mesh)
    trained, summary = fit(tmp_path, mesh, params=params, **SCALED | {"steps": 2})
    assert summary["skipped"] == 2 and summary["records"] == 16
    assert_equal(jax.device_get(trained), jax.device_get(params))


def test_a_float16_run_resumes_with_its_scale(tmp_path, overflown, monkeypatch):
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**22)
    with monkeypatch.context() as patch:
        interrupt(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            fit(tmp_path, one_device(), **SCALED)
    params, _ = fit(tmp_path, one_device(), **SCALED)
    assert_equal(jax.device_get(params), overflown[0])
    assert lines(tmp_path) == overflown[1]


def test_a_scale_that_falls_below_its_bound_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**22)
    monkeypatch.setattr(precision, "LOWEST_SCALE", 2.0**21)
    with pytest.raises(UserError, match=r"still overflow float16 at step 3 although the loss scale fell to"):
        fit(tmp_path, one_device(), **SCALED)


def test_float16_stops_at_a_loss_that_is_not_finite(tmp_path):
    mesh = one_device()
    with jax.set_mesh(mesh):
        params = begin(mesh)
        params["decoder"]["norm"]["scale"] = params["decoder"]["norm"]["scale"] * jnp.nan
    with pytest.raises(UserError, match="train: loss nan"):
        fit(tmp_path, mesh, params=params, **SCALED)


def test_seconds_lie_between_completions_and_add_up(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 7))
    monkeypatch.setattr(logs, "time", types.SimpleNamespace(monotonic=lambda: float(next(clock))))
    arms = ArmLog(tmp_path / "arms.jsonl", 1, 0, {}, None, {}, {})
    log = logs.Log(tmp_path, 0, arms, Costs(2.0, 0.5, 3.0, 5.0), 100.0)
    for step in range(1, 6):
        metrics = {"loss": jnp.float32(step), "gradient_norm": jnp.float32(1.0), "losses": jnp.ones(1)}
        log.step(step, metrics, logs.Work(70, 140, 40, 10, 2), np.zeros(1, np.int32))
        assert np.isnan(log.loss) if step < 3 else log.loss == step - 2  # the newest that has ended
    log.flush("train")
    assert log.loss == 5.0
    log.close()
    found = artifacts.read_jsonl(tmp_path / "metrics.jsonl")
    # the two still in flight share the last lap
    assert [line["seconds"] for line in found] == [7.0, 7.0, 7.0, 3.5, 3.5]
    assert [line["tokens_per_second"] for line in found] == [10.0, 10.0, 10.0, 20.0, 20.0]
    # 70 positions, 40 pairs, 10 supervised, 2 images: 140 + 20 + 30 + 10 FLOP
    assert [line["mfu"] for line in found] == pytest.approx([0.2857] * 3 + [0.5714] * 2)
    assert all(line["filled"] == 0.5 and line["positions"] == 70 and line["data_wait"] == 0 for line in found)
    assert all(line.get("host_memory_mib", 0) > 50 for line in found)


def test_rate_rises_over_the_warm_up_and_falls_to_zero():
    schedule = Schedule.of(recipe(warmup=0.25, learning_rate=2.0), 16)
    values = np.asarray([schedule.peak * schedule.factor(jnp.int32(step)) for step in range(17)])
    np.testing.assert_allclose(values[:5], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
    assert (np.diff(values[4:]) < 0).all() and abs(values[16]) < 1e-6


def test_recipe_mistakes_are_sentences():
    for changes, sentence in (
        ({"mode": "loro"}, r"unknown train.mode 'loro'; did you mean 'lora'"),
        ({"micro_batch": 3}, r"train.micro_batch is 3; expected a divisor of train.batch = 8"),
        ({"clip": 0.0}, r"train.clip is 0.0; expected a number above 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            recipe(**changes)


def row(tmp_path, **changes):
    """A config and the folders of a row over a pool of 20 records in 4 clusters."""
    config = common.defaults()
    config.update_from_flattened_dict({f"curriculum.{key}": value for key, value in changes.items()})
    for name, indices in (("select", [3, 5, 7]), ("match", [3, 5, 7, 9, 11, 13])):
        artifacts.write_npy(tmp_path / name / "indices.npy", np.asarray(indices))
    artifacts.write_npy(tmp_path / "cluster" / "centroids.npy", np.eye(4, 8, dtype=np.float32))
    artifacts.write_npy(tmp_path / "cluster" / "assignment.npy", np.arange(24, dtype=np.int32) % 4)
    return config, {name: tmp_path / name for name in ("select", "match", "cluster")}, {"pool": list(range(20))}


def test_what_a_row_may_draw_and_how_much(tmp_path):
    config, inputs, split = row(tmp_path)
    records, total = stages._records(config, inputs, split)
    assert records.tolist() == [3, 5, 7] and total == 3
    config, inputs, split = row(tmp_path, pool="all")
    assert stages._records(config, inputs, split)[1] == 20  # the full row is never cut
    config, inputs, split = row(tmp_path, pool="all", name="exp3")
    assert stages._records(config, inputs, split)[1] == 6  # as many as the headline's coreset
    del inputs["match"]
    assert stages._records(config, inputs, split)[1] == 4  # a fifth
    config.curriculum.pool = "al"
    with pytest.raises(UserError, match=r"unknown curriculum.pool 'al'; did you mean 'all'"):
        stages._records(config, inputs, split)


def test_arms_are_the_clusters_or_fewer(tmp_path):
    config, inputs, _ = row(tmp_path)
    records = np.arange(20)
    arm, arms = stages._arms(records, config, inputs, tmp_path)
    assert arms == 4 and arm.tolist() == (records % 4).tolist()
    config.curriculum.k = 2
    with jax.set_mesh(one_device()):
        arm, arms = stages._arms(records, config, inputs, tmp_path)
    assert arms == 2 and set(arm) == {0, 1} and all(len(set(arm[c::4])) == 1 for c in range(4))
    config.curriculum.k = 0
    arm, arms = stages._arms(np.asarray([0, 2, 3, 7]), config, inputs, tmp_path)  # none of cluster 1
    assert arms == 3 and arm.tolist() == [0, 1, 2, 2]
    assert np.load(tmp_path / "arms" / "assignment.npy").tolist() == [0, -1, 1, 2]
    stages._arms(records, config, inputs, tmp_path)
    assert not (tmp_path / "arms" / "assignment.npy").exists()
    config.curriculum.k = 5
    with pytest.raises(UserError, match=r"curriculum.k is 5; expected 0 \(the clusters\) or 1 to 4"):
        stages._arms(records, config, inputs, tmp_path)
