"""The device side of k-means: where rows and clusters lie, and scores in half, single and double precision.

Rows lie over all mesh axes and each device has all K clusters; or, where these are too large for that, the devices of
the axis 'model' share the clusters and rows lie over 'data' alone. Then `split` is K, each device has [K/P, D] of what
is [K, D] below, and K is filled up to a multiple of P with clusters of zeros that no row meets. Else `split` is 0.

Results that the host reads are gathered to every device, so that each process of a many-host mesh can read them.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from coincide_jax.kernels.kmeans.exact import SLACK

AXES = ("data", "model")  # the rows of a tile are shared by all devices
SHARED = AXES[1]  # what shares the clusters where they are split
# contraction length of one matrix product: a longer one is faster, a shorter one has a smaller bound on its rounding
FAST = {"float32": 2048, "float16": 2048, "bfloat16": 4096}  # in bfloat16 the operands' rounding is far larger
SINGLE = 1024  # of rows that are repeated in float32
ROUNDING = 2.0**-24


def accumulation(width: int, block: int) -> float:
    """Bound on the relative rounding of a score: `|ŝ − s| ≤ accumulation · ‖x‖ ‖d‖` for operands taken as exact.

    A sum of n products in any order errs by at most n u Σ|x_d d_d| (Higham 2002, §3.1), so a contraction in blocks by
    (block + D/block + 2) u; doubled for devices that round towards zero or build products from halves.
    """
    return 2.0 * (min(block, width) + -(-width // block) + 2) * ROUNDING * 1.01


def row_axes(split: int) -> tuple[str, ...]:
    """The mesh axes that share the rows of a tile."""
    return AXES[:1] if split else AXES


def cluster_axes(split: int) -> jax.P:
    """The spec of what has a row for each cluster."""
    return jax.P(SHARED) if split else jax.P()


def limb_axes(split: int) -> jax.P:
    """The spec of the limbs [S, K, D]."""
    return jax.P(AXES[0], SHARED) if split else jax.P(AXES)


def over_rows(function, over: str, out=None, split: int = 0):
    """`shard_map` of a function of whole arrays ('.'), arrays whose rows the devices share ('r'), arrays with a row for
    each cluster ('k') and limbs ('l')."""
    kinds = {".": jax.P(), "r": jax.P(row_axes(split)), "k": cluster_axes(split), "l": limb_axes(split)}
    specs = tuple(kinds[letter] for letter in over)
    return jax.shard_map(function, in_specs=specs, out_specs=jax.P() if out is None else out, check_vma=False)


def everywhere(*values, split: int = 0):
    """The rows of all devices on each of them, of arrays whose rows the devices share; inside `over_rows`."""
    return tuple(jax.lax.all_gather(value, row_axes(split), tiled=True) for value in values)


def _first(count: int):
    """The number of the first of a device's `count` shared clusters; inside `over_rows`."""
    return jax.lax.axis_index(SHARED) * count


def places(clusters, count: int, split: int):
    """Numbers of clusters → their places among the `count` of this device; `count` for those of others. (A negative
    place would be counted from the end.)"""
    if not split:
        return clusters
    place = clusters - _first(count)
    return jnp.where((place >= 0) & (place < count), place, count)


def names(count: int, split: int):
    """Numbers i32[count] of this device's clusters; from `split` on they are those that fill up. Inside `over_rows`."""
    here = jnp.arange(count, dtype=jnp.int32)
    return _first(count) + here if split else here


def of_all(found, split: int):
    """What the devices found of their clusters, of all of them; inside `over_rows`."""
    return jax.lax.all_gather(found, SHARED, tiled=True) if split else found


def best_of_all(best, top, second=None):
    """Two best of all clusters from the two best of each device's (numbers, scores, scores); ties to the smallest
    number. Without `second` the best alone."""
    highest = jax.lax.pmax(top, SHARED)
    first = jax.lax.pmin(jnp.where(top == highest, best, jnp.iinfo(jnp.int32).max), SHARED)
    if second is None:
        return first, highest
    return first, highest, jax.lax.pmax(jnp.where(best == first, second, top), SHARED)


