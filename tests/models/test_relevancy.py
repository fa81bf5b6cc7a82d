"""Relevancy maps against finite differences, against PyTorch with every map held, on meshes, and their memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from coincide_jax.core import axes
from coincide_jax.models import decoder, hf, layers, relevancy, vlm

pytestmark = pytest.mark.usefixtures("quick_compile")


def recursion(weighted: np.ndarray, position: int) -> np.ndarray:
    """Eq. 8 as it is written, with whole matrices R: maps [l, t] from Ā [l, t, t]."""
    r, found = np.eye(weighted.shape[-1]), []
    for one in weighted:
        step = one @ r
        found.append(step[position])
        r = r + step
    return np.array(found)


def rms(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def slow_decoder(params: dict, x: np.ndarray, token: int, position: int, cfg, bump=None) -> tuple[float, np.ndarray]:
    """LLaMA in float64 for one row x [t, w]: the token's logit, and the attention weights [l, heads, t, t].

    bump: (layer, head, t, s, size), added to that attention weight.
    """
    length, half, weights = len(x), cfg.head_dim // 2, []
    angle = np.arange(length)[:, None] * cfg.rope_theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    group = cfg.heads // cfg.kv_heads
    for layer in range(cfg.depth):
        block = jax.tree.map(lambda leaf, n=layer: leaf[n], params["blocks"])
        h = rms(x, block["norm1"]["scale"], cfg.norm_eps)
        q = np.einsum("tw,wkgd->tkgd", h, block["wq"]).reshape(length, cfg.heads, -1)
        k, v = (np.repeat(np.einsum("tw,wkd->tkd", h, block[name]), group, axis=1) for name in ("wk", "wv"))
        q, k = (
            np.concatenate([p[..., :half] * cos - p[..., half:] * sin, p[..., half:] * cos + p[..., :half] * sin], -1)
            for p in (q, k)
        )
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(cfg.head_dim)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        weights.append(weight)
        if bump and bump[0] == layer:
            weight = weight.copy()
            weight[bump[1:4]] += bump[4]
        x = x + np.einsum("hts,shd,hdw->tw", weight, v, block["wo"].reshape(cfg.heads, cfg.head_dim, -1))
        h = rms(x, block["norm2"]["scale"], cfg.norm_eps)
        gate = h @ block["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ block["up"])) @ block["down"]
    logits = rms(x[position], params["norm"]["scale"], cfg.norm_eps) @ params["head"]
    return logits[token], np.array(weights)


@pytest.fixture(scope="module")
def short(tiny):
    """Rows of 10 positions: parameters, batch, place and token, maps, on one device."""
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        params, batch = tiny.params(mesh), tiny.batch(mesh, rows=4)
        batch = batch | {"tokens": batch["tokens"][:, :10], "image_start": jnp.minimum(batch["image_start"], 4)}
        position, token = jnp.array([9, 7, 9, 8]), jnp.array([5, 33, 60, 12])
        found = relevancy.maps(params, batch, tiny.cfg, position=position, token=token)
        return params, batch, np.asarray(position), np.asarray(token), np.asarray(found)


@pytest.mark.parametrize("row", [1, 3])  # with an image, and text only
def test_finite_differences(tiny, short, row):
    params, batch, position, token, found = short
    cfg, step = tiny.cfg.decoder, 1e-5
    with jax.set_mesh(tiny.mesh()):
        x = np.asarray(vlm.embed(params, batch, tiny.cfg), np.float64)[row]
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["decoder"])
    where = (params, x, token[row], position[row], cfg)
    _, weights = slow_decoder(*where)
    gradient = np.zeros_like(weights)
    # a weight of 0 has no part in a product with itself
    for entry in zip(*np.nonzero(weights[:, :, : position[row] + 1]), strict=True):
        up, down = (slow_decoder(*where, bump=(*entry, size))[0] for size in (step, -step))
        gradient[entry] = (up - down) / (2 * step)
    expected = recursion((gradient * weights).mean(1), position[row])
    assert found[:, row].shape == expected.shape == (3, 10)
    assert np.abs(found[:, row] - expected).max() <= 1e-4 * np.abs(expected).max()
    assert (np.abs(expected).max(-1) > 1e-2).all() and (expected < 0).any()


def test_pytorch_with_every_map_held(tiny, tmp_path):
    mesh, length, image_id = tiny.mesh(), 300, 2
    with jax.set_mesh(mesh):
        params, batch = tiny.params(mesh), tiny.batch(mesh, rows=4, length=length)
        tokens = np.random.default_rng(1).integers(3, 64, (4, length)).astype(np.int32)
        batch |= {"tokens": jnp.asarray(tokens), "image_start": jnp.array([3, 200, -1, 1], jnp.int32)}
        position, token = jnp.array([299, 280, 250, 299]), jnp.array([5, 33, 60, 12])
        found = np.asarray(relevancy.maps(params, batch, tiny.cfg, position=position, token=token))
        squares = np.asarray(relevancy.grid(jnp.asarray(found), batch["image_start"], tiny.cfg))
        hf.export(params, tiny.cfg, tmp_path, image_token_id=image_id)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids, starts = tokens.copy(), np.asarray(batch["image_start"])
    for row in np.flatnonzero(starts >= 0):
        ids[row, starts[row] : starts[row] + 4] = image_id
    eye = tiny.cfg.vision
    pixels = (np.asarray(batch["images"]) / 255.0 - np.array(eye.mean)) / np.array(eye.std)
    pixels = torch.tensor(pixels[starts >= 0].transpose(0, 3, 1, 2), dtype=torch.float32)
    out = model(input_ids=torch.tensor(ids, dtype=torch.long), pixel_values=pixels, output_attentions=True)
    for one in out.attentions:
        one.retain_grad()
    out.logits[torch.arange(4), np.array(position), np.array(token)].sum().backward()
    for row in range(4):
        weighted = torch.stack([(one.grad[row] * one[row]).mean(0) for one in out.attentions]).detach().numpy()
        expected = recursion(weighted.astype(np.float64), int(position[row]))
        assert np.abs(found[:, row] - expected).max() <= 1e-4 * np.abs(expected).max(), row
        inside = expected[:, starts[row] : starts[row] + 4] if starts[row] >= 0 else np.zeros((3, 4))
        np.testing.assert_allclose(squares[:, row].reshape(3, 4), inside, atol=1e-4 * np.abs(expected).max())
    assert not np.any(found[:, 2, 251:])  # what stands behind the token is not seen


def test_same_on_eight_devices(tiny, short):
    _, _, position, token, expected = short
    mesh = tiny.mesh(8, 4)  # two of rows, four of heads: two key/value heads do not divide
    with jax.set_mesh(mesh):
        batch = {key: np.asarray(array) for key, array in short[1].items()}
        batch = axes.put_batch(batch | {"position": position, "token": token}, mesh)
        where = {key: batch.pop(key) for key in ("position", "token")}
        found = relevancy.maps(tiny.params(mesh), batch, tiny.cfg, **where)
        assert relevancy.grid(found, batch["image_start"], tiny.cfg).shape == (3, 4, 2, 2)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def held(params: dict, batch: dict, cfg: vlm.VLMConfig, position, token) -> jax.Array:
    """All Ā at once, [l, b, t, t]: plain reverse mode over the whole model."""
    x = vlm.embed(params, batch, cfg)
    rows, length, _ = x.shape

    def attend(q, k, v, s):
        return relevancy.scaled_attention(s)(q, k, v, None)

    def logit(s):
        out = decoder.run(params["decoder"], x, jnp.arange(length)[None], attend, cfg.decoder, past=s)
        wanted = jax.nn.one_hot(position, length)[:, :, None] * jax.nn.one_hot(token, cfg.decoder.vocab)[:, None]
        return (vlm.logits(params, out.x, cfg) * wanted).sum()

    flat = decoder.per_run(cfg.decoder, lambda run: jnp.zeros((run.count, rows, length, length)))
    return jnp.concatenate(jax.tree.leaves(jax.grad(logit)(flat)))


@pytest.mark.parametrize("name", ["phi", "openelm"])
def test_other_decoders_with_every_map_held(tiny, name):
    own = {
        "phi": dict(norm="layer", gated=False, parallel=True, biases=("wq", "wo", "up"), head_bias=True, rotary=4),
        "openelm": dict(qk_norm=True, tied=True, layer_shapes=((2, 1, 24), (4, 2, 40), (4, 2, 40)), depth=3),
    }
    mesh = tiny.mesh()
    cfg = dataclasses.replace(tiny.cfg, decoder=dataclasses.replace(tiny.cfg.decoder, family=name, **own[name]))
    with jax.set_mesh(mesh):
        params, batch = tiny.params(mesh, cfg), tiny.batch(mesh, rows=2)
        where = batch["lengths"] - 1, jnp.array([5, 33])
        found = np.asarray(relevancy.maps(params, batch, cfg, position=where[0], token=where[1]))
        weighted = np.asarray(jax.jit(lambda p, b: held(p, b, cfg, *where))(params, batch), np.float64)
    for row in range(2):
        expected = recursion(weighted[:, row], int(where[0][row]))
        assert np.abs(found[:, row] - expected).max() <= 1e-4 * np.abs(expected).max()
        assert (np.abs(expected).max(-1) > 1e-3).all()


def test_memory_grows_by_a_residual_stream_a_layer_not_by_its_maps(tiny):
    rows, length, temporary = 2, 256, {}
    one_map = rows * tiny.cfg.decoder.heads * length * length * 4  # bytes of one layer's attention weights
    stream = rows * length * tiny.cfg.decoder.width * 4
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        batch = tiny.batch(mesh, rows, length)
        where = jnp.array([250, 255]), jnp.array([5, 33])
        for depth in (10, 20):
            cfg = dataclasses.replace(tiny.cfg, decoder=dataclasses.replace(tiny.cfg.decoder, depth=depth))
            params = layers.abstract_arrays(vlm.abstract(cfg), mesh)
            for name, run in (
                ("sweep", lambda p, c=cfg: relevancy.maps(p, batch, c, position=where[0], token=where[1])),
                ("held", lambda p, c=cfg: held(p, batch, c, *where)),
            ):
                temporary[name, depth] = jax.jit(run).lower(params).compile().memory_analysis().temp_size_in_bytes
    growth = {name: (temporary[name, 20] - temporary[name, 10]) / 10 for name in ("sweep", "held")}
    assert growth["sweep"] < 4 * stream < one_map / 4
    assert growth["held"] > one_map
    assert temporary["sweep", 20] < 8 * one_map
