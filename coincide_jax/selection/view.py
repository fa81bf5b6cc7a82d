"""What a selector may see and what it gives back, and how rows of a feature store are read."""

import dataclasses
import itertools
import pathlib
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

READ_ROWS = 1024  # of a store that is read in order; a multiple of the rows under one of its checksums


@dataclasses.dataclass(frozen=True)
class SelectionView:
    """Everything a selector may see: no record, and so no task, label, id or path."""

    # i[n] rows → f[n, D], finite; many rows in one call read a store fewer times. Or f[N, D] on one device
    features: Callable[[np.ndarray], np.ndarray] | jax.Array
    valid: np.ndarray  # bool[N]
    assignment: np.ndarray | None  # i32[N], -1 = not valid; None = no clusters
    centroids: np.ndarray | None  # f32[K, D]
    num_layers: int  # tapped layers in a feature, as extracted
    budget: int  # M


class Selection(NamedTuple):
    """The chosen rows and why.

    `clusters` has columns of length K (none if the selector does not look at clusters), `records` columns of length M,
    `summary` numbers for the manifest.
    """

    indices: np.ndarray  # i64[M], in selection order
    clusters: dict[str, np.ndarray]
    records: dict[str, np.ndarray]
    summary: dict[str, object] | None = None


def reader(store, cache_bytes: int, folder: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
    """A function that reads rows of features, non-finite values as 0, as they count in clustering.

    The rows that are asked for are held in memory up to `cache_bytes`; more than that lie in a nameless file in
    `folder` that is mapped, so that they can be paged out. They are read in the store's order, `READ_ROWS` at a time,
    since one checksum covers many rows: ask for many at once.

    Args:
      store: f[N, D], anything with `shape`, `dtype` and `store[rows]`.
    """

    def rows(indices: np.ndarray) -> np.ndarray:
        shape, kind = (len(indices), store.shape[1]), np.dtype(store.dtype)
        if shape[0] * shape[1] * kind.itemsize <= cache_bytes:
            out = np.empty(shape, kind)
        else:
            with tempfile.TemporaryFile(dir=folder) as scratch:
                out = np.memmap(scratch, kind, "w+", shape=shape)
        order = np.argsort(indices, kind="stable")
        ordered = np.asarray(indices)[order]
        bounds = np.searchsorted(ordered, np.arange(0, store.shape[0] + READ_ROWS, READ_ROWS))
        for first, last in itertools.pairwise(bounds):
            if first < last:
                part = store[ordered[first:last]]
                out[order[first:last]] = np.where(np.isfinite(part), part, kind.type(0))
        return out

    return rows
