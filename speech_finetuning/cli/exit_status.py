"""How a run ends: exit codes, one line instead of a traceback."""

import errno
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from speech_finetuning.base.errors import RunEnded, UserError, one_line
from speech_finetuning.base.files import redacted, write_json
from speech_finetuning.base.shutdown import StopSignals
from speech_finetuning.cli.flags import ArgumentParser


def exit_code_of(main: Callable[..., Any], argv: list[str] | None = None) -> int:
    """`main` for the shell: one line instead of a traceback for all that has a known end, exit_status.json always."""
    argv = sys.argv[1:] if argv is None else argv
    code, reason = 1, "crashed"
    is_dry = any(
        word.split("=")[0] == "--dry_run" for word in argv
    )  # it leaves nothing, and ends with 0 or 2
    write_exit_status(argv if not is_dry else [], None, "")
    try:
        with StopSignals() as stop:
            main(argv, stop)
        code, reason = 0, "done"
    except UserError as error:
        code, reason = 2, str(error)
    except RunEnded as ending:
        code, reason = ending.code, ending.reason
    except torch.OutOfMemoryError as error:
        advice = "halve --per_device_train_batch_size and double --gradient_accumulation_steps (the same global batch)"
        code, reason = (
            74,
            f"out of GPU memory: {advice}, or add --gradient_checkpointing. {one_line(error)[:200]}",
        )
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        code, reason = (
            73,
            f"the disk is full: {one_line(error)} Free some of it and start the same command again.",
        )
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        code, reason = (
            75,
            "another process of this run has ended. To go on, start the same command again.",
        )
    finally:
        is_first = write_exit_status(argv if not is_dry else [], code, reason)
    code = 2 if is_dry and 0 < code < 128 else code
    if code and is_first:
        for line in reason.splitlines():
            sys.stderr.write(f"error: {line}\n")
    return code


def write_exit_status(argv: list[str], code: int | None, reason: str) -> bool:
    """exit_status.json for run.sh (torchrun swallows its children's codes), if there is an output_dir to write to. Of
    several processes the first to fail writes it: the others only lose theirs by that. code None: removes an old one.
    Returns whether this process is the one to say it."""
    parser, nowhere = ArgumentParser([], add_help=False, allow_abbrev=False), Path("/dev/null")
    parser.add_argument("--output_dir", type=Path, nargs="?", default=nowhere, const=nowhere)
    folder = parser.parse_known_args(argv)[0].output_dir
    path, is_main = folder / "exit_status.json", os.environ.get("RANK", "0") == "0"
    if not (folder.is_dir() and os.access(folder, os.W_OK) and (is_main or code)):
        return is_main
    if code is None:
        path.unlink(missing_ok=True)
        return False
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    command = redacted(shlex.join(["python", Path(sys.argv[0]).name, *argv]))
    write_json(path, {"code": code, "reason": reason, "command": command})
    return True
