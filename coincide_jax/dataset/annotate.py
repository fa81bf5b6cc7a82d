"""Answers that are asked for one record at a time: what a curriculum may see of a pool that nobody has annotated yet.

`without_answers` makes the view that features, clusters and plans come from. An `Annotator` holds the answers behind
it: those of the data set's own file (`OwnAnswers`), of another file (`FileAnswers`), or of anything else with a method
`of`. It gives out the turns of a record only after that record was asked for, and writes down who was asked for, in
order and on disk before the answer is handed out, so that an annotation that was paid for is never lost or paid twice.
A file of answers may grow from one attempt of a run to the next; an answer that was read may not change, which a digest
of it beside the list (`answered.jsonl`) tells.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from coincide_jax.core import artifacts, processes
from coincide_jax.core.errors import UserError
from coincide_jax.dataset.source import Record, json_lines, read_text

PURPOSES = ("train", "probe")


class Answers(Protocol):
    """Where answers come from."""

    def of(self, record: Record) -> Sequence[str] | None:
        """One answer to each question of a record (whose own answers are None); None if there are none yet."""


class OwnAnswers:
    """The answers that stand in the data set's file."""

    def __init__(self, records: Sequence[Record | None]):
        self.records = records

    def of(self, record: Record) -> Sequence[str]:
        """See `Answers`."""
        return [answer for _, answer in self.records[record.index].turns]


class FileAnswers:
    """The answers of a JSONL file: `{"id": …, "answers": [one to each question]}`, or with `index`, the row in the data
    set's file, in place of an id that is not unique.

    Raises:
      UserError: unreadable file, a line without such keys.
    """

    def __init__(self, path: pathlib.Path):
        self.found = {}
        for number, line in json_lines(read_text(path), path):
            name = (line.get("index"), line.get("id")) if isinstance(line, dict) else (None, None)
            answers = line.get("answers") if isinstance(line, dict) else None
            said = isinstance(answers, list) and answers and all(isinstance(a, str) and a.strip() for a in answers)
            if name == (None, None) or not said:
                raise UserError(
                    f"curriculum.answers: line {number} of {path} is no annotation; expected an id or index, and "
                    'answers, as {"id": "…", "answers": ["…"]}'
                )
            self.found[name[0] if name[0] is not None else str(name[1])] = [answer.strip() for answer in answers]

    def of(self, record: Record) -> Sequence[str] | None:
        """See `Answers`."""
        return self.found.get(record.index, self.found.get(record.id))


def without_answers(records: Sequence[Record | None]) -> list[Record | None]:
    """The records with None in place of every answer; their raw form keeps the human turns alone."""

    def hidden(record: Record) -> Record:
        said = record.raw.get("conversations", ())
        raw = record.raw | {"conversations": [turn for turn in said if turn.get("from") == "human"]}
        return dataclasses.replace(record, turns=tuple((question, None) for question, _ in record.turns), raw=raw)

    return [record and hidden(record) for record in records]


