"""How good the clusters are: tight and apart, stable over seeds, pure against labels, free of near-duplicates.

COINCIDE names the missing measure of its clusters as a limitation; these are computed in blocks of rows, so that memory
does not grow with N beyond a few numbers a row. Labels are read for the audit alone, never by a selector.
"""

import contextlib
import functools
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from coincide_jax.cluster import centres
from coincide_jax.core import artifacts
from coincide_jax.core.metrics import Progress, say
from coincide_jax.dataset import source
from coincide_jax.kernels import kmeans
from coincide_jax.kernels.kmeans import products
from coincide_jax.kernels.kmeans.tiles import put

COLLAPSE = 0.95  # mean cosine between centroids above which clusters tell little apart
PAIRS = 20  # near-duplicate pairs that are listed
BLOCK = 256  # rows compared with all of their cluster at a time; centroids in work


def measure(keys, inputs, features, rows, centroids, labels, cosine, history) -> tuple[dict, dict[str, np.ndarray]]:
    """All measures of a clustering.

    Args:
      keys: config.cluster. inputs: folders; 'dataset' has the records with their labels.
      features: [n, D] of the clustered records. rows: i[n] their numbers. centroids: f32[K, D].
      labels: i32[n]. cosine: f32[n] to the own centroid. history: of the fit; empty when clusters were handed in.

    Returns:
      quality.json, and the columns of audit.parquet, one value a cluster.
    """
    k = len(centroids)
    sizes = np.bincount(labels, minlength=k)
    within = np.bincount(labels, weights=cosine, minlength=k) / np.maximum(sizes, 1)
    quality = {
        "within_cosine": {"overall": float(np.mean(cosine, dtype=np.float64)), "per_cluster": within.tolist()},
        "between_centroids": between(centroids),
        "sizes": sizes.tolist(),
        "labels": {},
        "seconds": {},
    }
    columns = {"cluster": np.arange(k), "size": sizes, "cohesion": within}
    if keys.audit.separation and k > 1:
        with _timed(quality, "separation"):
            other, silhouette = separation(features, centroids, labels, cosine, keys.chunk, keys.memory_mib << 20)
            per = [
                np.bincount(labels, weights=value, minlength=k) / np.maximum(sizes, 1) for value in (other, silhouette)
            ]
            columns |= {"separation": per[0], "silhouette": per[1]}
            quality["separation"] = {
                "cosine_to_the_next": float(np.mean(other)),
                "silhouette": float(np.mean(silhouette)),
            }
    if keys.audit.duplicates < 1:
        with _timed(quality, "duplicates"):
            counts, pairs = duplicates(features, labels, k, keys.audit.duplicates, keys.audit.pairs, cache_bytes(keys))
            compared = np.minimum(sizes, max(keys.audit.pairs, 0))
            columns |= {"duplicate_pairs": counts, "duplicates_compared": compared}
            quality["duplicates"] = {
                "threshold": keys.audit.duplicates,
                "pairs": int(np.sum(counts)),
                "clusters": int(np.sum(counts > 0)),
                "limit": keys.audit.pairs,
                "compared": int(np.sum(compared)),
                "records": int(np.sum(sizes)),
                "cut": int(np.sum(compared < sizes)),
                "sampled": [[int(rows[a]), int(rows[b]), value] for a, b, value in pairs],
            }
    if keys.audit.stability and history:
        with _timed(quality, "stability"):
            quality["stability"] = stability(keys, features, labels)
    if "dataset" in inputs and keys.audit_labels:
        records = source.load(artifacts.read_json(pathlib.Path(inputs["dataset"]) / "split.json")["records"])
        shuffled = np.random.default_rng(keys.seed).permutation(labels)
        for name in keys.audit_labels:
            found = against_label([records[row].get(name) for row in rows], labels, shuffled, k)
            if found:
                quality["labels"][name], purity, entropy = found
                columns |= {f"purity_{name}": purity, f"entropy_{name}": entropy}
    return quality, columns


def stability(keys, features, labels) -> dict:
    """How far the same clustering from another seed agrees: the same mode, start and sample, as `keys` have them, so
    that it is told how stable that is which was made."""
    seed = keys.seed + 1
    again, found = centres.again(keys, features, seed)
    return {
        "seed": seed,
        "mode": keys.mode,
        "init": keys.init,
        "max_points_per_centroid": keys.max_points_per_centroid,
        "iterations": again.iterations,
        "adjusted_rand": float(adjusted_rand_score(labels, found)),
        "objective": float(again.objective[-1]),
    }


