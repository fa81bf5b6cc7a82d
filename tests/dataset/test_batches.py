"""Batches: contents, buckets, plans that resume, thread counts that change nothing."""

import numpy as np
import pytest

from coincide_jax.core.errors import UserError
from coincide_jax.dataset import batches


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def check_rows(data, batch) -> None:
    """Every valid row holds its record's sequence and image; every other one is empty."""
    for row, index in enumerate(batch["index"]):
        size = batch["lengths"][row]
        if not batch["valid"][row]:
            assert not batch["labels"][row].any() and batch["image_start"][row] == -1 and size == 1
            continue
        encoded = data.encode(int(index))
        assert np.array_equal(batch["tokens"][row, :size], encoded.tokens)
        assert np.array_equal(batch["labels"][row, :size], encoded.labels)
        assert np.array_equal(batch["text"][row, :size], encoded.text)
        assert not batch["tokens"][row, size:].any() and not batch["labels"][row, size:].any()
        assert batch["image_start"][row] == encoded.image_start
        image = data.records[index].image
        assert np.array_equal(batch["images"][row], data.image(image) if image else np.zeros((48, 48, 3)))


def test_ordered_holds_every_record_once(made):
    rows = made.split["pool"]
    found = list(batches.ordered(made.data, rows[::-1], 16, threads=2))
    order = []
    for batch in found:
        length = batch["tokens"].shape[1]
        assert batch["tokens"].shape == (16, length) and length in made.data.buckets
        check_rows(made.data, batch)
        kept = batch["index"][batch["valid"]].tolist()
        assert {made.data.bucket(len(made.data.encode(i).tokens)) for i in kept} == {length}
        assert batch["index"][len(kept) :].tolist() == [-1] * (16 - len(kept))
        order += [(length, i) for i in kept]
    assert order == sorted(order)
    assert sorted(i for _, i in order) == rows
    assert len({length for length, _ in order}) > 1


def test_a_bucket_depends_on_the_record_alone(made):
    def buckets(rows):
        found = batches.ordered(made.data, rows, 4, threads=1)
        return {int(i): b["tokens"].shape[1] for b in found for i in b["index"][b["valid"]]}

    rows = made.split["pool"]
    every = buckets(rows)
    assert all(every[i] == length for i, length in buckets(rows[5:40:3]).items())


@pytest.fixture(scope="module")
def plan(made):
    rng = np.random.default_rng(0)
    plan = rng.choice(made.split["pool"], size=(9, 16)).astype(np.int32)
    plan[3, 5:9] = plan[8, :] = -1
    return plan


def test_planned_batches_follow_the_plan(made, plan):
    steps = list(batches.planned(made.data, plan, micro=4, threads=2))
    assert [len(step) for step in steps] == [4] * 9
    for row, step in zip(plan, steps, strict=True):
        slots = np.concatenate([batch["slot"] for batch in step])
        assert sorted(slots) == list(range(16))
        assert np.array_equal(np.concatenate([batch["index"] for batch in step]), row[slots])
        sizes = []
        for batch in step:
            check_rows(made.data, batch)
            assert batch["slot"].dtype == np.int32
            assert batch["tokens"].shape == (4, made.data.bucket(int(batch["lengths"].max())))
            sizes += batch["lengths"].tolist()
        assert sizes == sorted(sizes)


@pytest.mark.parametrize("start", [0, 1, 4, 8, 9])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_plan_resumes_at_any_step_with_any_threads(made, plan, start, threads):
    whole = list(batches.planned(made.data, plan, micro=8, threads=2))
    rest = list(batches.planned(made.open(), plan, micro=8, start_step=start, threads=threads))
    assert len(rest) == 9 - start
    for one, two in zip(whole[start:], rest, strict=True):
        assert all(same(a, b) for a, b in zip(one, two, strict=True))


def test_stopping_early_leaves_no_thread_behind(made, plan):
    reader = batches.planned(made.data, plan, micro=8, threads=2)
    first = next(reader)
    reader.close()
    assert same(first[0], next(batches.planned(made.data, plan, micro=8, threads=2))[0])


def test_micro_batches_must_divide_the_batch(made, plan):
    with pytest.raises(UserError, match="16 records cannot be cut into micro-batches of 5"):
        next(batches.planned(made.data, plan, micro=5, threads=1))


def test_prompts_end_in_assistant(made):
    image = next(r.image for r in made.data.records if r and r.image)
    questions = [("What color is the star?", image), ("Which word is last: a b c?", None), ("Why?", "gone.png")]
    found = list(batches.prompts(made.data, questions, 4, threads=2))
    rows = {}
    for batch in found:
        assert batch["tokens"].shape[0] == 4
        assert not batch["labels"].any()
        rows |= {int(i): (batch, row) for row, i in enumerate(batch["index"]) if i >= 0}
    assert sorted(rows) == [0, 1, 2]
    for number, (text, path) in enumerate(questions[:2]):
        batch, row = rows[number]
        tokens = batch["tokens"][row, : batch["lengths"][row]]
        assert made.data.tokenizer.decode(tokens[batch["text"][row, : len(tokens)]]).strip() == f"{text} ASSISTANT:"
        assert batch["valid"][row]
        assert (batch["image_start"][row] >= 0) == (path is not None)
    assert not rows[2][0]["valid"][rows[2][1]]


def test_a_vanished_image_is_an_invalid_row_and_is_told(made, capsys):
    data = made.open()
    victim = next(i for i in made.split["pool"] if data.records[i].image)
    data.image = None  # whatever goes wrong while an image is read
    plan = np.full((2, 4), victim, np.int32)
    for step in batches.planned(data, plan, micro=4, threads=2):
        assert step[0]["index"].tolist() == [victim] * 4
        assert not step[0]["valid"].any() and not step[0]["labels"].any()
    assert capsys.readouterr().out.count(f"row {victim} left out") == 1
