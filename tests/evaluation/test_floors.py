"""Blind guesses by question text, by type, by option; and the floors of the real set where it is at hand."""

import json
import os
import pathlib

import numpy as np
import pytest

from coincide_jax.evaluation import answers, questions
from coincide_jax.evaluation.floors import Floors

SHORT = "\nAnswer the question using a single word or phrase."
TRAIN = [
    ("vqa", [("What color is the cat?" + SHORT, "black"), ("What color is the cat?" + SHORT, "white")]),
    ("vqa", [("What color is the cat?" + SHORT, "white"), ("What color is the dog?" + SHORT, "brown")]),
    ("vqa", [("What color is the cow?" + SHORT, "brown"), ("How many legs?\nAnswer with a number.", "4")]),
    ("vqa", [("Where is it?" + SHORT, "brown")]),
    ("pick", [("Which?\nA. cat\nB. dog", "A"), ("Which?\nA. fish\nB. cat", "B"), ("Which?\nA. dog\nB. owl", "A")]),
    ("pick", [("Which?\nA. rat\nB. owl", "A")]),
]


def ask(task, text, metric="exact", choices=()):
    return questions.Question("q", task, "i.jpg", text, ("x",), metric, tuple(choices))


@pytest.mark.parametrize(
    ("question", "guess"),
    [
        (ask("vqa", "What color is the cat?" + SHORT), "white"),  # the same text
        (ask("vqa", "What color is the sky?" + SHORT), "brown"),  # the same first words: brown 2, white 2, brown first
        (ask("vqa", "How many eyes?\nAnswer with a number."), "4"),  # the same suffix and first words
        (ask("vqa", "Name it."), "brown"),  # the task
        (ask("pick", "Which?\nA. dog\nB. cat", "mc", ("dog", "cat")), "B"),  # cat was right twice
        (ask("pick", "Which?\nA. oak\nB. elm", "mc", ("oak", "elm")), "A"),  # the commonest letter
        (ask("new", "Which?\nA. oak\nB. elm", "mc", ("oak", "elm")), "A"),  # of all tasks
        (ask("new", "What?"), "brown"),  # the commonest answer of all
    ],
)
def test_guess(question, guess):
    assert Floors(TRAIN).answer(question) == guess


def test_a_constant_that_scores_more_than_the_guess_by_the_question_is_the_floor():
    """By its opening each question takes a rare answer; the task's commonest one is right more often."""
    train = [("v", [("Is it red?", "no"), ("Is it big?", "no")])] + [("v", [("Are they red?", "yes")])] * 3
    train += [("w", [("Is it red?", "no")])]
    asked = [
        questions.Question(str(number), task, None, "Is it round?", (answer,), "yesno", ())
        for number, (task, answer) in enumerate([("v", "yes"), ("w", "no"), ("v", "yes"), ("v", "no")])
    ]
    floors = Floors(train)
    assert [floors.answer(question) for question in asked] == ["no"] * 4
    predictions, scores, chosen = floors.guess(asked)
    assert chosen == {"v": "constant", "w": "question"}
    assert predictions == ["yes", "no", "yes", "yes"] and scores == [1, 1, 1, 0]


def test_the_constant_of_multiple_choice_is_a_letter():
    assert Floors(TRAIN).constant(ask("pick", "Which?\nA. oak\nB. elm", "mc", ("oak", "elm"))) == "A"
    assert Floors(TRAIN).constant(ask("vqa", "What?")) == "brown"
    assert Floors(TRAIN).constant(ask("new", "What?")) == "brown"
    assert Floors([]).constant(ask("new", "What?")) == ""


def test_without_training_answers_there_is_still_a_guess():
    assert Floors([]).answer(ask("t", "What?")) == ""
    assert Floors([]).answer(ask("t", "What?", "mc", ("a", "b"))) == "A"


README = {
    "caption": 0.15, "caption_match": 0.27, "chart_qa": 0.10, "count": 0.34, "existence": 0.55, "fine_grained": 0.31,
    "handwriting": 0.29, "object_mc": 0.33, "object_short": 0.02, "ocr_read": 0.03, "receipt_qa": 0.04,
    "table_qa": 0.11, "text_only": 0.00, "verify_statement": 0.56, "vqa_short": 0.20,
}  # fmt: skip


def test_floors_of_the_real_set_or_of_a_drawn_one():
    """With `COINCIDE_DATA` the published floors within 0.04; without it a made-up set whose floors are known."""
    folder = os.environ.get("COINCIDE_DATA")
    if folder:
        root = pathlib.Path(folder)
        asked, expected = questions.from_folder(root / "eval"), README
        records = json.loads((root / "train.json").read_text())
        turns = [
            [turn["value"].replace("<image>", "").strip() for turn in record["conversations"]] for record in records
        ]
        train = [(r["task"], list(zip(t[::2], t[1::2], strict=True))) for r, t in zip(records, turns, strict=True)]
    else:
        train = [("coin", [("Heads?", "yes" if i % 4 else "no")]) for i in range(400)]
        asked = [
            questions.Question(str(i), "coin", None, "Heads?", ("yes" if i % 3 else "no",), "yesno", ())
            for i in range(300)
        ]
        expected = {"coin": 2 / 3}
    floors, found = Floors(train), {}
    for question, score in zip(asked, floors.guess(asked)[1], strict=True):
        found.setdefault(question.task, []).append(score)
    assert found.keys() == expected.keys()
    for task, scores in found.items():
        own = [question for question in asked if question.task == task]
        constant = [answers.metric(q.metric)(floors.constant(q), q.answers, q.choices) for q in own]
        assert np.mean(scores) >= np.mean(constant), task
    for task, scores in found.items():
        assert np.mean(scores) == pytest.approx(expected[task], abs=0.04), task
