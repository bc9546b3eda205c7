"""What flags say that cannot be, as far as that needs neither torch nor the data.

The functions named `..._problems` yield one line for each problem, so that one start tells them
all. They take what argparse has read, before it becomes dataclasses.
"""

import argparse
import difflib
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import is_too_long, lies_among_data
from speech_finetuning.cli.flags import read_yaml, word_problems
from speech_finetuning.cli.guards import guard_problems

FRACTIONS = (
    "eval_fraction",
    "max_rejected_fraction",
    "full_window_fraction",
    "timestamp_probability",
    "noise_probability",
    "room_probability",
    "telephone_probability",
    "prompt_probability",
)
# None: nothing was given.
POSITIVE = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "eval_steps",
    "save_steps",
    "logging_steps",
    "max_train_time_in_hours",
    "max_train_samples",
    "max_eval_samples",
    "generation_max_length",
    "generation_num_beams",
)
NOT_NEGATIVE = (
    "seed",
    "data_seed",
    "learning_rate",
    "lora_rank",
    "warmup_steps",
    "weight_decay",
    "max_network_wait_in_minutes",
    "max_guard_loss_in_points",
)
NAMES_OF_FILES = (
    "model_name_or_path",
    "dataset_name",
    "data_mix",
    "output_dir",
    "exclude_rows",
    "noise_dataset",
    "room_dataset",
)
# Flags of training, and the value with which each does nothing.
OF_TRAINING_ONLY = {
    "train_window": None,
    "pack_utterances": False,
    "timestamp_probability": 0.0,
    "apply_spec_augment": False,
    "speed_perturbation": False,
    "noise_dataset": None,
    "room_dataset": None,
    "telephone_probability": 0.0,
    "gain_in_db": [],
    "nonspeech_fraction": 0.0,
}
# Flags of what another one names, likewise.
OF_NOISE_ONLY = {"noise_probability": 0.5, "noise_snr_in_db": []}
OF_ROOMS_ONLY = {"room_probability": 0.5}
OF_PROMPTS_ONLY = {"prompt_probability": 0.5}
MOST_NONSPEECH = 0.5  # of the training rows: else speech would be the exception
LARGEST_SEED = 2**32 - 1  # of numpy's
RANGES_IN_DB = ("noise_snr_in_db", "gain_in_db")
# Flags of the hold-out that --do_eval makes, likewise.
OF_SCORING_ONLY = {"eval_fraction": 0.1, "speaker_column_name": None}
# {value of --report_to: the package that it needs}, of transformers 5.24.
TRACKERS = {
    "azure_ml": "azureml",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet_ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "kubeflow": "kubeflow",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}


def task_problems(flags: argparse.Namespace) -> Iterator[str]:
    """What to do, and with which data."""
    if not (flags.model_name_or_path or flags.check_data):
        yield "--model_name_or_path is missing. Pass --model_name_or_path openai/whisper-small, say."
    if not (flags.do_train or flags.do_eval or flags.do_predict or flags.check_data):
        yield "nothing to do. Pass --do_train, --do_eval, --do_predict or --check_data."
    yield from output_problems(flags)
    if flags.dataset_name and flags.data_mix:
        yield "--dataset_name and --data_mix: pass one, not both."
    if not (flags.dataset_name or flags.data_mix):
        yield "--dataset_name is missing. Pass a Hub id, a folder or a table; or --data_mix FILE."
    if flags.max_steps > 0 and flags.num_train_epochs:
        yield "pass --max_steps or --num_train_epochs, not both."
    if flags.long_form and not (flags.do_eval or flags.do_predict):
        yield "--long_form needs --do_eval or --do_predict."
    if flags.group_column_name and not (flags.do_eval or flags.test_split_name):
        yield "--group_column_name needs --do_eval or --test_split_name: it groups scored rows."
    yield from prompt_problems(flags)
    if flags.dry_run and not flags.do_train:
        yield "--dry_run needs --do_train."


def prompt_problems(flags: argparse.Namespace) -> Iterator[str]:
    """What the model reads before a clip; entries of --data_mix may name columns of their own."""
    if flags.prompt_column_name is None and flags.data_mix is None:
        yield from idle_problems(flags, OF_PROMPTS_ONLY, "--prompt_column_name")


def length_problems(flags: argparse.Namespace) -> Iterator[str]:
    """Names that no file system takes, which every look at them would raise an error of."""
    for flag in NAMES_OF_FILES:
        if is_too_long(getattr(flags, flag) or ""):
            yield f"--{flag} {getattr(flags, flag)[:40]}...: too long for the name of a file."


def output_problems(flags: argparse.Namespace) -> Iterator[str]:
    """Where the results go."""
    if not flags.output_dir:
        yield "--output_dir is missing. Pass --output_dir FOLDER."
    elif Path(flags.output_dir).is_file():
        yield f"--output_dir {flags.output_dir}: a file. Pass a folder; it is made if need be."
    elif lies_among_data(flags.dataset_name, flags.output_dir):
        yield (
            f"--output_dir {flags.output_dir} lies in the folder of the data, where the next start "
            "would take the run's files for data. Choose a folder beside it."
        )


