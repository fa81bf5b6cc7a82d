"""The whole pipeline on a few drawn records: every contracted file, the second run, forced stages, the table."""

import json
import pathlib
import shutil
import time

import command
import jax
import numpy as np
import pytest

from coincide_jax import pipeline, training
from coincide_jax.core import artifacts, axes, checkpoint, store
from coincide_jax.training import stages
from configs import demo

CONTRACT = (
    "dataset/split.json",
    "dataset/tokenizer.json",
    "base/model.json",
    "reference/model.json",
    "extract/features.zarr/zarr.json",
    "extract/scores.parquet",
    "extract/quarantine.jsonl",
    "cluster/centroids.npy",
    "cluster/assignment.npy",
    "select/indices.npy",
    "select/coreset.json",
    "select/records.parquet",
    "select/clusters.parquet",
    "train/metrics.jsonl",
    "train/export/model.safetensors",
    "evaluate/scores.json",
    "report/report.html",
)
DECISIVE = ("cluster/centroids.npy", "cluster/assignment.npy", "select/indices.npy")


@pytest.fixture
def copy(finished, tmp_path) -> pathlib.Path:
    """A workdir of one's own that holds the finished run."""
    shutil.copytree(finished[0], tmp_path / "copy")
    return tmp_path / "copy"


def begun(output: str) -> list[str]:
    """The stages that a run began, in order, those of the table's rows included."""
    return [line[1:].split("]")[0] for line in output.splitlines() if "] begins · " in line]


def complete(output: str) -> list[str]:
    """The stages that a run skipped, in order."""
    return [line[1:].split("]")[0] for line in output.splitlines() if "] complete · " in line]


def beginnings(workdir: pathlib.Path) -> dict[str, float]:
    """When every finished stage of a workdir, rows included, began."""
    found = {
        str(path.parent.relative_to(workdir)): artifacts.read_json(path) for path in workdir.rglob("manifest.json")
    }
    return {name: manifest["recorded"]["began"] for name, manifest in found.items() if "recorded" in manifest}


def test_every_contracted_file_is_there(finished):
    workdir, output = finished
    assert not [name for name in CONTRACT if not (workdir / name).is_file()]
    assert (workdir / "train" / "checkpoints").is_dir() and (workdir / "train" / "export").is_dir()
    features = store.open_features(workdir / "extract" / "features.zarr")[:]
    split = artifacts.read_json(workdir / "dataset" / "split.json")
    assignment = np.load(workdir / "cluster" / "assignment.npy")
    centroids = np.load(workdir / "cluster" / "centroids.npy")
    assert features.dtype == np.float16 and features.shape[0] == split["n"] == len(assignment)
    assert centroids.dtype == np.float32 and assignment.dtype == np.int32 and centroids.shape[1] == features.shape[1]
    outside = np.setdiff1d(np.arange(split["n"]), split["pool"])
    assert len(outside) and not features[outside].any() and (assignment[outside] == -1).all()
    scores = artifacts.read_parquet(workdir / "extract" / "scores.parquet")
    assert np.flatnonzero(scores["valid"]).tolist() == split["pool"]
    norms = np.linalg.norm(features[split["pool"]].astype(np.float32), axis=1)
    np.testing.assert_allclose(norms, 1.0, atol=2e-3)
    for where in ("select/coreset.json", "train/model", "report/report.html"):
        assert str(workdir / where) in output
    assert not list(workdir.rglob("started.json")) and not list(workdir.rglob(".*.tmp"))


def test_coreset_is_a_fifth_of_the_pool_untouched_and_in_order(finished):
    workdir, _ = finished
    split = artifacts.read_json(workdir / "dataset" / "split.json")
    indices = np.load(workdir / "select" / "indices.npy")
    assert indices.dtype == np.int64 and len(set(indices)) == len(indices) <= int(0.2 * len(split["pool"]))
    assert set(indices) <= set(split["pool"])
    raw = json.loads(pathlib.Path(split["records"]).read_text())
    assert artifacts.read_json(workdir / "select" / "coreset.json") == [raw[i] for i in sorted(indices)]


