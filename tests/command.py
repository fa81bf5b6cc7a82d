"""Runs the command as a user would: a process of its own, one device, the tests' compilation cache."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
TINY = "--config=configs/demo.py:tiny"


def environment() -> dict[str, str]:
    """The tests' environment without the eight emulated devices."""
    return {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def start(*arguments: str, cwd: pathlib.Path = ROOT) -> subprocess.Popen:
    """Starts `python -m coincide_jax.main ARGUMENTS`; stdout and stderr are one pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "coincide_jax.main", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=environment(),
    )


def run(*arguments: str, cwd: pathlib.Path = ROOT) -> tuple[int, str]:
    """Exit status and whole output of one command."""
    process = start(*arguments, cwd=cwd)
    output, _ = process.communicate(timeout=600)
    return process.returncode, output
