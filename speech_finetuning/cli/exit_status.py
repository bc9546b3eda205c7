"""How a run ends: exit codes, one line instead of a traceback, exit_status.json.

A refused start is no run: it leaves the exit_status.json of a run that has ended alone.
"""

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speech_finetuning.base.errors import (
    DISK_IS_FULL,
    ExitCode,
    RunEnded,
    TimeIsOver,
    UserError,
    memory_that_is_out,
    one_line,
)
from speech_finetuning.base.files import command_line, lies_among_data, printable, write_json
from speech_finetuning.base.shutdown import StopSignals, end_workers
from speech_finetuning.cli.flags import find_value, is_on, with_config_file
from speech_finetuning.cli.out_of_memory import DUPLICATE_GPU, describe_out_of_memory
from speech_finetuning.cli.terminal import SCREEN, fitted

# run.sh names a file of its own in this variable, because torchrun swallows its children's codes.
LAUNCHER_VARIABLE = "EXIT_STATUS_FILE"
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)  # to read, to write, on such a disk
MAX_CLOCK_SKEW_IN_SECONDS = 2.0  # of a file server
GO_ON = "To go on, start the same command again."
# When the present start began, as file systems tell the time: older files are of earlier starts.
_start = {"time": time.time()}


def exit_code_of(main: Callable[..., Any], argv: list[str] | None = None) -> int:
    """`main` for the shell: its exit code. The reason is told in one line, on the terminal and in
    exit_status.json.

    Raises: what nobody expected, after noting it as code 1.
    """
    argv = sys.argv[1:] if argv is None else argv
    _start["time"] = time.time()
    code = ExitCode.CRASHED
    reason = "crashed"
    is_planned = False
    try:
        with StopSignals() as stop:
            main(argv, stop)
        code = ExitCode.DONE
        reason = "done"
    except Exception as error:
        ending = ending_of(error, argv)
        if ending is None:
            raise
        code = ending.code
        reason = ending.reason
        is_planned = isinstance(ending, TimeIsOver)
    finally:
        SCREEN.hide_bar()
        end_workers()
        # A dry run leaves nothing, and ends with 0 or 2.
        is_first = write_exit_status([] if is_dry_run(argv) else argv, code, reason)
    if is_dry_run(argv) and 0 < code < 128:
        code = ExitCode.REFUSED
    if code and is_first:
        report(code, reason, is_planned=is_planned)
    return code


def ending_of(error: Exception, argv: list[str]) -> RunEnded | None:
    """The exit code and the reason of an expected failure; None for a bug."""
    import torch  # here, because this module is needed before torch has been imported

    from speech_finetuning.base.network import ending_within  # likewise

    if ending := ending_within(error):
        return ending
    if isinstance(error, UserError):
        return RunEnded(ExitCode.REFUSED, str(error))
    if kind := memory_that_is_out(error):
        reason = describe_out_of_memory(kind, error, all_words(argv))
        return RunEnded(ExitCode.OUT_OF_MEMORY, reason)
    if DUPLICATE_GPU in str(error):
        reason = "more processes than GPUs. Start one for each GPU: --nproc_per_node, NUM_PROCESSES"
        return RunEnded(ExitCode.REFUSED, reason)
    if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
        advice = "Free some of it and start the same command again."
        return RunEnded(ExitCode.DISK_FULL, f"the disk is full: {one_line(error)} {advice}")
    if isinstance(error, OSError) and error.errno in NOT_ALLOWED and error.filename:
        advice = "Change who may use it, or name another place"
        if ".cache" in str(error.filename):
            advice += ": HF_HOME=FOLDER is where the libraries keep what they download"
        return RunEnded(ExitCode.REFUSED, f"{error.filename}: {error.strerror}. {advice}.")
    if isinstance(error, RuntimeError) and "shared memory(shm)" in str(error):
        reason = (
            f"shared memory is full: {one_line(error)} In Docker: --shm-size 2g; else: df /dev/shm"
        )
        return RunEnded(ExitCode.REFUSED, reason)
    is_of_processes = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
    if isinstance(error, RuntimeError) and is_of_processes:
        return RunEnded(ExitCode.TRY_AGAIN, f"another process of this run has ended. {GO_ON}")
    return None


def report(code: int, reason: str, *, is_planned: bool = False) -> None:
    """Tells the reason on the terminal; being stopped by a signal, or on time, is no error."""
    if code == 128 + signal.SIGINT:
        lines = [f"stopped by Ctrl-C. {GO_ON}"]
    elif code > 128 or is_planned:
        lines = [f"stopped: {reason}. {GO_ON}"]
    else:
        lines = [f"error: {printable(line)}" for line in reason.splitlines()]
    for line in lines:
        sys.stderr.write("".join(f"{piece}\n" for piece in fitted(line)))


def all_words(argv: list[str]) -> list[str]:
    """The command line with its --config file, if that can be read: if not, others report it."""
    with contextlib.suppress(UserError):
        return with_config_file(argv)
    return argv


def is_dry_run(argv: list[str]) -> bool:
    """Whether --dry_run is given. Must be known even if the rest of the command line is wrong."""
    return is_on(all_words(argv), "dry_run")


def is_of_earlier_start(file: Path) -> bool:
    """Also one from the future: a clock was set back since then, and this start has written nothing
    that is newer than now."""
    if not file.is_file():
        return False
    written = file.stat().st_mtime
    return written < _start["time"] or written > time.time() + MAX_CLOCK_SKEW_IN_SECONDS


def forget_earlier_ending(output_dir: Path) -> None:
    """Removes exit_status.json of an earlier start: from here on the folder's run is unfinished.

    A file that another process of this start has just written stays.
    """
    file = output_dir / "exit_status.json"
    if is_of_earlier_start(file):
        file.unlink(missing_ok=True)


def write_exit_status(argv: list[str], code: int, reason: str) -> bool:
    """Writes exit_status.json, if there is an output folder to write to, and the launcher's file.

    Of several processes the first one to fail writes: the others only lose theirs by that. Returns
    whether this process is the one to tell the reason.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    files = status_files(argv, code)
    if not files or not (is_main or code):
        return is_main
    record = {"code": code, "reason": reason, "command": command_line(argv)}
    was_first = [write_if_first(file, record) for file in files]
    return any(was_first)


def status_files(argv: list[str], code: int) -> list[Path]:
    """The files that this ending is written to."""
    files = []
    if argv and os.environ.get(LAUNCHER_VARIABLE):
        files.append(Path(os.environ[LAUNCHER_VARIABLE]))
    words = all_words(argv)
    output_dir = find_value(words, "output_dir")
    if lies_among_data(find_value(words, "dataset_name"), output_dir or ""):
        return files  # refused, and a file of ours must not become one of the data
    if output_dir is not None and os.access(output_dir, os.W_OK) and Path(output_dir).is_dir():
        file = Path(output_dir) / "exit_status.json"
        if not (code == ExitCode.REFUSED and is_of_earlier_start(file)):
            files.append(file)
    return files


def write_if_first(file: Path, record: dict[str, Any]) -> bool:
    """Writes the record, unless another process of this start already has."""
    if is_of_earlier_start(file):
        file.unlink(missing_ok=True)
    try:
        file.touch(exist_ok=False)
        write_json(file, record)
    except FileExistsError:
        return False
    except OSError:  # the disk is full, say: then it is told on the terminal alone
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    return True
