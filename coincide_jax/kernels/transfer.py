"""Transferability of clusters from their centroids (COINCIDE eq. 5), in float64 by tiles of the K×K cosines.

In float64 because the quotas hang on it: a share is exp(S / (tau D)), and a quota is that share rounded, so that an
error of 1e-7 in S would move a record or two among 10,000 clusters from one kind of device to another.
"""

import jax
import jax.numpy as jnp
import numpy as np


def transferability(
    centroids: np.ndarray, *, part: str, num_layers: int, mask_above: float, block: int = 1024
) -> np.ndarray:
    """Mean cosine of each centroid to all: f32[K, D] → float64[K].

    `part='text'` uses the text half of every tapped layer (layout [v_1, t_1, v_2, t_2, …]), as the authors' program
    does. Cosines above `mask_above`, a centroid's own among them, are left out of sum and count; where none is left,
    the mean of all that are left in other rows stands in, or the plain mean if there is none at all.

    Memory on the device: `16 · block · (D + block)` bytes. Every pair of clusters is multiplied once.

    Args:
      centroids: of any length, memory-mapped or not.
      part: 'text' or 'all'.
      num_layers: L, tapped layers in a feature.
      mask_above: 2 masks nothing.
      block: rows of one tile.

    Raises:
      ValueError: D is no multiple of 2 · num_layers.
    """
    k, width = centroids.shape
    if part == "text" and width % (2 * num_layers):
        raise ValueError(f"features of width {width} do not split into {num_layers} layers of two halves")
    block = min(block, k)

    def rows(start: int) -> np.ndarray:
        x = np.asarray(centroids[start : start + block], np.float32)
        if part == "text":
            x = x.reshape(len(x), num_layers, 2, -1)[:, :, 1].reshape(len(x), -1)
        return np.pad(x, ((0, block - len(x)), (0, 0)))

    padded = -(-k // block) * block
    sums, counts, plain = np.zeros(padded), np.zeros(padded), np.zeros(padded)
    with jax.enable_x64(True):
        for i in range(0, k, block):
            left = jax.device_put(rows(i))
            for j in range(i, k, block):
                right = left if i == j else jax.device_put(rows(j))
                by_row, by_column = _tile(left, right, np.int64(k - i), np.int64(k - j), np.float64(mask_above))
                for total, row, column in zip((sums, counts, plain), by_row, by_column, strict=True):
                    total[i : i + block] += np.asarray(row)
                    if i != j:
                        total[j : j + block] += np.asarray(column)
    sums, counts, plain = sums[:k], counts[:k], plain[:k]
    if not np.any(counts):
        return plain / k
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.sum(sums) / np.sum(counts))


@jax.jit
def _tile(left, right, rows, columns, mask_above):
    """Masked sums, counts and plain sums of the cosines of two blocks, over rows and over columns: 2 × 3 × f64[b]."""
    left, right = left.astype(jnp.float64), right.astype(jnp.float64)
    inner = jnp.matmul(left, right.T, precision=jax.lax.Precision.HIGHEST)
    length = [jnp.maximum(jnp.sqrt(jnp.sum(x * x, axis=1)), 1e-12) for x in (left, right)]
    cosine = inner / (length[0][:, None] * length[1][None, :])
    index = jnp.arange(left.shape[0])
    real = (index < rows)[:, None] & (index < columns)[None, :]
    kept = real & (cosine <= mask_above)
    parts = jnp.where(kept, cosine, 0.0), kept.astype(jnp.float64), jnp.where(real, cosine, 0.0)
    return [jnp.sum(x, axis=1) for x in parts], [jnp.sum(x, axis=0) for x in parts]
