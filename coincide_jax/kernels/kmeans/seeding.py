"""First centroids, and where empty clusters restart.

`k-means++` (Arthur & Vassilvitskii 2007) and `k-means||` (Bahmani et al. 2012) draw rows in proportion to 1 − cos to
the nearest row drawn so far. They work on int8 copies of the rows: products of those are exact integers in any order,
and all that follows is one rounding an operation, so that the draws are the same on any device and for any tile size.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from coincide_jax.kernels.kmeans import exact, products
from coincide_jax.kernels.kmeans.tiles import Tiles, put

PARALLEL = 1e-6  # a cluster whose rows lose less than this share of their length to the mean is not split
ROUNDS = 5  # of k-means||, each drawing about 2 k rows
BATCH = 256  # drawn rows that one pass compares with
RESTARTED = 256  # clusters that are put in their new places at a time
NAMES = ("random", "k-means++", "k-means||")


def first(tiles: Tiles, norms: np.ndarray, k: int, seed: int, name: str) -> np.ndarray:
    """`k` first centroids f32[K, D], unit rows of distinct rows; zero rows only when there are too few others.

    `k-means++` makes K passes over rows that lie on the devices; `k-means||` draws about 2 k rows in each of `ROUNDS`,
    a pass for every `BATCH` of them, and k of those in little more than a pass for every `BATCH`.

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
        far = _distances(tiles, norms, np.array([row]), far, at=(len(chosen) - 1, k))
    return _filled(np.array(chosen), order, k)


def _parallel(tiles: Tiles, norms: np.ndarray, k: int, rng, order: np.ndarray) -> np.ndarray:
    """Numbers of k rows: several rounds of many rows at once, then k of those by how many rows each is nearest to."""
    drawn, owner = np.array([order[0]]), np.zeros(tiles.rows, np.int64)
    far = _distances(tiles, norms, drawn, np.full(tiles.rows, 2.0, np.float32), owner)
    for _ in range(ROUNDS):
        share = far.astype(np.float64) * (2 * k / max(np.sum(far, dtype=np.float64), 1e-30))
        new = np.setdiff1d(np.flatnonzero(rng.random(tiles.rows) < share), drawn)
        if len(new):
            far = _distances(tiles, norms, new, far, owner)
            drawn = np.append(drawn, new)
    if len(drawn) <= k:
        return _filled(drawn, order, k)
    weight = np.bincount(owner[norms > 0], minlength=tiles.rows).astype(np.float64)
    return _filled(_weighted(tiles, norms, weight, k, rng), order, k)


def _weighted(tiles: Tiles, norms: np.ndarray, weight: np.ndarray, k: int, rng) -> np.ndarray:
    """k-means++ among rows of weights f64[N]: numbers of at most k rows, one drawn after the other.

    A pass over the rows for each would be K passes. Instead `BATCH` rows at a time are drawn by the distances of the
    last pass, and each is taken with the probability now over then, which leaves every draw what it would have been
    (rejection: the distances only fall). A drawn row's distance now needs the products of the batch alone.
    """
    chosen, far = np.zeros(0, np.int64), np.full(tiles.rows, 2.0, np.float32)
    while len(chosen) < k:
        running = np.cumsum(weight * far)
        if running[-1] <= 0:  # all others have the direction of a drawn one
            break
        tries = np.searchsorted(running, rng.random(BATCH) * running[-1], side="right")
        rows, place = np.unique(tries, return_inverse=True)
        away = _apart(exact.grid(tiles.features[rows]))
        now, taken = far[rows].astype(np.float64), []
        for one, luck in zip(place, rng.random(BATCH), strict=True):
            if luck * far[rows[one]] < now[one] and len(chosen) + len(taken) < k:
                taken.append(rows[one])
                now = np.minimum(now, away[one])
        far = _distances(tiles, norms, np.array(taken), far, at=(len(chosen), k))
        chosen = np.append(chosen, taken)
    return chosen


def _apart(rows: np.ndarray) -> np.ndarray:
    """1 − cos between int8 copies of rows f[n, D]: f64[n, n], of exact products; 0 of a row to itself."""
    x = rows.astype(np.float32)
    largest = np.max(np.abs(x), axis=1, keepdims=True)
    x = np.rint(x * (np.float32(127.0) / np.where(largest > 0, largest, np.float32(1)))).astype(np.float64)
    dots = x @ x.T
    length = np.sqrt(np.maximum(np.diag(dots), 1.0))
    out = np.maximum(1.0 - dots / length[:, None] / length[None, :], 0.0)
    np.fill_diagonal(out, 0.0)
    return out


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


