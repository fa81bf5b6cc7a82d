"""Runs the command as a user would: in a process of its own on one device, or inside the tests' own process."""

import contextlib
import io
import os
import pathlib
import subprocess
import sys
from unittest import mock

from absl.testing import flagsaver

from coincide_jax import main

ROOT = pathlib.Path(__file__).parent.parent
TINY = "--config=configs/demo.py:tiny"


def environment() -> dict[str, str]:
    """The tests' environment without the eight emulated devices."""
    return {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def start(*arguments: str) -> subprocess.Popen:
    """Starts `python -m coincide_jax.main ARGUMENTS`; stdout and stderr are one pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "coincide_jax.main", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment(),
    )


def run(*arguments: str, limit: float = 600) -> tuple[int, str]:
    """Exit status and whole output of one command that takes at most `limit` seconds."""
    process = start(*arguments)
    output, _ = process.communicate(timeout=limit)
    return process.returncode, output


def call(*arguments: str) -> tuple[int, str]:
    """Exit status and output of the same command called in this process, on the tests' eight devices: nothing has to be
    imported anew. What is no user's mistake is raised."""
    output, argv = io.StringIO(), ["coincide", *map(str, arguments)]
    with (
        flagsaver.flagsaver(),
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(main, "keep_memory"),  # a setting of the whole process
    ):
        try:
            main.cli()
            status = 0
        except SystemExit as stopped:
            status = stopped.code or 0
    return status, output.getvalue()
