"""Blind floors: what is scored without seeing an image, by the better of two guessers that know the pool's answers.

One goes by the question: the commonest answer to the same text, else to the most special question type that the pool
knows (for multiple choice the option most often right, else the commonest letter). The other gives every question of
a task one constant: the task's commonest answer (for multiple choice its commonest letter). Each task takes the one
that scores more on the questions asked, the first where they are equal: above a floor that lay below the constant, a
model would pass that has learned the constant and no more. A score means something only above this floor; Rel. % is
formed over tasks where the full-data row beats it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from coincide_jax.evaluation.answers import LETTER_MARKS, metric
from coincide_jax.evaluation.questions import Question, options

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OPENINGS = (4, 3, 2, 1)  # question types: so many first words and the last line, the most special that training knows


def _most(counts: Counter) -> str:
    """The most frequent entry; the alphabetically first of equals."""
    return min(counts, key=lambda entry: (-counts[entry], entry))


def _types(task: str, text: str, has_options: bool) -> list[tuple]:
    """Keys of the question from special to general: whole text, first words with the answer's suffix, suffix, task."""
    lines = text.strip().lower().split("\n")
    suffix = lines[-1] if len(lines) > 1 and not has_options else ""
    opening = re.findall(r"[\w']+", lines[0])
    return [
        (task, "text", " ".join(text.lower().split())),
        *((task, "opening", suffix, *opening[:count]) for count in OPENINGS if len(opening) >= count),
        (task, "suffix", suffix),
        (task, "task"),
    ]


class Floors:
    """Counts of the pool's answers by question text, question type and task."""

    def __init__(self, records: Iterable[tuple[str, Sequence[tuple[str, str]]]]):
        """Counts the turns of (task, ((question, answer), …)) of each record of the pool."""
        self.answers: dict[tuple, Counter] = defaultdict(Counter)
        self.right_options: Counter = Counter()
        self.letters: dict[str, Counter] = defaultdict(Counter)
        self.everything: Counter = Counter()
        for task, turns in records:
            for text, answer in turns:
                given, answer = options(text), answer.strip()
                letter = answer.strip(LETTER_MARKS)
                if given and len(letter) == 1 and letter in LETTERS[: len(given)]:
                    self.right_options[given[LETTERS.index(letter)].lower()] += 1
                    self.letters[task][letter] += 1
                    self.letters[""][letter] += 1
                    continue
                self.everything[answer] += 1
                for key in _types(task, text, bool(given)):
                    self.answers[key][answer] += 1

    def guess(self, questions: Sequence[Question]) -> tuple[list[str], list[float], dict[str, str]]:
        """The blind answer to each question, its score, and by task what gave them: 'question' or 'constant'."""
        guessers = {"question": self.answer, "constant": self.constant}
        given = {name: [guesser(question) for question in questions] for name, guesser in guessers.items()}
        scores = {
            name: [metric(q.metric)(said, q.answers, q.choices) for q, said in zip(questions, answers, strict=True)]
            for name, answers in given.items()
        }
        positions = defaultdict(list)
        for position, question in enumerate(questions):
            positions[question.task].append(position)
        chosen = {
            task: max(guessers, key=lambda name: np.mean([scores[name][place] for place in places]))
            for task, places in positions.items()
        }
        names = [chosen[question.task] for question in questions]
        picked = list(enumerate(names))
        return [given[name][place] for place, name in picked], [scores[name][place] for place, name in picked], chosen

    def constant(self, question: Question) -> str:
        """The task's commonest letter for multiple choice, else its commonest other answer.

        That of all tasks where the pool has none of this one; "" where it has none at all.
        """
        if question.metric == "mc":
            counts = self.letters.get(question.task) or self.letters.get("")
        else:
            counts = self.answers.get((question.task, "task")) or self.everything
        return _most(counts) if counts else ""

    def answer(self, question: Question) -> str:
        """The guess by the question: of multiple choice the option most often right, else the commonest letter."""
        if question.metric == "mc":
            given = [option.lower() for option in question.choices]
            best = max(range(len(given)), key=lambda i: (self.right_options[given[i]], -i), default=-1)
            if best >= 0 and self.right_options[given[best]]:
                return LETTERS[best]
            letters = self.letters[question.task] if question.task in self.letters else self.letters.get("", {})
            counts = Counter(
                {letter: n for letter, n in letters.items() if not given or letter in LETTERS[: len(given)]}
            )
            return _most(counts) if counts else "A"
        for key in _types(question.task, question.text, bool(question.choices)):
            if key in self.answers:
                return _most(self.answers[key])
        return _most(self.everything) if self.everything else ""
