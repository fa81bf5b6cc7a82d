"""What a run tells of its speed: counted work, time spent waiting for the reader, events, time left."""

import dataclasses
import sys
import time

import numpy as np
import pytest
from loops import Synthetic, fit, one_device

from coincide_jax.core import artifacts, metrics, peaks, precision
from coincide_jax.core.errors import UserError
from coincide_jax.dataset import batches
from coincide_jax.models import flops, layers, vlm
from coincide_jax.training import log as logs

ADAPTED = ("wq", "wk", "wv", "wo", "gate", "up", "down")


def llava():
    """LLaVA-1.5-7B."""
    vision = {"patch": 14, "width": 1024, "depth": 23, "heads": 16, "mlp": 4096}
    decoder = {"width": 4096, "depth": 32, "heads": 32, "kv_heads": 32, "mlp": 11008}
    return vlm.VLMConfig.tiny({"vision": vision, "decoder": decoder}, 336, 32_000, precision.choose("bfloat16"))


def test_counted_flop_of_a_step():
    """By hand, for LLaVA-1.5-7B: frozen weights behind the adapters 4, adapters 6, the tower 2."""
    blocks, tower = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 23 * 12 * 1024**2 + 3 * 14**2 * 1024
    adapters = 32 * 128 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    projector = (1024 * 4096 + 4096**2) * 576
    pictures = 2 * 23 * 577**2 * 1024
    found = flops.training(llava(), "lora", 128, ADAPTED)
    assert found.position == 4 * blocks + 6 * adapters and found.supervised == 4 * 32_000 * 4096
    assert found.pair == 12 * 32 * 4096 and found.image == 2 * (tower * 577 + pictures) + 6 * projector
    full = flops.training(llava(), "full", 128, ADAPTED)
    assert full.position == 6 * blocks and full.image == 6 * (tower * 577 + pictures) + 6 * projector


def test_work_of_a_step_is_the_same_packed():
    data, plan = Synthetic(), np.asarray([[*range(14), -1, -1]])
    sizes = np.asarray([len(data.row(index)[1].tokens) for index in range(14)])
    found = {}
    for packing in (False, True):
        (step,) = batches.planned(data, plan, micro=8, threads=1, packing=packing)
        found[packing] = logs.Work.of(step)
        assert found[packing].positions == sizes.sum() and found[packing].pairs == (sizes * (sizes + 1) // 2).sum()
        assert found[packing].images == 11 and found[packing].supervised == sum(1 + index % 4 for index in range(14))
    assert found[True].slots < found[False].slots


def test_waiting_for_the_reader_is_told(tmp_path, monkeypatch):
    row, slow = Synthetic.row, {"seconds": 0.0}
    monkeypatch.setattr(Synthetic, "row", lambda self, index: time.sleep(slow["seconds"]) or row(self, index))
    _, quick = fit(tmp_path / "quick", one_device(), lag=1)
    slow["seconds"] = 0.1
    _, summary = fit(tmp_path / "slow", one_device(), lag=1)
    assert 0 <= quick["data_wait"] < summary["data_wait"] <= 1 and summary["data_wait"] > 0.5
    lines = artifacts.read_jsonl(tmp_path / "slow" / "metrics.jsonl")
    assert all(0 <= line["data_wait"] <= 1.001 and line["mfu"] > 0 for line in lines)
    assert summary["attention"] == "whole" and summary["peak"][1] == "measured"
    for line in lines:
        assert set(metrics.MEASURED) - set(line) == {"device_memory_mib"}
        assert line["projector_learning_rate"] == pytest.approx(line["learning_rate"] / 3, rel=1e-5)


def test_events_are_the_lines(tmp_path):
    from tensorboardX.proto import event_pb2

    fit(tmp_path, one_device(), tensorboard=True)
    (file,) = (tmp_path / "events").iterdir()
    found, data = {}, file.read_bytes()
    while data:  # length u64, checksum u32, event, checksum u32
        size = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        data = data[16 + size :]
    for line in artifacts.read_jsonl(tmp_path / "metrics.jsonl"):
        assert found[line["step"], "loss"] == pytest.approx(line["loss"], rel=1e-6)
        assert found[line["step"], "mfu"] == pytest.approx(line["mfu"], rel=1e-6)


def test_without_events_nothing_is_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # importing it now fails
    fit(tmp_path / "without", one_device(), steps=1)
    assert not (tmp_path / "without" / "events").exists()
    with pytest.raises(UserError, match=r"tensorboardX is not installed; expected pip install"):
        fit(tmp_path / "with", one_device(), steps=1, tensorboard=True)


def test_peaks_by_kind_of_device():
    mesh = one_device()
    measured, origin = peaks.total("float32", mesh)
    assert origin == "measured" and 1e8 < measured < 1e14

    @dataclasses.dataclass
    class Device:
        device_kind: str
        platform: str = "gpu"

    class Mesh:
        size = 4

        def __init__(self, kind: str):
            self.devices = np.asarray([Device(kind)] * 4)

    for kind, each in (("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("TPU v5 lite", 197e12)):
        assert peaks.total("bfloat16", Mesh(kind)) == (4 * each, "published")


def test_time_left_leaves_out_what_an_earlier_run_did(monkeypatch, capsys):
    monkeypatch.setattr(metrics, "LOG_EVERY_SECONDS", 0.0)
    clock = iter([100.0, 100.0, 104.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    with metrics.Progress("train", 1000, "steps", first=900) as progress:
        progress.advance(2)
    assert "902/1000 steps · 0.5/s · 196 s left" in capsys.readouterr().out


def test_the_attention_used_is_named(monkeypatch):
    assert layers.attention_used(64, layers.WHOLE_UP_TO, np.float32) == "whole"
    assert layers.attention_used(64, 2048, np.float32) == "blocks"
    monkeypatch.setattr(layers, "has_cudnn", lambda q: q.shape == (1, 2048, 1, 1, 64))
    assert layers.attention_used(64, 2048, np.float16) == "cudnn"
