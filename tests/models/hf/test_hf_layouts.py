"""Every layout, read from a tiny checkpoint of it: what comes out computes what PyTorch computes."""

import json

import checkpoints
import jax
import numpy as np
import pytest
import torch
import transformers

from coincide_jax.core import axes
from coincide_jax.core.errors import UserError
from coincide_jax.models import decoder, hf, vlm

pytestmark = pytest.mark.usefixtures("quick_compile")

LENGTH, START, SIDE = 280, 7, checkpoints.IMAGE
run = jax.jit(lambda p, b, cfg: vlm.logits(p, vlm.forward(p, b, cfg).hidden, cfg), static_argnums=2)


@pytest.fixture(scope="module")
def mesh():
    """Eight devices, rows and heads shared."""
    return axes.make_mesh(2)


@pytest.fixture(scope="module")
def models():
    """The PyTorch models, made once."""
    made = {}

    def get(*which):
        if which not in made:
            made[which] = checkpoints.llava(*which)
        return made[which]

    return get


def check(folder, model, mesh) -> dict:
    """Logits of a mixed sequence equal PyTorch's; returns the parameters."""
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        params, cfg, card = hf.load(folder, mesh, "float32")
        tokens = rng.integers(0, checkpoints.VOCAB - 1, (4, LENGTH)).astype(np.int32)
        images = rng.integers(0, 256, (4, SIDE, SIDE, 3)).astype(np.uint8)
        batch = dict(tokens=tokens, image_start=np.full(4, START, np.int32), images=images)
        found = np.asarray(jax.device_get(run(params, axes.put_batch(batch, mesh), cfg)))
    mean, std = np.array(cfg.vision.mean), np.array(cfg.vision.std)
    assert cfg.image_tokens == 16 and card["vocab"] == checkpoints.VOCAB and card["image_size"] == SIDE
    for row in (0, 3):
        expected = checkpoints.logits(model, tokens[row].copy(), START, (images[row] / 255.0 - mean) / std)
        assert expected.std() > 0.5
        assert np.abs(found[row] - expected).max() <= 1e-4 * np.abs(expected).max()
    return params


def same(one, two) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_llava_in_every_layout(models, mesh, tmp_path):
    """One model, laid out in nine ways, is nine times the same tree."""
    model = models("llama", "clip")
    first = check(checkpoints.write_llava_hf(tmp_path / "hf", model), model, mesh)
    model.save_pretrained(tmp_path / "saved")
    tower = checkpoints.write_tower(tmp_path / "clip-vit", model, whole=True)
    folders = [
        checkpoints.write_llava_hf(tmp_path / "memory", model, checkpoints.memory_name),
        checkpoints.write_llava_hf(tmp_path / "shards", model, shards=3),
        tmp_path / "saved",
        checkpoints.write_flat(tmp_path / "llava15", model, "llava", "openai/clip-vit", shards=2, pickle=True),
        checkpoints.write_flat(tmp_path / "bare", model, "llava_llama", "openai/clip-vit", inside=False),
        checkpoints.write_flat(tmp_path / "absolute", model, "llava_llama", str(tower), inside=False),
        checkpoints.write_vicuna(tmp_path / "vicuna", model, "openai/clip-vit"),
        checkpoints.write_factory(tmp_path / "factory", model),
    ]
    with jax.set_mesh(mesh):
        for folder in folders:
            params, _, card = hf.load(folder, mesh, "float32")
            same(first, params)
            assert card["template"] == "vicuna_v1"
    assert first["vision"]["blocks"]["wq"].shape[0] == 2  # hidden_states[-2] of three blocks


def test_tinyllava_bench(models, mesh, tmp_path):
    """StableLM-2 and SigLIP, the tower in a folder beside, keys of the first StableLM class."""
    model = models("stablelm", "siglip")
    checkpoints.write_tower(tmp_path / "TinyLLaVA-2.0B-SigLIP", model, whole=False)
    folder = checkpoints.write_flat(
        tmp_path / "tiny", model, "tiny_llava_stablelm", "bczhou/TinyLLaVA-2.0B-SigLIP", inside=False
    )
    first = check(folder, model, mesh)
    config = json.loads((folder / "config.json").read_text())
    config["rope_pct"], config["norm_eps"] = config.pop("partial_rotary_factor"), config.pop("layer_norm_eps")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "stablelm_epoch"}))
    with jax.set_mesh(mesh):
        params, cfg, card = hf.load(folder, mesh, "float32")
    same(first, params)
    assert (cfg.decoder.rotary, cfg.decoder.norm_eps, card["template"]) == (4, 1e-5, "phi")
    assert card["mean"] == [0.5, 0.5, 0.5] and not cfg.vision.class_token and cfg.vision.depth == 2


@pytest.mark.parametrize("which", [("phi", "siglip"), ("qwen2", "clip")])
def test_other_decoders(models, mesh, tmp_path, which):
    model = models(*which)
    write = checkpoints.write_factory if which[0] == "phi" else checkpoints.write_llava_hf
    check(write(tmp_path / "x", model), model, mesh)


def test_a_tower_that_is_nowhere(models, tmp_path):
    folder = checkpoints.write_flat(tmp_path / "x", models("llama", "clip"), "llava", "openai/clip-vit", inside=False)
    with pytest.raises(
        UserError, match=r"names the vision tower 'openai/clip-vit', which is no folder here; put .*x/clip-vit"
    ):
        hf.describe(folder, "float32")


PLAIN = {
    "llama": (transformers.LlamaForCausalLM, "llama"),
    "qwen2": (transformers.Qwen2ForCausalLM, "qwen2"),
    "stablelm": (transformers.StableLmForCausalLM, "stablelm"),
    "phi": (transformers.PhiForCausalLM, "phi"),
}


@pytest.mark.parametrize("family", PLAIN)
def test_plain_decoders(family, mesh, tmp_path):
    kind, name = PLAIN[family]
    config = checkpoints.TEXTS[name]()
    config.tie_word_embeddings = family == "qwen2"
    model = checkpoints.draw(kind._from_config(config, attn_implementation="eager"), 5)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(1).integers(0, checkpoints.VOCAB, (4, LENGTH)).astype(np.int32)
    with jax.set_mesh(mesh):
        params, cfg, card = hf.load(tmp_path, mesh, "float32")
        found = np.asarray(jax.device_get(plain(params, axes.put_batch({"tokens": tokens}, mesh)["tokens"], cfg)))
    assert cfg.family == family and cfg.tied == (family == "qwen2") and card["image_size"] == 0
    with torch.no_grad():
        expected = model(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def plain(params, tokens, cfg):
    """Logits of a decoder alone."""

    def compute(params, tokens):
        x = decoder.embed(params, tokens, np.dtype(np.float32))
        attend = decoder.full_attention()
        x = decoder.run(params, x, np.arange(tokens.shape[1], dtype=np.int32)[None], attend, cfg).x
        h = decoder.final_norm(params, x, cfg)
        out = jax.numpy.einsum("btw,wv->btv", h, decoder.head(params, cfg, x.dtype))
        bias = decoder.head_bias(params, cfg)
        return out if bias is None else out + bias[None, None]

    return jax.jit(compute)(params, tokens)
