"""One LoRA optimiser step of `coincide_jax.training` against PyTorch with `peft`, or against the device's matmul peak.

    python -m benchmarks.train_step [--rows B] [--length T] [--rank R] [--rounds N] [--precision P] …

Prints one JSON line. Against PyTorch (the default without a GPU): the same random LLaVA-style model, adapters, batch
and cores, float32; loss, gradient, clip and AdamW of one step, LoRA on every product of the decoder and the whole
projector, vision tower frozen, no dropout. Both sides take steps on the same batch in turns, every other round
backwards; the first calls, which for JAX hold the compilation, stand apart. The peer is `transformers` and `peft` with
SDPA and a fused AdamW, its head over every position, as its users run it (`--answer=1` lets ours run it over all text
as well). Losses have to agree, or the benchmark fails: to 1e-4 in the first three steps, to 1e-3 in all (float32
rounding grows with every step taken).

The default sizes are those of the models that `configs/llava_json.py` trains. Larger ones:

    python -m benchmarks.train_step --image=224 --tower 384 11 6 1536 --text 640 24 10 1728 --kv_heads=10 \\
        --vocab=8192 --length=512 --rows=4 --rank=64

Against the peak (the default on a GPU): samples/s, tokens/s, memory and model FLOP utilisation of a step for each
`--rows`, by the count of `models/flops.py`, as a share of the FLOP/s of a chain of large products. At real sizes:

    python -m benchmarks.train_step --model=llava-1.5-7b --length=2048 --rank=128 --remat --rows 4 8 16
"""

import os
import pathlib
import statistics
import tempfile

import jax
import numpy as np

from benchmarks import models, record
from coincide_jax.core import axes
from coincide_jax.kernels import bandits
from coincide_jax.models import flops, hf, layers, vlm
from coincide_jax.training import state as states
from coincide_jax.training import steps as compiled
from coincide_jax.training.log import Work, memory
from coincide_jax.training.state import Recipe
from configs import common

STEPS = 1000  # of the schedule; a benchmark takes its first ones
CLOSE, NEAR = 1e-4, 1e-3  # largest relative difference of the losses: in the first three steps, in all


def recipe(keys, **changes) -> Recipe:
    """Of one step over the whole batch, at rates that change the loss from step to step."""
    lora = {"rank": keys.rank, "alpha": 2.0 * keys.rank, "dropout": 0.0, "targets": ("all-linear",)}
    rates = {"learning_rate": 1e-3, "projector_learning_rate": 1e-4, "warmup": 0.0}
    rows = keys.rows[0]
    sizes = {"mode": "lora", "batch": rows, "micro_batch": rows, "steps": STEPS, "remat": keys.remat}
    return Recipe.from_config(common.recipe(lora=lora, **rates | sizes | changes), "train")


def draw_batch(cfg, keys, rows: int) -> dict[str, np.ndarray]:
    """`models.draw_batch` whose last positions are the answer: the share `--answer` of all, the image left out."""
    batch = models.draw_batch(cfg, rows, keys.length, keys.seed)
    behind = np.arange(keys.length)[None] >= keys.length - round(keys.length * keys.answer)
    given = {"slot": np.arange(rows, dtype=np.int32), "valid": np.ones(rows, bool)}
    return batch | given | {"labels": behind & batch["text"]}


class Ours:
    """The run's own compiled steps, called as the loop calls them; each call is a step and notes its loss."""

    def __init__(self, params: dict, cfg, how: Recipe, batch: dict, mesh):
        self.batch, self.mesh = batch, mesh
        trained, self.frozen = states.divide(params, cfg, how, jax.random.key(how.seed), mesh)
        self.adapters = jax.device_get(trained["lora"])
        self.state = states.start(trained, how, bandits.UNIFORM, 1, 1, 1)
        self.run, self.schedule = compiled.compile_steps(cfg, how, bandits.UNIFORM), states.Schedule.of(how, how.steps)
        self.sum = jax.jit(compiled.empty, static_argnums=1)(self.state.params, how.batch)
        self.losses = []

    def __call__(self) -> None:
        self.step([self.batch])

    def step(self, micro_batches: list[dict]) -> None:
        """One optimiser step."""
        for number, batch in enumerate(micro_batches):
            batch = axes.put_batch(batch, self.mesh)
            where = self.state.key, self.state.step, np.int32(number)
            self.sum = self.run.micro(self.state.params, self.frozen, self.sum, batch, *where)
        self.state, self.sum, metrics = self.run.apply(self.state, self.sum, self.schedule)
        self.losses.append(float(metrics["loss"]))


