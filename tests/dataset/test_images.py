"""Images: padding, palettes, resizing as Pillow does it, equality with the processors of `transformers`; the cache
keeps to its bound."""

import numpy as np
import pytest
import transformers
from PIL import Image

from coincide_jax.dataset import images

CLIP_COLOUR, SIGLIP_COLOUR = (122, 116, 104), (127, 127, 127)
ORIENTATION = 0x0112  # EXIF


def photo(width: int, height: int) -> Image.Image:
    """A smooth picture with noise and a hard edge, RGB."""
    draw = np.random.default_rng(width * height)
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = np.stack([np.sin(9 * x + 2 * y), np.cos(7 * y), np.sin(5 * (x + y))], axis=-1) * 90 + 128
    waves[: height // 3, : width // 2] = (250, 10, 60)
    return Image.fromarray(np.clip(waves + draw.normal(0, 12, waves.shape), 0, 255).astype(np.uint8))


def rgba(folder):
    """A photo with a gradient of transparency."""
    image = photo(151, 97)
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 151).astype(np.uint8), (97, 1))))
    return saved(image, folder / "rgba.png")


def palette(folder):
    """A palette of which one entry is transparent."""
    return saved(photo(64, 201).quantize(32), folder / "palette.png", transparency=5)


def rotated(folder):
    """A JPEG that EXIF says to turn by 90 degrees."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return saved(photo(131, 77), folder / "rotated.jpg", exif=exif)


def saved(image: Image.Image, path, **more):
    """The path, after writing."""
    image.save(path, **more)
    return path


FILES = {
    "small_odd": lambda folder: saved(photo(101, 57), folder / "a.png"),
    "tall_jpeg": lambda folder: saved(photo(333, 507), folder / "a.jpg"),
    "sliver": lambda folder: saved(photo(211, 3), folder / "a.png"),
    "square": lambda folder: saved(photo(56, 56), folder / "a.png"),
    "grey": lambda folder: saved(photo(75, 130).convert("L"), folder / "a.jpg"),
    "grey_alpha": lambda folder: saved(photo(75, 131).convert("LA"), folder / "a.png"),
    "bits": lambda folder: saved(photo(99, 44).convert("1"), folder / "a.png"),
    "palette": palette,
    "rgba": rgba,
    "cmyk": lambda folder: saved(photo(145, 111).convert("CMYK"), folder / "a.jpg"),
    "rotated": rotated,
}


def expand2square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """LLaVA's padding, in NumPy."""
    pixels, side = np.asarray(image), max(image.size)
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[:] = colour
    top, left = (side - image.height) // 2, (side - image.width) // 2
    canvas[top : top + image.height, left : left + image.width] = pixels
    return Image.fromarray(canvas)


def unnormalised(processor, image) -> np.ndarray:
    """What a processor hands to its tower, normalisation undone: f64[size, size, 3] in [0, 1]."""
    found = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0).astype(np.float64)
    return found * np.array(processor.image_std) + np.array(processor.image_mean)


@pytest.fixture(scope="module")
def clip():
    """CLIP's processor, 56 pixels."""
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})


@pytest.fixture(scope="module")
def siglip():
    """SigLIP's processor, 56 pixels."""
    return transformers.SiglipImageProcessorPil(size={"height": 56, "width": 56})


@pytest.mark.parametrize("name", FILES)
def test_equals_the_processors_behind_llavas_reading(name, tmp_path, clip, siglip):
    """LLaVA reads `Image.open(path).convert("RGB")`, pads, and calls the tower's processor."""
    path = FILES[name](tmp_path)
    with Image.open(path) as image:
        # through NumPy: Pillow keeps a palette's transparent colour in `info`, and transformers 5 would paint it white
        read = Image.fromarray(np.asarray(image.convert("RGB")))
    llava = transformers.LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    llava.do_pad = True
    for frame, colour, processor, given in (
        ("pad", CLIP_COLOUR, clip, expand2square(read, CLIP_COLOUR)),
        ("pad", CLIP_COLOUR, llava, read),
        ("pad", SIGLIP_COLOUR, siglip, expand2square(read, SIGLIP_COLOUR)),
        ("crop", CLIP_COLOUR, clip, read),
        ("squeeze", SIGLIP_COLOUR, siglip, read),
    ):
        found = images.load(path, 56, colour, frame)
        assert found.shape == (56, 56, 3) and found.dtype == np.uint8
        assert np.abs(found / 255.0 - unnormalised(processor, given)).max() < 1 / 255, (frame, type(processor))


def test_alpha_is_dropped_and_exif_is_not_obeyed(tmp_path, clip):
    """As LLaVA's own code; the processors of transformers 5, handed an image with alpha, lay it over white."""
    found = images.load(rgba(tmp_path), 56, CLIP_COLOUR, "crop")
    with Image.open(tmp_path / "rgba.png") as image:
        over_white = unnormalised(clip, image)
    assert np.abs(found / 255.0 - over_white).max() > 0.5
    path = rotated(tmp_path)
    with Image.open(path) as image:
        assert image.getexif()[ORIENTATION] == 6
        plain, turned = image.convert("RGB"), image.convert("RGB").transpose(Image.Transpose.ROTATE_270)
    found = images.load(path, 56, CLIP_COLOUR)
    assert np.array_equal(found, images.square(plain, 56, CLIP_COLOUR))
    assert not np.array_equal(found, images.square(turned, 56, CLIP_COLOUR))


@pytest.mark.parametrize(("width", "height"), [(10, 4), (3, 8)])
@pytest.mark.parametrize("colour", [CLIP_COLOUR, SIGLIP_COLOUR])
def test_padding_is_centred_in_the_colour_given(width, height, colour):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    side = max(width, height)
    found = images.square(Image.fromarray(pixels), side, colour)
    expected = np.tile(np.uint8(colour), (side, side, 1))
    x, y = (side - width) // 2, (side - height) // 2
    expected[y : y + height, x : x + width] = pixels
    assert np.array_equal(found, expected)


def test_resize_is_pillows_bicubic(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = images.load(tmp_path / "a.png", 24, CLIP_COLOUR)
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.asarray(Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC)))


def test_palette_and_grey_become_rgb(tmp_path):
    colour = Image.new("RGB", (8, 8), (200, 30, 40))
    colour.quantize(4).save(tmp_path / "p.png")
    Image.new("L", (8, 8), 99).save(tmp_path / "l.png")
    assert np.array_equal(images.load(tmp_path / "p.png", 8, CLIP_COLOUR)[0, 0], (200, 30, 40))
    assert np.array_equal(images.load(tmp_path / "l.png", 8, CLIP_COLOUR)[0, 0], (99, 99, 99))


def test_the_cache_keeps_to_its_bound():
    cache, made = images.Cache(100), []

    def get(key):
        return cache.get(key, lambda: made.append(key) or np.zeros(40, np.uint8), lambda a: a.nbytes)

    for key in (1, 2, 3, 1, 2, 3):
        assert get(key).shape == (40,)
    assert made == [1, 2, 3, 3]
    assert cache.used == 80
