"""Asking inside the training loop: before a record is read, once, and the same list after any stop."""

import os
import signal

import numpy as np
import pytest
from loops import ARMS, RECORDS, fit, lines, one_device
from ml_collections import ConfigDict

from coincide_jax import curriculum
from coincide_jax.core import artifacts
from coincide_jax.dataset import annotate, source
from coincide_jax.training import asking, loop
from configs import common

RAW = [
    {"id": f"r{row}", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    for row in range(RECORDS)
]
FULL = source.parse(RAW)[0]
WARM = np.arange(RECORDS) % 5 == 0  # eight records: one step
BUDGET = 26


def run(out, *, lag=0, stop_at=None, monkeypatch=None, probe=0, probe_from="heldout"):
    """Seven steps of eight records, rounds of two: 26 answers (less the held-out ones) and a second epoch over them."""
    settings = ConfigDict(dict(common.defaults().curriculum) | {"name": "progress", "round_steps": 2, "lag": lag})
    settings.update(probe=probe, probe_from=probe_from)
    rank = np.arange(RECORDS)[::-1] + RECORDS * ~WARM
    draw = asking.Draw(np.arange(RECORDS), np.arange(RECORDS) % ARMS, ARMS, BUDGET, rank, WARM)
    sampler, _ = curriculum.prepare(settings, draw.records, draw.arm, ARMS)
    sampler = sampler._replace(shuffle=False)
    if probe and probe_from == "heldout":
        asking.hold_out(draw, probe, 0)
    answers = annotate.OwnAnswers(FULL)
    asker = annotate.Annotator(out / "annotations.jsonl", annotate.without_answers(FULL), answers, BUDGET, {})
    more = draw.members() | {"limit": draw.limit()}
    if probe:
        more["probed"] = asking.probes(draw, settings, asker, 0)
    with monkeypatch.context() as patch:
        if stop_at:
            original = loop.compiled.compile_steps

            def wrapped(*args):
                steps, done = original(*args), []

                def apply(*arguments):
                    done.append(0)
                    if len(done) == stop_at:
                        os.kill(os.getpid(), signal.SIGTERM)
                    return steps.apply(*arguments)

                return steps._replace(apply=apply)

            patch.setattr(loop.compiled, "compile_steps", wrapped)
        return fit(out, one_device(), sampler=sampler, more=more, total=56, lag=lag, round_steps=2, ask=asker.ask_round)


@pytest.mark.parametrize(("lag", "probe", "probe_from"), [(0, 0, "heldout"), (1, 2, "heldout"), (0, 2, "seen")])
def test_the_list_after_a_stop_is_that_of_an_undisturbed_run(tmp_path, monkeypatch, lag, probe, probe_from):
    keys = {"lag": lag, "probe": probe, "probe_from": probe_from, "monkeypatch": monkeypatch}
    (tmp_path / "whole").mkdir()
    (tmp_path / "halves").mkdir()
    _, summary = run(tmp_path / "whole", **keys)
    with pytest.raises(SystemExit):
        run(tmp_path / "halves", stop_at=1, **keys)
    before = (tmp_path / "halves" / "annotations.jsonl").read_bytes()
    run(tmp_path / "halves", **keys)
    found = [(tmp_path / name / "annotations.jsonl").read_bytes() for name in ("whole", "halves")]
    assert found[0] == found[1] and found[0].startswith(before)
    assert lag or len(before) < len(found[0])  # stopped within the first round, which the second is not asked in
    for name in ("metrics.jsonl", "curriculum.jsonl"):
        assert lines(tmp_path / "whole", name) == lines(tmp_path / "halves", name)
    asked = artifacts.read_jsonl(tmp_path / "whole" / "annotations.jsonl")
    held = ARMS * probe if probe_from == "heldout" else 0
    assert len(asked) == len({line["index"] for line in asked}) == BUDGET
    assert [line["purpose"] for line in asked] == ["probe"] * held + ["train"] * (BUDGET - held)
    assert {line["index"] for line in asked[held:][:8]} == set(np.flatnonzero(WARM).tolist())
    assert summary["records"] == 56 and summary["distinct"] == BUDGET - held and summary["epochs"] >= 1
