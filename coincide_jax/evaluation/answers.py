"""Metrics: name → function(prediction, answers, choices) → score in [0, 1].

A question names its metric. A new one is a function here (or in its own file) and a line in `METRICS`.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from coincide_jax.core import errors
from coincide_jax.evaluation.vqa import vqa

NUMBER = re.compile(r"(?<![\w.])-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)|\d[\d,]*(?:\.\d+)?")
OCR_MARKS = ".:;,"
LETTER_MARKS = "(). :"  # around the letter of a choice
RELAXED = 0.05  # ChartQA's rule


def words(text: str) -> list[str]:
    """Lower-cased words without a, an, the and without outer punctuation."""
    stripped = (word.strip(string.punctuation) for word in text.lower().split())
    return [word for word in stripped if word and word not in ("a", "an", "the")]


def plain(text: str) -> str:
    """Lower case, no articles, no punctuation around the whole, single blanks."""
    kept = [word for word in text.lower().split() if word not in ("a", "an", "the")]
    return " ".join(" ".join(kept).strip(string.punctuation + string.whitespace).split())


def numbers(text: str) -> list[float]:
    """The numbers in a text, in order; commas between digits are read over."""
    return [float(match.replace(",", "")) for match in NUMBER.findall(text)]


def exact(prediction: str, answers: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """Equal after lower-casing, dropping articles, outer punctuation and doubled blanks."""
    return float(plain(prediction) in {plain(answer) for answer in answers})


def yesno(prediction: str, answers: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """The first word is the answer."""
    first = words(prediction)[:1]
    return float(bool(first) and first[0] in {plain(answer) for answer in answers})


def mc(prediction: str, answers: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """It starts with the right letter."""
    start = prediction.strip().lstrip("(").upper()
    letters = (answer.strip(LETTER_MARKS).upper() for answer in answers)
    return float(any(letter and start.startswith(letter) for letter in letters))


def _number(prediction: str, answers: Sequence[str], which: int, tolerance: float) -> float:
    """Whether number `which` of the prediction lies within `tolerance` of an answer's number."""
    said = numbers(prediction)
    if not said:
        return 0.0
    gold = [values[0] for values in map(numbers, answers) if values]
    return float(any(abs(said[which] - value) <= max(tolerance * abs(value), 1e-9 * abs(value)) for value in gold))


def number(prediction: str, answers: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """The first number equals the answer."""
    return _number(prediction, answers, 0, 0.0)


def number_relaxed(prediction: str, answers: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """The first number is within 5 % of the answer (ChartQA)."""
    return _number(prediction, answers, 0, RELAXED)


def last_number(prediction: str, answers: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """The last number equals the answer (GSM8K)."""
    return _number(prediction, answers, -1, 0.0)


def ocr(prediction: str, answers: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """Equal ignoring case, blanks and outer `.:;,`."""

    def squeeze(text: str) -> str:
        return "".join(text.upper().split()).strip(OCR_MARKS)

    return float(squeeze(prediction) in {squeeze(answer) for answer in answers})


def caption_f1(prediction: str, answers: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """The best word F1 over the references."""
    said = Counter(words(prediction))
    best = 0.0
    for answer in answers:
        gold = Counter(words(answer))
        shared = sum((said & gold).values())
        if shared:
            best = max(best, 2 * shared / (sum(said.values()) + sum(gold.values())))
    return best


METRICS: dict[str, Callable[..., float]] = {
    "exact": exact,
    "yesno": yesno,
    "mc": mc,
    "number": number,
    "number_relaxed": number_relaxed,
    "last_number": last_number,
    "ocr": ocr,
    "caption_f1": caption_f1,
    "vqa": vqa,
}


def metric(name: str) -> Callable[..., float]:
    """The metric of that name; raises `UserError` naming the nearest one when there is none."""
    if name not in METRICS:
        raise errors.unknown("metric", name, METRICS)
    return METRICS[name]
