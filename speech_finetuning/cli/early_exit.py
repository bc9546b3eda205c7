"""What is answered before torch is imported: --help, --version and mistakes on the command line.

Importing torch and transformers takes seconds (benchmarks/early_exit.md).
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from speech_finetuning.base.errors import ExitCode, Problems, UserError
from speech_finetuning.cli.checks import check_words
from speech_finetuning.cli.exit_status import (
    is_dry_run,
    report,
    write_exit_status,
)
from speech_finetuning.cli.flags import (
    find_value,
    flag_groups,
    flag_name,
    is_on,
    with_config_file,
)
from speech_finetuning.cli.help import full_help, short_help, version
from speech_finetuning.cli.source_flags import read_parser
from speech_finetuning.cli.terminal import say_starting
from speech_finetuning.cli.translation import translate


def answer_early(argv: list[str], script: str, *, looks_at_names: bool = True) -> None:
    """Ends the process with an answer if the command line is a question or cannot be right.

    The script checks everything again; it takes longer to begin. script: its file, whose
    dataclasses are the flags. looks_at_names: whether model and data are there by now.
    """
    signal.signal(signal.SIGINT, leave)
    asked = {flag_name(group[0]) for group in flag_groups(argv)}
    if "version" in asked:
        answer(version())
    parser = read_parser(Path(script))
    if "help_all" in asked:
        answer(full_help(parser))
    if "help" in asked or "-h" in argv:
        answer(short_help(parser))
    try:
        words = translate(with_config_file(argv)).words
        check_words(words, parser)
        if looks_at_names:
            say_starting()
            check_names(words)
    except UserError as error:
        reason = str(error)
        if write_exit_status([] if is_dry_run(argv) else argv, ExitCode.REFUSED, reason):
            report(ExitCode.REFUSED, reason)
        sys.exit(ExitCode.REFUSED)


def check_names(words: list[str]) -> None:
    """Looks at what the names of model, data, noises and language are of, on this disk.

    Left to the script, which tells them along with more: what is pushed, and the entries of a mix.
    Raises: UserError with all of them.
    """
    if is_on(words, "push_to_hub") or find_value(words, "data_mix"):
        return
    # A second or two; a start needs them anyway, and the answers above do not.
    from speech_finetuning.data.dataset_names import (
        check_has_not_left,
        check_path_exists,
        check_recordings_exist,
    )
    from speech_finetuning.model.checkpoint_folder import check_is_checkpoint
    from speech_finetuning.model.languages import check_is_language

    problems = Problems()
    if model := find_value(words, "model_name_or_path"):
        problems.attempt("model", check_is_checkpoint, model, f"--model_name_or_path {model}")
    data = find_value(words, "dataset_name")
    if data:
        problems.attempt("data", check_path_exists, data)
    if language := find_value(words, "language"):
        problems.attempt("language", check_is_language, language)
    for flag in ("noise_dataset", "room_dataset"):
        if recordings := find_value(words, flag):
            problems.attempt(flag, check_recordings_exist, f"--{flag}", recordings)
    if data and problems.messages:
        problems.attempt("data", check_has_not_left, data)
    problems.raise_if_any()


def answer(text: str) -> None:
    """Prints the text and ends the process."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # as of `--help_all | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def leave(number: int, frame: Any) -> None:
    """Ctrl-C before anything has begun, or when all is over and Python ends: without a traceback,
    which an exception would have within the libraries' own last calls."""
    report(128 + number, "")
    os._exit(128 + number)


if __name__ == "__main__":
    # `bash run.sh learn` and `smoke`, before they make their model and data: SCRIPT FLAGS...
    answer_early(sys.argv[2:], sys.argv[1], looks_at_names=False)
