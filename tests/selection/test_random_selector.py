"""Random selection: seeded, without replacement, nested budgets."""

import numpy as np

from coincide_jax.selection import SelectionView, random
from configs import common


def draw(budget, seed=0):
    valid = np.arange(300) % 3 > 0
    keys = common.defaults().select
    keys.seed = seed
    return random.select(SelectionView(None, valid, None, None, 5, budget), keys).indices


def test_smaller_budgets_lie_inside_larger_ones():
    large = draw(150)
    assert len(set(large)) == 150 and np.all(large % 3 > 0) and large.dtype == np.int64
    np.testing.assert_array_equal(draw(40), large[:40])
    assert not np.array_equal(draw(150, seed=1), large)
    assert sorted(draw(200)) == [row for row in range(300) if row % 3]
