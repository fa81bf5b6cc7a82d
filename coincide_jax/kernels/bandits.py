"""Arithmetic of arms: probabilities, drawing, rewards. Every function is pure and takes arrays of one round or step.

Probabilities are never negative or NaN and sum to one over the arms that are alive, whatever losses were seen.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

GRAIN = 2.0**24  # probabilities are drawn as whole numbers of this unit, whose sums are exact in any order
LOSS_CEILING = 1e4  # nats per token; no finite measurement lies above it


class Sampler(NamedTuple):
    """What decides from which of K arms the next record comes; its state lives in the train state.

    init: (arms: int) → state.
    probabilities: (state, alive bool[K]) → f32[K]; zero for arms not alive, sums to one over the others.
    update: (state, arms int32[B], losses f32[B], weight f32[B]) → state, once a step. `losses` are mean token NLLs
      taken before the step's update of the weights; `weight` is one over the probability with which the slot's arm
      was drawn, 0 for an empty slot, below 0 for a replay (a record of the arm that was trained on before).
    per_step: one arm is drawn for all slots of a step, not one for each; when it runs out the next one is drawn.
    shuffle: the records of an arm come in an order permuted anew each epoch; else in the order of `plan.members`.
    replay: (state, seen bool[K]) → f32[K], with which probability a slot replays a record of each arm; sums to less
      than one, zero for arms that have shown nothing yet. None: nothing is ever replayed.
    due: (state) → f32[K]; arms above 0 are visited in the next round whatever their probability, the largest first.
    probe: (state, values f32[P]) → state; takes in what was measured between rounds, NaN where nothing was. None:
      the sampler asks for no measurement.
    """

    init: Callable
    probabilities: Callable
    update: Callable
    per_step: bool = False
    shuffle: bool = True
    replay: Callable | None = None
    due: Callable | None = None
    probe: Callable | None = None


def ways(sampler: Sampler, state) -> dict:
    """What `plan.draw_plan` is told besides the probabilities, as its keyword arguments."""
    return {
        "per_step": sampler.per_step,
        "shuffle": sampler.shuffle,
        "replay": sampler.replay and functools.partial(sampler.replay, state),
        "due": sampler.due and sampler.due(state),
    }


def uniform(alive: jax.Array) -> jax.Array:
    """Equal probability of every arm that has records left, f32[K]; all zero when none has."""
    mass = alive.astype(jnp.float32)
    return mass / jnp.maximum(mass.sum(), 1.0)


def proportional(rewards: jax.Array, alive: jax.Array, gamma: float) -> jax.Array:
    """(1 − gamma) R⁺/ΣR⁺ + gamma/#alive over the arms alive; uniform when no arm has a positive reward.

    Args:
      rewards: f32[K], moving averages; negative ones count as zero.
      alive: bool[K].
      gamma: total exploration mass, shared by the arms alive.
    """
    mass = jnp.where(alive, jnp.maximum(rewards, 0.0), 0.0)
    total = mass.sum()
    explore = uniform(alive)
    exploit = mass / jnp.where(total > 1e-12, total, 1.0)
    return jnp.where(total > 1e-12, (1.0 - gamma) * exploit + gamma * explore, explore)


def exponential(log_weights: jax.Array, alive: jax.Array, gamma: float) -> jax.Array:
    """(1 − gamma) softmax(log w) + gamma/#alive over the arms alive, f32[K] (Exp3, Auer et al. 2002)."""
    top = jnp.max(jnp.where(alive, log_weights, -jnp.inf))
    below = jnp.exp(jnp.minimum(log_weights - jnp.where(jnp.isfinite(top), top, 0.0), 0.0))
    # the top is 1 by comparison: a compiler that fuses the caller's product into the difference need not give 0 there
    mass = jnp.where(alive, jnp.where(log_weights >= top, 1.0, below), 0.0)
    return (1.0 - gamma) * mass / jnp.maximum(mass.sum(), 1e-30) + gamma * uniform(alive)


