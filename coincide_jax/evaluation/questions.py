"""Questions as they are asked: metrics known, ids told apart, options found in the text, limited per task."""

import pathlib
import re
import zlib
from collections.abc import Sequence

import numpy as np

from coincide_jax.core.errors import UserError
from coincide_jax.dataset.questions import Question, read_folder
from coincide_jax.evaluation import answers as answers_lib

__all__ = ["Question", "from_folder", "limit", "options"]

OPTION = re.compile(r"^\(?([A-Z])[.)] +(.+?)\s*$", re.MULTILINE)


def options(text: str) -> tuple[str, ...]:
    """The options' texts of a question whose lines begin with `A. `, `B. `, …; () when it has none."""
    found = OPTION.findall(text)
    letters = "".join(letter for letter, _ in found)
    return tuple(option for _, option in found) if letters and "ABCDEFGHIJKLMNOPQRSTUVWXYZ".startswith(letters) else ()


def from_folder(folder: pathlib.Path) -> list[Question]:
    """The questions of a folder of `<task>.jsonl` files, with the options of their text where they name no choices.

    Raises:
      UserError: what `dataset.questions.read_folder` raises; an unknown metric, an id that stands twice in a file or
        in a task, each with file and line.
    """
    questions, first = [], {}
    for place, question in read_folder(pathlib.Path(folder)):
        try:
            answers_lib.metric(question.metric)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        file = place.rsplit(", ", 1)[0]
        for scope in (("file", file), ("task", question.task)):
            before = first.setdefault((*scope, question.id), place)
            if before != place:
                raise UserError(f"{place}: question id '{question.id}' stands twice in the {scope[0]}; first {before}")
        questions.append(question if question.choices else question._replace(choices=options(question.text)))
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
