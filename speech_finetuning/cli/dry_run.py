"""The whole job in miniature: what it tries, what it finds, what the full run will need."""

import itertools
import logging
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import counted
from speech_finetuning.base.network import retry_on_network_error
from speech_finetuning.cli.data_report import report_data
from speech_finetuning.cli.run_lines import describe_time
from speech_finetuning.data.audio import seconds_of_frames
from speech_finetuning.data.items import StreamItem
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.stream import SpeechStream
from speech_finetuning.sharing.hub import describe_access
from speech_finetuning.sharing.report_page import ReportPage
from speech_finetuning.training.length import count_steps, save_within
from speech_finetuning.training.trainer import SpeechTrainer

logger = logging.getLogger(__name__)

NUM_READ_ROWS = 64
NUM_SCORED_ROWS = 8
MAX_REJECTED_FRACTION_WITHOUT_WARNING = 0.1
MAX_MEMORY_FRACTION_WITHOUT_WARNING = 0.9


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the table. state: ok, warning, or error, which ends the dry run with code 2."""

    state: str
    found: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The first rows of the stream, as they would be trained."""

    num_rows: int
    num_usable_rows: int
    longest: StreamItem  # the row with most tokens


def miniature_flags(
    argv: list[str], full_args: transformers.Seq2SeqTrainingArguments, folder: str
) -> list[str]:
    """The command line with three steps, eight rows to score, one save, nothing uploaded, all in
    `folder`."""
    rows_per_step = full_args.per_device_train_batch_size * full_args.gradient_accumulation_steps
    changes = {
        "dry_run": False,
        "push_to_hub": False,
        "push_predictions": False,
        "eval_before_training": False,
        "save_strategy": "steps",  # also of a run that saves only its model: it is sized
        "save_steps": 3,
        "eval_steps": 3,
        "logging_steps": 1,
        "max_eval_samples": NUM_SCORED_ROWS,
        "resume_from_checkpoint": "no",
        "data_report_samples": 0,
        "save_total_limit": 2,
        "report_to": "none",
        "output_dir": folder,
    }
    if full_args.num_train_epochs is None:
        changes["max_steps"] = 3
    else:
        changes["num_train_epochs"] = 1
        changes["max_train_samples"] = 3 * rows_per_step
    flags = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    return [*argv, *flags]


def check_hub_access(full_args: transformers.Seq2SeqTrainingArguments) -> Check:
    """Whether the Hub would take the model; creates nothing. Raises: UserError if it would not."""
    if not full_args.push_to_hub:
        return Check(state="ok", found="not asked for")
    assert full_args.output_dir is not None
    name = full_args.hub_model_id or Path(full_args.output_dir).resolve().name
    access = retry_on_network_error(
        describe_access, name, limit_in_seconds=60, task="asking the Hub"
    )
    return Check(state="ok", found=f"{access} may be written")


def take_sample(stream: SpeechStream, num_rows: int) -> Sample:
    """The first rows of the stream. Raises: UserError if none of them is usable, and what ends the
    stream."""
    rows = list(itertools.islice(stream, num_rows))
    errors = [item.error for item in rows if item.error is not None]
    if errors:  # the stream has ended
        raise errors[0]
    usable = [item for item in rows if item.example is not None]
    if not usable:
        raise UserError(
            f"--dry_run: none of the first {counted(num_rows, 'row')} is usable, see the data report above."
        )
    longest = max(usable, key=lambda item: (len(item.example["labels"]), item.example["duration"]))
    return Sample(num_rows=len(rows), num_usable_rows=len(usable), longest=longest)


def rehearse(
    trainer: SpeechTrainer, sample: Sample, full_args: transformers.Seq2SeqTrainingArguments
) -> None:
    """Has the trainer take three steps of the row with most tokens."""
    rows_per_step = full_args.per_device_train_batch_size * full_args.gradient_accumulation_steps
    # First a step whose utterances share no window, then, with --pack_utterances, two in which they
    # do.
    window_in_seconds = seconds_of_frames(trainer.window_in_frames)
    longest = sample.longest
    alone = replace(longest, example=longest.content() | {"duration": window_in_seconds})
    rows = [alone] * rows_per_step + [longest] * 2 * rows_per_step
    trainer.train_dataset = cast(SpeechStream, rows)  # all that a loader needs of one
    trainer.is_advised = True  # what three steps wait for says nothing
    trainer.guard_bound.rates.clear()  # nor what they have lost
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ReportPage):
            callback.is_announced = True  # its folder is deleted


