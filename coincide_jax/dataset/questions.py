"""Held-out questions as `<task>.jsonl` files: read where a folder is given, made from held-out records where not.

A row is {id?, image?, question (suffix included), answers, metric, task?, choices?, …}. The form of a row is checked
here, by file and line; whether a metric of that name exists is for those to say who score.
"""

import pathlib
import re
import shutil
from collections.abc import Iterable
from typing import NamedTuple

from coincide_jax.core import artifacts
from coincide_jax.core.errors import UserError
from coincide_jax.dataset import source

EXACT_WORDS = 3  # an answer of so many words is right or wrong; a longer one is scored by word F1
NUMBER = re.compile(r"[-+]?[$]?\d[\d,]*(\.\d+)?%?")


class Question(NamedTuple):
    """One question: `text` has its suffix and no <image>; `choices` are the options' texts, A first."""

    id: str
    task: str
    image: str | None
    text: str
    answers: tuple[str, ...]
    metric: str
    choices: tuple[str, ...]


def read_folder(folder: pathlib.Path) -> list[tuple[str, Question]]:
    """Every question of the `<task>.jsonl` files, each with its place "file, line n".

    The task is the row's field "task", else the file's stem; the id is the row's field "id", else stem and line.

    Raises:
      UserError: no such folder, no file or no question in it, a broken line, a missing or mistyped field.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"evaluate.questions: {folder} {found}; expected a folder of <task>.jsonl files")
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"evaluate.questions: {folder} holds no .jsonl file; expected one <task>.jsonl a task")
    found = [
        (f"{file}, line {number}", _question(row, file, number))
        for file in files
        for number, row in source.json_lines(source.read_text(file), file)
    ]
    if not found:
        raise UserError(f"evaluate.questions: the .jsonl files of {folder} hold no question")
    return found


def check_folder(folder: pathlib.Path, images: pathlib.Path, threads: int) -> tuple[int, set[str]]:
    """Reads every question and opens its image. Returns the number of questions and the digests of their images.

    Raises:
      UserError: what `read_folder` raises; an unreadable image, by file and line of its first question.
    """
    found, places = read_folder(folder), {}
    for place, question in found:
        if question.image:
            places.setdefault(question.image, place)
    digests, reasons = source.check_images(set(places), images, threads)
    for image, reason in sorted(reasons.items()):
        raise UserError(f"{places[image]}: {reason} (looked in {images})")
    return len(found), set(digests.values())


def _question(row, file: pathlib.Path, number: int) -> Question:
    """The checked question of one line."""
    place = f"{file}, line {number}"
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object, found {type(row).__name__}")
    for key in ("question", "metric"):
        if not isinstance(row.get(key), str) or not row[key].replace(source.IMAGE_MARK, "").strip():
            raise UserError(f"{place}: field '{key}' is missing or no text")
    for key, least in (("answers", 1), ("choices", 0)):
        texts = row.get(key) if least else row.get(key) or []
        if not isinstance(texts, list) or len(texts) < least or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{place}: field '{key}' must be a list of {'at least one text' if least else 'texts'}")
    name, task = row.get("id"), row.get("task")
    if not isinstance(name, str | int | None):
        raise UserError(f"{place}: field 'id' is {type(name).__name__}; expected a text or a whole number")
    try:
        image = None if row.get("image") is None else source.inside(row["image"])
    except source.BadRecordError as bad:
        raise UserError(f"{place}: {bad}") from bad
    return Question(
        f"{file.stem}-{number}" if name in (None, "") else str(name),
        task if isinstance(task, str) and task else file.stem,
        image,
        row["question"].replace(source.IMAGE_MARK, "").strip(),
        tuple(row["answers"]),
        row["metric"],
        tuple(row.get("choices") or ()),
    )


def metric_of(question: str, answer: str) -> str:
    """The metric that suits a record's first question and answer."""
    if source.LETTER_SUFFIX in question and re.fullmatch(r"\(?[A-Z]\)?[.:]?", answer):
        return "mc"
    if answer.lower().rstrip(".") in ("yes", "no"):
        return "yesno"
    if NUMBER.fullmatch(answer):
        return "number"
    return "exact" if len(answer.split()) <= EXACT_WORDS else "caption_f1"


def heldout_questions(records: Iterable[source.Record]) -> list[dict]:
    """One question row a held-out record: its first human turn, its first answer, a metric by the answer's form.

    Ids of records may repeat (`dataset.unique_ids`), ids of questions may not: the second of an id gets its row's
    number behind it.
    """
    rows, used = [], set()
    for record in records:
        name = record.id
        while name in used:
            name += f"-row{record.index}"
        used.add(name)
        question, answer = record.turns[0]
        row = {"id": name, "question": question, "answers": [answer], "metric": metric_of(question, answer)}
        rows.append(row | {"task": record.task} | ({"image": record.image} if record.image else {}))
    return rows


def write_folder(folder: pathlib.Path, rows: list[dict]) -> None:
    """Writes `<task>.jsonl` files; whatever the folder held before is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    by_task: dict[str, list[dict]] = {}
    for row in rows:
        by_task.setdefault(re.sub(r"[^\w.-]+", "_", row["task"]), []).append(row)
    for task, members in sorted(by_task.items()):
        artifacts.write_jsonl(folder / f"{task}.jsonl", members)
