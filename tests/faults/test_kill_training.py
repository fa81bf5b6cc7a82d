"""Training that is killed again and again, in a save, in a step, while reading: the last run ends with the numbers of
an undisturbed one. Tier `long`: 21 SIGKILL, 5 SIGTERM."""

import multiprocessing
import os
import pathlib
import signal

import killable
import pytest

from coincide_jax.core import artifacts
from coincide_jax.core.metrics import MEASURED

TESTS = pathlib.Path(killable.__file__).parent
LINES = ("metrics.jsonl", "curriculum.jsonl", "arms.jsonl")
KILLS = 7  # of each kind, one after another on one run


@pytest.fixture(scope="module")
def processes():
    """Processes that begin anew: one forked from this one would hang, since JAX has threads here."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TESTS.parent), str(TESTS), before)))
    yield multiprocessing.get_context("spawn")
    os.environ["PYTHONPATH"] = before


def run(processes, out, *arguments) -> int:
    """Exit status of one process, minus the signal that ended it."""
    process = processes.Process(target=killable.train, args=(str(out), *arguments))
    process.start()
    process.join(300)
    return process.exitcode


def outcome(out) -> dict:
    """Every number that the run left: lines without their times, fingerprint of the weights."""
    found = {name: artifacts.read_jsonl(out / name) for name in LINES}
    for lines in found.values():
        for line in lines:
            for key in MEASURED:
                line.pop(key, None)
    return found | artifacts.read_json(out / "outcome.json")


@pytest.fixture(scope="module")
def undisturbed(processes, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert run(processes, out) == 0
    found = outcome(out)
    assert [line["step"] for line in found["metrics.jsonl"]] == list(range(1, killable.STEPS + 1))
    assert len(found["curriculum.jsonl"]) == killable.STEPS // killable.ROUND
    assert found["arms.jsonl"][-1]["step"] == killable.STEPS and "probe" in found["arms.jsonl"][0]
    return found


def saved(out) -> int:
    """The last step of which there is a whole checkpoint."""
    return max((int(path.parent.name) for path in out.glob("checkpoints/*/commit_success.txt")), default=0)


@pytest.mark.long
@pytest.mark.parametrize("moment", killable.FURTHEST)
def test_killed_again_and_again(moment, processes, undisturbed, tmp_path):
    for number in range(KILLS):
        status = run(processes, tmp_path, moment, signal.SIGKILL, f"{moment}/{number}")
        assert status == -signal.SIGKILL and not (tmp_path / "outcome.json").exists()
    assert 0 < saved(tmp_path) < killable.STEPS, "the kills came before or after everything"
    assert run(processes, tmp_path) == 0
    assert outcome(tmp_path) == undisturbed


@pytest.mark.long
def test_sigterm_again_and_again(processes, undisturbed, tmp_path):
    steps = [0]
    for number in range(5):
        moment = ("step", "data", "save")[number % 3]
        assert run(processes, tmp_path, moment, signal.SIGTERM, f"term/{number}") == 143
        steps.append(saved(tmp_path))
        assert steps[-1] > steps[-2], "each stop saves what was done"
    assert run(processes, tmp_path) == 0
    assert outcome(tmp_path) == undisturbed
