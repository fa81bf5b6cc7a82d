"""The VQA answer normaliser and soft accuracy (VQAv2, VizWiz, TextVQA).

The steps and their order are those of the public VQA evaluation (as in `llava/eval/m4c_evaluator.py`), quirks kept:
numbers are comparable with published ones only if "somebody'd" loses its apostrophe here too.
"""

import re
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(n) for n, word in enumerate(NUMBER_WORDS)}
NUMBERS["none"] = "0"
ARTICLES = {"a", "an", "the"}
COMMA_IN_NUMBER = re.compile(r"(\d)(,)(\d)")
PERIOD = re.compile(r"\.(?!\d)")  # a period stays only before a digit
MAX_PERIODS = 32  # the public program passes a flag where `sub` takes its count

# Contractions that people type without the apostrophe: the key is the target with every apostrophe taken out.
_PLAIN = re.findall(
    r"\S+",
    """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll
    how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't
    should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's
    there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've
    wouldn't y'all you'd you'll you're you've
    """,
)
_DOUBLE = re.findall(
    r"\w+", "he it she somebody someone something there they we who you"
)  # he'd've, typed wrongly twice
_ODD = {
    "let's": "let's",
    "she's": "she's",
    "somebody'd": "somebodyd",  # this one takes the apostrophe away
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
    "Id've": "I'd've",  # upper case never meets a lower-cased token; kept so that the map is whole
    "I'dve": "I'd've",
    "Im": "I'm",
    "Ive": "I've",
}
CONTRACTIONS = (
    {target.replace("'", ""): target for target in _PLAIN}
    | {f"{stem}n{mark}t{tail}": f"{stem}n't've" for stem in ("could", "had", "might", "should", "would")
       for mark, tail in (("'", "ve"), ("", "'ve"))}
    | {f"{who}{typed}": f"{who}'d've" for who in _DOUBLE for typed in ("d've", "'dve")}
    | _ODD
)  # fmt: skip


def normalise(answer: str) -> str:
    """The answer as the VQA rules compare it: lower case, no punctuation, digits for number words, no articles."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    given = text  # each mark is judged on the text before any was taken out
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in given or f" {mark}" in given or COMMA_IN_NUMBER.search(given)
        text = text.replace(mark, "" if beside_blank else " ")
    text = PERIOD.sub("", text, count=MAX_PERIODS)
    words = (NUMBERS.get(word, word) for word in text.split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa(prediction: str, answers: Sequence[str], choices: Sequence[str] | None = None) -> float:
    """Soft accuracy: the mean over annotators i of min(1, matches among the others / 3).

    With ten answers, one match gives 0.3, two 0.6, three 0.9, four or more 1. A single reference has no other annotator
    to agree with and is compared as it is.
    """
    predicted = normalise(prediction)
    if len(answers) == 1:
        return float(predicted == normalise(answers[0]))
    matches = Counter(map(normalise, answers))[predicted]
    others = len(answers) - matches
    return (matches * min(1.0, (matches - 1) / 3) + others * min(1.0, matches / 3)) / len(answers) if matches else 0.0
