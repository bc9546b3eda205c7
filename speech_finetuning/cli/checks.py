"""What can be known to be wrong with the machine and the libraries' flags."""

from typing import Any

import torch
import transformers

from speech_finetuning.base.errors import UserError, one_line

WHOLE_SAVES = "zero_optimization.stage3_gather_16bit_weights_on_model_save"  # in DeepSpeed's file


def sharding_rules(
    data_args: Any, args: transformers.Seq2SeqTrainingArguments
) -> list[tuple[Any, str]]:
    """What a model in parts cannot do: whether that is wanted, and a message."""
    on_cpu, is_zero3 = (
        args.device.type == "cpu",
        transformers.integrations.is_deepspeed_zero3_enabled(),
    )
    is_ours = {("fsdp_version", 2), ("state_dict_type", "FULL_STATE_DICT")} <= (
        args.fsdp_plugin_args or {}
    ).items()
    return [
        (
            (args.fsdp or args.deepspeed) and data_args.dry_run,
            "--dry_run: leave out --fsdp and --deepspeed.",
        ),
        (args.fsdp and not is_ours, "--fsdp_config: use version 2 and FULL_STATE_DICT."),
        (
            (args.fsdp or is_zero3) and data_args.long_form,
            "--long_form: leave out --fsdp or ZeRO-3 (whole models).",
        ),
        (
            args.fsdp and (on_cpu or args.world_size == 1),
            "--fsdp needs several GPUs: on CPUs accelerate ignores it.",
        ),
        (
            is_zero3 and not args.hf_deepspeed_config.is_true(WHOLE_SAVES),
            f"--deepspeed: ZeRO-3 needs {WHOLE_SAVES}.",
        ),
        (
            args.deepspeed and on_cpu,
            "--deepspeed needs GPUs: on CPUs accelerate lets every process run alone.",
        ),
    ]


def check_devices(args: transformers.Seq2SeqTrainingArguments) -> None:
    """Raises UserError for GPU flags without a usable GPU, naming the driver if that is the reason."""
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs in one process. Start with torchrun --nproc_per_node {args.n_gpu}."
        )
    reason = "--use_cpu was given" if args.use_cpu else ""
    if not torch.cuda.is_available() and not args.use_cpu:
        try:
            torch.cuda.init()
        except (
            RuntimeError,
            AssertionError,
        ) as error:  # the second is what CPU builds of torch raise
            reason = str(error).split(". ")[0].splitlines()[0]
    if "driver" in reason and "too old" in reason:
        build = f"the build of torch {torch.__version__.split('+')[0]} for its CUDA version (see pytorch.org)"
        raise UserError(
            f"{reason}. Update the NVIDIA driver, or install {build}, or pass --use_cpu."
        )
    if args.fp16 and reason:
        raise UserError(f"--fp16 needs a GPU: {reason}. Leave out --fp16 to train on the CPU.")


def check_optimizer(args: transformers.Seq2SeqTrainingArguments) -> None:
    """Raises UserError if --optim needs a package that is not installed. The library would say so, with a traceback,
    once the model is loaded; some of its optimisers cannot be asked earlier and are left to it."""
    try:
        transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    except (
        ImportError,
        ValueError,
    ) as error:  # either, by optimiser (transformers 5.23, trainer_optimizer.py)
        if "install" in str(error):
            raise UserError(f"--optim {args.optim.value}: {one_line(error)}") from error


def check_adapters(args: transformers.Seq2SeqTrainingArguments, has_adapters: bool) -> None:
    """Raises UserError where adapters cannot be merged: one process would need the whole model."""
    is_split = args.fsdp or transformers.integrations.is_deepspeed_zero3_enabled()
    if has_adapters and is_split:
        raise UserError("--lora_rank: adapters take little memory. Leave out --fsdp or ZeRO-3.")