def folder_size_in_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def check_sample(sample: Sample, max_rejected_fraction: float) -> Check:
    """Whether enough rows are usable."""
    rejected_fraction = 1 - sample.num_usable_rows / sample.num_rows
    state = "ok"
    if rejected_fraction > MAX_REJECTED_FRACTION_WITHOUT_WARNING:
        state = "warning"
    if rejected_fraction > max_rejected_fraction:
        state = "error"
    usable = f"{sample.num_usable_rows} of {counted(sample.num_rows, 'row')} usable"
    return Check(
        state=state, found=f"{usable}; most tokens: {len(sample.longest.content()['labels'])}"
    )


def check_device(device: torch.device) -> Check:
    """Which GPU, and how much of its memory the three steps took."""
    if device.type != "cuda":
        return Check(state="warning", found="no GPU: training on the CPU")
    peak_in_gib = torch.cuda.max_memory_reserved() / 2**30
    whole_in_gib = torch.cuda.mem_get_info()[1] / 2**30
    name = torch.cuda.get_device_name()
    is_tight = peak_in_gib > MAX_MEMORY_FRACTION_WITHOUT_WARNING * whole_in_gib
    return Check(
        state="warning" if is_tight else "ok",
        found=f"{name}, {peak_in_gib:.1f} of {whole_in_gib:.1f} GiB used at most",
    )


def check_disk(
    full_args: transformers.Seq2SeqTrainingArguments, num_steps: int, checkpoint_in_bytes: int
) -> Check:
    """Whether the checkpoints that are kept, one being written and the model fit on the disk."""
    num_kept = 0
    if full_args.save_strategy != SaveStrategy.NO:
        num_kept = num_steps // steps_between(full_args.save_steps, num_steps)
    if full_args.save_total_limit:
        num_kept = min(num_kept, full_args.save_total_limit)
    assert full_args.output_dir is not None
    output_dir = Path(full_args.output_dir).resolve()
    folder = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    need_in_gb = checkpoint_in_bytes * (num_kept + 2) / 1e9
    free_in_gb = shutil.disk_usage(folder).free / 1e9
    return Check(
        state="ok" if need_in_gb < free_in_gb else "error",
        found=f"{checkpoint_in_bytes / 1e9:.2f} GB a checkpoint, {need_in_gb:.1f} GB in all, "
        f"{free_in_gb:.1f} GB free in {folder}",
    )


def steps_between(steps: float, num_steps: int) -> int:
    """--eval_steps or --save_steps as a number of steps; below 1 it is a share of all."""
    return int(steps) if steps >= 1 else math.ceil(steps * num_steps)


def as_a_whole(dataset: SpeechDataset, max_rows: int | None) -> SpeechDataset:
    """For counting, a set without the miniature's sample: by the hold-out's share of the rows."""
    selection = dataset.selection
    if selection is not None:
        selection = replace(selection, mask=None, max_rows=max_rows)
    return replace(dataset, max_rows=max_rows, selection=selection)


def count_full_steps(
    full_args: transformers.Seq2SeqTrainingArguments,
    sets: tuple[SpeechDataset, ...],
    max_train_samples: int | None,
) -> int:
    """Steps of the full run; where they follow from the rows, --save_steps and --eval_steps follow
    from them. sets: those of the miniature, which may be cut short."""
    if full_args.max_steps > 0:
        return full_args.max_steps
    whole_sets = [as_a_whole(dataset, max_train_samples) for dataset in sets]
    rows_per_step = full_args.per_device_train_batch_size * full_args.gradient_accumulation_steps
    full_args.max_steps = count_steps(full_args.num_train_epochs, whole_sets, rows_per_step)
    save_within(full_args)
    return full_args.max_steps


def count_evaluations(full_args: transformers.Seq2SeqTrainingArguments, num_steps: int) -> int:
    """Of the full run, from its first step on: every --eval_steps, and at the end."""
    if not full_args.do_eval:
        return 0
    assert full_args.eval_steps is not None  # the script gives it a default
    if full_args.eval_strategy == IntervalStrategy.NO:
        return 1
    return math.ceil(num_steps / steps_between(full_args.eval_steps, num_steps))


