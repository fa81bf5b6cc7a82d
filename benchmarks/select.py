"""Whole selection from features on disk to indices, time and memory against the number of rows; prints one JSON line.

    python -m benchmarks.select [--rows N1,N2,…] [--width D] [--clusters K] [--iterations T] [--rounds R] [--seed S]
    python -m benchmarks.select --resident --rows=N --width=D --clusters=K     the select stage alone

Each N runs in a process of its own: it draws clustered features into a .npy file, then runs the stages cluster and
select of `configs/arrays.py` on it R times. The first round holds the compilations and is told apart; the last is the
one reported. Memory is RssAnon of /proc/self/status, sampled every 20 ms (mapped pages of the features do not count):
its peak while the stages run, and what was there before. `slope` is that of log seconds over log N, least squares.

With `--resident` N rows of width D are drawn on the device around K centroids and only the select stage is timed, the
way a machine runs whose device holds all features.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from coincide_jax import pipeline
from coincide_jax.core import artifacts, axes
from coincide_jax.selection import SelectionView, coincide
from configs import arrays, common

LAYERS = 4
BLOCK = 8192  # rows drawn at a time


def anonymous() -> int:
    """RssAnon of this process in bytes; 0 where the system does not tell."""
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


class Peak:
    """The largest RssAnon while the block runs."""

    def __enter__(self) -> "Peak":
        self.bytes, self._over = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.bytes = max(self.bytes, anonymous())

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()


def draw(path: pathlib.Path, rows: int, width: int, kinds: int, seed: int) -> None:
    """Unit rows float16[N, D] around `kinds` directions of uneven weight, written block by block."""
    rng = np.random.default_rng(seed)
    share = rng.lognormal(sigma=0.5, size=kinds)
    centre = (0.5 + rng.normal(size=(kinds, width))).astype(np.float32)
    out = np.lib.format.open_memmap(path, "w+", np.float16, (rows, width))
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        x = centre[rng.choice(kinds, count, p=share / share.sum())]
        x += rng.normal(size=(count, width), scale=0.7).astype(np.float32)
        out[start : start + count] = x / np.linalg.norm(x, axis=1, keepdims=True)
    out.flush()


def child(keys, rows: int) -> dict:
    """Runs the two stages on N rows, and tells seconds and memory."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        draw(folder / "features.npy", rows, keys.width, 2 * keys.clusters, keys.seed)
        config = arrays.get_config().copy_and_resolve_references()
        config.extract.features, config.extract.num_layers = str(folder / "features.npy"), LAYERS
        config.cluster.k, config.cluster.iterations = keys.clusters, keys.iterations
        config.cluster.memory_mib = config.select.cache_mib = keys.memory_mib
        mesh, seconds = axes.make_mesh(), []
        with jax.set_mesh(mesh):
            jnp.zeros(8).block_until_ready()
            before = anonymous()
            with Peak() as peak:
                for number in range(keys.rounds):
                    workdir = folder / f"w{number}"
                    begin = time.perf_counter()
                    pipeline.run(config, workdir, mesh)
                    whole = time.perf_counter() - begin
                    manifests = {s: artifacts.read_json(workdir / s / "manifest.json") for s in ("cluster", "select")}
                    stages = {name: manifest["recorded"]["seconds"] for name, manifest in manifests.items()}
                    seconds.append({"whole": round(whole, 3)} | stages)
        return {
            "rows": rows,
            "seconds": seconds[-1],
            "first_round_seconds": seconds[0],
            "rss_anon_before_mib": before >> 20,
            "rss_anon_peak_mib": peak.bytes >> 20,
            "picked": manifests["select"]["summary"]["records"],
        }


def resident(keys, rows: int) -> dict:
    """Times the select stage alone, features drawn on the device around known centroids."""
    rng = np.random.default_rng(keys.seed)
    label = rng.choice(keys.clusters, rows, p=rng.dirichlet(np.full(keys.clusters, 4.0))).astype(np.int32)
    label[: keys.clusters] = np.arange(keys.clusters)
    centre = (0.5 + rng.normal(size=(keys.clusters, keys.width))).astype(np.float32)
    centre /= np.linalg.norm(centre, axis=1, keepdims=True)

    @jax.jit
    def block(key, mine):
        x = mine + jax.random.normal(key, mine.shape) * (0.7 / mine.shape[1] ** 0.5)
        return (x / jnp.linalg.norm(x, axis=1, keepdims=True)).astype(jnp.float16)

    place = jax.jit(lambda out, part, start: jax.lax.dynamic_update_slice(out, part, (start, 0)), donate_argnums=0)
    x = jnp.zeros((rows, keys.width), jnp.float16)
    for start in range(0, rows, BLOCK):
        start = min(start, max(rows - BLOCK, 0))  # the last block overlaps the one before
        part = block(jax.random.key(start), centre[label[start : start + BLOCK]])
        x = place(x, part, start)
    x.block_until_ready()
    settings = common.defaults().select
    view = SelectionView(x, np.ones(rows, bool), label, centre, LAYERS, int(settings.fraction * rows))
    seconds = []
    for _ in range(keys.rounds):
        begin = time.perf_counter()
        chosen = coincide.select(view, settings)
        seconds.append(round(time.perf_counter() - begin, 3))
    return {"rows": rows, "seconds": seconds[-1], "first_round_seconds": seconds[0], "picked": len(chosen.indices)}


def main() -> None:
    """Runs every N in a process of its own and prints the line."""
    parser = record.arguments("Whole selection against the number of rows; one JSON line.")
    parser.add_argument("--rows", default="10000,100000,1000000")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory_mib", type=int, default=512, help="of features, and of kernel matrices")
    parser.add_argument("--resident", action="store_true", help="the select stage alone, features on the device")
    parser.add_argument("--child", type=int, default=0, help=argparse.SUPPRESS)
    keys = parser.parse_args()
    if keys.child:
        print(json.dumps((resident if keys.resident else child)(keys, keys.child)))
        return
    points = []
    for rows in map(int, keys.rows.split(",")):
        command = [sys.executable, "-m", "benchmarks.select", *sys.argv[1:], f"--child={rows}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        points.append(json.loads(done.stdout.splitlines()[-1]))
    line = {
        **{name: getattr(keys, name) for name in ("width", "clusters", "memory_mib", "rounds", "seed")},
        **({} if keys.resident else {"iterations": keys.iterations}),
        "points": points,
    }
    if len(points) > 1 and not keys.resident:
        size = np.log([point["rows"] for point in points])
        for name in ("whole", "cluster", "select"):
            spent = np.log([max(point["seconds"][name], 1e-3) for point in points])
            line[f"slope_{name}"] = round(float(np.polyfit(size, spent, 1)[0]), 3)
    record.emit("select_resident" if keys.resident else "select", line, keys)


if __name__ == "__main__":
    main()