def tsallis(losses: jax.Array, alive: jax.Array, eta: jax.Array) -> jax.Array:
    """p_i = 4 / (eta (L_i − x))² over the arms alive, with the x below all L_i at which p sums to one, f32[K].

    Tsallis-INF (Zimmert and Seldin 2021, α = 1/2). With z = eta (L − min L) / 2 ≥ 0 it is the y in [1, √K] at which
    Σ (z + y)⁻² = 1; Newton's steps from y = 1 rise to it: y grows by half in each while it is far away, so 40 steps
    are enough for 10⁶ arms.

    Args:
      losses: f32[K], sums of estimated losses.
      eta: f32[], learning rate.
    """
    least = jnp.min(jnp.where(alive, losses, jnp.inf))
    z = jnp.where(alive, 0.5 * eta * (losses - jnp.where(jnp.isfinite(least), least, 0.0)), jnp.inf)

    def newton(_, y):
        inverse = 1.0 / (z + y)
        return y + 0.5 * ((inverse**2).sum() - 1.0) / jnp.maximum((inverse**3).sum(), 1e-30)

    mass = jnp.where(alive, (z + jax.lax.fori_loop(0, 40, newton, jnp.float32(1.0))) ** -2, 0.0)
    return mass / jnp.maximum(mass.sum(), 1e-30)


def edges(probabilities: jax.Array) -> jax.Array:
    """Running sums int32[K] of the probabilities in whole units of 2⁻²⁴, at least one unit for each above zero.

    The sums are exact, so an arm of probability zero is never drawn and every device draws the same arm.
    """
    units = jnp.where(probabilities > 0, jnp.maximum(jnp.round(probabilities * GRAIN), 1.0), 0.0).astype(jnp.int32)
    return jnp.cumsum(units, dtype=jnp.int32)


def pick(edges: jax.Array, u: jax.Array) -> jax.Array:
    """The arm int32[] at the share u (f32[], in [0, 1)) of the running sums of `edges`."""
    point = jnp.minimum((u * edges[-1].astype(jnp.float32)).astype(jnp.int32), edges[-1] - 1)
    return jnp.searchsorted(edges, point, side="right").astype(jnp.int32)


def draw(probabilities: jax.Array, u: jax.Array) -> jax.Array:
    """Draws one arm by the inverse distribution function, int32[].

    Args:
      probabilities: f32[K], at least one positive.
      u: f32[], uniform in [0, 1).
    """
    return pick(edges(probabilities), u)


def usable(losses: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Losses held to [0, 1e4] and whether each slot counts (not empty, finite loss): f32[B], bool[B]."""
    counts = (weight > 0) & jnp.isfinite(losses)
    return jnp.clip(jnp.where(counts, losses, 0.0), 0.0, LOSS_CEILING), counts


def same_arm_sum(values: jax.Array, arms: jax.Array, counts: jax.Array) -> jax.Array:
    """For each slot, the sum of `values` over the counting slots of its arm, f32[B].

    A B×B comparison instead of a scatter-add: slots of one arm get the same bits, in the same order on any device.
    """
    same = (arms[:, None] == arms[None, :]) & counts[None, :]
    return jnp.sum(jnp.where(same, values[None, :], 0.0), axis=1)


def estimate(values: jax.Array, arms: jax.Array, weight: jax.Array, counts: jax.Array) -> jax.Array:
    """(1/B) Σ value / p over the slots of each slot's arm, f32[B]: unbiased for the arm's value, B counting slots."""
    filled = jnp.maximum(counts.astype(jnp.float32).sum(), 1.0)
    return same_arm_sum(values * weight, arms, counts) / filled


def same_arm_mean(values: jax.Array, arms: jax.Array, counts: jax.Array) -> jax.Array:
    """Mean of `values` over the counting slots of each slot's arm, f32[B]."""
    sizes = same_arm_sum(counts.astype(jnp.float32), arms, counts)
    return same_arm_sum(values, arms, counts) / jnp.maximum(sizes, 1.0)


def scatter(table: jax.Array, arms: jax.Array, counts: jax.Array, values: jax.Array) -> jax.Array:
    """`table[K]` with the entries of the counting slots' arms replaced; slots of one arm must hold equal values."""
    return table.at[jnp.where(counts, arms, table.shape[0])].set(values, mode="drop")


UNIFORM = Sampler(  # learns nothing; over one arm every record is equally likely
    init=lambda arms: (),
    probabilities=lambda state, alive: uniform(alive),
    update=lambda state, arms, losses, weight: state,
)
