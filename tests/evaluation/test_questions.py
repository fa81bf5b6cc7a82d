"""Question files: read with file and line in every complaint; the limit per task."""

import json

import pytest

from coincide_jax.core.errors import UserError
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
        ("{broken\n", r"animals\.jsonl, line 2, column 2: not valid JSON"),
        ({"id": "q2", "question": "x", "metric": "mc"}, "line 2: field 'answers' is missing"),
        (GOOD | {"id": "q2", "answers": "A"}, "line 2: 'answers' is str; expected a list"),
        (GOOD | {"id": "q2", "metric": "numbr"}, "line 2: unknown metric 'numbr'; did you mean 'number'"),
        (GOOD, "line 2: question id 'q1' stands twice"),
    ],
)
def test_bad_rows_are_named(tmp_path, bad, message):
    write(tmp_path / "q", "animals.jsonl", [GOOD, bad])
    with pytest.raises(UserError, match=message):
        questions.from_folder(tmp_path / "q")


def test_no_folder_and_no_files(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        questions.from_folder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no <task>\.jsonl"):
        questions.from_folder(tmp_path / "empty")


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
