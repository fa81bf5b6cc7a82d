"""Stage 2: features → clusters of records that exercise the same concepts and skills.

Reads the features and which records are valid, runs spherical k-means (or takes centroids and assignment made
elsewhere), drops empty clusters, and measures the result, without labels and against the audit labels where the
records carry them.
"""

import pathlib

import numpy as np
from sklearn.metrics import normalized_mutual_info_score

from coincide_jax.core import artifacts
from coincide_jax.core.errors import UserError, unknown
from coincide_jax.core.metrics import Progress, say
from coincide_jax.dataset import source
from coincide_jax.kernels import kmeans

STAGE_VERSION = 1
KEYS = ("cluster", "extract.features")
AUDIT_LABELS = ("task", "concept", "skill")
COLLAPSE = 0.95  # mean cosine between centroids above which clusters tell little apart


def run(config, inputs: dict[str, pathlib.Path], out: pathlib.Path, mesh) -> dict:
    """Runs the stage; writes centroids.npy f32[K, D], assignment.npy i32[N], history.json and quality.json.

    Raises:
      UserError: unknown mode, features that do not fit the data set or hold too large values, no valid record,
        centroids and assignment that do not fit each other or the features.
    """
    keys = config.cluster
    if keys.mode != "exact":
        raise unknown("cluster.mode", keys.mode, ["exact"])
    path = pathlib.Path(config.extract.features or inputs["extract"] / "features.zarr")
    features = artifacts.read_features(path)
    valid = _valid(inputs, path, len(features))
    rows = np.flatnonzero(valid)
    usable = _finite(features if valid.all() else features[rows], path)
    history = {}
    if keys.centroids or keys.assignment:
        centroids, assignment = _given(keys, features.shape)
        labels = assignment[rows]
        rows, usable = rows[labels >= 0], usable if np.all(labels >= 0) else usable[labels >= 0]
        labels = labels[labels >= 0]
        if len(rows) == 0:
            raise UserError(f"{keys.assignment} assigns no valid record to a cluster")
    else:
        result = _fit(keys, usable)
        centroids, labels = result.centroids, result.assignment
        history = {name: getattr(result, name).tolist() for name in ("objective", "imbalance", "empties", "moved")}
    full, dropped = np.unique(labels), len(centroids) - len(np.unique(labels))
    centroids, labels = centroids[full], np.searchsorted(full, labels)
    assignment = np.full(len(features), -1, np.int32)
    assignment[rows] = labels
    quality = _quality(config, inputs, centroids, assignment, rows, kmeans.cosines(usable, centroids, labels))
    artifacts.write_npy(out / "centroids.npy", centroids)
    artifacts.write_npy(out / "assignment.npy", assignment)
    artifacts.write_json(out / "history.json", history | {"dropped": dropped})
    artifacts.write_json(out / "quality.json", quality)
    _tell(quality, len(centroids), len(rows), dropped)
    return {
        "clusters": len(centroids),
        "records": len(rows),
        "dropped": dropped,
        "iterations": len(history.get("objective", ())),
        "within_cosine": quality["within_cosine"]["overall"],
        "between_centroids": quality["between_centroids"],
    }


def _valid(inputs: dict[str, pathlib.Path], path: pathlib.Path, total: int) -> np.ndarray:
    """bool[N]: extract's word; for features made elsewhere the pool of the split; else every row."""
    scores = inputs["extract"] / "scores.parquet" if "extract" in inputs else None
    if scores and scores.exists():
        valid = artifacts.read_parquet(scores)["valid"].astype(bool)
        if len(valid) != total:
            raise UserError(f"features {path} have {total} rows; expected {len(valid)}, one a record of {scores}")
    elif "dataset" in inputs:
        split = artifacts.read_json(inputs["dataset"] / "split.json")
        if split["n"] != total:
            raise UserError(
                f"features {path} have {total} rows; expected {split['n']}, one a record of {split['records']}"
            )
        valid = np.zeros(total, bool)
        valid[split["pool"]] = True
    else:
        valid = np.ones(total, bool)
    if not valid.any():
        raise UserError(f"none of the {total} records behind features {path} is valid; nothing can be clustered")
    return valid


def _finite(features: np.ndarray, path: pathlib.Path, block: int = 4096) -> np.ndarray:
    """The features with non-finite values set to zero, and said; raises `UserError` for values that are too large."""
    bad = 0
    for start in range(0, len(features), block):
        part = np.asarray(features[start : start + block])
        good = np.isfinite(part)
        if not good.all():
            features = np.array(features) if bad == 0 else features
            features[start : start + block] = np.where(good, part, 0)
            bad += int(np.sum(~good))
        largest = float(np.max(np.abs(features[start : start + block]), initial=0.0))
        if largest > kmeans.LARGEST:
            raise UserError(
                f"features {path} hold a value of magnitude {largest:g}; expected rows of about unit length, "
                f"at most {kmeans.LARGEST:g}"
            )
    if bad:
        say("cluster", f"warning: {bad} feature values were not finite and count as 0")
    return features


