"""Density of clusters by a Gaussian kernel in float64, and transferability of centroids.

Distances come from the stored rows with explicit norms, ‖x‖² + ‖y‖² − 2x·y, not renormalised, as the authors' program
has them. For float16 rows of about unit length every product and every partial sum is a multiple of 2^-48 below 2^5,
so that the float64 Gram matrix of inner products is exact in any order of summation.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

COMPILE_FLOP = 4e9  # extra work that is cheaper than compiling for one more size
BATCH_BYTES = 256 << 20  # of one batch of clusters; a cluster that is larger goes alone


def batches(sizes: np.ndarray, width: int) -> list[tuple[int, np.ndarray]]:
    """Cuts clusters into batches of equal padded size: `[(padded size n, i32[B] cluster indices, -1 = none)]`.

    Padded sizes are 4 per octave (8, 10, 12, 14, 16, 20, …), and a size joins the next larger one in use where the
    added work is less than a compilation's. All batches of one padded size have one shape. A batch holds `8 B (n ·
    width + 4 n²)` bytes on the device, at most 256 MiB unless it is a single cluster.

    Args:
      sizes: i[K], all positive.
      width: D of the features.
    """
    sizes = np.asarray(sizes, np.int64)
    octave = np.floor(np.log2(np.maximum(sizes, 8))).astype(np.int64)
    step = 1 << (octave - 2)
    padded = -(-np.maximum(sizes, 8) // step) * step
    used = np.unique(padded)
    for small, large in itertools.pairwise(used):
        if 2.0 * width * np.sum(padded == small) * (large**2 - small**2) < COMPILE_FLOP:
            padded[padded == small] = large
    out = []
    for n in np.unique(padded):
        members = np.flatnonzero(padded == n).astype(np.int32)
        count = int(np.clip(BATCH_BYTES // (8 * n * (width + 4 * n)), 1, len(members)))
        members = np.pad(members, (0, -len(members) % count), constant_values=-1)
        out += [(int(n), batch) for batch in members.reshape(-1, count)]
    return out


def gram(x, sigma: float) -> jax.Array:
    """Gaussian kernel matrices `exp(−‖x − y‖² / (2σ²))` of batches of rows: f[B, n, D] → float64[B, n, n].

    Padding rows are rows like any other here; the callers leave them out by size.
    """
    with jax.enable_x64(True):
        return _gram(x, np.float64(sigma))


def density(kernel: jax.Array, sizes: np.ndarray, diagonal: bool) -> np.ndarray:
    """Mean kernel value of clusters (COINCIDE eq. 6): float64[B, n, n], i[B] → float64[B].

    With the diagonal the mean runs over all n_i² pairs (the authors' program), without it over the n_i(n_i − 1)
    distinct ones (the paper). A cluster of one has density 1; one of none has 0.
    """
    with jax.enable_x64(True):
        sums = np.asarray(_masked_sum(kernel, np.asarray(sizes, np.int64), diagonal))
    n = np.asarray(sizes, np.float64)
    pairs = n * n if diagonal else n * (n - 1)
    return np.where(n == 1, 1.0, sums / np.maximum(pairs, 1.0))


def transferability(
    centroids: np.ndarray, *, part: str, num_layers: int, mask_above: float, block: int = 1024
) -> np.ndarray:
    """Mean cosine of each centroid to the others (COINCIDE eq. 5): f32[K, D] → float64[K], by blocks of rows.

    `part='text'` uses the text half of every tapped layer (layout [v_1, t_1, v_2, t_2, …]), as the authors' program
    does. Cosines above `mask_above`, a row's own among them, are left out of sum and count; where none is left, the
    mean of all that are left in other rows stands in, or the plain mean if there is none at all.

    Raises:
      ValueError: D is no multiple of 2 · num_layers.
    """
    k, width = centroids.shape
    if part == "text":
        if width % (2 * num_layers):
            raise ValueError(f"features of width {width} do not split into {num_layers} layers of two halves")
        centroids = centroids.reshape(k, num_layers, 2, -1)[:, :, 1].reshape(k, -1)
    exact = centroids.astype(np.float64)
    length = np.sqrt(np.sum(exact * exact, axis=1, keepdims=True))
    unit = (exact / np.maximum(length, 1e-12)).astype(np.float32)
    sums, counts, plain = np.zeros(k), np.zeros(k), np.zeros(k)
    for start in range(0, k, block):
        cosine = np.asarray(_cosines(unit[start : start + block], unit), np.float64)
        kept = cosine <= mask_above
        sums[start : start + block] = np.sum(np.where(kept, cosine, 0.0), axis=1)
        counts[start : start + block] = np.sum(kept, axis=1)
        plain[start : start + block] = np.mean(cosine, axis=1)
    if not np.any(counts):
        return plain
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.sum(sums) / np.sum(counts))


@jax.jit
def _gram(x, sigma):
    x = x.astype(jnp.float64)
    norms = jnp.sum(x * x, axis=2)
    inner = jnp.einsum("bid,bjd->bij", x, x, precision=jax.lax.Precision.HIGHEST)
    squares = norms[:, :, None] + norms[:, None, :] - 2.0 * inner
    return jnp.exp(squares / (-2.0 * sigma**2))


@functools.partial(jax.jit, static_argnums=2)
def _masked_sum(kernel, sizes, diagonal: bool):
    index = jnp.arange(kernel.shape[1])
    real = index[None, :] < sizes[:, None]
    pairs = real[:, :, None] & real[:, None, :]
    if not diagonal:
        pairs = pairs & (index[:, None] != index[None, :])[None]
    return jnp.sum(jnp.where(pairs, kernel, 0.0), axis=(1, 2))


@jax.jit
def _cosines(rows, all_rows):
    return jnp.matmul(rows, all_rows.T, precision=jax.lax.Precision.HIGHEST)