def test_rows_are_fair(finished):
    workdir, _ = finished
    folders = {"coincide": workdir} | {
        row: workdir / "rows" / row / "seed0" for row in ("full", "random", "coincide_plus")
    }
    random = np.load(folders["random"] / "select" / "indices.npy")
    assert len(random) == len(np.load(workdir / "select" / "indices.npy"))
    lines = {row: artifacts.read_jsonl(folder / "train" / "metrics.jsonl") for row, folder in folders.items()}
    assert len(lines["coincide"]) == len(lines["random"]) == len(lines["coincide_plus"]) < len(lines["full"])
    rates = {row: [line["learning_rate"] for line in lines[row]] for row in lines if row != "full"}
    assert len({json.dumps(rate) for rate in rates.values()}) == 1
    assert len({sum(line["records"] for line in lines[row]) for row in rates}) == 1


def test_a_curriculum_that_hardly_moved_says_so(finished):
    workdir, output = finished
    manifests = [artifacts.read_json(path) for path in workdir.rglob("train/manifest.json")]
    moved = {row["summary"]["sampler"]: row["summary"]["moved"] for row in manifests if row["summary"]["arms"] > 1}
    assert moved.keys() == {"coincide_plus"}
    assert ("'coincide_plus' hardly moved" in output) == (moved["coincide_plus"] < 0.05)


def test_every_row_starts_from_the_base_and_never_from_the_reference(finished):
    workdir, _ = finished
    trained = [workdir, *sorted((workdir / "rows").glob("*/seed0"))]
    assert len(trained) == 4
    starts = {artifacts.read_json(folder / "train" / "manifest.json")["summary"]["start"] for folder in trained}
    base = artifacts.read_json(workdir / "base" / "manifest.json")["summary"]["fingerprint"]
    reference = artifacts.read_json(workdir / "reference" / "manifest.json")["summary"]["fingerprint"]
    assert starts == {base} and reference != base