class Peer:
    """The same model, adapters and batch in PyTorch; each call is a step and notes its loss."""

    def __init__(self, folder: pathlib.Path, adapter: pathlib.Path, cfg, how: Recipe, batch: dict):
        import peft
        import torch
        import transformers

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        transformers.utils.logging.disable_progress_bar()
        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
        named = [(name, leaf) for name, leaf in self.model.named_parameters() if leaf.requires_grad]
        self.trained = [leaf for _, leaf in named]
        rates = [how.projector_learning_rate if "projector" in name else how.learning_rate for name, _ in named]
        groups = [{"params": [leaf], "lr": rate} for leaf, rate in zip(self.trained, rates, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
        factor = states.Schedule.of(how, how.steps).factor
        self.factors = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: float(factor(np.int32(step))))
        labels = np.where(batch["labels"], batch["tokens"], -100).astype(np.int64)
        self.inputs = models.peer_inputs(cfg, batch) | {"labels": torch.tensor(labels)}
        self.clip, self.losses = how.clip, []
        self.count = sum(leaf.numel() for leaf in self.trained)

    def backward(self) -> float:
        """Loss; leaves its gradient in the parameters."""
        self.optimizer.zero_grad()
        loss = self.model(**self.inputs, use_cache=False).loss
        loss.backward()
        return loss.item()

    def __call__(self) -> None:
        import torch

        self.losses.append(self.backward())
        torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        self.factors.step()


def against_pytorch(keys) -> dict:
    """The line of the comparison with the peer."""
    import peft
    import torch

    mesh, cfg, how = models.one_device_mesh(), models.config(keys), recipe(keys)
    batch = draw_batch(cfg, keys, *keys.rows)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        drawn = layers.init(vlm.abstract(cfg), jax.random.key(keys.seed), mesh)
        hf.export(drawn, cfg, folder, image_token_id=models.IMAGE_ID)
        params, cfg = models.load(folder, keys, mesh, cfg.decoder.depth)
        ours = Ours(params, cfg, how, batch, mesh)
        settings = {"rank": how.rank, "alpha": how.alpha, "dropout": 0.0, "targets": how.targets}
        adapter = folder / "adapter"
        adapter.mkdir()
        hf.export_adapter(ours.adapters, cfg, adapter, **settings, base=str(folder), projector=params["projector"])
        peer = Peer(folder, adapter, cfg, how, batch)
        trained = sum(leaf.size for leaf in jax.tree.leaves(ours.state.params))
        assert trained == peer.count, f"{trained} parameters are trained here, {peer.count} there"
        _, first, seconds = models.alternate({"ours": ours, "peer": peer}, keys.rounds)
    apart = np.abs(np.array(ours.losses) / np.array(peer.losses) - 1)
    close, near = (CLOSE, NEAR) if cfg.precision.compute == "float32" else (0.02, 0.1)
    assert apart[:3].max() <= close and apart.max() <= near, f"the losses differ: {ours.losses} and {peer.losses}"
    return {
        "peer": f"peft {peft.__version__}, torch {torch.__version__}, float32, SDPA, fused AdamW",
        **models.described(keys, cfg),
        "rows": keys.rows[0],
        "supervised": int(batch["labels"].sum()),
        "trained": trained,
        "rank": keys.rank,
        "loss": [round(ours.losses[0], 5), round(ours.losses[-1], 5)],
        "largest_loss_difference": float(apart.max()),
        "samples_per_s": {name: round(keys.rows[0] / statistics.median(s), 3) for name, s in seconds.items()},
        "first_call_seconds": {name: round(value, 2) for name, value in first.items()},
        "speed_ratio": models.ratio(seconds["peer"], seconds["ours"]),
    }


def against_peak(keys) -> dict:
    """The line of the utilisation, batch by batch until the memory is full."""
    mesh, cfg = models.one_device_mesh(), models.config(keys)
    how = recipe(keys)
    costs, swept = flops.training(cfg, how.mode, how.rank, how.targets), []
    with jax.set_mesh(mesh):
        peak = models.matmul_peak(cfg.precision.dtype, keys.peak_size)
        params = models.draw_params(cfg, mesh, keys.seed)
        for rows in keys.rows:
            batch = draw_batch(cfg, keys, rows)
            ours = Ours(params, cfg, recipe(keys, batch=rows, micro_batch=rows), batch, mesh)
            try:
                _, _, seconds = models.alternate({"ours": ours}, keys.rounds)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                break
            middle, work = statistics.median(seconds["ours"]), Work.of([batch])
            swept.append(
                {
                    "rows": rows,
                    "seconds": round(middle, 4),
                    "samples_per_s": round(rows / middle, 3),
                    "tokens_per_s": round(work.positions / middle, 1),
                    "utilisation": round(work.flops(costs) / middle / peak, 4),
                    **memory(),
                }
            )
    return {
        "peer": f"chain of {cfg.precision.compute} products of {keys.peak_size}² matrices",
        **models.described(keys, cfg),
        "rank": keys.rank,
        "remat": keys.remat,
        "attention": layers.attention_used(cfg.decoder.head_dim, keys.length, cfg.precision.dtype),
        "peak_tflops": round(peak / 1e12, 3),
        "swept": swept,
        "utilisation": max((one["utilisation"] for one in swept), default=None),
    }


def arguments(description: str):
    """The flags of training steps, and the sizes of a model that `configs/llava_json.py` trains."""
    parser = models.arguments(description)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--answer", type=float, default=0.25, help="share of a row's positions that are supervised")
    parser.add_argument("--remat", action="store_true", help="keep only the residual stream for the backward pass")
    sizes = {"image": 56, "tower": [96, 3, 4, 288], "text": [96, 6, 4, 256], "kv_heads": 2, "vocab": 4096}
    parser.set_defaults(**sizes, length=64, rows=[32], rounds=20)
    return parser


def main() -> None:
    """Chooses the peer, prints the line."""
    keys = models.begin(arguments("A LoRA training step against PyTorch and peft, or the matmul peak; one JSON line."))
    line = against_pytorch(keys) if keys.against == "pytorch" else against_peak(keys)
    record.emit("train_step", line, keys)


if __name__ == "__main__":
    main()
