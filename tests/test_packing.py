"""Several records in a row: contents, the same model outputs, the same training run as with one record a row."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import CFG, Synthetic, begin, fit, lines, one_device
from test_training import interrupt

from coincide_jax.core import axes
from coincide_jax.core.errors import UserError
from coincide_jax.dataset import batches
from coincide_jax.models import layers, vlm
from coincide_jax.training import steps as compiled

pytestmark = pytest.mark.usefixtures("quick_compile")

DATA = Synthetic()
LENGTH = 48  # of a row: up to four records


def both(count: int, share: int = 1) -> tuple[dict, dict]:
    """Records 0 … count - 2 and an empty slot, one in a row and packed."""
    rows = [DATA.row(index) for index in range(count - 1)] + [-1]
    return batches.assemble(rows, LENGTH, 16), batches.pack(rows, LENGTH, 16, share)


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_every_record_once_and_overlap_nowhere(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 33, rng.integers(1, 40))
    row, column, used = batches.fit_rows(sizes, 32)
    taken = np.zeros((used, 32), int)
    for number in np.flatnonzero(sizes):
        assert column[number] + sizes[number] <= 32
        taken[row[number], column[number] : column[number] + sizes[number]] += 1
    assert taken.max(initial=0) <= 1 and taken.sum() == sizes.sum()
    assert (taken.sum(1) > 0).all() and (np.sort(taken.sum(1))[1:] > 16).all()  # two half-empty rows would be one


def test_contents():
    alone, packed = both(16)
    rows = len(packed["tokens"])
    assert rows < 12 and packed["tokens"].shape == packed["record"].shape == (rows, LENGTH)
    for number in range(15):
        size, place = alone["lengths"][number], packed["place"][number]
        here = place // LENGTH, slice(place % LENGTH, place % LENGTH + size)
        np.testing.assert_array_equal(packed["tokens"][here], alone["tokens"][number, :size])
        np.testing.assert_array_equal(packed["labels"][here][1:], alone["labels"][number, 1:size])
        np.testing.assert_array_equal(packed["position"][here], np.arange(size))
        assert (packed["record"][here] == number).all() and not packed["labels"][here][0]
    assert (packed["record"] >= 0).sum() == alone["lengths"][:15].sum()
    assert not packed["labels"][packed["record"] < 0].any() and not (packed["record"] == 15).any()
    for key in ("lengths", "image_start", "images", "index", "valid"):
        np.testing.assert_array_equal(packed[key], alone[key])


@pytest.mark.parametrize(("count", "share"), [(16, 8), (16, 1), (8, 8), (3, 1), (40, 4)])
def test_the_number_of_rows_suits_the_devices_and_has_few_values(count, share):
    seen = {len(batches.pack([DATA.row(first + n) for n in range(count)], 24, 16, share)["tokens"]) for first in (0, 9)}
    seen.add(len(batches.pack([-1] * count, 24, 16, share)["tokens"]))
    assert all(rows % share == 0 and rows <= count for rows in seen) and len(seen) <= batches.ROW_COUNTS


def outputs(batch: dict, mesh) -> tuple:
    """Sum of NLL and supervised tokens of each record; gradient of a weighted sum of both; the residual stream."""
    weight = jnp.cos(jnp.arange(len(batch["valid"]), dtype=jnp.float32))

    @jax.jit
    def run(params, batch):
        def total(params):
            nll, tokens = compiled.record_nll(params, batch, CFG)
            return (jax.reshard(nll, jax.P(None)) * weight).sum(), (nll, tokens)

        grads, found = jax.grad(total, has_aux=True)(params)
        return *found, grads, vlm.forward(params, batch, CFG).hidden

    with jax.set_mesh(mesh):
        return jax.device_get(run(begin(mesh), axes.put_batch(batch, mesh)))


@pytest.fixture(scope="module")
def alone():
    return outputs(both(16)[0], one_device())


@pytest.mark.parametrize("how", ["whole", "blocks", "fused", "8 devices"])
def test_a_packed_record_is_what_it_is_alone(how, alone, monkeypatch):
    mesh = axes.make_mesh(2) if how == "8 devices" else one_device()
    if how == "blocks":
        monkeypatch.setattr(layers, "WHOLE_UP_TO", 8)
        monkeypatch.setattr(layers, "QUERY_BLOCK", 10)
    if how == "fused":
        plain, calls = layers.fused_attention, []

        def fused(*parts, **settings):
            calls.append(settings)
            return plain(*parts, **settings | {"implementation": "xla"})

        monkeypatch.setattr(layers, "fused_attention", fused)
        monkeypatch.setattr(layers, "has_cudnn", lambda q: True)
    found = outputs(both(16, mesh.shape["data"])[1], mesh)
    assert how != "fused" or any(call.get("segments") is not None for call in calls)
    np.testing.assert_allclose(found[0], alone[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[1], alone[1])
    assert alone[1][:15].min() > 0 and alone[1][15] == 0
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(alone[2]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * scale), found[2], alone[2])
    assert np.abs(alone[2]["projector"]["w1"]).max() > 0
    assert np.isfinite(found[3]).all()  # padding as well


RUN = {"total": 72, "batch": 16, "micro_batch": 8, "learning_rate": 1e-3}  # five steps, the last one half empty


@pytest.fixture(scope="module")
def few_shapes():
    """One bucket, and one number of packed rows: every run of this recipe takes one of two programs a `loss_mean`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Synthetic, "buckets", (LENGTH,))
        patch.setattr(batches, "ROW_COUNTS", 2)
        yield


