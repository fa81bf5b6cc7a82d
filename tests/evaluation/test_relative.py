"""Rel. % and its intervals: hand sums, brute-force resampling, known coverage, and words when nothing can be ranked."""

import json
import time

import numpy as np
import pytest

from coincide_jax.core.errors import UserError
from coincide_jax.evaluation import relative


def lines(scores, tasks=2, blind=0.1, per_image=1):
    """Answer lines of f[Q] scores, tasks in turn, `per_image` neighbours on one image."""
    return [
        {"id": f"q{i}", "task": f"t{i % tasks}", "image": f"im{i // per_image}", "metric": "exact",
         "score": float(score), "blind_score": blind if np.isscalar(blind) else float(blind[i])}
        for i, score in enumerate(scores)
    ]  # fmt: skip


def coins(p, count, seed):
    return (np.random.default_rng(seed).random(count) < p).astype(float)


def test_rel_is_the_mean_of_ratios():
    full = lines([0.8, 0.5] * 40)
    half = lines([0.4, 0.4] * 40)
    table = relative.compare({"full": [full], "half": [half]}, resamples=100, minimum=2)
    assert table["rows"]["half"]["rel"] == pytest.approx(100 * (0.4 / 0.8 + 0.4 / 0.5) / 2)
    assert table["rows"]["full"]["rel"] == 100 and table["rows"]["full"]["rel_interval"] == [100, 100]
    assert table["ranked"] and table["sentence"] == "" and table["label"] == "questions only"
    assert json.loads(json.dumps(table)) == table


def test_only_tasks_above_their_floor_by_more_than_the_interval_count():
    scores = np.where(np.arange(400) % 2 == 0, coins(0.7, 400, 0), coins(0.5, 400, 1))
    table = relative.compare({"full": [lines(scores, blind=0.5)]}, resamples=300)
    assert table["counted"] == ["t0"]
    assert [task["counted"] for task in table["tasks"]] == [True, False]
    assert "on 1 of 2 tasks, and at least 5 are needed" in table["sentence"] and not table["ranked"]


def test_without_a_full_row_there_is_no_rel():
    table = relative.compare({"random": [lines(coins(0.5, 60, 0))]}, resamples=50)
    assert table["rows"]["random"]["rel"] is None and table["full"] is None
    assert table["sentence"].startswith("Nothing can be ranked: there is no row 'full'")
    assert relative.text(table).startswith("Nothing can be ranked")


def test_interval_matches_a_slow_bootstrap():
    scores, blind = coins(0.6, 300, 0), coins(0.2, 300, 1)
    made = lines(scores, tasks=1, blind=blind, per_image=3)
    table = relative.compare({"full": [made]}, resamples=4000)
    rng = np.random.default_rng(5)
    groups = scores.reshape(100, 3)
    slow = [groups[rng.integers(100, size=100)].mean() for _ in range(4000)]
    assert table["rows"]["full"]["scores"]["t0"]["interval"] == pytest.approx(
        np.percentile(slow, [2.5, 97.5]), abs=0.01
    )


def test_images_are_the_unit():
    """Ten copies of each answer on one image tell no more than one: the interval stays as wide."""
    scores = coins(0.5, 100, 0)
    one = relative.compare({"full": [lines(scores, tasks=1)]}, resamples=2000)
    ten = relative.compare({"full": [lines(np.repeat(scores, 10), tasks=1, per_image=10)]}, resamples=2000)
    widths = [np.diff(t["rows"]["full"]["scores"]["t0"]["interval"])[0] for t in (one, ten)]
    assert widths[0] == pytest.approx(widths[1], rel=0.1)


def test_seeds_that_differ_widen_the_interval():
    steady = [lines(coins(0.5, 400, 0), tasks=1)] * 3
    shifted = [lines(coins(p, 400, 0), tasks=1) for p in (0.3, 0.5, 0.7)]
    table = relative.compare({"full": steady, "shifted": shifted}, resamples=500)
    width = {name: np.diff(row["scores"]["t0"]["interval"])[0] for name, row in table["rows"].items()}
    assert width["shifted"] > 2 * width["full"]
    assert table["label"] == "seeds and questions" and table["rows"]["shifted"]["scores"]["t0"]["seeds"][0] < 0.4


def test_pairing_makes_equal_rows_equal():
    made = lines(coins(0.6, 200, 0))
    table = relative.compare({"full": [made], "random": [made], "same": [list(reversed(made))]}, resamples=200)
    assert table["rows"]["same"]["rel_interval"] == [100, 100]
    assert table["rows"]["same"]["against"] == {"difference": 0.0, "interval": [0.0, 0.0]}


def test_label_is_that_of_the_fewest_seeds():
    made = lines(coins(0.6, 100, 0))
    table = relative.compare({"full": [made], "random": [made, made]}, resamples=50)
    assert table["rows"]["random"]["label"] == "questions only"


def test_same_seed_same_table_and_text_only_rows_are_their_own_images():
    made = [line | {"image": None} for line in lines(coins(0.6, 100, 0))]
    first, second = (relative.compare({"full": [made]}, resamples=50, seed=3) for _ in range(2))
    assert first == second
    assert first["tasks"][0]["images"] == 50


