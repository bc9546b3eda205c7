"""What makes two starts the same run, and what repeats it."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import redacted
from speech_finetuning.data.preprocessing import SpeechDataset


def run_identity(model_args: Any, records: list[Any]) -> dict[str, Any]:
    """What makes two starts the same run; a folder that holds another one's weights is refused."""
    names = "dataset_name dataset_config_name train_split_name audio_column_name text_column_name language task"
    sources = [{name: getattr(record, name) for name in names.split()} for record in records]
    model = {
        name: getattr(model_args, name)
        for name in ("model_name_or_path", "model_revision", "lora_rank")
    }
    return {**model, **(sources[0] if len(sources) == 1 else {"data_mix": sources})}


def check_output_dir(output_dir: Path, identity: dict[str, Any]) -> None:
    """Raises UserError if output_dir holds weights or checkpoints that are not this run's (it may be './' if not)."""
    patterns = ("checkpoint-*", "*.safetensors", "pytorch_model*.bin")
    weights = [path for pattern in patterns for path in output_dir.glob(pattern)]
    if not weights:
        return
    record = output_dir / "run_info.json"
    previous = (
        json.loads(record.read_text(encoding="utf-8")).get("identity", {})
        if record.is_file()
        else {}
    )
    changed = [
        f"{name} was {previous.get(name)!r}"
        for name, value in identity.items()
        if previous.get(name) != value
    ]
    if changed:
        reason = "; ".join(changed) if previous else "there is no run_info.json of this script"
        raise UserError(
            f"--output_dir {output_dir} has {weights[0].name} of another run ({reason}). Choose another."
        )


def run_info(
    argv: list[str], arguments: dict, sets: dict[str, list[SpeechDataset]], identity: dict
) -> dict[str, Any]:
    """What is needed to understand and repeat the run: command, arguments, versions, git, data, machine."""
    packages = (
        "torch transformers datasets accelerate huggingface_hub evaluate jiwer soundfile soxr numpy"
    )
    versions = {name: importlib.metadata.version(name) for name in packages.split()}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names = ("record", "name", "config_name", "split", "kind", "revision", "num_rows")
    data = {
        role: [{n: getattr(item.source, n) for n in names} for item in items]
        for role, items in sets.items()
    }
    machine = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }
    return {
        "command": redacted(shlex.join(["python", Path(sys.argv[0]).name, *argv])),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "identity": identity,
        "arguments": json.loads(redacted(json.dumps(arguments, default=str))),
        "versions": {
            "python": platform.python_version(),
            **versions,
            "torch": torch.__version__,
        },  # with its build
        "git": subprocess.getoutput(
            f"git -C '{Path(__file__).parents[2]}' describe --always --dirty --abbrev=40"
        ),
        "data": data,
        "machine": machine,
    }
