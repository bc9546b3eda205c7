"""Processes that end with the one that started them."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

ORPHANED = 1  # exit code

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PROJECT = Path(__file__).parents[2]


def start_child(module: str, words: list[str], log: Path, **variables: str) -> subprocess.Popen:
    """A process that runs a module of this package, which calls `end_with_parent` with what
    --parent_pid says. log: where it writes to; variables: of its environment. Raises: OSError."""
    search_path = [str(PROJECT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search_path))}
    with open(log, "w", encoding="utf-8") as output:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, *words, "--parent_pid", str(os.getpid())],
            stdin=subprocess.PIPE,  # its end tells the child that this process has ended
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment | variables,
            # The terminal's Ctrl-C is for the trainer, which decides.
            start_new_session=True,
        )


def end_child(child: subprocess.Popen) -> None:
    """Ends it, if it has not ended, and lets go of what it held."""
    child.kill()
    child.wait()
    if child.stdin is not None:
        child.stdin.close()


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
