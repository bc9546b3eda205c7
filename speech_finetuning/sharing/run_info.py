"""What makes two starts the same run, and what repeats it."""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import command_line, lies_among_data, redacted
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.sharing.public import is_hub_name, public_identity

PROJECT = Path(__file__).parents[2]
PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "huggingface_hub",
    "evaluate",
    "jiwer",
    "soundfile",
    "soxr",
    "numpy",
)


def run_identity(model_args: Any, records: list[Any]) -> dict[str, Any]:
    """What makes two starts the same run: the model, and which data is read how."""
    sources = [
        {
            "dataset_name": record.dataset_name,
            "dataset_config_name": record.dataset_config_name,
            "train_split_name": record.train_split_name,
            "audio_column_name": record.audio_column_name,
            "text_column_name": record.text_column_name,
            "language": record.language,
            "task": record.task,
            # Left out of others, which had no such entry when older runs began.
            **({"guard": True} if record.guard else {}),
        }
        for record in records
    ]
    model = {
        "model_name_or_path": model_args.model_name_or_path,
        "model_revision": model_args.model_revision,
        "lora_rank": model_args.lora_rank,
    }
    if len(sources) == 1:
        return model | sources[0]
    return model | {"data_mix": sources}


def claim_output_dir(output_dir: Path, identity: dict[str, Any], *, do_train: bool) -> None:
    """Makes sure that the folder, which may be './', holds no weights or checkpoints of another
    run, and that the card of trained weights is not written over by the scores of others.
    Raises: UserError."""
    for name in hub_names_of(identity)[1:]:
        if lies_among_data(name, output_dir):  # of a --data_mix: the flag was looked at before
            raise UserError(
                f"--output_dir {output_dir} lies in the folder of the data {name}, where the next "
                "start would take the run's files for data. Choose a folder beside it."
            )
    patterns = ("checkpoint-*", "*.safetensors", "pytorch_model*.bin")
    weights = [path for pattern in patterns for path in output_dir.glob(pattern)]
    if not weights:
        return
    previous = read_identity(output_dir / "run_info.json")
    # A clone of the repository on the Hub has the record without local names.
    hub_names = [name for name in hub_names_of(identity) if is_hub_name(name)]
    uploaded = public_identity(identity, hub_names)
    changed = [
        f"{name} was {previous.get(name)!r}"
        for name, value in identity.items()
        if previous.get(name) not in (value, uploaded[name])
    ]
    if changed:
        reason = "; ".join(changed) if previous else "there is no run_info.json of this script"
        raise UserError(
            f"--output_dir {output_dir} has {weights[0].name} of another run ({reason}). "
            "Choose another."
        )
    if not do_train:
        raise UserError(
            f"--output_dir {output_dir} has the trained {weights[0].name}, but without --do_train "
            f"{identity['model_name_or_path']} is scored. To score the trained model: "
            f"--model_name_or_path {output_dir} and another --output_dir."
        )


def read_identity(record: Path) -> dict[str, Any]:
    """The identity in a run_info.json; empty if there is no such file of this script's."""
    try:
        return json.loads(record.read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def hub_names_of(identity: dict[str, Any]) -> list[str]:
    """The model and the data sets of a run: names on the Hub or local paths."""
    sources = identity.get("data_mix", [identity])
    return [identity["model_name_or_path"], *(source["dataset_name"] for source in sources)]


def describe_git(folder: Path) -> str | None:
    """The commit that the code is of, with -dirty if it was changed since; None outside git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def describe_machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def describe_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
    versions["torch"] = torch.__version__  # with its build
    return versions


def describe_dataset(dataset: SpeechDataset) -> dict[str, Any]:
    source = dataset.source
    split = source.split
    num_rows = source.num_rows
    if dataset.is_held_out and dataset.selection is not None:
        split = f"{split} (hold-out)"
        num_rows = dataset.selection.num_held_out
    return {
        "record": source.record,
        "name": source.name,
        "config_name": source.config_name,
        "split": split,
        "kind": source.kind,
        "revision": source.revision,
        "num_rows": num_rows,
    }


def collect_run_info(
    *,
    argv: list[str],
    arguments: dict[str, Any],
    speech: dict[str, list[SpeechDataset]],
    identity: dict[str, Any],
    base_licence: str | None,
    phases: list[dict[str, Any]],
) -> dict[str, Any]:
    """What is needed to understand and repeat the run: run_info.json. `sharing.public` makes of it
    what is uploaded. speech: data sets by role; phases: see training.phases. hub_names: whatever else is
    named is local."""
    return {
        "command": command_line(argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "phases": phases,
        "identity": identity,
        "arguments": json.loads(redacted(json.dumps(arguments, default=str))),
        "versions": describe_versions(),
        "git": describe_git(PROJECT),
        "data": {
            role: [describe_dataset(dataset) for dataset in datasets]
            for role, datasets in speech.items()
        },
        "machine": describe_machine(),
        "hub_names": sorted(set(filter(is_hub_name, hub_names_of(identity)))),
        "base_licence": base_licence,
    }


def names_of_sets(info: dict[str, Any]) -> list[str]:
    """Those of the evaluation sets of a --data_mix that have lines of their own beside the total.
    info: as `collect_run_info` makes it."""
    names = [source["record"] for source in info["data"].get("eval", []) if source["record"]]
    # Beside guards, a single set is the total.
    return names if len(names) > 1 or not names_of_guards(info) else []


def names_of_guards(info: dict[str, Any]) -> list[str]:
    """Those of the sets that must not get worse."""
    return [source["record"] for source in info["data"].get("guard", [])]
