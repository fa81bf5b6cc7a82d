"""Features: formula against NumPy, device count, text-only rule, scores, early exit, resumption."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weights

from coincide_jax import extract
from coincide_jax.core import axes
from coincide_jax.models import vlm

MODEL = dict(
    vision=dict(patch=8, width=16, depth=1, heads=2, mlp=32),
    decoder=dict(width=16, depth=6, heads=2, kv_heads=1, mlp=32),
)
CFG = vlm.VLMConfig.tiny(MODEL, image_size=16, vocab=50)
ROWS, LENGTH = 16, 24


def tiny_params(mesh):
    return weights.draw(vlm.abstract(CFG), mesh, seed=3)


def tiny_batch():
    """Rows of different lengths; the last two rows have no image."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(12, LENGTH + 1, ROWS).astype(np.int32)
    start = np.full(ROWS, 2, np.int32)
    start[-2:] = -1
    position = np.arange(LENGTH)[None]
    first = np.where(start >= 0, start + CFG.image_tokens, 1)[:, None]
    return {
        "tokens": rng.integers(4, 50, (ROWS, LENGTH)).astype(np.int32),
        "lengths": lengths,
        "image_start": start,
        "images": rng.integers(0, 256, (ROWS, 16, 16, 3)).astype(np.uint8),
        "labels": (position >= first + 2) & (position < lengths[:, None]),
        "text": (position >= first) & (position < lengths[:, None]),
        "index": np.arange(ROWS, dtype=np.int32),
        "valid": np.ones(ROWS, bool),
    }


def one_device():
    return axes.make_mesh(devices=jax.devices()[:1])


def test_published_taps():
    assert extract.spread_taps(24, 5) == (3, 7, 11, 15, 19)
    assert extract.spread_taps(6, 5) == (0, 1, 2, 3, 4)
    assert extract.spread_taps(4, 5) == (0, 1, 2, 3)


def test_features_are_the_formula():
    mesh, batch, taps = one_device(), tiny_batch(), (0, 1, 2, 3, 4)
    with jax.set_mesh(mesh):
        params, put = tiny_params(mesh), axes.put_batch(batch, mesh)
        found = np.asarray(extract.features(params, put, CFG, taps)["features"])
        raw = np.asarray(vlm.forward(params, put, CFG, tap=lambda z: z).taps).astype(np.float64)
    for row in range(ROWS):
        parts = []
        for tap in taps:
            z = raw[tap, row]
            start = batch["image_start"][row]
            visual = z[start : start + CFG.image_tokens].mean(0) if start >= 0 else np.zeros(16)
            text = z[batch["text"][row]].mean(0)
            for mean in (visual, text):
                squashed = np.tanh(mean)
                parts.append(squashed / max(np.linalg.norm(squashed), 1e-12) / np.sqrt(10))
        wanted = np.concatenate(parts)
        if batch["image_start"][row] < 0:
            assert not wanted[:16].any()
        wanted /= np.linalg.norm(wanted)
        np.testing.assert_allclose(found[row], wanted, atol=6e-4)
        row_found = found[row].astype(np.float64)
        assert row_found @ wanted > 0.99999 * np.linalg.norm(row_found)


def test_early_exit_gives_the_same_bits():
    mesh, batch = one_device(), tiny_batch()
    with jax.set_mesh(mesh):
        params, put = tiny_params(mesh), axes.put_batch(batch, mesh)
        held = jax.tree.map(lambda leaf: leaf[:3], params["decoder"]["blocks"])
        cut = params | {"decoder": params["decoder"] | {"blocks": held}}
        np.testing.assert_array_equal(
            extract.features(cut, put, CFG, (0, 2))["features"], extract.features(params, put, CFG, (0, 2))["features"]
        )


def test_one_device_equals_eight_bitwise():
    """Eight devices run eight groups of `rows` rows at once; one device runs them one after another."""
    batch, taps = tiny_batch(), (0, 1, 2, 3, 4)
    wide = {
        name: np.concatenate([np.roll(value, shift, axis=0) for shift in range(8)]) for name, value in batch.items()
    }
    mesh = one_device()
    with jax.set_mesh(mesh):
        params = tiny_params(mesh)
        groups = [{name: value[i * ROWS : (i + 1) * ROWS] for name, value in wide.items()} for i in range(8)]
        alone = [np.asarray(extract.features(params, axes.put_batch(g, mesh), CFG, taps)["features"]) for g in groups]
    mesh = axes.make_mesh()
    with jax.set_mesh(mesh):
        together = np.asarray(extract.features(tiny_params(mesh), axes.put_batch(wide, mesh), CFG, taps)["features"])
    np.testing.assert_array_equal(together.view(np.uint16), np.concatenate(alone).view(np.uint16))


def test_scores_against_plain_softmax():
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(0, 3, (4, 6, 11)).astype(np.float32), rng.integers(0, 11, (4, 6)).astype(np.int32)
    labels = rng.random((4, 6)) < 0.6
    labels[3] = False
    found = extract.token_scores(jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(labels))
    for row in range(3):
        nll, el2n, aum = [], [], []
        for t in np.flatnonzero(labels[row, 1:]) + 1:
            p = np.exp(logits[row, t - 1].astype(np.float64))
            p /= p.sum()
            y = tokens[row, t]
            nll.append(-np.log(p[y]))
            el2n.append(np.linalg.norm(p - np.eye(11)[y]))
            aum.append(p[y] - np.delete(p, y).max())
        for name, values in (("nll", nll), ("el2n", el2n), ("aum", aum)):
            assert found[name][row] == pytest.approx(np.mean(values), rel=1e-4)
    assert all(float(value[3]) == 0.0 for value in found.values())


def test_scores_need_no_second_pass_and_change_no_feature():
    batch, taps = tiny_batch(), (0, 1, 2, 3, 4)
    for mesh in (one_device(), axes.make_mesh(2)):
        with jax.set_mesh(mesh):
            params, put = tiny_params(mesh), axes.put_batch(batch, mesh)
            scored = extract.features(params, put, CFG, taps, True)
            nll = vlm.token_nll(params, put, CFG, vlm.forward(params, put, CFG).hidden)
            plain = extract.features(params, put, CFG, taps)
        wanted = np.asarray(nll).sum(1) / batch["labels"][:, 1:].sum(1)
        np.testing.assert_allclose(scored["nll"], wanted, rtol=1e-4)
        np.testing.assert_allclose(
            np.asarray(scored["features"], np.float32), np.asarray(plain["features"], np.float32), atol=1e-3
        )
