"""--help: the flags that matter, on two screens; --help_all: all of them."""

import argparse
import importlib.metadata
import platform
import shutil
import subprocess
import textwrap
from pathlib import Path

from speech_finetuning.cli.retired import REFUSED, RETIRED_WITHOUT_EFFECT, TOKEN_FLAGS

# The flags that matter, by group, the required ones first: {flag: what it does, in 44 characters}.
SHORT_HELP: dict[str, dict[str, str]] = {
    "required": {
        "model_name_or_path": "Whisper checkpoint: a Hub id or a folder.",
        "dataset_name": "Hub id, folder, or CSV, TSV, JSONL file.",
        "language": "Code or English name; not for .en models.",
        "output_dir": "For checkpoints, the model and reports.",
    },
    "data": {
        "dataset_config_name": "Configuration, often the language.",
        "train_split_name": "Also 'train+validation'.",
        "audio_column_name": "Default: the first of audio, path, ...",
        "text_column_name": "Default: the first of text, sentence, ...",
        "do_lower_case": "Lower-cases transcripts.",
        "do_remove_punctuation": "Removes punctuation from transcripts.",
        "data_mix": "YAML list of several datasets.",
    },
    "scoring": {
        "do_eval": "Scores every --eval_steps and at the end.",
        "eval_split_name": "On this split, or a hold-out.",
        "eval_before_training": "Scores the untouched model, too.",
        "test_split_name": "Scored once, with the best model.",
        "max_eval_samples": "Scores an even sample of N rows.",
        "do_predict": "Transcribes --predict_split_name.",
    },
    "training": {
        "do_train": "Trains.",
        "max_steps": "Length, in optimizer steps;",
        "num_train_epochs": "or in passes; else by the number of rows.",
        "learning_rate": "Default: by model size, 3.75e-5 to 5e-6.",
        "per_device_train_batch_size": "Clips at a time.",
        "gradient_accumulation_steps": "Such batches to a step.",
        "fp16": "Mixed precision; default: what the GPU has.",
        "gradient_checkpointing": "Less memory, more time; default: if needed.",
        "train_window": "full: 30 s. Default: by the clips.",
        "lora_rank": "Low-rank adapters; 0: all weights.",
    },
    "the run": {
        "config": "YAML file of flags and values.",
        "dry_run": "Tries the whole job in a few minutes.",
        "save_steps": "Between checkpoints.",
        "resume_from_checkpoint": "auto: newest here; hub, PATH, no.",
        "max_train_time_in_hours": "Saves and stops after this time.",
        "report_to": "tensorboard, wandb, none ...",
        "push_to_hub": "Uploads the model, to --hub_model_id.",
    },
}
IMPORTANT_FLAGS = [name for group in SHORT_HELP.values() for name in group]
USAGE = """\
usage: python run_speech_recognition_seq2seq_streaming.py --output_dir FOLDER \\
         --model_name_or_path MODEL --dataset_name DATA --language LANGUAGE \\
         --do_train --do_eval [--flag VALUE ...]"""
EPILOGUE = "All flags: --help_all. Recipes: bash run.sh help. More: README.md, docs/."
WIDEST_LINE = 100
TEXT_COLUMN = 35


def short_help(parser: argparse.ArgumentParser) -> str:
    """The flags that matter, on two screens of 24 lines and 80 columns."""
    lines = [USAGE]
    for title, texts in SHORT_HELP.items():
        lines.append(f"{title}:")
        for name, text in texts.items():
            lines += describe_flag(find_action(parser, name), text, WIDEST_LINE)
    return "\n".join([*lines, EPILOGUE])


def full_help(parser: argparse.ArgumentParser) -> str:
    """Every flag in alphabetical order."""
    width = min(WIDEST_LINE, shutil.get_terminal_size().columns)
    lines = [USAGE]
    useless = {*REFUSED, *TOKEN_FLAGS, *RETIRED_WITHOUT_EFFECT}
    for action in sorted(parser._actions, key=first_option):
        is_opposite = first_option(action).startswith("--no_")
        if not is_opposite and action.dest not in useless:
            lines += describe_flag(action, (action.help or "").replace("%%", "%"), width)
    return "\n".join(lines)


def find_action(parser: argparse.ArgumentParser, name: str) -> argparse.Action:
    """The parser's entry for --name."""
    return parser._option_string_actions[f"--{name}"]  # no public name (Python 3.11)


def first_option(action: argparse.Action) -> str:
    return action.option_strings[0]


def describe_flag(action: argparse.Action, text: str, width: int) -> list[str]:
    """One entry: flag and value at the left, text and default at the right."""
    text = " ".join(text.split())
    is_default_told = "default" in text or action.default in (None, False, "", [], -1, 0)
    if not is_default_told:
        text = f"{text} [{action.default}]"
    # An address stays in one piece, so that a terminal opens it.
    body = textwrap.wrap(text, max(20, width - TEXT_COLUMN), break_long_words=False) or [""]
    head = f"  {first_option(action)} {value_name(action)}".rstrip()
    margin = " " * TEXT_COLUMN
    if len(head) >= TEXT_COLUMN:
        return [head, *(f"{margin}{line}" for line in body)]
    return [f"{head:<{TEXT_COLUMN}}{body[0]}", *(f"{margin}{line}" for line in body[1:])]


def value_name(action: argparse.Action) -> str:
    """What stands for the value: N, X (a fraction is possible), the choices, or nothing."""
    if action.nargs == "?":
        return ""
    if action.choices:
        choices = [str(choice) for choice in action.choices]
        return "|".join(choices) if len(choices) < 4 else "NAME"
    names = {int: "N", float: "X"}
    return names.get(action.type, "TEXT")


def version() -> str:
    """The commit of this project and the libraries that decide what it does."""
    folder = Path(__file__).parents[2]
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        commit = ""
    packages = ("torch", "transformers", "datasets", "accelerate", "huggingface_hub")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    python = f"Python {platform.python_version()}"
    return f"speech_finetuning {commit or 'without git'}: {', '.join([python, *versions])}"
