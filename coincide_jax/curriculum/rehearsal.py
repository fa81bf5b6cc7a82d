"""Rehearsal around any online sampler: what was learned and is being forgotten is trained on again.

COINCIDE+ cannot see forgetting, because the loss of an arm that is no longer drawn is never measured. Here a share
`rehearsal` of the slots (rho) replays records of an arm's memory: those of it that were trained on before. Their losses
are the probe, free of cost; with `curriculum.probe` the loop's measurement is. An arm's forgetting is its probe loss
above the best it ever had. The coverage promise is apart from that: no arm waits longer than window/visits steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from coincide_jax.curriculum.settings import Settings
from coincide_jax.kernels import bandits
from coincide_jax.kernels.bandits import Sampler


class Rehearsal(NamedTuple):
    """inner: state of the sampler; now, best: f32[K], probe loss and the lowest it was; known: bool[K], whether there
    is one; age: int32[K], steps since the last visit, replays included."""

    inner: tuple
    now: jax.Array
    best: jax.Array
    known: jax.Array
    age: jax.Array


def forgetting(state: Rehearsal) -> jax.Array:
    """Nats f32[K] by which the probe loss of each arm is above its best; 0 for arms without a probe."""
    return jnp.where(state.known, jnp.maximum(state.now - state.best, 0.0), 0.0)


def rehearsal(sampler: Sampler, settings: Settings) -> Sampler:
    """The sampler with a memory. Its own probabilities, rewards and state stay as they are: it does not see replays.

    A replay is of arm i with probability rehearsal · ((1 − gamma) F_i/ΣF + gamma/#seen), F the forgetting; as long as
    nothing is forgotten all arms with a memory are equally likely, which measures them. Probe losses from replays are
    noisy and averaged at rate mu. An arm with `age` so high that it would break the promise before the round after
    next is over is visited in the next one, by a replay if it has no fresh records left.
    """
    share, mu = settings.rehearsal, settings.mu
    spacing = settings.window // settings.visits if settings.visits else 0
    ahead = (settings.lag + 2) * settings.round_steps

    def init(arms: int) -> Rehearsal:
        nothing = jnp.zeros(arms)
        return Rehearsal(sampler.init(arms), nothing, nothing, jnp.zeros(arms, bool), jnp.zeros(arms, jnp.int32))

    def probabilities(state: Rehearsal, alive):
        return sampler.probabilities(state.inner, alive)

    def update(state: Rehearsal, arms, losses, weight) -> Rehearsal:
        held, visited = bandits.usable(losses, jnp.abs(weight))
        age = bandits.scatter(state.age + 1, arms, visited, jnp.zeros_like(arms))
        state = state._replace(inner=sampler.update(state.inner, arms, losses, weight), age=age)
        if settings.probe:
            return state
        here, replays = jnp.maximum(arms, 0), visited & (weight < 0)
        mean = bandits.same_arm_mean(held, arms, replays)
        now = jnp.where(state.known[here], (1.0 - mu) * state.now[here] + mu * mean, mean)
        best = jnp.where(state.known[here], jnp.minimum(state.best[here], now), now)
        return state._replace(
            now=bandits.scatter(state.now, arms, replays, now),
            best=bandits.scatter(state.best, arms, replays, best),
            known=bandits.scatter(state.known, arms, replays, replays),
        )

    def replay(state: Rehearsal, seen):
        return share * bandits.proportional(forgetting(state), seen, settings.gamma)

    def due(state: Rehearsal):
        return jnp.where(state.age + ahead > spacing, state.age + 1, 0).astype(jnp.float32)

    def probe(state: Rehearsal, values) -> Rehearsal:
        measured = jnp.isfinite(values)
        loss = 1.0 - values if settings.objective == "accuracy" else values
        held = jnp.clip(jnp.where(measured, loss, 0.0), 0.0, bandits.LOSS_CEILING)
        best = jnp.where(state.known, jnp.minimum(state.best, held), held)
        return state._replace(
            inner=sampler.probe(state.inner, values) if sampler.probe else state.inner,
            now=jnp.where(measured, held, state.now),
            best=jnp.where(measured, best, state.best),
            known=state.known | measured,
        )

    return sampler._replace(
        init=init,
        probabilities=probabilities,
        update=update,
        replay=replay if share else None,
        due=due if spacing else None,
        probe=probe if settings.probe and (share or sampler.probe) else None,
    )
