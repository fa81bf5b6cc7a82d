"""Clustering a store four times larger than its memory limit, and after SIGKILL: processes of their own.

The limit is on RssAnon of /proc/self/status, sampled: address space (`ulimit -v`) counts what JAX only reserves, and
pages of the file that the system may drop at any time are no memory that a run needs.

The interpreter, the compiler and what they leave behind take some 300 MiB, whatever is clustered. Where the limit is
below that, the process first clusters a store of an eighth of the rows, which compiles the same programs; unused pages
go back to the system, and the limit is on what the large store takes above what is left. Data that piled up would show:
it is four times the limit.
"""

import contextlib
import json
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time

import command
import numpy as np
import pytest

from coincide_jax.core import artifacts, store

RUN = """
import ctypes, gc, json, pathlib, sys, threading, time
import jax
from coincide_jax import cluster
from coincide_jax.core import axes
from configs import common
folder, keys, slow = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3])

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

peak = [0.0]
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

config = common.defaults()
config.cluster.update(keys)
save = cluster.centres._save
def slowly(path, state):
    save(path, state)
    print("saved", len(state.history), flush=True)
    time.sleep(slow)
cluster.centres._save = slowly
mesh = axes.make_mesh()
with jax.set_mesh(mesh):
    threading.Thread(target=watch, daemon=True).start()
    told = []
    for name in ("small", "features"):
        if not (folder / f"{name}.zarr").exists():
            continue
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else freed pages would hide what is taken next
        before = peak[0] = anonymous()
        config.extract.features = str(folder / f"{name}.zarr")
        summary = cluster.run(config, {}, folder / "out", mesh)
        told.append({"peak": peak[0], "before": before, "resident": summary["resident"]})
print(json.dumps(told))
"""


def start(folder, keys: dict, slow: float = 0.0) -> subprocess.Popen:
    (folder / "out").mkdir(exist_ok=True)
    line = [sys.executable, "-c", RUN, str(folder), json.dumps(keys), str(slow)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(line, **pipes, text=True, cwd=command.ROOT, env=command.environment())


def fill(path, rows: int, width: int, kinds: int) -> None:
    """A store of unit rows around `kinds` directions, made shard by shard."""
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(kinds, width)).astype(np.float32)
    writer = store.create(path, rows, width)
    for first in writer.shards:
        count = min(writer.shard_rows, rows - first)
        x = centre[rng.integers(0, kinds, count)] + 0.7 * rng.standard_normal((count, width), np.float32)
        writer.write(first, (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16))


def clustered_within(folder, limit_mib: int, width: int, shard_rows: int, monkeypatch, small: bool) -> list[dict]:
    """Clusters a store of 4 × the limit, after one of an eighth of its rows if `small`; returns what the process told
    of each: MiB before it and at its peak."""
    monkeypatch.setattr(artifacts, "SHARD_ROWS", shard_rows)
    rows = 4 * (limit_mib << 20) // (2 * width)
    fill(folder / "features.zarr", rows, width, 40)
    if small:
        fill(folder / "small.zarr", rows // 8, width, 40)
    keys = {"k": 32, "iterations": 3, "chunk": 512, "memory_mib": max(limit_mib // 4, 1), "product": "float32"}
    process = start(folder, keys)
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    told = json.loads(output.splitlines()[-1])
    assert len(np.load(folder / "out" / "assignment.npy")) == rows
    return told


def test_a_store_four_times_the_limit(tmp_path, monkeypatch):
    small, large = clustered_within(tmp_path, 96, 1024, 1024, monkeypatch, small=True)
    # 336 MiB more of features; a few numbers for each of their 172,032 rows are 50 MiB at most. The peaks are compared,
    # since what is left before a run depends on how much of its pools the allocator has given back.
    assert not large["resident"] and large["peak"] - small["peak"] < 64, (small, large)


@pytest.mark.long
def test_a_store_four_times_an_imposed_limit(tmp_path):
    """The whole selection by its command, 6 GiB of features, in a process whose data the kernel limits to 1.5 GiB
    (`ulimit -d`: private writable memory, touched or not; mapped files do not count)."""
    limit, width = 3 << 29, 8192
    rows = 4 * limit // (2 * width)
    fill(tmp_path / "f.zarr", rows, width, 400)
    keys = {"extract.features": tmp_path / "f.zarr", "extract.num_layers": 4, "cluster.k": 384}
    keys |= {"cluster.iterations": 2, "cluster.memory_mib": 128, "select.cache_mib": 256}
    line = [sys.executable, "-m", "coincide_jax.main", "--config=configs/arrays.py", f"--workdir={tmp_path / 'w'}"]
    line += [f"--config.{key}={value}" for key, value in keys.items()]
    process = subprocess.Popen(
        line, cwd=command.ROOT, env=command.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )  # fmt: skip
    peak = [0]

    def watch():
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                told = pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak[0] = max(peak[0], *(int(one.split()[1]) << 10 for one in told if one.startswith("RssAnon")), 0)
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    output, _ = process.communicate(timeout=3000)
    assert process.returncode == 0, output
    print(f"RssAnon at its peak: {peak[0] >> 20} MiB")
    assert 0 < peak[0] < limit
    picked = np.load(tmp_path / "w" / "select" / "indices.npy")
    assert len(picked) > 0.19 * rows and len(np.unique(picked)) == len(picked)


def test_killed_after_a_random_iteration(tmp_path):
    fill(tmp_path / "features.zarr", 3000, 48, 200)
    keys = {"k": 64, "iterations": 30, "chunk": 512, "memory_mib": 1}
    process = start(tmp_path, keys)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    wanted = [(tmp_path / "out" / f"{name}.npy").read_bytes() for name in ("centroids", "assignment")]
    total = sum(line.startswith("saved") for line in output.splitlines())
    for name in ("centroids", "assignment"):
        (tmp_path / "out" / f"{name}.npy").unlink()
    last = int(np.random.default_rng().integers(1, total))
    process = start(tmp_path, keys, slow=0.5)
    for line in process.stdout:
        if line.strip() == f"saved {last}":
            process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    output, _ = (process := start(tmp_path, keys)).communicate(timeout=600)
    assert process.returncode == 0 and f"goes on after iteration {last}" in output, output
    assert wanted == [(tmp_path / "out" / f"{name}.npy").read_bytes() for name in ("centroids", "assignment")]
