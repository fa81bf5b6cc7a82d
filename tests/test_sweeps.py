"""Sweeps: found from anywhere, made of known keys, with the rows that every comparison needs."""

import collections
import os
import subprocess
import sys

import command
import pytest

from coincide_jax import main, pipeline
from coincide_jax.core import artifacts, axes
from coincide_jax.core.errors import UserError
from coincide_jax.report import audits
from coincide_jax.selection import coincide
from configs import common

SWEEPS = sorted((command.ROOT / "configs" / "sweeps").glob("*.py"))
TRAINED = [file for file in SWEEPS if file.stem != "audit"]  # whose rows are trained and compared


@pytest.mark.parametrize("file", TRAINED, ids=lambda file: file.stem)
def test_rows_change_known_keys(file):
    module, rows = main.load_module(file), {}
    module.sweep(lambda row, changes: rows.update({row: changes}))
    config = module.get_config()
    assert config.name.startswith(file.stem) and {"full", "random"} <= rows.keys()
    known = pipeline.flatten(common.defaults())
    assert pipeline.flatten(config).keys() == known.keys()
    for row, changes in rows.items():
        assert changes.keys() <= known.keys(), row
        one = pipeline.row_config(config, changes, None)
        assert coincide.resolve(one.select).allocation == "exact"
        values = pipeline.flatten(one)
        kinds = {key: list if isinstance(values[key], tuple) else type(values[key]) for key in changes}
        assert kinds == {key: type(known[key]) for key in changes}
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
        [sys.executable, "-c", code, str(TRAINED[0])],
        capture_output=True,
        text=True,
        cwd=tmp_path / "elsewhere",
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{TRAINED[0].stem}_tiny"]


ROWS = {
    "k60": {"cluster.k": 60},
    "full": {"curriculum.pool": "all"},
    "k30": {"cluster.k": 30},
    "k30_random": {"cluster.k": 30, "select.name": "random"},
    "fast": {"cluster.product": "float32"},  # a key of speed alone
    "mlp": {"extract.tap_from": "mlp"},
    "mlp_k30": {"extract.tap_from": "mlp", "cluster.k": 30},
    "longer": {"base.epochs": 2.0},
    "asks": {
        "curriculum.name": "progress",
        "curriculum.pool": "all",
        "extract.reads": "questions",
        "dataset.tokenizer_text": "questions",
        "cluster.k": lambda config: config.cluster.k // 2,
    },
}


@pytest.fixture
def ran(monkeypatch, tmp_path) -> dict[str, dict[str, dict[str, str]]]:
    """What a table of `ROWS` with two seeds runs: folder → stage → the folders that the stage is handed."""
    runs = {}

    def run_row(config, workdir, mesh, *, shared, names, **options):
        made = dict(shared)
        for stage in pipeline.STAGES:
            if stage.name in names and pipeline.needed(config, stage.name):
                wants = {name: made[name] for name in pipeline.reads(config, stage) if name in made}
                folder = str(workdir.relative_to(tmp_path))
                assert stage.name not in runs.setdefault(folder, {})
                runs[folder][stage.name] = {name: str(path.relative_to(tmp_path)) for name, path in wants.items()}
                made[stage.name] = workdir / stage.name
        return made

    monkeypatch.setattr(pipeline, "run_row", run_row)
    monkeypatch.setattr(audits, "tell", lambda workdir, clusters: None)
    monkeypatch.setattr(pipeline, "finish", lambda *arguments: None)
    config = common.defaults()
    config.dataset.records, config.seeds = "drawn", (0, 1)
    pipeline.run(config, tmp_path, axes.make_mesh(), sweep=lambda add: [add(row, keys) for row, keys in ROWS.items()])
    return runs


def test_a_row_makes_what_differs_and_once_for_all_seeds(ran):
    made = {folder: sorted(stages.keys() & set(pipeline.SHARED)) for folder, stages in ran.items()}
    assert {folder: stages for folder, stages in made.items() if stages} == {
        ".": ["base", "cluster", "dataset", "extract", "reference"],
        "rows/k30": ["cluster"],
        "rows/mlp": ["cluster", "extract"],
        "rows/mlp_k30": ["cluster"],
        "rows/longer": ["base", "cluster", "extract", "reference"],
        "rows/asks": ["base", "cluster", "cluster/warmup", "dataset", "extract", "select/warmup"],
        "rows/asks/seed1": ["base"],
        "rows/base/seed1": ["base"],
        "rows/longer/seed1": ["base"],
    }


def test_what_is_planned_is_what_is_run(ran):
    config = common.defaults()
    config.dataset.records, config.seeds = "drawn", (0, 1)
    found = pipeline.planned(config, lambda add: [add(row, keys) for row, keys in ROWS.items()])
    counts = {row: collections.Counter() for row in ROWS}
    for folder, stages in ran.items():
        row = folder.split("/")[1] if "/" in folder else "."
        counts[row if row in ROWS else "k60"].update(stages.keys() - {"report"})
    assert {row: made for row, _, made in found} == counts
    assert counts["k60"]["base"] == counts["k60"]["train"] == 2 and counts["longer"]["base"] == 2
    assert [one.cluster.k for _, one, _ in found][:3] == [60, 60, 30]


