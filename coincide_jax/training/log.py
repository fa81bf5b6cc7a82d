"""What a run writes while it goes: a line a step, a line a round, what a step held, and how fast it was."""

import contextlib
import math
import pathlib
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from coincide_jax.core import artifacts, precision, processes
from coincide_jax.core.errors import UserError
from coincide_jax.core.metrics import Events, JsonLines
from coincide_jax.dataset.batches import Batch
from coincide_jax.models.flops import Costs
from coincide_jax.training.arms import ArmLog

IN_FLIGHT = 2  # steps that the host may be ahead of the device


class Work(NamedTuple):
    """What the micro-batches of a step hold: records' positions (image positions too), positions in all, pairs of a
    query and a key that it sees, supervised positions, images."""

    positions: int
    slots: int
    pairs: int
    supervised: int
    images: int

    @classmethod
    def of(cls, micro_batches: Iterable[Batch]) -> "Work":
        """Counted on the host."""
        total = np.zeros(len(cls._fields), np.int64)
        for batch in micro_batches:
            size = batch["lengths"][batch["valid"]].astype(np.int64)
            pairs, images = (size * (size + 1) // 2).sum(), (batch["image_start"] >= 0).sum()
            total += (size.sum(), batch["tokens"].size, pairs, batch["labels"].sum(), images)
        return cls(*total.tolist())

    def flops(self, costs: Costs) -> float:
        """Model FLOP of the step, by the convention of `models/flops.py`."""
        return (
            self.positions * costs.position
            + self.pairs * costs.pair
            + self.supervised * costs.supervised
            + self.images * costs.image
        )


class Step(NamedTuple):
    """A step whose numbers are still on the device."""

    number: int
    metrics: dict
    work: Work
    arms: np.ndarray  # int32[B], of the plan


class Log:
    """`metrics.jsonl` (a line a step) and `curriculum.jsonl` (a line a round), cut back to where a run goes on; the
    same numbers as TensorBoard events in `events/`, if asked for.

    `loss` is the newest one that has reached the host. `seconds` of a line is the time between the completions of two
    steps, as the host saw them (reading, drawing and saving included); the steps still in flight at a flush share
    what is left, so that the lines add up to the time that went by. Measured beside it, and gone with it where runs are
    compared (`core.metrics.MEASURED`):

        tokens_per_second   positions that hold a record, image and prompt included, by `seconds`
        data_wait           share of `seconds` in which the loop stood waiting for the reader. The device may be busy
                            meanwhile with the steps before, so this is the most that reading can cost
        mfu                 model FLOP (`models/flops.py`) by `seconds` and the peak of all devices (`core/peaks.py`)
        device_memory_mib   peak of the first device; where the backend does not tell it, host_memory_mib, peak of the
                            process
    """

    def __init__(
        self, out: pathlib.Path, step: int, arms: ArmLog, costs: Costs, peak: float, *, tensorboard: bool = False
    ):
        artifacts.cut_jsonl(out / "metrics.jsonl", lambda line: line["step"] <= step)
        artifacts.cut_jsonl(out / "curriculum.jsonl", lambda line: line["drawn_at"] < step)
        self.steps, self.rounds = JsonLines(out / "metrics.jsonl"), JsonLines(out / "curriculum.jsonl")
        self.events = Events(out / "events", step) if tensorboard and processes.leads() else None
        self.arms, self.costs, self.peak = arms, costs, peak
        self.waiting: list[Step] = []
        self.laps: list[tuple[float, float]] = []  # seconds, and those of them spent waiting, of the first of them
        self.loss, self.rate, self.clock, self.waited = math.nan, math.nan, time.monotonic(), 0.0

    def reading(self, reader: Iterator) -> Iterator:
        """The reader's steps, with the time that they are waited for."""
        while True:
            with self.wait():
                found = next(reader, None)
            if found is None:
                return
            yield found

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """Inside it the loop waits for the reader."""
        begin = time.monotonic()
        yield
        self.waited += time.monotonic() - begin

    def step(self, number: int, metrics: dict, work: Work, arms: np.ndarray) -> None:
        """Keeps the metrics of a step, still on the device, and its plan's arms int32[B]; waits for the step
        `IN_FLIGHT` before it."""
        self.waiting.append(Step(number, metrics, work, arms))
        if len(self.waiting) > IN_FLIGHT:
            ended = self.waiting[-1 - IN_FLIGHT]
            jax.block_until_ready(ended.metrics)
            self.laps.append(self._lap())
            self.loss = float(jax.device_get(ended.metrics["loss"]))
            self.rate = ended.work.positions / max(self.laps[-1][0], 1e-9)

    @property
    def note(self) -> str:
        """For the progress line."""
        return f"loss {self.loss:.3f} · {self.rate:.0f} tokens/s" if math.isfinite(self.loss) else ""

    def measured(self) -> None:
        """Forgets the time since the last step: it went into what `arms` measured, which says it itself."""
        self.clock, self.waited = time.monotonic(), 0.0

    def _lap(self) -> tuple[float, float]:
        """Seconds since the last call, and those of them spent waiting for the reader."""
        before, self.clock, waited, self.waited = self.clock, time.monotonic(), self.waited, 0.0
        return self.clock - before, waited

    def flush(self, name: str) -> None:
        """Fetches and writes what waits.

        Raises:
          UserError: a loss that is not finite; a gradient that is not, unless the step was skipped for it; a loss scale
            that helps no more.
        """
        fetched = jax.device_get([step.metrics for step in self.waiting])
        late = len(self.waiting) - len(self.laps)
        if late:
            seconds, waited = self._lap()
            self.laps += [(seconds / late, waited / late)] * late
        held = memory() if self.waiting else {}
        for step, metrics, lap in zip(self.waiting, fetched, self.laps, strict=True):
            self.arms.hear(step.arms, metrics.pop("losses"))
            metrics = {key: value.item() for key, value in metrics.items()}
            self._check(name, step.number, metrics)
            norm, work = metrics["gradient_norm"], step.work
            metrics["gradient_norm"] = norm if math.isfinite(norm) else None  # JSON has no infinity
            metrics |= {"positions": work.positions, "filled": round(work.positions / max(work.slots, 1), 4)}
            metrics |= self._measured(work, *lap) | held
            self.rate = metrics["tokens_per_second"]
            self.steps.write(step=step.number, **metrics)
            if self.events:
                self.events.write(step.number, metrics)
        self.waiting.clear()
        self.laps.clear()

    def _measured(self, work: Work, seconds: float, waited: float) -> dict:
        seconds = max(seconds, 1e-9)
        return {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(work.positions / seconds, 1),
            "data_wait": round(waited / seconds, 4),
            "mfu": float(f"{work.flops(self.costs) / seconds / self.peak:.4g}"),
        }

    def _check(self, name: str, step: int, metrics: dict) -> None:
        self.loss, norm, skipped = metrics["loss"], metrics["gradient_norm"], metrics.get("skipped", 0)
        if not math.isfinite(self.loss) or not (math.isfinite(norm) or skipped):
            raise UserError(
                f"{name}: loss {self.loss}, gradient norm {norm} at step {step} "
                f"(steps {self.waiting[0].number}–{self.waiting[-1].number} were checked); "
                f"a lower {name}.learning_rate may help"
            )
        if metrics.get("loss_scale", 1.0) < precision.LOWEST_SCALE:
            raise UserError(
                f"{name}: gradients still overflow float16 at step {step} although the loss scale fell to "
                f"{metrics['loss_scale']:g}; expected device.precision=float32, or a lower {name}.learning_rate"
            )

    def close(self) -> None:
        """Closes the files."""
        self.steps.close()
        self.rounds.close()
        self.arms.close()
        if self.events:
            self.events.close()


def memory() -> dict[str, float]:
    """Peak memory so far in MiB: of the first device where its backend tells it, else of this process."""
    found = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in found:
        return {"device_memory_mib": round(found["peak_bytes_in_use"] / 2**20, 1)}
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return {"host_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)}
