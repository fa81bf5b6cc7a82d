"""A small training run that sends itself a signal at a drawn moment; `tests/faults` starts it in processes of its own.

Rounds of four steps, a checkpoint every three; probes, replays and watched records between them, so that there is
something of every kind to lose.
"""

import itertools
import os
import pathlib
import random
import threading

import loops
import numpy as np
from ml_collections import ConfigDict

from coincide_jax import curriculum
from coincide_jax.core import artifacts, checkpoint
from coincide_jax.training import loop, probe
from configs import common

STEPS, BATCH, ROUND, EVERY = 60, 8, 4, 3
SETTINGS = {
    "name": "coincide_plus", "gamma": 0.2, "mu": 0.5, "round_steps": ROUND, "rehearsal": 0.2, "probe": 2,
}  # fmt: skip
FURTHEST = {"save": 3, "step": 12, "data": 200}  # calls after which the signal comes at the latest
SPREAD = {"save": 0.05, "step": 0.02, "data": 0.005}  # seconds after the call, at most


def train(out: str, moment: str = "", number: int = 0, seed: str = "") -> None:
    """Trains in `out`, or goes on there; writes outcome.json at the end.

    Args:
      moment: 'save' (checkpoints are written in the background), 'step' or 'data' (a reading thread); '' = no signal.
      number: of the signal that the process sends itself.
      seed: draws how many calls later, and how long after the call.
    """
    chance, calls = random.Random(seed), itertools.count(1)
    at = chance.randint(1, FURTHEST.get(moment, 1))

    def strike() -> None:
        if next(calls) == at:
            threading.Timer(chance.uniform(0.0, SPREAD[moment]), os.kill, (os.getpid(), number)).start()

    def struck(function):
        def called(*args, **options):
            strike()
            return function(*args, **options)

        return called

    if moment == "save":
        checkpoint.Checkpoints.save = struck(checkpoint.Checkpoints.save)
    elif moment == "step":
        compile_steps = loop.compiled.compile_steps
        loop.compiled.compile_steps = lambda *args: (run := compile_steps(*args))._replace(apply=struck(run.apply))
    elif moment == "data":
        loops.Synthetic.row = struck(loops.Synthetic.row)
    records = np.arange(loops.RECORDS)
    arm = records % loops.ARMS
    sampler = curriculum.make(
        ConfigDict(dict(common.defaults().curriculum) | SETTINGS), curriculum.pool(arm, loops.ARMS)
    )
    params, _ = loops.fit(
        pathlib.Path(out), loops.one_device(), sampler=sampler, total=STEPS * BATCH, round_steps=ROUND,
        more={"probed": probe.choose(records, arm, loops.ARMS, 2, 0), "watched": np.asarray([50, 51, 52])},
        batch=BATCH, micro_batch=4, checkpoint_every=EVERY,
    )  # fmt: skip
    artifacts.write_json(pathlib.Path(out) / "outcome.json", {"weights": checkpoint.fingerprint(params)})
