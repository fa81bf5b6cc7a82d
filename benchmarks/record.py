"""The one line that a benchmark prints, and `results/`, where lines are kept."""

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys

import jax

RESULTS = pathlib.Path(__file__).parent / "results"


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the flag that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--save", action="store_true", help="append the line to benchmarks/results/<benchmark>.jsonl")
    return parser


def machine() -> str:
    """The devices that JAX sees, and on CPUs the processor's name."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() == "cpu":
        found = pathlib.Path("/proc/cpuinfo")
        names = found.read_text().splitlines() if found.exists() else []
        kind = next((line.split(":", 1)[1].strip() for line in names if line.startswith("model name")), kind)
        return f"{len(os.sched_getaffinity(0))} cores of {kind}"
    return f"{jax.device_count()} x {kind}"


def commit() -> str:
    """The revision of the working tree, with a + behind it if there are changes; '' outside a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def emit(benchmark: str, found: dict, keys: argparse.Namespace) -> None:
    """Prints the line: what was run, where and with what, then `found`; with `--save` keeps it too."""
    name = pathlib.Path(sys.argv[0]).stem
    words = [word for word in sys.argv[1:] if word != "--save"]
    line = {
        "benchmark": benchmark,
        "command": " ".join(["python -m", f"benchmarks.{name}", *words]),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        **found,
    }
    print(json.dumps(line))
    if keys.save:
        RESULTS.mkdir(exist_ok=True)
        with open(RESULTS / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
