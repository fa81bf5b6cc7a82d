"""benchmarks/train_step.py at toy size: one line, both sides with the same losses. Speed is not judged."""

from test_benchmarks import MODEL, line


def test_against_peft():
    found = line("train_step", *MODEL, "--kv_heads=1", "--rows=4", "--rank=4", "--rounds=3", "--against=pytorch")
    assert found["largest_loss_difference"] < 1e-5 and found["loss"][1] < found["loss"][0]
    assert found["trained"] == 4 * 6 * (2 * 64 + 2 * 48 + 3 * 80) + 16 * 32 + 32 + 32 * 32 + 32
    assert found["rows"] == 4 and "peft" in found["peer"] and set(found["samples_per_s"]) == {"ours", "peer"}
    middle, low, high = found["speed_ratio"]
    assert 0 < low <= middle <= high
