"""Density of the clusters, and the picks inside them, in bounded memory: the part of COINCIDE that reads the features.

`select.cache_mib` is shared out: half to the rows that are read at a time, a quarter to one batch of kernel matrices, a
quarter to the rows of a matrix that is not stored. Clusters whose matrix fits its quarter (5,792 rows at 2,048 MiB) are
measured and ordered in one pass, since the greedy order serves any quota; larger ones are measured tile by tile, and
picked from once their quota is known. A store decoded by chunks that does not fit is read once, as a copy by clusters
(`view.reader`). What is measured depends on none of these sizes but for float64's last digit.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from coincide_jax.core.metrics import Progress, say
from coincide_jax.kernels import density, kmeans, mmd
from coincide_jax.selection.view import SelectionView

AUDITED = 16  # clusters whose picks are made in float64 too when select.gram is float32
AUDITED_SIZE = 4096  # rows of the largest of them


class Picker:
    """Measures the clusters of a view, then picks from them."""

    def __init__(self, view: SelectionView, members: Sequence[np.ndarray], sizes: np.ndarray, keys):
        self.view, self.members, self.sizes, self.keys = view, members, sizes, keys
        self.resident = isinstance(view.features, jax.Array)
        if self.resident:  # under the mesh of this selection
            here = jax.NamedSharding(jax.sharding.get_mesh(), jax.P())
            self.features = jax.device_put(view.features, here)
        kind = view.features.dtype if self.resident else view.features(np.zeros(0, np.int64)).dtype
        self.itemsize = np.dtype(kind).itemsize
        self.share = (keys.cache_mib << 20) // 4
        self.large = sizes > density.stored_limit(self.share)
        self.block = int(np.clip(density.stored_limit(self.share) // 8 * 8, 64, 2048))  # rows of a tile
        self.sums: dict[int, np.ndarray] = {}  # of the kernel rows of large clusters
        self.orders: list[np.ndarray | None] = [None] * len(sizes)
        self.scores: list[np.ndarray | None] = [None] * len(sizes)

    def measure(self, diagonal: bool) -> np.ndarray:
        """Density float64[K]; keeps an order and a score of the members for each cluster that is not large.

        The score is the MMD² of the picks so far (mmd), the cosine to the centroid (nearest), or 0 (random).
        """
        keys, D = self.keys, np.zeros(len(self.sizes))
        with Progress("select", len(self.sizes), "clusters") as progress:
            for ids, counts, kernel, x in self._kernels(np.flatnonzero(~self.large), keys.gram):
                D[ids] = density.density(kernel, counts, diagonal)[: len(ids)]
                if keys.intra == "mmd":
                    picked, discrepancy = mmd.greedy_order(kernel, counts)
                for place, cluster in enumerate(ids):
                    n = self.sizes[cluster]
                    if keys.intra == "mmd":
                        self._keep(cluster, picked[place, :n], discrepancy[place, :n])
                    else:
                        self._keep(cluster, *self._simple(cluster, x, place))
                progress.advance(len(ids))
            for cluster in np.flatnonzero(self.large):
                x = self._rows(self.members[cluster])
                self.sums[cluster] = density.row_sums(x, keys.sigma, keys.gram, self.block)
                n = float(self.sizes[cluster])
                D[cluster] = density.mean_of_pairs(np.sum(self.sums[cluster]), n, diagonal)
                if keys.intra != "mmd":
                    self._keep(cluster, *self._simple(cluster, x[None], 0))
                progress.advance(1, f"{len(x)} records")
        if keys.intra != "mmd":
            say("select", f"inside clusters records are picked by select.intra={keys.intra}")
        return D

    def picks(self, quota: np.ndarray, whole: np.ndarray):
        """The picks of every cluster.

        Args:
          quota: i64[K].
          whole: bool[K], clusters that are taken in the order of their rows.

        Returns:
          For each cluster i[quota] local indices and f64[quota] scores; numbers for the manifest.
        """
        keys = self.keys
        for cluster in np.flatnonzero(whole):
            self._keep(cluster, np.arange(self.sizes[cluster]), np.zeros(self.sizes[cluster]))
        if keys.intra == "mmd":
            large = np.flatnonzero(self.large & ~whole & (quota > 0))
            with Progress("select", int(np.sum(quota[large])), "picks in large clusters") as progress:
                for cluster in large:
                    self._pick_large(cluster, int(quota[cluster]), progress)
            partial = np.flatnonzero((quota > 0) & (quota < self.sizes))
            if keys.refine:
                self._refine(partial[~self.large[partial]], quota)
        none = np.zeros(0, np.int32), np.zeros(0)
        orders = [none[0] if m == 0 else order[:m] for m, order in zip(quota, self.orders, strict=True)]
        scores = [none[1] if m == 0 else score[:m] for m, score in zip(quota, self.scores, strict=True)]
        cost = self._cost(partial, quota, orders) if keys.intra == "mmd" and keys.gram == "float32" else {}
        return orders, scores, cost

    def _keep(self, cluster: int, order: np.ndarray, score: np.ndarray) -> None:
        self.orders[cluster], self.scores[cluster] = order, score

    def _simple(self, cluster: int, x, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Order and scores of a cluster's members by `select.intra` nearest or random."""
        n = self.sizes[cluster]
        if self.keys.intra == "random":
            return np.random.default_rng([self.keys.seed, int(cluster)]).permutation(n), np.zeros(n)
        centroid = np.asarray(self.view.centroids[cluster : cluster + 1])
        near = kmeans.cosines(np.asarray(x[place])[:n], centroid, np.zeros(n, np.int32))
        order = np.argsort(-near, kind="stable")
        return order, near[order]

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the features on the host."""
        return np.asarray(_take(self.features, rows.astype(np.int32))) if self.resident else self.view.features(rows)

    def _kernels(self, clusters: np.ndarray, precision: str) -> Iterator[tuple]:
        """Kernel matrices of clusters by batches: (cluster indices i[b], sizes i[B], f64[B, n, n], rows f[B, n, D])."""
        chosen = np.zeros(len(self.sizes), np.int64)
        chosen[clusters] = self.sizes[clusters]
        width = self.view.centroids.shape[1]
        group, held = [], 0
        for padded, batch in density.batches(chosen, width, min(density.BATCH_BYTES, self.share)):
            size = self.itemsize * width * int(np.sum(chosen[batch[batch >= 0]]))
            if group and held + size > 2 * self.share:
                yield from self._group(group, precision)
                group, held = [], 0
            group.append((padded, batch))
            held += size
        yield from self._group(group, precision)

    def _group(self, group: list, precision: str) -> Iterator[tuple]:
        """Reads the rows of some batches at once, then makes the kernel matrices one batch after the other."""
        clusters = [cluster for _, batch in group for cluster in batch[batch >= 0]]
        places = [self.members[cluster] for cluster in clusters]
        if not self.resident and clusters:
            rows = self.view.features(np.concatenate(places))
            places = np.split(np.arange(len(rows)), np.cumsum([len(part) for part in places])[:-1])
        places = dict(zip(clusters, places, strict=True))
        for padded, batch in group:
            ids = batch[batch >= 0]
            index = np.zeros((len(batch), padded), np.int32)
            for row, cluster in zip(index, ids, strict=False):
                row[:] = places[cluster][0]
                row[: self.sizes[cluster]] = places[cluster]
            x = _take(self.features, index) if self.resident else rows[index]
            yield ids, np.where(batch >= 0, self.sizes[batch], 0), density.gram(x, self.keys.sigma, precision), x

    def _pick_large(self, cluster: int, count: int, progress: Progress) -> None:
        """Greedy picks of a cluster whose kernel matrix is not stored, and swap sweeps over them."""
        keys, sums, x = self.keys, self.sums[cluster], self._rows(self.members[cluster])

        def rows_of(picked: np.ndarray) -> np.ndarray:
            return density.kernel_rows(x, picked, keys.sigma, keys.gram, self.block)

        held = self.share // (8 * len(sums))
        order, score = mmd.greedy_picks(rows_of, sums, count, held, progress.advance)
        if keys.refine and count < len(sums):
            with Progress("select", count * keys.refine, f"places looked at in cluster {cluster}") as places:
                order = mmd.refine_picks(rows_of, sums, order, keys.refine, held - mmd.PANEL, places.advance)
            score = mmd.discrepancies_of(rows_of, sums, order)
        self._keep(cluster, order, score)

    def _refine(self, clusters: np.ndarray, quota: np.ndarray) -> None:
        """Swap sweeps over the picks of clusters whose kernel matrix is stored."""
        with Progress("select", len(clusters), "clusters refined") as progress:
            for ids, counts, kernel, _ in self._kernels(clusters, self.keys.gram):
                before = _padded(self.orders, ids, quota, len(counts))
                after = mmd.refine(kernel, counts, before, self.keys.refine)
                score = mmd.discrepancies(kernel, counts, after)
                for place, cluster in enumerate(ids):
                    self._keep(cluster, after[place, : quota[cluster]], score[place, : quota[cluster]])
                progress.advance(len(ids))

    def _cost(self, partial: np.ndarray, quota: np.ndarray, orders: Sequence[np.ndarray]) -> dict:
        """What `select.gram=float32` cost: equal picks and growth of MMD² against float64, on some clusters."""
        count, limit = len(partial), min(AUDITED_SIZE, density.stored_limit(self.share))
        partial = partial[self.sizes[partial] <= limit]
        if len(partial) == 0:
            why = f"all {count} clusters that are picked from in part have more than {limit} records"
            say(
                "select",
                f"select.gram=float32: {why if count else 'no cluster is picked from in part'}; none is audited",
            )
            return {"gram": "float32", "gram_audited": 0}
        partial = partial[np.argsort(self.sizes[partial], kind="stable")]
        partial = partial[np.unique(np.linspace(0, len(partial) - 1, min(AUDITED, len(partial))).astype(int))]
        equal, ratio = [], []
        with Progress("select", len(partial), "clusters picked from in float64 too") as progress:
            for ids, counts, kernel, _ in self._kernels(partial, "float64"):
                exact, _ = mmd.greedy_order(kernel, counts, int(np.max(quota[ids])))
                exact = _padded(exact, np.arange(len(ids)), quota[ids], len(counts))
                exact = mmd.refine(kernel, counts, exact, self.keys.refine) if self.keys.refine else exact
                mine = _padded(orders, ids, quota, len(counts))
                values = [mmd.discrepancies(kernel, counts, both) for both in (mine, exact)]
                for place, cluster in enumerate(ids):
                    m = quota[cluster]
                    equal.append(len(np.intersect1d(mine[place, :m], exact[place, :m])) / m)
                    own, best = (max(value[place, m - 1], 1e-16) for value in values)
                    ratio.append(own / best)
                progress.advance(len(ids))
        say(
            "select",
            f"select.gram=float32: in {len(equal)} clusters that were picked from in float64 too, "
            f"{100 * np.mean(equal):.2f} % of the picks are the same and MMD² is {np.mean(ratio):.6f} times as large",
        )
        return {
            "gram": "float32",
            "gram_audited": len(equal),
            "gram_equal_picks": float(np.mean(equal)),
            "gram_mmd2_ratio": float(np.mean(ratio)),
        }


def _padded(orders, ids: np.ndarray, quota: np.ndarray, batch: int) -> np.ndarray:
    """The first picks of some clusters as i32[B, m], -1 where there is none; m one of few sizes."""
    out = np.full((batch, int(density.padded_size(np.max(quota[ids])))), -1, np.int32)
    for place, cluster in enumerate(ids):
        out[place, : quota[cluster]] = orders[cluster][: quota[cluster]]
    return out


@jax.jit
def _take(features, index):
    """Rows of resident features: f[N, D], i32[…] → f[…, D]."""
    return jnp.take(features, index, axis=0, mode="clip")
