"""A very small model with weights large enough (std ~0.2) that attention is far from uniform, and batches for it."""

import jax
import numpy as np
import pytest
import weights

from coincide_jax.core import axes
from coincide_jax.models import vlm

VOCAB, IMAGE, LENGTH = 64, 16, 24


class Tiny:
    """Config, meshes, parameters and batches of one small model."""

    cfg = vlm.VLMConfig.tiny(
        {
            "vision": {"patch": 8, "width": 16, "depth": 2, "heads": 2, "mlp": 24},
            "decoder": {"width": 32, "depth": 3, "heads": 4, "kv_heads": 2, "mlp": 40},
        },
        IMAGE,
        VOCAB,
    )

    @staticmethod
    def mesh(devices: int = 1, model_parallel: int = 1):
        """A mesh over the first `devices`."""
        return axes.make_mesh(model_parallel, jax.devices()[:devices])

    def params(self, mesh, cfg=None, std: float = 0.2):
        """The same numbers on every mesh; vectors are drawn too, so that a bias left out shows."""
        return weights.draw(vlm.abstract(cfg or self.cfg), mesh, seed=7, std=std)

    def batch(self, mesh, rows: int = 8, length: int = LENGTH, seed: int = 0) -> dict:
        """Rows of different lengths; every fourth is text only; answers of different lengths."""
        draw = np.random.default_rng(seed)
        lengths = draw.integers(12, length + 1, rows).astype(np.int32)
        start = np.where(np.arange(rows) % 4 == 3, -1, draw.integers(1, 6, rows)).astype(np.int32)
        tokens = draw.integers(3, VOCAB, (rows, length)).astype(np.int32)
        position = np.arange(length)[None]
        tokens[position >= lengths[:, None]] = 0
        labels = (position >= lengths[:, None] - draw.integers(1, 4, rows)[:, None]) & (position < lengths[:, None])
        images = draw.integers(0, 256, (rows, IMAGE, IMAGE, 3)).astype(np.uint8)
        batch = dict(tokens=tokens, lengths=lengths, image_start=start, images=images, labels=labels)
        return axes.put_batch(batch, mesh)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """The small model."""
    return Tiny()
