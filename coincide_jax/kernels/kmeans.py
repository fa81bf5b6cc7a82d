"""Spherical k-means whose labels and centroids are bitwise the same on any number of devices and for any chunk size.

Lloyd's algorithm on unit centroids (Dhillon & Modha 2001), as COINCIDE runs it with faiss (50 iterations, one start
from random rows). Three things make the result independent of how the work is cut:

* Scores. A float32 matrix product on the device gives the two best clusters of a row. It is taken against the centroids
  minus their mean, which moves all scores of a row alike, and its contraction is cut into blocks of `BLOCK`, so that
  the rounding error of a score is at most `(BLOCK + D/BLOCK + 2) u ‖x‖ max‖c − mean‖`, u = 2^-24, in any order of
  summation (Higham 2002, §3.1; doubled for devices that build float32 products from bfloat16 parts). A row whose two
  best lie within twice that bound is decided on the host in float64; what is still closer than float64 products can
  tell is summed in one fixed order, and equal sums go to the smallest index.
* Sums. Features lie on the grid of multiples of 2^-24 (float16 does; others are rounded to it), so that cluster sums
  are sums of integers: int32 limbs of 14 bits on the device, int64 on the host, exact in any order.
* Centroids. Norms and divisions in float64 NumPy, one row after the other, then float32.

Memory on the devices: `chunk · K` float32 scores and `chunk · D` features, both spread over the mesh axis 'data', and
`3 · K · D` words of 4 bytes on each device. On the host: the features, and `K · D` numbers of 8 bytes a few times.
"""

import collections
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 256  # contraction length of one matrix product
GRID = 2.0**24  # features are integers over this
LIMB = 14  # bits of the low limb
LARGEST = 16.0  # of a feature's magnitude
MAX_CHUNK = 1 << 16  # rows; LARGEST * MAX_CHUNK * GRID >> LIMB stays below 2^31
ROUNDING = 2.0**-24
PARALLEL = 1e-6  # a cluster whose rows lose less than this share of their length to the mean is not split


class KMeansResult(NamedTuple):
    """What `fit` returns; T is the number of iterations that ran."""

    centroids: np.ndarray  # f32[K, D], unit rows
    assignment: np.ndarray  # i32[N], to these centroids
    objective: np.ndarray  # f64[T], mean of x·c before each update
    imbalance: np.ndarray  # f64[T], K Σ n_k² / N²: 1 is perfectly even
    empties: np.ndarray  # i32[T]
    moved: np.ndarray  # i32[T], rows that changed cluster
    iterations: int


