"""OpenELM, which `transformers` has no class for, against its published definition written out in NumPy."""

import families
import numpy as np
from test_families import batch, computed, random_tensors
from towers import apart, meshes

from coincide_jax.models import decoder

CFG = families.config("openelm")


def rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + CFG.norm_eps) * scale


def turned(x: np.ndarray) -> np.ndarray:
    """Rotary positions of one head, [t, d]."""
    half = CFG.head_dim // 2
    angle = np.arange(len(x))[:, None] * CFG.rope_theta ** (-np.arange(half) / half)[None]
    low, high = x[:, :half], x[:, half:]
    return np.concatenate(
        [low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)], axis=1
    )


def head(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention of one head, [t, d] each."""
    scores = q @ k.T / np.sqrt(q.shape[1])
    scores[np.triu_indices(len(q), 1)] = -np.inf
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True) @ v


def slow(tensors: dict, tokens: np.ndarray) -> dict:
    """One row, float64: what each part gives."""
    files = {name.removeprefix("model."): np.asarray(value, np.float64) for name, value in tensors.items()}
    x, taps = files["token_embeddings.weight"][tokens], []
    parts = {"embedding": x}
    for layer, (heads, kv, mlp) in enumerate(CFG.layer_shapes):
        own = {name.removeprefix(f"layers.{layer}."): value for name, value in files.items()}
        h = rms(x, own["attn_norm.weight"])
        qkv = (h @ own["attn.qkv_proj.weight"].T).reshape(len(x), heads + 2 * kv, CFG.head_dim)
        q, k, v = np.split(qkv, (heads, heads + kv), axis=1)
        q, k = rms(q, own["attn.q_norm.weight"]), rms(k, own["attn.k_norm.weight"])
        group = heads // kv
        mixed = [head(turned(q[:, n]), turned(k[:, n // group]), v[:, n // group]) for n in range(heads)]
        mixed = np.concatenate(mixed, axis=1)
        taps.append(mixed @ own["attn.out_proj.weight"].T)
        x = x + taps[-1]
        both = rms(x, own["ffn_norm.weight"]) @ own["ffn.proj_1.weight"].T
        gate, up = both[:, :mlp], both[:, mlp:]
        x = x + (gate / (1.0 + np.exp(-gate)) * up) @ own["ffn.proj_2.weight"].T
        if layer == 0:
            parts |= {"norm": h, "attention": mixed, "block": x}
    final = rms(x, files["norm.weight"])
    return parts | {"taps": np.stack(taps), "final": final, "logits": final @ files["token_embeddings.weight"].T}


def test_parity_with_the_definition():
    tensors = random_tensors(CFG)
    found = computed(CFG, tensors, meshes()[0])
    rows = [slow(tensors, row) for row in batch()[0]]
    for name in ("embedding", "norm", "attention", "block", "final", "logits"):
        want = np.stack([row[name] for row in rows])
        assert apart(found[name].reshape(want.shape), want) <= 1e-4, name
    for layer in range(CFG.depth):
        assert apart(found["taps"][layer], np.stack([row["taps"][layer] for row in rows])) <= 1e-4, layer
    assert np.isfinite(found["loss"]) and np.abs(found["grads"][1]["wk"]["a"]).max() > 1e-6


def test_runs_of_equal_layers_are_stacked():
    assert [tuple(run) for run in decoder.runs(CFG)] == [(0, 1, 2, 1, 48), (1, 2, 4, 2, 80)]
    first, second = decoder.abstract(CFG)["blocks"]
    assert first["wq"].shape == (1, 64, 1, 2, 16) and second["wq"].shape == (2, 64, 2, 2, 16)
    assert second["wv"].part == (96, 128) and second["wv"].source_shape == (32, 64)
    assert second["up"].names() == [f"language_model.model.layers.{layer}.ffn.proj_1.weight" for layer in (1, 2)]


def test_the_first_layers_of_runs():
    blocks = ({"a": np.zeros((1, 3))}, {"a": np.ones((2, 3))})
    assert [decoder.depth_of(decoder.first_layers(blocks, count)) for count in (1, 2, 3)] == [1, 2, 3]
    assert len(decoder.first_layers(blocks, 1)) == 1 and decoder.first_layers(blocks, 2)[1]["a"].shape == (1, 3)
