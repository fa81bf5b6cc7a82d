"""Each benchmark runs at toy size, prints one JSON line, and both its sides compute the same. Speed is not judged."""

import json
import subprocess
import sys

import command
import numpy as np
import pytest

from benchmarks import models, record
from coincide_jax.models import flops


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


def test_a_line_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["benchmarks/kmeans.py", "--rows=3", "--save"])
    for number in range(2):
        record.emit("one", {"number": number}, record.arguments("").parse_args(["--save"]))
    kept = (tmp_path / "results/kmeans.jsonl").read_text()
    assert kept == capsys.readouterr().out and kept.count("\n") == 2
    found = json.loads(kept.splitlines()[1])
    assert found["command"] == "python -m benchmarks.kmeans --rows=3" and found["number"] == 1
    assert "core" in found["machine"] and found["date"] and found["jax"]


def test_kmeans():
    found = line("kmeans", "--rows=600", "--width=24", "--clusters=8", "--rounds=2")
    assert found["objective_ratio"] == pytest.approx(1.0, abs=1e-3) and 0.3 < found["objective"]["ours"] <= 1.0
    assert max(found["iterations"]["ours"], found["iterations"]["peer"]) < found["iterations"]["limit"]
    assert found["rows"] == 600 and "faiss" in found["peer"] and "convergence" in found["peer"]
    low, high = found["speed_ratio_range"]
    assert 0 < low <= found["speed_ratio"] <= high


def test_mmd():
    found = line("mmd", "--rows=40", "--rounds=2", "--clusters=3")
    assert found["identical_picks"] and found["picks"] == 8
    assert 0 < found["speed_ratio_range"][0] <= found["speed_ratio"]
    assert {"ours", "ours_picks_only", "peer"} < set(found["seconds_a_cluster"])


def test_mmd_gram():
    found = line("mmd", "--gram", "--rows=60", "--width=96", "--spread=0.05")
    assert found["picks"] == 12 and 0 <= found["plain_float32"]["equal_picks"] <= 1
    assert found["float32"]["equal_picks"] >= 0.9 and found["float32"]["mmd2_ratio"] == pytest.approx(1, abs=0.05)


@pytest.mark.long
def test_forgetting():
    found = line("forgetting", "--tiny", "--seeds=1", "--steps=20")
    assert set(found["by_seed"]) == {"kept", "gone", "rehearsed"} == set(found["mean"])
    assert all(0 <= score <= 1 for row in found["by_seed"].values() for part in row.values() for score in part)


@pytest.mark.long
def test_select():
    sizes = "--width=40", "--clusters=6", "--iterations=2"
    found = line("select", "--rows=200,400", "--rounds=1", *sizes)
    assert [point["rows"] for point in found["points"]] == [200, 400] and np.isfinite(found["slope_whole"])
    assert all(0 < point["picked"] <= 0.2 * point["rows"] for point in found["points"])
    assert all(0 < point["rss_anon_before_mib"] <= point["rss_anon_peak_mib"] for point in found["points"])
    (point,) = line("select", "--resident", "--rows=300", "--rounds=1", *sizes)["points"]
    assert 0 < point["picked"] <= 60 and point["seconds"] > 0


MODEL = ["--image=28", "--tower", "16", "2", "2", "24", "--text", "32", "6", "2", "48", "--vocab=64", "--length=24"]


def test_extract():
    found = line("extract", *MODEL, "--layers=5", "--rounds=2", "--against=pytorch")
    assert found["least_cosine"] > 0.99999 and found["rows"] == 4 and found["image_tokens"] == 4
    assert found["layers"] == 6 and found["layers_early"] == 5 and "SDPA" in found["peer"]
    assert set(found["samples_per_s"]) == {"ours_full", "peer_full", "ours_early", "peer_early"}
    for middle, low, high in found["speed_ratio"].values():
        assert 0 < low <= middle <= high


@pytest.mark.long
def test_decode():
    found = line("decode", *MODEL, "--new=5", "--rounds=3", "--against=pytorch")
    assert found["equal_tokens"] == 1.0 and found["new_tokens"] == 5 and "generate" in found["peer"]
    middle, low, high = found["speed_ratio"]["whole"]
    assert 0 < low <= middle <= high and set(found["tokens_per_s"]) == {"ours", "peer"}


@pytest.mark.long
@pytest.mark.parametrize(("name", "own"), [("extract", "--layers=5"), ("decode", "--new=5")])
def test_share_of_the_peak(name, own):
    found = line(name, *MODEL, own, "--rounds=2", "--rows", "1", "2", "--against=peak", "--peak_size=64")
    assert [one["rows"] for one in found["swept"]] == [1, 2] and found["peak_tflops"] >= 0
    assert found["precision"] == "float32" and found["parameters"] > 40_000


def test_counted_flop_of_the_published_models():
    """By hand: 2 a weight and token of LLaMA-7B's blocks, and the causal attention."""
    keys = models.arguments("").parse_args(["--model=llava-1.5-7b", "--precision=bfloat16"])
    cfg = models.config(keys)
    tower = 2 * (23 * 12 * 1024**2 + 3 * 14**2 * 1024 + 1024 * 4096 + 4096**2) * 577 + 4 * 23 * 577**2 * 1024
    blocks = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 1024 + 2 * 32 * 4096 * 1024 * 1025
    assert flops.encode(cfg, 2, 1024) == 2 * (tower + blocks)
    step = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32_064 * 4096)
    assert flops.decode(cfg, 1, 9, 2) == 2 * step + 4 * 32 * 4096 * (10 + 11)
    small = models.config(models.arguments("").parse_args(["--model=tinyllava-2.0b", "--precision=bfloat16"]))
    assert small.image_tokens == 729 and models.described(keys, small)["parameters"] == 2_048_818_464
