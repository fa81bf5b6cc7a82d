"""PROGRESS (CVPR 2026): learn next what is being learned fastest, by the relative progress of each cluster."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from coincide_jax.curriculum import offline, rewards
from coincide_jax.curriculum.settings import Pool, Settings
from coincide_jax.kernels import bandits
from coincide_jax.kernels.bandits import Sampler


class ProgressState(NamedTuple):
    """now: f32[K], the last measurement J; times: int32[K], how often an arm was measured; progress: f32[K], Δ;
    sizes: f32[K], records; drawn: int32[K], slots that took one until now; period: training losses since the last
    measurement."""

    now: jax.Array
    times: jax.Array
    progress: jax.Array
    sizes: jax.Array
    drawn: jax.Array
    period: rewards.Period


def progress(settings: Settings, facts: Pool | None) -> Sampler:
    """p = (1 − delta) softmax(Δ/tau) + delta · left/Σ left, Δ = (J now − J before)/J before, held to [−1, 1]; `left`
    are an arm's records that no update has seen in this epoch.

    J is a loss (Δ then has the other sign: above 0 is progress) or an accuracy, `objective`. It is measured by the
    loop on `probe` records an arm, or, with probe = 0, it is the mean training loss of the arm in a round, which costs
    nothing. An arm that was not measured now has Δ = 0; an accuracy of zero before counts as one right answer. Before
    any arm has been measured twice the records are equally likely. With `positive_only` (the authors' program) the
    softmax is over arms with Δ > 0, and exploration over the others.
    """
    gains = settings.objective == "accuracy"
    floor = 1.0 / settings.probe if gains else 1e-6

    def init(arms: int) -> ProgressState:
        nothing = jnp.zeros(arms)
        return ProgressState(
            nothing,
            jnp.zeros(arms, jnp.int32),
            nothing,
            offline.sizes(facts, arms),
            jnp.zeros(arms, jnp.int32),
            rewards.begin(arms),
        )

    def probabilities(state: ProgressState, alive):
        chosen = alive & (state.times >= 2).any()
        if settings.positive_only:
            chosen &= state.progress > 0
        outside = alive & ~chosen if settings.positive_only else alive
        left = state.sizes - (state.drawn % state.sizes.astype(jnp.int32)).astype(jnp.float32)
        rest = jnp.where(jnp.where(outside.any(), outside, alive), left, 0.0)
        explore = rest / jnp.maximum(rest.sum(), 1e-30)
        exploit = bandits.exponential(state.progress / settings.tau, chosen, 0.0)
        return jnp.where(chosen.any(), (1.0 - settings.delta) * exploit + settings.delta * explore, explore)

    def probe(state: ProgressState, values) -> ProgressState:
        measured = jnp.isfinite(values)
        values = jnp.where(measured, jnp.clip(values, 0.0, bandits.LOSS_CEILING), state.now)
        change = (values - state.now) / jnp.where(state.now > 1e-6, state.now, floor)
        change = jnp.clip(change if gains else -change, -1.0, 1.0)
        return state._replace(
            now=values,
            times=state.times + measured.astype(jnp.int32),
            progress=jnp.where(measured & (state.times > 0), change, 0.0),
        )

    by_rounds = rewards.by_rounds(probe, settings)

    def update(state: ProgressState, arms, losses, weight) -> ProgressState:
        fresh = jnp.where((arms >= 0) & (weight > 0), arms, state.drawn.shape[0])
        return by_rounds(state, arms, losses, weight)._replace(drawn=state.drawn.at[fresh].add(1, mode="drop"))

    return Sampler(init, probabilities, update, probe=probe if settings.probe else None)
