"""The whole pipeline on a few drawn records: every contracted file, the second run, forced stages, the table."""

import json
import shutil

import command
import numpy as np
import pytest

from coincide_jax.core import artifacts

CONTRACT = (
    "dataset/split.json dataset/tokenizer.json base/model.json reference/model.json extract/scores.parquet "
    "extract/quarantine.jsonl cluster/centroids.npy cluster/assignment.npy select/indices.npy select/coreset.json "
    "select/records.parquet select/clusters.parquet train/metrics.jsonl evaluate/scores.json report/report.html"
).split()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished tiny run: its folder and what it printed."""
    workdir = tmp_path_factory.mktemp("tiny") / "run"
    status, output = command.run(command.TINY, f"--workdir={workdir}")
    assert status == 0, output
    return workdir, output


def test_every_contracted_file_is_there(finished):
    workdir, output = finished
    assert not [name for name in CONTRACT if not (workdir / name).is_file()]
    assert (workdir / "train" / "checkpoints").is_dir() and (workdir / "train" / "export").is_dir()
    features = artifacts.read_features(workdir / "extract" / "features.zarr")
    split = artifacts.read_json(workdir / "dataset" / "split.json")
    assignment = np.load(workdir / "cluster" / "assignment.npy")
    assert features.dtype == np.float16 and features.shape[0] == split["n"] == len(assignment)
    outside = np.setdiff1d(np.arange(split["n"]), split["pool"])
    assert len(outside) and not features[outside].any() and (assignment[outside] == -1).all()
    norms = np.linalg.norm(features[split["pool"]].astype(np.float32), axis=1)
    np.testing.assert_allclose(norms, 1.0, atol=2e-3)
    for where in ("select/coreset.json", "train/model", "report/report.html"):
        assert str(workdir / where) in output


def test_coreset_is_a_fifth_of_the_pool_untouched_and_in_order(finished):
    workdir, _ = finished
    split = artifacts.read_json(workdir / "dataset" / "split.json")
    indices = np.load(workdir / "select" / "indices.npy")
    assert indices.dtype == np.int64 and len(set(indices)) == len(indices) <= int(0.2 * len(split["pool"]))
    assert set(indices) <= set(split["pool"])
    raw = artifacts.read_json(split["records"])
    assert artifacts.read_json(workdir / "select" / "coreset.json") == [raw[i] for i in sorted(indices)]


def test_rows_are_fair(finished):
    workdir, _ = finished
    random = np.load(workdir / "rows" / "random" / "seed0" / "select" / "indices.npy")
    assert len(random) == len(np.load(workdir / "select" / "indices.npy"))
    steps = {
        row: len(artifacts.read_jsonl(folder / "train" / "metrics.jsonl"))
        for row, folder in {
            "coincide": workdir,
            "random": workdir / "rows" / "random" / "seed0",
            "coincide_plus": workdir / "rows" / "coincide_plus" / "seed0",
        }.items()
    }
    assert len(set(steps.values())) == 1, steps
    starts = {
        artifacts.read_json(folder / "train" / "manifest.json")["summary"]["start"]
        for folder in (workdir, *(workdir / "rows").glob("*/seed0"))
        if (folder / "train").exists()
    }
    base = artifacts.read_json(workdir / "base" / "manifest.json")["summary"]["fingerprint"]
    reference = artifacts.read_json(workdir / "reference" / "manifest.json")["summary"]["fingerprint"]
    assert starts == {base} and reference != base


def test_second_run_skips_every_stage(finished):
    workdir, first = finished
    status, output = command.run(command.TINY, f"--workdir={workdir}")
    assert status == 0
    for stage in ("dataset", "base", "reference", "extract", "cluster", "select", "train", "evaluate", "report"):
        assert f"[{stage}] complete" in output and f"[{stage}] begins" not in output
    assert output.splitlines()[-12:] == first.splitlines()[-12:]  # the same table


def test_another_config_is_refused_and_force_runs_again(finished, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(finished[0], workdir)
    status, output = command.run(command.TINY, f"--workdir={workdir}", "--config.cluster.k=9")
    assert status == 2 and "cluster.k = 12, now 9" in output and "--force=cluster" in output
    status, output = command.run(
        command.TINY, f"--workdir={workdir}", "--config.cluster.k=9", "--force=cluster", "--stages=cluster,select"
    )
    assert status == 0, output
    assert "[extract] complete" not in output and len(np.load(workdir / "cluster" / "centroids.npy")) <= 9
    status, output = command.run(command.TINY, f"--workdir={workdir}", "--config.cluster.k=9", "--stages=select")
    assert status == 0 and "[select] complete" in output


def test_a_stage_without_its_input_says_so(tmp_path):
    status, output = command.run(command.TINY, f"--workdir={tmp_path / 'new'}", "--stages=cluster")
    assert status == 2 and "needs 'dataset'" in output
