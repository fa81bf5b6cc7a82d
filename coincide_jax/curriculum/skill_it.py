"""Skill-it (Chen et al. 2023): a graph says which skill helps which; train on what helps where the loss is high."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from coincide_jax.curriculum import rewards
from coincide_jax.curriculum.settings import Pool, Settings
from coincide_jax.kernels import bandits
from coincide_jax.kernels.bandits import Sampler

WINDOW = 3  # evaluations that are summed
ETA = 0.2  # of the authors' longest runs


class SkillState(NamedTuple):
    """losses: f32[WINDOW, P], the last evaluations, newest last; times: int32[]; period: training losses meanwhile."""

    losses: jax.Array
    times: jax.Array
    period: rewards.Period


def skill_it(settings: Settings, facts: Pool | None) -> Sampler:
    """p_i ∝ exp(eta Σ_j A_ij Σ_window loss_j), begun from the first weights each time; eta = 0.2 unless it is set.

    Arms are skills. A f32[K, P] is the skill graph (`Pool.graph`), the identity if none is given; before the first
    evaluation every loss counts as one. The losses come from the loop's probe of P skills, or, with probe = 0, they
    are the mean training losses of the arms in a round; a skill that was not measured keeps its last loss.
    """
    rate = settings.eta or ETA

    graph = None if facts is None or facts.graph is None else np.asarray(facts.graph, np.float32)

    def init(arms: int) -> SkillState:
        width = arms if graph is None else graph.shape[1]
        if not settings.probe and width != arms:
            raise ValueError(f"training losses are of {arms} arms, the skill graph has {width} columns; set a probe")
        return SkillState(jnp.zeros((WINDOW, width)), jnp.zeros((), jnp.int32), rewards.begin(arms))

    def probabilities(state: SkillState, alive):
        summed = jnp.where(state.times > 0, state.losses.sum(0), 1.0)
        helped = summed if graph is None else jnp.matmul(graph, summed, precision=jax.lax.Precision.HIGHEST)
        return bandits.exponential(rate * helped, alive, 0.0)

    def probe(state: SkillState, values) -> SkillState:
        values = jnp.where(jnp.isfinite(values), jnp.clip(values, 0.0, bandits.LOSS_CEILING), state.losses[-1])
        return state._replace(losses=jnp.concatenate([state.losses[1:], values[None]]), times=state.times + 1)

    update = rewards.by_rounds(probe, settings)
    return Sampler(init, probabilities, update, probe=probe if settings.probe else None)