@pytest.fixture(scope="module")
def runs(few_shapes, tmp_path_factory):
    """(loss_mean, packing) → parameters and folder of a run."""
    found, top = {}, tmp_path_factory.mktemp("runs")
    for mean in ("tokens", "micro_batch"):
        for packing in (False, True):
            out = top / f"{mean} {packing}"
            params, _ = fit(out, one_device(), packing=packing, loss_mean=mean, **RUN)
            found[mean, packing] = jax.device_get(params), out
    return found


@pytest.mark.parametrize("mean", ["tokens", "micro_batch"])
def test_a_packed_run_is_the_plain_run(mean, runs):
    rows = {
        packing: [lines(runs[mean, packing][1], name) for name in ("metrics.jsonl", "curriculum.jsonl")]
        for packing in (False, True)
    }
    for key in ("loss", "gradient_norm"):
        plain, packed = ([line[key] for line in rows[packing][0]] for packing in (False, True))
        assert packed[0] == pytest.approx(plain[0], rel=1e-5)
        np.testing.assert_allclose(packed, plain, rtol=2e-4)
    for key in ("tokens", "records"):
        assert [line[key] for line in rows[True][0]] == [line[key] for line in rows[False][0]]
    assert rows[True][0][0]["records"] == 16 and rows[True][0][-1]["records"] == 8
    plain, packed = (sum(line["filled"] for line in rows[packing][0]) for packing in (False, True))
    assert packed > 1.5 * plain  # several records a row
    plain, packed = ([line["probabilities"] for line in rows[packing][1]] for packing in (False, True))
    np.testing.assert_allclose(packed, plain, atol=1e-4)
    assert packed[0] != packed[-1]  # what the sampler learned came from each record's own loss


def test_the_mean_of_micro_batches_is_another_one(few_shapes, tmp_path, monkeypatch):
    """By hand from the records' sums: each micro-batch of the order drawn weighs the same, a half-empty one too."""
    mesh, losses, plans, planned = one_device(), {}, [], batches.planned
    monkeypatch.setattr(batches, "planned", lambda data, plan, **how: plans.append(plan) or planned(data, plan, **how))
    for mean in ("tokens", "micro_batch"):
        fit(tmp_path / mean, mesh, loss_mean=mean, **RUN | {"total": 12})
        losses[mean] = lines(tmp_path / mean)[0]["loss"]
    nll_of = jax.jit(lambda params, batch: compiled.record_nll(params, batch, CFG))
    with jax.set_mesh(mesh):
        params, drawn, means = begin(mesh), plans[-1][0], []
        assert (drawn[:12] >= 0).all() and (drawn[12:] < 0).all()
        for number in range(2):
            part = [DATA.row(int(index)) for index in drawn[number * 8 :][:8]]
            nll, tokens = nll_of(params, axes.put_batch(batches.assemble(part, LENGTH, 16), mesh))
            means.append(float(nll.sum() / tokens.sum()))
    assert losses["micro_batch"] == pytest.approx(np.mean(means), rel=1e-5)
    assert abs(losses["micro_batch"] - losses["tokens"]) > 1e-3


def test_packed_steps_are_the_same_on_1_and_8_devices(runs, tmp_path):
    fit(tmp_path, axes.make_mesh(2), packing=True, **RUN)
    one, eight = lines(runs["tokens", True][1]), lines(tmp_path)
    for key in ("loss", "gradient_norm"):
        np.testing.assert_allclose([row[key] for row in eight[:3]], [row[key] for row in one[:3]], rtol=1e-5)


def test_a_packed_run_goes_on_where_it_stopped(runs, tmp_path, monkeypatch):
    whole, out = runs["tokens", True]
    with monkeypatch.context() as patch:
        interrupt(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            fit(tmp_path, one_device(), packing=True, **RUN)
    again, _ = fit(tmp_path, one_device(), packing=True, **RUN)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), whole)
    assert lines(tmp_path) == lines(out)
    with pytest.raises(UserError, match=r"holds a run with packing = True, now False; take another folder"):
        fit(tmp_path, one_device(), **RUN)
