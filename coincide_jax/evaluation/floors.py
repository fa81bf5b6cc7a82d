"""Blind floors: what a guesser scores that reads the question, knows the training answers and never sees the image.

A score means something only above this floor; Rel. % is formed over tasks where the full-data row beats it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from coincide_jax.evaluation.answers import LETTER_MARKS
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
    """Counts of training answers by question text, question type and task."""

    def __init__(self, records: Iterable[tuple[str, Sequence[tuple[str, str]]]]):
        """Counts the turns of (task, ((question, answer), …)) of each training record."""
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

    def answer(self, question: Question) -> str:
        """The blind guess: for multiple choice the option most often right in training, else the commonest letter."""
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
