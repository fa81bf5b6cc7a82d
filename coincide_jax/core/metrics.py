"""What a run tells while it works: lines on the screen, progress with time left, JSON lines on disk."""

import json
import pathlib
import sys
import time

import tqdm

LOG_EVERY_SECONDS = 10.0  # one line this often when the output is no terminal


def say(stage: str, text: str) -> None:
    """Prints one line of a stage; safe beside a progress bar."""
    tqdm.tqdm.write(f"[{stage}] {text}", file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """Shows stage, done/total, rate and time left: a bar on a terminal, a log line every 10 s elsewhere."""

    def __init__(self, stage: str, total: int, unit: str):
        self.stage, self.total, self.unit = stage, total, unit
        self.done, self.begin, self.last = 0, time.monotonic(), time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm.tqdm(total=total, unit=f" {unit}", desc=stage, disable=not self.terminal, leave=False)

    def advance(self, count: int, note: str = "") -> None:
        """Adds `count` finished units; `note` (a loss, an objective) is shown beside the rate."""
        self.done += count
        self.bar.update(count)
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        now = time.monotonic()
        if not self.terminal and now - self.last >= LOG_EVERY_SECONDS:
            self.last = now
            rate = self.done / max(now - self.begin, 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            tail = f" · {note}" if note else ""
            say(self.stage, f"{self.done}/{self.total} {self.unit} · {rate:.1f}/s · {left:.0f} s left{tail}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()


class JsonLines:
    """Appends one JSON object a line; a line is on disk before the call returns."""

    def __init__(self, path: pathlib.Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8")

    def write(self, **values) -> None:
        """Writes one line."""
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Closes the file."""
        self.file.close()