def between(centroids: np.ndarray) -> float | None:
    """Mean cosine of distinct centroids f32[K, D]; None of one."""
    k = len(centroids)
    if k < 2:
        return None
    total = np.sum(centroids, axis=0, dtype=np.float64)
    own = sum(float(np.sum(centroids[i : i + BLOCK].astype(np.float64) ** 2)) for i in range(0, k, BLOCK))
    return float((total @ total - own) / (k * (k - 1)))


def separation(features, centroids, labels, cosine, chunk: int, memory: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine of each row to the nearest other centroid f32[n], and its silhouette (a − b) / max(a, b) with the
    distances 1 − cos to the own centroid b and to that one a (Rousseeuw 1987, with centroids in place of members).

    One pass over the features, `chunk` rows at a time on the devices of the ambient mesh, or fewer where `memory` bytes
    (0 = what the devices have) hold no more of them with their K scores; rows and centroids lie as in k-means.
    """
    layout = kmeans.lay_out(features, len(centroids), chunk, memory, "float32")
    chunk, by_rows = layout.chunk, layout.by_rows
    held, other = layout.spread(centroids), np.zeros(len(labels), np.float32)
    with Progress("audit", len(labels), "records") as progress:
        for start in range(0, len(labels), chunk):
            x, own = np.asarray(features[start : start + chunk]), labels[start : start + chunk]
            count = len(x)
            x, own = np.pad(x, ((0, chunk - count), (0, 0))), np.pad(own, (0, chunk - count))
            found = _nearest_other(put(x, by_rows), put(own.astype(np.int32), by_rows), held, layout.split)
            other[start : start + count] = np.asarray(found)[:count]
            progress.advance(count)
    own, away = np.maximum(1 - cosine, 0), np.maximum(1 - other, 0)
    return other, (away - own) / np.maximum(np.maximum(own, away), 1e-6)


@functools.partial(jax.jit, static_argnames="split")
def _nearest_other(x: jax.Array, own: jax.Array, centroids: jax.Array, split: int) -> jax.Array:
    """Cosine of rows f[n, D] to the nearest of the centroids f32[K, D] but their own, i32[n]: f32[n] on every device.
    `split`: as in `products`."""

    def local(x, own, centroids):
        x, names = x.astype(jnp.float32), products.names(len(centroids), split)
        scores = jnp.matmul(x, centroids.T, precision=jax.lax.Precision.HIGHEST)
        others = names[None, :] != own[:, None]
        if split:
            others &= names[None, :] < split
        best = jnp.where(others, scores, -jnp.inf).max(axis=1)
        best = jax.lax.pmax(best, products.SHARED) if split else best
        (found,) = products.everywhere(best / jnp.maximum(jnp.sqrt((x * x).sum(axis=1)), 1e-12), split=split)
        return found

    return products.over_rows(local, "rrk", split=split)(x, own, centroids)


def cache_bytes(keys) -> int:
    """Bytes of rows that `duplicates` reads at once: never more than features may take in clustering."""
    return min(keys.audit.cache_mib, keys.memory_mib or keys.audit.cache_mib) << 20


def duplicates(features, labels, k: int, threshold: float, most: int, cache: int) -> tuple[np.ndarray, list[tuple]]:
    """Pairs of rows of one cluster with a cosine above the threshold: how many in each cluster i64[K], and the first
    `PAIRS` as (row, row, cosine). Of a cluster above `most` rows only the first `most` are compared.

    A cluster's rows lie scattered over the store, whose checksums cover many rows each, so those of as many clusters as
    `cache` bytes hold are read at once, in order.
    """
    counts, pairs = np.zeros(k, np.int64), []
    groups = [rows[:most] for rows in kmeans.members(labels, k)]
    with Progress("audit", sum(len(rows) for rows in groups if len(rows) > 1), "records compared") as progress:
        for cluster, members, x in _gathered(features, groups, cache):
            x = x.astype(np.float32)
            x /= np.maximum(np.sqrt(np.einsum("ij,ij->i", x, x)), 1e-12)[:, None]
            for start in range(0, len(x), BLOCK):
                scores = x[start : start + BLOCK] @ x.T
                above = np.argwhere(np.triu(scores > threshold, start + 1))
                counts[cluster] += len(above)
                for a, b in above[: PAIRS - len(pairs)]:
                    pairs.append((members[start + a], members[b], float(scores[a, b])))
            progress.advance(len(members))
    return counts, pairs


def _gathered(features, members: Sequence[np.ndarray], cache: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(cluster, its members, their rows f[n, D]) of clusters with two members or more, in order."""
    kept = [cluster for cluster, rows in enumerate(members) if len(rows) > 1]
    ends = np.cumsum([len(members[cluster]) for cluster in kept])
    most, first = max(cache // (features.shape[1] * np.dtype(features.dtype).itemsize), 1), 0
    while first < len(kept):
        before = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, before + most, side="right")), first + 1)
        wanted = np.sort(np.concatenate([members[cluster] for cluster in kept[first:last]]))
        rows = features[wanted]
        for cluster in kept[first:last]:
            yield cluster, members[cluster], rows[np.searchsorted(wanted, members[cluster])]
        first, rows = last, None  # before the next are read


