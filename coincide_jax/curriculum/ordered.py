"""Easy records first, or hard ones first: arms in the order of a difficulty, each used up before the next begins.

The difficulty of a record is the reference model's mean token NLL (nats), or its EL2N score, out of
extract/scores.parquet (`curriculum.difficulty`); that of an arm is the mean over its records, and within an arm the
records come in the same order. Where no score is named it is the arm's training loss when it was first seen: arms not
seen yet come first, then the order begins. `curriculum.k=1` makes one arm, so that single records are ordered.

A run that is shorter than an epoch sees only one end of the order: compare orders on a coreset, where all is seen.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from coincide_jax.curriculum.settings import Pool, Settings
from coincide_jax.kernels import bandits
from coincide_jax.kernels.bandits import Sampler


class OrderState(NamedTuple):
    """difficulty: f32[K], 0 where not known; known: bool[K]."""

    difficulty: jax.Array
    known: jax.Array


def easy_to_hard(settings: Settings, facts: Pool | None) -> Sampler:
    """p is one for the easiest arm that has records left."""
    return _ordered(settings, facts, 1.0)


def hard_to_easy(settings: Settings, facts: Pool | None) -> Sampler:
    """p is one for the hardest arm that has records left."""
    return _ordered(settings, facts, -1.0)


def _ordered(settings: Settings, facts: Pool | None, sign: float) -> Sampler:
    def init(arms: int) -> OrderState:
        if not settings.difficulty:
            return OrderState(jnp.zeros(arms), jnp.zeros(arms, bool))
        if facts is None or facts.difficulty is None or len(facts.difficulty) != arms:
            raise ValueError(
                f"curriculum.difficulty is '{settings.difficulty}', but no difficulty of {arms} arms was given"
            )
        return OrderState(jnp.asarray(facts.difficulty, jnp.float32), jnp.ones(arms, bool))

    def probabilities(state: OrderState, alive):
        unknown = alive & ~state.known
        first = jnp.argmin(jnp.where(alive, sign * state.difficulty, jnp.inf))  # of equals the smallest index
        alone = (jnp.arange(alive.shape[0]) == first) & alive
        return bandits.uniform(jnp.where(unknown.any(), unknown, alone))

    def update(state: OrderState, arms, losses, weight) -> OrderState:
        losses, counts = bandits.usable(losses, weight)
        here = jnp.maximum(arms, 0)
        mean = bandits.same_arm_mean(losses, arms, counts)
        first = jnp.where(state.known[here], state.difficulty[here], mean)
        return OrderState(
            bandits.scatter(state.difficulty, arms, counts, first), bandits.scatter(state.known, arms, counts, counts)
        )

    return Sampler(init, probabilities, update, shuffle=not settings.difficulty)
