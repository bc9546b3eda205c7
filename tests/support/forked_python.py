"""An interpreter for what starts others itself: torchrun, accelerate, run.sh, a notebook.

    with ForkedPython(folder) as python:
        environment |= {"PYTHON_EXEC": str(python)}  # what torchrun starts its ranks with

The launcher is real, and starts `python`, a real process with the rank's environment. That one asks
a server, which has done the imports of the script, for a fork with its arguments, environment,
folder and descriptors; hands signals on to it; ends when it ends, and alike. A kill of it kills the
fork. So a start costs a tenth of a second instead of the 5.5 of importing torch and transformers.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SUPPORT = Path(__file__).parent


class ForkedPython:
    """The server's process and the executable file that asks it."""

    def __init__(self, folder: Path) -> None:
        self.address = folder / "forks.socket"
        self.executable = folder / "python"

    def __enter__(self) -> Path:
        self.executable.write_text(
            f'#!/bin/sh\nexec {sys.executable} -S {__file__} ask {self.address} "$@"\n'
        )
        self.executable.chmod(0o755)
        self.server = subprocess.Popen(
            [sys.executable, __file__, "serve", self.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        assert self.server.stdout is not None
        assert self.server.stdout.readline() == b"ready\n"
        return self.executable

    def __exit__(self, *error: Any) -> None:
        self.server.kill()
        self.server.wait(60)


# ------------------------------------------------------------------------------------- the client


def ask(address: str, words: list[str]) -> int:
    """Has the server run a program, and waits. Returns its exit code."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(address)
    job = {"words": words, "environment": dict(os.environ), "cwd": os.getcwd()}
    socket.send_fds(connection, [json.dumps(job).encode() + b"\n"], [0, 1, 2])
    answers = connection.makefile()
    pid = int(answers.readline())
    for number in HANDED_ON:
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    code = int(answers.readline())
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


# ------------------------------------------------------------------------------------- the server


def serve(address: str) -> None:
    """Forks for each connection, until it is killed."""
    sys.path[:0] = [str(SUPPORT.parents[1]), str(SUPPORT)]
    from warm import warm_up

    warm_up()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen()
    os.write(1, b"ready\n")
    while True:
        connection, _ = listener.accept()
        received, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        while not received.endswith(b"\n"):
            received += connection.recv(1 << 20)
        job = json.loads(received)
        pid = os.fork()
        if pid == 0:
            connection.close()
            listener.close()
            become(job, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(b"%d\n" % pid)
        threading.Thread(target=tell_of_the_end, args=(pid, connection), daemon=True).start()
        threading.Thread(target=kill_with_client, args=(pid, connection), daemon=True).start()


def tell_of_the_end(pid: int, connection: socket.socket) -> None:
    """The client learns how its fork has ended."""
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def kill_with_client(pid: int, connection: socket.socket) -> None:
    """A client says nothing more: what is read is its end, of which the fork dies."""
    with contextlib.suppress(OSError):
        connection.recv(1)
        os.kill(pid, signal.SIGKILL)  # one that has ended is gone, or a zombie


def become(job: dict[str, Any], descriptors: list[int]) -> None:
    """In the fork: the program, with the client's environment, folder and descriptors."""
    code = 1
    try:
        os.setsid()
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["cwd"])
        code = run(job["words"])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run(words: list[str]) -> int:
    """As `python -u program flags...` or `python -m module flags...`. Returns the exit code."""
    import runpy

    words = [word for number, word in enumerate(words) if number or word != "-u"]
    is_module = words[0] == "-m"
    sys.argv = words[1:] if is_module else words
    sys.path[0] = os.getcwd() if is_module else str(Path(words[0]).parent)
    try:
        if is_module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    sys.exit(ask(sys.argv[2], sys.argv[3:]))
