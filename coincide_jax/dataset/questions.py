"""Held-out questions as `<task>.jsonl` files: checked where a folder is given, made from held-out records where not.

A row is {id, image?, question (no `<image>`, suffix included), answers, metric, task, …}.
"""

import pathlib
import re
import shutil
from collections.abc import Iterable

from coincide_jax.core import artifacts
from coincide_jax.core.errors import UserError
from coincide_jax.dataset import source

EXACT_WORDS = 3  # an answer of so many words is right or wrong; a longer one is scored by word F1
NUMBER = re.compile(r"[-+]?[$]?\d[\d,]*(\.\d+)?%?")


def check_folder(folder: pathlib.Path, images: pathlib.Path, threads: int) -> tuple[int, set[str]]:
    """Reads every question file. Returns the number of questions and the digests of their images.

    Raises:
      UserError: no such folder, no file in it, a broken line, a missing field, an unreadable image, by file and line.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"evaluate.questions: {folder} {found}; expected a folder of <task>.jsonl files")
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"evaluate.questions: {folder} holds no .jsonl file; expected one <task>.jsonl a task")
    count, places = 0, {}
    for file in files:
        for number, row in source.json_lines(source.read_text(file), file):
            image = _check_row(row, f"{file}, line {number}")
            count += 1
            if image:
                places.setdefault(image, f"{file}, line {number}")
    if not count:
        raise UserError(f"evaluate.questions: the .jsonl files of {folder} hold no question")
    digests, reasons = source.check_images(set(places), images, threads)
    for image, reason in sorted(reasons.items()):
        raise UserError(f"{places[image]}: {reason} (looked in {images})")
    return count, set(digests.values())


def _check_row(row, place: str) -> str | None:
    """The image path of a question, None without one."""
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object, found {type(row).__name__}")
    for key in ("question", "metric"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{place}: field '{key}' is missing or no text")
    answers = row.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{place}: field 'answers' must be a list of at least one text")
    if row.get("image") is None:
        return None
    try:
        return source.inside(row["image"])
    except source.BadRecordError as bad:
        raise UserError(f"{place}: {bad}") from bad


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
    """One question row a held-out record: its first human turn, its first answer, a metric by the answer's form."""
    rows = []
    for record in records:
        question, answer = record.turns[0]
        row = {"id": record.id, "question": question, "answers": [answer], "metric": metric_of(question, answer)}
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
