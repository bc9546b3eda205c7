"""The log, and its first screen."""

import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any, cast

import transformers

from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.training.compat import leave_retrying_to_us

logger = logging.getLogger(__name__)

# They report every request and every file.
TALKATIVE_LIBRARIES = ("httpx", "httpx2", "datasets", "fsspec")
# Fine-tuning takes some passes; after many a model recites its training set. The second number is
# the one that the warning proposes.
MANY_PASSES = 20
SOME_PASSES = 10
SHARED_MEMORY = Path("/dev/shm")


def set_up_logging(args: transformers.Seq2SeqTrainingArguments) -> None:
    """One readable log from rank 0; the others speak up only for warnings."""
    package_logger = logging.getLogger("speech_finetuning")
    if not package_logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        package_logger.addHandler(handler)
    is_main = args.process_index == 0
    package_logger.setLevel(logging.INFO if is_main else logging.WARNING)
    for name in TALKATIVE_LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.logging.set_verbosity_warning()
    leave_retrying_to_us()


def describe_run(
    model: Any,
    sets: dict[str, list[SpeechDataset]],
    args: transformers.Seq2SeqTrainingArguments,
    checkpoint: Path | None,
    is_sharded_by_rank: bool,
) -> None:
    """The first screen of the log: what will happen, in numbers."""
    num_all = model.num_parameters()
    num_trainable = model.num_parameters(only_trainable=True)
    sizes = f"{num_all:,} parameters, {num_trainable:,} of them trainable"
    logger.info("model: %s, %s, on %s", model.name_or_path, sizes, args.device)
    for role, role_sets in sets.items():
        for dataset in role_sets:
            logger.info("%s data: %s", role, describe_source(dataset))
    if args.do_train:
        describe_training(args, checkpoint, is_sharded_by_rank)
        describe_length(sets["train"], args)
        warn_of_shared_memory(model.config, args)
    if "tensorboard" in cast(list[str], args.report_to):  # since its __post_init__
        assert args.output_dir is not None
        runs = os.environ.get("TENSORBOARD_LOGGING_DIR", str(Path(args.output_dir) / "runs"))
        logger.info("curves: tensorboard --logdir %s", runs)


def describe_source(dataset: SpeechDataset) -> str:
    """Where the rows come from, how many there are and which columns are used."""
    source = dataset.source
    names = (source.record, source.name, source.config_name, source.split)
    place = " ".join(name for name in names if name)
    rows = "rows not counted" if source.num_rows is None else f"{source.num_rows:,} rows"
    if dataset.rows_per_pass() != source.num_rows:
        rows = f"{dataset.rows_per_pass():,} of {rows}"
    columns = f"{source.audio_column}, {source.text_column}"
    return f"{place} ({source.kind}, {len(source.shards())} files, {rows}; {columns})"


def describe_training(
    args: transformers.Seq2SeqTrainingArguments, checkpoint: Path | None, is_sharded_by_rank: bool
) -> None:
    """How large a step is, how many there are, and where they begin."""
    logger.info(
        "a step: %d rows (%d per device x %d accumulated x %d processes)",
        args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.world_size,
    )
    if args.world_size > 1:
        share = "files of its own" if is_sharded_by_rank else "all, and decodes its share"
        logger.info("every process reads %s", share)
    logger.info(
        "steps: %d, learning rate %g, checkpoint every %g steps",
        args.max_steps,
        args.learning_rate,
        args.save_steps,
    )
    start = "from the beginning" if checkpoint is None else f"continues from {checkpoint}"
    logger.info("start: %s", start)


def describe_length(
    train_sets: list[SpeechDataset], args: transformers.Seq2SeqTrainingArguments
) -> None:
    """The steps in passes over each source; warns of so many that the model learns them by
    heart."""
    rows_per_step = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    )
    weights = sum(dataset.weight for dataset in train_sets)
    shortest = math.inf  # steps that make SOME_PASSES over the source that is used up first
    for dataset in train_sets:
        num_rows = dataset.rows_per_pass()
        if not num_rows:
            continue  # not counted
        rows_per_step_of_source = rows_per_step * dataset.weight / weights
        passes = args.max_steps * rows_per_step_of_source / num_rows
        of_source = f" of {dataset.source.record}" if dataset.source.record else ""
        logger.info(
            "length: %s steps are %s passes over %s rows%s",
            f"{args.max_steps:,}",
            f"{passes:,.1f}" if passes < 100 else f"{passes:,.0f}",
            f"{num_rows:,}",
            of_source,
        )
        if passes > MANY_PASSES:
            shortest = min(shortest, math.ceil(SOME_PASSES * num_rows / rows_per_step_of_source))
    if shortest < math.inf:
        logger.warning(
            "after so many passes a model recites its training set. --max_steps %d makes %d.",
            shortest,
            SOME_PASSES,
        )


def warn_of_shared_memory(
    config: transformers.WhisperConfig, args: transformers.Seq2SeqTrainingArguments
) -> None:
    """Warns if the reading worker's batches may not fit into shared memory, as in Docker's 64
    MB."""
    if not args.dataloader_num_workers or not SHARED_MEMORY.exists():
        return
    num_batches = (args.dataloader_prefetch_factor or 4) + 1
    values_per_clip = config.num_mel_bins * config.max_source_positions * 2  # two frames a position
    bytes_per_batch = args.per_device_train_batch_size * values_per_clip * 4
    need_in_mib = math.ceil(num_batches * bytes_per_batch / 2**20)
    have_in_mib = shutil.disk_usage(SHARED_MEMORY).total / 2**20
    if have_in_mib < need_in_mib:
        logger.warning(
            "%s has %.0f MB, batches of long clips may take %d. In Docker, start the container "
            "with --shm-size 2g.",
            SHARED_MEMORY,
            have_in_mib,
            need_in_mib,
        )