class Annotator:
    """Asks for answers within a budget and remembers for whom.

    Args:
      path: annotations.jsonl, a line `index, id, purpose, step` for every record asked for, in order; what is there
        already (of the run that goes on here) counts as asked for.
      records: of `without_answers`.
      answers: where they come from.
      budget: most records that may be asked for, for training and for probes together.
      known: row → turns of records that may be read unasked: of no pool, measured for a report.

    Raises:
      UserError: the file names a record that the data set has not.
    """

    def __init__(
        self, path: pathlib.Path, records: Sequence[Record | None], answers: Answers, budget: int, known: dict
    ):
        self.path, self.records, self.answers, self.budget = path, records, answers, budget
        self.asked: dict[int, tuple[str, int]] = {}  # row → purpose, step
        self._turns: dict[int, tuple[tuple[str, str], ...]] = dict(known)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if whole != lines:  # a kill in the middle of a line
            artifacts.write_text(path, "".join(whole))
        for line in map(json.loads, whole):
            record = records[line["index"]] if line["index"] < len(records) else None
            if record is None or record.id != line["id"]:
                raise UserError(f"{path} asks for record {line['index']} ('{line['id']}'), which the data set has not")
            self.asked[line["index"]] = line["purpose"], line["step"]
        self.digests = path.with_name("answered.jsonl")
        processes.together()  # all have read what is cut now
        artifacts.cut_jsonl(self.digests, lambda line: line["index"] in self.asked)
        processes.together()
        lines = artifacts.read_jsonl(self.digests) if self.digests.exists() else ()
        self._read = {line["index"]: line["sha256"] for line in lines}
        processes.together()  # all have read what the one that leads will add to

    def ask(self, rows: Sequence[int], purpose: str, steps: Sequence[int]) -> None:
        """Asks for the answers of records, each at its step; who was asked for before costs nothing.

        Raises:
          UserError: an answer that is not there, or not one to each question; the run can go on once it is.
          UserError: the budget does not reach.
        """
        new = {int(row): (purpose, int(step)) for row, step in zip(rows, steps, strict=True) if row not in self.asked}
        if len(self.asked) + len(new) > self.budget:
            raise UserError(
                f"{self.path}: {len(self.asked)} answers of a budget of {self.budget} are used up and {len(new)} more "
                "are asked for; a run that goes on after a kill draws the same records only on the same devices: go on "
                "there, or begin again in another folder"
            )
        if new:
            artifacts.append_jsonl(
                self.path,
                [
                    {"index": row, "id": self.records[row].id, "purpose": why, "step": step}
                    for row, (why, step) in new.items()
                ],
            )
            self.asked |= new
        self._fetch([row for row in map(int, rows) if row not in self._turns])

    def ask_round(self, plan: np.ndarray, first: int) -> None:
        """Asks for the records int[S, B] of a round whose first step is number `first`; -1 is an empty slot."""
        steps = np.broadcast_to(first + np.arange(len(plan))[:, None], plan.shape)
        order = dict(zip(plan[plan >= 0][::-1].tolist(), steps[plan >= 0][::-1].tolist(), strict=True))
        rows = list(dict.fromkeys(plan[plan >= 0].tolist()))
        self.ask(rows, "train", [order[row] for row in rows])

    def turns(self, record: Record) -> tuple[tuple[str, str], ...]:
        """Questions and answers of a record.

        Raises:
          RuntimeError: nobody has asked for them.
        """
        if record.index not in self._turns:
            raise RuntimeError(f"the answers of record {record.index} ('{record.id}') were read but never asked for")
        return self._turns[record.index]

    def trained_before(self, step: int) -> np.ndarray:
        """Rows int64[n] asked for to be trained on in an earlier step, in order."""
        rows = [row for row, (purpose, at) in self.asked.items() if purpose == "train" and at < step]
        return np.asarray(rows, np.int64)

    def count(self, purpose: str) -> int:
        """Records asked for with a purpose."""
        return sum(found == purpose for found, _ in self.asked.values())

    def _fetch(self, rows: Sequence[int]) -> None:
        missing, fresh = [], {}
        for row in rows:
            record = self.records[row]
            answers = self.answers.of(record)
            if answers is None or len(answers) != len(record.turns):
                missing.append((row, "no answers" if answers is None else f"{len(answers)} answers"))
                continue
            digest = hashlib.sha256(json.dumps(list(answers)).encode()).hexdigest()[:16]
            if self._read.get(row, digest) != digest:
                raise UserError(
                    f"the answers to record '{record.id}' (row {row}) are others than those that {self.path.parent} "
                    "was trained on until now; put them back, or begin again in another folder"
                )
            fresh |= {} if row in self._read else {row: digest}
            asked = (question for question, _ in record.turns)
            self._turns[row] = tuple(zip(asked, answers, strict=True))
        if fresh:
            artifacts.append_jsonl(self.digests, [{"index": row, "sha256": digest} for row, digest in fresh.items()])
            self._read |= fresh
        if missing:
            row, found = missing[0]
            record = self.records[row]
            raise UserError(
                f"{len(missing)} records that {self.path} asks for wait for answers, the first is '{record.id}' (row "
                f"{row}): curriculum.answers has {found}, its questions are {len(record.turns)}; add them and give the "
                "same command again"
            )
