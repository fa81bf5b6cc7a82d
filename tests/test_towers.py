"""Features of questions and images: DINOv2 and BERT as PyTorch computes them, the base's own towers, no answer read."""

import dataclasses
import json

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
import weights
from ml_collections import ConfigDict
from PIL import Image

from coincide_jax import extract
from coincide_jax.core import artifacts, axes, checkpoint, store
from coincide_jax.core.errors import UserError
from coincide_jax.dataset import annotate, batches, conversation, source, tokenizer
from coincide_jax.dataset.images import load
from coincide_jax.extract import towers
from coincide_jax.models import decoder, vision, vlm
from configs import common

QUESTIONS = ("what is red", "how many\nAnswer with a word", "what is red\nhow", "is it", "how many")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "is", "red", "how", "many", "it", "answer", "with", "a", "word"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as DINOv2 was trained
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(WORDS))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set of five records, the last without image, and tiny checkpoints of DINOv2 and BERT."""
    top = tmp_path_factory.mktemp("towers")
    rng = np.random.default_rng(0)
    (top / "images").mkdir()
    records = []
    for row, question in enumerate(QUESTIONS):
        image = {"image": f"{row}.png"} if row < 4 else {}
        mark = "<image>\n" if image else ""
        if image:
            Image.fromarray(rng.integers(0, 256, (70, 60 + 20 * row, 3), np.uint8)).save(top / "images" / f"{row}.png")
        said = [("human", mark + question), ("gpt", f"it is {row}")]
        records.append({"id": str(row), **image, "conversations": [{"from": who, "value": text} for who, text in said]})
    artifacts.write_json(top / "records.json", records)
    eye = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14, mlp_ratio=2
    )
    eye = checkpoints.draw(transformers.Dinov2Model(eye), 1)
    words = checkpoints.draw(transformers.BertModel(transformers.BertConfig(**SIZES, max_position_embeddings=40)), 2)
    eye.save_pretrained(top / "dino")
    words.save_pretrained(top / "bert")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(top / "bert" / "tokenizer.json"))
    split = {"records": str(top / "records.json"), "images": str(top / "images"), "base_records": "", "n": 5,
             "pool": list(range(5)), "dev": [], "heldout": [], "base": []}  # fmt: skip
    return top, split, eye, words


def settings(top, **changes) -> ConfigDict:
    config = common.defaults()
    config.extract.update(reads="questions", encoder_size=42, unit_halves=False)
    config.extract.update(image_encoder=str(top / "dino"), text_encoder=str(top / "bert"))
    config.extract.update(changes)
    config.device.precision = "float32"
    return config


def rows_of(split, base, config):
    """Features f16[5, D], and the data set they came from."""
    mesh = axes.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        data, compute, width, _ = towers.open_towers(split, base, config, mesh)
        data.withhold()
        found = np.zeros((5, width), np.float16)
        for batch in batches.ordered(data, np.arange(5), 4, threads=1):
            rows = jax.device_get(compute(axes.put_batch(batch, mesh)))["features"]
            found[batch["index"][batch["valid"]]] = rows[batch["valid"]]
    return found, data


@pytest.mark.parametrize("unit_halves", [False, True])
def test_dinov2_and_bert_side_by_side_as_pytorch_has_them(made, unit_halves):
    top, split, eye, words = made
    found, data = rows_of(split, None, settings(top, unit_halves=unit_halves))
    asked = [question.split("\nAnswer")[0].split() for question in QUESTIONS]
    for row in range(5):
        ids = torch.tensor([[2, *(WORDS.index(word) for word in asked[row]), 3]])
        with torch.no_grad():
            text = words(ids).last_hidden_state.mean(1)[0]
            text = text / text.norm()
            image = torch.zeros(32)
            if row < 4:
                pixels = load(top / "images" / f"{row}.png", 42, (0, 0, 0), "crop") / 255.0
                pixels = (pixels - np.asarray(MEAN)) / np.asarray(STD)
                pixels = torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)
                image = eye(pixels, interpolate_pos_encoding=True).pooler_output[0]
        if unit_halves and row < 4:
            image = image / image.norm()
        whole = torch.cat([image, text])
        np.testing.assert_allclose(found[row], (whole / whole.norm()).numpy(), atol=2e-3)
    assert np.linalg.norm(found[4, :32]) == 0 and np.linalg.norm(found[4, 32:]) == pytest.approx(1, abs=1e-3)
    half = np.linalg.norm(found[0, :32].astype(np.float64))
    assert half == pytest.approx(2**-0.5, abs=1e-3) if unit_halves else half > 0.9  # as it comes, the image decides
    assert data.buckets == (32, 40) and all(len(data.encode(row).tokens) < 32 for row in range(5))


def write_base(top, mesh):
    """A model folder of width 16 whose tokenizer splits bytes."""
    cfg = vlm.VLMConfig.tiny(
        {"vision": {"patch": 8, "width": 16, "depth": 1, "heads": 2, "mlp": 16},
         "decoder": {"width": 32, "depth": 2, "heads": 2, "kv_heads": 1, "mlp": 16}}, 16, 300,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        params = weights.draw(vlm.abstract(cfg), mesh, seed=3)
        tokenizer.train(["what is red"] * 3, 300).save(top / "base" / "tokenizer.json")
        card = {"config": cfg.to_dict(), "image_size": 16, "vocab": 300, "template": "vicuna_v1", "system": ""}
        checkpoint.save_model(top / "base", params, card | {"mean": list(cfg.vision.mean)})
    return cfg, params


def test_the_towers_of_the_base(made):
    top, split, *_ = made
    mesh = axes.make_mesh(devices=jax.devices()[:1])
    cfg, params = write_base(top, mesh)
    config = settings(top, image_encoder="", text_encoder="", unit_halves=True)
    found, data = rows_of(split, top / "base", config)
    with jax.set_mesh(mesh):
        for row in range(5):
            ids = data.tokenizer.encode(QUESTIONS[row].split("\nAnswer")[0])
            text = np.asarray(decoder.embed(params["decoder"], jnp.asarray([ids]), jnp.float32))[0].mean(0)
            image = np.zeros(16)
            if row < 4:
                pixels = load(top / "images" / f"{row}.png", 16, data.background)[None]
                image = np.asarray(vision.forward(params["vision"], pixels, cfg.vision, jnp.float32))[0].mean(0)
                image = image / np.linalg.norm(image)
            whole = np.concatenate([image, text / np.linalg.norm(text)])
            np.testing.assert_allclose(found[row], whole / np.linalg.norm(whole), atol=2e-3)


@pytest.mark.parametrize("towers_of", ["encoders", "base"])
def test_other_answers_give_the_same_features(made, towers_of, tmp_path):
    top, split, *_ = made
    base = top / "base"
    if not (base / "model.json").exists():
        write_base(top, axes.make_mesh(devices=jax.devices()[:1]))
    config = settings(top) if towers_of == "encoders" else settings(top, image_encoder="", text_encoder="")
    before, _ = rows_of(split, base, config)
    records = json.loads((top / "records.json").read_text())
    for record in records:
        record["conversations"][1]["value"] = "quite something else " * 9
    artifacts.write_json(tmp_path / "records.json", records)
    after, data = rows_of(split | {"records": str(tmp_path / "records.json")}, base, config)
    np.testing.assert_array_equal(before, after)
    assert "something" not in repr(data.records)


def test_a_text_is_cut_to_the_encoder_s_positions_and_keeps_its_marks(made):
    top, *_ = made
    loaded = tokenizer.Tokenizer.load(top / "bert" / "tokenizer.json")
    encoded = towers.Questions(loaded, 6, marked=True).encode((("what is red " * 9, None),), False)
    assert encoded.tokens.tolist() == [2, 4, 5, 6, 4, 3] and encoded.image_start == -1


def test_folders_of_other_models_are_refused(made):
    top, split, *_ = made
    mesh = axes.make_mesh(devices=jax.devices()[:1])
    for changes, sentence in (
        ({"image_encoder": str(top / "bert")}, "extract.image_encoder: .* holds no vision tower alone"),
        ({"text_encoder": str(top / "dino")}, "extract.text_encoder: .* holds no BERT-class encoder"),
    ):
        with jax.set_mesh(mesh), pytest.raises(UserError, match=sentence):
            towers.open_towers(split, None, settings(top, **changes), mesh)


@pytest.mark.parametrize("reads", ["questions", "all"])
def test_the_stage_with_a_model_of_conversations_reads_questions_alone_or_answers_too(made, reads, tmp_path):
    """`reference.path` and `extract.reads`: other answers change the features, or not."""
    top, split, *_ = made
    mesh = axes.make_mesh(devices=jax.devices()[:1])
    if not (top / "base" / "model.json").exists():
        write_base(top, mesh)
    records = json.loads((top / "records.json").read_text())
    for record in records:
        record["conversations"][1]["value"] = "quite another thing"
    artifacts.write_json(tmp_path / "records.json", records)
    config = settings(top, reads=reads, image_encoder="", text_encoder="", num_layers=2, rows_per_device=4)
    config.reference.path = str(top / "base")
    config.dataset.update(system="", max_length=96, buckets=(96,))
    found = []
    for name, path in (("own", top / "records.json"), ("other", tmp_path / "records.json")):
        artifacts.write_json(tmp_path / name / "split.json", split | {"records": str(path)})
        artifacts.write_jsonl(tmp_path / name / "quarantine.jsonl", [])
        with jax.set_mesh(mesh):
            summary = extract.run(config, {"dataset": tmp_path / name}, tmp_path / name / "extract", mesh)
        found.append(store.open_features(tmp_path / name / "extract" / "features.zarr")[:])
        assert summary["records"] == 5 and found[-1].any(axis=1).all()
    assert np.array_equal(*found) == (reads == "questions")


def test_questions_alone_for_a_model_that_reads_conversations(made):
    """Where reference.path names a model: its sequences hold no answer and supervise nothing."""
    top, *_ = made
    records = source.parse(json.loads((top / "records.json").read_text()))[0]
    template = conversation.Template(
        "vicuna_v1", tokenizer.train(["what is red"] * 3, 300), "", image_tokens=4, max_length=64
    )
    two = dataclasses.replace(records[0], turns=(("what", "red"), ("how many", "two")))
    (hidden,) = annotate.without_answers([two])
    encoded = template.encode(hidden.turns, True)
    words = template.tokenizer.decode(encoded.tokens[encoded.text])
    assert "red" not in words and "two" not in words and words.count("ASSISTANT:") == 2
    assert not encoded.labels.any() and template.eos_id not in encoded.tokens
