"""The command line and YAML files to arguments; retired and refused flags."""

import json
from pathlib import Path
from typing import Any

import transformers
import yaml

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.network import as_user_error

# Flags of 2022 that are gone: what to write instead, and the flags that it stands for.
LOGIN = "the environment variable HF_TOKEN, or `hf auth login` (a flag would end up in training_args.bin)"
RETIRED_BY_REPLACEMENT = {
    "--eval_strategy": "evaluation_strategy",
    LOGIN: "use_auth_token hub_token push_to_hub_token",
    "a new --output_dir (in the same one, a run continues from its newest checkpoint)": "overwrite_output_dir",
    "--freeze_encoder (Whisper has no other part to freeze)": "freeze_feature_encoder",
    "--language and --task": "forced_decoder_ids",
    "nothing: the checkpoint's generation config decides": "suppress_tokens",
    "nothing: it never had an effect on a stream": "group_by_length length_column_name overwrite_cache",
    "--warmup_steps with a number below 1 (0.1 warms up for a tenth of the steps)": "warmup_ratio",
    "--text_column_name": "text_column",
    "nothing: it comes with the model": "config_name tokenizer_name feature_extractor_name use_fast_tokenizer",
    "--fp16 or --bf16": "fp16_backend fp16_opt_level half_precision_backend",
    "--num_decoding_threads": "preprocessing_num_workers",
    "--per_device_train_batch_size": "per_gpu_train_batch_size",
    "--per_device_eval_batch_size": "per_gpu_eval_batch_size",
    "--use_cpu": "no_cuda",
    "the environment variable TENSORBOARD_LOGGING_DIR (default: OUTPUT_DIR/runs)": "logging_dir",
    "--hub_model_id ORGANISATION/NAME": "push_to_hub_model_id push_to_hub_organization",
    "--optim adafactor": "adafactor",
    "--fsdp": "sharded_ddp",
    "--fsdp_config": "fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap",
    "nothing: it is gone from transformers": """include_inputs_for_metrics jit_mode_eval mp_parameters past_index
    ray_scope save_safetensors tpu_metrics_debug tpu_num_cores use_ipex use_legacy_prediction_loop use_mps_device""",
}
RETIRED_ARGUMENTS = {
    name: hint for hint, names in RETIRED_BY_REPLACEMENT.items() for name in names.split()
}
# Flags of the library that would do nothing or harm here: refused unless they are left alone.
REFUSED_ARGUMENTS = {
    "auto_find_batch_size": "it starts the stream again; halve the batch and double --gradient_accumulation_steps",
    "batch_eval_metrics": "error rates are computed over all rows at once",
    "bf16_full_eval": "evaluation already runs in bfloat16 with --bf16",
    "dataloader_drop_last": "the stream is endless and has no last batch",
    "enable_jit_checkpoint": "SIGTERM, and three more signals, already save",
    "eval_accumulation_steps": "only token ids are gathered in evaluation",
    "eval_do_concat_batches": "the scorecard needs one array",
    "fp16_full_eval": "evaluation already runs in float16 with --fp16",
    "ignore_data_skip": "the stream continues from its own saved position",
    "include_num_input_tokens_seen": "it would count log-mel values",
    "label_names": "the labels are known",
    "prediction_loss_only": "WER needs real generation",
    "save_only_model": "the run could not be continued",
    "sortish_sampler": "it never had an effect on a stream",
    "train_sampling_strategy": "a stream is shuffled by --shuffle_buffer_size",
    "use_liger_kernel": "it has no Whisper kernels",
}


class ArgumentParser(transformers.HfArgumentParser):
    """HfArgumentParser whose errors are one line and which accepts no abbreviated flags."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}. Run with --help for the list of flags.")


def read_yaml(flag: str, path: str, kind: type, example: str) -> Any:
    """The list or mapping that a YAML file holds. Raises: UserError if it cannot be read or holds something else."""
    with as_user_error(OSError, yaml.YAMLError, where=f"{flag} {path}"):
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(value, kind):
        raise UserError(
            f"{flag} {path}: expected lines like '{example}', found {type(value).__name__}."
        )
    return value


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Names and values of a YAML file as a command line, so that argparse converts 1e-5 to a number."""
    flags: list[str] = []
    for name, value in settings.items():
        value = (
            "no" if (name, value) == ("language", False) else value
        )  # YAML takes Norwegian for False
        values = value if isinstance(value, list) else [value]
        if value is not None:
            flags += [
                f"--{name}",
                *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values),
            ]
    return flags
