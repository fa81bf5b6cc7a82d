"""Arithmetic of arms: probabilities, drawing, rewards. Every function is pure and takes arrays of one round or step.

Probabilities are never negative or NaN and sum to one over the arms that are alive, whatever losses were seen.
"""

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
      was drawn, 0 for an empty slot.
    """

    init: Callable
    probabilities: Callable
    update: Callable


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
    mass = jnp.where(alive, jnp.exp(log_weights - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
    return (1.0 - gamma) * mass / jnp.maximum(mass.sum(), 1e-30) + gamma * uniform(alive)


def draw(probabilities: jax.Array, u: jax.Array) -> jax.Array:
    """Draws one arm by the inverse distribution function, int32[].

    Probabilities are rounded to whole units of 2⁻²⁴ (at least one unit each) first: their running sums are exact, so
    an arm of probability zero is never drawn and every device draws the same arm.

    Args:
      probabilities: f32[K], at least one positive.
      u: f32[], uniform in [0, 1).
    """
    units = jnp.where(probabilities > 0, jnp.maximum(jnp.round(probabilities * GRAIN), 1.0), 0.0).astype(jnp.int32)
    edges = jnp.cumsum(units, dtype=jnp.int32)
    point = jnp.minimum((u * edges[-1].astype(jnp.float32)).astype(jnp.int32), edges[-1] - 1)
    return jnp.searchsorted(edges, point, side="right").astype(jnp.int32)


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


def scatter(table: jax.Array, arms: jax.Array, counts: jax.Array, values: jax.Array) -> jax.Array:
    """`table[K]` with the entries of the counting slots' arms replaced; slots of one arm must hold equal values."""
    return table.at[jnp.where(counts, arms, table.shape[0])].set(values, mode="drop")


UNIFORM = Sampler(  # learns nothing; over one arm every record is equally likely
    init=lambda arms: (),
    probabilities=lambda state, alive: uniform(alive),
    update=lambda state, arms, losses, weight: state,
)
