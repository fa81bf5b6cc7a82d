"""Records are read from every accepted form, and each kind of bad record is quarantined with its reason."""

import gzip
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from coincide_jax.core.errors import UserError
from coincide_jax.dataset import source


def record(name="a", image="x.png", question="<image>\nWhat?", answer="cat", **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns} | ({"image": image} if image else {}) | more


@pytest.fixture
def images(tmp_path) -> pathlib.Path:
    Image.fromarray(np.full((4, 6, 3), 7, np.uint8)).save(tmp_path / "x.png")
    return tmp_path


@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.json.gz", "r.jsonl.gz"])
def test_every_form_reads_the_same(tmp_path, name):
    rows = [record("a"), record("b", answer="Hündchen 🐶")]
    text = json.dumps(rows) if "jsonl" not in name else "\n\n".join(json.dumps(row) for row in rows) + "\n"
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert source.load(tmp_path / name) == rows


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[\n{"id": "a"},\n{"id": ,}]', "line 3, column 8"),
        ('{"id": "a"}\n{"id": "b"', "line 2, column 11"),
        ('[{"id": "a", "conversations": [{"from": "hum', "line 1, column 41"),
    ],
)
def test_broken_json_names_line_and_column(tmp_path, text, place):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=f"r.json is not valid JSON: {place}"):
        source.load(tmp_path / "r.json")


def test_what_is_no_file_of_records(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        source.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        source.load(tmp_path / "none.json")
    (tmp_path / "r.json.gz").write_bytes(gzip.compress(b"[]" * 999)[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        source.load(tmp_path / "r.json.gz")
    (tmp_path / "e.json").write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        source.load(tmp_path / "e.json")
    (tmp_path / "b.json").write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match="not UTF-8"):
        source.load(tmp_path / "b.json")


TURN = {"from": "human", "value": "<image>\nWhat?"}
SAID = {"from": "gpt", "value": "cat"}
BAD = {
    "does not exist": record(image="none.png"),
    "cannot be read": record(image="broken.png"),
    "no <image> mark": record(question="What?"),
    "2 <image> marks": record(question="<image> <image>What?"),
    "mark but no image": record(image=None),
    "not in the first human turn": record(conversations=[TURN | {"value": "Hi"}, SAID, TURN, SAID]),
    "turn 1 is empty": record(question="<image>\n "),
    "turn 2 is empty": record(answer=" "),
    "turn 2 is 'human', expected 'gpt'": record(conversations=[TURN, TURN | {"value": "So?"}]),
    "turn 1 is 'gpt', expected 'human'": record(conversations=[SAID, SAID, TURN, SAID]),
    "last question has no answer": record(conversations=[TURN, SAID, {"from": "human", "value": "And?"}]),
    "no conversations": record(conversations=[]),
    "has no text": record(conversations=[{"from": "human"}, SAID]),
    "id 'good' is already that of row 0": record("good"),
    "no id": record(None),
    "leaves the images folder": record(image="../x.png"),
    "'/etc/x.png' leaves": record(image="/etc/x.png"),
    "image is not a path": record(image=["x.png", "x.png"]),
    "the record is str": "hello",
}


@pytest.mark.parametrize("reason", BAD)
def test_each_reason(images, reason):
    (images / "broken.png").write_bytes((images / "x.png").read_bytes()[:40])
    records, quarantine, digests = source.validate([record("good"), BAD[reason]], images, threads=2)
    assert [r and r.id for r in records] == ["good", None]
    assert [row["index"] for row in quarantine] == [1]
    assert reason in quarantine[0]["reason"]
    assert list(digests) == ["x.png"]


def test_a_record_is_cleaned_but_kept_raw(images):
    turns = [{"from": "system", "value": "You see."}, TURN | {"value": "What is it? <image>"}, SAID]
    raw = [record(image="./x.png", conversations=turns, extra=5)]
    (found,), quarantine, _ = source.validate(raw, images, threads=1)
    assert not quarantine
    assert found.turns == (("What is it?", "cat"),)
    assert (found.image, found.raw) == ("x.png", raw[0])


@pytest.mark.parametrize(
    ("image", "question", "count", "task"),
    [
        ("coco/train2017/1.jpg", f"Colour?\n{source.SHORT_SUFFIX}", 2, "vqav2"),
        ("coco/train2017/1.jpg", f"Which?\nA. x\n{source.LETTER_SUFFIX}", 1, "aokvqa"),
        ("coco/train2017/1.jpg", "Tell me.", 3, "llava_conv"),
        ("coco/train2017/1.jpg", "Describe the following image.", 1, "llava_detail"),
        ("coco/train2017/1.jpg", "Why might she smile?", 1, "llava_reason"),
        ("gqa/images/1.jpg", f"Colour?\n{source.SHORT_SUFFIX}", 1, "gqa"),
        ("mine/1.jpg", f"Colour?\n{source.SHORT_SUFFIX}", 1, "mine_short"),
        (None, "Hello.", 1, "text_only"),
    ],
)
def test_task_from_folder_and_suffix(image, question, count, task):
    assert source.derive(image, ((question, "x"),) * count) == task


def test_a_named_task_is_kept():
    mark = "<image>\nWhat?"
    records, _ = source.parse([record("a", question=mark, task="mine"), record("b", question=mark, task="")])
    assert [r.task for r in records] == ["mine", "open"]
