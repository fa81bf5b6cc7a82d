"""Decoding with the cache against running the whole sequence again for every token, and against `transformers`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import towers
import transformers
import weights

from coincide_jax.core import axes
from coincide_jax.core.errors import UserError
from coincide_jax.core.precision import Precision
from coincide_jax.models import generate, vlm

pytestmark = pytest.mark.usefixtures("quick_compile")

NEW, LONG = 6, 64
FAMILIES = {
    "llama": {},
    "phi": dict(
        family="phi",
        norm="layer",
        activation="gelu_pytorch_tanh",
        gated=False,
        parallel=True,
        biases=("wq", "wk", "wv", "wo", "up", "down"),
        head_bias=True,
        rotary=4,
    ),
    "openelm": dict(
        family="openelm",
        qk_norm=True,
        tied=True,
        layer_shapes=((2, 1, 24), (4, 2, 40), (4, 2, 40), (6, 3, 48)),
        depth=4,
    ),
}


def family(tiny, name: str) -> vlm.VLMConfig:
    """The small model with another decoder."""
    return dataclasses.replace(tiny.cfg, decoder=dataclasses.replace(tiny.cfg.decoder, **FAMILIES[name]))


def by_recomputation(params, batch, cfg, ends) -> np.ndarray:
    """i32[b, NEW] without a cache."""
    tokens = np.pad(np.asarray(batch["tokens"]), ((0, 0), (0, NEW)))
    lengths, rows = np.array(batch["lengths"]), np.arange(len(tokens))
    answer, done = np.full((len(tokens), NEW), -1, np.int32), np.zeros(len(tokens), bool)
    run = jax.jit(lambda p, b: vlm.logits(p, vlm.forward(p, b, cfg).hidden, cfg))
    for step in range(NEW):
        scores = np.asarray(run(params, batch | {"tokens": jnp.asarray(tokens)}))
        token = scores[rows, lengths - 1].argmax(-1)
        answer[~done, step] = token[~done]
        done |= np.isin(token, ends)
        tokens[rows, lengths] = token
        lengths += 1
    return answer


@pytest.mark.parametrize(
    ("name", "devices", "model_parallel"), [("llama", 1, 1), ("llama", 8, 2), ("phi", 8, 2), ("openelm", 8, 1)]
)
def test_cache_equals_recomputation(tiny, name, devices, model_parallel):
    cfg, single, mesh = family(tiny, name), tiny.mesh(), tiny.mesh(devices, model_parallel)
    std = 0.5 if name == "phi" else 0.2  # with less, these weights say hardly more than one word
    with jax.set_mesh(single):
        params, batch = tiny.params(single, cfg, std), tiny.batch(single)
        free = by_recomputation(params, batch, cfg, ())
        ends = (int(free[0, 2]), int(free[1, 4]))  # so that rows end early
        expected = by_recomputation(params, batch, cfg, ends)
    assert len(np.unique(free)) > 8 and (np.asarray(batch["image_start"]) < 0).any()
    assert (expected == -1).any() and (expected[:, -1] != -1).any()
    with jax.set_mesh(mesh):
        params, batch = tiny.params(mesh, cfg, std), tiny.batch(mesh)
        found = generate.greedy(params, batch, cfg, max_new_tokens=NEW, eos_id=ends)
    np.testing.assert_array_equal(found, expected)


def test_stops_when_all_rows_ended_and_pads(tiny):
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        params, batch = tiny.params(mesh), tiny.batch(mesh, rows=4)
        one = axes.put_batch({key: np.repeat(np.asarray(array)[:1], 4, axis=0) for key, array in batch.items()}, mesh)
        first = int(by_recomputation(params, one, tiny.cfg, ())[0, 0])
        ended = np.asarray(generate.greedy(params, one, tiny.cfg, max_new_tokens=NEW, eos_id=first))
    np.testing.assert_array_equal(ended, [[first] + [-1] * (NEW - 1)] * 4)


def leftward(batch: dict) -> dict[str, np.ndarray]:
    """The same prompts with the padding in front of them."""
    moved = {key: np.array(array) for key, array in batch.items()}
    for row, length in enumerate(moved["lengths"]):
        shift = moved["tokens"].shape[1] - length
        moved["tokens"][row] = np.roll(moved["tokens"][row], shift)
        moved["image_start"][row] += shift * (moved["image_start"][row] >= 0)
    return moved


def test_left_padding(tiny):
    for devices, model_parallel in ((1, 1), (8, 2)):
        mesh = tiny.mesh(devices, model_parallel)
        with jax.set_mesh(mesh):
            batch = tiny.batch(mesh)
            moved = generate.right_padded(axes.put_batch(leftward(batch), mesh))
            assert moved["tokens"].sharding.is_equivalent_to(batch["tokens"].sharding, 2)
            for key in generate.KEYS:
                np.testing.assert_array_equal(moved[key], batch[key])


def test_draws(tiny):
    mesh, key, other = tiny.mesh(), jax.random.key(3), jax.random.key(4)
    with jax.set_mesh(mesh):
        params, batch = tiny.params(mesh), tiny.batch(mesh)

        def draw(key, temperature, mesh=mesh):
            with jax.set_mesh(mesh):
                where = (tiny.params(mesh), tiny.batch(mesh), tiny.cfg)
                keys = dict(max_new_tokens=NEW, eos_id=-5, temperature=temperature, key=key)
                return np.asarray(generate.sample(*where, **keys))

        compiled = generate._decode._cache_size()
        first = draw(key, 3.0)
        np.testing.assert_array_equal(draw(key, 3.0), first)
        assert (draw(other, 3.0) != first).mean() > 0.5
        greedy = np.asarray(generate.greedy(params, batch, tiny.cfg, max_new_tokens=NEW, eos_id=-5))
        np.testing.assert_array_equal(draw(key, 1e-4), greedy)
        assert generate._decode._cache_size() == compiled + 2  # one for drawing, one for the likeliest
    np.testing.assert_array_equal(draw(key, 3.0, tiny.mesh(8, 2)), first)
    with pytest.raises(UserError, match="temperature is 0; expected a positive number"):
        draw(key, 0)


def test_drawn_tokens_follow_the_softmax(tiny):
    mesh, rows, temperature = tiny.mesh(), 2048, 0.5
    with jax.set_mesh(mesh):
        params, batch = tiny.params(mesh), tiny.batch(mesh, rows=1)
        scores = jax.jit(lambda p, b: vlm.logits(p, vlm.forward(p, b, tiny.cfg).hidden, tiny.cfg))(params, batch)
        p = np.asarray(jax.nn.softmax(scores[0, int(batch["lengths"][0]) - 1] / temperature))
        many = {key: np.repeat(np.asarray(array), rows, axis=0) for key, array in batch.items()}
        keys = dict(max_new_tokens=1, eos_id=-5, temperature=temperature, key=jax.random.key(0))
        found = np.asarray(generate.sample(params, axes.put_batch(many, mesh), tiny.cfg, **keys))[:, 0]
    share = np.bincount(found, minlength=len(p)) / rows
    assert 0.05 < p.max() < 0.9
    # five standard deviations of each share
    assert (np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / rows) + 1 / rows).all()


def ask_torch(model, prompts: dict, ends: list[int], **inputs) -> tuple[np.ndarray, float]:
    """Tokens [b, LONG] that `generate` finds from the left-padded prompts, -1 behind the end; and the least difference
    of the two largest logits at any token, in units of the logits' standard deviation."""
    width = prompts["tokens"].shape[1]
    real = np.arange(width)[None] >= width - prompts["lengths"][:, None]
    out = model.generate(
        input_ids=torch.tensor(prompts["ids"], dtype=torch.long),
        attention_mask=torch.tensor(real, dtype=torch.long),
        max_new_tokens=LONG,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **inputs,
    )
    found = np.full((len(real), LONG), -1, np.int64)
    tokens = out.sequences[:, width:].numpy()
    logits = torch.stack(out.logits, 1).numpy()
    gap = np.inf
    for row, line in enumerate(tokens):
        stop = np.flatnonzero(np.isin(line, ends))
        count = int(stop[0]) + 1 if len(stop) else len(line)
        found[row, :count] = line[:count]
        top = np.sort(logits[row, :count], axis=-1)
        gap = min(gap, float((top[:, -1] - top[:, -2]).min() / logits.std()))
    return found, gap


