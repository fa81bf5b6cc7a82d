"""From the training losses of a step to rewards: the drop of an arm's loss since its last visit.

A loss comes free with the step: it is the training loss itself, before the step's update of the weights. What is
measured is noisy, since two visits see two records; moving averages and importance weights are the samplers' business.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from coincide_jax.kernels import bandits

WINDOW = 1024  # rewards that the percentiles are taken from
LOW, HIGH = 0.05, 0.95


class Seen(NamedTuple):
    """last: f32[K], loss at the last visit; visited: bool[K]; recent: the last rewards, () where none is rescaled."""

    last: jax.Array
    visited: jax.Array
    recent: "Recent | tuple"


class Recent(NamedTuple):
    """rewards: f32[W], a ring; count: int32[], rewards ever seen."""

    rewards: jax.Array
    count: jax.Array


class Step(NamedTuple):
    """One step, slot by slot. reward: f32[B], 0 on a first visit; again: bool[B], whether the arm had been visited;
    mean: f32[B], loss of the slot's arm; counts: bool[B], whether the slot holds a record with a finite loss."""

    reward: jax.Array
    again: jax.Array
    mean: jax.Array
    counts: jax.Array


def start(arms: int, rescale: bool) -> Seen:
    """Nothing seen yet."""
    recent = Recent(jnp.zeros(WINDOW), jnp.zeros((), jnp.int32)) if rescale else ()
    return Seen(jnp.zeros(arms), jnp.zeros(arms, bool), recent)


def measure(seen: Seen, arms: jax.Array, losses: jax.Array, weight: jax.Array, relative: bool) -> tuple[Step, Seen]:
    """The rewards of a step, and what is remembered of it.

    Args:
      arms, losses, weight: int32[B], f32[B], f32[B], as `bandits.Sampler.update` gets them.
      relative: the drop as a share of the loss before; else in nats.

    With rescaling (`seen.recent`) a reward is the drop by half the range from the 5th to the 95th percentile of the
    last 1,024 drops, held to [−1, 1]: 0 stays "no change" (Graves et al. 2017, around zero).
    """
    losses, counts = bandits.usable(losses, weight)
    mean = bandits.same_arm_mean(losses, arms, counts)
    here = jnp.maximum(arms, 0)
    last, again = seen.last[here], seen.visited[here] & counts
    drop = last - mean
    if relative:
        drop = drop / jnp.maximum(last, 1e-6)
    recent = seen.recent
    if recent:
        recent = _remember(recent, drop, again)
        drop = jnp.clip(2.0 * drop / _range(recent), -1.0, 1.0)
    reward = jnp.where(again, drop, 0.0)
    after = Seen(
        bandits.scatter(seen.last, arms, counts, mean), bandits.scatter(seen.visited, arms, counts, counts), recent
    )
    return Step(reward, again, mean, counts), after


def unit(step: Step, rescaled: bool) -> jax.Array:
    """Rewards in [0, 1], f32[B]: the drop clipped, or, rescaled, (1 + r)/2 so that 0.5 is "no change"."""
    return 0.5 + 0.5 * step.reward if rescaled else jnp.clip(step.reward, 0.0, 1.0)


def _remember(recent: Recent, values: jax.Array, counts: jax.Array) -> Recent:
    """Puts the counting values into the ring, one after another; of more than W the last W stay."""
    place = jnp.cumsum(counts.astype(jnp.int32)) - 1
    number = counts.astype(jnp.int32).sum()
    kept = counts & (place >= number - WINDOW)
    rewards = recent.rewards.at[jnp.where(kept, (recent.count + place) % WINDOW, WINDOW)].set(values, mode="drop")
    return Recent(rewards, recent.count + number)


def _range(recent: Recent) -> jax.Array:
    """From the 5th to the 95th percentile (nearest rank below), at least 1e-6."""
    number = jnp.minimum(recent.count, WINDOW)
    ordered = jnp.sort(jnp.where(jnp.arange(WINDOW) < number, recent.rewards, jnp.inf))
    at = jnp.floor(jnp.asarray([LOW, HIGH]) * jnp.maximum(number - 1, 0).astype(jnp.float32)).astype(jnp.int32)
    low, high = ordered[at]
    return jnp.where(number > 0, jnp.maximum(high - low, 1e-6), 1.0)


class Period(NamedTuple):
    """Losses of the steps since the last round began. total, count: f32[K]; steps: int32[]."""

    total: jax.Array
    count: jax.Array
    steps: jax.Array


def begin(arms: int) -> Period:
    """An empty period."""
    return Period(jnp.zeros(arms), jnp.zeros(arms), jnp.zeros((), jnp.int32))


def gather(period: Period, arms, losses, weight, steps: int) -> tuple[Period, jax.Array, jax.Array]:
    """Adds a step's losses; after `steps` steps the period is over and an empty one follows.

    Returns:
      The period, whether one is over bool[], and then the mean training loss of each arm f32[K], NaN if not visited.
    """
    losses, counts = bandits.usable(losses, weight)
    here = jnp.maximum(arms, 0)
    more = bandits.same_arm_sum(losses, arms, counts), bandits.same_arm_sum(counts.astype(jnp.float32), arms, counts)
    total = bandits.scatter(period.total, arms, counts, period.total[here] + more[0])
    count = bandits.scatter(period.count, arms, counts, period.count[here] + more[1])
    over = period.steps + 1 >= steps
    means = jnp.where(count > 0, total / jnp.maximum(count, 1.0), jnp.nan)
    empty = begin(total.shape[0])
    full = Period(total, count, period.steps + 1)
    return jax.tree.map(lambda new, old: jnp.where(over, new, old), empty, full), over, means


def by_rounds(probe, settings):
    """`update` of a sampler that goes by one measurement a round: a probe's, or, with `settings.probe` = 0, the mean
    training losses of the round, handed to `probe(state, values f32[K]) -> state`. The state has a field `period`."""

    def update(state, arms, losses, weight):
        if settings.probe:
            return state
        period, over, means = gather(state.period, arms, losses, weight, settings.round_steps)
        state = state._replace(period=period)
        return jax.tree.map(lambda new, old: jnp.where(over, new, old), probe(state, means), state)

    return update