def file_problems(flags: argparse.Namespace) -> Iterator[str]:
    """Files that are named and not there, or of no use."""
    if flags.exclude_rows and not Path(flags.exclude_rows).is_file():
        yield (
            f"--exclude_rows {flags.exclude_rows}: there is no such file. Pass one with an id on each "
            "line, such as the suspects.jsonl of --check_data."
        )


def package_problems(flags: argparse.Namespace) -> Iterator[str]:
    """Packages that flags need, beyond the requirements."""
    yield from tracker_problems(flags)
    if flags.deepspeed and importlib.util.find_spec("deepspeed") is None:
        yield (
            "--deepspeed: the package deepspeed is not installed. Run pip install deepspeed, or leave "
            "out --deepspeed."
        )


def tracker_problems(flags: argparse.Namespace) -> Iterator[str]:
    """Where curves go to, which needs a package."""
    name = flags.report_to
    if name in ("none", "all"):
        return
    if name not in TRACKERS:
        nearest = difflib.get_close_matches(name, TRACKERS, n=1, cutoff=0.75)
        question = f" Did you mean {nearest[0]}?" if nearest else ""
        yield f"--report_to {name}: unknown. Known: {', '.join(sorted(TRACKERS))}, none.{question}"
    elif importlib.util.find_spec(TRACKERS[name]) is None:
        package = TRACKERS[name]
        yield (
            f"--report_to {name}: the package {package} is not installed. Run pip install {package}, "
            "or leave out --report_to for TensorBoard."
        )


def training_problems(flags: argparse.Namespace) -> Iterator[str]:
    """Flags that need training to have an effect, and what a stream cannot do."""
    if not flags.do_train:
        yield from idle_problems(flags, OF_TRAINING_ONLY, "--do_train")
    if not flags.do_eval:
        yield from idle_problems(flags, OF_SCORING_ONLY, "--do_eval")
    # 0.1 is the default, which nobody asked for.
    if flags.train_window != "longest" and flags.full_window_fraction not in (0.1, 1):
        yield "--full_window_fraction needs --train_window longest. Add it."
    if not flags.predict_with_generate:
        yield "--predict_with_generate False: WER needs real generation. Leave it out."
    for name in ("eval_strategy", "save_strategy"):
        if getattr(flags, name) == "epoch":
            yield f"--{name} epoch: a stream has no epochs. Use --{name} steps."


def augmentation_problems(flags: argparse.Namespace) -> Iterator[str]:
    """What training clips are made to sound like."""
    if flags.noise_dataset is None:
        yield from idle_problems(flags, OF_NOISE_ONLY, "--noise_dataset")
    elif flags.noise_probability == 0 and flags.nonspeech_fraction == 0:
        yield "--noise_dataset: of no effect with --noise_probability 0."
    if flags.room_dataset is None:
        yield from idle_problems(flags, OF_ROOMS_ONLY, "--room_dataset")
    elif flags.room_probability == 0:
        yield "--room_dataset: of no effect with --room_probability 0."
    if not 0 <= flags.nonspeech_fraction <= MOST_NONSPEECH:
        yield (
            f"--nonspeech_fraction {flags.nonspeech_fraction:g}: must lie between 0 and "
            f"{MOST_NONSPEECH}. Pass 0.05, say."
        )
    for name in RANGES_IN_DB:
        values = getattr(flags, name)
        if values and (len(values) != 2 or values[0] > values[1]):
            given = " ".join(f"{value:g}" for value in values)
            yield f"--{name} {given}: pass two numbers, the lower one first, as --{name} 5 20."


def idle_problems(
    flags: argparse.Namespace, idle_values: dict[str, Any], needed: str
) -> Iterator[str]:
    """Flags that only do something together with the one that is needed, and were given."""
    idle = [f"--{name}" for name, value in idle_values.items() if getattr(flags, name) != value]
    if idle:
        yield f"{' and '.join(idle)}: of no effect without {needed}."


def best_model_problems(flags: argparse.Namespace) -> Iterator[str]:
    """Flags that compare models, for which one must be trained and scored."""
    if not (flags.do_train and flags.do_eval):
        is_given = {
            "early_stopping_patience": flags.early_stopping_patience is not None,
            "eval_before_training": flags.eval_before_training,
            "load_best_model_at_end": flags.load_best_model_at_end,
            "max_guard_loss_in_points": flags.max_guard_loss_in_points is not None,
            "average_checkpoints": flags.average_checkpoints > 1,
            "base_weight_shares": bool(flags.base_weight_shares),
        }
        for name in filter(is_given.get, is_given):
            yield f"--{name} needs --do_train and --do_eval."
    yield from saving_problems(flags)
    if flags.average_checkpoints < 1:
        yield "--average_checkpoints must be at least 1 (1 takes the trained weights as they are)."
    elif flags.save_total_limit and flags.save_total_limit < flags.average_checkpoints:
        yield (
            f"--average_checkpoints {flags.average_checkpoints}: --save_total_limit "
            f"{flags.save_total_limit} keeps fewer. Use --save_total_limit "
            f"{flags.average_checkpoints}."
        )
    if any(not 0 <= share <= 1 for share in flags.base_weight_shares):
        yield "--base_weight_shares must lie between 0 (as trained) and 1 (the untouched model)."


