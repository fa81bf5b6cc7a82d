"""Exp3 and its kin: exponential weights over importance-weighted estimates, whatever the rewards do.

All take the reward of an arm from `rewards` (the relative drop of its loss, held to [0, 1]), weights in log space, the
exploration mass `gamma` shared by all arms, and for a batch of B slots the unbiased x̂_i = (1/B) Σ reward/p_i over the
slots of arm i. A first visit has no reward and changes nothing.

`exp3`, `exp3s`: Auer et al. 2002, §3 and §8. `exp3r`: Allesiardo and Féraud 2015. `exp3_ix`: Neu 2015.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from coincide_jax.curriculum import rewards
from coincide_jax.curriculum.settings import Pool, Settings
from coincide_jax.kernels import bandits
from coincide_jax.kernels.bandits import Sampler


class Exp3State(NamedTuple):
    """log_weights: f32[K], the largest is 0; seen: last losses."""

    log_weights: jax.Array
    seen: rewards.Seen


class ResetState(NamedTuple):
    """log_weights, seen: as Exp3; draws, gain: f32[K], exploration draws of this interval and the rewards of them;
    resets: int32[], drifts found."""

    log_weights: jax.Array
    seen: rewards.Seen
    draws: jax.Array
    gain: jax.Array
    resets: jax.Array


class LossState(NamedTuple):
    """losses: f32[K], sums of estimated losses, the least is 0; time: int32[], updates; seen: last losses."""

    losses: jax.Array
    time: jax.Array
    seen: rewards.Seen


def exp3(settings: Settings, facts: Pool | None) -> Sampler:
    """p = (1 − gamma) softmax(log w) + gamma/#alive, log w_i ← log w_i + eta x̂_i; eta = gamma/K unless it is set."""
    del facts

    def init(arms: int) -> Exp3State:
        return Exp3State(jnp.zeros(arms), rewards.start(arms, settings.rescale))

    def update(state: Exp3State, arms, losses, weight) -> Exp3State:
        raised, _, seen = _raise(settings, state, arms, losses, weight)
        return Exp3State(raised - raised.max(), seen)

    return Sampler(init, _mixed(settings), update)


def exp3s(settings: Settings, facts: Pool | None) -> Sampler:
    """Exp3 whose arms share: w_i ← w_i exp(eta x̂_i) + (e alpha/K) Σ_j w_j, so that a new best arm is soon found."""
    del facts
    alpha = settings.alpha

    def init(arms: int) -> Exp3State:
        return Exp3State(jnp.zeros(arms), rewards.start(arms, settings.rescale))

    def update(state: Exp3State, arms, losses, weight) -> Exp3State:
        raised, step, seen = _raise(settings, state, arms, losses, weight)
        share = jax.nn.logsumexp(state.log_weights) + jnp.log(jnp.float32(jnp.e * alpha / raised.shape[0]))
        shared = jnp.where(step.counts.any(), jnp.logaddexp(raised, share), raised)
        return Exp3State(shared - shared.max(), seen)

    return Sampler(init, _mixed(settings), update)


