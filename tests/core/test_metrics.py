"""Log lines where there is no terminal, JSON lines on disk."""

import json
import pathlib

import pytest

from coincide_jax.core import metrics
from coincide_jax.core.errors import UserError


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, in seconds."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_progress_logs_every_ten_seconds_without_a_terminal(clock, capsys):
    with metrics.Progress("extract", 100, "records") as progress:
        assert not progress.terminal
        clock[0] += 4
        progress.advance(10)
        assert capsys.readouterr().out == ""
        clock[0] += 6
        progress.advance(10, "loss 1.5")
        assert capsys.readouterr().out == "[extract] 20/100 records · 2.0/s · 40 s left · loss 1.5\n"
        clock[0] += 9
        progress.advance(10)
        assert capsys.readouterr().out == ""
        clock[0] += 1
        progress.advance(70)
        assert capsys.readouterr().out == "[extract] 100/100 records · 5.0/s · 0 s left\n"
    assert progress.done == 100


def test_progress_is_a_bar_on_a_terminal(clock, capsys, monkeypatch):
    monkeypatch.setattr(metrics.sys.stderr, "isatty", lambda: True)
    with metrics.Progress("train", 4, "steps") as progress:
        clock[0] += 60
        progress.advance(2)
        progress.bar.refresh()
    found = capsys.readouterr()
    assert found.out == "" and "train" in found.err and "2/4" in found.err


def test_say(capsys):
    metrics.say("cluster", "60 clusters")
    assert capsys.readouterr().out == "[cluster] 60 clusters\n"


def test_json_lines_are_on_disk_at_once_and_appended(tmp_path):
    path = tmp_path / "train" / "metrics.jsonl"
    first = metrics.JsonLines(path)
    first.write(step=1, loss=2.5)
    assert json.loads(path.read_text()) == {"step": 1, "loss": 2.5}
    first.close()
    second = metrics.JsonLines(path)
    second.write(step=2, note="ä")
    second.close()
    assert [json.loads(row)["step"] for row in path.read_text().splitlines()] == [1, 2]


def test_no_room_for_a_line_is_one_sentence():
    lines = metrics.JsonLines(pathlib.Path("/dev/full"))
    with pytest.raises(UserError, match="/dev/full cannot be written: No space left on device"):
        lines.write(step=1)
    lines.close()
