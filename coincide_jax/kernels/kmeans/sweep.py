"""One pass over the rows: new labels, and the exact sums brought up to date.

For each row a proven lower bound of `s_own − max s_other` is kept, its gap. When centroid k moves by δ_k (a chord), a
score moves by at most ‖x‖ δ_k, so a row whose gap exceeds ‖x‖ (δ_own + max δ_other) keeps its label unseen (Hamerly
2010, for scores instead of distances); any other row meets its own centroid anew and those others that moved far enough
to overtake it, a prefix of the centroids sorted by δ ("drift and gap"). Fast products tell the two best apart when
they differ by more than twice

    err = ‖x‖ e_d + ‖x̃ − x‖ (r + e_d) + a (‖x‖ + ‖x̃ − x‖)(r + e_d) + 1e-14 D ‖x‖,

x̃ the row and d̃ a direction (centroid less the mean) in the fast type, r the longest direction, e_d = max ‖d̃ − d‖,
both measured, and a `products.accumulation`. (Scores of the own centroid, where it is met apart, are of float32
products, whose bound is no larger for D below 2^20.) Rows within it are repeated in float32 (x̃ = x, a smaller e_d),
with two clusters where all others lie beyond it, else with all; rows within float32's own bound in float64, and what
float64 products cannot order is summed in one order on the host: the label is always the one that `exact` defines,
whatever was skipped, on any device, with tiles of any size.
"""

from typing import NamedTuple

import jax
import numpy as np

from coincide_jax.kernels.kmeans import exact, products, sums
from coincide_jax.kernels.kmeans.tiles import Tiles, power_of_two, put

ROWS = 1 << 15  # whose prefixes are chosen at a time
# Products with chosen rows cost so many times those of a whole tile, and each row the time of so many more products
# (its copy, and its own score). Measured on a CPU; a wrong one costs time, not labels.
CALLED, APART = 1.2, 256


class Pairs(NamedTuple):
    """Rows of a tile i[n] that belong to the first or the second of two clusters i[n]."""

    rows: np.ndarray
    first: np.ndarray
    second: np.ndarray


