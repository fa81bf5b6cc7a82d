"""What a selector may see and what it gives back."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class SelectionView:
    """Everything a selector may see: no record, and so no task, label, id or path."""

    features: Callable[[np.ndarray], np.ndarray]  # i[n] rows → f[n, D], finite; read at the first call
    valid: np.ndarray  # bool[N]
    assignment: np.ndarray | None  # i32[N], -1 = not valid; None = no clusters
    centroids: np.ndarray | None  # f32[K, D]
    num_layers: int  # tapped layers in a feature, as extracted
    budget: int  # M


class Selection(NamedTuple):
    """The chosen rows and why.

    `clusters` has columns of length K (none if the selector does not look at clusters), `records` columns of length M.
    """

    indices: np.ndarray  # i64[M], in selection order
    clusters: dict[str, np.ndarray]
    records: dict[str, np.ndarray]
