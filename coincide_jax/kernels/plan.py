"""Which records the next round of S steps trains on: drawn at once on the device, from the sampler state of now.

Records of an arm come without repeats, in an order permuted anew each epoch (or in a given one); an arm that runs out
in mid-round is masked from then on; when all arms have run out the next epoch begins. A sampler with a memory also
replays records that were taken before, which uses up nothing. A `Limit` ends the first epoch when so many records have
been taken, every later one is over those, and lets a part of each arm come before all else.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from coincide_jax.kernels import bandits


class Members(NamedTuple):
    """The records that may be drawn, sorted by arm, and within an arm by the given order or by row.

    records: int32[N], rows in the data set file; arm: int32[N], ascending; offsets: int32[K + 1], where arms begin.
    """

    records: jax.Array
    arm: jax.Array
    offsets: jax.Array


class Plan(NamedTuple):
    """A round."""

    records: jax.Array
    arms: jax.Array
    weight: jax.Array


class Position(NamedTuple):
    """How far the records are used up. cursor: int32[K], records of each arm taken in this epoch; epoch: int32[];
    kept: int32[K], records of each arm that the first epoch took and later ones hold, 0 until it has ended."""

    cursor: jax.Array
    epoch: jax.Array
    kept: jax.Array


class Limit(NamedTuple):
    """What may be taken of the members, and what first. It holds for records in a given order (`shuffle=False`), since
    another order would begin with other records.

    fresh: int32[], ≥ 1, different records in the whole run; first: int32[K], so many of each arm are taken before any
    other record, in the first epoch.
    """

    fresh: jax.Array
    first: jax.Array


def members(records: np.ndarray, arm: np.ndarray, arms: int, rank: np.ndarray | None = None) -> Members:
    """Sorts records by arm, then by rank, then by row, so that the order they are handed in does not matter.

    Args:
      records: int[N].
      arm: int[N], each in 0 … arms − 1.
      arms: K.
      rank: real[N], what comes first within an arm where nothing is shuffled: the lowest; None = by row.
    """
    order = np.lexsort((records, arm) if rank is None else (records, rank, arm))
    sizes = np.bincount(arm, minlength=arms)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Members(
        *(np.asarray(value, np.int32) for value in (np.asarray(records)[order], np.asarray(arm)[order], offsets))
    )


def start(arms: int) -> Position:
    """Nothing used yet."""
    return Position(jnp.zeros(arms, jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros(arms, jnp.int32))


def bound(member: Members, position: Position, limit: Limit | None = None) -> jax.Array:
    """Up to where each arm may be taken now, int32[K]: to the end of its first part as long as one of them is left,
    then to what the epoch holds. An arm is alive if its cursor is below."""
    late = position.epoch > 0
    whole = jnp.where(late, position.kept, member.offsets[1:] - member.offsets[:-1])
    if limit is None:
        return whole
    return jnp.where(late | (position.cursor >= limit.first).all(), whole, limit.first)


def draw_plan(
    probabilities: Callable[[jax.Array], jax.Array],
    key: jax.Array,
    member: Members,
    position: Position,
    first: jax.Array,
    total: jax.Array,
    steps: int,
    batch: int,
    *,
    per_step: bool = False,
    shuffle: bool = True,
    replay: Callable[[jax.Array], jax.Array] | None = None,
    due: jax.Array | None = None,
    limit: Limit | None = None,
) -> tuple[Plan, Position]:
    """Draws a round of `steps` × `batch` records, one after another.

    Args:
      probabilities: alive bool[K] → f32[K], the sampler at its state of now.
      key: the run's random key.
      first: int32[], slots drawn before this round; the uniform numbers of slot i depend on the key and on i alone.
      total: slots of the whole run; those beyond it stay empty.
      per_step, shuffle, replay, due: as in `bandits.Sampler`, at its state of now (`bandits.ways`).
      limit: None = every record may be taken, none comes first.

    Returns:
      The plan, and the position after it.
    """
    member = Members(*map(jnp.asarray, member))
    sizes = member.offsets[1:] - member.offsets[:-1]
    number = jnp.arange(steps * batch, dtype=jnp.int32)
    slots = first + number
    draw_key, order_key = jax.random.split(key)
    memory_key = jax.random.fold_in(key, 2**31 - 1)  # of no epoch, no slot and no step
    chance = jax.vmap(lambda slot: jax.random.uniform(jax.random.fold_in(draw_key, slot)))(slots)
    recall = jax.vmap(lambda slot: jax.random.uniform(jax.random.fold_in(memory_key, slot), 3))(slots)

    def chances(alive):
        p = jnp.where(alive, probabilities(alive), 0.0)
        return p, bandits.edges(p)

    def one(carry: _Carry, drawn):
        slot, number, u, again = drawn
        full, over = slot < total, carry.left == 0
        cursor = jnp.where(over, 0, carry.cursor)
        kept = jnp.where(over & (carry.epoch == 0), carry.cursor, carry.kept)
        epoch = carry.epoch + over.astype(jnp.int32)
        whole, now = jnp.where(epoch > 0, kept, sizes), bound(member, Position(cursor, epoch, kept), limit)
        alive, held = cursor < now, jnp.where(epoch > 0, whole, cursor)
        # p changes only when an arm runs out or an epoch begins, and may cost far more than a draw from it.
        p, edge = jax.lax.cond(over | carry.stale, chances, lambda _: (carry.p, carry.edge), alive)
        arm = bandits.pick(edge, u)
        weight, replayed, due = 1.0 / jnp.maximum(p[arm], 1e-12), jnp.zeros((), bool), carry.due
        if replay is not None:
            share = jnp.where(held > 0, replay(held > 0), 0.0)
            replayed = again[0] < share.sum()
            of_memory = bandits.pick(bandits.edges(share / jnp.maximum(share.sum(), 1e-30)), again[1])
            arm = jnp.where(replayed, of_memory, arm)
        if due is not None:
            waiting = (due > 0) & (alive | (held > 0))
            called, arm = waiting.any(), jnp.where(waiting.any(), jnp.argmax(jnp.where(waiting, due, 0.0)), arm)
            arm = arm.astype(jnp.int32)
            replayed, weight = jnp.where(called, ~alive[arm], replayed), jnp.where(called, 1.0, weight)
        weight = jnp.where(replayed, -1.0, weight)
        if per_step:  # the arm of the slot before, unless the step is new or the arm has run out
            keep = (number % batch > 0) & (alive[carry.arm] | carry.replayed)
            arm, weight, replayed = (
                jnp.where(keep, old, new)
                for old, new in ((carry.arm, arm), (carry.weight, weight), (carry.replayed, replayed))
            )
        if due is not None:
            due = due.at[arm].min(jnp.where(full, 0.0, jnp.inf))
        back = cursor[arm] - 1 - (again[2] * held[arm].astype(jnp.float32)).astype(jnp.int32)
        taken = jnp.where(replayed, back % jnp.maximum(whole[arm], 1), cursor[arm])
        row = (jnp.where(full, arm, -1), taken, epoch, jnp.where(full, weight, 0.0))
        used = (full & ~replayed).astype(jnp.int32)
        left = jnp.where(over, whole.sum(), carry.left) - used
        cursor = cursor.at[arm].add(used)
        after = _Carry(cursor, epoch, kept, left, cursor[arm] >= now[arm], p, edge, arm, weight, replayed, due)
        # An empty slot uses up nothing, not even an epoch.
        return jax.tree.map(lambda new, old: jnp.where(full, new, old), after, carry), row

    cursor, epoch, kept = position
    left = bound(member, position).sum()
    left = left if limit is None else jnp.where(epoch > 0, left, jnp.minimum(left, limit.fresh))
    p, edge = chances(cursor < bound(member, position, limit))
    nothing = jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros((), bool)
    begin = _Carry(cursor, epoch, kept, left - cursor.sum(), jnp.zeros((), bool), p, edge, *nothing, due)
    end, (arms, taken, epochs, weight) = jax.lax.scan(one, begin, (slots, number, chance, recall))
    last = Position(end.cursor, end.epoch, end.kept)

    # One permutation an epoch, and nearly always one or two epochs a round: looked up after the scan, not in it.
    def of_epoch(carry):
        epoch, records = carry
        order = member.records
        if shuffle:
            rank = jax.random.bits(jax.random.fold_in(order_key, epoch), member.records.shape, jnp.uint32)
            order = order[jnp.lexsort((rank, member.arm))]
        here = order[member.offsets[jnp.maximum(arms, 0)] + taken]
        return epoch + 1, jnp.where(epochs == epoch, here, records)

    empty = jnp.full_like(arms, -1)
    _, records = jax.lax.while_loop(lambda carry: carry[0] <= last.epoch, of_epoch, (position.epoch, empty))
    shape = (steps, batch)
    records = jnp.where(arms < 0, -1, records)
    return Plan(records.reshape(shape), arms.reshape(shape), weight.reshape(shape)), last


class _Carry(NamedTuple):
    """From slot to slot: position, records left, whether p is out of date, p and its running sums, the last choice."""

    cursor: jax.Array
    epoch: jax.Array
    kept: jax.Array
    left: jax.Array
    stale: jax.Array
    p: jax.Array
    edge: jax.Array
    arm: jax.Array
    weight: jax.Array
    replayed: jax.Array
    due: jax.Array | None
