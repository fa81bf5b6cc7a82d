"""Which records the next round of S steps trains on: drawn at once on the device, from the sampler state of now.

Records of an arm come without repeats, in an order permuted anew each epoch; an arm that runs out in mid-round is
masked from then on; when all arms have run out the next epoch begins.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from coincide_jax.kernels import bandits


class Members(NamedTuple):
    """The records that may be drawn, sorted by arm.

    records: int32[N], rows in the data set file; arm: int32[N], ascending; offsets: int32[K + 1], where arms begin.
    """

    records: jax.Array
    arm: jax.Array
    offsets: jax.Array


class Plan(NamedTuple):
    """A round.

    records: int32[S, B], −1 = empty slot; arms: int32[S, B], −1 = empty slot; weight: f32[S, B], one over the
    probability the slot's arm was drawn with, 0 = empty slot.
    """

    records: jax.Array
    arms: jax.Array
    weight: jax.Array


class Position(NamedTuple):
    """How far the records are used up. cursor: int32[K], records of each arm taken in this epoch; epoch: int32[]."""

    cursor: jax.Array
    epoch: jax.Array


def members(records: np.ndarray, arm: np.ndarray, arms: int) -> Members:
    """Sorts records by arm (then by index, so that the order they are handed in does not matter).

    Args:
      records: int[N].
      arm: int[N], each in 0 … arms − 1.
      arms: K.
    """
    order = np.lexsort((records, arm))
    sizes = np.bincount(arm, minlength=arms)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Members(
        *(np.asarray(value, np.int32) for value in (np.asarray(records)[order], np.asarray(arm)[order], offsets))
    )


def start(arms: int) -> Position:
    """Nothing used yet."""
    return Position(jnp.zeros(arms, jnp.int32), jnp.zeros((), jnp.int32))


def draw_plan(
    probabilities: Callable[[jax.Array], jax.Array],
    key: jax.Array,
    member: Members,
    position: Position,
    first: jax.Array,
    total: jax.Array,
    steps: int,
    batch: int,
) -> tuple[Plan, Position]:
    """Draws a round of `steps` × `batch` records, one after another.

    Args:
      probabilities: alive bool[K] → f32[K], the sampler at its state of now.
      key: the run's random key.
      first: int32[], slots drawn before this round; the uniform numbers of slot i depend on the key and on i alone.
      total: slots of the whole run; those beyond it stay empty.

    Returns:
      The plan, and the position after it.
    """
    sizes = member.offsets[1:] - member.offsets[:-1]
    slots = first + jnp.arange(steps * batch, dtype=jnp.int32)
    draw_key, order_key = jax.random.split(key)
    chance = jax.vmap(lambda slot: jax.random.uniform(jax.random.fold_in(draw_key, slot)))(slots)

    def one(position: Position, drawn):
        slot, u = drawn
        over = jnp.all(position.cursor >= sizes)
        cursor = jnp.where(over, 0, position.cursor)
        epoch = position.epoch + over.astype(jnp.int32)
        alive = cursor < sizes
        p = jnp.where(alive, probabilities(alive), 0.0)
        arm = bandits.draw(p, u)
        full = slot < total
        row = (jnp.where(full, arm, -1), cursor[arm], epoch, jnp.where(full, 1.0 / jnp.maximum(p[arm], 1e-12), 0.0))
        # An empty slot uses up nothing, not even an epoch.
        after = Position(cursor.at[arm].add(1), epoch)
        return jax.tree.map(lambda new, old: jnp.where(full, new, old), after, position), row

    last, (arms, taken, epochs, weight) = jax.lax.scan(one, position, (slots, chance))

    # One permutation an epoch, and nearly always one or two epochs a round: looked up after the scan, not in it.
    def of_epoch(carry):
        epoch, records = carry
        rank = jax.random.bits(jax.random.fold_in(order_key, epoch), member.records.shape, jnp.uint32)
        shuffled = member.records[jnp.lexsort((rank, member.arm))]
        here = shuffled[member.offsets[jnp.maximum(arms, 0)] + taken]
        return epoch + 1, jnp.where(epochs == epoch, here, records)

    empty = jnp.full_like(arms, -1)
    _, records = jax.lax.while_loop(lambda carry: carry[0] <= last.epoch, of_epoch, (position.epoch, empty))
    shape = (steps, batch)
    records = jnp.where(arms < 0, -1, records)
    return Plan(records.reshape(shape), arms.reshape(shape), weight.reshape(shape)), last
