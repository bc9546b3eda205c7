"""Signals that end a run between two steps."""

import os
import signal
import sys
from typing import Any

from speech_finetuning.base.errors import RunEnded

STOP_SIGNALS = [
    getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, n)
]


class StopSignals:
    """Turns SIGTERM, SIGINT, SIGHUP and SIGUSR1 into RunEnded(128 + n), at once or, while `is_deferred` (inside a step
    or a save), at the next `check`. A second Ctrl-C ends the process at once. Use as a context manager."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.is_deferred = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self.handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.received is None:
            self.received = number
            # Not through the logger: the signal may have come in the middle of a write to stderr, which then raises.
            os.write(
                2, f"\n{signal.Signals(number).name} received: saving and stopping.\n".encode()
            )
            if not self.is_deferred:
                self.check()

    def ending(self) -> RunEnded:
        """What the signal that has come means."""
        return RunEnded(128 + self.received, f"ended by {signal.Signals(self.received).name}")

    def check(self) -> None:
        """Raises: RunEnded if a signal has come."""
        if self.received is not None:
            raise self.ending()


def ignore_signals(worker_id: int) -> None:
    """For the reading worker: a terminal or Slurm signals the whole group, but the parent decides. SIGTERM, which the
    DataLoader itself uses at its end, gives the parent two minutes to save; a second one ends the worker at once."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(
        signal.SIGTERM,
        lambda *_: (signal.alarm(120), signal.signal(signal.SIGTERM, signal.SIG_DFL)),
    )
    sys.excepthook = lambda *_: (
        None
    )  # of a parent that leaves while it fetches a batch; our errors travel as data
