"""Parameters of small models for tests, drawn by NumPy: the same numbers on every mesh, and nothing to compile.

`layers.init` draws a whole model in one program, whose compilation takes longer than most tests; its own tests call it.
"""

import zlib

import jax
import numpy as np

from coincide_jax.models import layers


def draw(abstract: dict, mesh, seed: int = 0, std: float | None = None) -> dict:
    """The tree as its description says (`layers.init`), made where it lies. With `std` every leaf is normal around its
    usual mean, so that a bias or scale left out shows."""

    def one(path, leaf: layers.Leaf, place: jax.ShapeDtypeStruct) -> jax.Array:
        rng = np.random.default_rng([seed, zlib.crc32(jax.tree_util.keystr(path).encode())])
        width = (leaf.std if leaf.init in ("normal", "uniform") else 0.0) if std is None else std
        values = (leaf.init == "ones") + width * rng.standard_normal(leaf.shape)
        return jax.device_put(values.astype(np.float32), place.sharding)

    return jax.tree_util.tree_map_with_path(
        one, abstract, layers.abstract_arrays(abstract, mesh), is_leaf=layers.is_leaf
    )
