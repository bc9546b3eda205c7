"""What ends with a process that leaves."""

import multiprocessing
import signal
import time

from speech_finetuning.base.shutdown import end_workers, ignore_signals


def read_for_ever() -> None:
    """A reading worker that gives its parent the time to save."""
    ignore_signals(0)
    while True:
        time.sleep(1)


def test_workers_end_with_their_parent_and_torch_keeps_its_handler():
    handler = signal.getsignal(signal.SIGCHLD)
    worker = multiprocessing.get_context("fork").Process(target=read_for_ever, daemon=True)
    worker.start()
    try:
        end_workers()
        assert not worker.is_alive()
        assert worker.exitcode == -signal.SIGKILL  # not SIGTERM, which it would wait out
        assert signal.getsignal(signal.SIGCHLD) == handler
    finally:
        worker.kill()
