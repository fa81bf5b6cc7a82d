"""The VQA normaliser step by step, its contraction map, and soft accuracy against the closed form."""

import pytest

from coincide_jax.evaluation.vqa import CONTRACTIONS, normalise, vqa


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("The Red Bus.", "red bus"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("dont", "don't"),
        ("hes", "he's"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("dog's bed", "dog 's bed"),
        ("1,000", "1000"),
        ("3.5 m", "3.5 m"),
        ("u.s.", "us"),
        ("black/white", "black white"),
        ("black/ white", "black white"),
        ("t-shirt", "t shirt"),
        ("a -b", "b"),
        ("what?", "what"),
        ("line\none", "line 1"),
    ],
)
def test_normalise(given, expected):
    assert normalise(given) == expected


def test_the_map_has_its_120_entries():
    assert len(CONTRACTIONS) == 120
    assert CONTRACTIONS["theyd've"] == "they'd've"
    assert CONTRACTIONS["'ow'sat"] == "'ow's'at"
    assert CONTRACTIONS["twas"] == "'twas"
    assert sum(key == target.replace("'", "") for key, target in CONTRACTIONS.items()) == 73 + 2  # and Im, Ive


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy_of_ten_answers(matches, score):
    answers = ["a cat."] * matches + [f"dog {number}" for number in range(10 - matches)]
    assert vqa("Cat", answers) == pytest.approx(score)


def test_soft_accuracy_equals_leave_one_out():
    answers = ["red", "red", "blue", "green", "red", "blue", "red", "none", "0", "zero"]
    for said in ("red", "blue", "green", "zero", "pink"):
        normal = [normalise(answer) for answer in answers]
        slow = (
            sum(min(1, sum(a == normalise(said) for j, a in enumerate(normal) if j != i) / 3) for i in range(10)) / 10
        )
        expected = slow if normalise(said) in normal else 0.0
        assert vqa(said, answers) == pytest.approx(expected)


def test_a_single_reference_is_compared_as_it_is():
    assert vqa("The Cat", ["cat"]) == 1.0
    assert vqa("dog", ["cat"]) == 0.0
