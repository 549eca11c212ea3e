"""Progress that a person can read: what is done, the rate, the time left. On a terminal one line is rewritten; in a log
file or a job's output a line appears every few seconds."""

import sys
import time


def duration(seconds: float) -> str:
    """Seconds as 45 s, 3 min 20 s or 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _per_time(rate: float) -> str:
    """A rate a second, or a minute or an hour where it is slow."""
    each, unit = next((each, unit) for each, unit in ((1, "s"), (60, "min"), (3600, "h")) if each * rate >= 1 or unit == "h")
    return f"{each * rate:,.0f}/{unit}"


def next_steps(seconds: float, steps: dict[str, str]) -> str:
    """What stands at the end of a job: how long it took, and what to do with it: purpose → command or place."""
    lines = [f"  {purpose:<23} {command}" for purpose, command in steps.items()]
    return "\n".join([f"Done in {duration(seconds)}. What to do next:", *lines, ""])


def say(text: str = "") -> None:
    """One line to the user, at once."""
    print(text, flush=True)


class Progress:
    """Progress of one stage; used as a context. `total` may be unknown (None)."""

    def __init__(self, stage: str, unit: str, total: int | None = None):
        self.stage, self.unit, self.total = stage, unit, total
        self.done, self.share, self.started, self.shown = 0, 0.0, time.monotonic(), 0.0
        self.first: tuple[float, int, float] | None = None  # when the first of it was done: until then, workers start
        self.terminal = sys.stdout.isatty()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._show(last=True)

    def update(self, done: int, share: float = 0.0) -> None:
        """Tell how much is done so far; and what share of the whole that is, where there is no total."""
        changed, self.done, self.share = done != self.done, done, done / self.total if self.total else share
        if changed and not self.first:
            self.first = (time.monotonic(), self.done, self.share)
        if changed and time.monotonic() - self.shown > (0.2 if self.terminal else 5.0):
            self._show()

    def _show(self, last: bool = False) -> None:
        now = time.monotonic()
        began, done, share = (self.started, 0, 0.0) if last or not self.first else self.first
        rate = (self.done - done) / max(now - began, 1e-9)
        parts = [f"{self.stage:<9} {self.done:>11,}"]
        parts.append(f"of {self.total:,} {self.unit}" if self.total and not last else self.unit)
        if self.share and not last:
            parts.append(f" {self.share:4.0%}")
        if last:
            parts.append(f"  {_per_time(rate)}   in {duration(now - self.started)}")
        elif rate:
            parts.append(f"  {_per_time(rate)}")
            if self.share > share:
                parts.append(f"  {duration((now - began) * (1 - self.share) / (self.share - share))} left")
        end = "\n" if last or not self.terminal else "\r"
        print(("\x1b[2K" if self.terminal else "") + " ".join(parts), end=end, flush=True)
        self.shown = now
