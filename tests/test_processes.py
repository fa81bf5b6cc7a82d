"""Several processes that run one command: the arrays of one process, one voice, one error, nothing lost by a kill."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import command
import numpy as np
import pytest

from coincide_jax.core import artifacts, processes, store
from coincide_jax.core.errors import UserError

N, WIDTH, K = 900, 80, 12
FILES = ("cluster/centroids.npy", "cluster/assignment.npy", "select/indices.npy", "select/clusters.parquet")


def start(count: int, devices: int, arguments, module=("-m", "coincide_jax.main"), each=()) -> list[subprocess.Popen]:
    """`count` processes of so many devices each; all that one says goes to its `stdout`. `each`: more arguments of each
    of them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = command.environment() | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    lines = [[sys.executable, *module, *arguments, f"--coordinator=localhost:{port}", f"--processes={count}"]] * count
    return [
        subprocess.Popen(
            [*line, f"--process={index}", *(each[index] if each else ())], cwd=command.ROOT, env=settings, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for index, line in enumerate(lines)
    ]  # fmt: skip


def end(running: list[subprocess.Popen], seconds: float = 600) -> tuple[list[int], list[str]]:
    """Exit statuses and what was said."""
    said = [process.communicate(timeout=seconds)[0] for process in running]
    return [process.returncode for process in running], said


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> pathlib.Path:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((K, WIDTH))[rng.integers(0, K, N)] + rng.standard_normal((N, WIDTH))
    path = tmp_path_factory.mktemp("features") / "f.npy"
    np.save(path, (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16))
    return path


def arguments(features: pathlib.Path, workdir: pathlib.Path, *more: str) -> list[str]:
    keys = {"extract.features": features, "cluster.k": K, "cluster.chunk": 200, "cluster.iterations": 6}
    return [
        "--config=configs/arrays.py",
        f"--workdir={workdir}",
        *(f"--config.{k}={v}" for k, v in keys.items()),
        *more,
    ]


def test_two_select_what_one_does(features, tmp_path):
    status, output = command.call(*arguments(features, tmp_path / "one"))
    assert status == 0, output
    statuses, said = end(start(2, 2, arguments(features, tmp_path / "two")))
    assert statuses == [0, 0], said
    for file in FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    assert "[select] indices" in said[0] and "[" + "cluster]" not in said[1] and "[select]" not in said[1]
    recorded = artifacts.read_json(tmp_path / "two" / "cluster" / "manifest.json")["recorded"]
    assert recorded["processes"] == 2 and recorded["device"].startswith("4 x")
    # and one process finds complete what two have made
    status, output = command.call(*arguments(features, tmp_path / "two"))
    assert status == 0 and output.count("complete") == 2, output


def test_an_error_is_told_by_all_and_ends_all(features, tmp_path):
    bad = np.load(features)
    bad[123, 4] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    statuses, said = end(start(2, 1, arguments(tmp_path / "bad.npy", tmp_path / "w")), 60)
    assert statuses == [2, 2] and all("row 123 is not finite" in text for text in said), said


def test_an_error_of_the_one_that_works_alone_ends_all(features, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "select").write_text("in the way")
    statuses, said = end(start(2, 1, arguments(features, tmp_path / "w")), 60)
    assert statuses == [2, 2] and all("select" in text and "coincide: " in text for text in said), said


def test_another_command_is_refused(features, tmp_path):
    running = start(2, 1, arguments(features, tmp_path / "w"), each=([], ["--config.cluster.k=11"]))
    statuses, said = end(running, 60)
    assert statuses == [2, 2] and all("cluster.k is 11 in process 1 and 12 in process 0" in text for text in said), said


def test_a_layer_over_several_processes_is_refused(features, tmp_path):
    statuses, said = end(start(2, 1, arguments(features, tmp_path / "w", "--config.device.model_parallel=2")), 60)
    assert statuses == [2, 2] and all("divisor of the 1 devices that a process has" in text for text in said), said


def test_nobody_at_the_address(monkeypatch):
    monkeypatch.setattr(processes, "WAIT", 1)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match="not to be reached"):
        processes.start(f"localhost:{port}", 2, 1)
    with socket.create_server(("", 0)) as taken, pytest.raises(UserError, match="another process 0"):
        processes.start(f"localhost:{taken.getsockname()[1]}", 2, 0)


