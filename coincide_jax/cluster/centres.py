"""Runs k-means for the stage: budget, start, mode, checkpoints, what is shown meanwhile."""

import contextlib
import hashlib
import os
import pathlib
import time
from collections.abc import Iterator

import numpy as np

from coincide_jax.core import artifacts, processes
from coincide_jax.core.errors import UserError
from coincide_jax.core.metrics import Progress, say
from coincide_jax.core.store import Rows
from coincide_jax.kernels import kmeans
from coincide_jax.kernels.kmeans import sketch

MODES = ("exact", "sketch")
PRODUCTS = ("auto", "float32", "bfloat16", "float16")
STATE = "state.npz"  # where the clustering stands; gone when the stage is complete
NOTES = "sketch.json"  # what the sketch was
SEAL = 32  # bytes of a SHA-256
POLISH = 5e-4  # share by which an iteration raises the objective, below which a sketch's exact polish stops


class Passes:
    """Shows how far a pass over the rows is: the `on_tile` of the kernels. A pass of under 10 s says nothing."""

    def __init__(self, stage: str):
        self.stage, self.shown = stage, None

    def __call__(self, what: str, done: int, of: int) -> None:
        """`done` of `of`; 0 begins another pass, all ends it."""
        if done == 0 or self.shown is None:
            self.close()
            self.shown = Progress(self.stage, of, what, first=done)
        elif done > self.shown.done:
            self.shown.advance(done - self.shown.done)
        if done >= of:
            self.close()

    def close(self) -> None:
        """Ends the pass that is shown."""
        if self.shown is not None:
            self.shown.bar.close()
        self.shown = None

    def __enter__(self) -> "Passes":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Centred:
    """Features less their mean, by the interface of features: float32 rows on the grid that exact sums need."""

    def __init__(self, features, block: int = 1024):
        self.features, self.shape, self.dtype = features, features.shape, np.dtype(np.float32)
        total = np.zeros(self.shape[1])  # exact for multiples of 2^-24, so free of order
        with Progress("cluster", len(features), "rows of the mean") as progress:
            for start in range(0, len(features), block):
                part = features[start : start + block].astype(np.float64)
                bad = np.flatnonzero(~np.isfinite(part).all(axis=1))
                if len(bad):
                    raise kmeans.RowError(start + int(bad[0]), "is not finite")
                total += np.sum(np.rint(part * 2.0**24), axis=0)
                progress.advance(len(part))
        self.mean = (total / (2.0**24 * max(len(features), 1))).astype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows) -> np.ndarray:
        return self.features[rows].astype(np.float32) - self.mean


def find(keys, usable, out: pathlib.Path, mesh) -> tuple[np.ndarray, np.ndarray, dict, dict]:
    """Clusters the usable rows.

    Returns:
      centroids f32[K, D], labels i32[n], history {name: list}, what the stage's summary tells.

    Raises:
      UserError: what k-means finds wrong with the keys.
    """
    k = min(keys.k, len(usable))
    if k < keys.k:
        say(
            "cluster",
            f"warning: cluster.k={keys.k} is above the {len(usable)} valid records; going on with {k}: "
            "every record is a cluster of its own, and nothing is left to choose inside it; a tenth as many tell more",
        )
    result, labels, told = _fit(keys, usable, k, keys.seed, out)
    history = {name: getattr(result, name).tolist() for name in kmeans.HISTORY}
    history["moved_share"] = (result.moved / len(result.assignment)).tolist()
    if told:
        history["sketch"] = told
    return result.centroids, labels, history, {"resident": result.resident} | ({"sketch": told} if told else {})


def again(keys, usable, seed: int) -> tuple[kmeans.KMeansResult, np.ndarray]:
    """The clustering that `find` makes, from another seed, with its labels i32[n]; nothing is written."""
    result, labels, _ = _fit(keys, usable, min(keys.k, len(usable)), seed, None)
    return result, labels