def blocked(array, block: int) -> tuple:
    """Columns of an array in blocks, each an array of its own: a slice would be copied in every product."""
    return tuple(array[:, begin : begin + block] for begin in range(0, array.shape[1], block))


def _columns(x, directions):
    """x f[..., D] cut as directions are: tuple of f[..., d]."""
    ends = [0, *itertools.accumulate(part.shape[-1] for part in directions)]
    return tuple(x[..., begin:end] for begin, end in itertools.pairwise(ends))


def _product(x, directions):
    """Scores f32[R, K] of rows f[R, D] and directions, blocks f[K, d] of the contraction."""
    return sum(
        jax.lax.dot_general(
            rows.astype(part.dtype),
            part,
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if part.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        for rows, part in zip(_columns(x, directions), directions, strict=True)
    )


def _two_best(scores):
    """First index of the largest, the largest and the second largest score of each row."""
    index = jnp.arange(scores.shape[1], dtype=jnp.int32)[None, :]
    top = jnp.max(scores, axis=1, keepdims=True)
    # several times faster on CPUs than argmax, and the smallest index as well
    best = jnp.min(jnp.where(scores == top, index, scores.shape[1]), axis=1, keepdims=True)
    second = jnp.max(jnp.where(index == best, -jnp.inf, scores), axis=1)
    return best[:, 0], top[:, 0], second


def _three_best(scores, number):
    """Of each row's scores f32[R, n] of the clusters `number` i32[1 or R, n]: the smallest number with the largest
    score and that score, the same of the others, and the third largest score."""
    none = jnp.iinfo(jnp.int32).max
    top = jnp.max(scores, axis=1, keepdims=True)
    best = jnp.min(jnp.where(scores == top, number, none), axis=1, keepdims=True)
    others = jnp.where(number == best, -jnp.inf, scores)
    second = jnp.max(others, axis=1, keepdims=True)
    rival = jnp.min(jnp.where(others == second, number, none), axis=1, keepdims=True)
    third = jnp.max(jnp.where(number == rival, -jnp.inf, others), axis=1)
    return best[:, 0], top[:, 0], rival[:, 0], second[:, 0], third


@functools.partial(jax.jit, static_argnames="split")
def nearest(x, directions, split: int = 0):
    """Best clusters of every row of a tile: f[C, D], blocks of f[K, D] → the best cluster i32[C] and its score f32[C],
    the second best and its score, the third best score."""

    def local(x, directions):
        scores = _product(x, directions)
        number = names(scores.shape[1], split)[None, :]
        if not split:
            return everywhere(*_three_best(scores, number))
        best, top, rival, second, third = _three_best(jnp.where(number < split, scores, -jnp.inf), number)
        listed = (jnp.stack(pair, axis=1) for pair in ((top, second), (best, rival)))
        scores, number = (jax.lax.all_gather(part, SHARED, axis=1, tiled=True) for part in listed)
        *found, last = _three_best(scores, number)
        return everywhere(*found, jnp.maximum(last, jax.lax.pmax(third, SHARED)), split=split)

    return over_rows(local, "rk", split=split)(x, directions)


def _chosen_scores(stored, chosen, single, split: int):
    """Scores f32[n, m] of rows f[n, D] with some clusters i32[n, m] each, of float32 products; inside `over_rows`."""

    def score(row, cluster):
        terms = (
            jnp.sum(part.astype(jnp.float32) * directions.at[cluster].get(mode="clip"))
            for part, directions in zip(_columns(row, single), single, strict=True)
        )
        # the barrier keeps the two sums apart, as the bound on their rounding has them
        return jnp.sum(jax.lax.optimization_barrier(jnp.stack(list(terms))))

    def scores(row, clusters):
        return jnp.stack([score(row, clusters[place]) for place in range(chosen.shape[1])])

    def in_cache(stored, here):  # six times as fast as all rows at once
        return jax.lax.map(lambda pair: scores(*pair), (stored, here), batch_size=16)

    here = places(chosen, len(single[0]), split)
    found = jax.lax.platform_dependent(stored, here, cpu=in_cache, default=jax.vmap(scores))
    # a cluster is on one device
    return jax.lax.psum(jnp.where(here < len(single[0]), found, 0.0), SHARED) if split else found


@functools.partial(jax.jit, static_argnames="split")
def between(stored, rows, chosen, single, split: int = 0):
    """Some rows against two clusters each: f[C, D] a tile as stored, i32[S·B] rows within their device's part of it,
    i32[S·B, 2], blocks of f32[K, D] → scores f32[S·B, 2] of float32 products."""

    def local(stored, rows, chosen, single):
        return everywhere(_chosen_scores(stored.at[rows].get(mode="clip"), chosen, single, split), split=split)[0]

    return over_rows(local, "rrrk", split=split)(stored, rows, chosen, single)


@functools.partial(jax.jit, static_argnames=("prefix", "split"))
def against(x, stored, rows, own, directions, single, order, prefix: int, split: int = 0):
    """Some rows against their own cluster and the first `prefix` others of `order`; split, of each device's.

    Args:
      x, stored: f[C, D] a tile, in the type of the products and as stored. rows: i32[S·B] rows within their device's
        part of it. own: i32[S·B] their clusters. directions, single: blocks of f[K, D], in the type of the products and
        in float32. order: i32[K], a permutation of the clusters; split, of the places of each device's.

    Returns:
      i32[S·B] best other cluster; f32[S·B] its score, the second best other's, and the own cluster's, which is of
      float32 products.
    """

    def local(x, stored, rows, own, directions, single, order):
        x, stored = x.at[rows].get(mode="clip"), stored.at[rows].get(mode="clip")
        score = _chosen_scores(stored, own[:, None], single, split)[:, 0]
        chosen, every = order[:prefix], prefix == len(order)
        others = directions if every else tuple(part.at[chosen].get(mode="clip") for part in directions)
        here = names(prefix, 0) if every else chosen
        if not split:
            scores = jnp.where(here[None, :] == own[:, None], -jnp.inf, _product(x, others))
            best, top, second = _two_best(scores)
            return everywhere(here.at[best].get(mode="clip"), top, second, score)
        here = here + _first(len(order))
        met = (here[None, :] != own[:, None]) & (here[None, :] < split)
        best, top, second = _two_best(jnp.where(met, _product(x, others), -jnp.inf))
        return everywhere(*best_of_all(here.at[best].get(mode="clip"), top, second), score, split=split)

    return over_rows(local, "rrrrkkk", split=split)(x, stored, rows, own, directions, single, order)


@functools.partial(jax.jit, static_argnames="axes")
def take(x, rows, axes=AXES):
    """Rows of a tile, or of what else has its rows shared by the mesh axes `axes`, on every device: f[C, D], i32[n] →
    f[n, D]."""

    def local(x, rows):
        rows = rows - jax.lax.axis_index(axes) * len(x)
        found = x.at[rows].get(mode="clip")
        mine = (rows >= 0) & (rows < len(x))
        return jax.lax.psum(jnp.where(mine[:, None], found, jnp.zeros_like(found)), axes)

    specs = jax.P(axes), jax.P()
    return jax.shard_map(local, in_specs=specs, out_specs=jax.P(), check_vma=False)(x, rows)


@functools.partial(jax.jit, static_argnames="split")
def replace(centroids, clusters, rows, split: int = 0):
    """Centroids f32[K, D] with `rows` f32[n, D] in the places of `clusters` i32[n]; numbers above all are of none."""

    def local(centroids, clusters, rows):
        return centroids.at[places(clusters, len(centroids), split)].set(rows, mode="drop")

    return over_rows(local, "k..", cluster_axes(split), split)(centroids, clusters, rows)


@functools.partial(jax.jit, static_argnames=("dtype", "split"))
def directions(centroids, dtype, split: int = 0):
    """Centroids f32[K, D] less their mean f32[D], which is returned first, in float32 and in `dtype`: blocks of both.
    Call under `jax.enable_x64(True)`."""

    def local(centroids):
        # what fills up is zero
        mean = jax.lax.psum(jnp.sum(centroids, axis=0), SHARED) / split if split else jnp.mean(centroids, axis=0)
        single = (centroids.astype(jnp.float64) - mean.astype(jnp.float64)[None, :]).astype(jnp.float32)
        return mean, blocked(single, SINGLE), blocked(single.astype(dtype), FAST[jnp.dtype(dtype).name])

    out = jax.P(), cluster_axes(split), cluster_axes(split)
    return over_rows(local, "k", out, split)(centroids)


@functools.partial(jax.jit, static_argnames="split")
def prepare(centroids, previous, mean, single, fast, split: int = 0):
    """How far what a pass multiplies with (`directions`) may lead. Call under `jax.enable_x64(True)`.

    Scores are taken against the centroids less their mean, which moves all scores of a row alike and makes the
    rounding smaller where centroids share a direction. `mean`, `single` and `fast` come in as arguments: a compiler
    that saw their rounding in one program might take it out again (XLA does on GPUs).

    Returns:
      f64[3] upper bounds: the longest direction, the largest rounding of a float32 and of a fast one; f64[K] how far
      each centroid is from the previous one.
    """

    def lengths(centroid, previous, single, fast, mean):
        wide = centroid.astype(jnp.float64)
        offset = wide - mean.astype(jnp.float64)

        def rounded(parts):
            pairs = zip(_columns(offset, parts), parts, strict=True)
            return sum(jnp.sum((whole - part.astype(jnp.float64)) ** 2) for whole, part in pairs)

        moved = wide - previous.astype(jnp.float64)
        squares = jnp.sum(offset * offset), rounded(single), rounded(fast), jnp.sum(moved * moved)
        return jnp.sqrt(jnp.stack(squares)) * (1 + 1e-9)

    def in_cache(*arrays):  # CPUs would write the float64 intermediates of all rows to memory
        *rows, mean = arrays
        return jax.lax.map(lambda row: lengths(*row, mean), tuple(rows), batch_size=8)

    def local(*arrays):
        centroids, previous, mean, single, fast = arrays
        whole = jax.vmap(lengths, (0, 0, 0, 0, None))
        rows = centroids, previous, single, fast, mean
        found = jax.lax.platform_dependent(*rows, cpu=in_cache, default=whole)
        if split:
            found = of_all(jnp.where(names(len(found), split)[:, None] < split, found, 0.0), split)
        return jnp.max(found[:, :3], axis=0), found[:, 3]

    return over_rows(local, "kk.kk", split=split)(centroids, previous, mean, single, fast)


@functools.partial(jax.jit, static_argnames="split")
def near(x, centroids, split: int = 0):
    """Which centroids f32[K, D] are as good as the best of rows f[n, D], as far as float64 products can tell:
    bool[n, K]. Call under `jax.enable_x64(True)`."""

    def whole(wide, centroids):
        return jnp.matmul(wide, centroids.astype(jnp.float64).T, precision=jax.lax.Precision.HIGHEST)

    def in_cache(wide, centroids):  # else CPUs write all centroids to memory once more, in float64
        return jax.lax.map(lambda centroid: wide @ centroid.astype(jnp.float64), centroids, batch_size=32).T

    def local(x, centroids):
        wide = x.astype(jnp.float64)
        scores = jax.lax.platform_dependent(wide, centroids, cpu=in_cache, default=whole)
        slack = SLACK * x.shape[1] * jnp.sqrt(jnp.sum(wide * wide, axis=1, keepdims=True))
        if split:
            scores = jnp.where(names(len(centroids), split)[None, :] < split, scores, -jnp.inf)
            scores = jax.lax.all_gather(scores, SHARED, axis=1, tiled=True)
        return scores >= jnp.max(scores, axis=1, keepdims=True) - slack

    return over_rows(local, ".k", split=split)(x, centroids)
