"""Random: a prefix of one seeded permutation of the valid rows, so that smaller budgets lie inside larger ones."""

import numpy as np

from coincide_jax.selection.view import Selection, SelectionView


def select(view: SelectionView, keys) -> Selection:
    """Draws `view.budget` rows uniformly without replacement (`keys.seed`)."""
    order = np.random.default_rng(keys.seed).permutation(np.flatnonzero(view.valid))[: view.budget]
    return Selection(order.astype(np.int64), {}, {"rank": np.arange(len(order)), "score": np.zeros(len(order))})
