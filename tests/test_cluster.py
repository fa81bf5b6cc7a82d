"""The cluster stage: files, measures, what it does with odd and wrong input."""

import json
import re

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coincide_jax import cluster
from coincide_jax.cluster import audit, centres
from coincide_jax.core import artifacts, metrics, store
from coincide_jax.core.errors import UserError
from coincide_jax.kernels.kmeans import tiles
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
    store.create(tmp_path / "extract" / "features.zarr", N, WIDTH).write(0, x)
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


def test_agreement_with_labels_by_hand():
    classes, labels = ["a", "a", "b", "b", "b", None, "c"], np.array([0, 0, 0, 1, 1, 1, 1])
    told, purity, entropy = audit.against_label(classes, labels, labels[::-1], 3)
    assert told["records"] == 6 and told["classes"] == 3
    assert told["purity"] == pytest.approx((2 + 2) / 6)
    np.testing.assert_allclose(purity, [2 / 3, 2 / 3, np.nan])
    bits = -(2 / 3) * np.log2(2 / 3) - (1 / 3) * np.log2(1 / 3)
    np.testing.assert_allclose(entropy, [bits, bits, np.nan])
    assert told["entropy"] == pytest.approx(bits)
    told, _, _ = audit.against_label(["a", "a", "b", "b"], np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), 2)
    assert (told["purity"], told["nmi"], told["entropy"]) == (1.0, pytest.approx(1.0), 0.0)
    assert told["purity_random"] == 0.5 and told["entropy_random"] == 1.0
    assert audit.against_label(["a", "a", None], np.zeros(3, int), np.zeros(3, int), 1) is None


def test_audit_columns_and_duplicates(data):
    folder, x = data
    x[20], x[30] = x[10], x[10]
    np.save(folder / "features.npy", x)
    run(
        folder,
        extract=False,
        audit={"separation": True, "duplicates": 0.999, "pairs": 500, "stability": True, "cache_mib": 1},
    )
    centroids, assignment = load(folder)
    table = pq.read_table(folder / "out" / "audit.parquet").to_pydict()
    quality = json.loads((folder / "out" / "quality.json").read_text())
    rows = np.arange(10, N)
    exact = x[rows].astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    scores = exact @ centroids.T.astype(np.float64)
    own = scores[np.arange(len(rows)), assignment[rows]]
    scores[np.arange(len(rows)), assignment[rows]] = -2
    other = scores.max(axis=1)
    silhouette = (own - other) / np.maximum(1 - own, 1 - other)
    for k in range(len(centroids)):
        mine = assignment[rows] == k
        assert table["size"][k] == mine.sum() and table["cohesion"][k] == pytest.approx(own[mine].mean(), abs=1e-5)
        assert table["separation"][k] == pytest.approx(other[mine].mean(), abs=1e-5)
        assert table["silhouette"][k] == pytest.approx(silhouette[mine].mean(), abs=1e-4)
    pairs = {tuple(pair[:2]) for pair in quality["duplicates"]["sampled"]}
    assert pairs == {(10, 20), (10, 30), (20, 30)} and quality["duplicates"]["pairs"] == 3
    assert sum(table["duplicate_pairs"]) == 3 and {"purity_task", "entropy_concept"} <= table.keys()
    assert quality["stability"]["seed"] == 1235 and 0.3 < quality["stability"]["adjusted_rand"] <= 1
    off = {"separation": False, "duplicates": 1.0, "pairs": 500, "stability": False}
    run(folder, extract=False, audit=off, audit_labels=())
    assert set(pq.read_table(folder / "out" / "audit.parquet").column_names) == {"cluster", "size", "cohesion"}


