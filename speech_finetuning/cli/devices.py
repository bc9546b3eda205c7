"""What this machine's devices, processes and packages cannot do."""

import os
from collections.abc import Iterator
from typing import Any, cast

import torch
import transformers
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.training_args import OptimizerNames

from speech_finetuning.base.errors import UserError, one_line

# In DeepSpeed's file: else ZeRO-3 saves no whole model.
WHOLE_SAVES = "zero_optimization.stage3_gather_16bit_weights_on_model_save"


def process_problems(data_args: Any, args: transformers.Seq2SeqTrainingArguments) -> Iterator[str]:
    """What several processes, and a model in parts, cannot do."""
    yield from problems_of_lone_processes(args.world_size)
    wait_in_seconds = 60 * data_args.max_network_wait_in_minutes
    if args.world_size > 1 and wait_in_seconds >= args.ddp_timeout:
        yield f"--ddp_timeout must exceed {wait_in_seconds:g} s, the network wait."
    if data_args.dry_run and args.world_size > 1:
        yield "--dry_run tries one process: start it without torchrun."
    if data_args.dry_run and (args.fsdp or args.deepspeed):
        yield "--dry_run: leave out --fsdp and --deepspeed."
    is_zero3 = is_deepspeed_zero3_enabled()
    if data_args.long_form and (args.fsdp or is_zero3):
        yield "--long_form: leave out --fsdp or ZeRO-3 (whole models)."
    on_cpu = args.device.type == "cpu"
    if args.fsdp:
        plugin = args.fsdp_plugin_args or {}
        is_version_2 = plugin.get("fsdp_version") == 2
        if not is_version_2 or plugin.get("state_dict_type") != "FULL_STATE_DICT":
            yield "--fsdp_config: use version 2 and FULL_STATE_DICT."
        if on_cpu or args.world_size == 1:
            yield "--fsdp needs several GPUs: on CPUs accelerate ignores it."
    if is_zero3 and not args.hf_deepspeed_config.is_true(WHOLE_SAVES):
        yield f"--deepspeed: ZeRO-3 needs {WHOLE_SAVES}."
    if args.deepspeed and on_cpu:
        yield "--deepspeed needs GPUs: on CPUs accelerate lets every process run alone."


def problems_of_lone_processes(world_size: int) -> Iterator[str]:
    """Of several that were started and know nothing of each other. world_size: to the library."""
    num_started = int(os.environ.get("WORLD_SIZE") or 1)
    if num_started > world_size == 1 and "LOCAL_RANK" in os.environ:
        yield (
            f"{num_started} processes were started, and each would run alone, as there is no GPU: "
            "pass --use_cpu, or start one without torchrun."
        )


def check_arguments(data_args: Any, args: transformers.Seq2SeqTrainingArguments) -> None:
    """Raises: UserError for what this machine cannot do, before any download or GPU work."""
    check_processes(data_args, args)
    check_devices(args)
    if args.do_train:
        check_optimizer(args)


def check_processes(data_args: Any, args: transformers.Seq2SeqTrainingArguments) -> None:
    """Raises: UserError with a line for each thing that these processes cannot do."""
    problems = list(process_problems(data_args, args))
    if problems:
        raise UserError(*problems)


def why_no_gpu(use_cpu: bool) -> str:
    """Why this process trains on the CPU, as far as torch says; "" if it has a GPU."""
    if use_cpu:
        return "--use_cpu was given"
    if torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the second: a CPU build of torch
        return str(error).split(". ")[0].splitlines()[0].rstrip(".")
    return "torch finds none"


def check_devices(args: transformers.Seq2SeqTrainingArguments) -> None:
    """Raises UserError for several GPUs in one process, and for a GPU whose driver is too old."""
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs in one process. Start with torchrun --nproc_per_node {args.n_gpu}."
        )
    reason = why_no_gpu(args.use_cpu)
    if "driver" in reason and "too old" in reason:
        version = torch.__version__.split("+")[0]
        raise UserError(
            f"{reason}. Update the NVIDIA driver, or install the build of torch {version} for its "
            "CUDA version (see pytorch.org), or pass --use_cpu."
        )


def check_optimizer(args: transformers.Seq2SeqTrainingArguments) -> None:
    """Raises UserError if --optim needs a package that is not installed. The library would say so,
    with a traceback, once the model is loaded; some of its optimisers cannot be asked earlier and
    are left to it."""
    try:
        transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:  # by optimiser (5.23, trainer_optimizer.py)
        if "install" in str(error):
            optimizer = cast(OptimizerNames, args.optim).value  # since its __post_init__
            raise UserError(f"--optim {optimizer}: {one_line(error)}") from error


def check_adapters(args: transformers.Seq2SeqTrainingArguments, has_adapters: bool) -> None:
    """Raises UserError where adapters cannot be merged: one process would need the whole model."""
    is_split = args.fsdp or is_deepspeed_zero3_enabled()
    if has_adapters and is_split:
        raise UserError("--lora_rank: adapters take little memory. Leave out --fsdp or ZeRO-3.")
