"""Features: formula against NumPy, device count, text-only rule, scores, early exit, resumption."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import weights
from PIL import Image

from coincide_jax import extract, plan
from coincide_jax.core import artifacts, axes, store
from coincide_jax.core.errors import UserError
from coincide_jax.dataset import images, tokenizer
from coincide_jax.extract import activations
from coincide_jax.models import vlm
from coincide_jax.plan import stages
from configs import common

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
    assert activations.spread_taps(24, 5) == (3, 7, 11, 15, 19)
    assert activations.spread_taps(6, 5) == (0, 1, 2, 3, 4)
    assert activations.spread_taps(4, 5) == (0, 1, 2, 3)


def test_taps_by_config():
    keys = common.defaults().extract
    assert activations.choose_taps(keys, 24) == (3, 7, 11, 15, 19)
    keys.taps = (-1, 2, 5)
    assert activations.choose_taps(keys, 6) == (2, 5)
    keys.taps = (0, -7)
    with pytest.raises(UserError, match=r"extract.taps = \(0, -7\) names a layer outside the decoder's 0…5"):
        activations.choose_taps(keys, 6)


@pytest.mark.parametrize(("key", "word"), [("tap_from", "feed"), ("squash", "boolean")])
def test_words_are_checked_before_anything_runs(key, word):
    config = common.defaults()
    config.extract[key] = word
    with pytest.raises(UserError, match=f"extract.{key}"):
        extract.check(config)


SQUASHED = {  # what each word makes of the states [tokens, W] of one half, in float64
    "tanh": lambda z: np.tanh(z.mean(0)),
    "tanh_first": lambda z: np.tanh(z).mean(0),
    "sign": lambda z: np.where(z.mean(0) > 0, 1.0, -1.0),
}


@pytest.mark.parametrize(
    ("tap_from", "squash"),
    [("attention", "tanh"), ("mlp", "tanh"), ("block", "tanh"), ("attention", "tanh_first"), ("attention", "sign")],
)
def test_features_are_the_formula(tap_from, squash):
    """What the layers show is held against PyTorch in tests/models/test_families.py."""
    mesh, batch, taps = one_device(), tiny_batch(), (0, 1, 2, 3, 5)
    with jax.set_mesh(mesh):
        params, put = tiny_params(mesh), axes.put_batch(batch, mesh)
        made = activations.features(params, put, CFG, taps, tap_from=tap_from, squash=squash)
        found = np.asarray(made["features"])
        raw = np.asarray(vlm.forward(params, put, CFG, tap=lambda z: z, tap_from=tap_from).taps).astype(np.float64)
    for row in range(ROWS):
        parts = []
        for tap in taps:
            z = raw[tap, row]
            start = batch["image_start"][row]
            visual = SQUASHED[squash](z[start : start + CFG.image_tokens]) if start >= 0 else np.zeros(16)
            text = SQUASHED[squash](z[batch["text"][row]])
            for squashed in (visual, text):
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
            activations.features(cut, put, CFG, (0, 2))["features"],
            activations.features(params, put, CFG, (0, 2))["features"],
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
        alone = [
            np.asarray(activations.features(params, axes.put_batch(g, mesh), CFG, taps)["features"]) for g in groups
        ]
    mesh = axes.make_mesh()
    with jax.set_mesh(mesh):
        together = np.asarray(
            activations.features(tiny_params(mesh), axes.put_batch(wide, mesh), CFG, taps)["features"]
        )
    np.testing.assert_array_equal(together.view(np.uint16), np.concatenate(alone).view(np.uint16))


def test_scores_against_plain_softmax():
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(0, 3, (4, 6, 11)).astype(np.float32), rng.integers(0, 11, (4, 6)).astype(np.int32)
    labels = rng.random((4, 6)) < 0.6
    labels[3] = False
    found = activations.token_scores(jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(labels))
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
            scored = activations.features(params, put, CFG, taps, True)
            nll = vlm.token_nll(params, put, CFG, vlm.forward(params, put, CFG).hidden)
            plain = activations.features(params, put, CFG, taps)
        wanted = np.asarray(nll).sum(1) / batch["labels"][:, 1:].sum(1)
        np.testing.assert_allclose(scored["nll"], wanted, rtol=1e-4)
        np.testing.assert_allclose(
            np.asarray(scored["features"], np.float32), np.asarray(plain["features"], np.float32), atol=1e-3
        )


SIDE, POSITIONS = 32, 24  # pixels, longest text of the CLIP below
TURNS = (
    [("What is it?", "A red square."), ("And this?", "A blue circle, left of the red square.")],
    [("How many?", "Two.")],
    [("Say hello.", "Hello.")],  # without an image
    [("Where is the square?", "Left of the circle, where the red square was, and below it, and above it.")],
)


def clip_model(ids) -> torch.nn.Module:
    """A CLIP of transformers with random weights of std 0.2."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": ids.vocab_size, "max_position_embeddings": POSITIONS}
    ends = {"eos_token_id": ids.id_of("<|endoftext|>"), "bos_token_id": ids.id_of("<|startoftext|>")}
    eye = {**sizes, "image_size": SIDE, "patch_size": 8}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text | ends, vision_config=eye, projection_dim=16)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, value in sorted(model.named_parameters()):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2 + float(value.ndim == 1))
    return model.eval()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A dataset folder of four records, a CLIP folder, the CLIP that it holds, its tokenizer."""
    root, rng = tmp_path_factory.mktemp("clip"), np.random.default_rng(0)
    records = []
    for number, turns in enumerate(TURNS):
        said = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        records.append({"id": str(number), "conversations": said})
        if number != 2:
            said[0]["value"] = f"<image>\n{said[0]['value']}"
            records[-1]["image"] = f"{number}.png"
            Image.fromarray(rng.integers(0, 256, (20 + number, 30, 3), np.uint8)).save(root / f"{number}.png")
    (root / "records.json").write_text(json.dumps(records))
    split = {"records": str(root / "records.json"), "images": str(root), "base_records": "", "n": 4,
             "pool": [0, 1, 2, 3], "dev": [], "heldout": [], "base": []}  # fmt: skip
    artifacts.write_json(root / "dataset" / "split.json", split)
    artifacts.write_jsonl(root / "dataset" / "quarantine.jsonl", [])
    ids = tokenizer.train((text for turns in TURNS for turn in turns for text in turn), 300)
    ids.backend.add_special_tokens(["<|startoftext|>"])
    ids = tokenizer.Tokenizer(ids.backend)
    model = clip_model(ids)
    model.save_pretrained(root / "model")
    ids.save(root / "model" / "tokenizer.json")
    config = common.defaults()
    config.reference.path, config.extract.rows_per_device = str(root / "model"), 2
    return root, config, model, ids


def test_clip_alone_can_be_the_reference(alone, tmp_path):
    root, config, model, ids = alone
    mesh = axes.make_mesh(devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        summary = extract.run(config, {"dataset": root / "dataset"}, tmp_path, mesh)
    assert summary["width"] == 32 and summary["taps"] == ["joint"] and summary["records"] == 4
    found = np.asarray(store.open_features(tmp_path / "features.zarr")[:], np.float32)
    mean, std = (np.asarray(part, np.float32) for part in (vlm.CLIP_MEAN, vlm.CLIP_STD))
    for number, turns in enumerate(TURNS):
        words = ids.encode(" ".join(text for turn in turns for text in turn))[: POSITIONS - 2]
        words = torch.tensor([[ids.id_of("<|startoftext|>"), *words, ids.id_of("<|endoftext|>")]])
        pixels = np.zeros((SIDE, SIDE, 3), np.float32)
        if number != 2:
            raw = images.load(root / f"{number}.png", SIDE, (0, 0, 0), "crop")  # CLIP's own frame, without padding
            pixels = (raw / np.float32(255) - mean) / std
        with torch.no_grad():
            out = model(input_ids=words, pixel_values=torch.tensor(pixels.transpose(2, 0, 1)[None]))
        halves = np.concatenate([out.image_embeds[0].numpy(), out.text_embeds[0].numpy()])
        halves /= np.sqrt(2)
        if number == 2:
            halves = np.concatenate([np.zeros(16), halves[16:] * np.sqrt(2)])
        np.testing.assert_allclose(found[number], halves, atol=6e-4)
    assert len(ids.encode(" ".join(text for turn in TURNS[3] for text in turn))) > POSITIONS - 2  # one was cut


def test_the_plan_knows_clip(alone):
    root, config, *_ = alone
    config = config.copy_and_resolve_references()
    config.dataset.records = str(root / "records.json")
    (found,) = [one for one in plan.costs(config, plan.Devices.parse("1xCPU-8GB"))[0] if one.stage == "extract"]
    assert found.disk == stages.store(4, 32) and found.flop > 0 and "CLIP" in found.how


def test_clip_has_no_scores(alone, tmp_path):
    root, config, *_ = alone
    config = config.copy_and_resolve_references()
    config.extract.scores = True
    mesh = axes.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh), pytest.raises(UserError, match=r"extract.scores is set but reference.path .* is CLIP"):
        extract.run(config, {"dataset": root / "dataset"}, tmp_path, mesh)
