"""CLIP's joint space: equality with CLIPModel of `transformers`, unit vectors, cosines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import towers
import transformers

from coincide_jax.core import axes, precision
from coincide_jax.models import clip, text, vision

MEAN, STD = (0.5, 0.4, 0.6), (0.3, 0.25, 0.2)
VOCAB, EOS, JOINT, LENGTH, ROWS = 99, 98, 24, 77, 8
CFG = clip.CLIPConfig(
    vision.VisionConfig(
        family="clip",
        image_size=64,
        patch=4,
        width=64,
        depth=2,
        heads=4,
        mlp=96,
        activation="quick_gelu",
        norm_eps=1e-5,
        class_token=True,
        registers=0,
        pre_norm=True,
        closing_norm=True,
        layer_scale=False,
        patch_bias=False,
        gated_mlp=False,
        mean=MEAN,
        std=STD,
    ),
    text.TextConfig(
        family="clip",
        vocab=VOCAB,
        width=48,
        depth=2,
        heads=4,
        mlp=80,
        positions=LENGTH,
        types=0,
        activation="quick_gelu",
        norm_eps=1e-5,
        eos_id=EOS,
        projection=JOINT,
    ),
    precision.choose("float32"),
)


def batch() -> dict[str, np.ndarray]:
    """Images and texts; what follows the eos is padded with eos, as CLIP's tokenizer does."""
    draw = np.random.default_rng(8)
    lengths = draw.integers(2, LENGTH + 1, ROWS).astype(np.int32)
    tokens = draw.integers(3, EOS, (ROWS, LENGTH)).astype(np.int32)
    tokens[np.arange(LENGTH)[None] >= lengths[:, None] - 1] = EOS
    images = draw.integers(0, 256, (ROWS, 64, 64, 3)).astype(np.uint8)
    return {"images": images, "tokens": tokens, "lengths": lengths}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """CLIPModel, and the tensors of its file."""
    eye = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    words = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80, vocab_size=VOCAB)
    config = transformers.CLIPConfig(
        vision_config=eye | dict(image_size=64, patch_size=4),
        text_config=words | dict(max_position_embeddings=LENGTH, eos_token_id=EOS, pad_token_id=1),
        projection_dim=JOINT,
        attn_implementation="eager",
    )
    model = towers.randomise(transformers.CLIPModel(config))
    return model, towers.saved(model, tmp_path_factory.mktemp("clip"))


def vectors(tensors: dict, mesh) -> tuple[np.ndarray, np.ndarray]:
    """Ours, of the batch's images and texts."""
    prefixes = {vision.SOURCE: "vision_model", "": ""}
    params = towers.tree(clip.abstract(CFG), tensors, mesh, prefixes, ("logit_scale",))

    def run(params, b):
        return clip.embed_images(params, b["images"], CFG), clip.embed_texts(params, b["tokens"], b["lengths"], CFG)

    with jax.set_mesh(mesh):
        images, words = jax.jit(run)(params, axes.put_batch(batch(), mesh))
    return np.asarray(images), np.asarray(words)


def test_equals_transformers_on_one_device_and_on_eight(oracle):
    model, tensors = oracle
    given = batch()
    pixels = ((given["images"] / 255.0 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor(given["tokens"], dtype=torch.long),
            pixel_values=torch.tensor(pixels, dtype=torch.float32),
        )
    one, eight = (vectors(tensors, mesh) for mesh in towers.meshes())
    for mine, theirs in zip(one, (expected.image_embeds, expected.text_embeds), strict=True):
        assert mine.shape == (ROWS, JOINT) and towers.apart(mine, theirs.numpy()) < 1e-4
        np.testing.assert_allclose(np.linalg.norm(mine, axis=1), 1.0, rtol=1e-6)
    cosines = expected.logits_per_image.numpy() / np.exp(tensors["logit_scale"])
    assert towers.apart(one[0] @ one[1].T, cosines) < 1e-4
    for a, b in zip(eight, one, strict=True):
        assert towers.apart(a, b) < 1e-5


def test_a_zero_row_stays_zero():
    found = np.asarray(clip.unit(jnp.array([[3.0, 4.0], [0.0, 0.0]])))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
