"""Greedy picks that follow a cluster's distribution: smallest squared maximum mean discrepancy (MMD²), in float64.

COINCIDE eq. 7 with running sums (kernel herding in its greedy form): each pick costs O(n) instead of O(n · picks), and
the picks are those of the direct formula. The order does not depend on how many will be taken, so one pass serves any
quota.
"""

import jax
import jax.numpy as jnp
import numpy as np


def greedy_order(kernel: jax.Array, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orders the members of clusters so that every prefix is the greedy choice of that length.

    With r_c the mean kernel of member c to the whole cluster, b_c its sum to the picks, A the sum among the picks and
    B the sum of their r, the next pick is `argmin_c (A + 2 b_c + K_cc) / (s + 1)² − 2 (B + r_c) / (s + 1)` over
    members not yet picked; ties go to the smallest local index.

    Args:
      kernel: float64[B, n, n], as `density.gram` makes it.
      sizes: i[B], rows of each cluster; the rest is padding.

    Returns:
      i32[B, n] local indices in the order of picking (-1 after the cluster's size), and float64[B, n] MMD² between the
      cluster and the picks so far.
    """
    with jax.enable_x64(True):
        order, discrepancy = _greedy(kernel, np.asarray(sizes, np.int64))
        return np.asarray(order), np.asarray(discrepancy)


@jax.jit
def _greedy(kernel, sizes):
    return jax.vmap(_greedy_one)(kernel, sizes)


def _greedy_one(kernel, size):
    n = kernel.shape[0]
    real = jnp.arange(n) < size
    count = jnp.maximum(size, 1).astype(kernel.dtype)
    mean = jnp.sum(jnp.where(real[None, :], kernel, 0.0), axis=1) / count  # r
    whole = jnp.sum(jnp.where(real, mean, 0.0)) / count
    self_similarity = jnp.diagonal(kernel)

    def pick(carry, step):
        free, to_picks, among, means = carry
        s = (step + 1).astype(kernel.dtype)
        value = (among + 2.0 * to_picks + self_similarity) / s**2 - 2.0 * (means + mean) / s
        value = jnp.where(free, value, jnp.inf)
        best = jnp.argmin(value)
        more = step < size
        carry = (
            free & (jnp.arange(n) != best),
            to_picks + kernel[best],
            among + 2.0 * to_picks[best] + self_similarity[best],
            means + mean[best],
        )
        return carry, (jnp.where(more, best, -1).astype(jnp.int32), jnp.where(more, value[best] + whole, 0.0))

    start = (real, jnp.zeros_like(mean), jnp.zeros_like(whole), jnp.zeros_like(whole))
    _, (order, discrepancy) = jax.lax.scan(pick, start, jnp.arange(n))
    return order, discrepancy
