"""Processes that end with the one that started them."""

import ctypes
import os
import signal
import sys
import threading

ORPHANED = 1  # exit code

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent_pid: int) -> None:
    """Ends this process when its parent ends, however that happens.

    Even kill -9 closes the parent's end of the pipe that is our stdin. On Linux the kernel is asked
    as well: a process that the parent has forked, like a reading worker, holds that end open for a
    few seconds longer.
    """
    threading.Thread(target=exit_at_end_of_input, daemon=True).start()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # the parent ended before the kernel was asked
            os._exit(ORPHANED)


def exit_at_end_of_input() -> None:
    """Waits for the parent to close the pipe. Nothing is ever written into it."""
    # Not sys.stdin: a thread that holds its lock makes Python crash on a regular exit.
    os.read(0, 1)
    os._exit(ORPHANED)
