"""benchmarks/train_step.py and packing.py at toy size: one line, the same losses. Speed is not judged."""

import pytest
from test_benchmarks import MODEL, line

from coincide_jax.core import artifacts


def test_against_peft():
    found = line("train_step", *MODEL, "--kv_heads=1", "--rows=4", "--rank=4", "--rounds=3", "--against=pytorch")
    assert found["largest_loss_difference"] < 1e-5 and found["loss"][1] < found["loss"][0]
    assert found["trained"] == 4 * 6 * (2 * 64 + 2 * 48 + 3 * 80) + 16 * 32 + 32 + 32 * 32 + 32
    assert found["rows"] == 4 and "peft" in found["peer"] and set(found["samples_per_s"]) == {"ours", "peer"}
    middle, low, high = found["speed_ratio"]
    assert 0 < low <= middle <= high


@pytest.mark.long
def test_share_of_the_peak():
    found = line("train_step", *MODEL, "--kv_heads=1", "--rows", "1", "2", "--rank=4", "--rounds=2", "--against=peak",
                 "--peak_size=64")  # fmt: skip
    assert [one["rows"] for one in found["swept"]] == [1, 2] and found["attention"] == "whole"
    assert all(one["tokens_per_s"] > 0 and one["utilisation"] >= 0 for one in found["swept"])


def test_packing(tmp_path):
    rows = [
        {
            "id": str(number),
            "image": "x.png" if number % 4 else None,
            "conversations": [
                {"from": "human", "value": ("<image>\n" if number % 4 else "") + "What is this? " * (1 + number % 3)},
                {"from": "gpt", "value": "a star " * (1 + 3 * (number % 7))},
            ],
        }
        for number in range(60)
    ]
    rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
    artifacts.write_json(tmp_path / "records.json", rows)
    how = ["--rows=12", "--micro=6", "--steps=2", "--rounds=2", "--rank=4", f"--records={tmp_path / 'records.json'}"]
    found = line("packing", *MODEL[:-1], "--vocab=512", "--kv_heads=1", *how)
    assert found["filled"]["packed"] > found["filled"]["buckets"] > found["filled"]["one_length"]
    assert found["loss_difference"] < 1e-4 and set(found["speed_ratio"]) == {
        "one_length by packed",
        "buckets by packed",
    }
    assert found["records"]["sampled"] == 24 and all(rate > 0 for rate in found["tokens_per_s"].values())
