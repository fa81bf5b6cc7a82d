"""Text towers: equality with CLIP's and BERT of `transformers` (float32, random weights, texts of mixed lengths)."""

import jax
import numpy as np
import pytest
import torch
import towers
import transformers
import weights

from coincide_jax.core import axes
from coincide_jax.core.errors import UserError
from coincide_jax.models import text

LENGTHS = np.array([256, 1, 77, 200, 2, 255, 31, 128], np.int32)
VOCAB, EOS = 99, 98
SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=VOCAB)
COMMON = dict(vocab=VOCAB, width=64, depth=2, heads=4, mlp=96, positions=256, activation="gelu")


def texts() -> np.ndarray:
    """i32[8, 256]: real tokens without eos, the last one eos, then padding with other tokens (a tower that looks at the
    padding is found out)."""
    tokens = np.random.default_rng(3).integers(3, EOS, (len(LENGTHS), 256)).astype(np.int32)
    tokens[np.arange(len(LENGTHS)), LENGTHS - 1] = EOS
    return tokens


def clip(eos: int, projection: int):
    """CLIP's text tower of `transformers`, and our configuration."""
    own = SIZES | dict(max_position_embeddings=256, hidden_act="quick_gelu", eos_token_id=eos, pad_token_id=1)
    config = transformers.CLIPTextConfig(**own, projection_dim=24, attn_implementation="eager")
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    ours = COMMON | dict(family="clip", activation="quick_gelu", types=0, norm_eps=1e-5)
    return kind(config), text.TextConfig(**ours, eos_id=eos, projection=projection)


def bert():
    """BERT of `transformers`, and our configuration."""
    config = transformers.BertConfig(**SIZES, max_position_embeddings=256, attn_implementation="eager")
    ours = COMMON | dict(family="bert", types=2, norm_eps=1e-12, eos_id=0, projection=0)
    return transformers.BertModel(config), text.TextConfig(**ours)


def ours(cfg: text.TextConfig, tensors: dict, mesh, unused=()) -> tuple[np.ndarray, ...]:
    """Embeddings, hidden state, and one vector a text."""
    root = "text_model." if any(name.startswith("text_model.") for name in tensors) else ""
    params = towers.tree(text.abstract(cfg), tensors, mesh, {"text_model.": root, "": ""}, unused)

    def run(params, tokens, lengths):
        embedded = text.embed(params, tokens, cfg, towers.FLOAT32)
        hidden = text.encode(params, tokens, lengths, cfg, towers.FLOAT32)
        return embedded, hidden, text.forward(params, tokens, lengths, cfg, towers.FLOAT32)

    with jax.set_mesh(mesh):
        batch = axes.put_batch({"tokens": texts(), "lengths": LENGTHS}, mesh)
        return tuple(np.asarray(part) for part in jax.jit(run)(params, batch["tokens"], batch["lengths"]))


def torchs(model, **more):
    """The oracle's outputs."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(texts(), dtype=torch.long), output_hidden_states=True, **more)


@pytest.mark.parametrize(("eos", "projection"), [(EOS, 24), (2, 0)])
def test_clip_equals_transformers_on_one_device_and_on_eight(eos, projection, tmp_path):
    """With the eos of new cards and with 2, which old cards have (the highest id ends the text)."""
    model, cfg = clip(eos, projection)
    tensors = towers.saved(towers.randomise(model), tmp_path)
    one, eight = (ours(cfg, tensors, mesh) for mesh in towers.meshes())
    found = torchs(model)
    expected = found.text_embeds if projection else found.pooler_output
    assert expected.shape == (8, projection or 64)
    for mine, value in zip(one, (found.hidden_states[0], found.last_hidden_state, expected), strict=True):
        assert towers.apart(mine, value.numpy()) < 1e-4
    for a, b in zip(eight, one, strict=True):
        assert towers.apart(a, b) < 1e-5


def test_bert_equals_transformers_on_one_device_and_on_eight(tmp_path):
    """Mean pooling is sentence-transformers': the sum over the mask's ones, divided by their number."""
    model, cfg = bert()
    tensors = towers.saved(towers.randomise(model), tmp_path)
    one, eight = (ours(cfg, tensors, mesh, ("pooler.",)) for mesh in towers.meshes())
    mask = torch.tensor(np.arange(256)[None] < LENGTHS[:, None], dtype=torch.long)
    found = torchs(model, attention_mask=mask)
    wide = mask[:, :, None].float()
    expected = (found.last_hidden_state * wide).sum(1) / torch.clamp(wide.sum(1), min=1e-9)
    real = mask.bool().numpy()
    assert towers.apart(one[0], found.hidden_states[0].numpy()) < 1e-4
    assert towers.apart(one[1][real], found.last_hidden_state.numpy()[real]) < 1e-4
    assert towers.apart(one[2], expected.numpy()) < 1e-4
    for a, b in zip(eight, one, strict=True):
        assert towers.apart(a, b) < 1e-5


@pytest.mark.parametrize("build", [lambda: clip(EOS, 24), bert], ids=["clip", "bert"])
def test_padding_is_never_seen(build):
    """Whatever stands after the text, its vector is the same."""
    cfg, mesh = build()[1], towers.meshes()[0]
    params = weights.draw(text.abstract(cfg), mesh, seed=2, std=0.2)
    tokens, lengths = texts()[:, :40], np.minimum(LENGTHS, 40)
    tokens[np.arange(8), lengths - 1] = EOS
    other = np.where(np.arange(40)[None] < lengths[:, None], tokens, 5)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda b: text.forward(params, b["tokens"], b["lengths"], cfg, towers.FLOAT32))
        one, same, different = (
            np.asarray(run(axes.put_batch({"tokens": given, "lengths": lengths}, mesh)))
            for given in (tokens, other, tokens[::-1].copy())
        )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - different).max() > 0.01


def test_a_text_longer_than_the_table_is_refused():
    cfg = clip(EOS, 24)[1]
    with pytest.raises(UserError, match="257 tokens long; expected at most 256"):
        text.embed({}, np.zeros((2, 257), np.int32), cfg, towers.FLOAT32)