def compare(model, params: dict, cfg: vlm.VLMConfig, batch: dict, mesh, image_id: int | None = None, **inputs) -> None:
    """Ours, prompts padded on either side, against `generate` with two ends, which one row never says."""
    moved = leftward(batch)
    ids = moved["tokens"].copy()
    for row, start in enumerate(moved["image_start"]):
        if start >= 0:
            ids[row, start : start + cfg.image_tokens] = image_id
    free, gap = ask_torch(model, moved | {"ids": ids}, [], **inputs)
    assert gap > 3e-4, "choose another seed: two tokens are as likely to within float noise"
    assert (free >= 0).all() and len(np.unique(free)) > 12
    silent = set(free[0, :21].tolist()) - set(free[3].tolist()), set(free[1, :41].tolist()) - set(free[3].tolist())
    ends = [max(words) for words in silent]
    stopped, _ = ask_torch(model, moved | {"ids": ids}, ends, **inputs)
    assert (stopped[0] == -1).any() and (stopped[1] == -1).any() and (stopped[3] == free[3]).all()
    with jax.set_mesh(mesh):
        right, left = axes.put_batch(batch, mesh), axes.put_batch(moved, mesh)
        keys = dict(max_new_tokens=LONG, eos_id=ends)
        np.testing.assert_array_equal(generate.greedy(params, right, cfg, **keys), stopped)
        np.testing.assert_array_equal(generate.greedy(params, left, cfg, left_padded=True, **keys), stopped)


