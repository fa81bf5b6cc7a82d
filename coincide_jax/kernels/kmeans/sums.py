"""The device side of k-means: lengths of rows, exact sums of clusters, and the centroids that they make.

Rows, clusters and `split` are as in `products`.
"""

import functools

import jax
import jax.numpy as jnp

from coincide_jax.kernels.kmeans.exact import GRID
from coincide_jax.kernels.kmeans.products import (
    cluster_axes,
    everywhere,
    limb_axes,
    of_all,
    over_rows,
    places,
    row_axes,
)

LIMB = 20  # bits of the low limb
LOOSE = 2**11 - 1  # rows that may be added to a low limb before its carry is taken out
LANES = 128
EXACT = 16.0  # squared length of a float16 row below which any order of summation is exact in float64


@functools.partial(jax.jit, donate_argnums=(0, 1), static_argnames="split")
def add_rows(low, high, x, rows, plus, minus=None, split: int = 0):
    """Moves rows of a tile between clusters in the exact sums. After `LOOSE` rows a device it is time to `carry`.

    Args:
      low, high: i32[S, K, D] limbs on each device; a sum is (low + high 2^20) 2^-24.
      x: f[C, D]. rows: i32[S·B] within the device's part. plus, minus: i32[S·B] clusters, K = none
        (split, the K that is filled up); minus None: they were in none.
    """

    def local(low, high, x, rows, plus, *minus):
        whole = jnp.round(x.at[rows].get(mode="clip").astype(jnp.float32) * GRID).astype(jnp.int32)
        parts = whole & ((1 << LIMB) - 1), whole >> LIMB
        plus, *minus = (places(clusters, low.shape[1], split) for clusters in (plus, *minus))
        low, high = (limb[0].at[plus].add(part, mode="drop") for limb, part in zip((low, high), parts, strict=True))
        for clusters in minus:
            low, high = (
                limb.at[clusters].add(-part, mode="drop") for limb, part in zip((low, high), parts, strict=True)
            )
        return low[None], high[None]

    minus = () if minus is None else (minus,)
    over = "llrrr" + "r" * len(minus)
    return over_rows(local, over, limb_axes(split), split)(low, high, x, rows, plus, *minus)


@functools.partial(jax.jit, donate_argnums=(0, 1), static_argnames="split")
def carry(low, high, split: int = 0):
    """Limbs i32[S, K, D] of the same sums, the low ones from 0 to 2^20."""

    def local(low, high):
        return low & ((1 << LIMB) - 1), high + (low >> LIMB)

    return over_rows(local, "ll", limb_axes(split), split)(low, high)


@functools.partial(jax.jit, static_argnames="split")
def total(low, high, split: int = 0):
    """Limbs, carries taken out, summed over the devices: two i32[K, D]."""

    def local(low, high):
        return jax.lax.psum((low[0], high[0]), row_axes(split))

    return over_rows(local, "ll", cluster_axes(split), split)(low, high)


def _ordered(terms, *arrays) -> list:
    """Sums over the last axis of what `terms` makes of [..., D] arrays, elementwise, in one order on every device: 128
    lanes, each in turn, then the lanes. `terms` → a tuple of f64; its sums f64[...]."""
    rows = arrays[0].shape[:-1]
    pad = [(0, 0)] * len(rows) + [(0, -arrays[0].shape[-1] % LANES)]
    parts = [jnp.pad(array, pad).reshape(*rows, -1, LANES) for array in arrays]
    zeros = jnp.zeros((*rows, LANES), jnp.float64)

    def add(i, lanes):
        return tuple(lane + term for lane, term in zip(lanes, terms(*(part[..., i, :] for part in parts)), strict=True))

    count = len(jax.eval_shape(terms, *(part[..., 0, :] for part in parts)))
    lanes = jax.lax.fori_loop(0, parts[0].shape[-2], add, (zeros,) * count)

    def join(i, sums):
        return tuple(total + lane[..., i] for total, lane in zip(sums, lanes, strict=True))

    return jax.lax.fori_loop(0, LANES, join, (zeros[..., 0],) * count)


