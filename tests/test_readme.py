"""Every command that the README shows is run as printed; those that need published data end in one sentence."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import command
import numpy as np
import pytest
from ml_collections import ConfigDict

from coincide_jax import pipeline
from coincide_jax.core import artifacts
from coincide_jax.dataset import drawn
from configs import demo, llava_json

README = (command.ROOT / "README.md").read_text()
BLOCKS = re.findall(r"<!-- (\w+) -->\n```(?:bash|python)?\n(.*?)```", README, re.S)
ELSEWHERE = ("install", "test", "demo")  # .ci/run runs these as printed
LONG = ("table", "curricula", "long")  # minutes to hours: the long tests are them
SHORT = {name: text for name, text in BLOCKS if name not in (*ELSEWHERE, *LONG, "own", "arrays", "plan")}
NEEDS_PUBLISHED = ("llava15",)
TWINS = ("skill_it", "processes")  # what is new in them has tests, the rest is another command: run by the long tests


def small() -> list[str]:
    """Flags that give `configs/llava_json.py` few records and the sizes of the tiny demo, whose programs are there."""
    own, tiny = pipeline.flatten(llava_json.get_config()), pipeline.flatten(demo.get_config("tiny"))
    sizes = {key: value for key, value in tiny.items() if value != own[key] and not key.startswith("dataset.drawn")}
    sizes |= {"dataset.limit": 400, "evaluate.limit": 4, "cluster.k": 20}
    for key in ("name", "dataset.records"):
        del sizes[key]
    return [f"--config.{key}={tuple(value) if isinstance(value, list) else value}" for key, value in sizes.items()]


@pytest.fixture
def own_data(tmp_path) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
    """Records file, images folder, workdir: of the data that COINCIDE_DATA names, else of a drawn data set."""
    folder = os.environ.get("COINCIDE_DATA")
    if folder is None:
        folder = drawn.draw(tmp_path / "data", ConfigDict(dict(records=400, heldout=12, base=12, seed=3)))
    folder = pathlib.Path(folder)
    return folder / "train.json", folder / "images", tmp_path / "workdir"


def shell(text: str, folder: pathlib.Path) -> subprocess.CompletedProcess:
    """Runs a printed command with this Python first on the path, in a folder that holds nothing but `configs`: what an
    earlier run left in the project's `runs` does not matter."""
    (folder / "configs").symlink_to(command.ROOT / "configs")
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env={**command.environment(), "PATH": path},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_every_command_has_a_name():
    fenced = re.findall(r"```(?:bash|python)\n", README)
    assert len(fenced) == len(BLOCKS) and len({name for name, _ in BLOCKS}) == len(BLOCKS)
    assert {*ELSEWHERE, *LONG, "own", "arrays", "plan", *NEEDS_PUBLISHED} <= {name for name, _ in BLOCKS}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in TWINS else name for name in sorted(SHORT)]
)
def test_command_runs_as_printed(name, tmp_path):
    done = shell(SHORT[name], tmp_path)
    if name in NEEDS_PUBLISHED:
        assert done.returncode == 2 and "does not exist" in done.stderr.strip().splitlines()[-1]
        assert "Traceback" not in done.stderr
    else:
        assert done.returncode == 0, done.stdout + done.stderr
        assert list(tmp_path.glob("runs/*/*/manifest.json"))


def test_own_data_command_runs_as_printed(own_data, tmp_path):
    """With its capitals filled in, and behind it what makes the models small."""
    text = dict(BLOCKS)["own"].rstrip()
    records, images, workdir = own_data
    for shown, value in (
        ("PATH.json", records),
        ("images=DIR", f"images={images}"),
        ("workdir=DIR", f"workdir={workdir}"),
    ):
        assert text.count(shown) == 1
        text = text.replace(shown, shlex.quote(str(value)))
    done = shell(f"{text} {shlex.join(small())}", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    split = artifacts.read_json(workdir / "dataset" / "split.json")
    parts = [split[name] for name in ("pool", "dev", "heldout", "base")]
    assert split["n"] == 400 == sum(map(len, parts)) + split["quarantined"] and min(map(len, parts)) > 0
    picked = np.load(workdir / "select" / "indices.npy")
    assert 0 < len(picked) <= 0.2 * len(split["pool"]) and set(picked) <= set(split["pool"])
    assert (workdir / "report" / "report.html").is_file()
    assert set(artifacts.read_json(workdir / "report" / "table.json")["rows"]) == {
        "coincide", "full", "random", "coincide_plus",
    }  # fmt: skip


def test_plan_command_says_that_both_fit(tmp_path):
    done = shell(dict(BLOCKS)["plan"], tmp_path)
    assert done.returncode == 0, done.stderr
    for devices in ("1xH100-80GB", "4xV100-32GB"):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{devices}:")]
        assert re.search(r"[\d.]+ of [\d.]+ GB a device: fits", line)


def test_arrays_command_runs_as_printed(tmp_path):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 40)) * 3
    features = centres[np.arange(120) % 6] + rng.normal(size=(120, 40))
    np.save(tmp_path / "f.npy", (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16))
    text = dict(BLOCKS)["arrays"].rstrip().replace("=DIR", "=run").replace("FEATURES.npy", "f.npy")
    done = shell(f"{text} --config.cluster.k=6", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 0 < len(np.load(tmp_path / "run/select/indices.npy")) <= 24
