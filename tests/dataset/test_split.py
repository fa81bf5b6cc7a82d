"""The split: by image bytes, stable under reordering, questions' images out of everything."""

import dataclasses

import pytest

from coincide_jax.core.errors import UserError
from coincide_jax.dataset import split as splitting
from coincide_jax.dataset.source import Record

SHARES = dict(heldout=0.2, dev=0.05, base=0.2, seed=3)


def some(count=600):
    """Two records an image, every fifth image a byte copy of the one before under another name, some text only."""
    records = [
        Record(i, f"id{i}", None if i % 10 == 9 else f"im{i // 2}.png", (("q", "a"),), "t", {}) for i in range(count)
    ]
    digests = {f"im{i}.png": f"bytes{i - (i % 5 == 4)}" for i in range(count)}
    return records, digests


def test_parts_cover_and_share_no_image():
    records, digests = some()
    parts = splitting.split(records, digests, **SHARES)
    assert sorted(i for rows in parts.values() for i in rows) == list(range(len(records)))
    seen = {}
    for name, rows in parts.items():
        for row in rows:
            image = records[row].image
            if image:
                assert seen.setdefault(digests[image], name) == name
    assert abs(len(parts["heldout"]) / len(records) - 0.2) < 0.06
    assert abs(len(parts["base"]) / len(records) - 0.2) < 0.06


def test_order_and_company_do_not_matter():
    records, digests = some()
    part_of = {i: name for name, rows in splitting.split(records, digests, **SHARES).items() for i in rows}
    turned = [dataclasses.replace(r, index=i) for i, r in enumerate(records[::-1][:400])]
    for name, rows in splitting.split(turned, digests, **SHARES).items():
        for row in rows:
            assert part_of[int(turned[row].id[2:])] == name
    other = splitting.split(records, digests, **SHARES | {"seed": 4})
    assert other["heldout"] != [i for i, name in part_of.items() if name == "heldout"]


def test_base_share_moves_nobody_else():
    records, digests = some()
    one, two = (splitting.split(records, digests, **SHARES | {"base": base}) for base in (0.0, 0.3))
    assert (one["heldout"], one["dev"], one["base"]) == (two["heldout"], two["dev"], [])


def test_images_of_questions_are_held_out():
    records, digests = some()
    parts = splitting.split(records, digests, **SHARES | {"heldout": 0.0}, asked={"bytes3", "bytes8"})
    assert {records[i].image for i in parts["heldout"]} == {"im3.png", "im4.png", "im8.png", "im9.png"}


def test_unseen_leaves_out_shared_images_and_texts():
    records, digests = some(20)
    base = [
        Record(0, "0", "copy.png", (("q", "a"),), "t", {}),
        Record(1, "1", "new.png", (("q", "a"),), "t", {}),
        Record(2, "2", None, (("q", "a"),), "t", {}),
        Record(3, "id9", None, (("other", "a"),), "t", {}),
        None,
        Record(5, "5", "asked.png", (("q", "a"),), "t", {}),
    ]
    found = {"copy.png": "bytes1", "new.png": "bytes99", "asked.png": "bytes77"}
    assert splitting.unseen(base, found, records, digests, {"bytes77"}) == [1, 3]


def test_wrong_shares_and_an_empty_pool():
    records, digests = some(20)
    with pytest.raises(UserError, match=r"dataset\.share_dev is -0\.1"):
        splitting.split(records, digests, **SHARES | {"dev": -0.1})
    with pytest.raises(UserError, match="leave nothing for the pool"):
        splitting.split(records, digests, **SHARES | {"base": 0.8})
    with pytest.raises(UserError, match="the pool is empty"):
        splitting.split(records[:2], digests, **SHARES | {"heldout": 0.0}, asked={"bytes0"})