def test_coverage_of_the_interval():
    inside = 0
    for trial in range(100):
        table = relative.compare({"full": [lines(coins(0.4, 150, trial), tasks=1)]}, resamples=200)
        low, high = table["rows"]["full"]["scores"]["t0"]["interval"]
        inside += low <= 0.4 <= high
    assert inside >= 88  # 95 expected


def test_other_questions_are_an_error():
    with pytest.raises(UserError, match="row 'b', seed 0, answered 8 questions, not the 10 of row 'full'"):
        relative.compare({"full": [lines([1] * 10)], "b": [lines([1] * 8)]}, resamples=10)


@pytest.mark.parametrize("rows", [{}, {"full": []}, {"full": [[]], "random": []}])
def test_without_answers_the_table_is_one_sentence(rows):
    table = relative.compare(rows)
    assert table["tasks"] == [] and table["rows"] == {} and not table["ranked"]
    assert table["sentence"].startswith("Nothing was evaluated")
    assert relative.text(table) == table["sentence"]
    whole = relative.compare({"full": [lines([1.0, 0.0])]}, resamples=10)
    assert table.keys() == whole.keys()


def test_a_row_without_answers_is_left_out():
    made = lines(coins(0.6, 60, 0))
    assert list(relative.compare({"full": [made], "late": [[]]}, resamples=10)["rows"]) == ["full"]


def strict(table):
    """The table through JSON that knows no NaN."""
    return json.loads(json.dumps(table, allow_nan=False))


@pytest.mark.filterwarnings("error")
def test_resamples_in_which_the_full_row_scores_nothing_are_left_out():
    """4 right of 100 and a floor of 0: the task counts, and in about 2 % of the resamples the full row has 0."""
    scores = np.zeros(200)
    scores[[0, 50, 100, 150]] = 1  # of task t0
    scores[1::2] = coins(0.6, 100, 0)
    made = lines(scores, blind=0.0)
    half = lines(scores * 0.5, blind=0.0)
    table = strict(relative.compare({"full": [made], "half": [half], "random": [half]}, resamples=2000, seed=1))
    assert table["counted"] == ["t0", "t1"]
    assert table["rows"]["half"]["rel_interval"] == [50, 50]
    assert table["rows"]["half"]["against"]["interval"] == [0, 0]


def test_ratios_leave_out_what_has_none():
    full = np.array([[0.5, 0.5], [0.0, 0.5], [np.nan, 0.5], [np.nan, np.nan]])
    score = np.array([[0.25, 0.5], [0.25, 0.5], [np.nan, 0.25], [np.nan, np.nan]])
    np.testing.assert_array_equal(relative._ratios(score, full), [75, np.nan, 50, np.nan])


@pytest.mark.filterwarnings("error")
def test_too_few_resamples_give_no_interval():
    """60 tasks of 100 questions with 4 right: in most resamples the full row has none right in at least one of them."""
    made = lines((np.arange(6000) < 240).astype(float), tasks=60, blind=0.0)
    table = strict(relative.compare({"full": [made], "same": [made], "random": [made]}, resamples=200))
    assert len(table["counted"]) > 40
    for row in table["rows"].values():
        assert row["rel"] == 100 and row["rel_interval"] is None
    assert table["rows"]["same"]["against"] == {"difference": 0.0, "interval": None}
    printed = relative.text(table)
    assert "Rel. % of same minus random, paired: +0.0." in printed and "nan" not in printed


@pytest.mark.filterwarnings("error")
def test_one_resample_is_enough_for_a_table_without_nan():
    made = [{**line, "task": f"t{number}"} for number, line in enumerate(lines(coins(0.5, 40, 0)))]
    table = strict(relative.compare({"full": [made]}, resamples=1))
    intervals = [score["interval"] for score in table["rows"]["full"]["scores"].values()]
    assert None in intervals and any(intervals)  # tasks whose only image was not drawn, and others
    assert relative.text(table)


def test_no_resamples_is_an_error():
    for call in (relative.compare, lambda rows, resamples: relative.intervals(rows["full"][0], resamples, 0)):
        with pytest.raises(UserError, match=r"evaluate\.bootstrap is 0; expected 1"):
            call({"full": [lines([1.0])]}, resamples=0)


def test_large_tables_are_fast():
    rows = {name: [lines(coins(0.5, 5000, s), tasks=15, per_image=2) for s in range(3)] for name in ("full", "a", "b")}
    begin = time.monotonic()
    relative.compare(rows, resamples=1000)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(("count", "form"), [(2, "["), (6, "±"), (14, None)])
def test_text_is_aligned_and_at_most_120_wide(count, form):
    made = lines(coins(0.6, 300, 0), tasks=15)
    names = ["full", *(f"row_{i}" for i in range(count - 1))]
    printed = relative.text(relative.compare({name: [made] for name in names}, resamples=50, minimum=1))
    rows = [line for line in printed.splitlines() if line.startswith(("· ", "  t"))]
    assert all(len(line) <= (120 if form else 200) for line in printed.splitlines())
    table = [line for line in rows if not line.startswith("· counted")]
    assert len(table) == 16 and len({len(line) for line in table}) == 1  # a heading and fifteen tasks
    assert form is None or all(form in line for line in table[1:])
