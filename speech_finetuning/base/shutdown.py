"""Signals that end a run between two steps."""

import multiprocessing
import os
import signal
import sys
from types import TracebackType
from typing import Any

from speech_finetuning.base.errors import RunEnded

STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
]
SAVING_TIME_IN_SECONDS = 120  # what a worker gives its parent to write a checkpoint


class StopSignals:
    """Turns SIGTERM, SIGINT, SIGHUP and SIGUSR1 into RunEnded(128 + n). Use as a context manager.

    RunEnded is raised at once or, while `is_deferred` (inside a step or a save), at the next
    `check`. A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.is_deferred = False
        self.handlers_before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            self.handlers_before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: Any) -> None:
        """The signal handler. Raises: RunEnded unless deferred."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.received is not None:
            return
        self.received = number
        # Not through the logger: the signal may have interrupted a write to stderr, whose buffer
        # then refuses a second one.
        # On a terminal over the bar, and the ^C that the terminal has put behind it.
        start = "\r\x1b[2K" if os.isatty(2) else "\n"
        more = " Ctrl-C once more ends it at once." if number == signal.SIGINT else ""
        message = f"{start}{signal.Signals(number).name} received: saving and stopping.{more}\n"
        os.write(2, message.encode())
        if not self.is_deferred:
            self.check()

    def ending(self) -> RunEnded:
        """How the run ends after the signal that has come."""
        assert self.received is not None
        return RunEnded(128 + self.received, f"ended by {signal.Signals(self.received).name}")

    def check(self) -> None:
        """Raises: RunEnded if a signal has come."""
        if self.received is not None:
            raise self.ending()


def ignore_signals(worker_id: int) -> None:
    """For the reading worker: a terminal or Slurm signals the whole group, but the parent decides.

    SIGTERM, which the DataLoader itself sends at its end, gives the parent two minutes to save; a
    second one ends the worker at once.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_in_two_minutes)
    sys.excepthook = report_unless_parent_left


def end_in_two_minutes(number: int, frame: Any) -> None:
    """The worker's first SIGTERM; the next one has its usual effect."""
    signal.alarm(SAVING_TIME_IN_SECONDS)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def report_unless_parent_left(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """sys.excepthook of the worker: the usual one, but silent about a parent that has gone.

    multiprocessing's resource_sharer, a thread of the worker, meets a closed connection when the
    parent ends while it fetches a batch. Errors of the rows are not affected: they travel as data.
    """
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, traceback)


def end_workers() -> None:
    """Ends the reading workers of a process that is about to leave: what is worth saving is saved.

    multiprocessing would ask them by SIGTERM and wait, while they give their parent the time to
    save (see `ignore_signals`): after a crash 2 min 11 s with the GPU held.
    """
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
            child.join()
