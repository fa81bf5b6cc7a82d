"""The three compiled functions of a run: one micro-batch, one optimiser step, one round drawn."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from coincide_jax.kernels import plan
from coincide_jax.models import vlm
from coincide_jax.training.state import Recipe, Schedule, TrainState, optimizer, unite


class Accumulator(NamedTuple):
    """Sums over the micro-batches of a step, float32.

    grads: of the summed objective; objective: f32[]; weight: f32[], what both are divided by in the end; tokens: f32[],
    supervised; losses: f32[B], mean token NLL of each plan slot, NaN where no record was seen.
    """

    grads: dict
    objective: jax.Array
    weight: jax.Array
    tokens: jax.Array
    losses: jax.Array


class Steps(NamedTuple):
    """micro(params, frozen, accumulator, batch, key, step, number) → accumulator;
    apply(state, accumulator, schedule) → (state, empty accumulator, metrics);
    draw(state, members, number, slots) → (state, p f32[K]), with `slots` of the run's plan holding a record.
    """

    micro: callable
    apply: callable
    draw: callable


def empty(params: dict, batch: int) -> Accumulator:
    """Nothing summed yet."""
    nothing = jnp.zeros(())
    return Accumulator(jax.tree.map(jnp.zeros_like, params), nothing, nothing, nothing, jnp.full(batch, jnp.nan))


def record_nll(params: dict, batch: dict, cfg, **options) -> tuple[jax.Array, jax.Array]:
    """Summed NLL (nats) of the supervised tokens of each row f32[b], and their number f32[b]; padding rows have 0."""
    hidden = vlm.forward(params, batch, cfg, **options).hidden
    nll = vlm.token_nll(params, batch, cfg, hidden)
    # Nothing predicts the first token.
    return nll.sum(-1), batch["labels"][:, 1:].astype(jnp.float32).sum(-1)


def compile_steps(cfg, recipe: Recipe, sampler) -> Steps:
    """The functions of one run, each traced once a shape; runs that differ in length, rates or seed share them."""
    alike = dataclasses.replace(
        recipe, seed=0, epochs=1.0, steps=0, learning_rate=1.0, projector_learning_rate=1.0, warmup=0.0,
        checkpoint_every=1, keep=1,
    )  # fmt: skip
    return _compiled(cfg, alike, sampler)


@functools.lru_cache(maxsize=8)
def _compiled(cfg, recipe: Recipe, sampler) -> Steps:
    transform = optimizer(recipe)

    @functools.partial(jax.jit, donate_argnums=2)
    def micro(params, frozen, accumulator: Accumulator, batch, key, step, number) -> Accumulator:
        def summed(params):
            whole, adapters = unite(params, frozen)
            options = {"remat": recipe.remat}
            if adapters is not None:
                options["lora"] = (adapters, recipe.lora_scale, recipe.dropout)
                if recipe.dropout:
                    options["dropout_key"] = jax.random.fold_in(jax.random.fold_in(key, step), number)
            nll, tokens = record_nll(whole, batch, cfg, **options)
            if recipe.loss_mean == "records":
                return (nll / jnp.maximum(tokens, 1.0)).sum(), (nll, tokens, (tokens > 0).astype(jnp.float32).sum())
            return nll.sum(), (nll, tokens, tokens.sum())

        (total, (nll, tokens, weight)), grads = jax.value_and_grad(summed, has_aux=True)(params)
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

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def apply(state: TrainState, accumulator: Accumulator, schedule: Schedule):
        weight = jnp.maximum(accumulator.weight, 1.0)
        grads = jax.tree.map(lambda grad: grad / weight, accumulator.grads)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises a float to an integer power
            updates, opt = transform.update(grads, state.opt, state.params)
        updates = schedule.scale(updates, state.step)
        row = state.step % state.plan.arms.shape[1]
        seen = jnp.isfinite(accumulator.losses)
        drawn = jnp.where(seen, state.plan.weight[0, row], 0.0)
        metrics = {
            "loss": accumulator.objective / weight,
            "learning_rate": schedule.peak * schedule.factor(state.step),
            "gradient_norm": optax.tree.norm(grads),
            "tokens": accumulator.tokens.astype(jnp.int32),
            "records": seen.astype(jnp.int32).sum(),
        }
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt=opt,
            sampler=sampler.update(state.sampler, state.plan.arms[0, row], accumulator.losses, drawn),
        )
        return state, empty(state.params, recipe.batch), metrics

    @functools.partial(jax.jit, donate_argnums=0)
    def draw(state: TrainState, members: plan.Members, number, slots):
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
        )
        sizes = members.offsets[1:] - members.offsets[:-1]
        alive = state.position.cursor < sizes
        p = sampler.probabilities(state.sampler, jnp.where(alive.any(), alive, sizes > 0))
        counted = jnp.where(drawn.arms < 0, sizes.shape[0], drawn.arms).reshape(-1)
        plans = jax.tree.map(lambda old, new: jnp.concatenate([old[1:], new[None]]), state.plan, drawn)
        return state.replace(plan=plans, position=position, draws=state.draws.at[counted].add(1, mode="drop")), p

    return Steps(micro, apply, draw)
