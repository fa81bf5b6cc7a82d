"""SIGKILL in the middle of a stage: the next run finishes with the numbers of an undisturbed one."""

import json
import os
import random
import signal
import time

import command
import numpy as np
import pytest

from coincide_jax.core import artifacts

KILLED = ("dataset", "base", "extract", "train")
OTHERS = ("reference", "cluster", "select", "evaluate", "report")


def kill_in(stage: str, workdir, delay: float) -> bool:
    """Starts a run and kills it `delay` seconds after `stage` begins. Returns whether it died of that."""
    process = command.start(command.TINY, f"--workdir={workdir}")
    for line in process.stdout:
        if f"[{stage}] begins" in line:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.read()
    return process.wait() == -signal.SIGKILL


def results(workdir) -> dict:
    """What must not change: picks and scores of every row."""
    return {
        "indices": np.load(workdir / "select" / "indices.npy").tolist(),
        "scores": {
            str(path.relative_to(workdir)): json.loads(path.read_text())
            for path in sorted(workdir.rglob("evaluate/scores.json"))
        },
        "losses": [row["loss"] for row in artifacts.read_jsonl(workdir / "train" / "metrics.jsonl")],
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Results of a run that nobody killed."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    status, output = command.run(command.TINY, f"--workdir={workdir}")
    assert status == 0, output
    return results(workdir)


def finish(workdir, undisturbed):
    status, output = command.run(command.TINY, f"--workdir={workdir}")
    assert status == 0, output
    assert results(workdir) == undisturbed


def test_killed_in_four_stages_of_one_run(undisturbed, tmp_path):
    for stage in KILLED:
        assert kill_in(stage, tmp_path, delay=0.5), f"the run was over before the kill in {stage}"
    finish(tmp_path, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("stage", KILLED + OTHERS)
@pytest.mark.parametrize("attempt", range(3))
def test_killed_at_a_random_moment(stage, attempt, undisturbed, tmp_path):
    delay = random.Random(f"{stage}/{attempt}").uniform(0.0, 3.0)
    kill_in(stage, tmp_path, delay)
    finish(tmp_path, undisturbed)


def test_sigterm_in_training_saves_and_exits(undisturbed, tmp_path):
    process = command.start(command.TINY, f"--workdir={tmp_path}")
    for line in process.stdout:
        if "[train] begins" in line:
            time.sleep(1.0)
            os.kill(process.pid, signal.SIGTERM)
            break
    process.stdout.read()
    assert process.wait() == 143
    finish(tmp_path, undisturbed)