def saving_problems(flags: argparse.Namespace) -> Iterator[str]:
    """A checkpoint that is to be the best one must have been scored. Shares of a run, below 1, are
    left to the library."""
    between_evaluations = flags.eval_steps
    between_saves = flags.save_steps
    if not flags.load_best_model_at_end or not between_evaluations or not between_saves:
        return
    if min(between_evaluations, between_saves) < 1 or flags.save_strategy != "steps":
        return
    if between_saves % between_evaluations:
        fitting = math.ceil(between_saves / between_evaluations) * between_evaluations
        yield (
            f"--save_steps {between_saves:g}: --load_best_model_at_end needs a multiple of "
            f"--eval_steps {between_evaluations:g}. Pass --save_steps {fitting:g}."
        )


def number_problems(flags: argparse.Namespace) -> Iterator[str]:
    """Numbers outside what they can mean."""
    for name in FRACTIONS:
        if not 0 <= getattr(flags, name) <= 1:
            yield f"--{name} {getattr(flags, name):g}: must lie between 0 and 1."
    yield from sign_problems(flags)
    shortest = flags.min_duration_in_seconds
    longest = flags.max_duration_in_seconds
    if shortest >= longest:
        yield f"--min_duration_in_seconds {shortest} is not below the longest, {longest}."
    if flags.report_clips < 0:
        yield "--report_clips must be at least 0 (0: no sound and no pictures in report.html)."
    if flags.shuffle_buffer_size < 1:
        yield "--shuffle_buffer_size must be at least 1 (1 keeps the files' order)."
    if flags.num_decoding_threads is not None and flags.num_decoding_threads < 1:
        yield "--num_decoding_threads must be at least 1."
    num_workers = flags.dataloader_num_workers
    if num_workers > 1:
        yield (
            f"--dataloader_num_workers {num_workers}: one worker reads. "
            f"Use --num_decoding_threads {num_workers}."
        )


def sign_problems(flags: argparse.Namespace) -> Iterator[str]:
    """Numbers that cannot be 0, or below it."""
    for name in POSITIVE:
        value = getattr(flags, name)
        if value is not None and value <= 0:
            yield f"--{name} {value:g}: must be above 0. Leave it out for the usual value."
    if flags.max_steps == 0 or flags.max_steps < -1:  # -1 is the library's default
        yield f"--max_steps {flags.max_steps}: must be above 0. Leave it out for the usual length."
    for name in NOT_NEGATIVE:
        value = getattr(flags, name)
        if value is not None and value < 0:
            yield f"--{name} {value:g}: must not be below 0."
    if flags.seed > LARGEST_SEED:
        yield f"--seed {flags.seed}: must not be above {LARGEST_SEED}."


def precision_problems(flags: argparse.Namespace) -> Iterator[str]:
    if flags.fp16 and flags.bf16:
        yield "--fp16 and --bf16: pass one, not both."


def hub_problems(flags: argparse.Namespace) -> Iterator[str]:
    """What is pushed and fetched."""
    if flags.push_predictions and not flags.push_to_hub:
        yield "--push_predictions needs --push_to_hub."
    if flags.hub_always_push:
        yield "--hub_always_push is refused: the newest save always follows a running upload."
    if flags.resume_from_checkpoint == "hub" and not flags.hub_model_id:
        yield "--resume_from_checkpoint hub needs --hub_model_id USER/NAME."
    if flags.push_to_hub and flags.data_mix:
        yield from unnamed_problems(flags.data_mix)


def unnamed_problems(path: str) -> Iterator[str]:
    """Entries of a --data_mix that would be called as their folder: the name goes to the Hub, within
    those of scores and rows."""
    try:
        entries = read_yaml("--data_mix", path, list, "")
    except UserError:  # told when the data are opened
        return
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or "name" in entry:
            continue
        name = str(entry.get("dataset_name", ""))
        if Path(name).exists():
            yield (
                f"--data_mix {path}, entry {number}: with --push_to_hub, local data need a "
                "'name: ...', as it is uploaded with their scores and their own name is not."
            )


def check_words(words: list[str], parser: argparse.ArgumentParser) -> None:
    """Checks a whole command line: first each flag by itself, then what they say together.

    Raises: UserError with a line for each problem, the most basic first.
    """
    problems = list(word_problems(words, parser))
    if not problems:  # else a misspelt flag would seem to be missing
        flags = parser.parse_args(words)
        problems += length_problems(flags)
    if not problems:
        problems += [
            *task_problems(flags),
            *file_problems(flags),
            *training_problems(flags),
            *augmentation_problems(flags),
            *best_model_problems(flags),
            *guard_problems(flags),
            *number_problems(flags),
            *precision_problems(flags),
            *hub_problems(flags),
            *package_problems(flags),
        ]
    if problems:
        raise UserError(*problems)
