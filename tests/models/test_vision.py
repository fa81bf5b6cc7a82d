"""The vision tower: normalised patches, the convolution they stand for, class token and positions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coincide_jax.models import layers, vision


def drawn(cfg: vision.VisionConfig) -> dict:
    """Parameters with std 0.2, so that attention is far from uniform; scales around 1."""
    rng = np.random.default_rng(4)

    def one(path, leaf: layers.Leaf) -> np.ndarray:
        return (rng.normal(size=leaf.shape) * 0.2 + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, vision.abstract(cfg), is_leaf=layers.is_leaf)


@functools.partial(jax.jit, static_argnums=2)
def forward(params, images, cfg: vision.VisionConfig) -> jax.Array:
    return vision.forward(params, images, cfg, jnp.dtype("float32"))


def run(params, images, cfg: vision.VisionConfig) -> np.ndarray:
    """Patch features f32[b, tokens, w]."""
    return np.asarray(forward(params, images, cfg))


@pytest.fixture
def images():
    """u8[2, 16, 16, 3]"""
    return np.random.default_rng(2).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)


def test_patches_are_normalised_pixels_in_place(tiny, images):
    cfg = tiny.cfg.vision
    found = np.asarray(vision.patches(jnp.asarray(images), cfg, jnp.dtype("float32")))
    assert found.shape == (2, 2, 8, 2, 8, 3)
    for row, y, x, channel in ((0, 0, 0, 0), (1, 9, 3, 1), (0, 15, 12, 2)):
        pixel = (images[row, y, x, channel] / 255 - cfg.mean[channel]) / cfg.std[channel]
        assert found[row, y // 8, y % 8, x // 8, x % 8, channel] == pytest.approx(pixel, rel=1e-5, abs=1e-6)


def test_pixels_that_fill_no_patch_are_left_out(tiny, images):
    wide = np.pad(images, ((0, 0), (0, 5), (0, 5), (0, 0)), constant_values=200)
    cfg = dataclasses.replace(tiny.cfg.vision, image_size=21)
    assert cfg.tokens == tiny.cfg.vision.tokens == 4
    dtype = jnp.dtype("float32")
    np.testing.assert_array_equal(
        vision.patches(jnp.asarray(wide), cfg, dtype), vision.patches(jnp.asarray(images), tiny.cfg.vision, dtype)
    )


def test_without_blocks_it_is_the_strided_convolution_and_a_norm(tiny, images):
    """Weights of the blocks' last products are set to zero, so that only the embedding is left."""
    cfg, params = tiny.cfg.vision, drawn(tiny.cfg.vision)
    quiet = {name: np.zeros_like(params["blocks"][name]) for name in ("wo", "bo", "down", "down_bias")}
    found = run(params | {"blocks": params["blocks"] | quiet}, images, cfg)
    pixels = (images / 255.0 - np.array(cfg.mean)) / np.array(cfg.std)
    for row in range(2):
        for token in range(4):
            y, x = 8 * (token // 2), 8 * (token % 2)
            patch = pixels[row, y : y + 8, x : x + 8]
            z = np.einsum("yxc,cyxw->w", patch, params["patch"]) + params["position"][token + 1]
            z = (z - z.mean()) / np.sqrt(z.var() + cfg.norm_eps)
            wanted = z * params["pre_norm"]["scale"] + params["pre_norm"]["bias"]
            np.testing.assert_allclose(found[row, token], wanted, rtol=1e-4, atol=1e-4)


def test_the_class_token_is_seen_by_patches_but_not_handed_out(tiny, images):
    params = drawn(tiny.cfg.vision)
    found = run(params, images, tiny.cfg.vision)
    other = run(params | {"class": -params["class"]}, images, tiny.cfg.vision)
    without = dataclasses.replace(tiny.cfg.vision, class_token=False)
    abstract = vision.abstract(without)
    assert "class" not in abstract and abstract["position"].shape == (4, 16)
    assert found.shape == run(drawn(without), images, without).shape == (2, 4, 16)
    assert np.abs(found - other).max() > 1e-2


def test_every_patch_sees_every_other_of_its_image(tiny, images):
    params, changed = drawn(tiny.cfg.vision), images.copy()
    changed[0, 8:, 8:] = 255 - changed[0, 8:, 8:]  # the last patch of the first image
    difference = np.abs(run(params, images, tiny.cfg.vision) - run(params, changed, tiny.cfg.vision)).max(axis=-1)
    assert np.all(difference[0] > 1e-3) and np.all(difference[1] == 0)
