"""A warm-up before an online sampler: records that were chosen beforehand come first, then the sampler decides.

Every arm is there twice: arm i < K holds the warm-up records of cluster i, arm K + i the others. So a round that begins
in the warm-up and ends after it goes over at the very slot at which the warm-up is used up, and the sampler, which sees
K arms, learns the losses of both.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from coincide_jax.kernels.bandits import Sampler


class WarmupState(NamedTuple):
    """inner: the sampler's state; over: bool[], whether a record of the others has been trained on."""

    inner: tuple
    over: jax.Array


def warmup(sampler: Sampler, sizes: tuple[int, ...]) -> Sampler:
    """The sampler over 2K arms, of which the first K come first, each as likely as it has records.

    Args:
      sizes: int[K], warm-up records of each cluster.

    The records of an arm come in a given order (`plan.members`), so that a limit on fresh records can hold.
    """
    arms = len(sizes)
    mass = np.asarray(sizes, np.float32)

    def both(values, first, later):
        """Values of clusters as those of their two arms."""
        return jnp.concatenate([jnp.where(first, values, 0.0), jnp.where(later, values, 0.0)])

    def init(doubled: int) -> WarmupState:
        if doubled != 2 * arms:
            raise ValueError(f"a warm-up over {arms} clusters takes {2 * arms} arms, not {doubled}")
        return WarmupState(sampler.init(arms), jnp.zeros((), bool))

    def probabilities(state: WarmupState, alive):
        first, later = alive[:arms], alive[arms:]
        warm = jnp.where(first, mass, 0.0)
        warm = warm / jnp.maximum(warm.sum(), 1e-30)
        again = jnp.where(first & later, 0.5, 1.0) * sampler.probabilities(state.inner, first | later)
        warming = first.any() & ~state.over
        return jnp.where(warming, jnp.concatenate([warm, jnp.zeros(arms)]), both(again, first, later))

    def update(state: WarmupState, doubled, losses, weight) -> WarmupState:
        inner = sampler.update(state.inner, jnp.where(doubled >= 0, doubled % arms, doubled), losses, weight)
        return WarmupState(inner, state.over | ((doubled >= arms) & (weight > 0)).any())

    def replay(state: WarmupState, seen):
        first, later = seen[:arms], seen[arms:]
        share = jnp.where(first & later, 0.5, 1.0) * sampler.replay(state.inner, first | later)
        return both(share, first, later)

    def due(state: WarmupState):
        waiting = jnp.where(state.over, sampler.due(state.inner), 0.0)
        return jnp.concatenate([jnp.zeros(arms), waiting])

    def probe(state: WarmupState, values) -> WarmupState:
        return state._replace(inner=sampler.probe(state.inner, values))

    return sampler._replace(
        init=init,
        probabilities=probabilities,
        update=update,
        shuffle=False,
        replay=sampler.replay and replay,
        due=sampler.due and due,
        probe=sampler.probe and probe,
    )
