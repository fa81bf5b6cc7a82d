"""Views without answers, and who was asked for: in order, once, on disk first, never above the budget."""

import json

import numpy as np
import pytest

from coincide_jax.core.errors import UserError
from coincide_jax.dataset import annotate, source


def record(index: int) -> dict:
    """With one question, or two if its index is odd."""
    who = (("human", "asked"), ("gpt", "said"))
    turns = [{"from": who[turn % 2][0], "value": f"{who[turn % 2][1]} {index}.{turn}"} for turn in range(4)]
    return {"id": f"r{index}", "conversations": turns[: 2 + 2 * (index % 2)]}


RECORDS = source.parse([record(index) for index in range(8)])[0]
VIEW = annotate.without_answers(RECORDS)


def start(path, budget=6, answers=None):
    return annotate.Annotator(path, VIEW, answers or annotate.OwnAnswers(RECORDS), budget, {})


def asked(path):
    return [tuple(json.loads(line).values()) for line in path.read_text().splitlines()]


def test_a_view_holds_no_answer_anywhere():
    assert "said" not in repr(VIEW) and "asked 3.2" in repr(VIEW) and "said" in repr(RECORDS)
    assert [question for question, _ in VIEW[3].turns] == [question for question, _ in RECORDS[3].turns]
    assert annotate.without_answers([None]) == [None]


def test_turns_come_after_the_question_and_every_line_once(tmp_path):
    path = tmp_path / "annotations.jsonl"
    one = start(path)
    with pytest.raises(RuntimeError, match=r"record 2 .'r2'. were read but never asked for"):
        one.turns(VIEW[2])
    one.ask([5], "probe", [0])
    one.ask_round(np.asarray([[2, 5], [-1, 2], [0, -1]]), 4)
    assert one.turns(VIEW[5]) == RECORDS[5].turns and one.turns(VIEW[2]) == RECORDS[2].turns
    assert asked(path) == [(5, "r5", "probe", 0), (2, "r2", "train", 4), (0, "r0", "train", 6)]
    assert one.trained_before(4).tolist() == [] and one.trained_before(6).tolist() == [2]
    assert (one.count("train"), one.count("probe")) == (2, 1)


def test_a_run_that_goes_on_neither_loses_nor_repeats_a_line(tmp_path):
    path = tmp_path / "annotations.jsonl"
    start(path).ask_round(np.asarray([[1, 2], [3, 4]]), 0)
    before = path.read_bytes()
    with open(path, "a") as file:
        file.write('{"index": 6, "id": "r6", "pur')  # killed in the middle of a line: that answer was never handed out
    again = start(path)
    again.ask_round(np.asarray([[1, 2], [3, 4]]), 0)
    assert path.read_bytes() == before and again.turns(VIEW[4]) == RECORDS[4].turns
    again.ask_round(np.asarray([[2, 7]]), 2)
    assert asked(path)[4:] == [(7, "r7", "train", 2)]


def test_the_budget_is_never_exceeded(tmp_path):
    one = start(tmp_path / "a.jsonl", budget=3)
    one.ask([0, 1, 2], "train", [0, 0, 0])
    one.ask([1, 2], "train", [1, 1])  # again, which costs nothing
    with pytest.raises(UserError, match="3 answers of a budget of 3 are used up and 1 more"):
        one.ask([3], "probe", [1])
    assert len(asked(tmp_path / "a.jsonl")) == 3


def test_a_file_of_answers_may_grow_while_the_run_waits(tmp_path):
    path, log = tmp_path / "answers.jsonl", tmp_path / "annotations.jsonl"
    path.write_text('{"id": "r0", "answers": ["no"]}\n{"index": 1, "answers": ["a", "b"]}\n')
    one = start(log, answers=annotate.FileAnswers(path))
    with pytest.raises(UserError, match=r"1 records that .* wait for answers, the first is 'r3' \(row 3\).*are 2; add"):
        one.ask([0, 1, 3], "train", [0, 0, 0])
    with open(path, "a") as file:
        file.write('{"id": "r3", "answers": ["c", "d"]}\n')
    again = start(log, answers=annotate.FileAnswers(path))
    again.ask([0, 1, 3], "train", [0, 0, 0])
    assert again.turns(VIEW[1]) == (("asked 1.0", "a"), ("asked 1.2", "b")) and len(asked(log)) == 3


def test_an_answer_that_was_read_may_not_change(tmp_path):
    path, log = tmp_path / "answers.jsonl", tmp_path / "annotations.jsonl"
    lines = ['{"id": "r0", "answers": ["no"]}', '{"id": "r2", "answers": ["yes"]}', '{"id": "r4", "answers": ["x"]}']
    path.write_text("\n".join(lines))
    start(log, answers=annotate.FileAnswers(path)).ask([0, 2], "train", [0, 0])
    path.write_text("\n".join(lines).replace('"x"', '"y"'))  # nobody has read it
    start(log, answers=annotate.FileAnswers(path)).ask([0, 2, 4], "train", [0, 0, 1])
    path.write_text("\n".join(lines).replace('"yes"', '"no"'))
    with pytest.raises(UserError, match=r"the answers to record 'r2' \(row 2\) are others than .* put them back, or"):
        start(log, answers=annotate.FileAnswers(path)).ask([0, 2], "train", [0, 0])


@pytest.mark.parametrize("line", ['{"id": "r0"}', '{"answers": ["x"]}', '["x"]', '{"id": "r0", "answers": [" "]}'])
def test_a_line_that_is_no_annotation(tmp_path, line):
    (tmp_path / "answers.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"line 1 of .* is no annotation; expected an id or index, and answers"):
        annotate.FileAnswers(tmp_path / "answers.jsonl")


def test_a_log_of_another_data_set_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"index": 1, "id": "else", "purpose": "train", "step": 0}\n')
    with pytest.raises(UserError, match=r"asks for record 1 .'else'., which the data set has not"):
        start(tmp_path / "a.jsonl")
