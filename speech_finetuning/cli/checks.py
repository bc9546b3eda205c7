"""What can be known to be wrong before any download or GPU work.

The functions named `..._problems` yield one line for each problem, so that one start tells them all;
those named `check_...` raise. `data_args` are the script's own flags (its DataArguments).
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
import transformers

from speech_finetuning.base.errors import UserError, one_line
from speech_finetuning.cli.flags import REFUSED_ARGUMENTS

# In DeepSpeed's file: else ZeRO-3 saves no whole model.
WHOLE_SAVES = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
FRACTIONS = ("max_rejected_fraction", "full_window_fraction", "timestamp_probability")
# Flags of training, and the value with which each does nothing.
OF_TRAINING_ONLY = {
    "train_window": "full",
    "pack_utterances": False,
    "timestamp_probability": 0.0,
    "apply_spec_augment": False,
    "speed_perturbation": False,
}


def task_problems(data_args: Any, args: transformers.Seq2SeqTrainingArguments) -> Iterator[str]:
    """What to do, with which data, and where the results go."""
    if not (args.do_train or args.do_eval or args.do_predict):
        yield "nothing to do. Pass --do_train, --do_eval or --do_predict."
    if not args.output_dir:
        yield "--output_dir is missing. Pass --output_dir FOLDER."
    if bool(data_args.dataset_name) == bool(data_args.data_mix):
        yield "pass either --dataset_name or --data_mix FILE."
    if args.do_train and args.max_steps <= 0 and args.num_train_epochs is None:
        yield "how long to train? Pass --max_steps N (or --num_train_epochs N)."
    if args.max_steps > 0 and args.num_train_epochs:
        yield "pass --max_steps or --num_train_epochs, not both."
    if data_args.long_form and not (args.do_eval or args.do_predict):
        yield "--long_form needs --do_eval or --do_predict."
    if data_args.dry_run and not args.do_train:
        yield "--dry_run needs --do_train."


def training_problems(data_args: Any, args: transformers.Seq2SeqTrainingArguments) -> Iterator[str]:
    """Flags that need training, or training with scoring, to have an effect."""
    if not args.do_train:
        idle = [
            f"--{name}"
            for name, value in OF_TRAINING_ONLY.items()
            if getattr(data_args, name) != value
        ]
        if idle:
            yield f"{' and '.join(idle)}: of no effect without --do_train."
    if not (args.do_train and args.do_eval):
        if data_args.early_stopping_patience is not None:
            yield "--early_stopping_patience needs --do_train and --do_eval."
        if data_args.eval_before_training:
            yield "--eval_before_training needs --do_train and --do_eval."
        if args.load_best_model_at_end:
            yield "--load_best_model_at_end needs --do_train and --do_eval."
    # 0.1 is the default, which nobody asked for.
    if data_args.train_window == "full" and data_args.full_window_fraction not in (0.1, 1):
        yield "--full_window_fraction needs --train_window longest: 'full' is a fraction of 1."
    if not args.predict_with_generate:
        yield "--predict_with_generate False: WER needs real generation. Leave it out."
    if "epoch" in (args.eval_strategy, args.save_strategy):
        yield "a stream has no epochs. Use the strategy steps."


def number_problems(data_args: Any, args: transformers.Seq2SeqTrainingArguments) -> Iterator[str]:
    """Numbers outside what they can mean."""
    for name in FRACTIONS:
        if not 0 <= getattr(data_args, name) <= 1:
            yield f"--{name} must lie between 0 and 1."
    shortest = data_args.min_duration_in_seconds
    longest = data_args.max_duration_in_seconds
    if shortest >= longest:
        yield f"--min_duration_in_seconds {shortest} is not below the longest, {longest}."
    if data_args.shuffle_buffer_size < 1:
        yield "--shuffle_buffer_size must be at least 1 (1 keeps the files' order)."
    if data_args.num_decoding_threads is not None and data_args.num_decoding_threads < 1:
        yield "--num_decoding_threads must be at least 1."
    num_workers = args.dataloader_num_workers
    if num_workers > 1:
        yield (
            f"--dataloader_num_workers {num_workers}: one worker reads. "
            f"Use --num_decoding_threads {num_workers}."
        )


def hub_problems(data_args: Any, args: transformers.Seq2SeqTrainingArguments) -> Iterator[str]:
    """What is pushed and fetched."""
    if data_args.push_predictions and not args.push_to_hub:
        yield "--push_predictions needs --push_to_hub."
    if args.hub_always_push:
        yield "--hub_always_push is refused: the newest save always follows a running upload."
    if args.resume_from_checkpoint == "hub" and not args.hub_model_id:
        yield "--resume_from_checkpoint hub needs --hub_model_id USER/NAME."


def process_problems(data_args: Any, args: transformers.Seq2SeqTrainingArguments) -> Iterator[str]:
    """What several processes, and a model in parts, cannot do."""
    wait_in_seconds = 60 * data_args.max_network_wait_in_minutes
    if args.world_size > 1 and wait_in_seconds >= args.ddp_timeout:
        yield f"--ddp_timeout must exceed {wait_in_seconds:g} s, the network wait."
    if data_args.dry_run and args.world_size > 1:
        yield "--dry_run tries one process: start it without torchrun."
    if data_args.dry_run and (args.fsdp or args.deepspeed):
        yield "--dry_run: leave out --fsdp and --deepspeed."
    is_zero3 = transformers.integrations.is_deepspeed_zero3_enabled()
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


def refused_problems(args: transformers.Seq2SeqTrainingArguments) -> Iterator[str]:
    """Flags of the library that would do nothing or harm here."""
    defaults = {field.name: field.default for field in fields(args)}
    for name, reason in REFUSED_ARGUMENTS.items():
        if getattr(args, name) != defaults[name]:
            yield f"--{name} is refused: {reason}."


def check_flags(data_args: Any, args: transformers.Seq2SeqTrainingArguments) -> None:
    """Raises: UserError with a line for each problem, the most basic first."""
    problems = [
        *task_problems(data_args, args),
        *training_problems(data_args, args),
        *number_problems(data_args, args),
        *hub_problems(data_args, args),
        *process_problems(data_args, args),
        *refused_problems(args),
    ]
    if problems:
        raise UserError("\n".join(problems))


def check_devices(args: transformers.Seq2SeqTrainingArguments) -> None:
    """Raises UserError for GPU flags without a usable GPU, naming the driver if that is the
    reason."""
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs in one process. Start with torchrun --nproc_per_node {args.n_gpu}."
        )
    reason = "--use_cpu was given" if args.use_cpu else ""
    if not torch.cuda.is_available() and not args.use_cpu:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:  # the second: a CPU build of torch
            reason = str(error).split(". ")[0].splitlines()[0]
    if "driver" in reason and "too old" in reason:
        version = torch.__version__.split("+")[0]
        raise UserError(
            f"{reason}. Update the NVIDIA driver, or install the build of torch {version} for its "
            "CUDA version (see pytorch.org), or pass --use_cpu."
        )
    if args.fp16 and reason:
        raise UserError(f"--fp16 needs a GPU: {reason}. Leave out --fp16 to train on the CPU.")


def check_optimizer(args: transformers.Seq2SeqTrainingArguments) -> None:
    """Raises UserError if --optim needs a package that is not installed. The library would say so,
    with a traceback, once the model is loaded; some of its optimisers cannot be asked earlier and are
    left to it."""
    try:
        transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:  # by optimiser (5.23, trainer_optimizer.py)
        if "install" in str(error):
            raise UserError(f"--optim {args.optim.value}: {one_line(error)}") from error


def check_adapters(args: transformers.Seq2SeqTrainingArguments, has_adapters: bool) -> None:
    """Raises UserError where adapters cannot be merged: one process would need the whole model."""
    is_split = args.fsdp or transformers.integrations.is_deepspeed_zero3_enabled()
    if has_adapters and is_split:
        raise UserError("--lora_rank: adapters take little memory. Leave out --fsdp or ZeRO-3.")
