"""What a selector may see and what it gives back, and how rows of a feature store are read."""

import dataclasses
import itertools
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from coincide_jax.core.errors import UserError
from coincide_jax.core.metrics import Progress, say

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


def reader(store, cache_bytes: int, folder: pathlib.Path, members=None) -> Callable[[np.ndarray], np.ndarray]:
    """A function that reads rows of features, non-finite values as 0, as they count in clustering.

    The rows that are asked for are held in memory up to `cache_bytes`; more than that lie in a nameless file in
    `folder` that is mapped, so that they can be paged out. They are read in the store's order, `READ_ROWS` at a time,
    since one checksum covers many rows: ask for many at once.

    Args:
      store: f[N, D], anything with `shape`, `dtype` and `store[rows]`.
      members: rows of each cluster, for a store that decodes whole chunks for a row. If they do not fit `cache_bytes`,
        the first call copies them, cluster after cluster, to such a file in one pass over the store; no later call
        reads the store again, and rows that follow each other there come as a part of the file, not as a copy.

    Raises (the function):
      UserError: no room for the file.
    """
    kind, width = np.dtype(store.dtype), store.shape[1]
    rows = np.concatenate([*members, np.zeros(0, np.int64)]).astype(np.int64) if members is not None else ()
    if len(rows) * width * kind.itemsize <= cache_bytes:
        return lambda indices: _gather(store, np.asarray(indices), cache_bytes, folder)
    copy, place = None, np.full(store.shape[0], -1)
    place[rows] = np.arange(len(rows))

    def sliced(indices: np.ndarray) -> np.ndarray:
        nonlocal copy
        if len(indices) == 0:
            return np.zeros((0, width), kind)
        if copy is None:
            copy = _sorted(store, rows, place, folder)
        wanted = place[indices]
        first, last = int(wanted[0]), int(wanted[-1]) + 1
        if last - first == len(wanted) and np.all(np.diff(wanted) == 1):
            return copy[first:last]
        out = _room((len(wanted), width), kind, cache_bytes, folder)
        np.take(copy, wanted, axis=0, out=out, mode="clip")  # mode 'raise' would make a second copy
        return out

    return sliced


def _gather(store, indices: np.ndarray, cache_bytes: int, folder: pathlib.Path) -> np.ndarray:
    out = _room((len(indices), store.shape[1]), np.dtype(store.dtype), cache_bytes, folder)
    for places, part in _in_order(store, indices):
        out[places] = part
    return out


def _sorted(store, rows: np.ndarray, place: np.ndarray, folder: pathlib.Path) -> np.ndarray:
    """The file of the store's `rows`, each at its `place`, written in the store's order."""
    kind = np.dtype(store.dtype)
    out = _scratch((len(rows), store.shape[1]), kind, folder)
    say("select", f"features are copied cluster by cluster, {out.nbytes / 1e9:.1f} GB in {folder} until the stage ends")
    ascending = np.sort(rows)
    with Progress("select", len(rows), "records copied") as progress:
        for places, part in _in_order(store, ascending):
            out[place[ascending[places]]] = part
            progress.advance(len(part))
    return out


def _in_order(store, indices: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(places in `indices`, their rows) by blocks of the store in its order, only those in which a row is wanted."""
    order = np.argsort(indices, kind="stable")
    ordered = indices[order]
    bounds = np.searchsorted(ordered, np.arange(0, store.shape[0] + READ_ROWS, READ_ROWS))
    for first, last in itertools.pairwise(bounds):
        if first < last:
            part = store[ordered[first:last]]
            yield order[first:last], np.where(np.isfinite(part), part, part.dtype.type(0))


def _room(shape: tuple[int, int], kind: np.dtype, cache_bytes: int, folder: pathlib.Path) -> np.ndarray:
    """An array to fill, in memory up to `cache_bytes`, else in a mapped file."""
    fits = shape[0] * shape[1] * kind.itemsize <= cache_bytes
    return np.empty(shape, kind) if fits else _scratch(shape, kind, folder)


def _scratch(shape: tuple[int, int], kind: np.dtype, folder: pathlib.Path) -> np.ndarray:
    """A mapped nameless file in `folder`, gone with the array. Its blocks are taken before it is mapped: where a page
    of a sparse file finds no block on a full disk the process dies by a signal."""
    needed = shape[0] * shape[1] * kind.itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, needed)
            return np.asarray(np.memmap(file, kind, "r+", shape=shape))
    except OSError as error:
        raise UserError(
            f"{folder} has no room for the {needed} bytes of features that select reads by clusters: {error.strerror}"
        ) from error
