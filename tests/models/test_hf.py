"""Export: a folder that transformers reads, and whose model computes the same."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from coincide_jax.core import axes
from coincide_jax.models import hf, layers, vlm


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """An exported model."""
    mesh, out = tiny.mesh(), tmp_path_factory.mktemp("export")
    with jax.set_mesh(mesh):
        hf.export(tiny.params(mesh), tiny.cfg, out)
    return out


def test_layout(tiny, folder):
    with safe_open(folder / "model.safetensors", "np") as file:
        names = set(file.keys())
        down = file.get_tensor("language_model.model.layers.2.mlp.down_proj.weight")
        patch = file.get_tensor("vision_tower.vision_model.embeddings.patch_embedding.weight")
    assert "language_model.lm_head.weight" in names and "multi_modal_projector.linear_2.bias" in names
    assert len(names) == 3 * 9 + 3 + 2 * 16 + 5 + 2 + 4
    assert down.shape == (32, 40) and patch.shape == (16, 3, 8, 8)
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        expected = np.asarray(tiny.params(mesh)["decoder"]["blocks"]["down"][2])
    np.testing.assert_array_equal(down.T, expected)
    assert json.loads((folder / "config.json").read_text())["text_config"]["rope_theta"] == 10000.0


def test_every_tensor_has_one_name(tiny):
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        found = hf.tensors(tiny.params(mesh), tiny.cfg)
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(vlm.abstract(tiny.cfg), is_leaf=layers.is_leaf))
    assert sum(array.size for array in found.values()) == count + 2 * tiny.cfg.vision.width


def test_transformers_computes_the_same(tiny, folder):
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        params, batch = tiny.params(mesh), tiny.batch(mesh, length=300)
        tokens = np.random.default_rng(1).integers(3, 64, (8, 300)).astype(np.int32)
        batch |= axes.put_batch({"tokens": tokens}, mesh)
        run = jax.jit(lambda p, b: vlm.logits(p, vlm.forward(p, b, tiny.cfg).hidden, tiny.cfg))
        found = np.asarray(run(params, batch))
    mean, std = np.array(tiny.cfg.vision.mean), np.array(tiny.cfg.vision.std)
    for row in (0, 1, 3):
        start, ids = int(batch["image_start"][row]), tokens[row].copy()
        inputs = {}
        if start >= 0:
            ids[start : start + tiny.cfg.image_tokens] = 0
            pixels = (np.asarray(batch["images"][row]) / 255.0 - mean) / std
            inputs["pixel_values"] = torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)
        with torch.no_grad():
            expected = model(input_ids=torch.tensor(ids[None], dtype=torch.long), **inputs).logits[0].numpy()
        assert expected.std() > 0.5
        np.testing.assert_allclose(found[row], expected, rtol=1e-3, atol=3e-4)
