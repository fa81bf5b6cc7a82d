"""What is known of every arm from round to round, for the report and for samplers that ask for a probe.

`arms.jsonl` has a line where a round begins and one at the end of the run: `step`, steps done until then; `losses` [K],
mean training loss (nats a token) of each arm's slots since the line before, replays included, null where it had none;
`probe` [K], what the sampler's probe measured; `watch`, of the watched records [n]: `nll`, and `exact`, 1 where greedy
decoding would say the answer; of probe and watch, the number of records `measured` and the `seconds` it took, apart
from the steps.
"""

import pathlib
import time
from collections.abc import Callable

import numpy as np

from coincide_jax.core import artifacts
from coincide_jax.core.metrics import JsonLines
from coincide_jax.training import probe


class ArmLog:
    """Writes arms.jsonl, cut back to the lines before `step`. A run of one arm that watches nothing leaves no file."""

    def __init__(self, path: pathlib.Path, arms: int, step: int, members: dict, dataset, reading: dict, heard: dict):
        """`members`, `dataset` as of `fit`; `reading`: how `probe.values` reads; `heard`: as `heard()` gave it."""
        self.probed, self.watched = members.get("probed"), members.get("watched", ())
        self.dataset, self.reading = dataset, reading
        self.total, self.count = np.zeros(arms), np.zeros(arms, np.int64)
        for arm, (total, count) in heard.items():
            self.total[int(arm)], self.count[int(arm)] = total, count
        artifacts.cut_jsonl(path, lambda line: line["step"] < step)
        self.lines = JsonLines(path) if arms > 1 or len(self.watched) else None

    def hear(self, arms: np.ndarray, losses: np.ndarray) -> None:
        """Adds the losses f32[B] of a step's slots, NaN where none was measured, of the arms int32[B]."""
        seen = np.isfinite(losses) & (arms >= 0)
        np.add.at(self.total, arms[seen], losses[seen].astype(np.float64))
        np.add.at(self.count, arms[seen], 1)

    def heard(self) -> dict[str, tuple[float, int]]:
        """What a checkpoint has to carry: sum and number of the losses of each arm heard of since the last line."""
        return {str(arm): (float(self.total[arm]), int(self.count[arm])) for arm in np.flatnonzero(self.count)}

    def write(self, step: int, judge: Callable, objective: str | None) -> np.ndarray | None:
        """Measures what there is to measure, writes the line, begins a new sum.

        Args:
          step: steps done.
          judge: one of `steps.KINDS` → what `probe.values` asks, of the weights as they are now.
          objective: what the probe measures, of the same; None: there is no probe now.

        Returns:
          What the probe measured, f32[K].
        """
        line, measured, seconds, found, begin = {}, {}, {}, None, time.monotonic()
        if self.count.any():
            means = self.total / np.maximum(self.count, 1)
            line["losses"] = _numbers(np.where(self.count > 0, means, np.nan))
            self.total[:], self.count[:] = 0.0, 0
        if objective is not None:
            chosen = self.probed(step) if callable(self.probed) else self.probed
            found = probe.measure(judge(objective), self.dataset, chosen, **self.reading)
            line["probe"], measured["probe"] = _numbers(found), int(np.sum(chosen >= 0))
            seconds["probe"] = round(time.monotonic() - begin, 4)
        if len(self.watched):
            begin = time.monotonic()
            line["watch"] = {
                name: _numbers(probe.values(judge(name), self.dataset, self.watched, **self.reading))
                for name in ("nll", "exact")
            }
            measured["watch"], seconds["watch"] = len(self.watched), round(time.monotonic() - begin, 4)
        if line and self.lines:
            self.lines.write(step=step, **line, measured=measured, seconds=seconds)
        return found

    def close(self) -> None:
        """Closes the file."""
        if self.lines:
            self.lines.close()


def _numbers(values: np.ndarray) -> list[float | None]:
    """As JSON has them: NaN is null."""
    return [round(float(value), 5) if np.isfinite(value) else None for value in values]
