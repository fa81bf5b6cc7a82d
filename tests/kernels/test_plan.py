"""A round: no repeats before an arm is used up, exhausted arms masked, epochs, empty slots, same bits every time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coincide_jax.core import axes
from coincide_jax.kernels import bandits, plan

SIZES = (3, 1, 0, 8)
RECORDS = np.asarray([40, 10, 30, 7, 90, 91, 92, 93, 94, 95, 96, 97])
ARM = np.asarray([0, 0, 0, 1, 3, 3, 3, 3, 3, 3, 3, 3])
ALL = set(RECORDS.tolist())


@functools.partial(jax.jit, static_argnames=("steps", "batch", "total"))
def draw(key, member, position, first, steps, batch, total, favour):
    def probabilities(alive):
        return bandits.proportional(favour, alive, 0.05)

    return plan.draw_plan(probabilities, key, member, position, first, total, steps, batch)


def rounds(count, *, steps=2, batch=3, total=10**6, favour=(0.0, 0.0, 0.0, 0.0), mesh=None):
    member, position = plan.members(RECORDS, ARM, 4), plan.start(4)
    found = []
    for number in range(count):
        first = np.int32(number * steps * batch)
        drawn, position = draw(jax.random.key(5), member, position, first, steps, batch, total, jnp.asarray(favour))
        found.append(jax.device_get(drawn))
    return found, jax.device_get(position)


def test_every_epoch_holds_every_record_once():
    found, position = rounds(6)  # 36 slots, 12 records: three epochs
    order = np.concatenate([drawn.records.ravel() for drawn in found])
    epochs = [order[i : i + 12].tolist() for i in (0, 12, 24)]
    assert all(set(epoch) == ALL for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert position.epoch == 2 and position.cursor.tolist() == list(SIZES)


def test_an_arm_used_up_in_mid_round_is_masked_and_its_weight_is_one_over_p():
    found, _ = rounds(1, steps=3, batch=4, favour=(1e6, 0.0, 0.0, 0.0))
    arms, weight = found[0].arms.ravel(), found[0].weight.ravel()
    assert np.bincount(arms, minlength=4).tolist() == list(SIZES)
    last = max(i for i in range(12) if arms[i] == 0)
    assert last < 11, "the favoured arm should run out before the round does"
    after = [weight[i] for i in range(last + 1, 12)]
    # With arm 0 gone nothing has a reward: the arms left are equally likely.
    assert set(np.round(after, 4)) <= {1.0, 2.0}
    np.testing.assert_allclose(weight[0], 1 / 0.95 if arms[0] == 0 else 60.0, rtol=0.05)


def test_records_belong_to_their_arms_and_come_in_keyed_order():
    found, _ = rounds(2)
    arm_of = dict(zip(RECORDS.tolist(), ARM.tolist(), strict=True))
    for drawn in found:
        assert [arm_of[record] for record in drawn.records.ravel()] == drawn.arms.ravel().tolist()
    order = [r for drawn in found for r in drawn.records.ravel().tolist() if arm_of[r] == 3]
    assert order != sorted(order)


def test_slots_beyond_the_total_are_empty_and_use_up_nothing():
    found, position = rounds(2, total=8)
    records = np.concatenate([drawn.records.ravel() for drawn in found])
    arms = np.concatenate([drawn.arms.ravel() for drawn in found])
    weight = np.concatenate([drawn.weight.ravel() for drawn in found])
    assert (records[:8] >= 0).all() and (records[8:] == -1).all()
    assert (arms[8:] == -1).all() and (weight[8:] == 0).all() and (weight[:8] >= 1).all()
    assert position.cursor.sum() == 8 and position.epoch == 0


def test_order_of_the_members_does_not_matter():
    shuffle = np.random.default_rng(0).permutation(len(RECORDS))
    for one, two in zip(plan.members(RECORDS, ARM, 4), plan.members(RECORDS[shuffle], ARM[shuffle], 4), strict=True):
        np.testing.assert_array_equal(one, two)


def one_round(steps, batch, *, position=None, p=(1.0, 1.0, 1.0, 1.0), rank=None, **ways):
    """A round whose arms are drawn in the given proportions."""
    weights = jnp.asarray(p, jnp.float32)

    def probabilities(alive):
        mass = jnp.where(alive, weights, 0.0)
        return mass / jnp.maximum(mass.sum(), 1e-30)

    member, position = plan.members(RECORDS, ARM, 4, rank), position or plan.start(4)
    drawn = plan.draw_plan(probabilities, jax.random.key(5), member, position, 0, 10**6, steps, batch, **ways)
    return jax.device_get(drawn)


def test_one_arm_a_step_until_it_runs_out():
    (drawn, _) = one_round(4, 3, per_step=True)
    sizes, at = dict(enumerate(SIZES)), 0
    for arms, weight in zip(drawn.arms, drawn.weight, strict=True):
        for slot in range(3):
            if slot and sizes[at]:
                assert arms[slot] == at and weight[slot] == weight[slot - 1]
            at = int(arms[slot])
            sizes[at] -= 1
            assert sizes[at] >= 0
    assert any(len(set(arms)) == 1 for arms in drawn.arms.tolist())
    assert sorted(drawn.records.ravel().tolist()) == sorted(RECORDS.tolist())


def test_given_order_within_arms():
    rank = np.asarray([2, 0, 1, 0, *range(8, 0, -1)])
    (drawn, _) = one_round(6, 4, rank=rank, shuffle=False)
    order, arms = drawn.records.ravel(), drawn.arms.ravel()
    assert order[:12][arms[:12] == 0].tolist() == [10, 30, 40]
    assert order[:12][arms[:12] == 3].tolist() == [97, 96, 95, 94, 93, 92, 91, 90]
    assert order[12:][arms[12:] == 0].tolist() == [10, 30, 40]  # the same in the next epoch


def limited(count, limit, favour=(0.0, 0.0, 0.0, 0.0), **ways):
    """Records, arms and weights of `count` rounds of twelve slots in a given order, and the position after them."""
    rank, position, found = np.asarray([2, 0, 1, 0, *range(8, 0, -1)]), plan.start(4), []
    limit = plan.Limit(np.int32(limit[0]), np.asarray(limit[1], np.int32))
    for _ in range(count):
        position = jax.tree.map(jnp.asarray, position)
        drawn, position = one_round(4, 3, rank=rank, shuffle=False, limit=limit, position=position, **ways)
        found.append([np.ravel(part) for part in drawn])
    return *(np.concatenate(parts) for parts in zip(*found, strict=True)), position


@pytest.mark.parametrize("fresh", [1, 5, 12, 40])
def test_a_limit_ends_the_first_epoch_and_later_ones_are_over_the_same_records(fresh):
    records, _, _, position = limited(3, (fresh, (0, 0, 0, 0)))
    held = min(fresh, 12)
    epochs = [records[at : at + held].tolist() for at in range(0, len(records) - held + 1, held)]
    assert len(set(records.tolist())) == held and all(set(epoch) == set(epochs[0]) for epoch in epochs)
    assert position.kept.sum() == (held if position.epoch else 0)
    order = [record for record in epochs[0] if record >= 90]
    assert order == sorted(order, reverse=True)  # the limit cuts the end of what was given


@pytest.mark.parametrize("p", [(1.0, 1.0, 1.0, 1.0), (1e3, 0.0, 1.0, 1e-3)])
def test_what_comes_first_is_whole_before_anything_else_in_mid_round_too(p):
    """Two of arm 0 and three of arm 3, whatever the sampler would rather have, if only it gives them a chance."""
    records, arms, _, position = limited(2, (9, (2, 0, 0, 3)), p=p)
    assert set(records[:5].tolist()) == {10, 30, 97, 96, 95}
    assert set(records[5:9].tolist()).isdisjoint(records[:5].tolist()) and position.epoch == 2
    assert set(records[9:18].tolist()) == set(records[:9].tolist())
    alive = [int((arms[:5] == arm).sum()) for arm in range(4)]
    assert alive == [2, 0, 0, 3]


def test_replays_within_a_limit_are_of_what_was_taken():
    records, _, weight, _ = limited(3, (7, (1, 1, 0, 1)), replay=lambda seen: 0.5 * bandits.uniform(seen))
    fresh = []
    for record, own in zip(records.tolist(), weight.tolist(), strict=True):
        assert own > 0 or record in fresh
        fresh += [record] if own > 0 and record not in fresh else []
    assert set(fresh[:3]) == {10, 7, 97} and len(fresh) <= 7 and (weight < 0).sum() > 5


def test_replays_are_of_records_taken_before_and_use_up_nothing():
    (drawn, position) = one_round(10, 4, replay=lambda seen: 0.5 * bandits.uniform(seen))
    used, arm_of = set(), dict(zip(RECORDS.tolist(), ARM.tolist(), strict=True))
    replays = 0
    for record, arm, weight in zip(drawn.records.ravel(), drawn.arms.ravel(), drawn.weight.ravel(), strict=True):
        assert arm_of[int(record)] == arm
        if weight < 0:
            assert record in used
            replays += 1
        else:
            assert position.epoch > 0 or record not in used
            used.add(record)
    assert 10 <= replays <= 30 and int(position.cursor.sum()) + 12 * int(position.epoch) == 40 - replays


def test_visits_that_are_due_come_first_and_exhausted_arms_are_replayed():
    start = plan.start(4)._replace(cursor=jnp.asarray([0, 1, 0, 0], jnp.int32))  # arm 1 is used up
    due = jnp.asarray([2.0, 5.0, 9.0, 0.0])  # arm 2 has no records at all
    (drawn, _) = one_round(2, 4, position=start, p=(0.0, 0.0, 0.0, 1.0), due=due)
    assert drawn.arms.ravel().tolist()[:2] == [1, 0] and drawn.weight.ravel().tolist()[:2] == [-1.0, 1.0]
    assert set(drawn.arms.ravel().tolist()[2:]) == {3}


@pytest.mark.parametrize("devices", [1, 8])
def test_the_same_plan_on_any_mesh(devices):
    alone, _ = rounds(2)
    with jax.set_mesh(axes.make_mesh(devices=jax.devices()[:devices])):
        there, _ = rounds(2)
    for one, two in zip(alone, there, strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)
