"""Every command that the README shows is run as printed; those that need published data end in one sentence."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import command
import pytest

README = (command.ROOT / "README.md").read_text()
BLOCKS = re.findall(r"<!-- (\w+) -->\n```(?:bash|python)?\n(.*?)```", README, re.S)
SHORT = {name: text for name, text in BLOCKS if name not in ("install", "test", "demo", "table", "long", "own")}
NEEDS_PUBLISHED = ("llava15",)


def shell(text: str, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    """Runs a printed command with this Python first on the path."""
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=cwd,
        env={**command.environment(), "PATH": path},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_every_command_has_a_name():
    fenced = re.findall(r"```(?:bash|python)\n", README)
    assert len(fenced) == len(BLOCKS) and len({name for name, _ in BLOCKS}) == len(BLOCKS)


@pytest.mark.parametrize("name", sorted(SHORT))
def test_command_runs_as_printed(name):
    done = shell(SHORT[name], command.ROOT)
    if name in NEEDS_PUBLISHED:
        assert done.returncode == 2 and "does not exist" in done.stderr.strip().splitlines()[-1]
        assert "Traceback" not in done.stderr
    else:
        assert done.returncode == 0, done.stdout + done.stderr


def test_own_data_command_runs_as_printed(own_data):
    text = dict(BLOCKS)["own"]
    records, images, workdir = own_data
    for word, value in (("PATH.json", records), ("--config.dataset.images=DIR", f"--config.dataset.images={images}")):
        assert word in text
        text = text.replace(word, shlex.quote(str(value)) if word == "PATH.json" else value)
    text = text.replace("--workdir=DIR", f"--workdir={workdir}").rstrip()
    small = "--config.dataset.limit=400 --config.evaluate.limit=10 --config.cluster.k=20"
    done = shell(f"{text} {small}", command.ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (workdir / "report" / "report.html").is_file()
    assert (workdir / "select" / "indices.npy").is_file()
