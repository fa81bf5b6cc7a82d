"""Images: padding, palettes, resizing as Pillow does it; the cache keeps to its bound."""

import numpy as np
import pytest
from PIL import Image

from coincide_jax.dataset import images


@pytest.mark.parametrize(("width", "height"), [(10, 4), (3, 8)])
def test_padding_is_centred_in_the_mean_colour(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    side = max(width, height)
    found = images.square(Image.fromarray(pixels), side)
    expected = np.tile(np.uint8([122, 116, 104]), (side, side, 1))
    x, y = (side - width) // 2, (side - height) // 2
    expected[y : y + height, x : x + width] = pixels
    assert np.array_equal(found, expected)


def test_resize_is_pillows_bicubic(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = images.load(tmp_path / "a.png", 24)
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.asarray(Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC)))


def test_palette_and_grey_become_rgb(tmp_path):
    colour = Image.new("RGB", (8, 8), (200, 30, 40))
    colour.quantize(4).save(tmp_path / "p.png")
    Image.new("L", (8, 8), 99).save(tmp_path / "l.png")
    assert np.array_equal(images.load(tmp_path / "p.png", 8)[0, 0], (200, 30, 40))
    assert np.array_equal(images.load(tmp_path / "l.png", 8)[0, 0], (99, 99, 99))


def test_the_cache_keeps_to_its_bound():
    cache, made = images.Cache(100), []

    def get(key):
        return cache.get(key, lambda: made.append(key) or np.zeros(40, np.uint8), lambda a: a.nbytes)

    for key in (1, 2, 3, 1, 2, 3):
        assert get(key).shape == (40,)
    assert made == [1, 2, 3, 3]
    assert cache.used == 80
