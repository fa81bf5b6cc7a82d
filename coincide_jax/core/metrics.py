"""What a run tells while it works: lines on the screen, progress with time left, JSON lines and events on disk."""

import json
import os
import pathlib
import sys
import time

import tqdm

from coincide_jax.core import processes
from coincide_jax.core.errors import UserError

LOG_EVERY_SECONDS = 10.0  # one line this often when the output is no terminal
# keys of a line that tell of the clock and the machine: two runs that are the same differ in nothing else
MEASURED = ("seconds", "tokens_per_second", "data_wait", "mfu", "device_memory_mib", "host_memory_mib")


def say(stage: str, text: str) -> None:
    """Prints one line of a stage; safe beside a progress bar. Of several processes the one that leads does."""
    if not processes.leads():
        return
    tqdm.tqdm.write(f"[{stage}] {text}", file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """Shows stage, done/total, rate and time left: a bar on a terminal, a log line every 10 s elsewhere.

    first: units that an earlier run has done, which the rate leaves out."""

    def __init__(self, stage: str, total: int, unit: str, first: int = 0):
        self.stage, self.total, self.unit, self.first = stage, total, unit, first
        self.done, self.begin, self.last = first, time.monotonic(), time.monotonic()
        self.terminal = sys.stderr.isatty() and processes.leads()
        self.bar = tqdm.tqdm(
            total=total, initial=first, unit=f" {unit}", desc=stage, disable=not self.terminal, leave=False
        )

    def advance(self, count: int, note: str = "") -> None:
        """Adds `count` finished units; `note` (a loss, an objective) is shown beside the rate."""
        self.done += count
        self.bar.update(count)
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        now = time.monotonic()
        if not self.terminal and now - self.last >= LOG_EVERY_SECONDS:
            self.last = now
            rate = (self.done - self.first) / max(now - self.begin, 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            tail = f" · {note}" if note else ""
            say(self.stage, f"{self.done}/{self.total} {self.unit} · {rate:.1f}/s · {left:.0f} s left{tail}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()


class JsonLines:
    """Appends one JSON object a line; a line is on disk before the call returns. Of several processes the one that
    leads writes."""

    def __init__(self, path: pathlib.Path):
        if processes.leads():
            path.parent.mkdir(parents=True, exist_ok=True)
        real = path if processes.leads() else pathlib.Path(os.devnull)
        self.path, self.file = path, real.open("ab", buffering=0)  # nothing is left to be written when it is closed

    def write(self, **values) -> None:
        """Writes one line.

        Raises:
          UserError: it cannot be written, or not whole, for want of room; readers leave half a line out.
        """
        line = (json.dumps(values) + "\n").encode()
        try:
            written = self.file.write(line)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from error
        if written < len(line):
            raise UserError(f"{self.path} cannot be written: {written} of {len(line)} bytes had room")

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


class Events:
    """Numbers as TensorBoard events, through tensorboardX, which nothing else imports.

    Raises:
      UserError: tensorboardX is not installed.
    """

    def __init__(self, folder: pathlib.Path, step: int):
        """Events after `step`, which an earlier run may have left in the folder, are hidden by TensorBoard."""
        try:
            import tensorboardX
        except ImportError as error:
            raise UserError(
                "TensorBoard events are asked for, but tensorboardX is not installed; "
                "expected pip install tensorboardX, or tensorboard=False"
            ) from error
        self.writer = tensorboardX.SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, values: dict) -> None:
        """Those of `values` that are numbers."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what waits and closes the file."""
        self.writer.close()
