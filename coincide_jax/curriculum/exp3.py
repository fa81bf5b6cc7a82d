"""Clusters as bandit arms, the drop of the training loss as reward.

`coincide_plus` is COINCIDE+'s Algorithm 1 with its faults mended: a uniform first round, no reward on a first visit,
negative rewards clipped, exhausted arms masked, one arm drawn per sample. It is probability matching on a moving
average, not Exp3. `exp3` is Exp3 itself (Auer et al. 2002) with weights in log space, a total exploration mass `gamma`
shared by all arms, and the unbiased estimate from a batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from coincide_jax.kernels import bandits
from coincide_jax.kernels.bandits import Sampler


class PlusState(NamedTuple):
    """reward: f32[K], moving average R; last: f32[K], loss at the last visit; visited: bool[K]."""

    reward: jax.Array
    last: jax.Array
    visited: jax.Array


class Exp3State(NamedTuple):
    """log_weights: f32[K], the largest is 0; last: f32[K], loss at the last visit; visited: bool[K]."""

    log_weights: jax.Array
    last: jax.Array
    visited: jax.Array


def _arm_means(arms, losses, weight):
    """Mean loss of each slot's arm in this step f32[B], and which slots count bool[B]."""
    losses, counts = bandits.usable(losses, weight)
    sizes = bandits.same_arm_sum(counts.astype(jnp.float32), arms, counts)
    return bandits.same_arm_sum(losses, arms, counts) / jnp.maximum(sizes, 1.0), counts


def coincide_plus(settings) -> Sampler:
    """p = (1 − gamma) R⁺/ΣR⁺ + gamma/#alive, R ← (1 − mu) R + mu (loss before − loss now)."""
    gamma, mu = settings.gamma, settings.mu

    def init(arms: int) -> PlusState:
        return PlusState(jnp.zeros(arms), jnp.zeros(arms), jnp.zeros(arms, bool))

    def probabilities(state: PlusState, alive):
        return bandits.proportional(state.reward, alive, gamma)

    def update(state: PlusState, arms, losses, weight) -> PlusState:
        mean, counts = _arm_means(arms, losses, weight)
        here = jnp.maximum(arms, 0)
        moved = (1.0 - mu) * state.reward[here] + mu * (state.last[here] - mean)
        return PlusState(
            bandits.scatter(state.reward, arms, counts, jnp.where(state.visited[here], moved, state.reward[here])),
            bandits.scatter(state.last, arms, counts, mean),
            bandits.scatter(state.visited, arms, counts, counts),
        )

    return Sampler(init, probabilities, update)


def exp3(settings) -> Sampler:
    """p = (1 − gamma) softmax(log w) + gamma/#alive, log w_i ← log w_i + gamma x̂_i / K.

    x̂_i = (1/B) Σ over the batch's slots of arm i of reward / p_i, unbiased for the reward in [0, 1]: the relative drop
    of the arm's loss since its last visit, clipped; 0 on a first visit.
    """
    gamma = settings.gamma

    def init(arms: int) -> Exp3State:
        return Exp3State(jnp.zeros(arms), jnp.zeros(arms), jnp.zeros(arms, bool))

    def probabilities(state: Exp3State, alive):
        return bandits.exponential(state.log_weights, alive, gamma)

    def update(state: Exp3State, arms, losses, weight) -> Exp3State:
        mean, counts = _arm_means(arms, losses, weight)
        here = jnp.maximum(arms, 0)
        drop = (state.last[here] - mean) / jnp.maximum(state.last[here], 1e-6)
        reward = jnp.where(state.visited[here], jnp.clip(drop, 0.0, 1.0), 0.0)
        filled = jnp.maximum(counts.astype(jnp.float32).sum(), 1.0)
        estimate = bandits.same_arm_sum(reward * weight, arms, counts) / filled
        raised = state.log_weights[here] + gamma * estimate / state.log_weights.shape[0]
        log_weights = bandits.scatter(state.log_weights, arms, counts, raised)
        return Exp3State(
            log_weights - log_weights.max(),
            bandits.scatter(state.last, arms, counts, mean),
            bandits.scatter(state.visited, arms, counts, counts),
        )

    return Sampler(init, probabilities, update)
