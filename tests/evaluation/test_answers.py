"""Metrics as their definitions say, case by case."""

import pytest

from coincide_jax.core.errors import UserError
from coincide_jax.evaluation.answers import METRICS, metric


@pytest.mark.parametrize(
    ("name", "prediction", "answers", "score"),
    [
        ("exact", "The  Red  Apple.", ["red apple"], 1),
        ("exact", "'red apple'", ["an red apple"], 1),
        ("exact", "red-apple", ["red apple"], 0),
        ("exact", "blue", ["red", "Blue"], 1),
        ("exact", "", ["red"], 0),
        ("yesno", "Yes, there is.", ["Yes"], 1),
        ("yesno", "no", ["Yes"], 0),
        ("yesno", "There is, yes", ["yes"], 0),
        ("yesno", "", ["no"], 0),
        ("yesno", "No.", ["No."], 1),
        ("mc", "B", ["B"], 1),
        ("mc", "B. pigeon", ["B"], 1),
        ("mc", " (b) pigeon", ["B"], 1),
        ("mc", "A or B", ["B"], 0),
        ("mc", "", ["A"], 0),
        ("mc", "C", ["(C)"], 1),
        ("number", "There are 3 dogs and 2 cats", ["3"], 1),
        ("number", "2 or 3", ["3"], 0),
        ("number", "3.0", ["3"], 1),
        ("number", "1,195", ["1195"], 1),
        ("number", "7", ["1,195"], 0),
        ("number", "three", ["3"], 0),
        ("number", "-4", ["4"], 0),
        ("number", "$4.50.", ["4.5"], 1),
        ("number", "0", ["0"], 1),
        ("number_relaxed", "104.9", ["100"], 1),
        ("number_relaxed", "105.1", ["100"], 0),
        ("number_relaxed", "95 %", ["100"], 1),
        ("number_relaxed", "-99", ["-100"], 1),
        ("number_relaxed", "0.01", ["0"], 0),
        ("last_number", "3 * 25 = 75. The answer is 75.", ["75"], 1),
        ("last_number", "75 apples, then 3", ["75"], 0),
        ("last_number", "10-4", ["4"], 1),
        ("ocr", "unihakka  international sdn bhd.", ["UNIHAKKA INTERNATIONAL SDN BHD"], 1),
        ("ocr", "1 X35.0000", ["1 X 35.0000"], 1),
        ("ocr", "35.00", ["3500"], 0),
        ("caption_f1", "a dog runs", ["The dog runs.", "nothing"], 1),
        ("caption_f1", "dog dog", ["dog"], 2 / 3),
        ("caption_f1", "a", ["dog"], 0),
        ("caption_f1", "red dog", ["dog sits", "red dog sits here"], 2 * 2 / 6),
    ],
)
def test_definition(name, prediction, answers, score):
    assert METRICS[name](prediction, answers, ()) == pytest.approx(score)


def test_every_metric_stays_between_zero_and_one():
    for function in METRICS.values():
        for prediction in ("", "Yes", "12 a\n", "the", "?!,."):
            assert 0.0 <= function(prediction, ["yes", "12", ""], None) <= 1.0


def test_an_unknown_metric_is_one_sentence_with_the_nearest():
    with pytest.raises(UserError, match="unknown metric 'exakt'; did you mean 'exact'") as caught:
        metric("exakt")
    assert "\n" not in str(caught.value)
