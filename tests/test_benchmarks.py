"""Each benchmark runs at toy size, prints one JSON line, and both its sides compute the same. Speed is not judged."""

import json
import subprocess
import sys

import command
import pytest


def line(name: str, *arguments: str) -> dict:
    """The only line that a benchmark prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        capture_output=True,
        text=True,
        cwd=command.ROOT,
        env=command.environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (only,) = done.stdout.splitlines()
    return json.loads(only)


def test_kmeans():
    found = line("kmeans", "--rows=600", "--width=24", "--clusters=8", "--rounds=2")
    assert found["objective_ratio"] == pytest.approx(1.0, abs=1e-3) and 0.3 < found["objective"]["ours"] <= 1.0
    assert max(found["iterations"]["ours"], found["iterations"]["peer"]) < found["iterations"]["limit"]
    assert found["rows"] == 600 and "faiss" in found["peer"] and "convergence" in found["peer"]
    low, high = found["speed_ratio_range"]
    assert 0 < low <= found["speed_ratio"] <= high


def test_mmd():
    found = line("mmd", "--rows=40", "--rounds=2")
    assert found["identical_picks"] and found["picks"] == 8
    assert 0 < found["speed_ratio_range"][0] <= found["speed_ratio"] and set(found["seconds"]) == {"ours", "peer"}
