"""The output folder and the repository on the Hub are claimed before any work."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from speech_finetuning.base.network import retry_on_network_error
from speech_finetuning.sharing.hub import make_uploads
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
    claim_output_dir(output_dir, identity, do_train=training_args.do_train)
    # The main process may download last-checkpoint; the others then find it on disk.
    with training_args.main_process_first(local=False):
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
    output_dir.mkdir(parents=True, exist_ok=True)
    return Run(output_dir=output_dir, identity=identity, uploads=uploads, checkpoint=checkpoint)
