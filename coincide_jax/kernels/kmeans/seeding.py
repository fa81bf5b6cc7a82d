"""First centroids, and where empty clusters restart.

`k-means++` (Arthur & Vassilvitskii 2007) and `k-means||` (Bahmani et al. 2012) draw rows in proportion to 1 − cos to
the nearest row drawn so far. They work on int8 copies of the rows: products of those are exact integers in any order,
and all that follows is one rounding an operation, so that the draws are the same on any device and for any tile size.
"""

import jax
import jax.numpy as jnp
import numpy as np

from coincide_jax.kernels.kmeans import exact, products
from coincide_jax.kernels.kmeans.tiles import Tiles, put

PARALLEL = 1e-6  # a cluster whose rows lose less than this share of their length to the mean is not split
ROUNDS = 5  # of k-means||, each drawing about 2 k rows
BATCH = 256  # drawn rows that one pass compares with
NAMES = ("random", "k-means++", "k-means||")


def first(tiles: Tiles, norms: np.ndarray, k: int, seed: int, name: str) -> np.ndarray:
    """`k` first centroids f32[K, D], unit rows of distinct rows; zero rows only when there are too few others.

    `k-means++` makes K passes over rows that lie on the devices; `k-means||` draws about 2 k rows in each of `ROUNDS`,
    and holds as many as it has drawn.

    Raises:
      ValueError: another name; k-means++ of rows that are streamed.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(tiles.rows)
    order = order[np.argsort(norms[order] == 0, kind="stable")]
    if name == "random":
        chosen = order[:k]
    elif name == "k-means++" and not tiles.resident:
        raise ValueError(
            "cluster.init=k-means++ reads the rows once for each cluster, and here they are streamed; "
            "take k-means||, or a larger cluster.memory_mib"
        )
    elif name == "k-means++":
        chosen = _plus_plus(tiles, norms, k, rng, order)
    elif name in NAMES:
        chosen = _parallel(tiles, norms, k, rng, order)
    else:
        raise ValueError(f"init is {name!r}; expected one of {', '.join(NAMES)} or an array")
    return exact.unit(exact.grid(tiles.features[np.sort(chosen)]))


def _plus_plus(tiles: Tiles, norms: np.ndarray, k: int, rng, order: np.ndarray) -> np.ndarray:
    """Numbers of k rows, one drawn after the other."""
    chosen = [int(order[0])]
    far = _distances(tiles, norms, np.array(chosen), np.full(tiles.rows, 2.0, np.float32))
    while len(chosen) < k:
        row = _draw(far, rng)
        if row < 0:  # all other rows have the direction of a drawn one
            break
        chosen.append(row)
        far = _distances(tiles, norms, np.array([row]), far)
    return _filled(np.array(chosen), order, k)


def _parallel(tiles: Tiles, norms: np.ndarray, k: int, rng, order: np.ndarray) -> np.ndarray:
    """Numbers of k rows: several rounds of many rows at once, then k of those by their weight."""
    drawn = np.array([order[0]])
    far = _distances(tiles, norms, drawn, np.full(tiles.rows, 2.0, np.float32))
    for _ in range(ROUNDS):
        share = far.astype(np.float64) * (2 * k / max(np.sum(far, dtype=np.float64), 1e-30))
        new = np.setdiff1d(np.flatnonzero(rng.random(tiles.rows) < share), drawn)
        if len(new):
            far = _distances(tiles, norms, new, far)
            drawn = np.append(drawn, new)
    if len(drawn) <= k:
        return _filled(drawn, order, k)
    some = exact.unit(exact.grid(tiles.features[np.sort(drawn)]))
    drawn = np.sort(drawn)
    scores = np.rint(some * 127.0 / np.abs(some).max(axis=1, keepdims=True)).astype(np.float32)
    scores /= np.sqrt(np.sum(scores.astype(np.float64) ** 2, axis=1, keepdims=True)).astype(np.float32)
    near, chosen = np.full(len(drawn), 2.0), []
    weight = np.full(len(drawn), 1.0)
    for _ in range(k):
        row = _draw(weight * near, rng) if chosen else 0
        if row < 0:
            break
        chosen.append(row)
        dots = np.sum(scores * scores[row], axis=1, dtype=np.float64)
        near = np.minimum(near, np.maximum(1.0 - dots, 0.0))
        near[row] = 0.0
    return _filled(drawn[chosen], order, k)


def _draw(weights: np.ndarray, rng) -> int:
    """A number in proportion to the weights; -1 if all are zero."""
    running = np.cumsum(weights, dtype=np.float64)
    if running[-1] <= 0:
        return -1
    return int(np.searchsorted(running, rng.random() * running[-1], side="right"))


def _filled(chosen: np.ndarray, order: np.ndarray, k: int) -> np.ndarray:
    """`chosen`, and random others up to k."""
    others = order[~np.isin(order, chosen)]
    return np.append(chosen, others[: k - len(chosen)])


def _distances(tiles: Tiles, norms: np.ndarray, rows: np.ndarray, far: np.ndarray) -> np.ndarray:
    """min(far, 1 − cos to the nearest of `rows`) f32[N]; 0 for these rows and for rows of length zero."""
    for begin in range(0, len(rows), BATCH):
        part = rows[begin : begin + BATCH]
        size = 1 if len(rows) == 1 else BATCH
        held = put(exact.grid(tiles.features[np.pad(np.sort(part), (0, size - len(part)), mode="edge")]), tiles.whole)
        for tile, x, _ in tiles.read(np.ones(tiles.count, bool)):
            start, stop = tiles.span(tile)
            found = np.asarray(_nearest_int8(x, held))[: stop - start]
            far[start:stop] = np.minimum(far[start:stop], np.maximum(np.float32(1) - found, 0))
    far[rows] = 0
    far[norms == 0] = 0
    return far


@jax.jit
def _nearest_int8(x, held):
    """Largest cosine of int8 copies f32[C] of rows f[C, D] and `held` f[n, D]."""

    def small(x):
        x = x.astype(jnp.float32)
        largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
        return jnp.round(x * (127.0 / jnp.where(largest > 0, largest, 1.0))).astype(jnp.int8)

    def local(x, held):
        x, held = small(x), small(held)
        dots = jax.lax.dot_general(x, held, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        lengths = [
            jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(rows.astype(jnp.int32)), axis=1), 1).astype(jnp.float32))
            for rows in (x, held)
        ]
        cosines = dots.astype(jnp.float32) / lengths[1][None, :] / lengths[0][:, None]
        return products.everywhere(jnp.max(cosines, axis=1))[0]

    return products.over_rows(local, "r.")(x, held)


def reseed(features, norms, assignment, sizes, lengths, centroids: jax.Array) -> jax.Array:
    """Restarts empty clusters; see `fit` for the rule. `lengths` f64[K] are those of the cluster sums."""
    empty = np.flatnonzero(sizes == 0)
    if len(empty) == 0:
        return centroids
    length = np.bincount(assignment, weights=norms, minlength=len(sizes))
    loss = length - lengths
    loss[loss <= PARALLEL * length] = 0.0
    farthest, restarted = {}, {}
    for cluster in empty:
        largest = int(np.argmax(loss))
        if loss[largest] <= 0:
            break
        if largest not in farthest:
            members = np.flatnonzero((assignment == largest) & (norms > 0))
            own = np.asarray(centroids[largest : largest + 1])
            near = np.zeros(len(members), np.float32)
            for part in exact.blocks(len(members), features.shape[1]):  # a cluster may hold most of the rows
                x = features[members[part]]
                near[part] = exact.cosines(x, own, np.zeros(len(x), np.int32))
            farthest[largest] = list(members[np.argsort(near, kind="stable")][: len(empty)])
        restarted[int(cluster)] = farthest[largest].pop(0)
        loss[largest] = loss[largest] / 2 if farthest[largest] else 0.0
    if not restarted:
        return centroids
    rows = np.array(list(restarted.values()))
    order = np.argsort(rows, kind="stable")
    new = np.empty((len(rows), features.shape[1]), np.float32)
    new[order] = exact.unit(exact.grid(features[rows[order]]))
    held = np.array(centroids)
    held[list(restarted)] = new
    return put(held, centroids.sharding)
