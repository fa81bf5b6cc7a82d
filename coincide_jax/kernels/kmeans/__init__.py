"""Spherical k-means whose labels and centroids are bitwise the same on any number of devices, for tiles of any size,
with the rows kept on the devices or streamed through them.

Lloyd's algorithm on unit centroids (Dhillon & Modha 2001), as COINCIDE runs it with faiss (50 iterations, one start
from random rows). Three things make the result independent of how, where and how much work is done:

* Labels. `sweep` has the proof: products in half and single precision decide only what their rounding bounds allow, the
  rest is decided in float64; rows and centroids are left out only where the label provably stays.
* Sums. Features lie on the grid of multiples of 2^-24 (float16 does; others are rounded to it), so that cluster sums
  are sums of integers in two int32 limbs, exact in any order, and only rows that moved are taken out and put in.
* Centroids. Lengths of the sums in float64 in one order of summation, of exact products; divisions in float64; float32.

Memory: on the devices the features when they fit (f[N, D] as stored and once more in the fast type, where that is
another), else three tiles; `chunk · K` float32 scores, and about `80 · K · D` bytes on each device at most. Where that
is more than a quarter of a device's memory (`tiles.SPLIT`) the P devices of the mesh axis 'model' share the clusters:
`80 · K · D / P` bytes, and the rows lie P times as densely on fewer devices. On the host: three tiles, the centroids,
28 bytes a row and 4 more in a pass.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from coincide_jax.kernels.kmeans import seeding
from coincide_jax.kernels.kmeans.exact import LARGEST, cosines, members, unit
from coincide_jax.kernels.kmeans.seeding import NAMES as INITS
from coincide_jax.kernels.kmeans.sweep import Sweeper
from coincide_jax.kernels.kmeans.tiles import OnTile, RowError, Tiles, fast_dtype

__all__ = [
    "HISTORY", "INITS", "LARGEST", "KMeansResult", "RowError", "State", "assign", "cosines", "fit", "lay_out", "members"
]  # fmt: skip


class Iteration(NamedTuple):
    """What is kept of one iteration; `KMeansResult` says what each is."""

    objective: float
    updated: float
    imbalance: float
    empties: int
    moved: int
    work: float
    seconds: float


HISTORY = Iteration._fields


class KMeansResult(NamedTuple):
    """What `fit` returns; T is the number of iterations that ran."""

    centroids: np.ndarray  # f32[K, D], unit rows
    assignment: np.ndarray  # i32[N], to these centroids
    objective: np.ndarray  # f64[T], mean of x·c before each update
    updated: np.ndarray  # f64[T], the same after it, the labels as they were
    imbalance: np.ndarray  # f64[T], K Σ n_k² / N²: 1 is perfectly even
    empties: np.ndarray  # i32[T]
    moved: np.ndarray  # i32[T], rows that changed cluster
    work: np.ndarray  # f64[T], products made, as a share of N·K: depends on devices and tiles, unlike all above
    seconds: np.ndarray  # f64[T]
    iterations: int
    resident: bool  # whether the rows were kept on the devices


class State(NamedTuple):
    """Where a clustering stands after an iteration; given to `fit` as `resume` it goes on to the same result."""

    centroids: np.ndarray  # f32[K, D] of the next iteration
    assignment: np.ndarray  # i32[N] of the last one
    history: np.ndarray  # f64[T, 7], the columns of `HISTORY`

    @classmethod
    def of(cls, centroids, assignment: np.ndarray, history) -> "State":
        """A state with its own copy of the assignment: `fit` goes on to change the one it gave."""
        return cls(np.asarray(centroids, np.float32), np.array(assignment, np.int32), np.asarray(history, np.float64))


def lay_out(
    features,
    k: int,
    chunk: int,
    memory: int = 0,
    product: str = "auto",
    on_tile: OnTile | None = None,
    split: bool | None = None,
) -> Tiles:
    """The rows on the devices or on their way there, for several calls that would else read and measure them anew. The
    arguments are those of `fit`."""
    return Tiles(features, k, chunk, fast_dtype(product), memory, on_tile, split)


def fit(
    features,
    k: int,
    *,
    seed: int,
    iterations: int,
    chunk: int,
    init="random",
    memory: int = 0,
    product: str = "auto",
    tolerance: float | None = None,
    on_iteration: Callable[[dict], None] | None = None,
    on_state: Callable[[State], None] | None = None,
    state_every: int = 1,
    resume: State | None = None,
    on_tile: OnTile | None = None,
    split: bool | None = None,
    tiles: Tiles | None = None,
) -> KMeansResult:
    """Clusters the rows of `features` by direction.

    Runs on the ambient mesh (`jax.set_mesh`, axes 'data' and 'model'). Stops early when no row changes its cluster. An
    empty cluster restarts, in order of its index, at the row farthest from its centroid in the cluster that loses most,
    Σ(‖x‖ − x·c); that loss then counts half. Where no cluster has rows of different directions it stays empty. A zero
    row belongs to cluster 0.

    Args:
      features: f16|f32[N, D], finite, magnitudes ≤ 16; used as stored. A NumPy array or anything with `shape`, `dtype`,
        `len` and rows by slice or by an array of row numbers.
      k: number of clusters, at most N.
      seed: of the first centroids.
      iterations: at most so many updates.
      chunk: rows of a tile over all devices; smaller where memory wants it.
      init: 'random' (distinct rows), 'k-means++' ('k-means||' when streamed), 'k-means||', or f32[K, D].
      memory: bytes for features on all devices, above which they are streamed; 0 = what they have (4 GiB on CPUs).
      product: 'auto', 'float32', 'bfloat16' or 'float16': the type of the fast products. The result is the same.
      tolerance: stop when an iteration raises the objective by less than this share, or an update, of which no cluster
        came out empty, by less than half of it (which shows a pass earlier); None: when no row moves.
      on_iteration: called after each pass with {iteration, objective, …}, the names of `HISTORY`.
      on_state: called with the `State` after every `state_every` iterations.
      resume: where an earlier call with the same arguments stood.
      on_tile: called within every pass over the rows, with what is counted, how many are done and of how many.
      split: whether the devices of the mesh axis 'model' share the clusters; None: where each has too little memory for
        all of them. The result is the same.
      tiles: what `lay_out` made with the same arguments, `on_tile` and `split` being two.

    Raises:
      RowError: a row that is not finite or too large. ValueError: k outside 1..N, `init` of another shape or name.
    """
    rows = len(features)
    if not 1 <= k <= rows:
        raise ValueError(f"k = {k} clusters of {rows} rows; expected 1 to {rows}")
    if not isinstance(init, str) and np.shape(init) != (k, features.shape[1]):
        raise ValueError(f"init has shape {np.shape(init)}; expected {(k, features.shape[1])}")
    tiles = tiles or lay_out(features, k, chunk, memory, product, on_tile, split)
    sweeper = Sweeper(tiles, k, None if resume is None else resume.assignment.copy())
    if resume is not None:
        first = resume.centroids
    elif isinstance(init, str):
        first = seeding.first(tiles, sweeper.norms, k, seed, init)
    else:
        first = unit(init)
    centroids, previous = tiles.spread(first), None
    history = [] if resume is None else [Iteration(*line) for line in resume.history]
    while len(history) < iterations and not (history and _ended(history, tolerance)):
        begin = time.perf_counter()
        moved = sweeper.run(centroids, previous)
        sizes = np.bincount(sweeper.assignment, minlength=k)
        following, lengths, dots = sweeper.settle(centroids)
        objective, updated = float(np.sum(dots)) / rows, float(np.sum(lengths)) / rows
        imbalance = k * float(np.sum(sizes.astype(np.float64) ** 2)) / rows**2
        if moved:  # else these centroids are the means of this very assignment
            following = seeding.reseed(tiles, sweeper.norms, sweeper.assignment, sizes, lengths, following)
            centroids, previous = following, centroids
        seconds = time.perf_counter() - begin
        empties = int(np.sum(sizes == 0))
        history.append(Iteration(objective, updated, imbalance, empties, moved, sweeper.work, seconds))
        if on_iteration:
            on_iteration({"iteration": len(history), **history[-1]._asdict()})
        if on_state and len(history) % state_every == 0:
            on_state(State.of(tiles.gather(centroids), sweeper.assignment, history))
    if not history or history[-1].moved > 0:
        sweeper.run(centroids, previous, with_sums=False)
    columns = list(zip(*history, strict=True)) or [()] * len(HISTORY)
    kinds = (np.float64, np.float64, np.float64, np.int32, np.int32, np.float64, np.float64)
    arrays = [np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    found = np.require(tiles.gather(centroids), requirements="W")
    return KMeansResult(found, sweeper.assignment, *arrays, len(history), tiles.resident)


def _ended(history: list[Iteration], tolerance: float | None) -> bool:
    """Whether no row moved, or the objective hardly did."""
    last = history[-1]
    if last.moved == 0:
        return True
    if tolerance is None:
        return False
    if len(history) > 1 and last.objective < history[-2].objective * (1 + tolerance):
        return True
    # a cluster that has just restarted will win what `updated` does not know of
    return last.empties == 0 and last.updated < last.objective * (1 + tolerance / 2)


def assign(
    features,
    centroids,
    chunk: int,
    memory: int = 0,
    product: str = "auto",
    on_tile: OnTile | None = None,
    split: bool | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest centroid of each row and the cosine to it: `(i32[N], f32[N])`. Ties to the smallest index.
    The other arguments are those of `fit`."""
    centroids = np.asarray(centroids, np.float32)
    tiles = lay_out(features, len(centroids), chunk, memory, product, on_tile, split)
    sweeper = Sweeper(tiles, len(centroids))
    sweeper.run(tiles.spread(centroids), None, with_sums=False)
    return sweeper.assignment, cosines(features, centroids, sweeper.assignment, on_tile)