def against_label(values: list, labels, shuffled, k: int) -> tuple[dict, np.ndarray, np.ndarray] | None:
    """Agreement with one label of the records, beside that of shuffled clusters; None when it has under two classes.

    Returns:
      {records, classes, purity, nmi, entropy and the same of shuffled clusters}; purity f64[K] and entropy f64[K]
      (bits; NaN where no record of the cluster has the label).
    """
    has = np.array([value is not None for value in values], bool)
    names = sorted({str(value) for value in values if value is not None})
    count, number = len(names), {name: place for place, name in enumerate(names)}
    if count < 2:
        return None
    # an array of the names would take 4 bytes a row for each letter of the longest, several times over
    classes = np.fromiter((number[str(value)] for value in values if value is not None), np.int64, int(has.sum()))
    found, purity, entropy = _agreement(classes, labels[has], k)
    random, _, _ = _agreement(classes, shuffled[has], k)
    told = {"records": int(has.sum()), "classes": count} | found
    return told | {f"{name}_random": value for name, value in random.items()}, purity, entropy


def _agreement(classes: np.ndarray, labels: np.ndarray, k: int) -> tuple[dict, np.ndarray, np.ndarray]:
    """Purity (share of records in their cluster's most frequent class), normalised mutual information, and the mean
    entropy of the classes in a cluster in bits, weighted by size; purity and entropy of each cluster."""
    pairs, counts = np.unique(np.stack([labels, classes]), axis=1, return_counts=True)
    largest, sizes = np.zeros(k, np.int64), np.bincount(labels, minlength=k)
    np.maximum.at(largest, pairs[0], counts)
    share = counts / sizes[pairs[0]]
    entropy = np.bincount(pairs[0], weights=-share * np.log2(share), minlength=k) + 0.0
    told = {
        "purity": float(largest.sum() / len(labels)),
        "nmi": float(normalized_mutual_info_score(classes, labels)),
        "entropy": float(np.sum(entropy * sizes) / len(labels)),
    }
    none = sizes == 0
    return told, np.where(none, np.nan, largest / np.maximum(sizes, 1)), np.where(none, np.nan, entropy)


@contextlib.contextmanager
def _timed(quality: dict, name: str) -> Iterator[None]:
    """Adds the seconds of its block to quality['seconds']."""
    begin = time.perf_counter()
    yield
    quality["seconds"][name] = round(time.perf_counter() - begin, 3)


def tell(quality: dict, k: int, records: int) -> None:
    """Says what the measures say."""
    say(
        "cluster",
        f"{records} records in {k} clusters, mean cosine to the centroid {quality['within_cosine']['overall']:.4f}",
    )
    if quality["between_centroids"] is not None and quality["between_centroids"] > COLLAPSE:
        say(
            "cluster",
            f"warning: centroids have a mean cosine of {quality['between_centroids']:.3f} to each other "
            f"(above {COLLAPSE}); the features hardly differ and the clusters tell little apart; "
            "cluster.centre=True takes out their common direction",
        )
    if "separation" in quality:
        value = quality["separation"]
        say(
            "cluster",
            f"cosine to the next centroid {value['cosine_to_the_next']:.4f}, silhouette {value['silhouette']:.3f}",
        )
    if "stability" in quality:
        value = quality["stability"]
        say(
            "cluster",
            f"adjusted Rand index {value['adjusted_rand']:.3f} with the clusters of seed {value['seed']} "
            f"(mode={value['mode']}, init={value['init']}, "
            f"max_points_per_centroid={value['max_points_per_centroid']}, as here)",
        )
    value = quality.get("duplicates", {})
    if value.get("cut"):
        say(
            "cluster",
            f"duplicates: of {value['cut']} clusters only the first {value['limit']} records were compared, "
            f"{value['compared']} of {value['records']} in all; "
            f"cluster.audit.pairs={max(quality['sizes'])} compares them all",
        )
    if value.get("pairs"):
        say(
            "cluster",
            f"{value['pairs']} pairs with a cosine above {value['threshold']} in {value['clusters']} clusters",
        )
    for name, value in quality["labels"].items():
        say(
            "cluster",
            f"{name} ({value['classes']} classes): purity {value['purity']:.3f} (random {value['purity_random']:.3f}), "
            f"normalised mutual information {value['nmi']:.3f} (random {value['nmi_random']:.3f}), "
            f"entropy {value['entropy']:.2f} bits",
        )
