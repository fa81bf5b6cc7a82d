"""An image file to a square uint8 array, in parity with the pipelines that the towers were trained with.

LLaVA pads to a square and then resizes; CLIP's own processor resizes the shorter side and crops the centre; SigLIP's
squeezes. All take what Pillow's `convert("RGB")` gives, as LLaVA's own code does: alpha and a palette's transparent
entry are dropped (never laid over white), CMYK is converted without a profile, an EXIF rotation is not applied.

`jax.image.resize` is not the same as Pillow's antialiased bicubic, so images are resized here, on the host;
they travel as uint8 and are normalised on the device.
"""

import pathlib
import threading

import numpy as np
from PIL import Image

BICUBIC = Image.Resampling.BICUBIC


def load(path: pathlib.Path, size: int, background: tuple[int, int, int], frame: str = "pad") -> np.ndarray:
    """Decodes an image file and makes it a square, u8[size, size, 3].

    background: RGB of the padding, int(255 · mean) of the tower's mean, so that it normalises to about zero.
    frame: pad (LLaVA) | crop (CLIP and DINOv2 on their own) | squeeze (SigLIP on its own).
    """
    with Image.open(path) as image:
        image = image.convert("RGB")
    if frame == "pad":
        return square(image, size, background)
    return {"crop": crop, "squeeze": squeeze}[frame](image, size)


def square(image: Image.Image, size: int, background: tuple[int, int, int]) -> np.ndarray:
    """Centres an RGB image on a square of the background's colour and resizes it (bicubic). Returns u8[size, size, 3].

    LLaVA's `expand2square`; after it the processors' resizing of the shorter side is this one, and their crop is none.
    """
    side = max(image.size)
    if image.size != (side, side):
        canvas = Image.new("RGB", (side, side), background)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    return squeeze(image, size)


def crop(image: Image.Image, size: int) -> np.ndarray:
    """Resizes an RGB image (bicubic) so that its shorter side is `size`, keeps the centre: u8[size, size, 3]."""
    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.resize((width, height), BICUBIC))[top : top + size, left : left + size]


def squeeze(image: Image.Image, size: int) -> np.ndarray:
    """Resizes an RGB image (bicubic) without regard to its shape: u8[size, size, 3]."""
    return np.asarray(image if image.size == (size, size) else image.resize((size, size), BICUBIC))


class Cache:
    """Keeps what was made first until `limit` bytes are full; safe between threads.

    Nothing is thrown out: training goes round and round a data set, where the least recently used entry is the very
    next one needed.
    """

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0
        self.entries, self.lock = {}, threading.Lock()

    def get(self, key, make, nbytes):
        """The entry of `key`; `make()` makes it, `nbytes(entry)` says what it weighs."""
        found = self.entries.get(key)
        if found is None:
            found = make()
            weight = nbytes(found)
            with self.lock:
                if key not in self.entries and self.used + weight <= self.limit:
                    self.entries[key] = found
                    self.used += weight
        return found
