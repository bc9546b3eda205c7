"""What the machine decides where the user does not: mixed precision, gradient checkpointing, and how
many rows are scored at a time."""

import logging
import os
from dataclasses import dataclass, replace

import torch
import transformers

from speech_finetuning.cli.devices import why_no_gpu
from speech_finetuning.cli.flags import find_value, flag_groups, flag_name, is_on, with_config_file
from speech_finetuning.cli.translation import translate, warn_of_retired_flags
from speech_finetuning.training.memory import (
    memory_of_gpu_in_bytes,
    needs_checkpointing,
    step_in_bytes,
)

logger = logging.getLogger(__name__)

NAMES = {"fp16": "float16", "bf16": "bfloat16"}
ROWS_OF_LIBRARY = 8  # scored at a time by default (transformers 5.24)
# Flags with which another file says what the precision is.
DECIDED_ELSEWHERE = {"deepspeed", "fsdp"}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A command line whose precision is one that this machine has, and what was decided."""

    words: list[str]
    note: str
    is_contrary: bool = False  # to what the command line says


def settle_precision(words: list[str]) -> Precision:
    """The precision, and as many rows to score at a time as this machine takes well."""
    precision = choose_precision(words)
    return replace(precision, words=with_rows_to_score(precision.words))


def with_rows_to_score(words: list[str]) -> list[str]:
    """On a GPU a batch is scored in about the same time whatever its size, as small kernels are
    started for every token: scoring takes as many rows as a step of training, for which there is
    memory, where the library takes 8."""
    num_rows = find_value(words, "per_device_train_batch_size") or ""
    is_larger = num_rows.isdecimal() and int(num_rows) > ROWS_OF_LIBRARY
    is_said = find_value(words, "per_device_eval_batch_size") is not None
    if is_said or not is_larger or why_no_gpu(use_cpu=is_on(words, "use_cpu")):
        return words
    return ["--per_device_eval_batch_size", num_rows, *words]


def choose_precision(words: list[str]) -> Precision:
    """--bf16 or --fp16 where neither is given and a GPU is there; no --fp16 where none is."""
    given = {flag_name(group[0]) for group in flag_groups(words)}
    wanted = [name for name in NAMES if is_on(words, name)]
    reason = why_no_gpu(use_cpu=is_on(words, "use_cpu"))
    if reason and wanted == ["fp16"]:
        return Precision(
            words=[*words, "--fp16", "False"],
            note=f"--fp16 is off, as it needs a GPU ({reason}): training in float32.",
            is_contrary=True,
        )
    if reason or given & set(NAMES):
        name = NAMES[wanted[0]] if wanted else "float32"
        return Precision(words=words, note=f"precision: {name}")
    if given & DECIDED_ELSEWHERE or "ACCELERATE_MIXED_PRECISION" in os.environ:
        return Precision(words=words, note="precision: as the configuration of accelerate says")
    name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return Precision(
        words=[f"--{name}", "True", *words],
        note=f"precision: {NAMES[name]}, as this GPU has it (--{name} False: float32)",
    )


def tell_of_changed_flags(argv: list[str]) -> None:
    """A line each on retired flags, if there are any, and on the precision."""
    warn_of_retired_flags(argv)
    precision = settle_precision(translate(with_config_file(argv)).words)
    if precision.is_contrary:
        logger.warning("%s", precision.note)
    else:
        logger.info("%s", precision.note)


def choose_checkpointing(
    model: transformers.WhisperForConditionalGeneration,
    args: transformers.Seq2SeqTrainingArguments,
    is_given: bool,
) -> None:
    """Switches gradient checkpointing on if a step would not fit the GPU without it, and says so;
    on a CPU, or where the command line decides, it stays as it is."""
    if not args.do_train or is_given:
        return
    memory_in_bytes = memory_of_gpu_in_bytes(args.device)
    if memory_in_bytes is None:
        return
    need_in_bytes = step_in_bytes(model, args.per_device_train_batch_size)
    is_needed = needs_checkpointing(need_in_bytes, memory_in_bytes)
    args.activation_checkpointing = is_needed
    args.gradient_checkpointing = is_needed  # the library keeps both names alike (5.24)
    logger.info(
        "gradient checkpointing: %s, as a step takes about %.0f GB without it and this GPU has %.0f",
        "on" if is_needed else "off",
        need_in_bytes / 1e9,
        memory_in_bytes / 1e9,
    )
