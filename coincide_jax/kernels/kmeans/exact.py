"""The float64 side of k-means, on the host: what decides where half and single precision cannot.

A label is defined here: the smallest index among the largest of `Σ_d x_d c_d`, summed in float64 in NumPy's fixed order
along one row. It depends on the row and the centroids alone.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

GRID = 2.0**24  # features are integers over this
LARGEST = 16.0  # of a feature's magnitude
BLOCK = 1 << 18  # float64 numbers of an array in work: 2 MiB
READ = 8 << 20  # bytes of rows read at once, in multiples of `HEIGHT` rows
HEIGHT = 256  # rows of which a store decodes all when it is asked for one
SLACK = 1e-14  # float64 products of rows of length 1 differ by less than this times their width


def grid(x) -> np.ndarray:
    """Rows as float16, or as float32 multiples of 2^-24."""
    x = np.asarray(x)
    return x if x.dtype == np.float16 else np.rint(x.astype(np.float32) * np.float32(GRID)) / np.float32(GRID)


def unit(rows: np.ndarray) -> np.ndarray:
    """Unit rows f32[n, D] of f[n, D]; a row without direction becomes the first axis."""
    rows = np.asarray(rows)
    out, axis = np.empty(rows.shape, np.float32), np.eye(1, rows.shape[1])
    for part in blocks(len(rows), rows.shape[1]):
        wide = rows[part].astype(np.float64)
        length = np.sqrt(np.sum(wide * wide, axis=1, keepdims=True))
        out[part] = np.where(length > 0, wide / np.where(length > 0, length, 1.0), axis)
    return out


def decide(x: np.ndarray, norms: np.ndarray, centroids: np.ndarray, block: int = 512) -> np.ndarray:
    """Labels i32[n] of rows f[n, D] of lengths f64[n] by their definition; centroids f32[K, D]."""
    out = np.zeros(len(x), np.int32)
    if len(x) == 0:
        return out
    wide = centroids.astype(np.float64)
    for start in range(0, len(x), block):
        rows = grid(x[start : start + block]).astype(np.float64)
        scores = rows @ wide.T
        near = scores >= scores.max(1, keepdims=True) - SLACK * x.shape[1] * norms[start : start + block, None]
        out[start : start + block] = np.argmax(near, axis=1)
        for row in np.flatnonzero(np.sum(near, axis=1) > 1):
            candidates = np.flatnonzero(near[row])
            out[start + row] = candidates[np.argmax(np.sum(rows[row] * wide[candidates], axis=1))]
    return out


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Cuts rows of so many float64 numbers for work on the host, where several arrays of a block are held at once."""
    size = max(BLOCK // max(width, 1), 1)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def reads(rows: int, features) -> Iterator[slice]:
    """Cuts so many rows of features for reading: about `READ` bytes, that few of a store's chunks are decoded twice."""
    height = HEIGHT * features.shape[1] * np.dtype(features.dtype).itemsize
    size = HEIGHT * max(READ // max(height, 1), 1)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def cosines(features, centroids, assignment, on_tile: Callable[[str, int, int], None] | None = None) -> np.ndarray:
    """The cosine f32[N] of each row to the unit centroid of its cluster; 0 for zero rows. `on_tile`: of `fit`."""
    out = np.zeros(len(features), np.float32)
    for read in reads(len(features), features):
        if on_tile:
            on_tile("rows met with their centroid", read.start, len(out))
        held, labels, found = features[read], assignment[read], out[read]
        for part in blocks(*held.shape):
            x = grid(held[part]).astype(np.float64)
            length = np.sqrt(np.sum(x * x, axis=1))
            dots = np.sum(x * centroids[labels[part]].astype(np.float64), axis=1)
            found[part] = dots / np.where(length > 0, length, 1.0)
    if on_tile and len(out):
        on_tile("rows met with their centroid", len(out), len(out))
    return out


def members(assignment: np.ndarray, k: int) -> list[np.ndarray]:
    """Rows of each of k clusters, ascending, from the clusters i[N] of all rows (-1 = none)."""
    order = np.argsort(assignment, kind="stable")
    bounds = np.searchsorted(assignment[order], np.arange(k + 1))
    return [order[begin:end] for begin, end in itertools.pairwise(bounds)]
