"""What is measured between two rounds: a few records of every arm, by their loss or by right answers.

A probe is a forward pass over records that stay the same through the run. Its steps are no training steps: nothing is
learned, no record is used up.
"""

import numpy as np

from coincide_jax.core import axes
from coincide_jax.dataset import batches


def choose(records: np.ndarray, arm: np.ndarray, arms: int, count: int, seed: int) -> np.ndarray:
    """`count` records of each arm, drawn once: int64[arms, count].

    Args:
      records, arm: int[N]; every arm has at least `count` records.
    """
    rng = np.random.default_rng([seed, arms, count])
    return np.stack([rng.permutation(np.sort(records[arm == one]))[:count] for one in range(arms)])


def measure(judge, dataset, chosen: np.ndarray, **reading) -> np.ndarray:
    """Mean over each arm's probe records of what `judge` says of them: f32[arms], NaN where none could be read.

    Args:
      chosen: int64[arms, count], from `choose`.
      judge, dataset, reading: as of `values`.
    """
    of_arm = values(judge, dataset, chosen.reshape(-1), **reading).reshape(chosen.shape)
    seen = np.isfinite(of_arm)
    sums = np.where(seen, of_arm, 0.0).sum(1)
    return np.where(seen.any(1), sums / np.maximum(seen.sum(1), 1), np.nan).astype(np.float32)


def values(judge, dataset, rows: np.ndarray, *, batch: int, micro: int, threads: int, mesh) -> np.ndarray:
    """What `judge` says of each record: f64[n], NaN where it could not be read or has no supervised token.

    Args:
      judge: batch on the devices → (value f32[b], whether it counts bool[b]).
      rows: int64[n], rows of the data set.
      batch, micro: records read together, records of one forward pass.
    """
    places = np.full(-(-len(rows) // batch) * batch, -1, np.int64)
    places[: len(rows)] = rows
    found = np.full(len(places), np.nan)
    plan = places.reshape(-1, batch)
    for step, micro_batches in enumerate(batches.planned(dataset, plan, micro=micro, threads=threads)):
        for one in micro_batches:
            if one["valid"].any():
                value, counts = (np.asarray(part) for part in judge(axes.put_batch(one, mesh)))
                keep = counts & one["valid"]
                found[step * batch + one["slot"][keep]] = value[keep]
    return found[: len(rows)]
