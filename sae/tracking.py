"""Trackers of metrics, only when asked for: tensorboard, wandb, trackio; in a thread that training never waits for."""

import contextlib
import os
import queue
import threading
from pathlib import Path
from typing import Any

from sae.extras import require

__all__ = ["TRACKERS", "Tracker"]

TRACKERS = ("tensorboard", "wandb", "trackio")
ROOM = 1000  # rows that wait for a slow tracker; the oldest go first
PATIENCE = 10.0  # seconds that the end of a run waits for a tracker


class Tracker:
    """Sends the numbers of a run to a tracker: never a prompt, weights or text; wandb stays offline without a key.

    Used as a context. What the tracker raises is kept in `error` and stops nothing.
    """

    def __init__(self, kind: str, folder: Path, config: dict[str, Any]) -> None:
        if kind not in TRACKERS:
            raise ValueError(f"there is no tracker {kind!r}; there are: {', '.join(TRACKERS)}")
        self.kind, self.folder, self.config = kind, folder, config
        self.module = require("torch.utils.tensorboard" if kind == "tensorboard" else kind, "track")
        self.error: Exception | None = None
        self._rows: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(ROOM)
        self._thread = threading.Thread(target=self._work, name=f"sae-{kind}", daemon=True)

    def __enter__(self) -> "Tracker":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.log(0, {}, last=True)
        self._thread.join(PATIENCE)

    def log(self, step: int, row: dict[str, float], *, last: bool = False) -> None:
        """Hand over the numbers of a step; at once, whatever the tracker does."""
        while True:
            try:
                return self._rows.put_nowait(None if last else (step, row))
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._rows.get_nowait()

    def _work(self) -> None:
        try:
            send, close = self._open()
            while (row := self._rows.get()) is not None:
                send(*row)
            close()
        except Exception as error:  # a tracker must not cost a run; runs.fit says what happened
            self.error = error

    def _open(self) -> tuple[Any, Any]:
        if self.kind == "tensorboard":
            writer = self.module.SummaryWriter(str(self.folder / "tensorboard"))
            return lambda step, row: [writer.add_scalar(k, v, step) for k, v in row.items()], writer.close
        if self.kind == "wandb":
            logged_in = os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").exists()
            run = self.module.init(
                project="sae", dir=str(self.folder), config=self.config, mode=None if logged_in else "offline",
                settings=self.module.Settings(silent=True, disable_git=True, disable_code=True, console="off"),
            )  # fmt: skip
            return lambda step, row: run.log(row, step=step), run.finish
        self.module.init(project="sae", name=self.folder.name, config=self.config)
        return lambda step, row: self.module.log(row, step=step), self.module.finish