def _given(keys, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Centroids f32[K, D] and assignment i32[N] made elsewhere, checked against each other and the features."""
    if not (keys.centroids and keys.assignment):
        missing = "assignment" if keys.centroids else "centroids"
        raise UserError(f"cluster.{missing} is empty; centroids and assignment made elsewhere are given together")
    arrays = []
    for path in (keys.centroids, keys.assignment):
        try:
            arrays.append(np.load(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as a .npy file: {str(error).splitlines()[0]}") from error
    centroids, assignment = arrays
    if centroids.ndim != 2 or centroids.shape[1] != shape[1]:
        raise UserError(f"centroids {keys.centroids} have shape {centroids.shape}; the features have shape {shape}")
    if assignment.shape != shape[:1] or assignment.dtype.kind not in "iu":
        raise UserError(
            f"assignment {keys.assignment} has shape {assignment.shape} and type {assignment.dtype}; "
            f"expected {shape[:1]} integers, one a row of the features"
        )
    wrong = np.flatnonzero((assignment < -1) | (assignment >= len(centroids)))
    if len(wrong):
        raise UserError(
            f"assignment {keys.assignment} puts row {wrong[0]} in cluster {assignment[wrong[0]]}; "
            f"expected -1 (none) to {len(centroids) - 1}"
        )
    centroids = centroids.astype(np.float32)
    length = np.linalg.norm(centroids, axis=1, keepdims=True)
    return centroids / np.where(length > 0, length, 1), assignment.astype(np.int32)


def _fit(keys, usable: np.ndarray) -> kmeans.KMeansResult:
    for name in ("k", "iterations", "chunk"):
        if keys[name] < 1:
            raise UserError(f"cluster.{name} is {keys[name]}; expected at least 1")
    k = min(keys.k, len(usable))
    if k < keys.k:
        say("cluster", f"warning: cluster.k={keys.k} is above the {len(usable)} valid records; going on with {k}")
    with Progress("cluster", keys.iterations, "iterations") as progress:
        return kmeans.fit(
            usable,
            k,
            seed=keys.seed,
            iterations=keys.iterations,
            chunk=keys.chunk,
            on_iteration=lambda _, objective, moved: progress.advance(1, f"objective {objective:.5f}, {moved} moved"),
        )


def _quality(config, inputs, centroids, assignment, rows, cosine: np.ndarray) -> dict:
    """How tight the clusters are, how far apart, and how well they agree with the audit labels."""
    k, labels = len(centroids), assignment[rows]
    sizes = np.bincount(labels, minlength=k)
    within = np.bincount(labels, weights=cosine, minlength=k) / sizes
    total = np.sum(centroids, axis=0, dtype=np.float64)
    own = np.sum(centroids.astype(np.float64) ** 2)
    quality = {
        "within_cosine": {"overall": float(np.mean(cosine, dtype=np.float64)), "per_cluster": within.tolist()},
        "between_centroids": float((total @ total - own) / (k * (k - 1))) if k > 1 else None,
        "sizes": sizes.tolist(),
        "labels": {},
    }
    if "dataset" not in inputs:
        return quality
    records = source.load(artifacts.read_json(inputs["dataset"] / "split.json")["records"])
    shuffled = np.random.default_rng(config.cluster.seed).permutation(labels)
    for name in AUDIT_LABELS:
        values = [records[row].get(name) for row in rows]
        has = np.array([value is not None for value in values])
        classes = np.array([str(value) for value in values if value is not None])
        if len(set(classes.tolist())) > 1:
            measure = _against(classes, labels[has]), _against(classes, shuffled[has])
            quality["labels"][name] = {
                "records": int(has.sum()),
                "classes": len(set(classes.tolist())),
                "purity": measure[0][0],
                "purity_random": measure[1][0],
                "nmi": measure[0][1],
                "nmi_random": measure[1][1],
            }
    return quality


def _against(classes: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Purity (share of records in their cluster's most frequent class) and normalised mutual information."""
    _, classes = np.unique(classes, return_inverse=True)
    pairs, counts = np.unique(np.stack([labels, classes]), axis=1, return_counts=True)
    largest = np.zeros(labels.max() + 1, np.int64)
    np.maximum.at(largest, pairs[0], counts)
    return float(largest.sum() / len(labels)), float(normalized_mutual_info_score(classes, labels))


def _tell(quality: dict, k: int, records: int, dropped: int) -> None:
    say(
        "cluster",
        f"{records} records in {k} clusters, mean cosine to the centroid {quality['within_cosine']['overall']:.4f}",
    )
    if dropped:
        say("cluster", f"{dropped} clusters had no record and were dropped")
    if quality["between_centroids"] is not None and quality["between_centroids"] > COLLAPSE:
        say(
            "cluster",
            f"warning: centroids have a mean cosine of {quality['between_centroids']:.3f} to each other "
            f"(above {COLLAPSE}); the features hardly differ and the clusters tell little apart",
        )
    for name, value in quality["labels"].items():
        say(
            "cluster",
            f"{name} ({value['classes']} classes): purity {value['purity']:.3f} (random {value['purity_random']:.3f}), "
            f"normalised mutual information {value['nmi']:.3f} (random {value['nmi_random']:.3f})",
        )
