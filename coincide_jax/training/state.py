"""What a training run is told (`Recipe`) and what it carries from step to step (`TrainState`)."""

import dataclasses
import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.dynamic_scale import DynamicScale

from coincide_jax.core import precision
from coincide_jax.core.errors import UserError, unknown
from coincide_jax.kernels import plan
from coincide_jax.models import layers, lora

MODES = ("full", "lora", "projector")
MEANS = ("tokens", "records", "micro_batch")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one model is trained; the keys of `configs/common.py: recipe`, with LoRA's beside them."""

    seed: int
    mode: str
    batch: int
    micro_batch: int
    epochs: float
    steps: int
    learning_rate: float
    projector_learning_rate: float
    warmup: float
    weight_decay: float
    clip: float
    loss_mean: str
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    remat: bool
    packing: bool
    tensorboard: bool
    checkpoint_every: int
    keep: int

    @classmethod
    def from_config(cls, keys, name: str) -> "Recipe":
        """Reads and checks the keys; `name` (base, reference.train, train) is used in messages.

        Raises:
          UserError: an unknown mode, a number out of its range, a batch that the micro-batch does not divide.
        """
        values = {key: keys[key] for key in keys if key != "lora"} | dict(keys.lora)
        recipe = cls(**values | {"targets": tuple(values["targets"])})
        if recipe.mode not in MODES:
            raise unknown(f"{name}.mode", recipe.mode, MODES)
        if recipe.loss_mean not in MEANS:
            raise unknown(f"{name}.loss_mean", recipe.loss_mean, MEANS)
        for key in ("batch", "micro_batch", "checkpoint_every", "keep", "learning_rate", "clip", "epochs"):
            if getattr(recipe, key) <= 0:
                raise UserError(f"{name}.{key} is {getattr(recipe, key)}; expected a number above 0")
        for key in ("steps", "warmup", "weight_decay", "projector_learning_rate"):
            if getattr(recipe, key) < 0:
                raise UserError(f"{name}.{key} is {getattr(recipe, key)}; expected 0 or more")
        if recipe.rank < 1 or recipe.alpha <= 0 or not 0 <= recipe.dropout < 1 or not recipe.targets:
            raise UserError(
                f"{name}.lora has rank {recipe.rank}, alpha {recipe.alpha}, dropout {recipe.dropout}, targets "
                f"{recipe.targets}; expected a rank of 1 or more, alpha above 0, dropout in [0, 1), at least one target"
            )
        if recipe.batch % recipe.micro_batch:
            raise UserError(
                f"{name}.micro_batch is {recipe.micro_batch}; expected a divisor of {name}.batch = {recipe.batch}"
            )
        return recipe

    @property
    def lora_scale(self) -> float:
        """Factor of the product of LoRA's two matrices."""
        return self.alpha / self.rank

    def length(self, records: int) -> tuple[int, int]:
        """Optimiser steps, and slots in all of them that hold a record, of a run over `records` records."""
        if self.steps:
            return self.steps, self.steps * self.batch
        slots = max(math.ceil(records * self.epochs - 1e-6), 1)
        return math.ceil(slots / self.batch), slots


@flax.struct.dataclass
class TrainState:
    """Everything that a resumed run needs, and nothing that it can compute.

    step: int32[], optimiser steps done; params: the trained tree; opt: Optax state; sampler: its state; plan: the
    rounds drawn and not over, each field with a leading axis [1 + lag]; position: records used up; draws: int32[K], of
    each arm so far; key: the run's random key; scale: the loss scale of a float16 run, else None.
    """

    step: jax.Array
    params: dict
    opt: tuple
    sampler: tuple
    plan: plan.Plan
    position: plan.Position
    draws: jax.Array
    key: jax.Array
    scale: DynamicScale | None = None


class Schedule(NamedTuple):
    """Learning rates of a run, as arrays, so that runs of other lengths share compiled steps.

    peak: of everything but the projector; projector_peak; warm: steps of linear warm-up; steps: of the run.
    """

    peak: np.float32
    projector_peak: np.float32
    warm: np.int32
    steps: np.int32

    @classmethod
    def of(cls, recipe: Recipe, steps: int) -> "Schedule":
        """The schedule of a recipe over `steps` steps; warm-up takes ceil(warmup · steps) of them."""
        warm = math.ceil(recipe.warmup * steps)
        peaks = np.float32(recipe.learning_rate), np.float32(recipe.projector_learning_rate)
        return cls(*peaks, np.int32(warm), np.int32(steps))

    def factor(self, step: jax.Array) -> jax.Array:
        """Share of the peak rate at a step: linear warm-up, then cosine to 0. No step has rate 0."""
        step, warm, steps = (jnp.asarray(value, jnp.float32) for value in (step, self.warm, self.steps))
        falling = 0.5 * (1.0 + jnp.cos(jnp.pi * (step - warm) / jnp.maximum(steps - warm, 1.0)))
        return jnp.where(step < warm, (step + 1.0) / jnp.maximum(warm, 1.0), jnp.clip(falling, 0.0, 1.0))

    def scale(self, updates: dict, step: jax.Array) -> dict:
        """Optimiser updates times minus the rate of their part: the projector has its own."""
        factor = self.factor(step)
        return {
            top: jax.tree.map(
                lambda u, top=top: -factor * (self.projector_peak if top == "projector" else self.peak) * u, tree
            )
            for top, tree in updates.items()
        }


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW (0.9, 0.999, 1e-8) after a clip of the global gradient norm; `Schedule.scale` has the rates."""
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.scale_by_adam(0.9, 0.999, 1e-8),
        optax.add_decayed_weights(recipe.weight_decay),
    )


def divide(params: dict, cfg, recipe: Recipe, key: jax.Array, mesh) -> tuple[dict, dict]:
    """The trained and the frozen tree: everything and nothing, LoRA with the projector and the rest, or the projector
    alone (the pre-training of LLaVA's first stage) and the rest.

    The trained tree is a float32 copy: steps overwrite it, and the caller's weights stay as they are. What is frozen
    stays in the type that it was loaded in.
    """

    def copy(tree: dict) -> dict:
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), tree)

    if recipe.mode == "full":
        return copy(params), {}
    frozen = {top: tree for top, tree in params.items() if top != "projector"}
    trained = {"projector": copy(params["projector"])}
    if recipe.mode == "lora":
        trained["lora"] = layers.init(lora.abstract(cfg, recipe.rank, recipe.targets), key, mesh)
    return trained, frozen


def unite(trained: dict, frozen: dict) -> tuple[dict, dict | None]:
    """The model's whole tree and the LoRA tree (None but in mode 'lora')."""
    whole = {**frozen, **{top: tree for top, tree in trained.items() if top != "lora"}}
    return whole, trained.get("lora")


def start(
    trained: dict, recipe: Recipe, sampler, arms: int, rounds: int, round_steps: int, *, loss_scale: bool = False
) -> TrainState:
    """The state before the first step, every array of it where it will stay. `rounds` is 1 + lag; `loss_scale` says
    whether the run computes in float16."""

    @jax.jit
    def init(trained):
        shape = (rounds, round_steps, recipe.batch)
        empty = jnp.full(shape, -1, jnp.int32)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=trained,
            opt=optimizer(recipe).init(trained),
            sampler=sampler.init(arms),
            plan=plan.Plan(empty, empty + 0, jnp.zeros(shape)),
            position=plan.start(arms),
            draws=jnp.zeros(arms, jnp.int32),
            key=jax.random.key(recipe.seed),
            scale=precision.first_scale() if loss_scale else None,
        )

    return init(trained)
