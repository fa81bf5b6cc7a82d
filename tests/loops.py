"""A training run of a model of width 32 on made-up records: what tests of the loop and of its samplers share."""

import jax
import numpy as np
import weights
from ml_collections import ConfigDict

from coincide_jax import curriculum, training
from coincide_jax.core import artifacts, axes
from coincide_jax.core.metrics import MEASURED
from coincide_jax.dataset.conversation import Encoded
from coincide_jax.models import vlm
from coincide_jax.training.state import Recipe
from configs import common

MODEL = {
    "vision": {"patch": 8, "width": 32, "depth": 1, "heads": 2, "mlp": 32},
    "decoder": {"width": 32, "depth": 2, "heads": 2, "kv_heads": 1, "mlp": 32},
}
CFG = vlm.VLMConfig.tiny(MODEL, 16, 64)
RECORDS, ARMS = 40, 3
SAMPLER = curriculum.make(
    ConfigDict(dict(common.defaults().curriculum) | {"name": "coincide_plus", "gamma": 0.2, "mu": 0.5})
)


class Synthetic:
    """Records of random tokens; every fifth one is text only. What `batches.planned` asks of a data set."""

    image_size = 16
    buckets = (16, 24)

    def bucket(self, length: int) -> int:
        return next(bucket for bucket in self.buckets if length <= bucket)

    def row(self, index: int):
        if index < 0:
            return index
        rng = np.random.default_rng(index)
        length, image = int(rng.integers(10, 25)), index % 5 != 0
        labels = np.arange(length) >= length - 1 - index % 4
        tokens = rng.integers(4, 64, length).astype(np.int32)
        encoded = Encoded(tokens=tokens, image_start=2 if image else -1, labels=labels, text=np.ones(length, bool))
        return index, encoded, rng.integers(0, 256, (16, 16, 3)).astype(np.uint8) if image else None


def recipe(**changes) -> Recipe:
    sizes = {"batch": 8, "micro_batch": 8, "checkpoint_every": 4, "learning_rate": 3e-3}
    return Recipe.from_config(common.recipe(**sizes | changes), "train")


def begin(mesh, cfg=CFG):
    return weights.draw(vlm.abstract(cfg), mesh, seed=1)


def fit(
    out, mesh, *, params=None, sampler=SAMPLER, total=RECORDS, lag=0, round_steps=3, records=RECORDS, cfg=CFG,
    more=None, objective="nll", ask=None, **changes
):  # fmt: skip
    """A run of five steps in rounds of three. more: further entries of `members`."""
    with jax.set_mesh(mesh), training.Termination() as stop:
        return training.fit(
            name="train",
            params=begin(mesh) if params is None else params,
            cfg=cfg,
            dataset=Synthetic(),
            members={"records": np.arange(records), "arm": np.arange(records) % ARMS, "arms": ARMS} | (more or {}),
            sampler=sampler,
            total_records=total,
            recipe=recipe(**changes),
            round_steps=round_steps,
            lag=lag,
            threads=2,
            mesh=mesh,
            out=out,
            stop=stop,
            objective=objective,
            ask=ask,
        )


def lines(out, name="metrics.jsonl"):
    """The lines of a file without the times."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in artifacts.read_jsonl(out / name)]


def one_device():
    return axes.make_mesh(devices=jax.devices()[:1])
