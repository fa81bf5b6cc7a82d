"""The three compiled functions of a run: one micro-batch, one optimiser step, one round drawn.

In float16 (`state.scale` is not None) the objective is multiplied by the state's loss scale before it is
differentiated; `apply` divides by it before the clip, and leaves parameters and optimiser as they are when the gradient
is not finite. Such a step counts all the same: its records are used up, the rate goes on, and the sampler learns its
losses, which the forward pass measured.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from coincide_jax.core import precision
from coincide_jax.kernels import bandits, plan
from coincide_jax.models import vlm
from coincide_jax.training.state import Recipe, Schedule, TrainState, optimizer, unite

KINDS = ("nll", "exact", "accuracy")
SHORT = 16  # tokens of a short answer, with the one that ends it; hardly any longer one is ever said word by word


class Accumulator(NamedTuple):
    """Sums over the micro-batches of a step, float32.

    grads: of the summed objective, times the loss scale if there is one; objective: f32[]; weight: f32[], what both are
    divided by in the end; tokens: f32[], supervised; losses: f32[B], mean token NLL of each plan slot, NaN where no
    record was seen.
    """

    grads: dict
    objective: jax.Array
    weight: jax.Array
    tokens: jax.Array
    losses: jax.Array


class Steps(NamedTuple):
    """micro(params, frozen, accumulator, batch, key, step, number, scale f32[] or None) → accumulator;
    judge(params, frozen, batch, kind) → (f32[b], bool[b]): for each row one of `KINDS`, and whether it has supervised
      tokens: 'nll', the mean of theirs; 'exact', 1 where each of them is the likeliest (what greedy decoding would then
      say); 'accuracy', the same for answers of up to `SHORT` tokens, and for longer ones 1 where half of them are;
    apply(state, accumulator, schedule) → (state, empty accumulator, metrics);
    draw(state, members, number, slots, limit) → (state, p f32[K]), with `slots` of the run's plan holding a record,
      within a `plan.Limit` or None;
    learn(sampler's state, values f32[K]) → sampler's state, after a probe; None if the sampler has no probe.
    """

    micro: Callable
    judge: Callable
    apply: Callable
    draw: Callable
    learn: Callable | None


def empty(params: dict, batch: int) -> Accumulator:
    """Nothing summed yet."""
    nothing = jnp.zeros(())
    return Accumulator(jax.tree.map(jnp.zeros_like, params), nothing, nothing, nothing, jnp.full(batch, jnp.nan))


def record_nll(params: dict, batch: dict, cfg, **options) -> tuple[jax.Array, jax.Array]:
    """Summed NLL (nats) of the supervised tokens of each record f32[b], and their number f32[b]; empty ones have 0."""
    hidden = vlm.forward(params, batch, cfg, **options).hidden
    nll = vlm.token_nll(params, batch, cfg, hidden)
    if "record" not in batch:
        # Nothing predicts the first token.
        return nll.sum(-1), batch["labels"][:, 1:].astype(jnp.float32).sum(-1)
    records = jnp.arange(batch["valid"].shape[0])[:, None, None]
    own = records == batch["record"][None]
    return tuple(jnp.where(own, part[None], 0.0).sum((1, 2)) for part in (nll, batch["labels"].astype(jnp.float32)))


def graded(asked: jax.Array, right: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """Whether answers are right, f32[b] by 'exact' or 'accuracy' of `KINDS`, and their lengths in tokens f32[b].

    Args:
      asked, right: bool[b, T], the supervised tokens, and the tokens that would be said.
    """
    tokens, found = (part.astype(jnp.float32).sum(-1) for part in (asked, asked & right))
    wanted = jnp.where((kind == "exact") | (tokens <= SHORT), tokens, 0.5 * tokens)
    return (found >= wanted).astype(jnp.float32), tokens


def compile_steps(cfg, recipe: Recipe, sampler) -> Steps:
    """The functions of one run, each traced once a shape; runs that differ in length, rates or seed share them."""
    alike = dataclasses.replace(
        recipe, seed=0, epochs=1.0, steps=0, learning_rate=1.0, projector_learning_rate=1.0, warmup=0.0,
        checkpoint_every=1, keep=1, packing=False, tensorboard=False,
    )  # fmt: skip
    return Steps(*_of_model(cfg, alike), *_of_sampler(alike, sampler))


@functools.lru_cache(maxsize=8)
def _of_model(cfg, recipe: Recipe) -> tuple:
    """micro and judge, which know nothing of the sampler."""

    @functools.partial(jax.jit, donate_argnums=2)
    def micro(params, frozen, accumulator: Accumulator, batch, key, step, number, scale=None) -> Accumulator:
        def objective(params):
            whole, adapters = unite(params, frozen)
            options = {"remat": recipe.remat}
            if adapters is not None:
                options["lora"] = (adapters, recipe.lora_scale, recipe.dropout)
                if recipe.dropout:
                    options["dropout_key"] = jax.random.fold_in(jax.random.fold_in(key, step), number)
            nll, tokens = record_nll(whole, batch, cfg, **options)
            if recipe.loss_mean == "records":
                return (nll / jnp.maximum(tokens, 1.0)).sum(), (nll, tokens, (tokens > 0).astype(jnp.float32).sum())
            total = tokens.sum()
            if recipe.loss_mean == "micro_batch":
                return nll.sum() / jnp.maximum(total, 1.0), (nll, tokens, (total > 0).astype(jnp.float32))
            return nll.sum(), (nll, tokens, total)

        def summed(params):
            total, seen = objective(params)
            return (total if scale is None else total * scale), seen

        (total, (nll, tokens, weight)), grads = jax.value_and_grad(summed, has_aux=True)(params)
        total = total if scale is None else total / scale
        # beyond the end, hence dropped: padding, and records cut before their answer, whose loss of 0 says nothing
        slot = jnp.where(batch["valid"] & (tokens > 0), batch["slot"], recipe.batch)
        mean, slot = jax.reshard((nll / jnp.maximum(tokens, 1.0), slot), jax.P(None))
        return Accumulator(
            jax.tree.map(jnp.add, accumulator.grads, grads),
            accumulator.objective + total,
            accumulator.weight + weight,
            accumulator.tokens + tokens.sum(),
            accumulator.losses.at[slot].set(mean, mode="drop"),
        )

    @functools.partial(jax.jit, static_argnums=3)
    def judge(params, frozen, batch, kind: str):
        whole, adapters = unite(params, frozen)
        options = {} if adapters is None else {"lora": (adapters, recipe.lora_scale, 0.0)}
        if kind == "nll":
            nll, tokens = record_nll(whole, batch, cfg, **options)
            value = nll / jnp.maximum(tokens, 1.0)
        else:
            scores = vlm.logits(whole, vlm.forward(whole, batch, cfg, **options).hidden, cfg)
            asked = batch["labels"][:, 1:]
            right = jnp.argmax(scores[:, :-1], axis=-1).astype(jnp.int32) == batch["tokens"][:, 1:]
            value, tokens = graded(asked, right, kind)
        return jax.reshard((value, tokens > 0), jax.P(None))

    return micro, judge


@functools.lru_cache(maxsize=32)
def _of_sampler(recipe: Recipe, sampler) -> tuple:
    """apply, draw and learn, which know nothing of the model."""
    transform = optimizer(recipe)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def apply(state: TrainState, accumulator: Accumulator, schedule: Schedule):
        weight = jnp.maximum(accumulator.weight, 1.0)
        divisor = weight if state.scale is None else weight * state.scale.scale
        grads = jax.tree.map(lambda grad: grad / divisor, accumulator.grads)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises a float to an integer power
            updates, opt = transform.update(grads, state.opt, state.params)
        updates = schedule.scale(updates, state.step)
        row = state.step % state.plan.arms.shape[1]
        seen = jnp.isfinite(accumulator.losses)
        drawn = jnp.where(seen, state.plan.weight[0, row], 0.0)
        metrics = {
            "loss": accumulator.objective / weight,
            "learning_rate": schedule.peak * schedule.factor(state.step),
            "projector_learning_rate": schedule.projector_peak * schedule.factor(state.step),
            "gradient_norm": optax.tree.norm(grads),
            "tokens": accumulator.tokens.astype(jnp.int32),
            "records": seen.astype(jnp.int32).sum(),
            "losses": accumulator.losses,
        }
        params, scale = optax.apply_updates(state.params, updates), None
        if state.scale is not None:
            finite = jnp.isfinite(metrics["gradient_norm"])
            metrics |= {"skipped": (~finite).astype(jnp.int32), "loss_scale": state.scale.scale}
            kept = functools.partial(jnp.where, finite)
            params, opt = jax.tree.map(kept, params, state.params), jax.tree.map(kept, opt, state.opt)
            scale = precision.next_scale(state.scale, finite)
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt=opt,
            scale=scale,
            sampler=sampler.update(state.sampler, state.plan.arms[0, row], accumulator.losses, drawn),
        )
        return state, empty(state.params, recipe.batch), metrics

    @functools.partial(jax.jit, donate_argnums=0)
    def draw(state: TrainState, members: plan.Members, number, slots, limit=None):
        """Draws round `number` and lets the oldest one go."""
        _, round_steps, batch = state.plan.records.shape
        drawn, position = plan.draw_plan(
            functools.partial(sampler.probabilities, state.sampler),
            state.key,
            members,
            state.position,
            number * (round_steps * batch),
            slots,
            round_steps,
            batch,
            limit=limit,
            **bandits.ways(sampler, state.sampler),
        )
        now = plan.bound(members, state.position, limit)
        alive = state.position.cursor < now
        p = sampler.probabilities(state.sampler, jnp.where(alive.any(), alive, now > 0))
        counted = jnp.where(drawn.arms < 0, now.shape[0], drawn.arms).reshape(-1)
        plans = jax.tree.map(lambda old, new: jnp.concatenate([old[1:], new[None]]), state.plan, drawn)
        return state.replace(plan=plans, position=position, draws=state.draws.at[counted].add(1, mode="drop")), p

    return apply, draw, jax.jit(sampler.probe) if sampler.probe else None
