"""Question files as they are asked: task, options, metric, ids that tell them apart; the limit per task."""

import json

import pytest

from coincide_jax.core.errors import UserError
from coincide_jax.dataset import questions as files
from coincide_jax.dataset.source import Record
from coincide_jax.evaluation import questions


def write(folder, name, rows):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


GOOD = {"id": "q1", "image": "a.jpg", "question": "<image>\nWhat?\nA. cat\nB. dog", "answers": ["A"], "metric": "mc"}


def test_reads_task_options_and_text(tmp_path):
    write(tmp_path / "q", "animals.jsonl", [GOOD, GOOD | {"id": "q2", "image": None, "choices": ["x", "y"]}])
    first, second = questions.from_folder(tmp_path / "q")
    assert first == questions.Question("q1", "animals", "a.jpg", "What?\nA. cat\nB. dog", ("A",), "mc", ("cat", "dog"))
    assert second.image is None and second.choices == ("x", "y")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{broken\n", r"animals\.jsonl is not valid JSON: line 2, column 2"),
        ({"id": "q2", "question": "x", "metric": "mc"}, "line 2: field 'answers' must be a list of at least one text"),
        (GOOD | {"id": "q2", "question": "<image>\n"}, "line 2: field 'question' is missing or no text"),
        (GOOD | {"id": "q2", "choices": {"A": "cat"}}, "line 2: field 'choices' must be a list of texts"),
        (GOOD | {"id": 1.5}, "line 2: field 'id' is float"),
        (GOOD | {"id": "q2", "metric": "numbr"}, "line 2: unknown metric 'numbr'; did you mean 'number'"),
        (GOOD, "line 2: question id 'q1' stands twice in the file; first .*line 1"),
        (GOOD | {"task": "other"}, "line 2: question id 'q1' stands twice in the file"),
    ],
)
def test_bad_rows_are_named(tmp_path, bad, message):
    write(tmp_path / "q", "animals.jsonl", [GOOD, bad])
    with pytest.raises(UserError, match=message):
        questions.from_folder(tmp_path / "q")


def test_no_folder_and_no_files(tmp_path):
    with pytest.raises(UserError, match="expected a folder"):
        questions.from_folder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.jsonl file"):
        questions.from_folder(tmp_path / "empty")


def test_the_task_is_the_field_of_the_row_else_the_file(tmp_path):
    write(tmp_path / "q", "coco_short.jsonl", [GOOD | {"task": "coco/short"}, GOOD | {"id": 0, "task": ""}])
    found = questions.from_folder(tmp_path / "q")
    assert [(question.task, question.id) for question in found] == [("coco/short", "q1"), ("coco_short", "0")]


def test_one_id_in_one_task_of_two_files_is_an_error_and_in_two_tasks_is_none(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "two", f"{name}.jsonl", [GOOD])
        write(tmp_path / "one", f"{name}.jsonl", [GOOD | {"task": "same"}])
    assert [question.task for question in questions.from_folder(tmp_path / "two")] == ["a", "b"]
    with pytest.raises(
        UserError, match=r"b\.jsonl, line 1: question id 'q1' stands twice in the task; first .*a\.jsonl"
    ):
        questions.from_folder(tmp_path / "one")


def test_held_out_records_of_one_id_become_questions_of_different_ids(tmp_path):
    names = ["a", "a", "b", "a-row1", "a"]
    records = [
        Record(number, name, None, (("What?", "x"),), f"t/{number % 2}", {}) for number, name in enumerate(names)
    ]
    files.write_folder(tmp_path / "q", files.heldout_questions(records))
    found = questions.from_folder(tmp_path / "q")
    assert sorted(question.id for question in found) == ["a", "a-row1", "a-row1-row3", "a-row4", "b"]
    assert {question.task for question in found} == {"t/0", "t/1"}  # as the records', so that the floor knows them


def test_limit_is_per_task_seeded_and_independent_of_other_tasks():
    def make(task, count):
        return [questions.Question(f"{task}{i}", task, None, "?", ("x",), "exact", ()) for i in range(count)]

    both = questions.limit([*make("a", 50), *make("b", 3)], 10, seed=0)
    alone = questions.limit(make("a", 50), 10, seed=0)
    assert [q for q in both if q.task == "a"] == alone and len(both) == 13
    assert [int(q.id[1:]) for q in alone] == sorted(int(q.id[1:]) for q in alone)
    assert questions.limit(make("a", 50), 10, seed=1) != alone
    assert len(questions.limit(make("a", 50), 0, seed=0)) == 50


def test_options_need_letters_in_order():
    assert questions.options("Which?\nA. one\n(B) two\nC) three") == ("one", "two", "three")
    assert questions.options("Who is B. Smith?") == ()
    assert questions.options("Which?\nA. one\nC. two") == ()
