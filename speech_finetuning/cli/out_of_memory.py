"""Out of memory: which flags need less. What says so: `base.errors.memory_that_is_out`."""

import contextlib

from speech_finetuning.base.errors import one_line
from speech_finetuning.cli.flags import find_value, is_on

USUAL_BATCH_SIZE = 8  # transformers 5.24
DUPLICATE_GPU = "Duplicate GPU detected"  # of NCCL, where processes outnumber GPUs


def describe_out_of_memory(kind: str, error: Exception, words: list[str]) -> str:
    """The reason that is told. words: the command line with its --config file."""
    return f"out of {kind}. {advice(words)} ({one_line(error)[:200]})"


def advice(words: list[str]) -> str:
    """The flags that need less, with their numbers."""
    if not is_on(words, "do_train"):
        return "Append to the same command: --per_device_eval_batch_size 1"
    batch_size = number_of(words, "per_device_train_batch_size", USUAL_BATCH_SIZE)
    accumulation = number_of(words, "gradient_accumulation_steps", 1)
    flags = []
    if batch_size > 1:
        parts = smallest_divisor(batch_size)
        flags.append(f"--per_device_train_batch_size {batch_size // parts}")
        flags.append(f"--gradient_accumulation_steps {accumulation * parts}")
    if not (is_on(words, "gradient_checkpointing") or is_on(words, "activation_checkpointing")):
        flags.append("--gradient_checkpointing")
    if flags:
        note = " (the same batch in all)" if batch_size > 1 else ""
        return f"Append to the same command: {' '.join(flags)}{note}"
    if find_value(words, "lora_rank") is None:
        return (
            "Append to the same command --lora_rank 32 and another --output_dir: adapters need a "
            "third of it. Or take a smaller model."
        )
    return "Take a smaller model."


def number_of(words: list[str], name: str, usual: int) -> int:
    """What a flag says, or else what it is without."""
    with contextlib.suppress(TypeError, ValueError):
        return int(find_value(words, name))  # type: ignore[arg-type]
    return usual


def smallest_divisor(number: int) -> int:
    """Above 1."""
    return next(divisor for divisor in range(2, number + 1) if number % divisor == 0)
