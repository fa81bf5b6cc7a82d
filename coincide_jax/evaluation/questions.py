"""Questions: read from the folder of `<task>.jsonl` files that the data set stage checked or made."""

import json
import pathlib
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from coincide_jax.core.errors import UserError
from coincide_jax.evaluation import answers as answers_lib

OPTION = re.compile(r"^\(?([A-Z])[.)] +(.+?)\s*$", re.MULTILINE)


class Question(NamedTuple):
    """One question: `text` has its suffix and no <image>; `choices` are the options' texts, A first."""

    id: str
    task: str
    image: str | None
    text: str
    answers: tuple[str, ...]
    metric: str
    choices: tuple[str, ...]


def options(text: str) -> tuple[str, ...]:
    """The options' texts of a question whose lines begin with `A. `, `B. `, …; () when it has none."""
    found = OPTION.findall(text)
    letters = "".join(letter for letter, _ in found)
    return tuple(option for _, option in found) if letters and "ABCDEFGHIJKLMNOPQRSTUVWXYZ".startswith(letters) else ()


def from_folder(folder: pathlib.Path) -> list[Question]:
    """Reads every `<task>.jsonl` of a folder; the file's name is the task.

    Raises:
      UserError: no folder, no file, broken JSON, a missing field or an unknown metric, each with file and line.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"evaluate.questions: {folder} is not a folder; expected one that holds <task>.jsonl files")
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"evaluate.questions: {folder} holds no <task>.jsonl file")
    return [question for file in files for question in _read(file)]


def _read(file: pathlib.Path) -> list[Question]:
    questions, seen = [], set()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{place}, column {error.colno}: not valid JSON: {error.msg}") from error
        missing = [key for key in ("question", "answers", "metric") if not (isinstance(row, dict) and row.get(key))]
        if missing:
            raise UserError(f"{place}: field '{missing[0]}' is missing; a question has question, answers, metric")
        if isinstance(row["answers"], str) or not isinstance(row["answers"], list):
            raise UserError(f"{place}: 'answers' is {type(row['answers']).__name__}; expected a list of strings")
        try:
            answers_lib.metric(row["metric"])
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        name = str(row.get("id") or f"{file.stem}-{number}")
        if name in seen:
            raise UserError(f"{place}: question id '{name}' stands twice in the file")
        seen.add(name)
        text = row["question"].replace("<image>", "").strip()
        given = tuple(map(str, row.get("choices") or ())) or options(text)
        answers = tuple(map(str, row["answers"]))
        questions.append(Question(name, file.stem, row.get("image"), text, answers, row["metric"], given))
    return questions


def limit(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """At most `count` questions of each task, drawn by a seed of that task alone, in their order; 0 keeps all."""
    if count <= 0:
        return list(questions)
    by_task: dict[str, list[int]] = {}
    for position, question in enumerate(questions):
        by_task.setdefault(question.task, []).append(position)
    kept = []
    for task, positions in by_task.items():
        rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
        kept += sorted(rng.permutation(positions)[:count].tolist())
    return [questions[position] for position in sorted(kept)]
