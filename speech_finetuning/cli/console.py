"""The log, and its first screen."""

import logging
import math
import shutil
from pathlib import Path
from typing import Any, cast

import transformers

from speech_finetuning.base.files import counted
from speech_finetuning.cli.next_steps import folder_of_curves
from speech_finetuning.cli.silenced import WithoutSilenced, quieten_libraries
from speech_finetuning.cli.terminal import SCREEN, ScreenHandler, shown, typed
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.training.compat import leave_retrying_to_us
from speech_finetuning.training.length import MANY_PASSES, SOME_PASSES
from speech_finetuning.training.phases import changes_of_start
from speech_finetuning.training.trainer import SpeechTrainer

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")


def set_up_logging(args: transformers.Seq2SeqTrainingArguments) -> None:
    """One readable log from rank 0; the others speak up only for warnings."""
    is_main = args.process_index == 0
    SCREEN.open(draws_bars=is_main and not args.disable_tqdm)
    root = logging.getLogger()
    for handler in [entry for entry in root.handlers if isinstance(entry, ScreenHandler)]:
        root.removeHandler(handler)  # of an earlier run in this process
    handler = ScreenHandler()
    handler.addFilter(WithoutSilenced(is_main))
    root.addHandler(handler)
    logging.getLogger("speech_finetuning").setLevel(logging.INFO if is_main else logging.WARNING)
    quieten_libraries()
    leave_retrying_to_us()


def describe_run(
    trainer: SpeechTrainer, sets: dict[str, list[SpeechDataset]], checkpoint: Path | None
) -> None:
    """The first screen of the log: what will happen, in numbers."""
    model = trainer.model
    args = trainer.args
    num_all = model.num_parameters()
    num_trainable = model.num_parameters(only_trainable=True)
    sizes = f"{num_all:,} parameters ({num_trainable:,} trainable)"
    logger.info("model: %s, %s, on %s", shown(str(model.name_or_path)), sizes, args.device)
    for role, role_sets in sets.items():
        for dataset in role_sets:
            logger.info("%s: %s", role, describe_source(dataset))
    if args.do_train:
        describe_training(args, trainer.progress.share.is_sharded_by_rank)
        describe_start(checkpoint, trainer.progress.phases)
        describe_length(sets["train"], args)
        warn_of_shared_memory(model.config, args)
    if "tensorboard" in cast(list[str], args.report_to):  # since its __post_init__
        assert args.output_dir is not None
        logger.info(
            "curves: tensorboard --logdir %s", typed(folder_of_curves(Path(args.output_dir)))
        )


def describe_source(dataset: SpeechDataset) -> str:
    """Where the rows come from, how many there are and which columns are used."""
    source = dataset.source
    names = (source.record, shown(source.name), source.config_name, source.split)
    place = " ".join(name for name in names if name)
    rows = "rows not counted" if source.num_rows is None else counted(source.num_rows, "row")
    if dataset.rows_per_pass() != source.num_rows:
        rows = f"{dataset.rows_per_pass():,} of {rows}"
    columns = f"{source.audio_column}, {source.text_column}"
    num_files = len(source.shards())
    return f"{place} ({source.kind}, {counted(num_files, 'file')}, {rows}; {columns})"


def describe_training(
    args: transformers.Seq2SeqTrainingArguments, is_sharded_by_rank: bool
) -> None:
    """How large a step is, and how many there are."""
    logger.info(
        "a step: %s (%d per device x %d accumulated x %s)",
        counted(
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "row",
        ),
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        counted(args.world_size, "process", "processes"),
    )
    if args.world_size > 1:
        share = "files of its own" if is_sharded_by_rank else "all, and decodes its share"
        logger.info("every process reads %s", share)
    saves = f"every {args.save_steps:g} steps"
    if args.save_steps >= args.max_steps:
        saves = "at the end"
    logger.info(
        "steps: %s, learning rate %g, checkpoint %s",
        f"{args.max_steps:,}",
        args.learning_rate,
        saves,
    )


def describe_start(checkpoint: Path | None, phases: list[dict[str, Any]]) -> None:
    """Where the steps begin, and what is not as it was. phases: see training.phases."""
    if checkpoint is None:
        logger.info("start: from the beginning")
        return
    logger.info("start: continues from %s", shown(checkpoint))
    if changes := changes_of_start(checkpoint, phases):
        logger.info("changed: %s", ", ".join(changes))


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
            "length: %s %s passes over %s%s",
            "1 step is" if args.max_steps == 1 else f"{args.max_steps:,} steps are",
            f"{passes:,.1f}" if passes < 100 else f"{passes:,.0f}",
            counted(num_rows, "row"),
            of_source,
        )
        if passes > MANY_PASSES:
            shortest = min(shortest, math.ceil(SOME_PASSES * num_rows / rows_per_step_of_source))
    if shortest < math.inf:
        logger.warning(
            "after so many passes a model recites its training set. --max_steps %d makes %d passes.",
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
