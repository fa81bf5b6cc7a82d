"""Density of clusters by a Gaussian kernel, and the kernel matrices that density and greedy picks are made of.

Distances come from the stored rows with explicit norms, ‖x‖² + ‖y‖² − 2x·y, not renormalised, as the authors' program
has them. For float16 rows of about unit length every product and every partial sum is a multiple of 2^-48 below 2^5,
so that the float64 Gram matrix of inner products is exact in any order of summation.

Small clusters go in batches of equal padded size, their matrices stored; of a cluster whose matrix does not fit the
budget only tiles and single rows are ever made (`row_sums`, `kernel_rows`).
"""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

COMPILE_FLOP = 4e9  # extra work that is cheaper than compiling for one more size
BATCH_BYTES = 256 << 20  # of one batch of clusters; a cluster that is larger goes alone
WIDE = 2048  # columns that are cast up to float64 at a time
PRECISIONS = ("float64", "float32")  # of the inner products


def stored_limit(budget: int) -> int:
    """Rows of the largest cluster whose kernel matrix is stored within `budget` bytes: 16 n² with its temporaries."""
    return int((budget / 16) ** 0.5)


def cluster_bytes(n: int, width: int) -> int:
    """Of each cluster of `n` rows in a batch, on the device, at most: its rows, some columns of them in float64, and
    its kernel matrix twice."""
    return 4 * n * (width + 2 * min(width, WIDE) + 4 * n)


