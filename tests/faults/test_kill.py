"""SIGKILL in the middle of a stage: the next run finishes with the numbers of an undisturbed one."""

import json
import random
import shutil
import signal
import threading
import time

import command
import numpy as np
import pytest

from coincide_jax import pipeline
from coincide_jax.core import artifacts
from coincide_jax.core.metrics import MEASURED

# stage → what is on disk when it is half done; saving after every step so that something is there to go on from
HALF_DONE = {
    "dataset": "dataset/drawn",
    "base": "base/checkpoints/2/commit_success.txt",
    "extract": "extract/features.zarr/zarr.json",
    "train": "train/checkpoints/1/commit_success.txt",
}
SAVE_OFTEN = ("--config.base.checkpoint_every=1", "--config.train.checkpoint_every=1")


def interrupt(workdir, stage: str, ready, number: int = signal.SIGKILL) -> tuple[int, str]:
    """Starts a run and sends it a signal when `stage` has begun and `ready()` is true. Returns status and output."""
    process = command.start(command.TINY, f"--workdir={workdir}", *SAVE_OFTEN)
    begun = threading.Event()

    def watch() -> None:
        begun.wait()
        while process.poll() is None and not ready():
            time.sleep(0.005)
        process.send_signal(number)

    watcher = threading.Thread(target=watch)
    watcher.start()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if f"[{stage}] begins" in line:
            begun.set()
    begun.set()
    watcher.join()
    return process.wait(), "".join(lines)


def results(workdir) -> dict:
    """What must not change: picks of every row, what each step of it saw and lost, what it answered and scored."""
    found = {}
    for path in sorted(workdir.rglob("manifest.json")):
        folder = path.parent
        name = str(folder.relative_to(workdir))
        if folder.name == "select":
            found[name] = np.load(folder / "indices.npy").tolist()
        elif folder.name in ("base", "reference", "train"):
            steps = artifacts.read_jsonl(folder / "metrics.jsonl")
            found[name] = [{key: value for key, value in step.items() if key not in MEASURED} for step in steps]
            found[f"{name}, weights"] = artifacts.read_json(path)["summary"]["fingerprint"]
        elif folder.name == "evaluate":
            found[name] = json.loads((folder / "scores.json").read_text())
            found[f"{name}, answers"] = artifacts.read_jsonl(folder / "answers.jsonl")
    return found


def finish(workdir, finished, *more: str) -> str:
    """Runs to the end and compares all stages that there are; returns the screen."""
    status, output = command.run(command.TINY, f"--workdir={workdir}", *SAVE_OFTEN, *more)
    assert status == 0, output
    found, wanted = results(workdir), results(finished[0])
    assert found == (wanted if not more else {name: wanted[name] for name in found}) and found
    return output


def test_killed_in_four_stages_of_one_run(finished, tmp_path):
    outputs = {}
    for stage, half_done in HALF_DONE.items():
        status, outputs[stage] = interrupt(tmp_path, stage, (tmp_path / half_done).exists)
        assert status == -signal.SIGKILL and not (tmp_path / stage / "manifest.json").exists(), outputs[stage]
    last = finish(tmp_path, finished)
    for stage, output in (("dataset", outputs["base"]), ("base", outputs["extract"]), ("train", last)):
        assert f"[{stage}] begins · {tmp_path}/{stage} · attempt 2, going on from what is there" in output
    assert "[base] goes on at step " in outputs["extract"] and "[train] goes on at step " in last


def test_sigterm_in_training_saves_and_exits(finished, tmp_path):
    """The stages before it are those of the finished run."""
    workdir, stages = tmp_path / "run", "--stages=train,evaluate"
    later = [str(finished[0] / name) for name in ("train", "evaluate", "report", "rows")]
    shutil.copytree(finished[0], workdir, ignore=lambda folder, names: {n for n in names if f"{folder}/{n}" in later})
    status, output = interrupt(workdir, "train", (workdir / "train" / "run.json").exists, signal.SIGTERM)
    assert status == 143 and "[train] SIGTERM: saved at step 1 of 2" in output, output
    output = finish(workdir, finished, stages)
    assert "[train] goes on at step 1 of 2" in output and "train" in results(workdir) and "evaluate" in results(workdir)


@pytest.mark.long
@pytest.mark.parametrize("attempt", range(1))
@pytest.mark.parametrize("stage", [name for name in pipeline.NAMES if name not in pipeline.WARMUP])
def test_killed_at_a_random_moment(stage, attempt, finished, tmp_path):
    delay = random.Random(f"{stage}/{attempt}").uniform(0.0, 3.0)
    interrupt(tmp_path, stage, lambda: not time.sleep(delay))
    finish(tmp_path, finished)
