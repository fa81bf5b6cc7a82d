"""OpenELM, which `transformers` has no class for, against its published definition written out in NumPy."""

import checkpoints
import families
import jax
import numpy as np
import pytest
import torch
from test_families import batch, computed, random_tensors
from towers import apart, meshes

from coincide_jax.core import axes
from coincide_jax.models import decoder, hf, vlm

CFG = families.config("openelm")


def rms(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


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


def slow(tensors: dict, tokens: np.ndarray, eps: float = CFG.norm_eps) -> dict:
    """One row, float64: what each part gives."""
    files = {name.removeprefix("model."): np.asarray(value, np.float64) for name, value in tensors.items()}
    x, taps = files["token_embeddings.weight"][tokens], {"attention": [], "mlp": [], "block": []}
    parts = {"embedding": x}
    for layer, (heads, kv, mlp) in enumerate(CFG.layer_shapes):
        own = {name.removeprefix(f"layers.{layer}."): value for name, value in files.items()}
        h = rms(x, own["attn_norm.weight"], eps)
        qkv = (h @ own["attn.qkv_proj.weight"].T).reshape(len(x), heads + 2 * kv, CFG.head_dim)
        q, k, v = np.split(qkv, (heads, heads + kv), axis=1)
        q, k = rms(q, own["attn.q_norm.weight"], eps), rms(k, own["attn.k_norm.weight"], eps)
        group = heads // kv
        mixed = [head(turned(q[:, n]), turned(k[:, n // group]), v[:, n // group]) for n in range(heads)]
        mixed = np.concatenate(mixed, axis=1)
        taps["attention"].append(mixed @ own["attn.out_proj.weight"].T)
        x = x + taps["attention"][-1]
        both = rms(x, own["ffn_norm.weight"], eps) @ own["ffn.proj_1.weight"].T
        gate, up = both[:, :mlp], both[:, mlp:]
        taps["mlp"].append((gate / (1.0 + np.exp(-gate)) * up) @ own["ffn.proj_2.weight"].T)
        x = x + taps["mlp"][-1]
        taps["block"].append(x)
        if layer == 0:
            parts |= {"norm": h, "attention": mixed, "block": x}
    final = rms(x, files["norm.weight"], eps)
    return parts | {"taps": taps, "final": final, "logits": final @ files["token_embeddings.weight"].T}


def test_parity_with_the_definition():
    tensors = random_tensors(CFG)
    found = computed(CFG, tensors, meshes()[0])
    rows = [slow(tensors, row) for row in batch()[0]]
    for name in ("embedding", "norm", "attention", "block", "final", "logits"):
        want = np.stack([row[name] for row in rows])
        assert apart(found[name].reshape(want.shape), want) <= 1e-4, name
    for name in decoder.TAPS:
        for layer in range(CFG.depth):
            want = np.stack([row["taps"][name][layer] for row in rows])
            assert apart(found["taps"][name][layer], want) <= 1e-4, (name, layer)
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


def written(cfg) -> dict:
    """The published config.json of these sizes."""
    heads, groups, columns = zip(*cfg.layer_shapes, strict=True)
    return {
        "model_type": "openelm", "model_dim": cfg.width, "num_transformer_layers": cfg.depth, "head_dim": cfg.head_dim,
        "vocab_size": cfg.vocab, "num_query_heads": heads, "num_kv_heads": groups, "ffn_dim_divisor": 16,
        "ffn_multipliers": [value / cfg.width for value in columns], "activation_fn_name": "swish",
        "ffn_with_glu": True, "max_context_length": cfg.positions, "normalization_layer_name": "rms_norm",
        "normalize_qk_projections": True, "rope_freq_constant": cfg.rope_theta, "share_input_output_layers": True,
    }  # fmt: skip


def files(prefix: str) -> dict:
    """The random tensors under the published names behind `prefix`."""
    named = {name.removeprefix("model."): value for name, value in random_tensors(CFG).items()}
    return {f"{prefix}{name}": torch.tensor(value) for name, value in named.items()}


@pytest.mark.parametrize("devices", [1, 8])
def test_a_folder_as_published(tmp_path, devices):
    checkpoints.save(tmp_path, files("transformer."), written(CFG))
    mesh, tokens = meshes()[0 if devices == 1 else 1], batch()[0]
    with jax.set_mesh(mesh):
        params, cfg, _ = hf.load(tmp_path, mesh, "float32")
        put = axes.put_batch({"tokens": tokens}, mesh)["tokens"]
        x = decoder.embed(params, put, np.dtype("float32"))
        out = decoder.run(params, x, np.arange(x.shape[1])[None], decoder.full_attention(), cfg)
        found = np.einsum("btw,wv->btv", decoder.final_norm(params, out.x, cfg), decoder.head(params, cfg, x.dtype))
    assert cfg.layer_shapes == CFG.layer_shapes and cfg.norm_eps == 1e-6
    assert apart(found, np.stack([slow(random_tensors(CFG), row, 1e-6)["logits"] for row in tokens])) <= 1e-4


def test_tinyllava_with_openelm(tmp_path):
    """The factory's layout with this decoder (TinyLLaVA-0.9B): every tensor in its place, features that differ."""
    model = checkpoints.llava()
    others = {checkpoints.factory_name(name): value for name, value in checkpoints.state(model).items()}
    others = {name: value for name, value in others.items() if not name.startswith("language_model.")}
    config = {
        "model_type": "tinyllava", "connector_type": "mlp2x_gelu", "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch", "text_config": written(CFG),
        "vision_config": model.config.vision_config.to_dict(),
    }  # fmt: skip
    checkpoints.save(tmp_path, others | files("language_model.transformer."), config)
    mesh = meshes()[0]
    with jax.set_mesh(mesh):
        params, cfg, card = hf.load(tmp_path, mesh, "float32", layers=2, head=False)
        images = np.random.default_rng(0).integers(0, 256, (2, cfg.vision.image_size, cfg.vision.image_size, 3))
        rows = {
            "tokens": batch()[0][:2], "lengths": np.full(2, families.LENGTH, np.int32),
            "image_start": np.array([4, 9], np.int32), "images": images.astype(np.uint8),
        }  # fmt: skip
        out = vlm.forward(params, axes.put_batch(rows, mesh), cfg, tap=lambda states: states)
    assert isinstance(cfg, vlm.VLMConfig) and cfg.decoder.layer_shapes == CFG.layer_shapes[:2]
    assert card["template"] == "vicuna_v1" and card["vocab"] == CFG.vocab
    stored = files("")["layers.1.attn.qkv_proj.weight"].numpy()
    flat = np.asarray(params["decoder"]["blocks"][1]["wq"][0]).reshape(CFG.width, -1)
    np.testing.assert_array_equal(flat, stored[: flat.shape[1]].T)
    assert np.isfinite(out.taps).all() and np.std(out.taps) > 0.01
