"""Training steps with several records in a row against one record a row, on the lengths of a real data set.

    python -m benchmarks.packing --records=PATH.json [--rows B] [--micro M] [--length T] [--steps S] [--rounds N] …

Prints one JSON line. The records are those of a LLaVA file (a sample drawn by seed), tokenised as a run with
`configs/llava_json.py` would; pixels are random, and made before the clock starts. Three ways take the same optimiser
steps of the same records in turns: `packed` (`train.packing`), `buckets` (a step's records sorted by length, each
micro-batch padded to the bucket of its longest), `one_length` (every row padded to `dataset.max_length`, as a program
without buckets does it). Useful tokens are the positions that hold a record, image positions too. The loss of the first
step has to agree to 1e-4, or the benchmark fails.
"""

import copy
import statistics

import jax
import numpy as np

from benchmarks import models, record, train_step
from coincide_jax.core import artifacts
from coincide_jax.dataset import batches, conversation, source, tokenizer
from coincide_jax.models import layers, vlm
from coincide_jax.training.log import Work
from configs import llava_json

CLOSE = 1e-4


class Sample:
    """Records with random pixels: what `batches.planned` asks of a data set."""

    def __init__(self, cfg, settings, path: str, count: int, seed: int):
        records, _ = source.parse(source.load(path))
        records = [found for found in records if found is not None]
        self.draw = np.random.default_rng(seed)
        chosen = [records[index] for index in self.draw.permutation(len(records))[:count]]
        texts = (
            text for one in chosen for text in conversation.render(one.turns, one.image is not None, settings.system)
        )
        words = tokenizer.train(texts, cfg.decoder.vocab)
        template = conversation.Template(
            settings.template, words, settings.system, cfg.image_tokens, settings.max_length
        )
        self.rows = [template.encode(one.turns, one.image is not None) for one in chosen]
        size = self.image_size = cfg.vision.image_size
        self.pixels = self.draw.integers(0, 256, (size, size, 3)).astype(np.uint8)
        self.buckets = tuple(settings.buckets)

    def bucket(self, length: int) -> int:
        return next(bucket for bucket in self.buckets if length <= bucket)

    def row(self, index: int) -> batches.Row:
        encoded = self.rows[index]
        return index, encoded, None if encoded.image_start < 0 else self.pixels


class Way:
    """Each call takes all the steps of one way; the loss of the first step of all is kept."""

    def __init__(self, params, cfg, how, mesh, steps: list[list[batches.Batch]]):
        self.steps, self.ours = steps, train_step.Ours(params, cfg, how, steps[0][0], mesh)
        work = [Work.of(step) for step in steps]
        self.tokens = sum(one.positions for one in work)
        self.filled = self.tokens / sum(one.slots for one in work)
        self.shapes = sorted({batch["tokens"].shape for step in steps for batch in step})

    def __call__(self) -> None:
        for step in self.steps:
            self.ours.step(step)


def measure(keys) -> dict:
    """The line."""
    settings, mesh, cfg = copy.deepcopy(llava_json.get_config().dataset), models.one_device_mesh(), models.config(keys)
    (batch,) = keys.rows
    how = train_step.recipe(keys, batch=batch, micro_batch=keys.micro)
    data = Sample(cfg, settings, keys.records, batch * keys.steps, keys.seed)
    plan = np.arange(len(data.rows) // batch * batch).reshape(-1, batch)
    found = {}
    with jax.set_mesh(mesh):
        params = layers.init(vlm.abstract(cfg), jax.random.key(keys.seed), mesh)
        for name, packing in (("packed", True), ("buckets", False), ("one_length", False)):
            if name == "one_length":
                data.buckets = data.buckets[-1:]
            steps = list(batches.planned(data, plan, micro=keys.micro, threads=1, packing=packing))
            found[name] = Way(params, cfg, how, mesh, steps)
        _, first, seconds = models.alternate(found, keys.rounds)
    losses = [way.ours.losses[0] for way in found.values()]
    apart = max(losses) / min(losses) - 1
    assert apart <= CLOSE, f"the losses of the first step differ: {losses}"
    sizes = np.asarray([len(row.tokens) for row in data.rows])
    return {
        "peer": "the same steps, one record a row",
        **models.described(keys, cfg),
        "length": settings.max_length,
        "records": {"file": artifacts.digest(keys.records)[:16], "sampled": len(sizes)},
        "lengths": {
            "mean": round(float(sizes.mean()), 1),
            "median": int(np.median(sizes)),
            "largest": int(sizes.max()),
        },
        "rows": batch,
        "micro": keys.micro,
        "loss_difference": float(apart),
        "filled": {name: round(way.filled, 3) for name, way in found.items()},
        "shapes": {name: way.shapes for name, way in found.items()},
        "tokens_per_s": {name: round(found[name].tokens / statistics.median(s), 1) for name, s in seconds.items()},
        "first_call_seconds": {name: round(value, 2) for name, value in first.items()},
        "speed_ratio": {
            f"{name} by packed": models.ratio(seconds[name], seconds["packed"]) for name in ("one_length", "buckets")
        },
    }


def main() -> None:
    """Prints the line."""
    parser = train_step.arguments("Several records in a row against one; one JSON line.")
    parser.add_argument("--records", required=True, help="a LLaVA JSON or JSONL file; its images are not read")
    parser.add_argument("--micro", type=int, default=32, help="records of a forward pass")
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of one way in a round")
    parser.set_defaults(rows=[64], rounds=5)
    keys = models.begin(parser)
    record.emit("packing", measure(keys), keys)


if __name__ == "__main__":
    main()