def fit(
    features,
    k: int,
    *,
    seed: int,
    iterations: int,
    chunk: int,
    init=None,
    on_iteration: Callable[[int, float, int], None] | None = None,
) -> KMeansResult:
    """Clusters the rows of `features` by direction.

    Runs on the ambient mesh (`jax.set_mesh`). Starts from `k` distinct random rows that are not zero (or from `init`),
    and stops early when no row changes its cluster. An empty cluster restarts, in order of its index, at the row
    farthest from its centroid in the cluster that loses most, Σ(‖x‖ − x·c); that loss then counts half. Where no
    cluster has rows of different directions it stays empty. A zero row belongs to cluster 0.

    Args:
      features: f16|f32[N, D], finite, magnitudes ≤ 16; used as stored.
      k: number of clusters, at most N.
      seed: of the first centroids.
      iterations: at most so many updates.
      chunk: rows of one matrix product over all devices.
      init: f32[K, D] first centroids instead of random rows.
      on_iteration: called with (iteration, objective, moved) after each pass over the rows.

    Raises:
      ValueError: k outside 1..N, features not finite or too large, `init` of another shape.
    """
    rows = len(features)
    if not 1 <= k <= rows:
        raise ValueError(f"k = {k} clusters of {rows} rows; expected 1 to {rows}")
    norms, largest = _norms(features, chunk)
    centroids = (
        _first_centroids(features, norms, k, seed) if init is None else _unit(np.asarray(init, np.float64), None)
    )
    if centroids.shape != (k, features.shape[1]):
        raise ValueError(f"init has shape {centroids.shape}; expected {(k, features.shape[1])}")
    assignment = np.full(rows, -1, np.int32)
    history = []
    for iteration in range(iterations):
        previous, (assignment, sums) = assignment, _pass(features, norms, largest, centroids, chunk, with_sums=True)
        sizes = np.bincount(assignment, minlength=k)
        moved = int(np.sum(assignment != previous))
        objective = float(np.sum(np.sum(sums * centroids.astype(np.float64), axis=1))) / rows
        imbalance = k * float(np.sum(sizes.astype(np.float64) ** 2)) / rows**2
        history.append((objective, imbalance, int(np.sum(sizes == 0)), moved))
        if on_iteration:
            on_iteration(iteration, objective, moved)
        if moved == 0:
            break  # these centroids are the means of this very assignment
        centroids = _reseed(features, norms, assignment, sizes, sums, _unit(sums, centroids))
    else:
        assignment, _ = _pass(features, norms, largest, centroids, chunk, with_sums=False)
    columns = list(zip(*history, strict=True)) or [(), (), (), ()]
    kinds = (np.float64, np.float64, np.int32, np.int32)
    arrays = [np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    return KMeansResult(centroids, assignment, *arrays, iterations=len(history))


def assign(features, centroids, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest centroid of each row and the cosine to it: `(i32[N], f32[N])`. Ties to the smallest index."""
    norms, largest = _norms(features, chunk)
    centroids = np.asarray(centroids, np.float32)
    assignment, _ = _pass(features, norms, largest, centroids, chunk, with_sums=False)
    return assignment, cosines(features, centroids, assignment)


def cosines(features, centroids, assignment, block: int = 1024) -> np.ndarray:
    """Returns the cosine f32[N] of each row to the unit centroid of its cluster; 0 for zero rows."""
    out = np.zeros(len(features), np.float32)
    for start in range(0, len(features), block):
        x = _grid(features[start : start + block]).astype(np.float64)
        length = np.sqrt(np.sum(x * x, axis=1))
        dots = np.sum(x * centroids[assignment[start : start + block]].astype(np.float64), axis=1)
        out[start : start + block] = dots / np.where(length > 0, length, 1.0)
    return out


def members(assignment: np.ndarray, k: int) -> list[np.ndarray]:
    """Rows of each of k clusters, ascending, from the clusters i[N] of all rows (-1 = none)."""
    order = np.argsort(assignment, kind="stable")
    bounds = np.searchsorted(assignment[order], np.arange(k + 1))
    return [order[begin:end] for begin, end in itertools.pairwise(bounds)]


def _grid(x) -> np.ndarray:
    """Rows as float16 or float32 multiples of 2^-24."""
    x = np.asarray(x)
    return x if x.dtype == np.float16 else np.rint(x.astype(np.float32) * np.float32(GRID)) / np.float32(GRID)


def _norms(features, chunk: int) -> tuple[np.ndarray, float]:
    """Lengths f64[N] of the rows, and the largest magnitude of a feature."""
    norms, largest, block = np.zeros(len(features)), 0.0, min(chunk, 1024)
    for start in range(0, len(features), block):
        x = _grid(features[start : start + block]).astype(np.float64)
        norms[start : start + block] = np.sqrt(np.sum(x * x, axis=1))
        largest = max(largest, float(np.max(np.abs(x), initial=0.0)))
    if not np.all(np.isfinite(norms)) or largest > LARGEST:
        raise ValueError(f"features must be finite and at most {LARGEST} in magnitude")
    return norms, largest


def _unit(sums: np.ndarray, otherwise: np.ndarray | None) -> np.ndarray:
    """Unit rows f32[K, D] of f64[K, D]; a row without direction is taken from `otherwise` (or is the first axis)."""
    length = np.sqrt(np.sum(sums * sums, axis=1, keepdims=True))
    if otherwise is None:
        otherwise = np.eye(1, sums.shape[1])
    return np.where(length > 0, sums / np.where(length > 0, length, 1.0), otherwise).astype(np.float32)


def _first_centroids(features, norms: np.ndarray, k: int, seed: int) -> np.ndarray:
    """`k` distinct random rows as unit vectors; zero rows only when there are too few others."""
    order = np.random.default_rng(seed).permutation(len(features))
    order = order[np.argsort(norms[order] == 0, kind="stable")]
    return _unit(_grid(features[np.sort(order[:k])]).astype(np.float64), None)


def _reseed(features, norms, assignment, sizes, sums, centroids) -> np.ndarray:
    """Restarts empty clusters; see `fit` for the rule."""
    empty = np.flatnonzero(sizes == 0)
    if len(empty) == 0:
        return centroids
    length = np.bincount(assignment, weights=norms, minlength=len(sizes))
    loss = length - np.sqrt(np.sum(sums * sums, axis=1))
    loss[loss <= PARALLEL * length] = 0.0
    farthest = {}
    for cluster in empty:
        largest = int(np.argmax(loss))
        if loss[largest] <= 0:
            break
        if largest not in farthest:
            members = np.flatnonzero((assignment == largest) & (norms > 0))
            near = cosines(features[members], centroids, assignment[members])
            farthest[largest] = list(members[np.argsort(near, kind="stable")][: len(empty)])
        row = farthest[largest].pop(0)
        centroids[cluster] = _unit(_grid(features[row : row + 1]).astype(np.float64), None)[0]
        loss[largest] = loss[largest] / 2 if farthest[largest] else 0.0
    return centroids


def _pass(features, norms, largest, centroids, chunk, with_sums) -> tuple[np.ndarray, np.ndarray | None]:
    """Assigns every row; returns i32[N] and, if asked, the cluster sums f64[K, D]."""
    (rows, width), k = features.shape, len(centroids)
    mesh = jax.sharding.get_mesh()
    shards = mesh.shape["data"]
    chunk = -(-min(chunk, rows, MAX_CHUNK) // shards) * shards
    exact = centroids.astype(np.float64)
    offset = exact - np.mean(exact, axis=0)
    radius = np.sqrt(np.max(np.sum(offset * offset, axis=1)))
    blocks = -(-width // BLOCK)
    bound = 2.0 * (BLOCK + blocks + 2) * ROUNDING * 1.01 * radius * norms + 1e-14 * width * norms
    by_rows = jax.NamedSharding(mesh, jax.P("data"))
    directions = jax.device_put(offset.astype(np.float32), jax.NamedSharding(mesh, jax.P()))
    assignment = np.zeros(rows, np.int32)
    sums, limbs, added = np.zeros((k, width), np.int64) if with_sums else None, None, 0
    for start, x, found in _ahead(features, directions, chunk, by_rows):
        stop = min(start + chunk, rows)
        best, top, second = (np.array(value)[: stop - start] for value in jax.device_get(found))
        unsure = np.flatnonzero((top - second <= 2 * bound[start:stop]) & (norms[start:stop] > 0))
        best[norms[start:stop] == 0] = 0
        best[unsure] = _decide(features[start + unsure], norms[start + unsure], exact)
        assignment[start:stop] = best
        if with_sums:
            if limbs is None:
                limbs, added = _zero_limbs(shards, k, width, by_rows), 0
            labels = np.pad(best, (0, chunk - len(best)), constant_values=k)  # index k is dropped
            limbs = _add_rows(*limbs, x, jax.device_put(labels, by_rows))
            added += chunk
            if (added + chunk) * max(largest, 1.0) > LARGEST * MAX_CHUNK or stop == rows:
                low, high = (np.asarray(limb, np.int64) for limb in jax.device_get(_total(*limbs)))
                sums, limbs = sums + low + (high << LIMB), None
    return assignment, None if sums is None else sums / GRID


def _ahead(features, directions, chunk: int, sharding) -> Iterator[tuple]:
    """Yields (first row, rows on the devices, their nearest clusters); one chunk is dispatched ahead of the host."""
    waiting = collections.deque()
    for start in range(0, len(features), chunk):
        x = _grid(features[start : start + chunk])
        x = jax.device_put(np.pad(x, ((0, chunk - len(x)), (0, 0))), sharding)
        waiting.append((start, x, _nearest(x, directions)))
        if len(waiting) == 2:
            yield waiting.popleft()
    yield from waiting


def _decide(x, norms: np.ndarray, centroids: np.ndarray, block: int = 512) -> np.ndarray:
    """Nearest centroid i32[n] of rows f[n, D] in float64; a function of row and centroids alone."""
    out = np.zeros(len(x), np.int32)
    for start in range(0, len(x), block):
        rows = _grid(x[start : start + block]).astype(np.float64)
        scores = rows @ centroids.T
        near = scores >= scores.max(1, keepdims=True) - 1e-14 * x.shape[1] * norms[start : start + block, None]
        out[start : start + block] = np.argmax(near, axis=1)
        for row in np.flatnonzero(np.sum(near, axis=1) > 1):
            candidates = np.flatnonzero(near[row])
            out[start + row] = candidates[np.argmax(np.sum(rows[row] * centroids[candidates], axis=1))]
    return out


@jax.jit
def _nearest(x, directions):
    """Index, best and second best score of each row: f[C, D], f32[K, D] → i32[C], f32[C], f32[C]."""

    @functools.partial(jax.shard_map, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data"))
    def local(x, directions):
        x = x.astype(jnp.float32)
        scores = sum(
            jax.lax.dot_general(
                x[:, begin : begin + BLOCK],
                directions[:, begin : begin + BLOCK],
                (((1,), (1,)), ((), ())),
                precision=jax.lax.Precision.HIGHEST,
            )
            for begin in range(0, x.shape[1], BLOCK)
        )
        index = jnp.arange(scores.shape[1], dtype=jnp.int32)[None, :]
        top = jnp.max(scores, axis=1, keepdims=True)
        # several times faster on CPUs than argmax, and the smallest index as well
        best = jnp.min(jnp.where(scores == top, index, scores.shape[1]), axis=1, keepdims=True)
        second = jnp.max(jnp.where(index == best, -jnp.inf, scores), axis=1)
        return best[:, 0], top[:, 0], second

    return local(x, directions)


def _zero_limbs(shards: int, k: int, width: int, sharding):
    """Low and high limbs of the cluster sums on each device: two i32[shards, K, D]."""
    zeros = jax.jit(lambda: jnp.zeros((shards, k, width), jnp.int32), out_shardings=sharding)
    return zeros(), zeros()


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _add_rows(low, high, x, labels):
    """Adds rows f[C, D] to the sums of their clusters i32[C]."""

    @functools.partial(jax.shard_map, in_specs=jax.P("data"), out_specs=jax.P("data"))
    def local(low, high, x, labels):
        whole = jnp.round(x.astype(jnp.float32) * GRID).astype(jnp.int32)
        low = low[0].at[labels].add(whole & ((1 << LIMB) - 1), mode="drop")
        high = high[0].at[labels].add(whole >> LIMB, mode="drop")
        return (low & ((1 << LIMB) - 1))[None], (high + (low >> LIMB))[None]

    return local(low, high, x, labels)


@jax.jit
def _total(low, high):
    """Sums of the limbs over the devices: two i32[K, D]."""

    @functools.partial(jax.shard_map, in_specs=jax.P("data"), out_specs=jax.P())
    def local(low, high):
        return jax.lax.psum(low[0], "data"), jax.lax.psum(high[0], "data")

    return local(low, high)
