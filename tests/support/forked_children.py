"""The processes that a run starts for itself, an uploader or a painter, as forks of the run.

A fresh interpreter imports for a quarter of a second to upload a file, and for half a second to draw
a curve: of test_uploads.py that was more than all of its training. A fork has a process id, a
session, a pipe as its stdin and an end of its own as well; what it lacks is a command line and what
libraries read from the environment while they are imported. Where a test is about these, or about
which processes are left, its children are fresh ones.
"""

import gc
import importlib
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import IO

LOOK_IN_SECONDS = 0.01


def fork_children() -> None:
    """From now on `start_child` forks. Its own code, but for the last call, stays in use."""
    from speech_finetuning.base import children

    names = {"PIPE": subprocess.PIPE, "STDOUT": subprocess.STDOUT}
    children.subprocess = SimpleNamespace(Popen=ForkedChild, **names)


class ForkedChild:
    """What `start_child` and those who call it need of subprocess.Popen."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int,
        stdout: IO[str],
        stderr: int,
        env: Mapping[str, str],
        start_new_session: bool,
    ) -> None:
        executable, *options, module = command[:4]
        assert [executable, *options] == [sys.executable, "-P", "-m"]
        assert stdin == subprocess.PIPE and stderr == subprocess.STDOUT and start_new_session
        self.returncode: int | None = None
        readable, writable = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            live(module, command[4:], readable, stdout.fileno(), env)
        os.close(readable)
        self.stdin = os.fdopen(writable, "wb")

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises: TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(LOOK_IN_SECONDS)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def live(
    module: str, words: Sequence[str], stdin: int, output: int, env: Mapping[str, str]
) -> None:
    """The life of a fork."""
    code = 1
    try:
        forget_the_run(stdin, output)
        os.environ.clear()
        os.environ.update(env)
        code = importlib.import_module(module).main(list(words))
    except SystemExit as ending:  # of argparse
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def forget_the_run(stdin: int, output: int) -> None:
    """Its session, files, signals and log."""
    os.setsid()
    for target, descriptor in enumerate((stdin, output, output)):
        os.dup2(descriptor, target)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    logging.getLogger().handlers.clear()
    gc.disable()  # walking through the libraries' objects would copy them