class Sweeper:
    """Labels, gaps and sums of all rows between passes.

    Attributes:
      assignment: i32[N], -1 before the first pass. norms: f64[N]. work: share of N·K products of the last pass.
    """

    def __init__(self, tiles: Tiles, k: int, assignment: np.ndarray | None = None):
        self.tiles, self.k = tiles, k
        self.norms, self.lost = tiles.measure()
        if tiles.rows * max(1.0, float(np.max(self.norms))) > 2.0**27:
            raise ValueError(f"{tiles.rows} rows; the exact sums hold up to 2^27")
        self.assignment = np.full(tiles.rows, -1, np.int32) if assignment is None else assignment
        self.gap = np.full(tiles.rows, -np.inf)
        self.every = put(np.tile(np.arange(tiles.clusters, dtype=np.int32), tiles.parts), tiles.by_clusters)
        self.order = self.every
        self.limbs, self.loose = None, 0  # exact sums, and how many rows were added since the last carry
        self.work = 0.0

    def run(self, centroids: jax.Array, previous: jax.Array | None, with_sums: bool = True) -> int:
        """Assigns every row to `centroids` f32[K, D] (`Tiles.spread`); returns how many changed their cluster.

        `previous`: the centroids of the last pass, of which gaps and sums are; None: nothing is known of the rows.
        """
        tiles, fresh = self.tiles, previous is None
        with jax.enable_x64(True):
            mean, self.single, self.fast = products.directions(centroids, tiles.dtype, tiles.split)
            moves = centroids, centroids if fresh else previous
            told = products.prepare(*moves, mean, self.single, self.fast, tiles.split)
        self.bounds, drift = jax.device_get(told)
        self.centroids, self.on_host = centroids, None
        prefix = self._reach(drift, fresh)
        if with_sums and (fresh or self.limbs is None):
            self.limbs, fresh = self._zeros(), True
        wanted = np.logical_or.reduceat(prefix > 0, np.arange(0, tiles.rows, tiles.chunk))
        self.work, moved, waiting = 0.0, 0, None
        if fresh and with_sums:
            wanted[:] = True
        for tile, x, fast in tiles.read(wanted, "tiles assigned"):
            calls = self._dispatch(tile, x, fast, prefix)
            if waiting:
                moved += self._finish(*waiting, fresh, with_sums)
            waiting = tile, x, calls
        if waiting:
            moved += self._finish(*waiting, fresh, with_sums)
        if self.loose:
            self.limbs, self.loose = sums.carry(*self.limbs, tiles.split), 0
        self.work /= tiles.rows * tiles.clusters
        moved += int(np.sum(self.assignment < 0))
        self.assignment[self.assignment < 0] = 0  # of length zero, or the only cluster's, and in no tile that was read
        return moved

    def settle(self, centroids: jax.Array) -> tuple[jax.Array, np.ndarray, np.ndarray]:
        """The next centroids; lengths f64[K] of the sums, and their products with `centroids`, those of this pass."""
        split = self.tiles.split
        with jax.enable_x64(True):
            following, *told = sums.settle(*sums.total(*self.limbs, split), centroids, split)
        lengths, dots = jax.device_get(told)
        return following, lengths[: self.k], dots[: self.k]

    def _zeros(self) -> tuple[jax.Array, jax.Array]:
        """Limbs of no rows."""
        tiles = self.tiles
        shape = tiles.shards, tiles.parts * tiles.clusters, tiles.width
        there = jax.NamedSharding(tiles.whole.mesh, products.limb_axes(tiles.split))
        zeros = jax.jit(lambda: jax.numpy.zeros(shape, np.int32), out_shardings=there)
        return zeros(), zeros()

    def _error(self, rows: np.ndarray, single: bool) -> np.ndarray:
        """Rounding bound f64[n] of the scores of some rows: in float32, or in the fast type."""
        norms, width = self.norms[rows], self.tiles.width
        radius, rounded, cast = self.bounds
        if single:
            share = rounded + (radius + rounded) * products.accumulation(width, products.SINGLE)
            error = norms * share
        else:
            lost = self.lost[rows]
            share = lost + products.accumulation(width, products.FAST[self.tiles.dtype.name]) * (norms + lost)
            error = norms * cast + (radius + cast) * share
        return 1.0001 * error + exact.SLACK * width * norms

    def _reach(self, drift: np.ndarray, fresh: bool) -> np.ndarray:
        """How many of a device's clusters, farthest moved first, each row has to meet: i32[N]; 0 = none. Sets the gaps
        to what is left of them if the row meets only those."""
        prefix, k = np.zeros(self.tiles.rows, np.int32), self.tiles.clusters
        if fresh:
            self.gap[:] = -np.inf
            prefix[self.norms > 0] = k if self.k > 1 else 0
            return prefix
        away = np.full((self.tiles.parts, k), -1.0)  # of what fills up: it comes last
        away.ravel()[: self.k] = drift[: self.k]
        order = np.argsort(-away, axis=1, kind="stable").astype(np.int32)
        self.order = put(order.ravel(), self.tiles.by_clusters)
        down = np.take_along_axis(away, order, axis=1)
        sizes = np.unique([max(8, -(-k // share)) for share in (16, 8, 4, 2)] + [k])
        sizes = sizes[sizes <= k]
        after = np.max(np.pad(down, ((0, 0), (0, 1)))[:, sizes], axis=0)  # the farthest move of those not met
        farthest = np.argmax(away)
        first, second = drift[farthest], np.max(np.delete(away, farthest), initial=0.0)
        for begin in range(0, self.tiles.rows, ROWS):
            at = slice(begin, begin + ROWS)
            norms, labels, gap = self.norms[at], self.assignment[at], self.gap[at]
            own = norms * drift[labels]
            others = np.where(labels == farthest, second, first)
            left = gap - (own + norms * others) * (1 + 1e-9)
            rows = np.flatnonzero((left <= 0) & (norms > 0) & (self.k > 1))
            rest = gap[rows, None] - (own[rows, None] + norms[rows, None] * after) * (1 + 1e-9)
            enough = rest > 0
            enough[:, -1] = True
            choice = np.argmax(enough, axis=1)
            left[rows] = np.where(sizes[choice] == k, np.inf, rest[np.arange(len(rows)), choice])
            prefix[at][rows] = sizes[choice]
            self.gap[at] = left
        return prefix

    def _dispatch(self, tile: int, x: jax.Array, fast: jax.Array, prefix: np.ndarray) -> list[tuple]:
        """Starts the products of a tile: [(rows of the tile, places, results on the devices)]."""
        start, stop = self.tiles.span(tile)
        prefix, calls = prefix[start:stop], []
        rows = np.flatnonzero(prefix > 0)
        if np.sum(prefix[rows] * CALLED + APART) > (stop - start) * self.tiles.clusters:
            self.work += (stop - start) * self.tiles.clusters
            return [(rows, None, products.nearest(fast, self.fast, self.tiles.split))]
        for size in np.unique(prefix[rows]):
            rows = np.flatnonzero(prefix == size)
            self.work += len(rows) * int(size)
            calls += [(rows, *call) for call in self._meet(x, fast, start, rows, self.fast, self.order, int(size))]
        return calls

    def _meet(self, x, fast, start: int, rows: np.ndarray, directions, order, size: int):
        """Calls `against` for rows of a tile; yields (places in `rows`, results)."""
        by_rows = self.tiles.by_rows
        for places, local in self.tiles.blocks(rows):
            own = np.where(places >= 0, np.maximum(self.assignment[start + rows[places]], 0), 0).astype(np.int32)
            lists = (put(part, by_rows) for part in (local, own))
            yield places, products.against(fast, x, *lists, directions, self.single, order, size, self.tiles.split)

    def _finish(self, tile: int, x: jax.Array, calls: list[tuple], fresh: bool, with_sums: bool) -> int:
        """Takes the results of a tile, decides what they leave open, moves rows between the sums."""
        start, stop = self.tiles.span(tile)
        before = self.assignment[start:stop].copy()
        unsure, pairs = self._take_all(start, calls, single=self.tiles.dtype == np.float32)
        again, unsure = (unsure, unsure[:0]) if self.tiles.dtype != np.float32 else (unsure[:0], unsure)
        if len(pairs.rows):
            unsure = self._between(x, start, pairs)
        if len(again):
            count = self.tiles.clusters
            self.work += len(again) * count
            self.gap[start + again] = np.inf
            calls = [(again, *call) for call in self._meet(x, x, start, again, self.single, self.every, count)]
            unsure = np.concatenate([unsure, self._take_all(start, calls, single=True)[0]])
        if len(unsure):
            self.assignment[start + unsure] = self._decide(x, unsure)
            self.gap[start + unsure] = 0.0
        labels = self.assignment[start:stop]
        labels[labels < 0] = 0  # rows of length zero
        changed = np.flatnonzero(labels != before)
        if with_sums:
            rows = np.argsort(labels, kind="stable") if fresh else changed  # rows of a cluster find its sum in cache
            none, split = self.tiles.parts * self.tiles.clusters, self.tiles.split
            jax.block_until_ready(self.limbs)  # those of the tile before: else up to 32 calls keep their tiles on CPUs
            for places, local in self.tiles.blocks(rows):
                own = places >= 0
                plus = np.where(own, labels[rows[places]], none).astype(np.int32)
                minus = () if fresh else (np.where(own, before[rows[places]], none),)
                lists = (put(part.astype(np.int32), self.tiles.by_rows) for part in (local, plus, *minus))
                if self.loose + len(local) // self.tiles.shards > sums.LOOSE:
                    self.limbs, self.loose = sums.carry(*self.limbs, split), 0
                self.limbs = sums.add_rows(*self.limbs, x, *lists, split=split)
                self.loose += len(local) // self.tiles.shards
        return len(changed)

    def _take_all(self, start: int, calls: list[tuple], *, single: bool) -> tuple[np.ndarray, Pairs]:
        """Labels and gaps from the results of calls; returns the rows of the tile that stay open, and those of which
        only two clusters do (`single`: among the first)."""
        open_, pairs = [np.zeros(0, np.int64)], [Pairs(*np.zeros((3, 0), np.int64))]
        for call in calls:
            rows, two = self._take(start, *call, single=single)
            open_.append(rows)
            pairs.append(two)
        return np.concatenate(open_), Pairs(*map(np.concatenate, zip(*pairs, strict=True)))

    def _take(self, start: int, rows: np.ndarray, places, found, *, single: bool) -> tuple[np.ndarray, Pairs]:
        """`_take_all` of one call."""
        found = [np.asarray(value) for value in jax.device_get(found)]
        if places is None:  # a whole tile met all centroids
            label, top, rival, second, third = (value[rows] for value in found)
            margin, beyond, rest = top.astype(np.float64) - second, top.astype(np.float64) - third, np.inf
        else:
            mine = places >= 0
            rows = rows[places[mine]]
            best, top, second, score = (value[mine].astype(np.float64) for value in found)
            own = np.maximum(self.assignment[start + rows], 0)
            stays = score >= top
            label, rival = np.where(stays, (own, best), (best, own)).astype(np.int32)
            margin = np.where(stays, score - top, top - np.maximum(score, second))
            # the rival of a row whose two best are both others has no number here
            beyond = np.where(score >= second, np.maximum(score, top) - second, -np.inf)
            rest = self.gap[start + rows]
        where, error = start + rows, 2.0 * self._error(start + rows, single)
        margin, beyond = margin - error, beyond - error
        two = (margin <= 0) & (beyond > 0) & (not single)
        self.assignment[where] = label  # of a row that stays open: for now
        self.gap[where] = np.minimum(np.where(two, beyond, margin), rest)
        return rows[(margin <= 0) & ~two], Pairs(rows[two], label[two], rival[two])

    def _between(self, x: jax.Array, start: int, pairs: Pairs) -> np.ndarray:
        """Labels and gaps of rows of a tile between two clusters each, in float32; returns the rows that stay open."""
        rows, chosen = pairs.rows, np.stack(pairs[1:], axis=1).astype(np.int32)
        scores = np.zeros(chosen.shape)
        for places, local in self.tiles.blocks(rows):
            lists = (put(part, self.tiles.by_rows) for part in (local, chosen[places]))
            found = np.asarray(products.between(x, *lists, self.single, self.tiles.split))
            scores[places[places >= 0]] = found[places >= 0]
        self.work += 2 * len(rows)
        where, margin = start + rows, scores[:, 0] - scores[:, 1]
        self.assignment[where] = np.where(margin > 0, chosen[:, 0], chosen[:, 1])
        margin = np.abs(margin) - 2.0 * self._error(where, single=True)
        self.gap[where] = np.minimum(self.gap[where], margin)
        return rows[margin <= 0]

    def _decide(self, x: jax.Array, rows: np.ndarray) -> np.ndarray:
        """Labels i32[n] of rows of a tile by their definition."""
        tiles = self.tiles
        taken = products.take(x, put(power_of_two(rows), tiles.whole), products.row_axes(tiles.split))
        if jax.devices()[0].platform == "tpu":  # no float64
            wide = np.asarray(taken[: len(rows)])
            if self.on_host is None:
                self.on_host = tiles.gather(self.centroids)
            return exact.decide(wide, np.linalg.norm(wide.astype(np.float64), axis=1), self.on_host)
        with jax.enable_x64(True):
            near = np.asarray(products.near(taken, self.centroids, tiles.split))[: len(rows), : self.k]
        out = np.argmax(near, axis=1).astype(np.int32)
        tied = np.flatnonzero(np.sum(near, axis=1) > 1)
        if len(tied):
            named = np.flatnonzero(np.any(near[tied], axis=0))
            wide, held = np.asarray(taken), tiles.gather(self.centroids, named)
            for row in tied:
                mine = np.flatnonzero(near[row])
                others = held[np.searchsorted(named, mine)]
                sums = np.sum(wide[row].astype(np.float64) * others.astype(np.float64), axis=1)
                out[row] = mine[np.argmax(sums)]
        return out
