"""The settings that shape the weights: a finished run keeps those that it was trained with."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.selection import describe_excluded, read_excluded_ids

OF_THE_RUN = (
    "freeze_encoder",
    "train_window",
    "full_window_fraction",
    "pack_utterances",
    "timestamp_probability",
    "apply_spec_augment",
    "speed_perturbation",
    "noise_dataset",
    "noise_probability",
    "noise_snr_in_db",
    "room_dataset",
    "room_probability",
    "telephone_probability",
    "gain_in_db",
    "nonspeech_fraction",
    "shuffle_buffer_size",
    # of transformers' TrainingArguments
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "seed",
    "data_seed",
    "fp16",
    "bf16",
)
# Which data set, in which language: that makes two starts the same run, see sharing.run_info.
OF_A_SOURCE = (
    "weight",
    "max_train_samples",
    "exclude_rows",
    "eval_fraction",
    "speaker_column_name",
    "max_duration_in_seconds",
    "min_duration_in_seconds",
    "do_lower_case",
    "do_remove_punctuation",
    "keep_empty_text",
    "prompt_column_name",
    "prompt_probability",
)


def training_settings(arguments: dict[str, Any], records: Iterable[Any]) -> dict[str, Any]:
    """By the name for a message: a flag, or the entry of --data_mix with its own value.

    arguments: all flags, after what depends on the model and the data was filled in. records: the
    script's. Raises: UserError if a list of rows to leave out cannot be read.
    """
    settings = {f"--{name}": arguments[name] for name in OF_THE_RUN}
    for record in records:
        if record.guard:  # which is only scored
            continue
        for name in OF_A_SOURCE:
            place = f"--data_mix, {record.name}: {name}" if record.name else f"--{name}"
            settings[place] = value_for_record(record, name)
    return json.loads(json.dumps(settings, default=str))  # as a checkpoint has them


def value_for_record(record: Any, name: str) -> Any:
    """Of --exclude_rows the rows, not the path: a checkpoint may be uploaded, and continued on
    another machine."""
    if name == "exclude_rows":
        return describe_excluded(read_excluded_ids(record.exclude_rows))
    return getattr(record, name)


def is_of_no_path(name: str, value: Any) -> bool:
    """False for a setting of a version that saved the path of --exclude_rows."""
    if value is None or not name.endswith("exclude_rows"):
        return True
    return re.fullmatch(r"a list of \d+ \([0-9a-f]{12}\)", value) is not None


def saved_settings(checkpoint: Path) -> dict[str, Any]:
    """Those of a checkpoint. One of an older version has the flags in run_info.json beside it."""
    state = json.loads((checkpoint / "stream_state.json").read_text(encoding="utf-8"))
    saved = state.get("settings")
    if not saved:
        try:
            record = (checkpoint.parent / "run_info.json").read_text(encoding="utf-8")
            saved = {f"--{name}": value for name, value in json.loads(record)["arguments"].items()}
        except (OSError, ValueError, KeyError):
            return {}
    return {name: value for name, value in saved.items() if is_of_no_path(name, value)}


def is_finished(state: dict[str, Any], max_steps: int, patience: int | None) -> bool:
    """Whether nothing is left to train. state: a checkpoint's trainer_state.json; patience: of the
    early stopping now, None: without."""
    stopper = state["stateful_callbacks"].get("EarlyStoppingCallback")
    if patience is not None and stopper is not None:
        if stopper["attributes"]["early_stopping_patience_counter"] >= patience:
            return True
    return state["global_step"] >= max_steps


def check_finished_run(checkpoint: Path, settings: dict[str, Any], patience: int | None) -> None:
    """Raises UserError if nothing is left to train and the flags are others than those of the
    training: the weights would not be what the model's card then says."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if not is_finished(state, settings["--max_steps"], patience):
        return
    saved = saved_settings(checkpoint)
    changed = [
        f"{name} was {saved[name]}, is now {value}"
        for name, value in settings.items()
        if name in saved and saved[name] != value
    ]
    if changed:
        raise UserError(
            f"{checkpoint} is the end of a training, whose flags were others: "
            f"{'; '.join(changed)}. Pass those of then; or a larger --max_steps, to train on with "
            "the new ones; or another --output_dir, for another run."
        )
