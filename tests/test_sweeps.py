"""Sweeps: found from anywhere, made of known keys, with the rows that every comparison needs."""

import os
import subprocess
import sys

import command
import pytest

from coincide_jax import main, pipeline
from coincide_jax.core import artifacts
from coincide_jax.selection import coincide
from configs import common

SWEEPS = sorted((command.ROOT / "configs" / "sweeps").glob("*.py"))


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_rows_change_known_keys(file):
    module, rows = main.load_module(file), {}
    module.sweep(lambda row, changes: rows.update({row: changes}))
    config = module.get_config()
    assert config.name.startswith(file.stem) and {"full", "random"} <= rows.keys()
    known = pipeline.flatten(common.defaults())
    assert pipeline.flatten(config).keys() == known.keys()
    for row, changes in rows.items():
        assert changes.keys() <= known.keys(), row
        one = config.copy_and_resolve_references()
        one.update_from_flattened_dict(changes)
        assert coincide.resolve(one.select).allocation == "exact"
        assert {key: type(value) for key, value in changes.items()} == {key: type(known[key]) for key in changes}
    assert len({str(sorted(changes.items())) for changes in rows.values()}) == len(rows)


def test_a_sweep_is_found_from_another_folder(tmp_path):
    """Only the package is on the search path, as for the console command; `configs` must be found from the file."""
    (tmp_path / "coincide_jax").symlink_to(command.ROOT / "coincide_jax")
    (tmp_path / "elsewhere").mkdir()
    code = (
        "import pathlib, sys; from coincide_jax import main; "
        "print(main.load_module(pathlib.Path(sys.argv[1])).get_config('tiny').name)"
    )
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(SWEEPS[0])],
        capture_output=True,
        text=True,
        cwd=tmp_path / "elsewhere",
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{SWEEPS[0].stem}_tiny"]


def test_rows_have_features_and_clusters_of_their_own_where_they_set_their_keys():
    headline = {"cluster.k": 60, "select.name": "coincide"}
    assert pipeline.own_features({"cluster.k": 60, "select.name": "random"}, headline) == ()
    assert pipeline.own_features({"cluster.k": 30}, headline) == ("cluster",)
    assert pipeline.own_features({"extract.num_layers": 1}, headline) == ("extract", "cluster")


@pytest.mark.long
def test_the_sweep_of_curricula_runs_and_tells_what_was_learned(tmp_path):
    config = "--config=configs/sweeps/curricula.py:tiny"
    status, output = command.run(config, f"--workdir={tmp_path}")
    assert status == 0, output
    rows, steps = {}, {}
    main.load_module(command.ROOT / "configs/sweeps/curricula.py").sweep(
        lambda row, changes: rows.update({row: changes})
    )
    for row in rows:
        train = (tmp_path if row == "coincide" else tmp_path / "rows" / row / "seed0") / "train"
        summary = artifacts.read_json(train / "manifest.json")["summary"]
        steps[row] = summary["steps"]
        assert summary["watch"]["records"] == 16 and ("probe" in summary) == (row == "progress")
    assert len({count for row, count in steps.items() if row != "full"}) == 1 and steps["full"] > steps["random"]
    text = (tmp_path / "report" / "report.html").read_text()
    assert all(f"curriculum-{row}" in text for row in rows.keys() - {"coincide", "full", "random"})
    assert "| probes, rounds × records |" in (tmp_path / "report" / "table.md").read_text()