def test_the_exported_model_is_a_start_like_the_model_folder(finished, tmp_path):
    """All that the stage train makes of a target: weights, configuration, card, and the records as it reads them."""
    workdir, _ = finished
    target = f"--config.target.path={workdir / 'train' / 'export'}"
    status, output = command.call(command.TINY, f"--workdir={tmp_path}", target, "--stages=dataset", "--notable")
    assert status == 0, output
    assert (tmp_path / "dataset/tokenizer.json").read_text() == (workdir / "dataset/tokenizer.json").read_text()
    config, split = demo.get_config("tiny"), artifacts.read_json(workdir / "dataset" / "split.json")
    mesh, recipe = axes.make_mesh(1), training.Recipe.from_config(config.train, "train")
    with jax.set_mesh(mesh):
        params, card, cfg, data = stages._open(workdir / "train" / "model", split, config, mesh, recipe)
        ours, own_card, own_cfg, own_data = stages._open(workdir / "train" / "export", split, config, mesh, recipe)
    assert own_cfg == cfg
    assert all(own_card[key] == card[key] for key in ("image_size", "vocab", "template", "system", "mean"))
    assert card["system"] == "" == config.dataset.system  # what a folder from elsewhere is not taken to have
    assert checkpoint.fingerprint(ours) == checkpoint.fingerprint(params)
    for row in split["pool"][:40]:
        for found, expected in zip(own_data.encode(row), data.encode(row), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_second_run_skips_every_stage(finished):
    workdir, first = finished
    begin = time.monotonic()
    status, output = command.run(command.TINY, f"--workdir={workdir}")
    assert status == 0 and not begun(output)
    assert complete(output) == begun(first) and set(complete(output)) == set(pipeline.NAMES) - set(pipeline.WARMUP)
    assert output.splitlines()[-12:] == first.splitlines()[-12:]  # the same table
    assert time.monotonic() - begin < 30


def test_another_config_is_refused_and_nothing_is_touched(finished):
    workdir, _ = finished
    before = beginnings(workdir)
    status, output = command.call(command.TINY, f"--workdir={workdir}", "--config.cluster.k=9")
    assert status == 2 and "cluster.k = 12, now 9" in output and "--force=cluster" in output
    assert not begun(output) and beginnings(workdir) == before


def test_force_with_stages_runs_these_again_and_no_other(copy):
    """On eight devices, where the finished run had one: the same bits."""
    before = {name: (copy / name).read_bytes() for name in DECISIVE}
    status, output = command.call(command.TINY, f"--workdir={copy}", "--force=cluster", "--stages=cluster,select")
    assert status == 0, output
    assert begun(output) == ["cluster", "select"] and not complete(output)
    assert {name: (copy / name).read_bytes() for name in DECISIVE} == before
    status, output = command.call(command.TINY, f"--workdir={copy}", "--stages=select")
    assert status == 0 and complete(output) == ["select"] and not begun(output)


def test_more_clusters_than_records_is_lowered_with_a_warning_and_goes_on(copy):
    split = artifacts.read_json(copy / "dataset" / "split.json")
    more = ("--config.cluster.k=1000", "--force=cluster", "--stages=cluster,select")
    status, output = command.call(command.TINY, f"--workdir={copy}", *more)
    valid = len(split["pool"])
    assert status == 0 and f"warning: cluster.k=1000 is above the {valid} valid records" in output
    assert len(np.load(copy / "cluster" / "centroids.npy")) <= valid
    indices = np.load(copy / "select" / "indices.npy")
    assert 0 < len(indices) <= int(0.2 * valid) and set(indices) <= set(split["pool"])


def test_force_runs_a_stage_and_all_after_it_in_every_row(copy):
    """With another clustering than the rows of the table were made from."""
    before = beginnings(copy)
    status, output = command.run(command.TINY, f"--workdir={copy}", "--config.cluster.k=9", "--force=cluster")
    assert status == 0, output
    assert set(complete(output)) == {"dataset", "base", "reference", "extract"}
    full, random, coincide_plus = ("train", "evaluate"), ("select", "train", "evaluate"), ("train", "evaluate")
    headline = ("cluster", "select", "train", "evaluate")
    assert begun(output) == [*headline, *full, *random, *coincide_plus, "report"]
    after = beginnings(copy)
    assert after.keys() == before.keys()
    kept = {name for name in before if after[name] == before[name]}
    assert kept == {"dataset", "base", "reference", "extract"} and {"train", "rows/full/seed0/train"} <= before.keys()
    assert len(np.load(copy / "cluster" / "centroids.npy")) <= 9


def test_a_stage_without_its_input_says_so(tmp_path):
    status, output = command.call(command.TINY, f"--workdir={tmp_path / 'new'}", "--stages=cluster")
    assert status == 2 and "needs 'dataset'" in output


@pytest.mark.long
def test_the_table_of_the_demo_has_learned_half_of_its_tasks(tmp_path):
    """DESIGN's learning bar: the full-data row beats its blind floor by more than its interval on 6 of 12 tasks."""
    status, output = command.run("--config=configs/demo.py:table", f"--workdir={tmp_path}", limit=7200)
    assert status == 0, output
    table = artifacts.read_json(tmp_path / "report" / "table.json")
    assert len(table["tasks"]) == 12 and len(table["counted"]) >= 6
    assert table["sentence"] == "" and all(row["seeds"] >= 3 for row in table["rows"].values())


def test_programs_are_let_go_when_there_are_many(monkeypatch):
    double = jax.jit(lambda x: 2 * x)
    double(np.float32(1))
    pipeline.let_programs_go()
    assert double._cache_size() == 1
    monkeypatch.setattr(pipeline, "MAPPINGS", 0)
    pipeline.let_programs_go()
    assert double._cache_size() == (0 if pathlib.Path("/proc/self/maps").exists() else 1)
    assert double(np.float32(1)) == 2