SHARDS = """
import pathlib, sys
import numpy as np
from absl import app, flags
from coincide_jax.core import artifacts, processes, store
flags.DEFINE_string("out", "", ""); flags.DEFINE_string("coordinator", "", "")
flags.DEFINE_integer("processes", 0, ""); flags.DEFINE_integer("process", 0, "")
artifacts.SHARD_ROWS, artifacts.CHUNK_ROWS = 32, 8

def main(_):
    keys = flags.FLAGS
    processes.start(keys.coordinator, keys.processes, keys.process)
    out = pathlib.Path(keys.out)
    assert processes.led(lambda: list(store.create(out / "f.zarr", 150, 4).shape)) == [150, 4]
    written = store.create(out / "f.zarr", 150, 4)
    for first in processes.share(written.shards):
        written.write(first, np.full((min(32, 150 - first), 4), first + processes.jax.process_index(), np.float16))
    processes.together()
    held = store.open_features(out / "f.zarr")[0:150]
    print("READ", held[:, 0].tolist())
    artifacts.write_json(out / "who.json", processes.jax.process_index())

app.run(main)
"""


def test_each_writes_its_own_shards_and_one_writes_files(tmp_path):
    (tmp_path / "shards.py").write_text(SHARDS)
    statuses, said = end(start(2, 1, [f"--out={tmp_path}"], module=(str(tmp_path / "shards.py"),)), 60)
    assert statuses == [0, 0], said
    wanted = [float(first + number % 2) for number, first in enumerate(range(0, 150, 32)) for _ in range(32)][:150]
    for text in said:
        assert json.loads(text.split("READ ")[1].splitlines()[0]) == wanted
    assert artifacts.read_json(tmp_path / "who.json") == 0
    assert store.open_features(tmp_path / "f.zarr").shape == (150, 4)


@pytest.mark.parametrize(
    "given", [("localhost:1", None, None), ("localhost", 2, 0), ("localhost:1", 2, 2), ("localhost:1", 2, -1)]
)
def test_half_an_address_is_refused(given):
    with pytest.raises(UserError, match="HOST:PORT"):
        processes.start(*given)


def test_numbers_without_an_address_are_refused(features, tmp_path):
    status, output = command.call(*arguments(features, tmp_path / "w", "--process=1"))
    assert status == 2 and "--coordinator" in output


def test_one_process_leads_and_has_everything():
    assert processes.leads() and processes.share(range(5)) == range(5)
    assert processes.led(lambda: {"a": 1}) == {"a": 1} and processes.told(5) == [5]
    processes.together()


def kill(running, index: int, ready, number: int) -> None:
    """Sends a signal to one of the processes once `ready()`."""
    for _ in range(3000):
        if ready() or running[index].poll() is not None:
            break
        time.sleep(0.1)
    os.kill(running[index].pid, number)


@pytest.mark.long
@pytest.mark.parametrize("index", [0, 1])
def test_a_kill_of_one_ends_the_others_and_loses_nothing(index, features, tmp_path):
    more = ("--config.cluster.iterations=40", "--config.cluster.k=300", "--config.cluster.checkpoint_every=1")
    status, output = command.call(*arguments(features, tmp_path / "one", *more))
    assert status == 0, output
    running = start(2, 1, arguments(features, tmp_path / "two", *more))
    kill(running, index, (tmp_path / "two" / "cluster" / "state.npz").exists, signal.SIGKILL)
    begin = time.monotonic()
    statuses, said = end(running, 4 * processes.HEARTBEAT)
    assert statuses[index] == -signal.SIGKILL and statuses[1 - index] != 0, said
    print(f"the other one ended after {time.monotonic() - begin:.0f} s")
    assert not (tmp_path / "two" / "select" / "indices.npy").exists()
    statuses, said = end(start(2, 1, arguments(features, tmp_path / "two", *more)))
    assert statuses == [0, 0] and "goes on after iteration" in said[0], said
    for file in FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


@pytest.mark.long
def test_sigterm_outside_of_training_ends_all(features, tmp_path):
    more = ("--config.cluster.iterations=200", "--config.cluster.k=300", "--config.cluster.checkpoint_every=1")
    running = start(2, 1, arguments(features, tmp_path / "w", *more))
    kill(running, 1, (tmp_path / "w" / "cluster" / "state.npz").exists, signal.SIGTERM)
    statuses, said = end(running, 4 * processes.HEARTBEAT)
    assert statuses[1] == -signal.SIGTERM and statuses[0] != 0, said
    assert not (tmp_path / "w" / "select" / "indices.npy").exists()


