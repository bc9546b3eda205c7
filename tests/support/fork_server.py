"""Real processes without their imports: a server that has done them forks one for each start.

    with ForkServer(environment) as server:
        process = server.start(words, log=tmp_path / "log")
        assert process.wait(60) == 0

Importing torch and transformers costs four seconds of CPU time, which is most of what a test of a
process takes. A fork has a process id, a session, signals, an exit code and an environment of its
own, as a process that was started by a shell; only what libraries read from the environment while
they are imported (HF_ENDPOINT, HF_HOME) is the server's. Linux and macOS only, as the signals are.
"""

import contextlib
import importlib
import json
import os
import queue
import resource
import runpy
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parent
PROJECT = SUPPORT.parents[1]
SCRIPT = PROJECT / "run_speech_recognition_seq2seq_streaming.py"
LOOK_IN_SECONDS = 0.02


class ForkedProcess:
    """What a test needs of subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.has_ended = threading.Event()

    def wait(self, timeout: float) -> int:
        """The exit code, or minus the signal's number. Raises: TimeoutExpired, after a kill."""
        if not self.has_ended.wait(timeout):
            os.kill(self.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        assert self.returncode is not None
        return self.returncode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class ForkServer:
    """The server's process and its forks. `sleeps_at_most` shortens every time.sleep of a fork and
    of the processes that it starts, so that back-offs of a minute take as many seconds as it says.
    `imports` are the modules that forks begin with, instead of those of a run.
    """

    def __init__(
        self,
        environment: Mapping[str, str] | None = None,
        *,
        sleeps_at_most: float | None = None,
        imports: Sequence[str] = (),
    ) -> None:
        self.imports = imports
        self.environment = {"HF_HUB_OFFLINE": "1", **os.environ}
        if environment is not None:
            self.environment = dict(environment)
        self.environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        if sleeps_at_most is not None:
            self.environment |= {
                "PYTHONPATH": str(SUPPORT / "short_sleeps"),
                "SLEEPS_AT_MOST": str(sleeps_at_most),
            }
        self.processes: dict[int, ForkedProcess] = {}
        self.started: queue.Queue[ForkedProcess] = queue.Queue()

    def __enter__(self) -> "ForkServer":
        self.server = subprocess.Popen(
            [sys.executable, __file__, *self.imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
            text=True,
        )
        threading.Thread(target=self.listen, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        for process in self.processes.values():  # also what those that have ended left behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(60)

    def listen(self) -> None:
        """Hears from the server of forks that have begun or ended, until it leaves."""
        assert self.server.stdout is not None
        for line in self.server.stdout:
            message = json.loads(line)
            pid = message["pid"]
            if "code" not in message:
                self.processes[pid] = ForkedProcess(pid)
                self.started.put(self.processes[pid])
                continue
            process = self.processes[pid]
            process.returncode = message["code"]
            process.has_ended.set()

    def start(
        self,
        words: Sequence[str | Path],
        *,
        log: Path,
        output: Path | None = None,
        program: Path = SCRIPT,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        max_file_size_in_bytes: int | None = None,
        forks_children: bool = False,
    ) -> ForkedProcess:
        """Runs a program, by default the script. What it writes is appended to `log`, and its
        standard output to `output` if that is given. forks_children: see forked_children.py."""
        job = {
            "words": [str(word) for word in words],
            "log": str(log),
            "output": str(log if output is None else output),
            "program": str(program),
            "cwd": None if cwd is None else str(cwd),
            "environment": dict(environment or {}),
            "max_file_size_in_bytes": max_file_size_in_bytes,
            "forks_children": forks_children,
        }
        log.touch()
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return self.started.get(timeout=120)


def run_fork(job: dict[str, Any]) -> int:
    """In the fork: becomes the program. Returns its exit code."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, descriptor in (("output", 1), ("log", 2)):
        # To read as well: else a terminal would not become the one whose Ctrl-C this process gets.
        os.dup2(os.open(job[name], os.O_CREAT | os.O_RDWR | os.O_APPEND), descriptor)
    if job["cwd"] is not None:
        os.chdir(job["cwd"])
    os.environ.update(job["environment"])
    if job["max_file_size_in_bytes"] is not None:
        limit = job["max_file_size_in_bytes"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if job["forks_children"]:
        from forked_children import fork_children

        fork_children()
    sys.argv = [job["program"], *job["words"]]
    sys.path[0] = str(Path(job["program"]).parent)  # as python does for a script
    try:
        runpy.run_path(job["program"], run_name="__main__")
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)  # as Python does
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve(imports: Sequence[str]) -> None:
    """Reads jobs, forks, and tells which forks have begun and ended, until its input is closed."""
    sys.path[:0] = [str(PROJECT), str(SUPPORT)]
    for name in imports:
        importlib.import_module(name)
    if not imports:
        from warm import warm_up

        warm_up()
    jobs = iter(sys.stdin.readline, "")
    while True:
        if select.select([sys.stdin], [], [], LOOK_IN_SECONDS)[0]:
            line = next(jobs, None)
            if line is None:
                return
            pid = os.fork()
            if pid == 0:
                leave(json.loads(line))
            tell(pid=pid)
        tell_of_ended_forks()


def leave(job: dict[str, Any]) -> None:
    """The life of a fork."""
    code = 1
    try:
        code = run_fork(job)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def tell_of_ended_forks() -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            tell(pid=pid, code=os.waitstatus_to_exitcode(status))


def tell(**message: int) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve(sys.argv[1:])
    os._exit(0)  # nothing to tidy up; leaving the libraries would take seconds
