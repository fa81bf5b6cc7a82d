"""Stage 2: features → clusters of records that exercise the same concepts and skills.

Reads the features by rows and which records are valid, runs spherical k-means (or takes centroids and assignment made
elsewhere), drops empty clusters, and measures the result (`audit`), without labels and against those of the records.
Features are never held whole: they lie on the devices when they fit there, else every pass reads them from disk.
"""

import pathlib

import numpy as np

from coincide_jax.cluster import audit, centres
from coincide_jax.core import artifacts, store
from coincide_jax.core.errors import UserError, unknown
from coincide_jax.core.metrics import say
from coincide_jax.kernels import kmeans

STAGE_VERSION = 5
KEYS = ("cluster", "extract.features")
WARMUP_KEYS = (*KEYS, "curriculum.warmup_k")
GIVEN = "given.npy"
UNIT = 1e-5  # by which the length of a unit row of float32 is off 1 at most


def check(config) -> None:
    """Finds what `config.cluster` can get wrong, before anything runs.

    Raises:
      UserError: an unknown word, a number out of its range.
    """
    keys = config.cluster
    for name, valid in (("mode", centres.MODES), ("init", kmeans.INITS), ("product", centres.PRODUCTS)):
        if keys[name] not in valid:
            raise unknown(f"cluster.{name}", keys[name], valid)
    for name in ("k", "iterations", "chunk", "checkpoint_every", "sketch_rank"):
        if keys[name] < 1:
            raise UserError(f"cluster.{name} = {keys[name]}; expected 1 or more")
    for name in ("seed", "memory_mib", "max_points_per_centroid"):
        if keys[name] < 0:
            raise UserError(f"cluster.{name} = {keys[name]}; expected 0 or more")


def run(config, inputs: dict[str, pathlib.Path], out: pathlib.Path, mesh) -> dict:
    """Runs the stage; writes centroids.npy f32[K, D], assignment.npy i32[N], history.json, quality.json, audit.parquet;
    and given.npy i64[K], the numbers that clusters made elsewhere had, where some without a record were dropped.

    Raises:
      UserError: unknown mode, features that do not fit the data set, are not finite or too large, no valid record,
        centroids and assignment that do not fit each other or the features.
    """
    check(config)
    keys = config.cluster
    path = pathlib.Path(config.extract.features or inputs["extract"] / "features.zarr")
    features = store.open_features(path)
    rows = np.flatnonzero(_valid(inputs, path, len(features)))
    history, summary = {}, {"mode": keys.mode}
    try:
        if keys.centroids or keys.assignment:
            centroids, assignment = _given(keys, features.shape)
            labels = assignment[rows]
            rows, labels = rows[labels >= 0], labels[labels >= 0]
            if len(rows) == 0:
                raise UserError(f"{keys.assignment} assigns no valid record to a cluster")
            usable = store.Rows(features, rows)
        else:
            usable = store.Rows(features, rows)
            if keys.centre:
                usable = centres.Centred(usable)
            centroids, labels, history, more = centres.find(keys, usable, out, mesh)
            summary |= more
    except kmeans.RowError as error:
        raise UserError(
            f"features {path}: row {rows[error.row]} {error.what}; expected finite rows of about unit length, "
            f"magnitudes at most {kmeans.LARGEST:g}"
        ) from error
    full, dropped = np.unique(labels), len(centroids) - len(np.unique(labels))
    centroids, labels = centroids[full], np.searchsorted(full, labels).astype(np.int32)
    assignment = np.full(len(features), -1, np.int32)
    assignment[rows] = labels
    with centres.Passes("cluster") as passes:
        cosine = kmeans.cosines(usable, centroids, labels, passes)
    if len(bad := np.flatnonzero(~np.isfinite(cosine))):
        raise UserError(f"features {path}: row {rows[bad[0]]} is not finite")
    quality, columns = audit.measure(keys, inputs, usable, rows, centroids, labels, cosine, history)
    artifacts.write_npy(out / "centroids.npy", centroids)
    artifacts.write_npy(out / "assignment.npy", assignment)
    if isinstance(usable, centres.Centred):
        artifacts.write_npy(out / "mean.npy", usable.mean)  # the centroids are of rows less this
    artifacts.write_json(out / "history.json", history | {"dropped": dropped})
    artifacts.write_json(out / "quality.json", quality)
    artifacts.write_parquet(out / "audit.parquet", columns)
    artifacts.remove(out / GIVEN)
    if keys.centroids and dropped:
        artifacts.write_npy(out / GIVEN, full.astype(np.int64))
    artifacts.remove(out / centres.STATE)
    if dropped:
        say("cluster", f"{dropped} clusters had no record and were dropped")
    audit.tell(quality, len(centroids), len(rows))
    return summary | {
        "clusters": len(centroids),
        "records": len(rows),
        "dropped": dropped,
        "iterations": len(history.get("objective", ())),
        "within_cosine": quality["within_cosine"]["overall"],
        "between_centroids": quality["between_centroids"],
    }


def run_warmup(config, inputs: dict[str, pathlib.Path], out: pathlib.Path, mesh) -> dict:
    """The stage 'cluster/warmup': the same features in `curriculum.warmup_k` clusters, for PROGRESS to begin with."""
    one = config.copy_and_resolve_references().unlock()
    one.cluster.update(k=config.curriculum.warmup_k, centroids="", assignment="")
    return run(one.lock(), inputs, out, mesh)


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


def _given(keys, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Unit centroids f32[K, D] and assignment i32[N] made elsewhere, checked against each other and the features."""
    if not (keys.centroids and keys.assignment):
        missing = "assignment" if keys.centroids else "centroids"
        raise UserError(f"cluster.{missing} is empty; centroids and assignment made elsewhere are given together")
    arrays = []
    for path in (keys.centroids, keys.assignment):
        try:
            arrays.append(np.load(path))
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} cannot be read as a .npy file: {str(error).splitlines()[0]}") from error
        if not isinstance(arrays[-1], np.ndarray):
            raise UserError(f"{path} holds several arrays; expected one, as a .npy file does")
    centroids, assignment = arrays
    if centroids.ndim != 2 or centroids.shape[1] != shape[1]:
        raise UserError(f"centroids {keys.centroids} have shape {centroids.shape}; the features have shape {shape}")
    if not np.all(np.isfinite(centroids)):
        row = int(np.argmin(np.all(np.isfinite(centroids), axis=1)))
        raise UserError(f"centroids {keys.centroids}: row {row} is not finite")
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
    length = np.sqrt(np.einsum("ij,ij->i", centroids, centroids, dtype=np.float64))
    other = (length > 0) & (np.abs(length - 1) > UNIT)  # those of unit length stay as given, to the last digit
    centroids[other] /= length[other, None].astype(np.float32)
    return centroids, assignment.astype(np.int32)
