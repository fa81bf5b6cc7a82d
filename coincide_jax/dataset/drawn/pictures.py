"""What the embedded data set shows: scenes of one to four shapes, words, sums, handwritten digits; 48x48 pixels.

A picture is described first and drawn after, so that the same description can be drawn again with a little jitter.
"""

import dataclasses
import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 48
QUARTER = SIDE // 4  # shapes stand in cells of half a side, whose corners lie on this grid
COLOURS = {
    "red": (225, 30, 35),
    "green": (30, 170, 55),
    "blue": (40, 80, 235),
    "yellow": (245, 225, 40),
    "purple": (150, 45, 185),
    "orange": (250, 135, 20),
    "cyan": (40, 210, 220),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
CORNERS = ((0, 0), (2, 0), (0, 2), (2, 2))
BETWEEN = ((1, 0), (0, 1), (1, 1), (2, 1), (1, 2))
PLACES = {
    (0, 0): "top left",
    (1, 0): "top center",
    (2, 0): "top right",
    (0, 1): "middle left",
    (1, 1): "center",
    (2, 1): "middle right",
    (0, 2): "bottom left",
    (1, 2): "bottom center",
    (2, 2): "bottom right",
}
STAR = [(np.sin(np.pi * k / 5) * (0.5, 0.22)[k % 2], -np.cos(np.pi * k / 5) * (0.5, 0.22)[k % 2]) for k in range(10)]


@dataclasses.dataclass(frozen=True)
class Item:
    """One shape. `cell` is the upper left corner of its half-side cell in quarters of the side; `size` in pixels."""

    shape: str
    colour: str
    cell: tuple[int, int]
    size: int


@dataclasses.dataclass(frozen=True)
class Picture:
    """A description: shapes, or a text in a colour, or a handwritten digit f32[8, 8] in [0, 1]."""

    items: tuple[Item, ...] = ()
    text: str = ""
    colour: str = "white"
    digit: np.ndarray | None = None


def pick(rng: np.random.Generator, choices):
    """One of a sequence, uniformly."""
    return choices[int(rng.integers(len(choices)))]


def scene(rng: np.random.Generator, count: int) -> Picture:
    """`count` shapes, all shapes and all colours different, so that each can be named by either."""
    shapes, colours = rng.permutation(len(SHAPES)), rng.permutation(len(COLOURS))
    names = tuple(COLOURS)
    if count == 1 and rng.random() < 0.4:
        cells = [pick(rng, BETWEEN)]
    else:
        cells = [CORNERS[i] for i in rng.permutation(4)[:count]]
    sizes = rng.integers(18, 21, size=count)
    items = [
        Item(SHAPES[s], names[c], cell, int(size))
        for s, c, cell, size in zip(shapes[:count], colours[:count], cells, sizes, strict=True)
    ]
    return Picture(items=tuple(sorted(items, key=lambda item: (item.cell[1], item.cell[0]))))


def draw(picture: Picture, rng: np.random.Generator) -> Image.Image:
    """Draws a picture: jitter of one pixel, a dark background of its own grey, noise on every pixel."""
    grey = int(rng.integers(20, 80))
    image = Image.new("RGB", (SIDE, SIDE), (grey, grey, grey))
    canvas = ImageDraw.Draw(image)
    jitter = rng.integers(-1, 2, size=(max(len(picture.items), 1), 2))
    for item, (dx, dy) in zip(picture.items, jitter, strict=False):
        middle = (QUARTER * (item.cell[0] + 1) + int(dx), QUARTER * (item.cell[1] + 1) + int(dy))
        _shape(canvas, item, *middle, COLOURS[item.colour], (grey, grey, grey))
    if picture.text:
        place = (SIDE // 2 + int(jitter[0, 0]), SIDE // 2 + int(jitter[0, 1]))
        canvas.text(place, picture.text, fill=COLOURS[picture.colour], font=_font(), anchor="mm", stroke_width=0.6)
    if picture.digit is not None:
        ink = Image.fromarray(np.uint8(255 * picture.digit)).resize((44, 44), Image.Resampling.BICUBIC)
        full = Image.new("RGB", ink.size, COLOURS[picture.colour])
        image.paste(full, (2 + int(jitter[0, 0]), 2 + int(jitter[0, 1])), mask=ink)
    noise = rng.integers(-8, 9, size=(SIDE, SIDE, 3), dtype=np.int16)
    return Image.fromarray(np.clip(np.asarray(image, np.int16) + noise, 0, 255).astype(np.uint8))


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(20)


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: f32[1797, 8, 8] in [0, 1], int[1797]."""
    from sklearn.datasets import load_digits  # a second to import, and only the embedded data set needs it

    found = load_digits()
    return (found.images / 16.0).astype(np.float32), found.target


def _shape(canvas: ImageDraw.ImageDraw, item: Item, x: int, y: int, colour: tuple, behind: tuple) -> None:
    """Draws an item centred on (x, y)."""
    half, third = item.size // 2, item.size // 6
    box = (x - half, y - half, x + half, y + half)
    if item.shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif item.shape == "ring":
        canvas.ellipse(box, fill=colour)
        hole = half - max(item.size // 5, 2)
        canvas.ellipse((x - hole, y - hole, x + hole, y + hole), fill=behind)
    elif item.shape == "square":
        canvas.rectangle(box, fill=colour)
    elif item.shape == "triangle":
        canvas.polygon([(x, y - half), (x + half, y + half), (x - half, y + half)], fill=colour)
    elif item.shape == "cross":
        canvas.rectangle((x - third, y - half, x + third, y + half), fill=colour)
        canvas.rectangle((x - half, y - third, x + half, y + third), fill=colour)
    else:
        canvas.polygon([(x + dx * item.size * 1.15, y + dy * item.size * 1.15) for dx, dy in STAR], fill=colour)
