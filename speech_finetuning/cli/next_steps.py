"""The end of the screen: where the model is, and what can be done with it."""

import logging
import os
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import transformers

from speech_finetuning.cli.terminal import shown, typed

logger = logging.getLogger(__name__)

PROJECT = Path(__file__).parents[2]
# Transcripts and worst clips of the last one of these that is there.
ROLES = ("test", "eval", "predict")


def say_what_next(args: transformers.Seq2SeqTrainingArguments, uploads: Any) -> None:
    """The last lines of a run. uploads: HubUploads, or None if nothing is pushed."""
    assert args.output_dir is not None
    output_dir = Path(args.output_dir)
    steps = {**next_steps(output_dir, args), **hub_step(output_dir, uploads)}
    if args.do_train:
        logger.info("done: the model is in %s (%s)", shown(output_dir), size_of_model(output_dir))
    else:
        logger.info("done: the results are in %s", shown(output_dir))
    for name, step in steps.items():
        logger.info("  %-12s %s", name, step, extra={"keeps_lines": True})


def next_steps(output_dir: Path, args: transformers.Seq2SeqTrainingArguments) -> dict[str, str]:
    """{what: the command or the file}, of what this run has left behind."""
    steps: dict[str, str] = {}
    folder = typed(output_dir)
    recipes = PROJECT / "run.sh"
    if args.do_train and recipes.is_file():
        run_sh = typed(recipes)
        steps["transcribe"] = f"bash {run_sh} transcribe {folder} FILE"
        steps["try it"] = f"bash {run_sh} demo {folder}"
    if "tensorboard" in cast(list[str], args.report_to):  # since its __post_init__
        steps["curves"] = f"tensorboard --logdir {typed(folder_of_curves(output_dir))}"
    files = {"report": [output_dir / "report.html"]}
    files["worst clips"] = [output_dir / f"worst_{role}.txt" for role in ROLES]
    files["transcripts"] = [output_dir / f"predictions_{role}.jsonl" for role in ROLES]
    for name, paths in files.items():
        found = [path for path in paths if path.is_file()]
        if found:
            steps[name] = shown(found[0])
    return steps


def hub_step(output_dir: Path, uploads: Any) -> dict[str, str]:
    """Where the model is on the Hub, or how it gets there."""
    if uploads is not None:
        return {"on the Hub": f"{huggingface_hub.constants.ENDPOINT}/{uploads.repo_id}"}
    if not (output_dir / "model.safetensors").is_file():
        return {}
    return {"push": "the same command with --push_to_hub"}


def folder_of_curves(output_dir: Path) -> Path:
    """Where TensorBoard's files go."""
    return Path(os.environ.get("TENSORBOARD_LOGGING_DIR", str(output_dir / "runs")))


def size_of_model(output_dir: Path) -> str:
    """'1.6 MB', of all files of weights."""
    num_bytes = sum(path.stat().st_size for path in output_dir.glob("*.safetensors"))
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
