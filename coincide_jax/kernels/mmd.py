"""Greedy picks that follow a cluster's distribution: smallest squared maximum mean discrepancy (MMD²), in float64.

COINCIDE eq. 7 with running sums (kernel herding in its greedy form): each pick costs O(n) instead of O(n · picks²), and
the picks are those of the direct formula. The order does not depend on how many will be taken, so one pass serves any
quota. With r_c the mean kernel of member c to the whole cluster, b_c its sum to the s picks so far, A the sum among
them and B the sum of their r, taking c makes

    MMD² = mean(r) + (A + 2 b_c + K_cc) / (s + 1)² − 2 (B + r_c) / (s + 1)
         = what no candidate changes + 2 / (s + 1)² · w_c,    w_c = b_c + K_cc / 2 − (s + 1) r_c,

so that the next pick is the free member of least w, and afterwards w_c grows by K_c,pick − r_c.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

PANEL = 64  # rows of the kernel matrix that are made at a time where it is not stored


def greedy_order(kernel: jax.Array, sizes: np.ndarray, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Orders the members of clusters so that every prefix is the greedy choice of that length.

    Ties go to the smallest local index.

    Args:
      kernel: float64[B, n, n], as `density.gram` makes it.
      sizes: i[B], rows of each cluster; the rest is padding.
      limit: at most so many picks of each cluster; None = all.

    Returns:
      i32[B, n] local indices in the order of picking (-1 after the last pick), and float64[B, n] MMD² between the
      cluster and the picks so far.
    """
    with jax.enable_x64(True):
        sizes = np.asarray(sizes, np.int32)
        steps = np.int32(min(kernel.shape[1], max(np.max(sizes), 1), limit or kernel.shape[1]))
        return tuple(map(np.asarray, jax.device_get(_greedy(kernel, sizes, steps))))