def test_duplicates_that_are_not_compared_are_told(data, capsys):
    """40 copies of one row, of which 15 are compared: 105 pairs of the 780 there are."""
    folder, x = data
    x[10:50] = x[10]
    np.save(folder / "features.npy", x)
    off = {"separation": False, "duplicates": 0.9999, "stability": False, "cache_mib": 1}
    for most, pairs in ((15, 105), (300, 780)):
        run(folder, extract=False, audit=off | {"pairs": most}, audit_labels=())
        table = pq.read_table(folder / "out" / "audit.parquet").to_pydict()
        told = json.loads((folder / "out" / "quality.json").read_text())["duplicates"]
        assert told["pairs"] == pairs and table["duplicates_compared"] == [min(n, most) for n in table["size"]]
        cut = sum(n > most for n in table["size"])
        assert told["compared"] == sum(table["duplicates_compared"]) and told["records"] == 230
        assert told["cut"] == cut and (cut > 0) == (most == 15)
        said = f"of {cut} clusters only the first 15 records were compared, {told['compared']} of 230 in all"
        assert (said in capsys.readouterr().out) == (most == 15)


def test_stability_is_that_of_the_clustering_that_was_made(data, monkeypatch, capsys):
    """The same mode, start and sample from the next seed: its labels are those of a run from that seed."""
    folder, _ = data
    made = {"k": 9, "mode": "sketch", "sketch_rank": 20, "init": "k-means||", "max_points_per_centroid": 12}
    run(folder, **made, seed=8)
    other = load(folder)[1]
    calls, real = [], audit.adjusted_rand_score
    monkeypatch.setattr(audit, "adjusted_rand_score", lambda a, b: calls.append(b) or real(a, b))
    audits = {"separation": False, "duplicates": 1.0, "pairs": 500, "stability": True}
    run(folder, **made, seed=7, audit=audits)
    np.testing.assert_array_equal(
        np.unique(other[10:], return_inverse=True)[1], np.unique(calls[0], return_inverse=True)[1]
    )
    told = json.loads((folder / "out" / "quality.json").read_text())["stability"]
    assert told["seed"] == 8 and told["mode"] == "sketch" and told["init"] == "k-means||"
    assert told["max_points_per_centroid"] == 12
    said = "with the clusters of seed 8 (mode=sketch, init=k-means||, max_points_per_centroid=12, as here)"
    assert said in capsys.readouterr().out


