"""An image file to a square uint8 array, in parity with LLaVA: pad to a square, then Pillow's bicubic resize.

`jax.image.resize` is not the same as Pillow's antialiased bicubic, so images are resized here, on the host;
they travel as uint8 and are normalised on the device.
"""

import pathlib
import threading

import numpy as np
from PIL import Image

# Of CLIP's vision tower, in units of [0, 1]; the padding takes the mean's colour, so that it normalises to about zero.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
PAD_COLOUR = tuple(int(255 * mean) for mean in CLIP_MEAN)


def load(path: pathlib.Path, size: int) -> np.ndarray:
    """Decodes an image (palettes and grey become RGB), pads it to a square, resizes it: u8[size, size, 3]."""
    with Image.open(path) as image:
        return square(image.convert("RGB"), size)


def square(image: Image.Image, size: int) -> np.ndarray:
    """Centres an RGB image on a square of the padding colour and resizes it (bicubic). Returns u8[size, size, 3]."""
    side = max(image.size)
    if image.size != (side, side):
        canvas = Image.new("RGB", (side, side), PAD_COLOUR)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


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