class _Held:
    """Rows of a kernel matrix that is not stored, as many at hand as `held` says, each 8 n bytes.

    When a row is not at hand, those of the `PANEL` best candidates are made at once, since they are likely to be wanted
    soon; the oldest are forgotten for them.
    """

    def __init__(self, rows_of: Callable[[np.ndarray], np.ndarray], n: int, held: int):
        self.rows_of, self.panel = rows_of, min(PANEL, n)
        held = min(-(-max(held, self.panel) // self.panel) * self.panel, -(-n // self.panel) * self.panel)
        self.rows, self.owner, self.slot, self.place = np.empty((held, n)), np.full(held, -1), np.full(n, -1), 0

    def row(self, best: int, value: np.ndarray) -> np.ndarray:
        """The row `best`: f64[n]. `value` float64[n]: the candidates are those of least value, none that is inf."""
        if self.slot[best] < 0:
            missing = np.where(self.slot < 0, value, np.inf)
            ahead = np.argpartition(missing, self.panel - 1)[: self.panel]
            ahead = ahead[np.isfinite(missing[ahead]) & (ahead != best)]
            wanted = np.concatenate([[best], ahead])[: self.panel]
            if self.place + len(wanted) > len(self.rows):
                self.place = 0
            slots = np.arange(self.place, self.place + len(wanted))
            self.slot[self.owner[slots][self.owner[slots] >= 0]] = -1
            self.rows[slots], self.owner[slots], self.slot[wanted] = self.rows_of(wanted), wanted, slots
            self.place += len(wanted)
        return self.rows[self.slot[best]]


def _silent(count: int) -> None:
    """Tells nobody."""


def greedy_picks(
    rows_of: Callable[[np.ndarray], np.ndarray],
    sums: np.ndarray,
    count: int,
    held: int,
    tell: Callable[[int], None] = _silent,
) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` picks of one cluster whose kernel matrix is not stored; the same as `greedy_order` gives.

    Args:
      rows_of: i[b] local indices → float64[b, n] rows of the kernel matrix.
      sums: float64[n], sums of all its rows.
      count: picks, at most n.
      held: rows kept at hand, each 8 n bytes.
      tell: is called with the number of picks made since the last call.

    Returns:
      i32[count] picks in order, and float64[count] MMD² between the cluster and the picks so far.
    """
    mean, rows = sums / len(sums), _Held(rows_of, len(sums), held)
    w = 0.5 - mean  # K_cc = 1
    order, least = np.zeros(count, np.int32), np.zeros(count)
    for step in range(count):
        best = int(np.argmin(w))
        order[step], least[step] = best, w[best]
        w += rows.row(best, w) - mean
        w[best] = np.inf
        tell(1)
    return order, _discrepancy(np, mean[order], least, np.mean(mean))


def refine(kernel: jax.Array, sizes: np.ndarray, picks: np.ndarray, sweeps: int) -> np.ndarray:
    """Exchanges picks, one place after the other, for whichever member makes MMD² least; it never grows.

    Args:
      kernel: float64[B, n, n].
      sizes: i[B], rows of each cluster.
      picks: i32[B, m], -1 after a cluster's quota.
      sweeps: over all places; stops early when nothing is exchanged.

    Returns:
      i32[B, m], the picks afterwards, each in the place of the one it was exchanged for.
    """
    with jax.enable_x64(True):
        return np.asarray(_refine(kernel, np.asarray(sizes, np.int32), np.asarray(picks, np.int32), np.int32(sweeps)))


def refine_picks(
    rows_of: Callable[[np.ndarray], np.ndarray],
    sums: np.ndarray,
    picks: np.ndarray,
    sweeps: int,
    held: int = PANEL,
    tell: Callable[[int], None] = _silent,
) -> np.ndarray:
    """`refine` for one cluster whose kernel matrix is not stored: i32[m] picks → i32[m]. `rows_of`, `held` and `tell`
    (places, in every sweep) as in `greedy_picks`; a panel of rows more is held."""
    n, picks, rows = len(sums), np.array(picks, np.int32), _Held(rows_of, len(sums), held)
    u = 0.5 - len(picks) * sums / n
    for start in range(0, len(picks), PANEL):
        u += rows_of(picks[start : start + PANEL]).sum(axis=0)
    taken = np.zeros(n, bool)
    taken[picks] = True
    for _ in range(sweeps):
        before = picks.copy()
        for start in range(0, len(picks), PANEL):
            for place, row in enumerate(rows_of(before[start : start + PANEL]), start):
                without = u - row
                value = np.where(taken, np.inf, without)
                best = int(np.argmin(value))
                if not taken.all() and without[best] < without[picks[place]]:
                    u = without + rows.row(best, value)
                    taken[picks[place]], taken[best], picks[place] = False, True, best
                tell(1)
        if np.array_equal(before, picks):
            break
    return picks


def discrepancies_of(rows_of: Callable[[np.ndarray], np.ndarray], sums: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """MMD² between one cluster, whose kernel matrix is not stored, and each prefix of its picks: i[m] → float64[m]."""
    mean, before = sums / len(sums), np.zeros(len(picks))
    for start in range(0, len(picks), PANEL):
        among = rows_of(picks[start : start + PANEL])[:, picks]
        before[start : start + PANEL] = np.tril(among, start - 1).sum(axis=1)
    s = np.arange(1, len(picks) + 1)
    return _discrepancy(np, mean[picks], before + 0.5 - s * mean[picks], np.mean(mean))


def discrepancies(kernel: jax.Array, sizes: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """MMD² between clusters and each prefix of their picks: float64[B, n, n], i[B], i32[B, m] → float64[B, m]; 0 where
    there is no pick."""
    with jax.enable_x64(True):
        return np.asarray(_prefixes(kernel, np.asarray(sizes, np.int32), np.asarray(picks, np.int32)))


def _discrepancy(xp, r, w, whole):
    """MMD² of every prefix from mean kernel r and value w of each pick at its turn: f64[…, m] twice → f64[…, m]."""
    s = xp.arange(1, r.shape[-1] + 1).astype(r.dtype).reshape((1,) * (r.ndim - 1) + (-1,))
    among, means = xp.cumsum(2.0 * (w + s * r), axis=-1), xp.cumsum(r, axis=-1)
    return whole + among / s**2 - 2.0 * means / s


def _means(kernel, sizes):
    """Mean kernel of each member to its cluster f64[B, n], and the mean of those f64[B]."""
    real = jnp.arange(kernel.shape[1], dtype=jnp.int32)[None, :] < sizes[:, None]
    count = jnp.maximum(sizes, 1).astype(kernel.dtype)[:, None]
    mean = jnp.sum(kernel * real[:, None, :].astype(kernel.dtype), axis=2) / count  # a mask would be a copy of kernel
    return real, mean, jnp.sum(jnp.where(real, mean, 0.0), axis=1, keepdims=True) / count


def _rows(kernel, local):
    """One row of each matrix: f64[B, n, n], i32[B] → f64[B, n]; index -1 reads row 0."""
    return jax.vmap(lambda K, i: jax.lax.dynamic_index_in_dim(K, i, keepdims=False))(kernel, jnp.maximum(local, 0))


@jax.jit
def _greedy(kernel, sizes, steps):
    batch, n, _ = kernel.shape
    index = jnp.arange(n, dtype=jnp.int32)[None, :]
    real, mean, whole = _means(kernel, sizes)
    half = 0.5 * jnp.diagonal(kernel, axis1=1, axis2=2)

    def pick(step, carry):
        w, order, least = carry
        top = jnp.min(w, axis=1, keepdims=True)
        best = jnp.min(jnp.where(w == top, index, n), axis=1, keepdims=True)  # faster on CPUs than argmin
        w = jnp.where(index == best, jnp.inf, w + (_rows(kernel, best[:, 0]) - mean))
        return w, order.at[:, step].set(best[:, 0]), least.at[:, step].set(top[:, 0])

    start = (jnp.where(real, half - mean, jnp.inf), jnp.zeros((batch, n), jnp.int32), jnp.zeros((batch, n)))
    _, order, least = jax.lax.fori_loop(0, steps, pick, start)
    done = index < jnp.minimum(sizes, steps)[:, None]
    r = jnp.where(done, jnp.take_along_axis(mean, order, axis=1, mode="clip"), 0.0)
    value = _discrepancy(jnp, r, jnp.where(done, least, 0.0), whole)
    return jnp.where(done, order, -1), jnp.where(done, value, 0.0)


@jax.jit
def _refine(kernel, sizes, picks, sweeps):
    n = kernel.shape[1]
    index = jnp.arange(n, dtype=jnp.int32)[None, :]
    real, mean, _ = _means(kernel, sizes)
    quota = jnp.sum(picks >= 0, axis=1, keepdims=True).astype(kernel.dtype)
    taken = jnp.any(picks[:, :, None] == index[:, None, :], axis=1)
    u = jnp.einsum("bi,bij->bj", taken.astype(kernel.dtype), kernel, precision=jax.lax.Precision.HIGHEST)
    u = u + 0.5 * jnp.diagonal(kernel, axis1=1, axis2=2) - quota * mean

    def exchange(place, carry):
        u, taken, picks = carry
        old = picks[:, place]
        without = u - _rows(kernel, old)
        value = jnp.where(real & ~taken, without, jnp.inf)
        top = jnp.min(value, axis=1, keepdims=True)
        best = jnp.min(jnp.where(value == top, index, n), axis=1, keepdims=True)
        own = jnp.take_along_axis(without, jnp.maximum(old, 0)[:, None], axis=1)
        better = (old[:, None] >= 0) & (top < own)
        u = jnp.where(better, without + _rows(kernel, best[:, 0]), u)
        taken = jnp.where(better, (taken & (index != old[:, None])) | (index == best), taken)
        return u, taken, picks.at[:, place].set(jnp.where(better[:, 0], best[:, 0], old))

    def sweep(carry):
        number, _, state = carry
        after = jax.lax.fori_loop(0, picks.shape[1], exchange, state)
        return number + 1, jnp.any(after[2] != state[2]), after

    def more(carry):
        return (carry[0] < sweeps) & carry[1]

    return jax.lax.while_loop(more, sweep, (jnp.int32(0), jnp.bool_(True), (u, taken, picks)))[2][2]


@jax.jit
def _prefixes(kernel, sizes, picks):
    _, mean, whole = _means(kernel, sizes)
    chosen = picks >= 0
    local = jnp.maximum(picks, 0)
    r = jnp.where(chosen, jnp.take_along_axis(mean, local, axis=1), 0.0)
    among = jax.vmap(lambda K, i: K[i][:, i])(kernel, local)
    before = jnp.sum(jnp.tril(among, -1), axis=2)
    s = jnp.arange(1, picks.shape[1] + 1).astype(kernel.dtype)[None, :]
    half = 0.5 * jnp.diagonal(among, axis1=1, axis2=2)
    w = jnp.where(chosen, before + half - s * r, 0.0)
    return jnp.where(chosen, _discrepancy(jnp, r, w, whole), 0.0)
