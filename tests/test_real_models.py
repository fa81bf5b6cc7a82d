"""A user's checkpoints end to end: a LLaVA-1.5 folder as target and a TinyLLaVA folder as reference, through the
stages; every other layout as the model of one extracted batch."""

import json

import checkpoints
import jax
import numpy as np
import pytest
import torch
import transformers

from coincide_jax import pipeline
from coincide_jax.core import artifacts, axes, store
from coincide_jax.dataset import Dataset, batches, tokenizer
from coincide_jax.extract import activations
from coincide_jax.models import hf
from configs import llava_json

LORA = {"mode": "lora", "steps": 2, "batch": 8, "micro_batch": 8}


def config(reference, target):
    """`configs/llava_json.py` with two checkpoints, on a small drawn data set."""
    found = llava_json.get_config().unlock()
    found.dataset.records = "drawn"
    found.dataset.drawn.update(records=60, heldout=24, base=24)
    found.dataset.update(max_length=96, buckets=(96,), threads=1)
    found.target.path, found.reference.path = str(target), str(reference)
    found.extract.update(rows_per_device=4, num_layers=2)
    found.cluster.k = 3
    found.select.fraction = 0.3
    found.train.update(LORA)
    found.train.lora.update(rank=2, alpha=4.0)
    return found.lock()


def words(*folders) -> None:
    """One small tokenizer in every folder."""
    made = tokenizer.train(["What color is the star? the circle left of it is red"] * 9, 300)
    for folder in folders:
        made.save(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The finished run: its folder, and the folders of its checkpoints."""
    home = tmp_path_factory.mktemp("real")
    checkpoints.write_tower(
        home / "weights/TinyLLaVA-2.0B-SigLIP", checkpoints.llava("stablelm", "siglip"), whole=False
    )
    reference = checkpoints.write_flat(
        home / "weights/tinyllava", checkpoints.llava("stablelm", "siglip"), "tiny_llava_stablelm",
        "bczhou/TinyLLaVA-2.0B-SigLIP", inside=False,
    )  # fmt: skip
    checkpoints.write_tower(home / "weights/clip-vit", checkpoints.llava(), whole=True)
    target = checkpoints.write_flat(home / "weights/llava15", checkpoints.llava(), "llava", "openai/clip-vit", shards=2)
    words(reference, target)
    mesh, keys = axes.make_mesh(1), config(reference, target)
    with jax.set_mesh(mesh):
        pipeline.run(keys, home / "work", mesh, stages=("dataset", "extract", "cluster", "select", "train"))
    return home / "work", reference, target


def test_reference_and_target_keep_their_own_templates(run):
    """The reference was read with its own ('phi'), the target with its own ('vicuna_v1')."""
    work, _, _ = run
    split = artifacts.read_json(work / "dataset/split.json")
    assert split["base"] == [] and not (work / "base").exists() and not (work / "reference").exists()
    found = store.open_features(work / "extract/features.zarr")[:]
    assert found.shape == (split["n"], 2 * 2 * 64)
    rows = found[split["pool"]].astype(np.float32)
    np.testing.assert_allclose((rows * rows).sum(1), 1.0, atol=2e-3)
    assert np.std(rows, axis=0).max() > 0.01
    assert artifacts.read_json(work / "train/model/model.json")["template"] == "vicuna_v1"


def test_the_tuned_target_is_what_transformers_loads(run):
    work, _, target = run
    assert len(artifacts.read_jsonl(work / "train/metrics.jsonl")) == 2
    transformers.LlavaForConditionalGeneration.from_pretrained(work / "train/export", dtype=torch.float32)
    mesh = axes.make_mesh(2)
    with jax.set_mesh(mesh):
        before = hf.load(target, mesh, "float32")[0]
        tuned = hf.load(work / "train/model", mesh, "float32")[0]
        exported = hf.load(work / "train/export", mesh, "float32")[0]
    for a, b in zip(jax.tree.leaves(tuned), jax.tree.leaves(exported), strict=True):
        np.testing.assert_array_equal(a, b)
    (cfg, card), (own_cfg, own_card) = (hf.describe(work / "train" / name, "float32") for name in ("model", "export"))
    assert own_cfg == cfg
    assert all(own_card[key] == card[key] for key in ("image_size", "vocab", "template", "system", "mean"))
    words_of = [(work / "train" / name / "tokenizer.json").read_text() for name in ("model", "export")]
    assert words_of[0] == words_of[1]
    moved = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(tuned), strict=True)]
    assert any(moved) and not all(moved)  # the tower stays


OTHERS = {
    "llava-hf": lambda home: checkpoints.write_llava_hf(home / "x", checkpoints.llava()),
    "in memory": lambda home: checkpoints.write_llava_hf(home / "x", checkpoints.llava(), checkpoints.memory_name),
    "vicuna": lambda home: checkpoints.write_vicuna(home / "x", checkpoints.llava(), "openai/clip-vit"),
    "llava-v1.5 pickles": lambda home: checkpoints.write_flat(
        home / "x", checkpoints.llava(), "llava", "clip-vit", pickle=True
    ),
    "factory": lambda home: checkpoints.write_factory(home / "x", checkpoints.llava("phi", "siglip")),
}


@pytest.mark.parametrize("layout", OTHERS)
def test_features_of_every_layout(run, layout, tmp_path):
    """Loaded, the records read as the model reads them, one batch of features."""
    work, _, _ = run
    split = json.loads((work / "dataset/split.json").read_text())
    checkpoints.write_tower(tmp_path / "clip-vit", checkpoints.llava(), whole=True)
    folder = OTHERS[layout](tmp_path)
    words(folder)
    mesh, keys = axes.make_mesh(1), config(folder, folder)
    with jax.set_mesh(mesh):
        params, cfg, card = hf.load(folder, mesh, "float32", storage="compute", layers=2, head=False)
        data = Dataset.of_model(split, folder, card, cfg.image_tokens, keys.dataset)
        batch = next(batches.ordered(data, split["pool"][:8], 8, threads=1))
        found = jax.device_get(activations.features(params, axes.put_batch(batch, mesh), cfg, (0, 1)))
    assert data.template.eos_id == data.tokenizer.id_of("<|endoftext|>" if layout == "factory" else "</s>")
    assert data.background == ((127,) * 3 if layout == "factory" else (122, 116, 104))
    assert not found["repaired"].any() and np.std(found["features"].astype(np.float32), axis=0).max() > 0.01
