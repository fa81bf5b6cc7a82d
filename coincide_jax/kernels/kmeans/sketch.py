"""A start for k-means from a few principal directions of the rows: early iterations at a fraction of the cost.

Lloyd runs on the rows' coordinates `[N, R]` in the R largest principal directions of a sample; its centroids, lifted
back to D dimensions, are first centroids of the exact algorithm, whose first pass finds the same partition and whose
update has the full means. What it saves depends on the spectrum, so the share of the squared lengths that the
directions hold is returned, and the caller goes on exactly until the objective in D dimensions says enough.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from coincide_jax.kernels import kmeans
from coincide_jax.kernels.kmeans import tiles
from coincide_jax.kernels.kmeans.exact import LARGEST, grid, unit

SAMPLE, LEAST = 4, 256  # rows a direction, and at least so many
ENOUGH = 0.5  # of the squared lengths; below it the directions say too little


def start(
    features,
    k: int,
    *,
    rank: int,
    seed: int,
    iterations: int,
    chunk: int,
    init="random",
    memory: int = 0,
    product: str = "auto",
    source: tiles.Tiles | None = None,
    on_iteration: Callable[[dict], None] | None = None,
):
    """First centroids for `kmeans.fit`.

    Args:
      features, k, seed, chunk, init, memory, product: as of `fit`. rank: directions R. iterations: at most so many.
      source: what `kmeans.lay_out` made of the features; given to `fit` as well, they are measured once.
      on_iteration: as of `fit`, for the iterations on the coordinates.

    Returns:
      f32[K, D] centroids, or None when the directions hold less than `ENOUGH`; {rank, energy, iterations, objective}.

    Raises:
      RowError: a row that is not finite or too large.
    """
    rows, width = features.shape
    rank = min(rank, width, rows)
    source = source or kmeans.lay_out(features, k, chunk, memory, product)
    source.measure()  # before a bad row gets into the basis, whence every row would look bad
    basis, energy = _basis(features, rank, seed)
    told = {"rank": rank, "energy": energy, "iterations": 0, "objective": None}
    if energy < ENOUGH:
        return None, told
    directions = tiles.put(np.ascontiguousarray(basis.T.astype(np.float32)), source.whole)
    project = jax.jit(
        lambda x, d: jax.lax.dot_general(x.astype(jnp.float32), d, (((1,), (1,)), ((), ())), precision="highest"),
        out_shardings=source.whole,
    )
    flat = np.empty((rows, rank), np.float32)
    for tile, x, _ in source.read(np.ones(source.count, bool), "tiles projected"):
        begin, end = source.span(tile)
        flat[begin:end] = np.asarray(project(x, directions))[: end - begin]
    scale = _scale(flat)
    flat *= scale
    if not isinstance(init, str):
        init = np.asarray(init, np.float32) @ basis.astype(np.float32)
    settings = {"seed": seed, "iterations": iterations, "chunk": chunk, "memory": memory, "tolerance": 1e-4}
    found = kmeans.fit(flat, k, **settings, init=init, on_iteration=on_iteration, on_tile=source.on_tile)
    lifted = found.centroids @ basis.T.astype(np.float32)
    told |= {"iterations": found.iterations, "objective": float(found.objective[-1]) / scale}
    return unit(lifted), told


def _basis(features, rank: int, seed: int) -> tuple[np.ndarray, float]:
    """The largest principal directions [D, R] of a sample, and the share of the squared lengths of another that they
    hold."""
    drawn, size = np.random.default_rng(seed).permutation(len(features)), max(SAMPLE * rank, LEAST)
    x = grid(features[np.sort(drawn[:size])]).astype(np.float32)
    values, vectors = np.linalg.eigh(x @ x.T)
    values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
    basis = (x.T @ vectors) / np.sqrt(np.maximum(values, 1e-12 * values[0] if values[0] > 0 else 1.0))
    x = grid(features[np.sort(drawn[-size:])]).astype(np.float32)  # other rows: of its own a basis holds too much
    return basis, float(np.sum((x @ basis) ** 2, dtype=np.float64) / max(np.sum(x * x, dtype=np.float64), 1e-30))


def _scale(flat: np.ndarray) -> float:
    """A power of two, at most 1, that brings coordinates within what `fit` takes: those of a row of small numbers may
    be as large as it is long. All rows by the same, so that their weights stay as they are."""
    largest = max(float(flat.max(initial=0)), -float(flat.min(initial=0)))
    return 2.0 ** -max(np.ceil(np.log2(max(largest, LARGEST) / LARGEST)), 0.0)
