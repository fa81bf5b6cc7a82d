"""The cluster stage: files, measures, what it does with odd and wrong input."""

import json

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coincide_jax import cluster
from coincide_jax.core import artifacts
from coincide_jax.core.errors import UserError
from configs import common

N, WIDTH, LABELS = 240, 60, 6


@pytest.fixture
def data(tmp_path):
    """Folders of a data set and of its features; rows 0-9 are not valid. Labels are the true clusters."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, LABELS, N)
    x = rng.normal(size=(LABELS, WIDTH))[label] + 0.3 * rng.normal(size=(N, WIDTH))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    records = [
        {"id": f"r{i}", "task": f"t{k}", "concept": f"c{k % 2}", "conversations": []} for i, k in enumerate(label)
    ]
    (tmp_path / "records.json").write_text(json.dumps(records))
    for name in ("dataset", "extract", "out"):
        (tmp_path / name).mkdir()
    split = {"records": str(tmp_path / "records.json"), "n": N, "pool": list(range(10, N))}
    (tmp_path / "dataset" / "split.json").write_text(json.dumps(split))
    store = artifacts.create_features(tmp_path / "extract" / "features.zarr", N, WIDTH)
    store.write(x).result()
    pq.write_table(pa.table({"valid": np.arange(N) >= 10}), tmp_path / "extract" / "scores.parquet")
    return tmp_path, x


def run(folder, count=2, extract=True, **keys):
    config = common.defaults()
    config.cluster.update({"k": LABELS, "chunk": 64} | keys)
    if not extract:
        config.extract.features = str(folder / "features.npy")
    inputs = {name: folder / name for name in (("dataset", "extract") if extract else ("dataset",))}
    mesh = jax.make_mesh((count, 1), ("data", "model"), devices=jax.devices()[:count])
    with jax.set_mesh(mesh):
        return cluster.run(config, inputs, folder / "out", mesh)


def load(folder):
    return [np.load(folder / "out" / f"{name}.npy") for name in ("centroids", "assignment")]


def test_files_and_measures(data, capsys):
    folder, x = data
    summary = run(folder)
    centroids, assignment = load(folder)
    assert centroids.dtype == np.float32 and centroids.shape == (summary["clusters"], WIDTH)
    assert assignment.dtype == np.int32 and np.all(assignment[:10] == -1) and np.all(assignment[10:] >= 0)
    assert set(assignment[10:]) == set(range(summary["clusters"]))
    quality = json.loads((folder / "out" / "quality.json").read_text())
    exact = x[10:].astype(np.float64)
    cosine = np.sum(exact * centroids[assignment[10:]], axis=1) / np.linalg.norm(exact, axis=1)
    assert quality["within_cosine"]["overall"] == pytest.approx(cosine.mean(), abs=1e-6)
    assert quality["within_cosine"]["per_cluster"][2] == pytest.approx(cosine[assignment[10:] == 2].mean(), abs=1e-6)
    assert set(quality["labels"]) == {"task", "concept"}  # no record has a skill
    task = quality["labels"]["task"]
    assert task["purity"] > 0.7 > task["purity_random"] and task["nmi"] > 0.7 > 0.2 > task["nmi_random"]
    history = json.loads((folder / "out" / "history.json").read_text())
    assert len(history["objective"]) == len(history["moved"]) == summary["iterations"]
    assert "mean cosine to the centroid" in capsys.readouterr().out


def test_purity_by_hand():
    classes, labels = np.array(["a", "a", "b", "b", "b", "c"]), np.array([0, 0, 0, 1, 1, 1])
    assert cluster._against(classes, labels)[0] == pytest.approx((2 + 2) / 6)
    assert cluster._against(classes, np.array([0, 0, 1, 1, 1, 2])) == pytest.approx((1.0, 1.0))


def test_bitwise_equal_on_one_and_eight_devices(data):
    folder, _ = data
    files = []
    for count, chunk in ((1, 4096), (8, 32)):
        run(folder, count, chunk=chunk, k=15)
        files.append(
            [(folder / "out" / name).read_bytes() for name in ("centroids.npy", "assignment.npy", "history.json")]
        )
    assert files[0] == files[1]


def test_more_clusters_than_records_goes_on_with_a_warning(data, capsys):
    folder, _ = data
    assert run(folder, k=1000)["clusters"] == 230
    assert "cluster.k=1000 is above the 230 valid records" in capsys.readouterr().out


def test_duplicates_drop_clusters_and_non_finite_values_are_zero(data, capsys):
    folder, x = data
    x = np.repeat(x[:4], N // 4, axis=0)
    x[N - 1, :] = np.nan
    np.save(folder / "features.npy", x)
    summary = run(folder, extract=False, k=9)
    _, assignment = load(folder)
    assert summary["dropped"] == 5 and summary["clusters"] == 4
    assert np.all(assignment[:10] == -1)  # not in the pool
    out = capsys.readouterr().out
    assert "were dropped" in out and f"{WIDTH} feature values were not finite" in out


def test_collapsed_features_are_told(data, capsys):
    folder, x = data
    x = np.ones_like(x) + x / 10
    np.save(
        folder / "features.npy", (x / np.linalg.norm(x.astype(np.float32), axis=1, keepdims=True)).astype(np.float16)
    )
    run(folder, extract=False)
    assert "the features hardly differ" in capsys.readouterr().out


def test_clusters_made_elsewhere(data):
    folder, _ = data
    run(folder)
    centroids, assignment = load(folder)
    empty = np.concatenate([centroids[:2], centroids[:1], centroids[2:]])  # cluster 2 of these has no record
    elsewhere = np.where(assignment >= 2, assignment + 1, assignment)
    np.save(folder / "c.npy", (2 * empty).astype(np.float16))
    np.save(folder / "a.npy", elsewhere.astype(np.int64))
    given = {"centroids": str(folder / "c.npy"), "assignment": str(folder / "a.npy")}
    summary = run(folder, **given)
    assert summary["dropped"] == 1 and summary["iterations"] == 0
    found, labels = load(folder)
    np.testing.assert_array_equal(labels, assignment)
    np.testing.assert_allclose(found, centroids, atol=1e-3)


def test_wrong_input_is_one_sentence(data):
    folder, x = data
    np.save(folder / "c.npy", np.ones((5, WIDTH + 1), np.float32))
    np.save(folder / "good.npy", np.ones((5, WIDTH), np.float32))
    np.save(folder / "short.npy", np.zeros(N - 1, np.int32))
    np.save(folder / "a.npy", np.full(N, 5))
    path = {name: str(folder / f"{name}.npy") for name in ("c", "good", "short", "a")}
    cases = [
        ({"mode": "exakt"}, "did you mean 'exact'"),
        ({"k": 0}, "cluster.k is 0"),
        ({"centroids": path["good"]}, "cluster.assignment is empty"),
        ({"centroids": path["c"], "assignment": path["a"]}, rf"shape \(5, {WIDTH + 1}\).*shape \({N}, {WIDTH}\)"),
        ({"centroids": path["good"], "assignment": path["short"]}, rf"shape \({N - 1},\).*expected \({N},\)"),
        ({"centroids": path["good"], "assignment": path["a"]}, "row 0 in cluster 5; expected -1"),
        ({"centroids": path["good"], "assignment": str(folder / "none.npy")}, "none.npy cannot be read"),
    ]
    for keys, message in cases:
        with pytest.raises(UserError, match=message):
            run(folder, **keys)
    np.save(folder / "features.npy", x[:-1])
    with pytest.raises(UserError, match=f"have {N - 1} rows; expected {N}"):
        run(folder, extract=False)
    np.save(folder / "features.npy", x * np.float16(200))
    with pytest.raises(UserError, match="expected rows of about unit length"):
        run(folder, extract=False)
    pq.write_table(pa.table({"valid": np.zeros(N, bool)}), folder / "extract" / "scores.parquet")
    with pytest.raises(UserError, match=f"none of the {N} records"):
        run(folder)
