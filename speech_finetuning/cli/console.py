"""The first screen of the log."""

import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import transformers

from speech_finetuning.training.compat import leave_retrying_to_us

logger = logging.getLogger(__name__)


def describe_run(
    model: Any,
    sets: dict,
    args: transformers.Seq2SeqTrainingArguments,
    checkpoint: Path | None,
    is_sharded_by_rank: bool,
) -> None:
    """The first screen of the log: what will happen, in numbers."""
    sizes = f"{model.num_parameters():,} parameters, {model.num_parameters(only_trainable=True):,} of them trainable"
    logger.info("model: %s, %s, on %s", model.name_or_path, sizes, args.device)
    for role, source in ((role, item.source) for role, items in sets.items() for item in items):
        rows = f"{source.num_rows:,} rows" if source.num_rows is not None else "rows not counted"
        place = " ".join(
            filter(None, (source.record, source.name, source.config_name, source.split))
        )
        columns = f"{source.audio_column}, {source.text_column or 'no text'}"
        found = f"{source.kind}, {len(source.shards())} files, {rows}; {columns}"
        logger.info("%s data: %s (%s)", role, place, found)
    if args.do_train:
        sizes = (
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.world_size,
        )
        logger.info(
            "a step: %d rows (%d per device x %d accumulated x %d processes)",
            math.prod(sizes),
            *sizes,
        )
        if args.world_size > 1:
            logger.info(
                "every process reads %s",
                "files of its own" if is_sharded_by_rank else "all, and decodes its share",
            )
        rate, saves = args.learning_rate, args.save_steps
        logger.info(
            "steps: %d, learning rate %g, checkpoint every %g steps", args.max_steps, rate, saves
        )
        logger.info(
            "start: %s",
            "from the beginning" if checkpoint is None else f"continues from {checkpoint}",
        )
        batches = (args.dataloader_prefetch_factor or 4) + 1
        need = (
            batches
            * sizes[0]
            * model.config.num_mel_bins
            * model.config.max_source_positions
            * 8
            / 2**20
        )
        shared = Path("/dev/shm")
        have = shutil.disk_usage(shared).total / 2**20 if shared.exists() else math.inf
        if args.dataloader_num_workers and have < need:
            found = f"/dev/shm has {have:.0f} MB, batches of long clips may take {need:.0f}"
            logger.warning("%s. In Docker, start the container with --shm-size 2g.", found)
    if "tensorboard" in args.report_to:
        runs = os.environ.get("TENSORBOARD_LOGGING_DIR", str(Path(args.output_dir) / "runs"))
        logger.info("curves: tensorboard --logdir %s", runs)


def set_up_logging(args: transformers.Seq2SeqTrainingArguments) -> None:
    """One readable log from rank 0; the others speak up only for warnings."""
    package_logger = logging.getLogger("speech_finetuning")
    if not package_logger.handlers:
        package_logger.addHandler(logging.StreamHandler())
        package_logger.handlers[0].setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
        )
    package_logger.setLevel(logging.INFO if args.process_index == 0 else logging.WARNING)
    leave_retrying_to_us()
    for name in ("httpx", "httpx2", "datasets", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.logging.set_verbosity_warning()
