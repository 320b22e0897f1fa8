"""What a run leaves while it goes on: metrics, the progress line, trackers; and how it is stopped between two steps."""

import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sae.io import FormatError, atomic_write
from sae.tracking import Tracker
from sae.training import Step

__all__ = ["Papers", "deferred", "differences", "keep_log", "read_log"]


class Papers:
    """The logs of the SAEs that are trained together. Used as a context."""

    def __init__(self, members: Sequence[Any], every: int, progress: bool, track: str | None) -> None:
        from tqdm import tqdm

        self.members, self.every, self.track = members, every, track
        self.stack = ExitStack()
        cfg, begun = members[0].trainer.cfg, members[0].trainer.tokens
        self.bar = tqdm(
            total=cfg.steps * cfg.batch_size, initial=begun, unit="vec", unit_scale=True, disable=not progress,
            dynamic_ncols=True, mininterval=0.5,
        )  # fmt: skip
        self.files: list[Any] = []
        self.trackers: list[Tracker] = []

    def __enter__(self) -> "Papers":
        self.stack.enter_context(self.bar)
        for member in self.members:
            if member.out is None or member.trainer.world.rank:
                continue
            self.files.append(self.stack.enter_context(open(member.out / "metrics.jsonl", "a", encoding="utf-8")))
            if self.track is not None:
                config = {"name": member.name, "d_sae": member.sae.d_sae, "arch": member.sae.config.arch}
                self.trackers.append(self.stack.enter_context(Tracker(self.track, member.out, config)))
        if self.track is not None and not self.trackers:
            raise ValueError("a tracker needs a folder for its run: give out")
        return self

    def __exit__(self, *exc: object) -> None:
        self.stack.close()
        for tracker in self.trackers:
            if tracker.error is not None:
                import warnings

                warnings.warn(f"{tracker.kind} failed, metrics.jsonl is whole: {tracker.error}", stacklevel=2)

    def note(self, steps: Sequence[Step], *, last: bool) -> None:
        """Log a step of every member, if it is one of those that are logged."""
        self.bar.update(steps[0].tokens - self.bar.n)
        if steps[0].step % self.every and not last:
            return
        for number, (member, step) in enumerate(zip(self.members, steps, strict=True)):
            row = step.as_dict()
            member.log.append(row)
            if self.files:
                self.files[number].write(json.dumps(row) + "\n")
                self.files[number].flush()
            if self.trackers:
                self.trackers[number].log(step.step, {k: float(v) for k, v in row.items() if k != "step"})
        row = self.members[0].log[-1]
        more = f" (first of {len(steps)})" if len(steps) > 1 else ""
        self.bar.set_postfix_str(f"fve {row['fve']:.3f}, L0 {row['l0']:.1f}, dead {row['dead']:.1%}{more}")


class _Pending:
    """Signals that came during a step."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.handlers: dict[int, Any] = {}

    def hold(self, number: int, frame: Any) -> None:
        """Keep a signal for the end of the step; a second Ctrl-C stops at once."""
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def release(self) -> None:
        """Let a signal that came during the step do what it does: raise KeyboardInterrupt, or end the process."""
        if self.number is None:
            return
        number, self.number = self.number, None
        handler = self.handlers[number]
        if callable(handler):
            handler(number, None)
        elif handler == signal.SIG_DFL:
            raise SystemExit(128 + number)


@contextmanager
def deferred() -> Iterator[_Pending]:
    """Hold SIGINT and SIGTERM back until `release`, so that a step is done or not begun. Main thread only."""
    pending = _Pending()
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        pending.handlers[number] = signal.signal(number, pending.hold)
    try:
        yield pending
    finally:
        for number, handler in pending.handlers.items():
            signal.signal(number, handler)


def read_log(path: Path) -> list[dict[str, int | float]]:
    """Return the rows of a metrics.jsonl; a last line that was cut off is left out. Raises FormatError for others."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines) - 1:
                raise FormatError(f"{path} is damaged at line {number + 1}") from error
    return rows


def keep_log(path: Path, step: int) -> list[dict[str, int | float]]:
    """Cut a metrics.jsonl back to the steps that a checkpoint has seen; return its rows."""
    rows = [row for row in read_log(path) if row["step"] <= step]
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows


def differences(held: Any, wanted: Any, name: str) -> list[str]:
    """Return where two JSON values differ, as "name is a there, b here"."""
    if isinstance(held, Mapping) and isinstance(wanted, Mapping):
        keys = sorted({*held, *wanted})
        inside = [differences(held.get(k), wanted.get(k), f"{name}.{k}".removeprefix(".")) for k in keys]
        return [line for lines in inside for line in lines]
    return [] if held == wanted else [f"{name} is {held!r} there, {wanted!r} here"]
