"""The selection stage: its files, its budget, and what it must not see."""

import json

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from coincide_jax import cluster, selection
from coincide_jax.core import artifacts
from coincide_jax.core.errors import UserError
from coincide_jax.extract import activations
from configs import common

N, WIDTH = 260, 40


@pytest.fixture
def folder(tmp_path):
    """A data set of records with every field, its features, and their clusters."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 9, N)
    x = 1 + rng.normal(size=(9, WIDTH))[kind] + 0.5 * rng.normal(size=(N, WIDTH))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    x[:6] = 0  # held out
    for name in ("dataset", "extract", "cluster", "select"):
        (tmp_path / name).mkdir()
    records = [
        {
            "id": f"r{i}",
            "image": f"{i}.png",
            "task": f"t{k}",
            "concept": f"c{k}",
            "skill": f"s{k}",
            "source": f"f{i % 4}",
            "origin": f"o{i % 5}",
            "conversations": [{"from": "human", "value": f"<image>\nwhat {i}?"}, {"from": "gpt", "value": "ä"}],
        }
        for i, k in enumerate(kind)
    ]
    write_records(tmp_path, records)
    artifacts.create_features(tmp_path / "extract" / "features.zarr", N, WIDTH).write(x).result()
    run(tmp_path, stage=cluster, out="cluster")
    return tmp_path


def write_records(folder, records):
    (folder / "records.json").write_text(json.dumps(records), encoding="utf-8")
    split = {"records": str(folder / "records.json"), "n": N, "pool": list(range(6, N))}
    (folder / "dataset" / "split.json").write_text(json.dumps(split))


def run(folder, stage=selection, out="select", count=2, match=None, clusters=True, num_layers=2, **keys):
    config = common.defaults()
    config.extract.num_layers = num_layers
    config.cluster.update({"k": 12, "chunk": 64})
    config.select.update(keys)
    (folder / out).mkdir(exist_ok=True)
    inputs = {name: folder / name for name in ("dataset", "extract", *(["cluster"] if clusters else []))}
    inputs |= {"match": folder / match} if match else {}
    mesh = jax.make_mesh((count, 1), ("data", "model"), devices=jax.devices()[:count])
    with jax.set_mesh(mesh):
        return stage.run(config, inputs, folder / out, mesh)


def test_files_are_the_contract(folder, capsys):
    summary = run(folder, variant="paper")
    out = folder / "select"
    indices = np.load(out / "indices.npy")
    assert indices.dtype == np.int64 and indices.shape == (int(0.2 * (N - 6)),) and summary["shortfall"] == 0
    records = json.loads((folder / "records.json").read_text())
    assert json.loads((out / "coreset.json").read_text()) == [records[i] for i in sorted(indices)]
    assignment = np.load(folder / "cluster" / "assignment.npy")
    rows = pq.read_table(out / "records.parquet").to_pydict()
    assert rows["index"] == list(indices) and rows["id"] == [f"r{i}" for i in indices]
    assert rows["cluster"] == list(assignment[indices]) and set(rows) >= {"rank", "score"}
    table = artifacts.read_parquet(out / "clusters.parquet")
    expected = ["cluster", "size", "transferability", "density", "score", "probability", "quota", "picked"]
    assert list(table) == expected
    np.testing.assert_array_equal(table["size"], np.bincount(assignment[assignment >= 0]))
    np.testing.assert_array_equal(table["picked"], np.bincount(assignment[indices], minlength=len(table["size"])))
    np.testing.assert_array_equal(table["picked"], table["quota"])
    assert f"coincide: {len(indices)} of 254 records" in capsys.readouterr().out


def transferability(folder, num_layers: int) -> np.ndarray:
    """Of the clusters, by the stage with `extract.num_layers` as given."""
    run(folder, num_layers=num_layers)
    return artifacts.read_parquet(folder / "select" / "clusters.parquet")["transferability"]


def test_layers_are_those_that_were_extracted(folder):
    """A decoder of depth 4 has 4 taps where 5 are asked for; the features' width alone would let 5 pass."""
    four, five = transferability(folder, 4), transferability(folder, 5)
    assert np.abs(four - five).max() > 1e-3
    asked = common.defaults().extract
    asked.num_layers = 5
    taps = list(activations.choose_taps(asked, depth=4))
    artifacts.write_json(folder / "extract" / "manifest.json", {"summary": {"taps": taps}})
    np.testing.assert_array_equal(transferability(folder, 5), four)
    # features made elsewhere: the config is asked
    artifacts.write_json(folder / "extract" / "manifest.json", {"summary": {"taps": []}})
    np.testing.assert_array_equal(transferability(folder, 5), five)


def test_shortfall_is_told_and_matched(folder, capsys):
    summary = run(folder, tau=2.0, fraction=0.95)
    assert summary["shortfall"] == summary["budget"] - summary["records"] > 0
    assert f"{summary['shortfall']} records below the budget of {summary['budget']}" in capsys.readouterr().out
    for clusters in (True, False):
        beside = run(folder, name="random", out="beside", match="select", clusters=clusters)
        assert beside["records"] == summary["records"]
    assert len(np.load(folder / "beside" / "indices.npy")) == summary["records"]


def test_random_has_cluster_columns_where_there_are_clusters(folder):
    run(folder, name="random", out="with")
    run(folder, name="random", out="without", clusters=False)
    table = artifacts.read_parquet(folder / "with" / "clusters.parquet")
    assert list(table) == ["cluster", "size", "picked"] and table["picked"].sum() == int(0.2 * (N - 6))
    assert not (folder / "without" / "clusters.parquet").exists()
    one, other = (np.load(folder / name / "indices.npy") for name in ("with", "without"))
    np.testing.assert_array_equal(one, other)
    assert one.min() >= 6  # held out rows are never chosen


def test_one_device_equals_eight(folder):
    files = []
    for count in (1, 8):
        run(folder, stage=cluster, out="cluster", count=count)
        run(folder, count=count)
        files.append((folder / "select" / "indices.npy").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("name", sorted(selection.SELECTORS))
def test_forbidden_fields_change_nothing(folder, name):
    run(folder, name=name)
    before = (folder / "select" / "indices.npy").read_bytes()
    records = json.loads((folder / "records.json").read_text())
    order = np.random.default_rng(1).permutation(N)
    fields = ("task", "concept", "skill", "source", "origin", "id", "image")
    write_records(
        folder, [record | {f: records[j][f] for f in fields} for record, j in zip(records, order, strict=True)]
    )
    run(folder, stage=cluster, out="cluster")
    run(folder, name=name)
    assert (folder / "select" / "indices.npy").read_bytes() == before


def test_wrong_input_is_one_sentence(folder):
    cases = [
        ({"name": "coincidence"}, "unknown selector 'coincidence'; did you mean 'coincide'"),
        ({"fraction": 0.0}, "select.fraction is 0.0; expected more than 0 and at most 1"),
        ({"fraction": 1.5}, "select.fraction is 1.5"),
        ({"fraction": 0.001}, "is no record"),
    ]
    for keys, message in cases:
        with pytest.raises(UserError, match=message):
            run(folder, **keys)
    (folder / "other").mkdir()
    np.save(folder / "other" / "indices.npy", np.arange(N))
    with pytest.raises(UserError, match="only 254 are valid"):
        run(folder, name="random", match="other")
    assert not (folder / "select" / "indices.npy").exists()
