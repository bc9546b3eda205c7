"""The whole job in miniature."""

import math
import shutil
import sys
from pathlib import Path

import torch
import transformers

from speech_finetuning.training.trainer import SpeechTrainer


def miniature_flags(
    argv: list[str], wish: transformers.Seq2SeqTrainingArguments, folder: str
) -> list[str]:
    """The command line with three steps, eight rows to score, one save, nothing uploaded, all in `folder`."""
    num_rows = 3 * wish.per_device_train_batch_size * wish.gradient_accumulation_steps
    length = (
        "--max_steps 3"
        if wish.max_steps > 0
        else f"--num_train_epochs 1 --max_train_samples {num_rows}"
    )
    changes = f"""--dry_run False --push_to_hub False --push_predictions False --eval_before_training False
        --save_steps 3 --eval_steps 3 --logging_steps 1 --max_eval_samples 8 --resume_from_checkpoint no
        --data_report_samples 0 --save_total_limit 2 --report_to none {length}"""
    return [*argv, *changes.split(), "--output_dir", folder]


def estimate_needs(
    trainer: SpeechTrainer,
    wish: transformers.Seq2SeqTrainingArguments,
    rows: tuple[int, int],
    metrics: dict[str, float],
    size: int,
) -> dict[str, tuple[str, str]]:
    """What the full run will need, by three steps: {check: (ok, warning or error; what was found)}. rows: to train on
    and to score; size: of a checkpoint in bytes."""
    place = Path(wish.output_dir).resolve()
    batch = wish.per_device_train_batch_size * wish.gradient_accumulation_steps
    rates = [
        entry["samples_per_second"]
        for entry in trainer.state.log_history
        if "samples_per_second" in entry
    ]
    steps = (
        wish.max_steps if wish.max_steps > 0 else math.ceil(wish.num_train_epochs * rows[0] / batch)
    )
    every, save_every = (
        n if n >= 1 else math.ceil(n * steps) for n in (wish.eval_steps, wish.save_steps)
    )
    seconds_per_clip = metrics.get("eval_runtime", 0.0) / 8
    hours = (steps * batch / rates[-1] / 3600, steps / every * rows[1] * seconds_per_clip / 3600)
    num_kept = (
        min(steps // int(save_every), wish.save_total_limit or sys.maxsize) + 1
    )  # one being written
    folder = next(path for path in (place, *place.parents) if path.exists())
    need, free = size * (num_kept + 1) / 1e9, shutil.disk_usage(folder).free / 1e9
    checks = {"device": ("warning", "no GPU: training on the CPU")}
    if trainer.args.device.type == "cuda":
        peak, whole = torch.cuda.max_memory_reserved() / 2**30, torch.cuda.mem_get_info()[1] / 2**30
        found = f"{torch.cuda.get_device_name()}, {peak:.1f} of {whole:.1f} GiB used at most"
        checks["device"] = ("warning" if peak > 0.9 * whole else "ok", found)
    is_finite = math.isfinite(metrics["train_loss"]) and not trainer.progress.num_skipped_steps
    found = f"loss {metrics['train_loss']:.3g}, {rates[-1]:.1f} rows/s"
    checks["training"] = ("ok" if is_finite else "error", found)
    checks["scoring"] = (
        "ok",
        f"{seconds_per_clip:.2f} s a clip" if wish.do_eval else "not asked for",
    )
    found = (
        f"{size / 1e9:.2f} GB a checkpoint, {need:.1f} GB in all, {free:.1f} GB free in {folder}"
    )
    checks["disk"] = ("ok" if need < free else "error", found)
    found = f"about {hours[0]:.1f} h of training and {hours[1]:.1f} h of scoring for {steps} steps"
    return {**checks, "time": ("ok", found)}
