"""The output folder and the repository on the Hub are claimed before any work."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from speech_finetuning.base.errors import DISK_IS_FULL, Problems, UserError
from speech_finetuning.base.network import retry_on_network_error
from speech_finetuning.data.dataset_names import (
    check_has_not_left,
    check_path_exists,
    check_recordings_exist,
)
from speech_finetuning.model.checkpoint_folder import check_is_checkpoint
from speech_finetuning.model.languages import check_is_language
from speech_finetuning.sharing.hub import make_uploads, require_token
from speech_finetuning.sharing.run_info import claim_output_dir, run_identity
from speech_finetuning.sharing.uploads import HubUploads
from speech_finetuning.training.checkpoints import find_checkpoint


@dataclass(kw_only=True)
class Run:
    """The output folder, and what it already has."""

    output_dir: Path
    identity: dict[str, Any]  # what makes two starts the same run
    uploads: HubUploads | None  # None: nothing is pushed, or not by this process
    checkpoint: Path | None  # to continue from


def claim_run(
    model_args: Any,
    data_args: Any,
    training_args: transformers.Seq2SeqTrainingArguments,
    records: list[Any],
) -> Run:
    """Proves that the folder and the Hub may be written, and finds the checkpoint to continue from.

    model_args, data_args, records: the script's. Raises: UserError.
    """
    assert training_args.output_dir is not None
    output_dir = Path(training_args.output_dir)
    identity = run_identity(model_args, records)
    # The main process may download last-checkpoint; the others then find it on disk.
    with training_args.main_process_first(local=False):
        check_claims(identity, training_args, records, recordings_of(data_args))
        uploads = retry_on_network_error(
            make_uploads,
            records,
            training_args,
            task="asking the Hub",
            limit_in_seconds=data_args.max_network_wait_in_seconds,
        )
    training_args.push_to_hub = False  # from here on: the library's own push can hang for ever
    checkpoint = None
    if training_args.do_train:
        checkpoint = find_checkpoint(output_dir, training_args.resume_from_checkpoint)
    make_folder(output_dir)
    return Run(output_dir=output_dir, identity=identity, uploads=uploads, checkpoint=checkpoint)


def recordings_of(data_args: Any) -> dict[str, str]:
    """{flag: name} of the noises and rooms that training clips are mixed with."""
    named = {
        "--noise_dataset": data_args.noise_dataset,
        "--room_dataset": data_args.room_dataset,
    }
    return {flag: name for flag, name in named.items() if name}


def make_folder(output_dir: Path) -> None:
    """Raises: UserError if the folder cannot be made or written to, OSError if the disk is full."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in DISK_IS_FULL:
            raise
        raise UserError(
            f"--output_dir {output_dir}: cannot be made ({error.strerror}). Choose a folder that you "
            "may write to."
        ) from error
    if not os.access(output_dir, os.W_OK):
        raise UserError(
            f"--output_dir {output_dir}: may not be written to. Choose a folder that you may write to."
        )


def check_claims(
    identity: dict[str, Any],
    training_args: transformers.Seq2SeqTrainingArguments,
    records: list[Any],
    recordings: dict[str, str],
) -> None:
    """Raises: UserError if the folder is of another run, nothing may be pushed, or `recordings`, as
    of `recordings_of`, are not there, with what is wrong about the names of the model, the data and
    the languages; if those alone are wrong, only where a repository would be made for them, as
    whoever opens the data tells more at once."""
    assert training_args.output_dir is not None
    problems = Problems()
    problems.attempt(
        "folder",
        functools.partial(claim_output_dir, do_train=training_args.do_train),
        Path(training_args.output_dir),
        identity,
    )
    if training_args.push_to_hub and training_args.process_index == 0:
        problems.attempt("hub", require_token)
    for flag, name in recordings.items():
        problems.attempt(flag, check_recordings_exist, flag, name)
    if problems.messages:
        for record in records:
            problems.attempt("data", check_has_not_left, record.dataset_name)
    if problems.messages or training_args.push_to_hub:
        name = identity["model_name_or_path"]
        problems.attempt("model", check_is_checkpoint, name, f"--model_name_or_path {name}")
        for record in records:
            problems.attempt("data", check_path_exists, record.dataset_name)
            if record.language is not None:
                problems.attempt("language", check_is_language, record.language)
    problems.raise_if_any()
