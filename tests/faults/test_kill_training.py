"""Training that is killed again and again, in a save, in a step, while reading: the last run ends with the numbers of
an undisturbed one. Tier `long`: 21 SIGKILL, 5 SIGTERM."""

import json
import random
import shutil
import signal
import threading
import time

import command
import pytest

from coincide_jax.core import artifacts

STEPS, ROUND = 60, 4
RUN = (
    command.TINY, "--notable", "--config.curriculum.name=coincide_plus", "--config.curriculum.pool=all",
    "--config.curriculum.k=4", f"--config.curriculum.round_steps={ROUND}", "--config.curriculum.rehearsal=0.2",
    "--config.curriculum.probe=2", "--config.curriculum.watch=3", f"--config.train.steps={STEPS}",
    "--config.train.batch=8", "--config.train.micro_batch=4", "--config.train.checkpoint_every=3",
)  # fmt: skip
EARLIER = ("dataset", "base", "cluster")  # all that training from the pool reads
KILLS = {"save": 7, "step": 7, "data": 7}


def prepare(workdir, finished):
    """A workdir with the stages that training needs, out of the finished run."""
    for name in EARLIER:
        shutil.copytree(finished[0] / name, workdir / name)
    return workdir


def saved(workdir) -> int:
    """The last step of which a checkpoint is whole."""
    return max((int(path.parent.name) for path in workdir.glob("train/checkpoints/*/commit_success.txt")), default=0)


def saving(workdir) -> bool:
    """Whether a checkpoint is on disk that is not whole yet."""
    return any(
        not (path / "commit_success.txt").exists() for path in workdir.glob("train/checkpoints/*") if path.is_dir()
    )


def rounds(workdir) -> int:
    """Lines of curriculum.jsonl: a round is drawn, its records are about to be read."""
    path = workdir / "train" / "curriculum.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def interrupted(workdir, moment: str, seed: str, number: int) -> tuple[int, str]:
    """A run that is sent signal `number` at a moment drawn by `seed`; its status and what it printed.

    save: as soon as an unfinished checkpoint is seen after so many whole ones; data: when a round was drawn; step: some
    time after a checkpoint.
    """
    chance = random.Random(seed)
    begun_at, drawn_at, later = saved(workdir), rounds(workdir), chance.randint(0, 1)

    def ready() -> bool:
        if moment == "save":
            return saved(workdir) >= begun_at + 3 * later and saving(workdir)
        if moment == "data":
            return rounds(workdir) > drawn_at + later
        return saved(workdir) > begun_at + 3 * later

    process = command.start(*RUN, f"--workdir={workdir}", "--stages=train")

    def watch() -> None:
        while process.poll() is None and not ready():
            time.sleep(0.001)
        time.sleep(0.0 if moment == "save" else chance.uniform(0.0, 0.03))
        process.send_signal(number)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = process.stdout.read()
    watcher.join()
    return process.wait(), output


def outcome(workdir) -> dict:
    """Every number that training left: lines without their times, fingerprint of the weights, what was drawn."""
    found = {}
    for name in ("metrics", "curriculum", "arms"):
        lines = artifacts.read_jsonl(workdir / "train" / f"{name}.jsonl")
        found[name] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    summary = json.loads((workdir / "train" / "manifest.json").read_text())["summary"]
    times = {
        name: {key: value for key, value in summary[name].items() if key != "seconds"} for name in ("probe", "watch")
    }
    return found | {"summary": summary | times}


@pytest.fixture(scope="module")
def undisturbed(finished, tmp_path_factory):
    workdir = prepare(tmp_path_factory.mktemp("undisturbed") / "run", finished)
    status, output = command.run(*RUN, f"--workdir={workdir}", "--stages=train")
    assert status == 0, output
    found = outcome(workdir)
    assert len(found["metrics"]) == STEPS and len(found["curriculum"]) == STEPS // ROUND
    assert found["arms"][-1]["step"] == STEPS
    return found


def finish(workdir, undisturbed) -> None:
    status, output = command.run(*RUN, f"--workdir={workdir}", "--stages=train")
    assert status == 0, output
    assert outcome(workdir) == undisturbed


@pytest.mark.long
@pytest.mark.parametrize("moment", KILLS)
def test_killed_again_and_again(moment, undisturbed, finished, tmp_path):
    workdir = prepare(tmp_path / "run", finished)
    for number in range(KILLS[moment]):
        status, output = interrupted(workdir, moment, f"{moment}/{number}", signal.SIGKILL)
        assert status == -signal.SIGKILL and not (workdir / "train" / "manifest.json").exists(), output
    finish(workdir, undisturbed)


@pytest.mark.long
def test_sigterm_again_and_again(undisturbed, finished, tmp_path):
    workdir, steps = prepare(tmp_path / "run", finished), [0]
    for number in range(5):
        status, output = interrupted(workdir, ("step", "data", "save")[number % 3], f"term/{number}", signal.SIGTERM)
        assert status == 143 and "[train] SIGTERM: saved at step " in output, output
        steps.append(saved(workdir))
        assert steps[-1] > steps[-2]
    finish(workdir, undisturbed)