def _fit(keys, usable, k: int, seed: int, out: pathlib.Path | None) -> tuple[kmeans.KMeansResult, np.ndarray, dict]:
    """What k-means makes of the usable rows, or of a sample of them; labels i32[n] of all; what the sketch was. Without
    a folder nothing is written, nor told but how far it is."""
    memory, sample, chosen = keys.memory_mib << 20, usable, np.arange(len(usable))
    most = keys.max_points_per_centroid * k
    if 0 < most < len(usable):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(usable))[:most])
        sample = Rows(usable, chosen)
        if out:
            say("cluster", f"centroids from {most} of {len(usable)} records (cluster.max_points_per_centroid)")
    settings = {"seed": seed, "iterations": keys.iterations, "chunk": keys.chunk, "memory": memory}
    settings["product"] = keys.product
    start, told, tiles = keys.init, {}, None
    resume = _resume(out / STATE, len(sample), k, sample.shape[1]) if out else None
    stage = "cluster" if out else "audit"
    with _told(chosen), Passes(stage) as passes:
        if keys.mode == "sketch" and resume is not None:
            if (out / NOTES).exists():
                told = artifacts.read_json(out / NOTES)
        elif keys.mode == "sketch":
            begin = time.perf_counter()
            tiles = kmeans.lay_out(sample, k, keys.chunk, memory, keys.product, passes)
            with Progress(stage, keys.iterations, "iterations of the sketch") as progress:
                first, told = sketch.start(
                    sample,
                    k,
                    **settings,
                    rank=keys.sketch_rank,
                    init=start,
                    source=tiles,
                    on_iteration=lambda at: progress.advance(1, _note(at, len(sample))),
                )
            start = start if first is None else first
            told["seconds"] = time.perf_counter() - begin
            if out:
                _tell(out, told)
        before = 0 if resume is None else len(resume.history)
        with Progress(stage, keys.iterations, "iterations", first=before) as progress:
            result = kmeans.fit(
                sample,
                k,
                **settings,
                init=start,
                tolerance=POLISH if keys.mode == "sketch" else None,
                on_iteration=lambda at: progress.advance(1, _note(at, len(sample))),
                on_state=(lambda state: _save(out / STATE, state)) if out else None,
                state_every=keys.checkpoint_every,
                resume=resume,
                on_tile=passes,
                tiles=tiles,
            )
    if sample is usable:
        return result, result.assignment, told
    tiles = None  # their memory is wanted for the others
    with _told(np.arange(len(usable))), Passes(stage) as passes:
        labels, _ = kmeans.assign(usable, result.centroids, keys.chunk, memory, keys.product, passes)
    return result, labels, told


def _tell(out: pathlib.Path, told: dict) -> None:
    """Says what the sketch was, and writes it for a run that is resumed behind it."""
    artifacts.write_json(out / NOTES, told)
    what = f"{told['iterations']} iterations there" if told["iterations"] else "too little: all iterations are exact"
    say("cluster", f"sketch of {told['rank']} directions with {told['energy']:.1%} of the squared lengths: {what}")


@contextlib.contextmanager
def _told(rows: np.ndarray) -> Iterator[None]:
    """Names a row of `rows` by its number among the usable ones; turns what else is wrong into one sentence."""
    try:
        yield
    except kmeans.RowError as error:
        raise kmeans.RowError(int(rows[error.row]), error.what) from error
    except ValueError as error:  # a LinAlgError too
        raise UserError(str(error)) from error


def _note(at: dict, rows: int) -> str:
    """What is shown of an iteration."""
    return (
        f"objective {at['objective']:.5f} · {at['moved'] / rows:.2%} moved · {at['empties']} empty · "
        f"imbalance {at['imbalance']:.2f} · {at['seconds']:.2f} s"
    )


def _save(path: pathlib.Path, state: kmeans.State) -> None:
    """Writes the state, and behind it the SHA-256 of what stands before."""
    if not processes.leads():
        return
    with artifacts.atomic(path) as temporary, open(temporary, "w+b") as file:
        np.savez(file, **state._asdict())
        file.seek(0)
        seal = hashlib.file_digest(file, "sha256").digest()
        file.seek(0, os.SEEK_END)
        file.write(seal)


def _whole(path: pathlib.Path) -> bool:
    """Whether a file is as `_save` left it. Asked before it is parsed: of damaged bytes zipfile and NumPy make nearly
    any exception."""
    data = path.read_bytes()
    return hashlib.sha256(memoryview(data)[:-SEAL]).digest() == data[-SEAL:]


def _resume(path: pathlib.Path, rows: int, k: int, width: int) -> kmeans.State | None:
    """The state that an interrupted run left, if it is whole and of this clustering."""
    if not processes.led(path.exists):
        return None
    state = None
    if path.exists() and _whole(path):
        with np.load(path) as held:
            state = kmeans.State(**held)
    found = processes.told(None if state is None else len(state.history))
    if len(set(found)) > 1:
        raise UserError(f"processes read {path} unlike: iterations {found}; expected a folder that all see alike")
    shapes = state and (state.centroids.shape, state.assignment.shape, state.history.shape[1:])
    if shapes != ((k, width), (rows,), (len(kmeans.HISTORY),)):
        say("cluster", f"{path} is damaged; the clustering begins again")
        return None
    say("cluster", f"goes on after iteration {len(state.history)}")
    return state