def prompts(rows: int, longest: int, vocab: int, seed: int) -> dict[str, np.ndarray]:
    """Text-only prompts of unequal lengths."""
    draw = np.random.default_rng(seed)
    lengths = np.array([longest, longest - 7, longest - 100, longest - 180], np.int32)
    tokens = draw.integers(3, vocab, (rows, longest)).astype(np.int32)
    tokens[np.arange(longest)[None] >= lengths[:, None]] = 0
    return {"tokens": tokens, "lengths": lengths, "image_start": np.full(rows, -1, np.int32)}


def test_llava_equals_transformers(tiny, tmp_path):
    mesh, width, depth, vocab, image_id = tiny.mesh(), 48, 3, 96, 2
    eye = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=112)
    text = dict(hidden_size=width, intermediate_size=80, num_hidden_layers=depth, num_attention_heads=4)
    model = towers.randomise(
        transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=transformers.CLIPVisionConfig(**eye, patch_size=14),
                text_config=transformers.LlamaConfig(
                    **text, num_key_value_heads=2, vocab_size=vocab, rms_norm_eps=1e-5, eos_token_id=None
                ),
                image_token_index=image_id,
                image_seq_length=64,
                tie_word_embeddings=False,
            )
        ),
        seed=1,
    )
    tensors = towers.saved(model, tmp_path)
    sizes = {
        "vision": {"patch": 14, "width": 32, "depth": 2, "heads": 2, "mlp": 48},  # the last block is not read
        "decoder": {"width": width, "depth": depth, "heads": 4, "kv_heads": 2, "mlp": 80},
    }
    cfg = vlm.VLMConfig.tiny(sizes, 112, vocab, Precision("float32"))
    prefixes = {"vision_tower.vision_model.": "vision_tower.", "": ""}
    unread = ("vision_tower.encoder.layers.2.", "vision_tower.post_layernorm.")
    with jax.set_mesh(mesh):
        params = towers.tree(vlm.abstract(cfg), tensors, mesh, prefixes, unread)
    batch = prompts(4, 270, vocab, seed=2)
    batch["image_start"] = np.array([5, 1, -1, 20], np.int32)
    batch["images"] = np.random.default_rng(3).integers(0, 256, (4, 112, 112, 3)).astype(np.uint8)
    pixels = (batch["images"] / 255.0 - np.array(vlm.CLIP_MEAN)) / np.array(vlm.CLIP_STD)
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2)[batch["image_start"] >= 0], dtype=torch.float32)
    compare(model, params, cfg, batch, mesh, image_id, pixel_values=pixels)


def test_stablelm_equals_transformers(tiny, tmp_path):
    mesh, vocab = tiny.mesh(), 96
    model = towers.randomise(
        transformers.StableLmForCausalLM(
            transformers.StableLmConfig(
                vocab_size=vocab,
                hidden_size=64,
                intermediate_size=80,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=4,
                partial_rotary_factor=0.25,
                use_qkv_bias=True,
                layer_norm_eps=1e-5,
                eos_token_id=None,
                bos_token_id=None,
            )
        ),
        seed=1,
    )
    tensors = towers.saved(model, tmp_path)
    stablelm = dict(
        family="stablelm", vocab=vocab, width=64, heads=4, kv_heads=4, head_dim=16, mlp=80, norm="layer", rotary=4
    )
    text = dataclasses.replace(tiny.cfg.decoder, **stablelm, biases=("wq", "wk", "wv"))
    cfg = dataclasses.replace(tiny.cfg, decoder=text)
    with jax.set_mesh(mesh):
        abstract = vlm.abstract(cfg)
        params = weights.draw({key: abstract[key] for key in ("vision", "projector")}, mesh)
        params["decoder"] = towers.tree(abstract["decoder"], tensors, mesh, {"language_model.": ""})
    batch = prompts(4, 260, vocab, seed=5)
    batch["images"] = np.zeros((4, 16, 16, 3), np.uint8)
    compare(model, params, cfg, batch, mesh)
