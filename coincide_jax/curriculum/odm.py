"""Online data mixing (Albalak et al. 2023): go where the training loss is high."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from coincide_jax.curriculum.settings import Pool, Settings
from coincide_jax.kernels import bandits
from coincide_jax.kernels.bandits import Sampler


class MixState(NamedTuple):
    """reward: f32[K], moving average of loss/p; time: int32[], updates."""

    reward: jax.Array
    time: jax.Array


def odm(settings: Settings, facts: Pool | None) -> Sampler:
    """p = (1 − m_t) softmax(m_{t−1} R̂/K) + m_t/#alive, R̂_i ← (1 − mu) R̂_i + mu L_i/p_i of the arms in the batch,
    L_i/p_i being the mean over the arm's slots.

    m_t = min(gamma, √(K ln K / t)) is the exploration mass of all arms. With gamma = 1 that is the published K ε_t,
    which is 1, hence uniform, until t > K ln K: with a thousand arms for the whole run.
    """
    del facts

    def mass(arms: int, time: jax.Array) -> jax.Array:
        return jnp.minimum(settings.gamma, jnp.sqrt(arms * jnp.log(jnp.float32(arms)) / time.astype(jnp.float32)))

    def init(arms: int) -> MixState:
        return MixState(jnp.zeros(arms), jnp.zeros((), jnp.int32))

    def probabilities(state: MixState, alive):
        k = state.reward.shape[0]
        before = mass(k, jnp.maximum(state.time, 1))
        return bandits.exponential(before * state.reward / k, alive, mass(k, state.time + 1))

    def update(state: MixState, arms, losses, weight) -> MixState:
        losses, counts = bandits.usable(losses, weight)
        estimate = bandits.same_arm_mean(losses * weight, arms, counts)
        moved = (1.0 - settings.mu) * state.reward[jnp.maximum(arms, 0)] + settings.mu * estimate
        return MixState(bandits.scatter(state.reward, arms, counts, moved), state.time + counts.any().astype(jnp.int32))

    return Sampler(init, probabilities, update)