def _halves(values):
    """f64 → two f64 of 24 bits each that add up to it (for values of at most 48 bits)."""
    upper = values.astype(jnp.float32).astype(values.dtype)
    return upper, values - upper


def _squared(values):
    """The exact products whose sum is that of v² for f64 of at most 48 bits: three tuples, the second counts twice. As
    they are exact, a fused multiply-add changes nothing."""
    upper, lower = _halves(values)
    return upper * upper, upper * lower, lower * lower


def squares(values):
    """`Σ_d v_d²` of f64[n, D] of at most 48 bits."""
    large, cross, small = _ordered(_squared, values)
    return large + (cross + cross) + small


@functools.partial(jax.jit, static_argnames="split")
def settle(low, high, centroids, split: int = 0):
    """Exact sums → the next centroids. Call under `jax.enable_x64(True)`.

    Args:
      low, high: i32[K, D]. centroids: f32[K, D] of this iteration.

    Returns:
      f32[K, D] unit sums (a cluster without direction keeps its centroid), f64[K] lengths of the sums, f64[K] products
      of the sums with `centroids`.
    """

    def whole(low, high):
        return (low.astype(jnp.float64) + high.astype(jnp.float64) * 2.0**LIMB) / GRID

    def terms(low, high, centroids):
        sums, wide = whole(low, high), centroids.astype(jnp.float64)
        upper, lower = _halves(sums)
        return *_squared(sums), upper * wide, lower * wide

    def local(low, high, centroids):
        large, cross, small, *dots = _ordered(terms, low, high, centroids)
        length = jnp.sqrt(large + (cross + cross) + small)[:, None]
        following = (whole(low, high) / jnp.where(length > 0, length, 1.0)).astype(jnp.float32)
        told = of_all(length[:, 0], split), of_all(dots[0] + dots[1], split)
        return jnp.where(length > 0, following, centroids), *told

    return over_rows(local, "kkk", (cluster_axes(split), jax.P(), jax.P()), split)(low, high, centroids)


@functools.partial(jax.jit, static_argnames=("ordered", "split"))
def inspect(x, fast, ordered: bool, split: int = 0):
    """Of each row of a tile: squared length f64[C], what the fast type lost f64[C], largest magnitude f32[C] (NaN for a
    row with one). Call under `jax.enable_x64(True)`. For `fast`, the rows in that type, see `prepare`.

    `ordered`: squared lengths by `squares`. Those of float16 rows need it only from `EXACT` on: below, all partial sums
    are multiples of 2^-48 that float64 holds exactly, in any order.
    """

    def of(x, fast):
        single = x.astype(jnp.float32)
        if fast.dtype == jnp.bfloat16:  # the same rounding; CPUs read arrays of this type several times slower
            lost = single - jax.lax.reduce_precision(single, exponent_bits=8, mantissa_bits=7)
        else:
            lost = single - fast.astype(jnp.float32)
        plain = jnp.sum((single * single).astype(jnp.float64), axis=-1)  # of float16 numbers exact products
        lost = jnp.sqrt(jnp.sum((lost * lost).astype(jnp.float64), axis=-1)) * (1 + 1e-6)
        return plain, lost, jnp.max(jnp.abs(single), axis=-1)

    def in_cache(x, fast):  # seven times as fast as all rows at once, whose intermediates CPUs write to memory
        return jax.lax.map(lambda row: of(*row), (x, fast), batch_size=16)

    def local(x, fast):
        plain, lost, largest = jax.lax.platform_dependent(x, fast, cpu=in_cache, default=of)
        return everywhere(squares(x.astype(jnp.float64)) if ordered else plain, lost, largest, split=split)

    return over_rows(local, "rr", split=split)(x, fast)