def estimate_needs(
    *,
    trainer: SpeechTrainer,
    full_args: transformers.Seq2SeqTrainingArguments,
    num_steps: int,
    data: dict[str, list[dict[str, Any]]],
    data_args: Any,
    metrics: dict[str, float],
    checkpoint_in_bytes: int,
) -> dict[str, Check]:
    """What the full run will need, judging by three steps. data: sources by role, with num_rows."""
    rows_per_step = full_args.per_device_train_batch_size * full_args.gradient_accumulation_steps
    limit = data_args.max_eval_samples or sys.maxsize
    scored = [*data.get("eval", []), *data.get("guard", [])]
    num_eval_rows = sum(min(limit, source["num_rows"] or 0) for source in scored)

    history = trainer.state.log_history
    rows_per_second = [entry["samples_per_second"] for entry in history if "loss" in entry][-1]
    seconds_per_clip = metrics.get("eval_runtime", 0.0) / NUM_SCORED_ROWS / max(1, len(scored))
    num_evaluations = count_evaluations(full_args, num_steps)
    if data_args.eval_before_training:
        num_evaluations += 1
    training = describe_time(num_steps * rows_per_step / rows_per_second)
    scoring_all = describe_time(num_evaluations * num_eval_rows * seconds_per_clip)

    is_finite = math.isfinite(metrics["train_loss"]) and not trainer.progress.num_skipped_steps
    scoring = f"{seconds_per_clip:.2f} s a clip" if full_args.do_eval else "not asked for"
    return {
        "device": check_device(trainer.args.device),
        "training": Check(
            state="ok" if is_finite else "error",
            found=f"loss {metrics['train_loss']:.3g}, {rows_per_second:.1f} rows/s",
        ),
        "scoring": Check(state="ok", found=scoring),
        "disk": check_disk(full_args, num_steps, checkpoint_in_bytes),
        "time": Check(
            state="ok",
            found=f"about {training} of training and {scoring_all} of scoring for {num_steps:,} steps",
        ),
    }


def conclude(checks: dict[str, Check], versions: dict[str, str]) -> None:
    """Logs the table. Raises: UserError if a check failed."""
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    logger.info("%-8s %-10s %s", "ok", "versions", packages)
    for name, check in checks.items():
        logger.info("%-8s %-10s %s", check.state, name, check.found)
    failed = [f"{name}: {check.found}" for name, check in checks.items() if check.state == "error"]
    if failed:
        raise UserError(f"--dry_run: {'; '.join(failed)}.")
    logger.info(
        "dry run passed, and left nothing behind. To start: the same command without --dry_run"
    )


def dry_run(
    argv: list[str],
    *,
    data_args: Any,
    full_args: transformers.Seq2SeqTrainingArguments,
    build_job: Callable[[list[str]], Any],
    run_job: Callable[[Any], dict[str, float]],
) -> dict[str, float]:
    """The whole job in miniature, in a temporary folder: 64 rows decoded, three steps of the row
    with most tokens, 8 rows scored, a checkpoint saved and loaded afresh. Logs a table of checks.
    build_job, run_job: the script's. Raises: UserError if a check fails."""
    checks = {"Hub": check_hub_access(full_args)}
    with tempfile.TemporaryDirectory() as folder:
        job = build_job(miniature_flags(argv, full_args, folder))
        report_data(job.trainer.train_dataset, NUM_READ_ROWS, curves=None, output_dir=None)
        sets = job.trainer.train_dataset.sets
        sample = take_sample(job.trainer.train_dataset, NUM_READ_ROWS)
        rehearse(job.trainer, sample, full_args)
        metrics = run_job(job)
        checkpoint_in_bytes = folder_size_in_bytes(Path(folder, "checkpoint-3"))
    checks["data"] = check_sample(sample, data_args.max_rejected_fraction)
    num_steps = count_full_steps(full_args, sets, data_args.max_train_samples)
    checks |= estimate_needs(
        trainer=job.trainer,
        full_args=full_args,
        num_steps=num_steps,
        data=job.run_info["data"],
        data_args=data_args,
        metrics=metrics,
        checkpoint_in_bytes=checkpoint_in_bytes,
    )
    conclude(checks, job.run_info["versions"])
    return metrics
