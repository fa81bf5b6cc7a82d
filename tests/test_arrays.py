"""`configs/arrays.py`: a selection from arrays alone, by the command as its document shows it; wrong arrays end in one
sentence and leave nothing."""

import json
import pathlib
import subprocess
import sys

import command
import numpy as np
import pytest

from coincide_jax.core import artifacts

K, N, WIDTH = 9, 300, 40
COLUMNS = ["cluster", "size", "transferability", "density", "score", "probability", "quota", "picked"]


@pytest.fixture
def folder(tmp_path):
    """Features, centroids and assignment made elsewhere."""
    rng = np.random.default_rng(0)
    label = np.concatenate([np.arange(K), rng.integers(0, K, N - K)])
    x = 1 + rng.normal(size=(K, WIDTH))[label] + 0.5 * rng.normal(size=(N, WIDTH))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    centroids = np.stack([x[label == i].astype(np.float64).mean(axis=0) for i in range(K)])
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    np.save(tmp_path / "tan_act.npy", x)
    np.save(tmp_path / "kmeans_centroids.npy", centroids.astype(np.float32))
    np.save(tmp_path / "nearest_cent.npy", label)
    return tmp_path


def arguments(folder, *more, clusters=True, layers=5, fraction=0.2) -> tuple[str, ...]:
    given = (
        f"--config.cluster.centroids={folder}/kmeans_centroids.npy",
        f"--config.cluster.assignment={folder}/nearest_cent.npy",
    )
    return (
        "--config=configs/arrays.py",
        f"--workdir={folder}/w",
        f"--config.extract.features={folder}/tan_act.npy",
        *(given if clusters else (f"--config.cluster.k={K}",)),
        f"--config.select.fraction={fraction}",
        "--config.select.variant=official",
        f"--config.extract.num_layers={layers}",
        *more,
    )


def run(folder, *more, **changes) -> tuple[int, str]:
    return command.call(*arguments(folder, *more, **changes))


def test_given_clusters(folder):
    status, output = run(folder)
    assert status == 0, output
    indices = np.load(folder / "w" / "select" / "indices.npy")
    assert indices.dtype == np.int64 and 0 < len(indices) <= N // 5 and str(folder / "w" / "select") in output
    table = artifacts.read_parquet(folder / "w" / "select" / "clusters.parquet")
    label = np.load(folder / "nearest_cent.npy")
    assert list(table) == COLUMNS and table["picked"].sum() == len(indices)
    np.testing.assert_array_equal(table["size"], np.bincount(label))
    np.testing.assert_array_equal(table["picked"], np.bincount(label[indices], minlength=K))
    assert {path.name for path in (folder / "w").iterdir()} == {".lock", "cluster", "select"}
    status, output = run(folder)
    assert status == 0 and output.count("complete · ") == 2


def test_clusters_made_here_and_features_from_a_store(folder):
    status, output = run(folder, clusters=False)
    assert status == 0, output
    centroids, assignment = (np.load(folder / "w" / "cluster" / f"{name}.npy") for name in ("centroids", "assignment"))
    assert centroids.shape == (K, WIDTH) and assignment.shape == (N,) and assignment.min() >= 0
    before = np.load(folder / "w" / "select" / "indices.npy")
    x = np.load(folder / "tan_act.npy")
    artifacts.create_features(folder / "tan_act.zarr", *x.shape).write(x).result()
    more = f"--workdir={folder}/z", f"--config.extract.features={folder}/tan_act.zarr", "--config.select.cache_mib=1"
    status, output = run(folder, *more, clusters=False)
    assert status == 0, output
    np.testing.assert_array_equal(np.load(folder / "z" / "select" / "indices.npy"), before)


def save(name, change):
    def wrong(folder):
        array = np.load(folder / name)
        np.save(folder / name, change(array))

    return wrong


def out_of_range(label):
    label[7] = K
    return label


WRONG = {
    "rows disagree": (save("nearest_cent.npy", lambda a: a[:-3]), {}, [f"({N - 3},)", f"({N},)", "nearest_cent.npy"]),
    "another width": (
        save("kmeans_centroids.npy", lambda a: a[:, :-2]),
        {},
        [f"({K}, {WIDTH - 2})", f"({N}, {WIDTH})", "kmeans_centroids.npy"],
    ),
    "out of range": (save("nearest_cent.npy", out_of_range), {}, ["row 7", f"cluster {K}", f"{K - 1}"]),
    "fraction 0": (None, {"fraction": 0.0}, ["select.fraction is 0.0", "at most 1"]),
    "fraction 1.2": (None, {"fraction": 1.2}, ["select.fraction is 1.2", "at most 1"]),
    "layers": (None, {"layers": 3}, [f"width {WIDTH}", "extract.num_layers = 3"]),
    "no features": (lambda folder: (folder / "tan_act.npy").unlink(), {}, ["tan_act.npy", "not exist"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_sentence_and_leaves_nothing(folder, name):
    spoil, changes, parts = WRONG[name]
    if spoil:
        spoil(folder)
    status, output = run(folder, **changes)
    last = output.strip().splitlines()[-1]
    assert status == 2 and last.startswith("coincide: ") and "Traceback" not in output
    assert all(part in last for part in parts), last
    left = {path.name for path in (folder / "w").rglob("*") if path.is_file()} if (folder / "w").exists() else set()
    assert left <= {".lock", "started.json"}


LIMITED = """
import resource, runpy, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
runpy.run_module("coincide_jax.main", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("limit", "which"), [(1500, "cluster/centroids.npy"), (3000, "/manifest.json"), (200, "started.json")]
)
def test_no_room_is_one_sentence_and_leaves_nothing_half_written(folder, limit, which):
    """A limit on the size of files stands for a full disk: the write of one fails in its middle."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *arguments(folder)],
        capture_output=True,
        text=True,
        cwd=command.ROOT,
        env=command.environment() | {"JAX_ENABLE_COMPILATION_CACHE": "0"},
        timeout=300,
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("coincide: ")]
    assert done.returncode == 2 and len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"{which} cannot be written: " in said[0], said[0]
    files = {path.name: path for path in (folder / "w").rglob("*") if path.is_file()}
    assert pathlib.Path(which).name not in files and not [name for name in files if name.endswith(".tmp")]
    for name, path in files.items():
        if name.endswith(".npy"):
            np.load(path)
        elif name.endswith(".json"):
            json.loads(path.read_text())
        elif name.endswith(".parquet"):
            artifacts.read_parquet(path)