def _distances(tiles: Tiles, norms, rows: np.ndarray, far: np.ndarray, owner=None, at=(0, 0)) -> np.ndarray:
    """min(far, 1 − cos to the nearest of `rows`) f32[N]; 0 for these rows and for rows of length zero. `owner` i64[N]
    is told the number of that row where it is nearer than all before. `at`: this is one of so many turns, which are
    told of; (0, 0) = of as many as there are batches."""
    for turn, begin in enumerate(range(0, len(rows), BATCH)):
        turn, turns = at if at[1] else (turn, -(-len(rows) // BATCH))
        part = np.sort(rows[begin : begin + BATCH])
        size = 1 if len(rows) == 1 else BATCH
        size = -(-size // tiles.parts) * tiles.parts
        part = np.pad(part, (0, size - len(part)), mode="edge")
        held = put(exact.grid(tiles.features[part]), tiles.by_clusters)
        for tile, x, _ in tiles.read(np.ones(tiles.count, bool), "tiles met with drawn rows", turn, turns):
            start, stop = tiles.span(tile)
            found, which = (np.asarray(value)[: stop - start] for value in _nearest_int8(x, held, tiles.split))
            away = np.maximum(np.float32(1) - found, 0)
            if owner is not None:
                nearer = np.flatnonzero(away < far[start:stop])
                owner[start + nearer] = part[which[nearer]]
            far[start:stop] = np.minimum(far[start:stop], away)
    far[rows] = 0
    far[norms == 0] = 0
    if owner is not None:
        owner[rows] = rows
    return far


@functools.partial(jax.jit, static_argnames="split")
def _nearest_int8(x, held, split: int):
    """Largest cosine of int8 copies f32[C] of rows f[C, D] and `held` f[n, D], and the first that has it i32[C]. `held`
    is shared as clusters are."""

    def small(x):
        x = x.astype(jnp.float32)
        largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
        return jnp.round(x * (127.0 / jnp.where(largest > 0, largest, 1.0))).astype(jnp.int8)

    def local(x, held):
        count, here = len(x), products.names(len(held), split)
        # of single rows XLA makes other operations: two divisions by their lengths become one by the product
        x, held = (small(jnp.concatenate([rows, rows]) if len(rows) == 1 else rows) for rows in (x, held))
        dots = jax.lax.dot_general(x, held, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        lengths = [
            jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(rows.astype(jnp.int32)), axis=1), 1).astype(jnp.float32))
            for rows in (x, held)
        ]
        # the barrier has them made once, so that the largest is among what it is compared with
        cosines = jax.lax.optimization_barrier(dots.astype(jnp.float32) / lengths[1][None, :] / lengths[0][:, None])
        cosines = cosines[:count]
        top = jnp.max(cosines, axis=1)
        index = jnp.arange(cosines.shape[1], dtype=jnp.int32)[None, :]
        which = jnp.min(jnp.where(cosines == top[:, None], index, cosines.shape[1] - 1), axis=1)
        if split:
            which, top = products.best_of_all(here.at[which].get(mode="clip"), top)
        return products.everywhere(top, which, split=split)

    return products.over_rows(local, "rk", split=split)(x, held)


def reseed(tiles: Tiles, norms, assignment, sizes, lengths, centroids: jax.Array) -> jax.Array:
    """Restarts empty clusters; see `fit` for the rule. `lengths` f64[K] are those of the cluster sums."""
    features, empty = tiles.features, np.flatnonzero(sizes == 0)
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
            own = tiles.gather(centroids, np.array([largest]))
            near = np.zeros(len(members), np.float32)
            for part in exact.reads(len(members), features):  # a cluster may hold most of the rows
                x = features[members[part]]
                near[part] = exact.cosines(x, own, np.zeros(len(x), np.int32))
            farthest[largest] = list(members[np.argsort(near, kind="stable")][: len(empty)])
        restarted[int(cluster)] = farthest[largest].pop(0)
        loss[largest] = loss[largest] / 2 if farthest[largest] else 0.0
    if not restarted:
        return centroids
    rows = np.array(list(restarted.values()))
    order = np.argsort(rows, kind="stable")
    clusters = np.array(list(restarted), np.int32)[order]
    for begin in range(0, len(rows), RESTARTED):
        here = slice(begin, begin + RESTARTED)
        new, more = exact.unit(exact.grid(features[rows[order[here]]])), RESTARTED - len(rows[here])
        places = np.pad(clusters[here], (0, more), constant_values=tiles.parts * tiles.clusters)
        new = np.pad(new, ((0, more), (0, 0)))
        centroids = products.replace(centroids, put(places, tiles.whole), put(new, tiles.whole), tiles.split)
    return centroids