RESTORE = """
import os, pathlib, sys
import jax, numpy as np
from absl import app, flags
from coincide_jax.core import axes, checkpoint, processes
flags.DEFINE_string("out", "", ""); flags.DEFINE_string("fault", "", ""); flags.DEFINE_string("coordinator", "", "")
flags.DEFINE_integer("processes", 0, ""); flags.DEFINE_integer("process", 0, "")

def main(_):
    keys = flags.FLAGS
    processes.start(keys.coordinator, keys.processes, keys.process)
    mesh = axes.make_mesh()
    by_rows = jax.NamedSharding(mesh, jax.P("data"))
    state = lambda value: {"x": axes.put(np.full((8, 4), value, np.float32), by_rows)}
    held = checkpoint.Checkpoints(pathlib.Path(keys.out) / "ck", 5)
    with processes.leaving():
        go(keys, held, state)

def go(keys, held, state):
    if keys.fault == "none":
        for step in (1, 2):
            held.save(step, state(step), {})
        held.wait()
    if keys.process == 1 and keys.fault:
        restore = held.manager.restore
        def faulty(step, **more):
            if step == 2 and keys.fault == "dies":
                os._exit(7)
            if step == 2 and keys.fault == "cannot read":
                raise OSError("a part of process 1")
            return restore(step, **more)
        held.manager.restore = faulty
    step, found, _ = held.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                                               state(0)))
    print("RESTORED", step, float(axes.fetch(found["x"]).mean()))
    held.close()

app.run(main)
"""


@pytest.mark.long
def test_what_one_of_several_cannot_read_is_not_deleted(tmp_path):
    (tmp_path / "restore.py").write_text(RESTORE)

    def run(fault: str):
        line = [f"--out={tmp_path}", f"--fault={fault}"]
        return end(start(2, 1, line, module=(str(tmp_path / "restore.py"),)), 4 * processes.HEARTBEAT)

    statuses, said = run("none")
    assert statuses == [0, 0] and all("RESTORED 2 2.0" in text for text in said), said
    statuses, said = run("dies")
    assert statuses[1] == 7 and statuses[0] != 0, said
    statuses, said = run("cannot read")
    assert 0 not in statuses and "was not read: a part of process 1; the same command" in said[1], said
    statuses, said = run("")
    assert statuses == [0, 0] and all("RESTORED 2 2.0" in text for text in said), said


def losses(folder: pathlib.Path) -> list[float]:
    return [line["loss"] for line in artifacts.read_jsonl(folder / "metrics.jsonl")]


@pytest.mark.long
def test_two_run_the_whole_of_the_demo(tmp_path):
    """Every stage; SIGTERM to one of them in the base, which all save; then the same command to the end."""
    more = ["--config=configs/demo.py:tiny", "--config.base.steps=40", "--config.base.checkpoint_every=10"]
    status, output = command.call(*more, f"--workdir={tmp_path / 'one'}")
    assert status == 0, output
    line, metrics = [*more, f"--workdir={tmp_path / 'two'}"], tmp_path / "two" / "base" / "metrics.jsonl"
    running = start(2, 2, line)
    kill(running, 1, lambda: metrics.exists() and metrics.stat().st_size > 0, signal.SIGTERM)
    statuses, said = end(running)
    assert statuses == [143, 143] and "SIGTERM: saved" in said[0], said
    statuses, said = end(start(2, 2, line))
    assert statuses == [0, 0] and "goes on at step" in said[0], said
    for stage in ("base", "train", "rows/full/seed0/train"):
        np.testing.assert_allclose(losses(tmp_path / "one" / stage), losses(tmp_path / "two" / stage), rtol=1e-4)
    mine, theirs = (store.open_features(tmp_path / run / "extract" / "features.zarr")[:] for run in ("one", "two"))
    assert np.abs(mine.astype(np.float32) - theirs.astype(np.float32)).max() < 1e-3
    assert (tmp_path / "two" / "train" / "export" / "config.json").exists()
    assert (tmp_path / "two" / "report" / "report.html").stat().st_size > 100_000