def exp3r(settings: Settings, facts: Pool | None) -> Sampler:
    """Exp3 that begins anew when exploration shows an arm to be better than the one it believes in, by `drift`.

    Means are of exploration draws only. Which slots those are is not looked up: a slot of arm i was one with
    probability (gamma/K)/p_i, and counts as so much of one. An interval is over when every arm has `drift_draws` of
    them (Γ = gamma H/K of the paper); arms that ran out would hold it up for ever, so it also ends at four times as
    many in all; arms with fewer are then not compared, nor believed in. (Who ran out is not told to updates: the arms
    left are explored more than they are counted, so their intervals last longer.) `drift` is the paper's 2ε, set by
    hand because the published one exceeds the range of the rewards at the horizons of training.
    """
    del facts
    least = settings.drift_draws

    def init(arms: int) -> ResetState:
        none = jnp.zeros(arms)
        return ResetState(none, rewards.start(arms, settings.rescale), none, none, jnp.zeros((), jnp.int32))

    def update(state: ResetState, arms, losses, weight) -> ResetState:
        raised, step, seen = _raise(settings, state, arms, losses, weight)
        here, k = jnp.maximum(arms, 0), raised.shape[0]
        explored = jnp.where(step.again, jnp.minimum(settings.gamma / k * weight, 1.0), 0.0)
        gained = explored * rewards.unit(step, settings.rescale)
        draws = state.draws[here] + bandits.same_arm_sum(explored, arms, step.counts)
        gain = state.gain[here] + bandits.same_arm_sum(gained, arms, step.counts)
        draws = bandits.scatter(state.draws, arms, step.counts, draws)
        gain = bandits.scatter(state.gain, arms, step.counts, gain)
        over = (draws >= least).all() | (draws.sum() >= 4.0 * least * k)
        means = gain / jnp.maximum(draws, 1e-6)
        believed = jnp.argmax(jnp.where(draws >= least, raised, -jnp.inf))
        better = (means - means[believed] >= settings.drift) & (draws >= least)
        drifted = over & better.any() & (draws[believed] >= least)
        return ResetState(
            jnp.where(drifted, 0.0, raised - raised.max()),
            seen,
            jnp.where(over, 0.0, draws),
            jnp.where(over, 0.0, gain),
            state.resets + drifted.astype(jnp.int32),
        )

    return Sampler(init, _mixed(settings), update)


def exp3_ix(settings: Settings, facts: Pool | None) -> Sampler:
    """p = softmax(−eta L̂), L̂_i ← L̂_i + (1/B) Σ loss/(p_i + eta/2) with loss = 1 − reward; no forced exploration.

    eta = √(ln K / (K t)) at step t unless it is set: the rate that needs no horizon. The right choice for K ≥ 1,000.
    """
    del facts

    def eta(arms: int, time: jax.Array) -> jax.Array:
        if settings.eta:
            return jnp.float32(settings.eta)
        return jnp.sqrt(jnp.log(jnp.float32(arms)) / (arms * time.astype(jnp.float32)))

    def init(arms: int) -> LossState:
        return LossState(jnp.zeros(arms), jnp.zeros((), jnp.int32), rewards.start(arms, settings.rescale))

    def probabilities(state: LossState, alive):
        return bandits.exponential(-eta(state.losses.shape[0], state.time + 1) * state.losses, alive, 0.0)

    def update(state: LossState, arms, losses, weight) -> LossState:
        half = 0.5 * eta(state.losses.shape[0], state.time + 1)
        return lose(settings, state, arms, losses, weight, weight / (1.0 + half * weight))

    return Sampler(init, probabilities, update)


def lose(settings: Settings, state: LossState, arms, losses, weight, factor) -> LossState:
    """Adds a step's estimated losses, (1/B) Σ (1 − reward) · factor over an arm's slots; `factor` f32[B] ≈ 1/p."""
    step, seen = rewards.measure(state.seen, arms, losses, weight, settings.reward != "absolute")
    lost = jnp.where(step.again, 1.0 - rewards.unit(step, settings.rescale), 0.0)
    more = state.losses[jnp.maximum(arms, 0)] + bandits.estimate(lost, arms, factor, step.counts)
    total = bandits.scatter(state.losses, arms, step.counts, more)
    return LossState(total - total.min(), state.time + step.counts.any().astype(jnp.int32), seen)


def _mixed(settings: Settings):
    """The probabilities of Exp3 from its log weights."""
    return lambda state, alive: bandits.exponential(state.log_weights, alive, settings.gamma)


def _raise(settings: Settings, state, arms, losses, weight) -> tuple[jax.Array, rewards.Step, rewards.Seen]:
    """Log weights f32[K] with eta x̂ added, the step's rewards, and what is remembered of them."""
    step, seen = rewards.measure(state.seen, arms, losses, weight, settings.reward != "absolute")
    reward = jnp.where(step.again, rewards.unit(step, settings.rescale), 0.0)
    eta = settings.eta or settings.gamma / state.log_weights.shape[0]
    gained = eta * bandits.estimate(reward, arms, weight, step.counts)
    raised = state.log_weights[jnp.maximum(arms, 0)] + gained
    return bandits.scatter(state.log_weights, arms, step.counts, raised), step, seen
