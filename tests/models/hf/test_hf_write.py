"""Export: folders that transformers and PEFT read, whose models compute the same; round trips."""

import json

import checkpoints
import jax
import numpy as np
import peft
import pytest
import torch
import transformers
import weights
from safetensors import safe_open
from safetensors.numpy import load_file

from coincide_jax.core import axes
from coincide_jax.core.errors import UserError
from coincide_jax.models import hf, layers, lora, vlm
from coincide_jax.models.hf import write


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


def test_a_folder_says_the_conversation_of_its_model(tiny, folder, tmp_path):
    """Its own and not that of its family, which a folder that says nothing gets."""
    mesh, said = tiny.mesh(), {"template": "phi", "system": "Answer."}
    with jax.set_mesh(mesh):
        hf.export(tiny.params(mesh), tiny.cfg, tmp_path, card=said)
    own, family = (hf.describe(path, "float32")[1] for path in (tmp_path, folder))
    assert {key: own[key] for key in said} == said
    assert family["template"] == "vicuna_v1" and family["system"].startswith("A chat between")
    read_back(tmp_path)


def test_every_tensor_has_one_name(tiny, folder):
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(vlm.abstract(tiny.cfg), is_leaf=layers.is_leaf))
    assert (
        sum(array.size for array in load_file(folder / "model.safetensors").values())
        == count + 2 * tiny.cfg.vision.width
    )


def compare(model, params, tiny, mesh, **how) -> None:
    """Logits of a mixed batch equal those of a transformers model."""
    with jax.set_mesh(mesh):
        batch = tiny.batch(mesh, length=300)
        tokens = np.random.default_rng(1).integers(3, 64, (8, 300)).astype(np.int32)
        batch |= axes.put_batch({"tokens": tokens}, mesh)
        run = jax.jit(lambda p, b: vlm.logits(p, vlm.forward(p, b, tiny.cfg, **how).hidden, tiny.cfg))
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
        assert np.abs(found[row] - expected).max() <= 1e-4 * np.abs(expected).max()


def read_back(folder):
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def test_transformers_computes_the_same(tiny, folder):
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        params = tiny.params(mesh)
    compare(read_back(folder), params, tiny, mesh)


@pytest.mark.parametrize(("text", "eye"), [("llama", "clip"), ("qwen2", "clip"), ("stablelm", "siglip")])
def test_round_trip_is_bitwise(text, eye, tmp_path):
    """A checkpoint of another layout, exported, read and exported again: the same bytes and the same configuration;
    transformers finds every tensor."""
    mesh = axes.make_mesh(2)
    model = checkpoints.llava(text, eye)
    checkpoints.write_llava_hf(tmp_path / "given", model)
    with jax.set_mesh(mesh):
        params, cfg, _ = hf.load(tmp_path / "given", mesh, "float32")
        hf.export(params, cfg, tmp_path / "one", image_token_id=3)
        again, same, _ = hf.load(tmp_path / "one", mesh, "float32")
        hf.export(again, same, tmp_path / "two", image_token_id=3)
    assert same == cfg
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    given = checkpoints.state(model)
    for name, value in checkpoints.state(read_back(tmp_path / "one")).items():
        if "post_layernorm" not in name:
            assert torch.equal(value, given[name]), name


def test_shards(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "SHARD_BYTES", 10_000)
    (tmp_path / "model-00001-of-00099.safetensors").write_text("of an earlier export")
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        params = tiny.params(mesh)
        hf.export(params, tiny.cfg, tmp_path)
        again, cfg, _ = hf.load(tmp_path, mesh, "float32")
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and all(name.endswith(f"of-{len(files):05d}.safetensors") for name in files)
    assert cfg.decoder.depth == tiny.cfg.decoder.depth
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    read_back(tmp_path)


def test_peft_reads_the_adapter(tiny, folder, tmp_path):
    mesh, targets, rank, alpha = tiny.mesh(), ("wq", "wv", "down"), 4, 6.0
    with jax.set_mesh(mesh):
        params = tiny.params(mesh)
        adapters = weights.draw(lora.abstract(tiny.cfg, rank, targets), mesh, seed=3, std=0.2)
        projector = jax.tree.map(lambda leaf: leaf * 1.5, params["projector"])
        hf.export_adapter(
            adapters, tiny.cfg, tmp_path, rank=rank, alpha=alpha, dropout=0.05, targets=targets, base=str(folder),
            projector=projector,
        )  # fmt: skip
    model = peft.PeftModel.from_pretrained(read_back(folder), tmp_path).eval()
    trained = [name for name, _ in model.named_modules() if name.endswith("lora_A.default")]
    assert len(trained) == 3 * 3 and not any("vision" in name for name in trained)
    compare(model, params | {"projector": projector}, tiny, mesh, lora=(adapters, alpha / rank, 0.0))


def test_what_transformers_cannot_hold(tiny, tmp_path):
    model = checkpoints.llava("phi", "siglip")
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        params, cfg, _ = hf.load(checkpoints.write_factory(tmp_path / "x", model), mesh, "float32")
        with pytest.raises(UserError, match="the head of a phi decoder has a bias"):
            hf.export(params, cfg, tmp_path / "out")
    assert not (tmp_path / "out").exists()