@pytest.mark.parametrize(
    ("row", "clusters"),
    [("full", "."), ("fast", "."), ("k30", "rows/k30"), ("k30_random", "rows/k30"), ("mlp_k30", "rows/mlp_k30"),
     ("longer", "rows/longer")],
)  # fmt: skip
def test_a_row_is_handed_what_fits_it(ran, row, clusters):
    for seed in (0, 1):
        stages = ran[f"rows/{row}/seed{seed}"]
        own = "rows/longer" if row == "longer" else "."
        base = {0: f"{own}/base", 1: "rows/longer/seed1/base" if row == "longer" else "rows/base/seed1/base"}[seed]
        assert stages["train"]["base"] == base.removeprefix("./")
        if row != "full":
            assert stages["select"]["cluster"] == f"{clusters}/cluster".removeprefix("./")
    assert ran["rows/mlp_k30"]["cluster"]["extract"] == "rows/mlp/extract"
    assert ran["rows/longer"]["reference"]["base"] == "rows/longer/base"


def test_the_audit_ends_with_the_clusters(monkeypatch, tmp_path):
    ended = []

    def run_row(config, workdir, mesh, *, shared, names, **options):
        ended.append((str(workdir.relative_to(tmp_path)), *names))
        return shared | {name: workdir / name for name in names}

    monkeypatch.setattr(pipeline, "run_row", run_row)
    monkeypatch.setattr(audits, "tell", lambda workdir, clusters: ended.append(clusters))
    module = main.load_module(command.ROOT / "configs" / "sweeps" / "audit.py")
    config = module.get_config().unlock()
    config.dataset.records = "drawn"
    pipeline.run(config, tmp_path, axes.make_mesh(), sweep=module.sweep, last=module.LAST)
    *runs, clusters = ended
    assert len(clusters) == 12 == len(set(clusters.values()))
    assert runs[0] == (".", "dataset", "base", "reference", "extract", "cluster")
    assert {tuple(names) for _, *names in runs[1:]} == {("cluster",), ("extract",)}
    assert [folder for folder, *names in runs[1:] if names == ["extract"]] == [
        "rows/last_k100", "rows/mlp_k100", "rows/booleans_k100"
    ]  # fmt: skip


def test_audits_stand_side_by_side(tmp_path):
    label = {"purity": 0.5, "purity_random": 0.25, "nmi": 0.125, "nmi_random": 0.0625}
    for name, labels in (("a", {"task": label}), ("b", {})):
        artifacts.write_json(
            tmp_path / name / "quality.json",
            {"sizes": [3, 2], "within_cosine": {"overall": 0.75}, "between_centroids": 0.1, "labels": labels,
             **({"separation": {"cosine_to_the_next": 0.5, "silhouette": 0.625}} if name == "a" else {})},
        )  # fmt: skip
    audits.tell(tmp_path, {"a": tmp_path / "a", "b": tmp_path / "b", "c": tmp_path / "a"})
    assert "| a, c | 2 |" in (tmp_path / "audit.md").read_text()
    found = audits.collect({name: tmp_path / name for name in "ab"})
    assert [row["records"] for row in found] == [5, 5]
    *_, first, second = audits.markdown(found).splitlines()
    assert first == "| a | 2 | 0.750 | 0.500 | 0.625 | 0.500 (0.250) | 0.125 (0.062) |"
    assert second == "| b | 2 | 0.750 | – | – | – | – |"


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
        assert summary["watch"]["records"] == 16 and ("probe" in summary) == (row in ("progress", "skill_it"))
    assert len({count for row, count in steps.items() if row != "full"}) == 1 and steps["full"] > steps["random"]
    text = (tmp_path / "report" / "report.html").read_text()
    assert all(f"curriculum-{row}" in text for row in rows.keys() - {"coincide", "full", "random"})
    assert "| probes, rounds × records |" in (tmp_path / "report" / "table.md").read_text()


@pytest.mark.parametrize("rows", ["table", "one", "tiny", "own"])
def test_every_row_of_the_sweep_of_curricula_may_begin(rows):
    """The checks that come before anything runs, and steps that do not depend on what a probe holds out."""
    module = main.load_module(command.ROOT / "configs/sweeps/curricula.py")
    config = module.get_config(rows).unlock()
    if rows == "own":
        config.dataset.records = "records.json"
    found = {}
    module.sweep(lambda row, changes: found.update({row: pipeline.row_config(config, changes, 0)}))
    for one in found.values():
        pipeline.check(one)
    assert len(found) == 9 and len({one.train.epochs for one in found.values()}) == 1


def test_more_arms_than_clusters_are_refused_first():
    config = common.defaults()
    config.dataset.records, config.curriculum.k = "drawn", config.cluster.k + 1
    with pytest.raises(UserError, match=r"curriculum\.k is 61; expected at most cluster\.k, the 60 clusters"):
        pipeline.check(config)