def batches(sizes: np.ndarray, width: int, budget: int = BATCH_BYTES) -> list[tuple[int, np.ndarray]]:
    """Cuts clusters into batches of equal padded size: `[(padded size n, i32[B] cluster indices, -1 = none)]`.

    Padded sizes are 4 per octave (8, 10, 12, 14, 16, 20, …), and a size joins the next larger one in use where the
    added work is less than a compilation's. All batches of one padded size have one shape. A batch holds
    `cluster_bytes` for each of its clusters, at most `budget` unless it is a single one.

    Args:
      sizes: i[K]; clusters of 0 are in no batch.
      width: D of the features.
      budget: bytes.
    """
    sizes = np.asarray(sizes, np.int64)
    padded = np.where(sizes > 0, padded_size(sizes), 0)
    used = np.unique(padded[padded > 0])
    for small, large in itertools.pairwise(used):
        if 2.0 * width * np.sum(padded == small) * (large**2 - small**2) < COMPILE_FLOP:
            padded[padded == small] = large
    out = []
    for n in np.unique(padded[padded > 0]):
        members = np.flatnonzero(padded == n).astype(np.int32)
        count = int(np.clip(budget // cluster_bytes(n, width), 1, len(members)))
        members = np.pad(members, (0, -len(members) % count), constant_values=-1)
        out += [(int(n), batch) for batch in members.reshape(-1, count)]
    return out


def padded_size(size):
    """The next of 8, 10, 12, 14, 16, 20, … that is not below `size`."""
    octave = np.floor(np.log2(np.maximum(size, 8))).astype(np.int64)
    step = 1 << (octave - 2)
    return -(-np.maximum(size, 8) // step) * step


def gram(x, sigma: float, precision: str = "float64") -> jax.Array:
    """Gaussian kernel matrices `exp(−‖x − y‖² / (2σ²))` of batches of rows: f[B, n, D] → float64[B, n, n].

    `precision='float32'` takes the inner products in float32, of the rows less their mean (distances do not notice,
    and the rounding error is then relative to the spread of the cluster, not to the length of its rows); what follows
    is float64. Padding rows are rows like any other here; the callers leave them out by size.
    """
    with jax.enable_x64(True):
        return _gram(x, np.float64(sigma), precision)


def density(kernel: jax.Array, sizes: np.ndarray, diagonal: bool) -> np.ndarray:
    """Mean kernel value of clusters (COINCIDE eq. 6): float64[B, n, n], i[B] → float64[B].

    With the diagonal the mean runs over all n_i² pairs (the authors' program), without it over the n_i(n_i − 1)
    distinct ones (the paper). A cluster of one has density 1; one of none has 0.
    """
    with jax.enable_x64(True):
        sums = np.asarray(_masked_sum(kernel, np.asarray(sizes, np.int64)))
    return mean_of_pairs(sums, np.asarray(sizes, np.float64), diagonal)


def mean_of_pairs(sums, sizes, diagonal: bool):
    """Density from the sum of all n_i² kernel values, of which the n_i of the diagonal are 1."""
    pairs, total = (sizes * sizes, sums) if diagonal else (sizes * (sizes - 1), sums - sizes)
    return np.where(sizes == 1, 1.0, total / np.maximum(pairs, 1.0))


def row_sums(x, sigma: float, precision: str = "float64", block: int = 2048) -> np.ndarray:
    """Sums of the rows of one cluster's kernel matrix, of which only one tile is held: f[n, D] → float64[n].

    Memory on the device: `32 · block²` bytes and 8 · D bytes for each of `2 · block` rows. Every row is summed in the
    order of the members, tile after tile: equal rows get equal sums, wherever the cuts fall, and so tie.
    """
    n = len(x)
    block = _even(n, block)
    sums = np.zeros(-(-n // block) * block)
    origin = np.asarray(x[:1], np.float32) if precision == "float32" else None
    with jax.enable_x64(True):
        for i, left in _blocks(x, block, origin):
            for j, right in _blocks(x, block, origin):
                part = _tile_sums(left, right, np.int64(min(n - j, block)), np.float64(sigma), precision)
                sums[i : i + block] += np.asarray(part)
    return sums[:n]


def kernel_rows(x, picked: np.ndarray, sigma: float, precision: str = "float64", block: int = 2048) -> np.ndarray:
    """The rows `picked` i[b] of one cluster's kernel matrix: f[n, D] → float64[b, n]; one pass over x, by blocks."""
    n = len(x)
    block = _even(n, block)
    out = np.zeros((len(picked), n))
    origin = np.asarray(x[:1], np.float32) if precision == "float32" else None
    left = np.asarray(x[picked])
    left = left if origin is None else left.astype(np.float32) - origin
    with jax.enable_x64(True):
        left = jax.device_put(np.pad(left, ((0, -len(left) % 8), (0, 0))))
        for j, right in _blocks(x, block, origin):
            stop = min(j + block, n)
            out[:, j:stop] = np.asarray(_cross(left, right, np.float64(sigma), precision))[: len(picked), : stop - j]
    return out


def _even(n: int, block: int) -> int:
    """Rows of a block, at most `block` (for ever so few more rows one of 4 sizes an octave), of which all hold about
    the same share of n."""
    return min(block, int(padded_size(-(-n // -(-n // block)))))


def _blocks(x, block: int, origin) -> Iterator[tuple[int, jax.Array]]:
    """(first row, rows on the device), zero rows after the last; less `origin` if there is one."""
    for start in range(0, len(x), block):
        part = np.asarray(x[start : start + block])
        part = part if origin is None else part.astype(np.float32) - origin
        yield start, jax.device_put(np.pad(part, ((0, block - len(part)), (0, 0))))


def _kernel(a, b, sigma, precision: str, centre: bool = False):
    """Gaussian kernel of all pairs of rows: f[…, n, D], f[…, m, D] → f64[…, n, m].

    The rows are cast up `WIDE` columns at a time at most, in a loop, since XLA holds several blocks, or the products of
    all, at once where it is unrolled; on CPUs float32 products are slower inside a loop, float64 ones are not. With
    `centre` the first row of each is taken off.
    """
    wide = jnp.float32 if precision == "float32" else jnp.float64
    width, own = a.shape[-1], a is b

    def add(begin, sums, columns):
        start = jnp.minimum(begin, width - columns)  # the last block begins early; what came before counts as 0
        x, y = (jax.lax.dynamic_slice_in_dim(part, start, columns, axis=-1).astype(wide) for part in (a, b))
        if centre:
            x, y = x - x[..., :1, :], y - x[..., :1, :]
        if width % columns:
            new = start + jnp.arange(columns) >= begin
            x, y = jnp.where(new, x, 0), jnp.where(new, y, 0)
        y = x if own else y
        inner = jnp.einsum("...id,...jd->...ij", x, y, precision=jax.lax.Precision.HIGHEST)
        return tuple(map(jnp.add, sums, (inner, jnp.sum(x * x, axis=-1), jnp.sum(y * y, axis=-1))))

    shape = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    sums = tuple(jnp.zeros(s, wide) for s in ((*shape, a.shape[-2], b.shape[-2]), a.shape[:-1], b.shape[:-1]))
    count = -(-width // WIDE)
    columns = -(-width // count // 64) * 64  # blocks of about one width
    if count == 1:
        sums = add(0, sums, width)
    else:
        sums = jax.lax.fori_loop(0, count, lambda i, sums: add(i * columns, sums, columns), sums)
    inner, left, right = sums
    squares = left[..., :, None] + right[..., None, :] - 2.0 * inner
    if precision == "float32":
        squares = jnp.maximum(squares, 0.0).astype(jnp.float64)
    return jnp.exp(squares / (-2.0 * sigma**2))


@functools.partial(jax.jit, static_argnums=2)
def _gram(x, sigma, precision: str):
    def one(rows):
        return _kernel(rows, rows, sigma, precision, centre=precision == "float32")

    # XLA's CPU compiler makes a batched product at half the speed of single ones, a tenth where matrices are small
    return jax.lax.platform_dependent(x, cpu=lambda x: jax.lax.map(one, x), default=one)


@functools.partial(jax.jit, static_argnums=3)
def _cross(a, b, sigma, precision: str):
    return _kernel(a, b, sigma, precision)


@functools.partial(jax.jit, static_argnums=4)
def _tile_sums(a, b, columns, sigma, precision: str):
    """Sums of the rows of one tile of a kernel matrix over its real columns: f64[b]."""
    real = (jnp.arange(b.shape[0]) < columns)[None, :]
    return jnp.sum(jnp.where(real, _kernel(a, b, sigma, precision), 0.0), axis=1)


@jax.jit
def _masked_sum(kernel, sizes):
    real = (jnp.arange(kernel.shape[1])[None, :] < sizes[:, None]).astype(kernel.dtype)
    return jnp.sum(real * jnp.sum(kernel * real[:, None, :], axis=2), axis=1)  # products fuse into sums, masks do not
