"""What a sampler is told: the keys of `config.curriculum` that it reads, and the facts of the pool."""

import dataclasses
import math
from typing import NamedTuple

from coincide_jax.core.errors import UserError, unknown


class Pool(NamedTuple):
    """Of the records that may be drawn. Hashable, so that equal pools share compiled steps.

    sizes: int[K], records of each arm; difficulty: real[K], mean of each arm's, or None; graph: real[K, P], or None.
    """

    sizes: tuple[int, ...]
    difficulty: tuple[float, ...] | None = None
    graph: tuple[tuple[float, ...], ...] | None = None


CHOICES = {
    "draw": ("", "sample", "step"),
    "order": ("random", "given"),
    "difficulty": ("", "nll", "el2n"),
    "reward": ("", "absolute", "relative"),
    "objective": ("loss", "accuracy"),
    "probe_from": ("heldout", "seen"),
}
RANGES = {  # key: least, most
    "gamma": (0.0, 1.0),
    "mu": (0.0, 1.0),
    "eta": (0.0, math.inf),
    "alpha": (0.0, 1.0),
    "drift": (0.0, 1.0),
    "drift_draws": (0.0, math.inf),
    "delta": (0.0, 1.0),
    "probe": (0, math.inf),
    "rehearsal": (0.0, 0.9),
    "visits": (0, math.inf),
    "window": (1, math.inf),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `configs/common.py: curriculum` that samplers read; comments there say what each is."""

    name: str
    round_steps: int
    lag: int
    draw: str
    order: str
    difficulty: str
    reward: str
    rescale: bool
    gamma: float
    mu: float
    eta: float
    alpha: float
    drift: float
    drift_draws: float
    tau: float
    delta: float
    positive_only: bool
    objective: str
    probe: int
    probe_from: str
    rehearsal: float
    visits: int
    window: int

    @classmethod
    def of(cls, config) -> "Settings":
        """The keys out of `config.curriculum`."""
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})

    @property
    def remembers(self) -> bool:
        """Whether the sampler is wrapped by rehearsal."""
        return self.rehearsal > 0 or self.visits > 0

    def check(self) -> None:
        """Finds what a config can get wrong.

        Raises:
          UserError: an unknown word, a number out of its range, keys that contradict each other.
        """
        for key, valid in CHOICES.items():
            if getattr(self, key) not in valid:
                raise unknown(f"curriculum.{key}", getattr(self, key), [word for word in valid if word])
        if self.lag not in (0, 1):
            raise UserError(f"curriculum.lag is {self.lag}; expected 0 or 1")
        for key, (low, high) in RANGES.items():
            if not low <= getattr(self, key) <= high:
                wanted = f"from {low:g} to {high:g}" if high < math.inf else f"of {low:g} or more"
                raise UserError(f"curriculum.{key} is {getattr(self, key)}; expected a number {wanted}")
        if self.name in ("exp3", "exp3s", "exp3r") and self.gamma == 0 and self.eta == 0:
            raise UserError(
                f"curriculum.name '{self.name}' learns at the rate gamma/K, but curriculum.gamma is 0; set "
                "curriculum.eta, or curriculum.gamma above 0"
            )
        if not self.tau > 0:
            raise UserError(f"curriculum.tau is {self.tau}; expected a number above 0")
        if self.name in ("printed", "odm") and (self.reward == "relative" or self.rescale):
            raise UserError(
                f"curriculum.name '{self.name}' has a reward of its own; leave curriculum.reward='' and "
                "curriculum.rescale=False"
            )
        if self.objective == "accuracy" and not self.probe:
            raise UserError(
                "curriculum.objective is 'accuracy' but curriculum.probe is 0; training losses say nothing of "
                "accuracy, set a number of records an arm"
            )
        if self.probe_from == "seen" and self.name != "progress":
            raise UserError(
                f"curriculum.probe_from is 'seen', but curriculum.name is '{self.name}'; only 'progress' keeps a list "
                "of what it has seen, expected 'heldout'"
            )
        if self.objective == "accuracy" and self.name == "skill_it":
            raise UserError("curriculum.name 'skill_it' goes by evaluation losses; set curriculum.objective=loss")
        if self.visits and self.window // self.visits < 2 * self.round_steps:
            raise UserError(
                f"curriculum.visits is {self.visits} in a curriculum.window of {self.window} steps; with rounds of "
                f"{self.round_steps} steps at most {self.window // (2 * self.round_steps)} can be promised"
            )
