"""Question folders: checked by file and line; questions made from held-out records."""

import json

import numpy as np
import pytest
from PIL import Image

from coincide_jax.core import artifacts
from coincide_jax.core.errors import UserError
from coincide_jax.dataset import questions, source
from coincide_jax.dataset.source import Record

GOOD = {"id": "1", "image": "x.png", "question": "What?", "answers": ["cat"], "metric": "exact", "unknown": 3}


@pytest.fixture
def images(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "x.png")
    return tmp_path


def write(folder, *lines):
    folder.mkdir(exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "t.jsonl").write_text(text)
    return folder


def test_a_good_folder(images):
    folder = write(images / "eval", GOOD, "", GOOD | {"image": None})
    count, digests = questions.check_folder(folder, images, threads=1)
    assert count == 2
    assert digests == set(source.check_images({"x.png"}, images, 1)[0].values())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": ', "t.jsonl is not valid JSON: line 3, column 8"),
        ([1], "t.jsonl, line 3: expected an object, found list"),
        (GOOD | {"question": " "}, "line 3: field 'question' is missing"),
        (GOOD | {"metric": None}, "line 3: field 'metric' is missing"),
        (GOOD | {"answers": "cat"}, "line 3: field 'answers' must be a list"),
        (GOOD | {"image": "y.png"}, "line 3: image y.png does not exist"),
        (GOOD | {"image": "../y.png"}, "line 3: image path '../y.png' leaves"),
    ],
)
def test_a_broken_line_is_named(images, line, reason):
    with pytest.raises(UserError, match=reason):
        questions.check_folder(write(images / "eval", GOOD, "", line), images, threads=1)


def test_no_folder_and_an_empty_one(images):
    with pytest.raises(UserError, match="none does not exist"):
        questions.check_folder(images / "none", images, 1)
    with pytest.raises(UserError, match=r"x\.png is a file"):
        questions.check_folder(images / "x.png", images, 1)
    with pytest.raises(UserError, match=r"holds no \.jsonl"):
        questions.check_folder(images, images, 1)
    with pytest.raises(UserError, match="hold no question"):
        questions.check_folder(write(images / "eval", ""), images, 1)


@pytest.mark.parametrize(
    ("question", "answer", "metric"),
    [
        (f"Which?\nA. x\nB. y\n{source.LETTER_SUFFIX}", "B", "mc"),
        ("Is it?", "Yes", "yesno"),
        ("How much?", "1,250.5", "number"),
        ("What?", "red fire truck", "exact"),
        ("What grade?", "B", "exact"),
        ("Describe.", "A red truck stands there.", "caption_f1"),
    ],
)
def test_metric_by_the_form_of_the_answer(question, answer, metric):
    assert questions.metric_of(question, answer) == metric


def test_held_out_records_become_question_files(tmp_path):
    records = [
        Record(0, "a", "x.png", (("Is it?", "no"), ("Why?", "so")), "coco/short", {}),
        Record(1, "b", None, (("Say.", "some words of mine"),), "text_only", {}),
    ]
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "old.jsonl").write_text("")
    questions.write_folder(tmp_path / "q", questions.heldout_questions(records))
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == ["coco_short.jsonl", "text_only.jsonl"]
    (row,) = artifacts.read_jsonl(tmp_path / "q" / "coco_short.jsonl")
    assert row == dict(id="a", image="x.png", question="Is it?", answers=["no"], metric="yesno", task="coco/short")