def test_separation_keeps_to_the_memory(data, monkeypatch):
    """The same cosines from tiles as small as the memory says."""
    folder, x = data
    run(folder)
    centroids, assignment = load(folder)
    rows, labels = x[10:], assignment[10:]
    cosine, put, sizes = audit.kmeans.cosines(rows, centroids, labels), audit.put, []
    monkeypatch.setattr(audit, "put", lambda array, at: sizes.append(len(array)) or put(array, at))
    with jax.set_mesh(jax.make_mesh((2, 1), ("data", "model"), devices=jax.devices()[:2])):
        whole = audit.separation(rows, centroids, labels, cosine, 230, 0)
        assert max(sizes) == 230
        sizes.clear()
        parts = audit.separation(rows, centroids, labels, cosine, 230, 100_000)
    assert len(centroids) <= max(sizes) < 50
    for left, right in zip(whole, parts, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


def test_devices_that_share_the_clusters_write_the_same_files(data, monkeypatch):
    """Seven clusters on four devices; separation has them shared as well."""
    folder, _ = data
    wanted, real = [], jax.make_mesh
    for share in (tiles.SPLIT, 0.0):
        monkeypatch.setattr(tiles, "SPLIT", share)
        monkeypatch.setattr(jax, "make_mesh", lambda shape, *rest, **keys: real((2, 4), *rest, **keys))
        run(folder, count=8, k=7)
        table = pq.read_table(folder / "out" / "audit.parquet").to_pydict()
        found = [*load(folder), np.stack([table["separation"], table["silhouette"]])]
        wanted = wanted or found
    for left, right in zip(wanted[:2], found[:2], strict=True):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_allclose(wanted[2], found[2], atol=1e-5)


def test_every_pass_says_how_far_it_is_and_short_ones_nothing(data, capsys, monkeypatch):
    folder, _ = data
    keys = {"mode": "sketch", "sketch_rank": 20, "init": "k-means||", "centre": True, "chunk": 16}
    keys["audit"] = {"separation": True, "duplicates": 0.99, "pairs": 500, "stability": True}
    keys["max_points_per_centroid"] = 30
    run(folder, **keys)
    assert "/s · " not in capsys.readouterr().out
    monkeypatch.setattr(metrics, "LOG_EVERY_SECONDS", 0.0)
    run(folder, **keys)
    said = capsys.readouterr().out
    passes = ("tiles measured", "tiles projected", "tiles assigned", "tiles met with drawn rows")
    for stage, units in (
        ("cluster", (*passes, "iterations of the sketch", "iterations", "rows of the mean")),
        ("cluster", ("rows met with their centroid",)),
        ("audit", (*passes, "iterations", "records", "records compared")),
    ):
        for unit in units:
            found = re.findall(rf"\[{stage}\] (\d+)/(\d+) {re.escape(unit)} · [\d.]+/s · (\d+) s left", said)
            assert found and all(0 < int(done) <= int(of) for done, of, _ in found), (stage, unit)
    assert re.search(r"\[cluster\] (12|15)/\1 tiles measured", said)  # 180 and 230 rows


def test_same_labels_streamed_sampled_and_in_any_product(data):
    folder, _ = data
    run(folder, k=15)
    whole = load(folder)
    for keys in ({"memory_mib": 1, "chunk": 16}, {"product": "bfloat16"}, {"product": "float16", "chunk": 7}):
        run(folder, k=15, **keys)
        for a, b in zip(whole, load(folder), strict=True):
            np.testing.assert_array_equal(a, b)
    summary = run(folder, k=5, max_points_per_centroid=8)
    _, assignment = load(folder)
    assert summary["records"] == 230 and np.all(assignment[10:] >= 0)


def test_centring_takes_the_common_direction_out(data, capsys):
    folder, x = data
    shifted = np.ones_like(x) + x / 4
    shifted = (shifted / np.linalg.norm(shifted.astype(np.float32), axis=1, keepdims=True)).astype(np.float16)
    np.save(folder / "features.npy", shifted)
    raw = run(folder, extract=False)["between_centroids"]
    assert "the features hardly differ" in capsys.readouterr().out
    centred = run(folder, extract=False, centre=True)["between_centroids"]
    assert raw > 0.95 > 0.3 > centred and "hardly differ" not in capsys.readouterr().out


def test_sketch_reaches_the_objective_and_says_so(data):
    folder, _ = data
    exact = run(folder)
    sketched = run(folder, mode="sketch", sketch_rank=20)
    assert sketched["mode"] == "sketch" and sketched["sketch"]["energy"] > 0.5
    assert sketched["within_cosine"] >= exact["within_cosine"] * (1 - 2e-3)
    poor = run(folder, mode="sketch", sketch_rank=2)
    assert poor["sketch"]["energy"] < 0.5 and poor["sketch"]["iterations"] == 0


def test_an_interrupted_clustering_goes_on_to_the_same_files(data, capsys, monkeypatch):
    folder, _ = data
    run(folder, k=20)
    wanted = load(folder)
    real, calls = centres._save, []

    def killed(path, state):
        real(path, state)
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(centres, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(folder, k=20)
    state = (folder / "out" / "state.npz").read_bytes()
    monkeypatch.setattr(centres, "_save", real)
    run(folder, k=20, count=1, chunk=50)
    assert "goes on after iteration 2" in capsys.readouterr().out
    for a, b in zip(wanted, load(folder), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not (folder / "out" / "state.npz").exists()
    damaged = bytearray(state)
    damaged[len(state) // 2] ^= 1
    for content in (bytes(damaged), state[:-100]):
        (folder / "out" / "state.npz").write_bytes(content)
        run(folder, k=20)
        assert "is damaged; the clustering begins again" in capsys.readouterr().out


def test_scattered_rows_are_read_in_parts(data, monkeypatch):
    """Each part decodes two chunks of the store at most; rows come in the order that was asked for, twice if asked."""
    folder, x = data
    monkeypatch.setattr(artifacts, "CHUNK_ROWS", 16)
    monkeypatch.setattr(artifacts, "SHARD_ROWS", 64)
    monkeypatch.setattr(store, "IN_WORK", 2 * 16 * WIDTH * 2)
    writer = store.create(folder / "many.zarr", N, WIDTH)
    for first in writer.shards:
        writer.write(first, x[first : first + 64])
    features, parts = store.open_features(folder / "many.zarr"), []
    read = features._read
    monkeypatch.setattr(features, "_read", lambda part: parts.append(part.shape) or read(part))
    rows = np.random.default_rng(0).integers(0, N, 100)
    np.testing.assert_array_equal(features[rows], x[rows])
    assert len(parts) == 8 and sum(shape[0] for shape in parts) == 100
    np.testing.assert_array_equal(features[np.arange(N) % 7 == 0], x[::7])
    assert features[np.zeros(0, int)].shape == (0, WIDTH)


def test_more_clusters_than_records_goes_on_with_a_warning(data, capsys):
    folder, _ = data
    assert run(folder, k=1000)["clusters"] == 230
    assert "cluster.k=1000 is above the 230 valid records" in capsys.readouterr().out


def test_duplicates_drop_clusters_and_a_row_that_is_not_finite_is_named(data, capsys):
    folder, x = data
    x = np.repeat(x[:4], N // 4, axis=0)
    np.save(folder / "features.npy", x)
    summary = run(folder, extract=False, k=9)
    _, assignment = load(folder)
    assert summary["dropped"] == 5 and summary["clusters"] == 4
    assert np.all(assignment[:10] == -1)  # not in the pool
    assert "were dropped" in capsys.readouterr().out
    for value in (np.nan, np.inf):
        x[5, 0], x[N - 1, 3] = value, value  # row 5 is not in the pool
        np.save(folder / "features.npy", x)
        for keys in ({}, {"centre": True}):
            with pytest.raises(UserError, match=f"features.npy: row {N - 1} is not finite"):
                run(folder, extract=False, k=9, **keys)


@pytest.mark.parametrize("keys", [{}, {"max_points_per_centroid": 20}, {"centre": True}])
def test_a_sketch_names_the_row_that_is_not_finite(data, keys):
    """Not the first one, which a basis with NaN in it makes look bad as well, and by its number in the file."""
    folder, x = data
    for value, row in ((np.nan, 57), (np.inf, N - 1)):
        wrong = x.copy()
        wrong[row, 3], wrong[5, 0] = value, value  # row 5 is not in the pool
        np.save(folder / "features.npy", wrong)
        with pytest.raises(UserError, match=f"features.npy: row {row} is not finite"):
            run(folder, extract=False, mode="sketch", sketch_rank=20, **keys)


def test_what_linear_algebra_finds_is_one_sentence(data, monkeypatch):
    folder, _ = data

    def fails(_):
        raise np.linalg.LinAlgError("Eigenvalues did not converge")

    monkeypatch.setattr(np.linalg, "eigh", fails)
    with pytest.raises(UserError, match="Eigenvalues did not converge"):
        run(folder, mode="sketch", sketch_rank=20)


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
        ({"k": 0}, "cluster.k = 0; expected 1 or more"),
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
    with pytest.raises(UserError, match="expected finite rows of about unit length"):
        run(folder, extract=False)
    pq.write_table(pa.table({"valid": np.zeros(N, bool)}), folder / "extract" / "scores.parquet")
    with pytest.raises(UserError, match=f"none of the {N} records"):
        run(folder)
