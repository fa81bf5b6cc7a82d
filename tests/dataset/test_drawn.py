"""The embedded data set: deterministic, of the asked size, twelve tasks, held out from what trains."""

import hashlib
import json
import pathlib
import time
from collections import Counter

import pytest
from ml_collections import ConfigDict

from coincide_jax.core import artifacts
from coincide_jax.dataset import drawn, questions, source
from coincide_jax.dataset.drawn import tasks

METRICS = {"yesno", "mc", "exact", "number", "ocr", "caption_f1"}


def keys(**changes) -> ConfigDict:
    return ConfigDict(dict(records=300, heldout=60, base=200, seed=0) | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return drawn.draw(tmp_path_factory.mktemp("drawn") / "drawn", keys())


def read(folder, part) -> list[dict]:
    return json.loads((folder / f"{part}.json").read_text())


def asked(folder) -> list[dict]:
    return [row for file in sorted((folder / "eval").glob("*.jsonl")) for row in artifacts.read_jsonl(file)]


def test_the_same_seed_draws_the_same_bytes(folder, tmp_path):
    assert artifacts.digest(folder) == artifacts.digest(drawn.draw(tmp_path / "again", keys()))
    assert artifacts.digest(folder) != artifacts.digest(drawn.draw(tmp_path / "other", keys(seed=1)))


def test_sizes_and_twelve_tasks(folder):
    train, base, held = read(folder, "train"), read(folder, "base"), asked(folder)
    assert (len(train), len(base), len(held)) == (300, 200, 60)
    assert len(tasks.EVAL_TASKS) == 12
    assert Counter(row["task"] for row in held) == dict.fromkeys(tasks.EVAL_TASKS, 5)
    counts = Counter(row["task"] for row in train)
    assert set(counts) == {*tasks.EVAL_TASKS, "conversation"}
    assert max(counts.values()) > 3 * min(counts.values())
    assert {row["metric"] for row in held} <= METRICS
    assert {len(row["conversations"]) for row in train} == {2, 4}


def test_every_record_is_valid(folder):
    for part in ("train", "base"):
        records, quarantine, _ = source.validate(read(folder, part), folder / "images", threads=2)
        assert not quarantine
        assert all(len(record.turns[0][0].split("\n")[0].split()) <= 12 for record in records)
    count, _ = questions.check_folder(folder / "eval", folder / "images", threads=2)
    assert count == 60


def test_parts_share_no_image_no_text_question_and_no_digit(folder):
    def images(part):
        return {hashlib.sha256(path.read_bytes()).digest() for path in (folder / "images" / part).iterdir()}

    parts = [images(part) for part in ("train", "base", "heldout")]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    said = {r["conversations"][0]["value"] for p in ("train", "base") for r in read(folder, p) if "image" not in r}
    assert not said & {row["question"] for row in asked(folder) if "image" not in row}


def test_near_duplicates_and_wrong_answers_are_labelled(folder):
    origins = Counter(row["origin"] for row in read(folder, "train"))
    assert origins["near_duplicate"] == round(drawn.NEAR_DUPLICATES * 300)
    assert origins["wrong_answer"] == round(drawn.WRONG * 300)
    assert {row["origin"] for row in read(folder, "base")} == {"template"}


def test_a_blind_answer_is_far_from_the_ceiling(folder):
    held = asked(folder)
    for task in tasks.EVAL_TASKS:
        answers = Counter(row["answers"][0] for row in held if row["task"] == task)
        assert answers.most_common(1)[0][1] <= 4, task


def test_a_kill_while_drawing_leaves_nothing_wrong(folder, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(drawn, "_write_questions", killed)
        with pytest.raises(KeyboardInterrupt):
            drawn.draw(tmp_path / "drawn", keys())
    assert not (tmp_path / "drawn").exists()
    (tmp_path / ".drawn.0000.tmp" / "images").mkdir(parents=True)  # what SIGKILL leaves
    drawn.draw(tmp_path / "drawn", keys())
    assert [path.name for path in tmp_path.iterdir()] == ["drawn"]
    assert artifacts.digest(tmp_path / "drawn") == artifacts.digest(folder)


def test_drawn_once_is_not_drawn_again(folder):
    stamp = (folder / "train.json").stat().st_mtime_ns
    begin = time.monotonic()
    drawn.draw(folder, keys())
    assert time.monotonic() - begin < 0.5
    assert (folder / "train.json").stat().st_mtime_ns == stamp
