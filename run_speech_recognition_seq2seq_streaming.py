#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "transformers>=5.20,<6",
#     "datasets>=5.1,<6",
#     "accelerate>=1.15,<2",
#     "evaluate>=0.4.6,<1",
#     "jiwer>=4.0,<5",
#     "soundfile>=0.13,<1",
#     "soxr>=1,<2",
#     "tensorboard>=2.19,<3",
# ]
# ///
"""Fine-tune a Whisper model on speech that is streamed from the Hugging Face Hub or from disk.

    python run_speech_recognition_seq2seq_streaming.py --model_name_or_path openai/whisper-small --language es \\
        --dataset_name facebook/multilingual_librispeech --dataset_config_name spanish --text_column_name transcript \\
        --do_train --do_eval --eval_split_name dev --max_steps 2000 --fp16 --output_dir whisper-small-es
    python run_speech_recognition_seq2seq_streaming.py --config recipe.yaml --learning_rate 1e-5
    python run_speech_recognition_seq2seq_streaming.py --help

The way of one utterance: load_source -> SpeechStream (one order) -> decode_audio -> log_mel -> encode_text ->
SpeechCollator -> SpeechTrainer -> Scorecard -> model_card. `datasets` moves bytes and never decodes; rows are shuffled
before they are decoded; a bad row becomes a Rejection with a reason and never ends the run.
"""

import atexit
import contextlib
import copy
import csv
import difflib
import errno
import functools
import importlib.metadata
import io
import itertools
import json
import logging
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import unicodedata
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

# Set before the libraries read them. Threads of our own pool tokenise; a fork after that would only bring warnings.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import evaluate
import fsspec
import huggingface_hub
import jiwer
import numpy as np
import pyarrow.parquet
import soundfile
import soxr
import torch
import transformers
import yaml
from accelerate.utils import gather_object
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.tensorboard import SummaryWriter
from transformers.hf_argparser import HfArg
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir
from transformers.modelcard import make_markdown_table
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE
from transformers.trainer_utils import rotate_checkpoints

logger = logging.getLogger(__name__)

SAMPLE_RATE_IN_HZ = 16_000  # every Whisper checkpoint was trained on 16 kHz
HOP_LENGTH_IN_SAMPLES = 160  # 10 ms between two log-mel frames
FFT_LENGTH_IN_SAMPLES = 400  # 25 ms under each frame
FRAMES_PER_POSITION = 2  # the encoder's second convolution halves the frames; 20 ms, a timestamp's step
HANN_WINDOW = torch.hann_window(FFT_LENGTH_IN_SAMPLES)
SILENCE = -1.5  # log-mel of digital silence: (log10(1e-10) + 4) / 4
MAX_BLOCK_IN_BYTES = 512 * 2**20  # bounds the shuffle block's memory, whatever the rows' size
ROWS_BEFORE_REJECTION_CHECK = 1_000
SLOWEST_UPLOAD_IN_BYTES_PER_SECOND = 500_000  # what is slower counts as hung
MAX_DATA_WAIT_FRACTION = 0.1  # of the time, before the log gives advice
MAX_BROKEN_STEPS = 10  # steps in a row without a finite loss before the run is given up
STOP_SIGNALS = [getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, n)]
WHOLE_SAVES = "zero_optimization.stage3_gather_16bit_weights_on_model_save"  # in DeepSpeed's file
IGNORED_LABEL = -100  # torch's cross-entropy skips it
# Written without spaces between words, so that only characters can be counted (Whisper's paper, table 13, and kin).
UNSPACED_LANGUAGES = ("zh", "yue", "ja", "th", "lo", "my", "km")
# Tried in this order when no column is named; the last ones are the file types in a webdataset's tars.
AUDIO_COLUMNS = ("audio", "audio_filepath", "path", "file_name", "flac", "wav", "mp3", "ogg", "opus")
TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "normalized_text", "txt")

# Peak learning rates for full fine-tuning by the model's width, about a fortieth of pre-training's (Jong Wook Kim, as
# quoted by the whisper-finetune README). Narrower models are toys trained from nothing.
LEARNING_RATE_BY_WIDTH = {0: 1e-3, 384: 3.75e-5, 512: 2.5e-5, 768: 1.25e-5, 1024: 6.25e-6, 1280: 5e-6}
LORA_LEARNING_RATE = 1e-3  # as peers have it, whatever the model's size


class UserError(ValueError):
    """Something that the user can mend: reported as one line with exit code 2."""


# ---------------------------------------------------------------------------------------------------- arguments ----
@dataclass
class ModelArguments:
    """Which model to start from."""

    model_name_or_path: str = HfArg(help="Whisper checkpoint: a Hub id or a folder (required).")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of the model on the Hub.")
    cache_dir: str | None = HfArg(default=None, help="Folder for what is downloaded; default: the Hub library's own.")
    freeze_encoder: bool = HfArg(default=False, help="Trains the decoder only, which takes less memory.")
    lora_rank: int = HfArg(default=0, help="Trains low-rank adapters of this rank (needs peft); 0: all weights.")
    model_index_name: str | None = HfArg(default=None, help="Name on the card; default: the repository's or folder's.")
    config: str | None = HfArg(default=None, help="YAML file of flags and values; the command line overrides it.")


@dataclass
class DataArguments:
    """Which speech to train and score on, and what is done to it."""

    dataset_name: str | None = HfArg(default=None, help="Dataset: a Hub id, a folder, or a CSV, TSV or JSONL file.")
    data_mix: str | None = HfArg(default=None, help="Instead of --dataset_name: YAML list of datasets with flags.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the dataset, often the language.")
    train_split_name: str = HfArg(default="train", help="Split to train on; 'train+validation' uses all of both.")
    eval_split_name: str = HfArg(default="validation", help="Split to score every --eval_steps and at the end.")
    test_split_name: str | None = HfArg(default=None, help="Split to score once, at the end, with the best model.")
    predict_split_name: str = HfArg(default="test", help="Split that --do_predict transcribes; needs no references.")
    audio_column_name: str | None = HfArg(default=None, help="Column with the audio; default: audio, path, ...")
    text_column_name: str | None = HfArg(default=None, help="Column with the text; default: text, sentence, ...")
    max_duration_in_seconds: float = HfArg(default=30.0, help="Rejects (never cuts) clips longer than this or 30 s.")
    min_duration_in_seconds: float = HfArg(default=0.0, help="Rejects clips that are shorter than this.")
    max_train_samples: int | None = HfArg(default=None, help="Trains on the first N rows only, rejected ones counted.")
    max_eval_samples: int | None = HfArg(default=None, help="Scores the first N rows of each split; default: all.")
    max_rejected_fraction: float = HfArg(default=0.5, help="Ends the run if more of 1,000 rows are unfit; 1: never.")
    do_lower_case: bool = HfArg(default=False, help="Lower-cases the transcripts, and so what the model will write.")
    do_remove_punctuation: bool = HfArg(default=False, help="Removes punctuation, and nothing else, from transcripts.")
    do_normalize_eval: bool = HfArg(default=True, help="Normalised text for eval_wer, eval_cer; False: as written.")
    language: str | None = HfArg(default=None, help="Language spoken, a code or an English name; not for .en models.")
    task: str = HfArg(default="transcribe", help="'transcribe', or 'translate' (into English).")
    shuffle_buffer_size: int = HfArg(default=500, help="Rows of a shuffle block, undecoded; 1 keeps the files' order.")
    data_report_samples: int = HfArg(default=500, help="Rows of each source in the data report; 0: no report.")
    train_window: str = HfArg(default="full", help="'longest' pads to a batch's longest clip, not 30 s: far faster.")
    full_window_fraction: float = HfArg(default=0.1, help="Share of --train_window longest's batches padded to 30 s.")
    pack_utterances: bool = HfArg(default=False, help="Joins the utterances of a batch to windows of up to 30 s.")
    timestamp_probability: float = HfArg(default=0.0, help="Share of windows with timestamps of their utterances.")
    apply_spec_augment: bool = HfArg(default=False, help="Masks stretches of time and mel bands (SpecAugment).")
    speed_perturbation: bool = HfArg(default=False, help="Trains on clips played at 0.9 to 1.1 of their speed.")
    streaming: bool = HfArg(default=True, help="Reads rows as they are needed; False downloads the files first.")
    num_decoding_threads: int | None = HfArg(default=None, help="Threads that decode; default: all cores, at most 8.")
    max_network_wait_in_minutes: float = HfArg(default=30.0, help="How long a lost network is waited for; 0: not.")
    max_train_time_in_hours: float | None = HfArg(default=None, help="Saves and stops (exit code 75) after this time.")
    eval_before_training: bool = HfArg(default=False, help="Scores the untouched model first, for a before/after.")
    long_form: bool = HfArg(default=False, help="Also scores longer clips, by Whisper's long-form generation.")
    push_predictions: bool = HfArg(default=False, help="Also uploads transcripts: --push_to_hub leaves them out.")
    early_stopping_patience: int | None = HfArg(default=None, help="Ends after N evaluations without a better score.")
    dry_run: bool = HfArg(default=False, help="Tries the whole job in minutes and says what it needs; leaves nothing.")


@dataclass
class DataRecord(DataArguments):
    """One dataset of the run: the flags above, overridden by its entries in --data_mix."""

    name: str = ""  # in the log, in row ids and metric names; empty without --data_mix
    weight: float = 1.0  # its share of the training rows, to the sum of all weights


# What an entry of --data_mix may say; everything else is one setting for the whole run.
RECORD_KEYS = """name weight dataset_name dataset_config_name train_split_name eval_split_name test_split_name
predict_split_name language audio_column_name text_column_name min_duration_in_seconds max_duration_in_seconds
max_train_samples max_eval_samples do_lower_case do_remove_punctuation do_normalize_eval""".split()


@dataclass
class TrainingArguments(transformers.Seq2SeqTrainingArguments):
    """The library's arguments, with other defaults: those below, and greater_is_better False for every error rate (the
    library would keep the worst model)."""

    learning_rate: float | None = HfArg(default=None, help="Peak learning rate; default: by size, 3.75e-5 to 5e-6.")
    warmup_steps: float = HfArg(default=0.1, help="Steps in which the rate rises; below 1, their share of all.")
    num_train_epochs: float | None = HfArg(default=None, help="Passes instead of --max_steps, if rows can be counted.")
    predict_with_generate: bool = HfArg(default=True, help="Must stay True: WER needs real generation.")
    report_to: str = HfArg(default="tensorboard", help="Where the curves go: tensorboard, wandb, none.")
    eval_strategy: str = HfArg(default="steps", help="When --do_eval scores: steps, or no (at the end only).")
    dataloader_num_workers: int = HfArg(default=1, help="Reading processes: 1, or 0; see --num_decoding_threads.")
    ddp_timeout: int = HfArg(default=7200, help="Seconds that a process waits for the others, at most.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="True would hide NaN losses from the log.")
    resume_from_checkpoint: str | None = HfArg(default="auto", help="'auto' (the newest here), 'hub', PATH or 'no'.")

    def __post_init__(self) -> None:
        if not self.do_eval:
            self.eval_strategy = "no"  # the library would switch do_eval on instead
        self.eval_steps = self.eval_steps or self.save_steps  # the library's default is logging_steps: far too often
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "wer"
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = not re.search("wer|cer|loss", self.metric_for_best_model)
        self.dataloader_pin_memory &= torch.cuda.is_available()  # torch warns otherwise
        if self.gradient_checkpointing is not None:  # the known name; transformers 5.23 warns about it
            self.activation_checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None
        self.remove_unused_columns = False  # our collator takes rows apart itself
        # Dispatching, the default for evaluation on several processes, concatenates batches of unequal width
        # (RuntimeError in accelerate 1.15, data_loader.py:845).
        self.accelerator_config = self.accelerator_config or {"dispatch_batches": False}
        super().__post_init__()


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
RETIRED_ARGUMENTS = {name: hint for hint, names in RETIRED_BY_REPLACEMENT.items() for name in names.split()}

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
    with mendable(OSError, yaml.YAMLError, where=f"{flag} {path}"):
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(value, kind):
        raise UserError(f"{flag} {path}: expected lines like '{example}', found {type(value).__name__}.")
    return value


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Names and values of a YAML file as a command line, so that argparse converts 1e-5 to a number."""
    flags: list[str] = []
    for name, value in settings.items():
        value = "no" if (name, value) == ("language", False) else value  # YAML takes Norwegian for False
        values = value if isinstance(value, list) else [value]
        if value is not None:
            flags += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return flags


def data_records(data_args: DataArguments) -> list[DataRecord]:
    """The datasets of the run: that of the flags, or the entries of --data_mix, where null takes a setting away.
    Raises: UserError for what an entry cannot say."""
    if data_args.data_mix is None:
        return [DataRecord(**asdict(data_args))]
    records: list[DataRecord] = []
    for number, entry in enumerate(read_yaml("--data_mix", data_args.data_mix, list, "- dataset_name: path/to/data")):
        where = f"--data_mix {data_args.data_mix}, entry {number + 1}"
        if not isinstance(entry, dict) or "dataset_name" not in entry or set(entry) - set(RECORD_KEYS):
            raise UserError(f"{where}: expected dataset_name and any of: {', '.join(RECORD_KEYS)}. Found: {entry}.")
        parts = (Path(str(entry["dataset_name"])).stem, entry.get("dataset_config_name"))
        name = "_".join(str(part) for part in parts if part)
        settings = asdict(data_args) | {"name": name} | entry
        with mendable(ValueError, where=where):
            (record,) = ArgumentParser(DataRecord).parse_args_into_dataclasses(as_flags(settings))
        nothing = {key: None for key in entry if entry[key] is None}
        record = replace(record, **nothing | {"name": re.sub(r"\W", "_", record.name)})
        if record.weight <= 0 or record.name in [earlier.name for earlier in records]:
            raise UserError(f"{where}: needs a weight above 0, and its own 'name: ...' ({record.name!r} is taken).")
        records.append(record)
    return records


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Command line (and --config file) to the three groups of arguments.
    Raises: UserError for unknown or retired flags and for values that the libraries refuse."""
    outer = ArgumentParser([], add_help=False, allow_abbrev=False)
    outer.add_argument("--config")
    config = outer.parse_known_args(argv)[0].config
    flags = (as_flags(read_yaml("--config", config, dict, "max_steps: 1000")) if config else []) + argv
    names = {flag.split("=")[0].replace("-", "_").replace("__", "--", 1) for flag in flags}
    for name in sorted(names & {f"--{retired}" for retired in RETIRED_ARGUMENTS}):
        raise UserError(f"{name} is retired. Write instead: {RETIRED_ARGUMENTS[name[2:]]}.")
    if names & {"--test_split_name", "--early_stopping_patience"} and {"--do_train", "--do_eval"} <= names:
        flags = ["--load_best_model_at_end", "True", *flags]  # both are about the best model
    # Ours last: that is where the terminal stands after --help.
    parser = ArgumentParser((TrainingArguments, ModelArguments, DataArguments), allow_abbrev=False)
    try:
        training_args, model_args, data_args, unknown = parser.parse_args_into_dataclasses(
            flags, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if unknown:
        known = [option for option in parser._option_string_actions if option.startswith("--")]
        nearest = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        raise UserError(f"unknown flag {unknown[0]}." + (f" Did you mean {nearest[0]}?" if nearest else ""))
    return model_args, data_args, training_args


def check_arguments(data_args: DataArguments, args: TrainingArguments) -> None:
    """Raises UserError for everything that can be known to be wrong before any download or GPU work."""
    defaults = {f.name: f.default for f in fields(args)}
    training, scoring, workers = args.do_train, args.do_eval, args.dataloader_num_workers
    shortest, longest = data_args.min_duration_in_seconds, data_args.max_duration_in_seconds
    is_timed = args.max_steps > 0 or args.num_train_epochs is not None
    from_hub, wait = args.resume_from_checkpoint == "hub", 60 * data_args.max_network_wait_in_minutes
    for_training = "train_window pack_utterances timestamp_probability apply_spec_augment speed_perturbation".split()
    idle = [f"--{name}" for name in for_training if getattr(data_args, name) not in (0, "full") and not training]
    fractions = ("max_rejected_fraction", "full_window_fraction", "timestamp_probability")
    is_odd_fraction = data_args.train_window == "full" and data_args.full_window_fraction not in (0.1, 1)
    best = {name: getattr(data_args, name) for name in ("early_stopping_patience", "eval_before_training")}
    best["load_best_model_at_end"] = args.load_best_model_at_end
    rules = [(getattr(args, n) != defaults[n], f"--{n} is refused: {why}.") for n, why in REFUSED_ARGUMENTS.items()]
    rules += [(on and not (training and scoring), f"--{n} needs --do_train and --do_eval.") for n, on in best.items()]
    rules += [(not 0 <= getattr(data_args, name) <= 1, f"--{name} must lie between 0 and 1.") for name in fractions]
    rules += [
        (not (training or scoring or args.do_predict), "nothing to do. Pass --do_train, --do_eval or --do_predict."),
        (data_args.long_form and not (scoring or args.do_predict), "--long_form needs --do_eval or --do_predict."),
        (not args.output_dir, "--output_dir is missing. Pass --output_dir FOLDER."),
        (not args.predict_with_generate, "--predict_with_generate False: WER needs real generation. Leave it out."),
        (data_args.dry_run and not training, "--dry_run needs --do_train."),
        (data_args.dry_run and args.world_size > 1, "--dry_run tries one process: start it without torchrun."),
        (workers > 1, f"--dataloader_num_workers {workers}: one worker reads. Use --num_decoding_threads {workers}."),
        ("epoch" in (args.eval_strategy, args.save_strategy), "a stream has no epochs. Use the strategy steps."),
        (data_args.task not in ("transcribe", "translate"), f"--task {data_args.task}: use transcribe or translate."),
        (shortest >= longest, f"--min_duration_in_seconds {shortest} is not below the longest, {longest}."),
        (data_args.shuffle_buffer_size < 1, "--shuffle_buffer_size must be at least 1 (1 keeps the files' order)."),
        ((data_args.num_decoding_threads or 1) < 1, "--num_decoding_threads must be at least 1."),
        (data_args.train_window not in ("full", "longest"), "--train_window: use full or longest."),
        (idle, f"{' and '.join(idle)}: of no effect without --do_train."),
        (is_odd_fraction, "--full_window_fraction needs --train_window longest: 'full' is a fraction of 1."),
        (args.max_steps > 0 and args.num_train_epochs, "pass --max_steps or --num_train_epochs, not both."),
        (data_args.push_predictions and not args.push_to_hub, "--push_predictions needs --push_to_hub."),
        (args.hub_always_push, "--hub_always_push is refused: the newest save always follows a running upload."),
        (from_hub and not args.hub_model_id, "--resume_from_checkpoint hub needs --hub_model_id USER/NAME."),
        (bool(data_args.dataset_name) == bool(data_args.data_mix), "pass either --dataset_name or --data_mix FILE."),
        (args.world_size > 1 and wait >= args.ddp_timeout, f"--ddp_timeout must exceed {wait:g} s, the network wait."),
        (training and not is_timed, "how long to train? Pass --max_steps N (or --num_train_epochs N)."),
    ]
    for message in (message for is_broken, message in rules + sharding_rules(data_args, args) if is_broken):
        raise UserError(message)
    if training:
        check_optimizer(args)


def sharding_rules(data_args: DataArguments, args: TrainingArguments) -> list[tuple[Any, str]]:
    """What a model in parts cannot do: whether that is wanted, and a message."""
    on_cpu, is_zero3 = args.device.type == "cpu", transformers.integrations.is_deepspeed_zero3_enabled()
    is_ours = {("fsdp_version", 2), ("state_dict_type", "FULL_STATE_DICT")} <= (args.fsdp_plugin_args or {}).items()
    return [
        ((args.fsdp or args.deepspeed) and data_args.dry_run, "--dry_run: leave out --fsdp and --deepspeed."),
        (args.fsdp and not is_ours, "--fsdp_config: use version 2 and FULL_STATE_DICT."),
        ((args.fsdp or is_zero3) and data_args.long_form, "--long_form: leave out --fsdp or ZeRO-3 (whole models)."),
        (args.fsdp and (on_cpu or args.world_size == 1), "--fsdp needs several GPUs: on CPUs accelerate ignores it."),
        (is_zero3 and not args.hf_deepspeed_config.is_true(WHOLE_SAVES), f"--deepspeed: ZeRO-3 needs {WHOLE_SAVES}."),
        (args.deepspeed and on_cpu, "--deepspeed needs GPUs: on CPUs accelerate lets every process run alone."),
    ]


def check_devices(args: TrainingArguments) -> None:
    """Raises UserError for GPU flags without a usable GPU, naming the driver if that is the reason."""
    if args.n_gpu > 1:
        raise UserError(f"{args.n_gpu} GPUs in one process. Start with torchrun --nproc_per_node {args.n_gpu}.")
    reason = "--use_cpu was given" if args.use_cpu else ""
    if not torch.cuda.is_available() and not args.use_cpu:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:  # the second is what CPU builds of torch raise
            reason = str(error).split(". ")[0].splitlines()[0]
    if "driver" in reason and "too old" in reason:
        build = f"the build of torch {torch.__version__.split('+')[0]} for its CUDA version (see pytorch.org)"
        raise UserError(f"{reason}. Update the NVIDIA driver, or install {build}, or pass --use_cpu.")
    if args.fp16 and reason:
        raise UserError(f"--fp16 needs a GPU: {reason}. Leave out --fp16 to train on the CPU.")


def check_optimizer(args: TrainingArguments) -> None:
    """Raises UserError if --optim needs a package that is not installed. The library would say so, with a traceback,
    once the model is loaded; some of its optimisers cannot be asked earlier and are left to it."""
    try:
        transformers.Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:  # either, by optimiser (transformers 5.23, trainer_optimizer.py)
        if "install" in str(error):
            raise UserError(f"--optim {args.optim.value}: {one_line(error)}") from error


# ----------------------------------------------------------------------------------------------------- survival ----
class RunEnded(Exception):
    """The run ends early for a reason outside it; `code` is its exit code (the README has the table)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason


class StopSignals:
    """Turns SIGTERM, SIGINT, SIGHUP and SIGUSR1 into RunEnded(128 + n), at once or, while `is_deferred` (inside a step
    or a save), at the next `check`. A second Ctrl-C ends the process at once. Use as a context manager."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.is_deferred = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self.handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.received is None:
            self.received = number
            # Not through the logger: the signal may have come in the middle of a write to stderr, which then raises.
            os.write(2, f"\n{signal.Signals(number).name} received: saving and stopping.\n".encode())
            if not self.is_deferred:
                self.check()

    def ending(self) -> RunEnded:
        """What the signal that has come means."""
        return RunEnded(128 + self.received, f"ended by {signal.Signals(self.received).name}")

    def check(self) -> None:
        """Raises: RunEnded if a signal has come."""
        if self.received is not None:
            raise self.ending()


def ignore_signals(worker_id: int) -> None:
    """For the reading worker: a terminal or Slurm signals the whole group, but the parent decides. SIGTERM, which the
    DataLoader itself uses at its end, gives the parent two minutes to save; a second one ends the worker at once."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: (signal.alarm(120), signal.signal(signal.SIGTERM, signal.SIG_DFL)))
    sys.excepthook = lambda *_: None  # of a parent that leaves while it fetches a batch; our errors travel as data


def is_network_error(error: BaseException) -> bool:
    """Whether waiting may help: everything that the network or a server does but 401, 403 and 404."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    statuses = [e.response.status_code for e in chain if isinstance(e, HfHubHTTPError) and e.response is not None]
    if HF_HUB_OFFLINE or any(status in (401, 403, 404) for status in statuses):
        return False
    clients = ("httpx", "httpcore", "requests", "urllib3", "aiohttp", "socket")  # the last one: gaierror
    kinds = (ConnectionError, TimeoutError)
    return bool(statuses) or any(isinstance(e, kinds) or type(e).__module__.startswith(clients) for e in chain)


@contextlib.contextmanager
def mendable(*kinds: type[Exception], where: str, advice: str = "") -> Iterator[None]:
    """Raises: UserError that says where, in place of errors of these kinds; what the network did stays as it is."""
    try:
        yield
    except kinds as error:
        if is_network_error(error):
            raise
        raise UserError(f"{where}: {one_line(error)[:600]}{advice}") from error


@dataclass
class Patience:
    """Waits out network errors: 1, 2, 4 ... 60 s between tries, up to a limit that starts anew after each success."""

    limit_in_seconds: float
    pause_in_seconds: float = 1.0
    began: float | None = None

    def wait(self, error: Exception, task: str) -> None:
        """Sleeps. Raises: the error if waiting cannot help, RunEnded(75) if it has lasted too long."""
        if not is_network_error(error):
            if isinstance(error, HfHubHTTPError):
                raise UserError(f"{task}: {one_line(error)} Check the name, and HF_TOKEN, and start again.") from error
            raise error
        now = time.monotonic()
        self.began = self.began or now
        left = self.began + self.limit_in_seconds - now
        if left <= 0:
            minutes = self.limit_in_seconds / 60
            raise RunEnded(75, f"{task}: no network for {minutes:g} minutes ({one_line(error)[:300]})") from error
        pause = min(self.pause_in_seconds, left)
        logger.warning("%s: %s Trying again in %.0f s.", task, one_line(error)[:300], pause)
        time.sleep(pause)
        self.pause_in_seconds = min(2 * self.pause_in_seconds, 60.0)

    def reset(self) -> None:
        self.pause_in_seconds, self.began = 1.0, None


def patiently(function: Callable[..., Any], *args: Any, limit_in_seconds: float, task: str) -> Any:
    """function(*args), again after network errors. Raises: its other errors, RunEnded(75) past the limit."""
    patience = Patience(limit_in_seconds)
    while True:
        try:
            return function(*args)
        except Exception as error:
            patience.wait(error, task)


# --------------------------------------------------------------------------------------------------------- data ----
class Rejection(Exception):
    """Why a row cannot be used. Raised by the stages, returned as a value by UtterancePreparer, listed by the run."""

    def __init__(self, reason: str, detail: str = "", row: str = "") -> None:
        super().__init__(reason, detail, row)
        self.reason, self.detail, self.row = reason, detail, row


@dataclass(frozen=True)
class SpeechSource:
    """Rows of undecoded audio and text: one streaming dataset for each part of a split like 'train+validation'."""

    record: str  # its name in a --data_mix, else ""
    name: str
    config_name: str | None
    split: str
    kind: str  # the `datasets` builder: parquet, audiofolder, webdataset, ...; or manifest
    revision: str | None  # commit on the Hub, None for local files
    parts: tuple[datasets.IterableDataset, ...]
    data_files: tuple[str, ...]
    audio_column: str
    text_column: str
    num_rows: int | None  # None when only reading everything would tell

    def shards(self) -> list[tuple[int, int]]:
        """(part, shard within the part) for every file of the source, in the order of the files."""
        return [(part, shard) for part, ds in enumerate(self.parts) for shard in range(ds.num_shards)]

    def open_shard(self, part: int, shard: int) -> datasets.IterableDataset:
        return self.parts[part].shard(num_shards=self.parts[part].num_shards, index=shard)

    def url(self, part: int, shard: int) -> str:
        """Of a parquet file, which is a shard."""
        return self.data_files[self.shards().index((part, shard))]


def load_builder(name: str, config_name: str | None, cache_dir: str | None) -> datasets.DatasetBuilder:
    """The `datasets` builder; for a script dataset that of its parquet export. Raises: UserError."""
    try:
        return datasets.load_dataset_builder(name, config_name, cache_dir=cache_dir)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
    except (FileNotFoundError, ValueError) as error:  # not found, empty, private; the second: no such configuration
        if is_network_error(error):
            raise
        flag = f"--dataset_config_name {config_name}" if "BuilderConfig" in str(error) else f"--dataset_name {name}"
        hint = "" if "BuilderConfig" in str(error) else " Pass a Hub id or a folder; set HF_TOKEN for a private one."
        raise UserError(f"{flag}: {one_line(error)}{hint}") from error
    export, folder = "refs/convert/parquet", f", folder {config_name}" if config_name else ""
    logger.warning("%s is a script dataset, which is never run; trying its parquet export, %s.", name, export)
    where = f"--dataset_name {name}: a script dataset, never run; it has no parquet export (revision {export}{folder})"
    advice = " Look for a parquet copy of it on the Hub."
    with mendable(FileNotFoundError, ValueError, HfHubHTTPError, where=where, advice=advice):
        return datasets.load_dataset_builder(name, data_dir=config_name, cache_dir=cache_dir, revision=export)


def one_line(error: Exception | str) -> str:
    """A library's message without its line breaks, ending in a full stop."""
    text = " ".join(str(error).split())
    return text if text.endswith(".") else f"{text}."


def downloaded(builder: datasets.DatasetBuilder, cache_dir: str | None) -> str | None:
    """Downloads the Hub files that the builder reads (--streaming False). Returns their folder, None if local."""
    urls = (url for files in (builder.config.data_files or {}).values() for url in files)
    on_hub = [match for url in urls if (match := re.match(r"hf://datasets/([^@]+)@([^/]+)/(.+)", url))]
    if not on_hub:
        logger.warning("--streaming False has no effect: the files of %s are already here.", builder.dataset_name)
        return None
    repo_id, revision = on_hub[0].group(1, 2)
    patterns = [match.group(3) for match in on_hub] + ["README.md", "*metadata.*"]
    logger.info("downloading %d files of %s (--streaming False)", len(on_hub), repo_id)
    where = {"repo_type": "dataset", "revision": revision, "cache_dir": cache_dir}
    return huggingface_hub.snapshot_download(repo_id, allow_patterns=patterns, **where)


def find_columns(wanted: tuple[str | None, str | None], found: list[str], where: str) -> tuple[str, ...]:
    """The (audio, text) columns: those that are wanted, by default the first usual names; no text if "" is wanted and
    there is none. Raises: UserError."""
    columns = []
    for flag, name, usual in zip(("audio", "text"), wanted, (AUDIO_COLUMNS, TEXT_COLUMNS), strict=True):
        names = [known for known in ([name] if name else usual) if known in found] + [""] * (name == "")
        if not names:
            there = ", ".join(found) or "nothing: the split is empty"
            raise UserError(f"--{flag}_column_name {name or 'is missing'}: no such column in {where}. Found: {there}.")
        columns.append(names[0])
    return tuple(columns)


def open_part(builder: datasets.DatasetBuilder, part: str, columns: tuple) -> tuple[datasets.IterableDataset, tuple]:
    """One split with its audio as bytes or path, never decoded, and its text; and the names of these two columns.
    Folder and tar builders import torchcodec even for Audio(decode=False) (datasets 5.2, features/audio.py:106), so
    that their column becomes the file's path, or bytes and path. Raises: UserError for a wrong column."""
    dataset = builder.as_streaming_dataset(part)
    if dataset.features is None:
        dataset = dataset._resolve_features()  # reads the first rows; datasets 5.2 has no public name for it
    features = dataset.features or {}
    columns = find_columns(columns, list(features), f"split '{part}' of {builder.dataset_name}")
    audio, text = (features.get(column) for column in columns)
    dtype = getattr(text, "dtype", type(text).__name__)
    if columns[1] and dtype not in ("string", "large_string"):
        raise UserError(f"--text_column_name {columns[1]}: holds {dtype}, not text. Found: {', '.join(features)}.")
    if isinstance(audio, datasets.Audio):  # else it holds bytes, a path, or both already
        path = datasets.Value("string")
        undecoded = {"audiofolder": path, "webdataset": {"bytes": datasets.Value("binary"), "path": path}}
        dataset = dataset.cast_column(columns[0], undecoded.get(builder.name, datasets.Audio(decode=False)))
    return dataset.select_columns([column for column in columns if column]), columns


def manifest_files(name: str, config_name: str | None) -> dict[str, list[str]]:
    """{split: [file]} of a CSV, TSV or JSON-lines file, or of a folder with such files, like a Common Voice download
    as it unpacks (its language folder, or config_name inside it). Empty if `datasets` has to look at the place."""
    path = Path(name)
    suffixes = (".csv", ".tsv", ".jsonl", ".json")
    if path.is_file() and path.suffix in suffixes:
        return {"train": [str(path)]}
    if config_name and (path / config_name).is_dir():
        path /= config_name
    files = sorted(file for file in path.glob("*") if file.suffix in suffixes)
    is_other = any((*path.glob("*.parquet"), *path.glob("*.tar"), *path.glob("metadata.*")))
    return {} if is_other else {file.stem: [str(file)] for file in files}


def read_manifest(files: list[str], columns: tuple[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of manifests; if columns are given, only audio (as an absolute path) and text, under these names. A TSV
    file has no quoting (Common Voice); a JSON line that cannot be read becomes a row without audio and text."""
    for name in files:
        with open(name, encoding="utf-8-sig", errors="replace", newline="") as file:
            rows: Iterable[dict] = map(parse_json_line, file)
            if name.endswith(("csv", "tsv")):
                how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if name.endswith("tsv") else {}
                rows = csv.DictReader(file, **how)
            folder = Path(name).parent
            for number, row in enumerate(rows):
                if columns is None:
                    yield row
                    continue
                audio, text = (row.get(column) for column in columns)
                is_bare = audio and Path(audio).name == audio and not (folder / audio).is_file()
                if number == 0 and is_bare and (folder / "clips").is_dir():
                    folder /= "clips"  # as in a Common Voice download
                place = str(folder / audio) if audio and "://" not in audio else audio
                yield {columns[0]: place, columns[1]: None if text is None else str(text)}


def parse_json_line(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
        return value if isinstance(value, dict) else {}
    except ValueError:
        return {}


def load_source(
    name: str, config_name: str | None, split: str, columns: tuple, cache_dir: str | None, streaming: bool, record: str
) -> SpeechSource:
    """Opens a dataset without reading its audio; 'train+validation' becomes one source with the files of both.
    columns: (audio, text), None for the usual names, text "" if it may be missing.
    Raises: UserError for a missing dataset, configuration, split or column, or no rows."""
    builder, files = None, manifest_files(name, config_name)
    if not files:
        builder = load_builder(name, config_name, cache_dir)
        if not streaming and (folder := downloaded(builder, cache_dir)):
            builder = load_builder(folder, config_name if builder.config.name == config_name else None, cache_dir)
        if hasattr(builder.config, "decode_num_threads"):
            builder.config.decode_num_threads = 0  # else Hub folders are decoded whatever we cast (builder.py:1186)
        files = {str(part): list(urls) for part, urls in (builder.config.data_files or {}).items()}
    parts = [part.strip() for part in split.split("+")]
    for part in parts:
        if part not in files:
            raise UserError(f"split '{part}': {name} has no such split. Found: {', '.join(files)}.")
    data_files = tuple(url for part in parts for url in files[part])
    opened = []
    for part in parts:
        if builder is not None:
            dataset, columns = open_part(builder, part, columns)
        else:
            columns = find_columns(columns, list(next(read_manifest(files[part]), {})), files[part][0])
            arguments = {"files": files[part], "columns": columns}
            dataset = datasets.IterableDataset.from_generator(read_manifest, gen_kwargs=arguments)
        opened.append(dataset)
    num_rows = count_rows(builder, parts, opened, data_files)
    if num_rows == 0:
        raise UserError(f"split '{split}' of {name} is empty, or none of its {len(data_files)} files is readable.")
    commit = re.match(r"hf://datasets/[^@]+@([^/]+)/", data_files[0])
    kind, revision = builder.name if builder else "manifest", commit.group(1) if commit else None
    where = (record, name, config_name, split, kind, revision)
    return SpeechSource(*where, tuple(opened), data_files, *columns, num_rows)


def count_rows(builder: Any, parts: list[str], opened: list, urls: tuple[str, ...]) -> int | None:
    """Rows of a source without reading its audio: from parquet footers, metadata files or split info, else None."""
    if builder is None:
        return sum(1 for _ in read_manifest(list(urls)))
    if builder.name.endswith("folder"):
        return sum(1 for dataset in opened for _ in dataset)  # paths and metadata only
    if builder.name == "parquet":
        with ThreadPoolExecutor(16) as pool:
            return sum(map(sum, pool.map(rows_of_groups, urls)))
    counts = [splits[part].num_examples if part in (splits := builder.info.splits or {}) else None for part in parts]
    return sum(counts) if all(counts) else None


def rows_of_groups(url: str) -> list[int]:
    """Rows of each row group, according to a parquet file's footer; none if the file is damaged (its rejection is
    counted while reading)."""
    try:
        with fsspec.open(url, "rb") as file:
            footer = pyarrow.parquet.ParquetFile(file).metadata
            return [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    except pyarrow.ArrowInvalid:
        return []


def read_audio(value: str | dict[str, Any] | None) -> bytes:
    """The bytes of an undecoded audio cell: itself, or the file at its path (local, hf:// or any fsspec address).
    Raises: Rejection if the file is missing or empty."""
    cell = {"path": value, "bytes": None} if isinstance(value, str) else (value or {})
    data, path = cell.get("bytes"), cell.get("path")
    if data is None and path:
        try:
            with fsspec.open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError as error:
            raise Rejection("audio_missing", str(path)) from error
    if not data:
        raise Rejection("audio_empty", "no bytes")
    return data


def audio_file(data: bytes) -> int | BinaryIO:
    """The bytes as an open file; on Linux a descriptor in memory. From a BytesIO libsndfile would call Python some 490
    times for an mp3 clip, each time needing the GIL (benchmarks/data_pipeline.md)."""
    if not hasattr(os, "memfd_create") or len(data) > 2**30:  # one write takes 2 GiB at most
        return io.BytesIO(data)
    descriptor = os.memfd_create("audio")
    os.pwrite(descriptor, data, 0)
    return descriptor


def decode_audio(data: bytes, check_duration: Callable[[float], None], speed: float = 1.0) -> tuple[np.ndarray, int]:
    """An encoded file as (n_samples,) float32 in [-1, 1], mono, 16 kHz; and the sampling rate in Hz that it had.
    check_duration gets the seconds that the header states, before anything is decoded. speed: of playing it, which
    changes its pitch as well (speed perturbation, Ko et al., Interspeech 2015).
    soundfile reads wav, flac, ogg, opus and mp3 from memory; soxr resamples, as it does for librosa.resample, whose
    first call would import numba and scipy: a second, and 300 MB of two processes (benchmarks/data_pipeline.md).
    Raises: Rejection if the file is damaged, empty or holds numbers that are not finite."""
    try:
        with soundfile.SoundFile(audio_file(data)) as clip:  # closes the file, also one that it cannot open
            sampling_rate = rate = clip.samplerate
            check_duration(clip.frames / sampling_rate)
            with contextlib.suppress(Rejection):  # a clip that would leave the limits keeps its speed
                check_duration(clip.frames / sampling_rate / speed)
                rate = sampling_rate * speed
            waveform = clip.read(dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        kind = "m4a" if data[4:8] == b"ftyp" else "webm" if data[:4] == b"\x1aE\xdf\xa3" else None
        advice = f"{kind} is not supported: convert with ffmpeg -i IN.{kind} -ar 16000 -ac 1 OUT.flac"
        raise Rejection("audio_unreadable", advice if kind else one_line(error.error_string)) from error
    mono = waveform.mean(axis=1) if waveform.shape[1] > 1 else waveform[:, 0]
    if rate != SAMPLE_RATE_IN_HZ:
        mono = soxr.resample(mono, rate, SAMPLE_RATE_IN_HZ)
    if not np.isfinite(mono).all():
        raise Rejection("audio_not_finite", "NaN or infinite samples")
    if len(mono) == 0:  # one sample at 48 kHz is none at 16
        raise Rejection("audio_empty", "no samples")
    return np.ascontiguousarray(mono, dtype=np.float32), sampling_rate


def normalize_text(text: str, do_lower_case: bool, do_remove_punctuation: bool) -> str:
    """The transcript as it is trained: white space collapsed, and only what was asked for.
    Punctuation is Unicode category P, in any script; dashes separate words, all other marks vanish. Letters, digits,
    combining marks (vowel signs), symbols and brackets' contents stay."""
    if do_lower_case:
        text = text.lower()
    if do_remove_punctuation:
        kinds = ((character, unicodedata.category(character)) for character in text)
        text = "".join(" " if kind == "Pd" else c for c, kind in kinds if kind == "Pd" or kind[0] != "P")
    return " ".join(text.split())


# ----------------------------------------------------------------------------------------------------- features ----
def log_mel(waveform: np.ndarray, mel_filters: np.ndarray, max_frames: int) -> torch.Tensor:
    """Log-mel spectrogram of the real frames only, (n_mels, n_frames) float32: WhisperFeatureExtractor's first
    n_frames (largest difference 1.2e-7); the frames after them are one constant, see `pad_features`.
    waveform: (n_samples,) float32 at 16 kHz; mel_filters: (201, n_mels); max_frames: the model's window.
    Source: openai/whisper, audio.py, log_mel_spectrogram; transformers, feature_extraction_whisper.py."""
    window_in_samples = max_frames * HOP_LENGTH_IN_SAMPLES
    num_samples, half = min(len(waveform), window_in_samples), FFT_LENGTH_IN_SAMPLES // 2
    num_frames = min(max_frames, math.ceil((num_samples + half) / HOP_LENGTH_IN_SAMPLES))
    # Zeros as the library pads, as many as the last frames can see, then its reflection at both ends. In numpy, which
    # keeps the GIL for such short work: each small operation of torch would give it away.
    audio = np.zeros(min(num_samples + 2 * FFT_LENGTH_IN_SAMPLES, window_in_samples) + 2 * half, np.float32)
    audio[half : half + num_samples] = waveform[:num_samples]
    audio[:half], audio[-half:] = audio[2 * half : half : -1], audio[-half - 2 : -2 * half - 2 : -1]
    how = {"window": HANN_WINDOW, "center": False, "return_complex": True}
    stft = torch.stft(torch.from_numpy(audio), FFT_LENGTH_IN_SAMPLES, HOP_LENGTH_IN_SAMPLES, **how)[:, :num_frames]
    power = stft.real.square() + stft.imag.square()  # five times as fast as a sum over the last dimension
    log_spectrogram = (torch.from_numpy(mel_filters).to(torch.float32).T @ power).clamp_(min=1e-10).log10_()
    return log_spectrogram.clamp_(min=float(log_spectrogram.max()) - 8.0).add_(4.0).div_(4.0)


def pad_features(frames: torch.Tensor, frame_counts: list[int], window: int) -> torch.Tensor:
    """Clips laid end to end, (n_mels, sum of frame_counts), as (batch, n_mels, window) on the same device.
    The padding is what the library computes for digital silence: 8 (that is 2 after scaling) below the clip's loudest
    value, but never below silence itself."""
    clips = frames.split(frame_counts, dim=1)
    batch = frames.new_empty((len(clips), frames.shape[0], window))
    for row, clip in zip(batch, clips, strict=True):
        row[:, : clip.shape[1]] = clip
        row[:, clip.shape[1] :] = (clip.max() - 2.0).clamp(min=SILENCE)
    return batch


def encode_text(text: str, tokenizer: transformers.WhisperTokenizer, max_label_length: int) -> list[int]:
    """Token ids of a transcript with prefix and end: <|startoftranscript|> [language, task] <|notimestamps|> ... .
    Raises: Rejection if the decoder has too few positions for it."""
    ids = tokenizer.backend_tokenizer.encode(text).ids  # what tokenizer(text) calls, in half the time
    if len(ids) - 1 > max_label_length:  # the first one is only input, the last one only label
        raise Rejection("label_too_long", f"{len(ids) - 1} tokens, the model has {max_label_length} positions")
    return ids


@dataclass
class UtterancePreparer:
    """One source row to one training example; cheap checks first. Pickles; threads share it."""

    tokenizer: transformers.WhisperTokenizer
    mel_filters: np.ndarray  # (201, n_mels)
    window_in_frames: int
    max_label_length: int
    min_duration_in_seconds: float
    max_duration_in_seconds: float
    do_lower_case: bool
    do_remove_punctuation: bool
    max_network_wait_in_seconds: float
    needs_text: bool = True  # else rows without are transcribed all the same
    takes_long_clips: bool = False  # beyond the window, for long-form generation

    def check_duration(self, seconds: float) -> None:
        """Raises: Rejection outside the limits."""
        window_in_seconds = self.window_in_frames * HOP_LENGTH_IN_SAMPLES / SAMPLE_RATE_IN_HZ
        limit = math.inf if self.takes_long_clips else min(self.max_duration_in_seconds, window_in_seconds)
        if seconds > limit:
            raise Rejection("audio_too_long", f"{seconds:.2f} s, the limit is {limit:g} s")
        if seconds < self.min_duration_in_seconds:
            raise Rejection("audio_too_short", f"{seconds:.2f} s, the limit is {self.min_duration_in_seconds:g} s")

    def prepare(self, audio: str | dict[str, Any] | None, text: str | None, speed: float = 1.0) -> dict[str, Any]:
        """Features (n_mels, n_frames), label ids, text as trained and duration. Raises: Rejection."""
        if audio is None and text is None and self.needs_text:
            raise Rejection("row_unreadable", "neither audio nor text")
        text = normalize_text(text or "", self.do_lower_case, self.do_remove_punctuation)
        if self.needs_text and not text:
            raise Rejection("text_empty")
        labels = encode_text(text, self.tokenizer, sys.maxsize if self.takes_long_clips else self.max_label_length)
        data = patiently(read_audio, audio, limit_in_seconds=self.max_network_wait_in_seconds, task="reading audio")
        waveform, sampling_rate = decode_audio(data, self.check_duration, speed)
        seconds = len(waveform) / SAMPLE_RATE_IN_HZ
        num_frames = math.ceil(len(waveform) / HOP_LENGTH_IN_SAMPLES) if self.takes_long_clips else 0
        features = log_mel(waveform, self.mel_filters, max(self.window_in_frames, num_frames))
        # A long clip has no loss, so that its labels may be cut; its reference is the text.
        texts = {"labels": labels[: self.max_label_length + 1], "text": text}
        return {"features": features, **texts, "duration": seconds, "sampling_rate": sampling_rate}

    def __call__(self, row: "SourceRow", speed: float = 1.0) -> dict[str, Any] | Rejection:
        if row.rejection is not None:
            return row.rejection
        try:
            return {"id": row.id, **self.prepare(row.audio, row.text, speed)}
        except Rejection as rejection:
            return Rejection(rejection.reason, rejection.detail, row.id)


# ------------------------------------------------------------------------------------------------------- stream ----
@dataclass(frozen=True)
class SourceRow:
    """One undecoded row. `rejection` is set when the file could not be read from here on."""

    id: str
    audio: str | dict[str, Any] | None
    text: str | None
    rejection: Rejection | None = None

    def size_in_bytes(self) -> int:
        """Of the encoded audio; 0 if it lies on another machine."""
        cell = self.audio if isinstance(self.audio, dict) else {"path": self.audio}
        data, path = cell.get("bytes"), cell.get("path") or ""
        return len(data) if data is not None else os.path.getsize(path) if os.path.exists(path) else 0


@dataclass
class Block:
    """Rows that are permuted together, and the place in the source where the first of them stands (plain JSON)."""

    start: dict[str, Any]
    rows: list[SourceRow] = field(default_factory=list)
    size_in_bytes: int = 0

    def add(self, row: SourceRow) -> None:
        self.rows.append(row)
        self.size_in_bytes += len(row.audio.get("bytes") or b"") if isinstance(row.audio, dict) else 0


def shard_order(source: SpeechSource, seed: int | None, pass_number: int) -> list[tuple[int, int]]:
    """The files of a source in the order of this pass, a pure function of its arguments; seed None: as they are."""
    shards = source.shards()
    if seed is None:
        return shards
    return [shards[i] for i in np.random.default_rng([seed, pass_number]).permutation(len(shards))]


class ShardReader:
    """The rows of one file, without its first num_rows. Network errors are waited out and reading goes on at the same
    row; a damaged file ends in one rejected row that says so."""

    def __init__(self, source: SpeechSource, place: tuple[int, int], num_rows: int, wait_in_seconds: float) -> None:
        self.source, self.place, self.patience = source, place, Patience(wait_in_seconds)
        self.num_rows = num_rows  # before the one that was yielded last
        self.id = "/".join(filter(None, [source.record, source.split, *map(str, place)]))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Of a parquet file only the row groups that remain are read, of others everything."""
        shard, first, before = self.source.open_shard(*self.place), self.num_rows, 0
        if first == 0 or self.source.kind != "parquet":
            yield from shard.skip(first)
            return
        groups, sizes = shard.reshard(), rows_of_groups(self.source.url(*self.place))
        for number, size in enumerate(sizes):
            if before + size > first:
                yield from groups.shard(num_shards=len(sizes), index=number).skip(max(0, first - before))
            before += size

    def __iter__(self) -> Iterator[SourceRow]:
        while True:
            try:
                for row in self.rows():
                    audio, text = row[self.source.audio_column], row.get(self.source.text_column)
                    path = audio.get("path") if isinstance(audio, dict) else audio
                    self.patience.reset()
                    yield SourceRow(f"{self.id}/{path or ''}", audio, text)
                    self.num_rows += 1
                return
            except Exception as error:
                # pyarrow's "Corrupt snappy compressed data" is a bare OSError; the disk's have a number.
                is_bare = type(error) in (pyarrow.ArrowInvalid, OSError, tarfile.ReadError)
                if is_bare and getattr(error, "errno", None) is None:
                    yield SourceRow(self.id, None, None, Rejection("file_damaged", one_line(error)[:200], self.id))
                    return
                self.patience.wait(error, f"reading {self.source.name} {self.id}")


@dataclass(frozen=True)
class SpeechSet:
    """A source with the way its rows are prepared; max_rows: its first ones only; weight: in the draw of a mix."""

    source: SpeechSource
    preparer: UtterancePreparer
    max_rows: int | None = None
    weight: float = 1.0

    def rows_per_pass(self) -> int | None:
        return self.source.num_rows and min(self.source.num_rows, self.max_rows or self.source.num_rows)


def read_pass(
    item: SpeechSet, start: dict[str, Any], seed: int | None, block_size: int, share: slice = slice(None)
) -> Iterator[Block]:
    """The blocks of one pass from `start` on. Blocks end at block_size rows or 512 MB; seeking opens no earlier file.
    start: {"pass", "block", "rows" (before it), "shard" (place in the pass's order), "shard_row" (within the file)};
    seed: None keeps the files' order, as does max_rows, which must mean the same rows in every pass; share: which
    files in that order."""
    max_rows, wait_in_seconds = item.max_rows, item.preparer.max_network_wait_in_seconds
    order = shard_order(item.source, seed if max_rows is None else None, start["pass"])[share]
    block, number, num_rows = None, start["block"], start["rows"]
    for shard_number in range(start["shard"], len(order)):
        first = start["shard_row"] if shard_number == start["shard"] else 0
        reader = ShardReader(item.source, order[shard_number], first, wait_in_seconds)
        for row in reader:
            if max_rows is not None and num_rows >= max_rows:
                break
            if block is None:
                place = {"shard": shard_number, "shard_row": reader.num_rows}
                block = Block({"pass": start["pass"], "block": number, "rows": num_rows, **place})
            block.add(row)
            num_rows += 1
            if len(block.rows) >= block_size or block.size_in_bytes >= MAX_BLOCK_IN_BYTES:
                yield block
                block, number = None, number + 1
    if block is not None:
        yield block


def group_by_length(order: list[int], sizes: list[int], num_used: int, group_size: int, seed: list[int]) -> list[int]:
    """The order with clips of like size side by side, in groups that are shuffled as a whole: a batch of short clips
    needs a short window. num_used: rows of the source before these; what they have begun of a group is filled up."""
    begun = -num_used % group_size
    ranked = sorted(order[begun:], key=lambda i: sizes[i])  # stable: equal sizes stay shuffled
    groups = [ranked[i : i + group_size] for i in range(0, len(ranked), group_size)]
    rest = groups.pop() if groups and len(groups[-1]) < group_size else []
    np.random.default_rng(seed).shuffle(groups)
    return order[:begun] + [i for group in groups for i in group] + rest


def read_ahead(iterator: Iterator[Any], size_of: Callable[[Any], int]) -> Iterator[Any]:
    """The same items, fetched by a thread while earlier ones are used: one ahead, or two while they are small. With
    one, the short last block of a pass would be used up long before the next pass's first has come over a network."""
    reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
    pending = deque([reader.submit(next, iterator, None)])
    try:
        while (item := pending.popleft().result()) is not None:
            while len(pending) < (2 if size_of(item) < MAX_BLOCK_IN_BYTES // 4 else 1):
                pending.append(reader.submit(next, iterator, None))
            yield item
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


def map_in_order(function: Callable[[Any], Any], items: Iterable[tuple], num_threads: int) -> Iterator[tuple]:
    """(tag, function(item)) for (tag, item) in order, computed by threads with a bounded number in flight."""
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        submitted = ((tag, pool.submit(function, item)) for tag, item in items)
        pending = deque(itertools.islice(submitted, 4 * num_threads))
        while pending:
            tag, future = pending.popleft()
            yield tag, future.result()
            pending.extend(itertools.islice(submitted, 1))


FIRST_PLACE = {  # of one source
    "start": {"pass": 0, "block": 0, "rows": 0, "shard": 0, "shard_row": 0},
    "offset": 0,  # rows of the block already used
    "rows_per_pass": None,  # known after the first pass
    "used": 0,  # rows of this source used since the training began
}


def next_pass(positions: list[dict[str, Any]]) -> dict[str, Any]:
    """Where every rank goes on after ranks with files of their own: at the pass that none of them has begun."""
    sources = []
    for places in zip(*(position["sources"] for position in positions), strict=True):
        start = FIRST_PLACE["start"] | {"pass": 1 + max(place["start"]["pass"] for place in places)}
        sources.append(FIRST_PLACE | {"start": start, "used": sum(place["used"] for place in places)})
    return {"row": sum(position["row"] for position in positions), "skip": 0, "sources": sources}


def can_deal(sets: Iterable[SpeechSet], world_size: int) -> bool:
    """Whether every rank can have files of its own: each source has enough, and is used whole."""
    return world_size > 1 and all(i.max_rows is None and len(i.source.shards()) >= world_size for i in sets)


@functools.lru_cache(maxsize=2)
def draw_sources(seed: int, chunk: int, weights: tuple[float, ...]) -> np.ndarray:
    """Which source each of the rows chunk * 1000 ... chunk * 1000 + 999 of a mix comes from."""
    shares = np.array(weights) / sum(weights)
    return np.random.default_rng([seed, len(weights), chunk]).choice(len(weights), 1000, p=shares)


@dataclass(eq=False)
class SpeechStream(IterableDataset):
    """Endless passes over each source, block-shuffled; a seeded draw by weight mixes them to one global order, which
    goes to the ranks by micro-batch and is prepared by threads. If `is_dealt`, each rank has such an order of its own,
    of every world_size-th file of each pass. The order is a pure function of (seed, pass, sources), and then of the
    rank, whatever the threads, workers and timing. Every item is (position after it, example or Rejection or an error
    of the reader). Pickles; runs in one DataLoader worker."""

    sets: tuple[SpeechSet, ...]
    seed: int
    block_size: int
    micro_batch_size: int
    num_threads: int
    rank: int = 0
    world_size: int = 1
    position: dict[str, Any] | None = None  # None: the beginning
    is_dealt: bool = False
    is_grouped: bool = False  # clips of like length in one batch
    has_speeds: bool = False  # each row at its own speed

    def place(self, number: int) -> dict[str, Any]:
        """Where reading of one source begins."""
        return self.position["sources"][number] if self.position else FIRST_PLACE

    def own_seed(self) -> int:
        """Of what is drawn for the n-th row: ranks with files of their own count each for itself, and draw so too."""
        return self.seed + (self.rank << 32) * self.is_dealt

    def blocks(self, number: int) -> Iterator[tuple[Block, int | None]]:
        """Endless (block, rows of a whole pass if known) of one source, beginning with the block of its place."""
        item = self.sets[number]
        start, rows_per_pass = self.place(number)["start"], self.place(number)["rows_per_pass"]
        seed = self.seed if self.block_size > 1 else None
        share = slice(self.rank, None, self.world_size) if self.is_dealt else slice(None)
        while True:
            num_rows = start["rows"]
            for block in read_pass(item, start, seed, self.block_size, share):
                num_rows += len(block.rows)
                yield block, rows_per_pass
            if num_rows == 0 and not self.is_dealt:
                raise UserError(f"split '{item.source.split}' of {item.source.name} is empty.")
            rows_per_pass = num_rows
            start = FIRST_PLACE["start"] | {"pass": start["pass"] + 1}

    def source_rows(self, number: int) -> Iterator[tuple[dict[str, Any], SourceRow]]:
        """Endless (place after it, row) of one source."""
        offset, used = self.place(number)["offset"], self.place(number)["used"]
        present = self.micro_batch_size * (1 if self.is_dealt else self.world_size)
        group = self.place(number).get("group", present) if offset else present  # a begun block keeps its order
        for block, rows_per_pass in read_ahead(self.blocks(number), lambda item: item[0].size_in_bytes):
            start, seed = block.start, [self.seed, block.start["pass"], block.start["block"]]
            order = list(range(len(block.rows)))
            if self.block_size > 1:
                order = np.random.default_rng(seed).permutation(len(block.rows)).tolist()
            if self.is_grouped:
                sizes = [row.size_in_bytes() for row in block.rows]
                order = group_by_length(order, sizes, used - offset, group, seed)
            for i in range(offset, len(block.rows)):
                used += 1
                place = {"start": start, "offset": i + 1, "rows_per_pass": rows_per_pass, "used": used, "group": group}
                yield place, block.rows[order[i]]
            offset, group = 0, present

    def rows(self) -> Iterator[tuple[dict[str, Any], tuple[int, SourceRow, float]]]:
        """(position after it, (number of its source, row, speed)) of this rank's share of the one global order."""
        # row: rows used, by all ranks together; skip: rows after them that other ranks have
        position = self.position or {"row": 0, "skip": 0, "sources": [FIRST_PLACE] * len(self.sets)}
        places, row_number, first = list(position["sources"]), position["row"], position["row"] + position["skip"]
        streams = [self.source_rows(number) for number in range(len(self.sets))]
        weights, seed = tuple(item.weight for item in self.sets), self.own_seed()
        while True:
            chunk, place_in_chunk = divmod(row_number, 1000)
            number = int(draw_sources(seed, chunk, weights)[place_in_chunk]) if len(weights) > 1 else 0
            places[number], row = next(streams[number])
            row_number += 1
            turn = (row_number - 1 - first) // self.micro_batch_size
            if turn >= 0 and (self.is_dealt or turn % self.world_size == self.rank):
                speed = np.random.default_rng([seed, row_number]).uniform(0.9, 1.1) if self.has_speeds else 1.0
                yield {"row": row_number, "sources": list(places), "last": number}, (number, row, speed)

    def prepare(self, item: tuple[int, SourceRow, float]) -> dict[str, Any] | Rejection:
        return self.sets[item[0]].preparer(*item[1:])

    def __iter__(self) -> Iterator[tuple[dict[str, Any] | None, Any]]:
        # What became of the rows of (source, pass); of a pass that is continued only the rest is seen: taken as good.
        begun = {number: self.place(number) for number in range(len(self.sets)) if self.place(number)["used"]}
        tallies = {(number, place["start"]["pass"]): Counter(accepted=1) for number, place in begun.items()}
        try:
            for position, example in map_in_order(self.prepare, self.rows(), self.num_threads):
                number = position["last"]
                this_pass = position["sources"][number]["start"]["pass"]
                tally = tallies.pop((number, this_pass - 1), None)
                if tally and not tally["accepted"] and not self.is_dealt:  # else it may be one damaged file
                    name = self.sets[number].source.name
                    raise UserError(f"no usable row in a whole pass over {name}: {describe_counts(tally)}.")
                outcome = example.reason if isinstance(example, Rejection) else "accepted"
                tallies.setdefault((number, this_pass), Counter())[outcome] += 1
                yield position, example
        except Exception as error:  # travels as data: a DataLoader worker would lose its type
            yield None, portable(error)


def portable(error: Exception) -> Exception:
    """The error itself if it survives pickling, else a RuntimeError that names its type."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # any failure to pickle means the same
        return RuntimeError(f"{type(error).__name__}: {error}")


def describe_counts(counts: Counter) -> str:
    """'3 text_empty, 1 audio_too_long', the commonest first."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) or "none"


def num_usable_cores(world_size: int) -> int:
    """This process's share of the cores that it may run on, at least 1 and at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))  # those of this machine


# ----------------------------------------------------------------------------------------------------- collator ----
def joined_frames(utterance: dict[str, Any]) -> int:
    """Frames that it takes in a pack: whole positions of the encoder, so that a joint lies on a timestamp."""
    num_samples = round(utterance["duration"] * SAMPLE_RATE_IN_HZ)
    return FRAMES_PER_POSITION * math.ceil(num_samples / (FRAMES_PER_POSITION * HOP_LENGTH_IN_SAMPLES))


def pack_utterances(
    utterances: list[dict[str, Any]], window_in_frames: int, max_label_length: int
) -> list[list[dict[str, Any]]]:
    """Consecutive utterances in groups that fit into one window and, with two timestamps each, into max_label_length.
    utterances: with `duration` in seconds and `segment`, the token ids of the text."""
    packs: list[list[dict[str, Any]]] = []
    frames_left = labels_left = 0
    for utterance in utterances:
        frames, num_labels = joined_frames(utterance), len(utterance["segment"]) + 2
        if frames > frames_left or num_labels > labels_left:
            packs.append([])
            frames_left, labels_left = window_in_frames, max_label_length
        packs[-1].append(utterance)
        frames_left, labels_left = frames_left - frames, labels_left - num_labels
    return packs


def join_features(utterances: list[dict[str, Any]]) -> torch.Tensor:
    """Log-mel of the utterances end to end, (n_mels, n_frames): what `log_mel` makes of their joined waveforms but for
    the frames beside a joint, which see one clip only; all are limited to 8 (2 after scaling) below the loudest."""
    pairs = [(utterance["features"], joined_frames(utterance)) for utterance in utterances]
    clips = (pad_features(clip[:, :size], [min(size, clip.shape[1])], size)[0] for clip, size in pairs)
    frames = torch.cat(list(clips), dim=1)
    return frames.clamp(min=float(frames.max()) - 2.0)


def join_labels(utterances: list[dict[str, Any]], prefix: list[int], end: int, has_timestamps: bool) -> list[int]:
    """Token ids of a pack; with timestamps, each text between those of its start and its end, as in pre-training.
    prefix: ends in <|notimestamps|>, which timestamps replace; the next token is <|0.00|>."""
    labels, position = prefix[:-1], prefix[-1] + 1
    if not has_timestamps:
        texts = (utterance["segment"] for utterance in utterances[1:])
        return [*utterances[0]["labels"][:-1], *itertools.chain(*texts), end]
    for utterance in utterances:
        begin, position = position, position + joined_frames(utterance) // FRAMES_PER_POSITION
        labels = [*labels, begin, *utterance["segment"], position]
    return [*labels, end]


@dataclass
class WindowMaker:
    """The utterances of a micro-batch to its windows: packed (--pack_utterances), with timestamps
    (--timestamp_probability). A micro-batch stays a fixed number of rows, so that the position in the stream, and the
    rows of a step, are those of an unpacked run."""

    tokenizers: tuple[transformers.WhisperTokenizer, ...]  # of each source
    separators: tuple[str, ...]  # before the text of a segment
    window_in_frames: int
    max_label_length: int
    is_packing: bool
    timestamp_probability: float
    seed: int

    def __call__(self, utterances: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
        """utterances: (position, example), in the order of the stream; only those of one source share a window."""
        windows = []
        for number in sorted({position["last"] for position, _ in utterances}):
            tokenizer, separator = self.tokenizers[number], self.separators[number]
            mine = [{**example, "row": at["row"]} for at, example in utterances if at["last"] == number]
            for example in mine:
                # With a space, also the first one: long-form generation joins the texts of windows as they are.
                example["segment"] = tokenizer(separator + example["text"], add_special_tokens=False).input_ids
            room = self.max_label_length - len(tokenizer.prefix_tokens) + 1
            packs = pack_utterances(mine, self.window_in_frames, room) if self.is_packing else [[e] for e in mine]
            windows += [self.join(pack, tokenizer, room) for pack in packs]
        return windows

    def join(self, pack: list[dict[str, Any]], tokenizer: transformers.WhisperTokenizer, room: int) -> dict[str, Any]:
        """One example of a pack. Its first row decides on timestamps; a pack that has them has them at every joint."""
        is_marked = np.random.default_rng([self.seed, pack[0]["row"], 1]).random() < self.timestamp_probability
        is_marked &= sum(len(example["segment"]) + 2 for example in pack) <= room  # a single one may be longer
        if len(pack) == 1 and not is_marked:
            return pack[0]
        labels = join_labels(pack, tokenizer.prefix_tokens, tokenizer.eos_token_id, is_marked)
        return {"features": join_features(pack), "labels": labels}


def window_maker(
    sets: tuple[SpeechSet, ...], readings: dict[str, tuple[str | None, bool]], data_args: DataArguments, seed: int
) -> WindowMaker | None:
    """What --pack_utterances and --timestamp_probability ask for. readings: the language of each record, first."""
    if not sets or not (data_args.pack_utterances or data_args.timestamp_probability):
        return None
    tokenizers = tuple(item.preparer.tokenizer for item in sets)
    written = ["en" if data_args.task == "translate" else readings[item.source.record][0] for item in sets]
    separators = tuple("" if language in UNSPACED_LANGUAGES else " " for language in written)
    limits = (sets[0].preparer.window_in_frames, sets[0].preparer.max_label_length)
    how = (data_args.pack_utterances, data_args.timestamp_probability, seed)
    return WindowMaker(tokenizers, separators, *limits, *how)


@dataclass
class SpeechCollator:
    """Examples to a batch whose clips lie end to end, unpadded, so that little crosses the process border.
    Returns `labels` and `decoder_input_ids` (batch, n_tokens), padded with -100 and the end token, `frames` (n_mels,
    sum of frame_counts), `frame_counts`, and for training a `ride`: position, rejections, num_rows, error.
    A batch whose rows were all rejected holds one silent dummy row without labels, so that every step runs."""

    decoder_start_token_id: int
    pad_token_id: int
    n_mels: int
    make_windows: WindowMaker | None = None  # None: every utterance has one of its own

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        tagged = [item if isinstance(item, tuple) else (None, item) for item in items]
        utterances = [(position, example) for position, example in tagged if isinstance(example, dict)]
        examples = [example for _, example in utterances]
        errors = [e for _, e in tagged if isinstance(e, Exception) and not isinstance(e, Rejection)]
        dummy_labels = [self.decoder_start_token_id, IGNORED_LABEL]
        rows = examples or [{"features": torch.full((self.n_mels, 1), SILENCE), "labels": dummy_labels}]
        if self.make_windows is not None and utterances and utterances[0][0] is not None:  # not of an evaluation set
            rows = self.make_windows(utterances)
        width = max(len(row["labels"]) for row in rows)
        pairs = [(row["labels"], width - len(row["labels"])) for row in rows]
        labels = torch.tensor([ids[1:] + [IGNORED_LABEL] * gap for ids, gap in pairs])
        decoder_input_ids = torch.tensor([ids[:-1] + [self.pad_token_id] * gap for ids, gap in pairs])
        features = [row["features"] for row in rows]
        if isinstance(features[0], bytes):  # of a prepared evaluation set
            flat = (torch.frombuffer(bytearray(data), dtype=torch.float32) for data in features)
            features = [frames.view(self.n_mels, -1) for frames in flat]
        batch = {"labels": labels, "decoder_input_ids": decoder_input_ids, "frames": torch.cat(features, dim=1)}
        batch["frame_counts"] = [clip.shape[1] for clip in features]
        if examples and "index" in examples[0]:
            return {**batch, "index": torch.tensor([row["index"] for row in examples])}
        rejections = [example for _, example in tagged if isinstance(example, Rejection)]
        ride = {"position": tagged[-1][0], "rejections": rejections, "num_rows": len(items), "error": errors[:1]}
        ride |= {"ids": [row["id"] for row in examples], "seconds": sum(row["duration"] for row in examples)}
        return {**batch, "ride": ride}


# -------------------------------------------------------------------------------------------------------- model ----
def check_language(language: str | None, generation_config: transformers.GenerationConfig, name: str) -> str | None:
    """The language's code as the checkpoint knows it; None for English-only models.
    Raises: UserError if it is missing, unknown to this checkpoint, or given for an English-only one."""
    known = getattr(generation_config, "lang_to_id", None) or {}
    if not getattr(generation_config, "is_multilingual", bool(known)):
        if language is not None:
            raise UserError(f"--language {language}: {name} knows English only. Leave out --language and --task.")
        return None
    codes = sorted(token.strip("<|>") for token in known)
    if language is None:
        raise UserError(f"--language is missing: {name} knows {len(codes)} languages. Pass --language es, say.")
    code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    if code not in codes:
        advice = "Choose a near language, in the same script if possible: its token then stands for yours"
        raise UserError(f"--language {language}: {name} has no token for it. {advice}. Known: {' '.join(codes)}.")
    return code


def load_processor(name: str, revision: str, cache_dir: str | None) -> tuple[transformers.WhisperProcessor, Any, Any]:
    """Processor, generation config and model config; small files, read before anything large.
    Raises: UserError if they are not there or belong to another architecture."""
    flag, where = f"--model_name_or_path {name}", {"revision": revision, "cache_dir": cache_dir}
    with mendable(OSError, where=flag):
        config = transformers.AutoConfig.from_pretrained(name, **where)
        if config.model_type != "whisper":
            raise UserError(f"{flag}: {config.model_type} model; this script trains Whisper only.")
        processor = transformers.WhisperProcessor.from_pretrained(name, **where)
        return processor, transformers.GenerationConfig.from_pretrained(name, **where), config


@contextlib.contextmanager
def encoder_window(model: transformers.WhisperForConditionalGeneration, window_in_frames: int) -> Iterator[None]:
    """The encoder reads windows of this length, with its first positions, instead of 30 s. Both numbers decide what
    transformers' encoder (5.23) accepts and how many positions it adds; outside, they are the checkpoint's again."""
    positions, config = model.get_encoder().embed_positions, model.config
    whole = config.max_source_positions
    config.max_source_positions = positions.num_embeddings = window_in_frames // FRAMES_PER_POSITION
    try:
        yield
    finally:
        config.max_source_positions = positions.num_embeddings = whole


def load_model(
    model_args: ModelArguments, data_args: DataArguments, language: str | None
) -> transformers.WhisperForConditionalGeneration:
    """The checkpoint in float32 (mixed precision comes from --fp16 or --bf16), told language and task.
    Only the generation config carries language and task; forced_decoder_ids would contradict them."""
    # Without dtype, transformers 5 loads float16 checkpoints as float16, whose gradients cannot be unscaled.
    name, revision = model_args.model_name_or_path, model_args.model_revision
    how = {"revision": revision, "cache_dir": model_args.cache_dir, "dtype": torch.float32}
    with mendable(OSError, where=f"--model_name_or_path {name}"):
        model = transformers.WhisperForConditionalGeneration.from_pretrained(name, **how)
    # Whisper's sinusoids are constants, but transformers 5.23 loads them with requires_grad=True.
    model.model.encoder.embed_positions.requires_grad_(False)
    model.generation_config.forced_decoder_ids = None
    if getattr(model.generation_config, "is_multilingual", False):
        model.generation_config.task = data_args.task
        model.generation_config.language = language  # None: detected
    if model_args.freeze_encoder:
        model.freeze_encoder()
    if model_args.lora_rank:
        add_adapters(model, model_args.lora_rank, r".*decoder.*" if model_args.freeze_encoder else ".*")
    # By the library, in training mode, on a batch of its own; its defaults mask time only.
    if data_args.apply_spec_augment:
        model.config.update({"apply_spec_augment": True, "mask_feature_prob": 0.05})
    return model


def add_adapters(model: transformers.WhisperForConditionalGeneration, rank: int, where: str) -> None:
    """Low-rank adapters (Hu et al., ICLR 2022; by peft) on every linear layer of the blocks; nothing else is trained.
    The model stays a plain one, so that the Trainer saves, loads and continues it as ever. Raises: UserError."""
    with mendable(ImportError, where="--lora_rank needs peft", advice=" pip install -r requirements-lora.txt"):
        import peft  # large, and only for this
    layers = where + r"\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules=layers)
    peft.inject_adapter_in_model(config, model)


def adapted_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}


def merged_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the names of a plain model, adapters added to the layers that they belong to."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for name, module in adapted_layers(model).items():
        state[f"{name}.base_layer.weight"] = module.base_layer.weight + module.get_delta_weight("default")
    return {name.replace(".base_layer.", "."): tensor.detach() for name, tensor in state.items()}


# ------------------------------------------------------------------------------------------------------ metrics ----
def collapse_spaces(text: str) -> str:
    """jiwer separates words at plain spaces only, so every kind of white space becomes one."""
    return " ".join(text.split())


def clean_symbols(text: str) -> str:
    """transformers' remove_symbols without its loss: category M (vowel signs, tone marks) stays."""
    normalized = unicodedata.normalize("NFKC", text)
    return "".join(" " if unicodedata.category(character)[0] in "SP" else character for character in normalized)


def text_normalizers(
    language: str | None, do_normalize: bool, tokenizer: transformers.WhisperTokenizer
) -> dict[str, Callable[[str], str]]:
    """The readings of a text by the suffix of their metrics: as written, Whisper's normaliser, its basic one with
    marks kept; and without suffix the leading one."""
    keep_marks = BasicTextNormalizer()
    keep_marks.clean = clean_symbols
    is_english = language in (None, "en")
    english = EnglishTextNormalizer(tokenizer.english_spelling_normalizer or {}) if is_english else None
    readings = {"_ortho": collapse_spaces, "_norm": english or BasicTextNormalizer(), "_norm_marks": keep_marks}
    return {"": readings["_norm" if do_normalize else "_ortho"], **readings}


class SpeechErrors(evaluate.Metric):
    """Word and character errors of a corpus by jiwer, as an `evaluate` metric that needs no network: rates in percent,
    counts of words, and the counts of each row."""

    def _info(self) -> evaluate.MetricInfo:
        texts = {name: datasets.Value("string") for name in ("predictions", "references")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(texts))

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        aligned = [jiwer.process_words([said], [heard]) for said, heard in zip(references, predictions, strict=True)]
        names = ("substitutions", "deletions", "insertions", "hits")
        rows = [{name: getattr(words, name) for name in names} for words in aligned]
        counts = {name: sum(row[name] for row in rows) for name in names}
        rates = {"wer": word_error_rate(counts), "cer": 100 * jiwer.cer(references, predictions)}
        return {**rates, **counts, "rows": rows}


def word_error_rate(counts: dict[str, int]) -> float:
    """WER in percent from the four counts of a row with a reference."""
    errors = counts["substitutions"] + counts["deletions"] + counts["insertions"]
    return 100 * (errors / (counts["substitutions"] + counts["deletions"] + counts["hits"]))


def has_loop(text: bytes, seconds: float) -> bool:
    """Whether what stands for some 30 s compresses better than 2.4 to 1: Whisper's own test for repetition
    (openai/whisper, transcribe.py), which looks at windows as well: any long text compresses."""
    size = max(1, math.ceil(len(text) / math.ceil(seconds / 30)))
    parts = (text[start : start + size] for start in range(0, len(text), size))
    return any(len(part) > 2.4 * len(zlib.compress(part)) for part in parts)


def bootstrap_interval(rows: list[dict[str, int]], num_draws: int = 1_000) -> tuple[float, float]:
    """95 % interval of the WER in percent: rows drawn with replacement, seeded (Bisani and Ney, ICASSP 2004)."""
    table, generator = np.array([list(row.values()) for row in rows]), np.random.default_rng(0)
    draws = (table[generator.integers(len(table), size=len(table))].sum(axis=0) for _ in range(num_draws))
    low, high = np.percentile([word_error_rate(dict(zip(rows[0], draw, strict=True))) for draw in draws], [2.5, 97.5])
    return float(low), float(high)


@dataclass
class Scorecard:
    """The trainer's compute_metrics: generated ids to error rates in percent, in total and for each of several sets.
    Rows are found by their index, so that rows that several processes scored twice count once."""

    tokenizer: transformers.WhisperTokenizer
    readings: dict[str, tuple[str | None, bool]]  # set name to (language, whether normalised text leads)
    metric: SpeechErrors = field(default_factory=lambda: SpeechErrors(keep_in_memory=True))
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)  # by index: id, set, reference, duration
    scored: list[dict[str, Any]] = field(default_factory=list)  # rows of the last call: and prediction, pairs, counts
    max_new_tokens: int = sys.maxsize

    def __post_init__(self) -> None:
        self.normalizers = {name: text_normalizers(*how, self.tokenizer) for name, how in self.readings.items()}

    def use(self, eval_set: datasets.Dataset) -> None:
        """Takes the references of a prepared evaluation set."""
        columns = eval_set.select_columns(["index", "set", "id", "text", "duration"])
        self.rows = {row.pop("index"): row | {"reference": row.pop("text")} for row in columns}

    def __call__(self, outputs: transformers.EvalPrediction) -> dict[str, float]:
        """outputs: predictions (ids (rows, n_tokens), loss sums (rows,), token counts (rows,)), label_ids indices."""
        place = {int(index): i for i, index in enumerate(outputs.label_ids)}
        once = [place[index] for index in sorted(place)]
        ids, loss_sums, token_counts = (values[once] for values in outputs.predictions)
        ids = np.where(ids == IGNORED_LABEL, self.tokenizer.pad_token_id, ids)
        # A long-form transcript, which has no loss, is not bounded by the limit of one window.
        lengths = (ids != self.tokenizer.pad_token_id).sum(axis=1) * (token_counts > 0)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        self.scored = []
        for index, text, length in zip(sorted(place), texts, lengths.tolist(), strict=True):
            row = self.rows[index] | {"prediction": text.strip(), "num_tokens": length}
            said_and_heard = (row["reference"], row["prediction"])
            row["pairs"] = {  # (reference, prediction) in each reading
                suffix: tuple(collapse_spaces(normalize(text)) for text in said_and_heard)
                for suffix, normalize in self.normalizers[row["set"]].items()
            }
            self.scored.append(row)
        metrics = self.rates(self.scored) | {"loss": float(loss_sums.sum() / max(1, token_counts.sum()))}
        for name in self.readings if len(self.readings) > 1 else ():
            if rows := [row for row in self.scored if row["set"] == name]:
                metrics |= {f"{name}_{key}": value for key, value in self.rates(rows).items()}
        return metrics

    def rates(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """wer_*, cer_* for each reading; for the leading one wer, cer, counts, and the WER's 95 % interval."""
        metrics = {"num_rows": len(rows), "empty_references": sum(not row["pairs"][""][0] for row in rows)}
        if metrics["empty_references"]:
            logger.warning("%d of %d rows have no reference: not scored.", metrics["empty_references"], len(rows))
        for suffix in rows[0]["pairs"]:
            kept = [row for row in rows if row["pairs"][suffix][0]]
            if not kept:
                continue
            references, predictions = (list(texts) for texts in zip(*(r["pairs"][suffix] for r in kept), strict=True))
            errors = self.metric.compute(references=references, predictions=predictions)
            counts = errors.pop("rows")
            metrics |= {f"wer{suffix}": errors.pop("wer"), f"cer{suffix}": errors.pop("cer")}
            if not suffix:
                metrics |= errors | dict(zip(("wer_low", "wer_high"), bootstrap_interval(counts), strict=True))
                for row, count in zip(kept, counts, strict=True):
                    row |= count
        shares = {
            "empty_outputs": [not row["prediction"] for row in rows],
            "repetition_loops": [has_loop(row["prediction"].encode(), row["duration"]) for row in rows],
            "cut_outputs": [row["num_tokens"] >= self.max_new_tokens for row in rows],
        }
        return metrics | {name: 100 * sum(values) / len(rows) for name, values in shares.items()}


def eval_set_key(item: SpeechSet) -> str:
    """Changes with whatever changes the prepared rows: the files, the model's limits, the prefix, the text options."""
    source, preparer = item.source, item.preparer
    stats = [(url, os.path.getmtime(url), os.path.getsize(url)) for url in source.data_files if os.path.exists(url)]
    others = ("tokenizer", "mel_filters", "max_network_wait_in_seconds", "parts", "data_files")
    settings = {f.name: getattr(o, f.name) for o in (source, preparer) for f in fields(o) if f.name not in others}
    prefix = [preparer.mel_filters.shape[1], len(preparer.tokenizer), preparer.tokenizer.prefix_tokens]
    return datasets.fingerprint.Hasher.hash([stats, settings, prefix, item.max_rows])


def eval_rows(item: SpeechSet, num_threads: int) -> Iterator[dict[str, Any]]:
    """The prepared rows of a split, features (n_mels, n_frames) as bytes; rejected ones with a reason instead."""
    blocks = read_ahead(read_pass(item, FIRST_PLACE["start"], None, 100), lambda block: block.size_in_bytes)
    rows = ((None, row) for block in blocks for row in block.rows)
    for _, example in map_in_order(item.preparer, rows, num_threads):
        if isinstance(example, Rejection):
            nothing = dict.fromkeys(("duration", "labels", "features"))
            yield {"id": example.row, "reason": example.reason, "text": example.detail, **nothing}
        else:
            del example["sampling_rate"]
            yield {**example, "features": example["features"].numpy().tobytes(), "reason": None}


def prepare_eval_set(item: SpeechSet, num_threads: int, folder: Path) -> tuple[datasets.Dataset, list[Rejection]]:
    """Decodes an evaluation split once; `datasets` keeps it, with the rejected rows, in a memory-mapped file.
    Raises: UserError if no row is usable, and the errors of the reader."""
    texts = {name: datasets.Value("string") for name in ("id", "text", "reason")}
    numbers = {"duration": datasets.Value("float64"), "labels": datasets.List(datasets.Value("int32"))}
    features = datasets.Features({**texts, **numbers, "features": datasets.Value("large_binary")})
    what = {"gen_kwargs": {"item": item, "num_threads": num_threads}, "fingerprint": eval_set_key(item)}
    try:
        rows = datasets.Dataset.from_generator(eval_rows, features, str(folder), writer_batch_size=16, **what)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None
    rejected = rows.select([i for i, reason in enumerate(rows["reason"]) if reason is not None])
    rejections = [Rejection(row["reason"], row["text"], row["id"]) for row in rejected]
    if len(rejections) == len(rows):
        reasons = describe_counts(Counter(rows["reason"]))
        raise UserError(f"no usable row in split '{item.source.split}' of {item.source.name}. Rejected: {reasons}.")
    return rows, rejections


def join_eval_sets(sets: dict[str, datasets.Dataset]) -> datasets.Dataset:
    """One set of all usable rows, longest clips first, each with its set's name and its index in the order of the
    files. Rows are selected last: columns added to a selection would make `datasets` write all features once more."""
    names = [name for name, rows in sets.items() for _ in range(len(rows))]
    rows = datasets.concatenate_datasets(list(sets.values())).add_column("set", names)
    rows = rows.add_column("index", list(range(len(rows))))
    durations = rows["duration"]
    usable = [i for i, duration in enumerate(durations) if duration is not None]
    return rows.select(sorted(usable, key=lambda i: -durations[i]))


# ---------------------------------------------------------------------------------------------------------- hub ----
# By name, never by folder: output_dir may be "./" with .git, .env and .venv in it.
MODEL_FILES = """*.safetensors *.safetensors.index.json config.json generation_config.json processor_config.json
preprocessor_config.json tokenizer*.json vocab.json merges.txt normalizer.json *_tokens*.json adapter_*""".split()
REPORT_FILES = """run_info.json all_results.json scorecard.json runs/[A-Z]*/events* runs/data/events*""".split()
TRANSCRIPT_FILES = "predictions_*.jsonl worst_*.txt".split()  # with --push_predictions only: data may be private


def check_hub(name: str, private: bool | None, may_create: bool = True) -> str:
    """Creates the model repo if it is missing and proves, before any GPU work, that this token may write to it: roles
    tell little, so the Hub is asked what it would do with a file. Returns the repo's id. Raises: UserError."""
    if HF_HUB_OFFLINE:
        raise UserError("--push_to_hub with HF_HUB_OFFLINE=1. Unset it, or leave out --push_to_hub.")
    if not huggingface_hub.get_token():
        raise UserError("--push_to_hub needs a token. Run `hf auth login`, or set HF_TOKEN.")
    api, probe = huggingface_hub.HfApi(), huggingface_hub.CommitOperationAdd("run_info.json", b"{}")
    fix = " The token needs write access to it (https://huggingface.co/settings/tokens); see --hub_model_id."
    with mendable(HfHubHTTPError, HFValidationError, where=f"--push_to_hub to {name}", advice=fix):
        if not may_create:
            user = api.whoami()
            name = name if "/" in name else f"{user['name']}/{name}"
            if not api.repo_exists(name):  # so that there is nothing to ask about but the token
                if (role := user["auth"]["accessToken"]["role"]) == "read":
                    raise UserError(f"--push_to_hub to {name}: the token may only read. Make one that may write.")
                return f"{name} does not exist yet, by the token ({role}) it"
        repo_id = api.create_repo(name, private=private, exist_ok=True).repo_id
        api.preupload_lfs_files(repo_id, [probe])
    logger.info("hub: %s may be written by %s", repo_id, api.whoami()["name"])
    return repo_id


def base_licence(name: str) -> str | None:
    """The licence that the base model's card states; never guessed. Asked for once, before training."""
    try:
        return None if Path(name).exists() else huggingface_hub.ModelCard.load(name).data.license
    except Exception:  # no card, no network: all the same
        return None


def warn_of_private_data(repo_id: str, names: set[str]) -> None:
    """For --push_predictions: says so when transcripts of private or gated data go to a public repository."""
    api = huggingface_hub.HfApi()
    infos = [api.dataset_info(name) for name in names if not Path(name).exists()]
    closed = [info.id for info in infos if info.private or info.gated]
    if closed and not api.model_info(repo_id).private:
        logger.warning("--push_predictions: transcripts of %s, not public, go to %s, public.", closed, repo_id)


def download_checkpoint(repo_id: str, output_dir: Path) -> None:
    """Makes the Hub's last-checkpoint (--hub_strategy checkpoint) the newest of output_dir. Raises: UserError."""
    folder = output_dir / "_hub"
    huggingface_hub.snapshot_download(repo_id, allow_patterns="last-checkpoint/*", local_dir=folder)
    if not is_complete(folder / "last-checkpoint"):
        raise UserError(f"--resume_from_checkpoint hub: {repo_id} has no complete last-checkpoint. Use 'auto'.")
    record = folder / "last-checkpoint" / "trainer_state.json"
    state = json.loads(record.read_text(encoding="utf-8"))
    if not Path(state["best_model_checkpoint"] or "/").exists():  # it stayed on the other machine
        write_json(record, state | dict.fromkeys(("best_model_checkpoint", "best_metric", "best_global_step")))
    final = output_dir / f"checkpoint-{state['global_step']}"
    if not is_complete(final):
        shutil.rmtree(final, ignore_errors=True)
        record.parent.rename(final)
    shutil.rmtree(folder, ignore_errors=True)


def link_files(source: Path, patterns: list[str], target: Path) -> None:
    """Copies the files that are named; weights and optimiser states as hard links, which rotation cannot touch. Texts
    lose tokens and local paths."""
    for path in [path for pattern in patterns for path in source.glob(pattern) if path.is_file()]:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        if path.suffix in (".json", ".jsonl", ".txt") and not path.name.startswith(("tokenizer", "merges")):
            place.write_text(without_folders(path.read_text(encoding="utf-8")), encoding="utf-8")
            continue
        try:
            (os.link if path.suffix in (".safetensors", ".pt") else shutil.copy2)(path, place)
        except OSError:  # a file system without hard links
            shutil.copy2(path, place)


class HubUploads:
    """Uploads snapshots by the `hf` command, a child process with a deadline, so that a hung server can block neither
    training nor exit. What is saved during an upload follows it; what failed is tried again with the next save."""

    def __init__(self, repo_id: str, output_dir: Path, strategy: str, has_texts: bool, wait_in_seconds: float) -> None:
        self.repo_id, self.output_dir, self.strategy = repo_id, output_dir, strategy
        self.patterns, self.wait_in_seconds = REPORT_FILES + TRANSCRIPT_FILES * has_texts, wait_in_seconds
        self.current, self.next = output_dir / "_upload" / "current", output_dir / "_upload" / "next"
        self.child: subprocess.Popen | None = None
        self.is_due, self.num_pushed, self.error, self.deadline = False, 0, "", 0.0
        self.write_card: Callable[[list[dict]], str] = lambda history: ""
        shutil.rmtree(self.next.parent, ignore_errors=True)
        atexit.register(self.cancel)

    def submit(self, model: Path, history: list[dict], checkpoint: Path | None = None) -> None:
        """Takes a snapshot of a model folder, and of a whole checkpoint if the strategy wants it, and uploads it."""
        if checkpoint is not None and self.strategy == "end":
            return
        link_files(model, MODEL_FILES, self.next)
        link_files(self.output_dir, self.patterns, self.next)
        shutil.copy2(__file__, self.next)
        (self.next / "README.md").write_text(without_folders(self.write_card(history)), encoding="utf-8")
        if checkpoint is not None and self.strategy != "every_save":
            name = "last-checkpoint" if self.strategy == "checkpoint" else checkpoint.name
            files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "training_args.bin"]
            link_files(checkpoint, [str(path.relative_to(checkpoint)) for path in files], self.next / name)
        self.is_due = True
        self.poll()

    def poll(self) -> None:
        """Notes how the running upload ended, ends it if it takes too long, and starts the next one if it is due."""
        try:
            if self.child is not None:
                code = self.child.poll()
                if code is None and time.monotonic() < self.deadline:
                    return
                self.cancel()
                self.note(code)
            self.start()
        except OSError as error:  # a full disk; `finish` tries again as long as there is an error
            self.error = one_line(error)
            logger.warning("hub: an upload could not start: %s", self.error)
            if self.current.exists() and not self.next.exists():
                self.current.rename(self.next)

    def start(self) -> None:
        """Starts the next upload if it is due. Raises: OSError."""
        if self.is_due and self.next.exists() and self.child is None:
            self.is_due = False
            self.next.rename(self.current)
            size = sum(path.stat().st_size for path in self.current.rglob("*"))
            self.deadline = time.monotonic() + self.wait_in_seconds + size / SLOWEST_UPLOAD_IN_BYTES_PER_SECOND
            words = [sys.executable, "-m", "huggingface_hub.cli.hf", "upload", self.repo_id, str(self.current), "."]
            how = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
            with open(self.current.parent / "log", "w", encoding="utf-8") as log:
                # In a session of its own: the terminal's Ctrl-C is for the trainer, which decides.
                self.child = subprocess.Popen(words, stdout=log, start_new_session=True, **how)

    def note(self, code: int | None) -> None:
        """Counts an upload that has ended; what failed stays for the next one, under what was saved since."""
        self.child, self.error = None, ""
        if code == 0:
            self.num_pushed += 1
        else:
            log = self.current.parent / "log"
            text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else "its snapshot has vanished"
            self.error = "no end in time" if code is None else redacted(" ".join(text.split()))[-300:]
            logger.warning("hub: an upload failed (%s); it is tried again with the next save.", self.error)
            if self.next.exists() and self.current.exists():
                shutil.copytree(self.next, self.current, copy_function=os.replace, dirs_exist_ok=True)
                shutil.rmtree(self.next)
            if self.current.exists():
                self.current.rename(self.next)
        shutil.rmtree(self.current, ignore_errors=True)

    def cancel(self) -> None:
        """Ends the running upload."""
        if self.child is not None:
            self.child.kill()
            self.child.wait()

    def figures(self) -> dict[str, int]:
        return {"hub_pushed": self.num_pushed, "hub_pending": int(self.child is not None) + int(self.next.exists())}

    def finish(self) -> None:
        """Waits until all is uploaded, with new tries. Raises: RunEnded(76) with the command that finishes it."""
        give_up, pause = time.monotonic() + self.wait_in_seconds, 1.0
        while self.child is not None or self.next.exists():
            self.poll()
            time.sleep(0.2)
            if self.child is None and self.error:
                if time.monotonic() > give_up:
                    words = shlex.join(["hf", "upload", self.repo_id, str(self.next), "."])
                    raise RunEnded(76, f"trained and saved, but not uploaded ({self.error}). Finish with: {words}")
                time.sleep(pause)
                pause, self.is_due = min(2 * pause, 60.0), True


# ------------------------------------------------------------------------------------------------------ trainer ----
@dataclass
class TokenWeightedLoss:
    """Cross-entropy summed over this micro-batch, divided by the target tokens of the optimiser step on all ranks.
    Whisper's own loss ignores that number and comes out multiplied by accumulation and processes (transformers 5.23,
    modeling_whisper.py:1126); this one makes 8x1, 2x4 and 1x8 equal."""

    label_smoothing: float

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """outputs.logits: (batch, n_tokens, vocabulary); labels: (batch, n_tokens), -100 where nothing is said."""
        logits, how = outputs.logits.float().flatten(0, 1), {"ignore_index": IGNORED_LABEL, "reduction": "sum"}
        total = functional.cross_entropy(logits, labels.flatten(), label_smoothing=self.label_smoothing, **how)
        num_tokens = labels.ne(IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
        return total / torch.as_tensor(num_tokens, device=total.device).clamp(min=1)


@dataclass
class StreamProgress:
    """What has been trained so far, as opposed to what the worker has already prepared."""

    COUNTS = ("num_rows", "num_skipped_steps", "audio_in_seconds", "time_in_seconds")
    output_dir: Path
    max_rejected_fraction: float
    pass_rows: dict[str, int | None]  # rows of a pass of each source, None until they are known
    rank: int = 0
    world_size: int = 1
    is_dealt: bool = False  # every rank has files, and so a position, of its own
    position: dict[str, Any] | None = None
    num_rows: int = 0
    rejected: Counter = field(default_factory=Counter)
    num_skipped_steps: int = 0  # steps whose loss was not finite
    audio_in_seconds: float = 0.0  # trained on, repeated passes included
    time_in_seconds: float = 0.0  # spent training, scoring not included

    def update(self, ride: dict[str, Any]) -> None:
        """Counts a step's rows, of all ranks, and lists its rejections. Raises: UserError if there are too many, on
        every rank, as all have the same counts."""
        whole = sum(self.pass_rows.values()) if all(self.pass_rows.values()) else ROWS_BEFORE_REJECTION_CHECK
        limit = min(ROWS_BEFORE_REJECTION_CHECK, whole)
        was_judged = self.num_rows >= limit
        self.position, self.num_rows = ride["position"], self.num_rows + ride["num_rows"]
        self.rejected.update(rejection.reason for rejection in ride["rejections"])
        list_rejections(self.output_dir, "train", ride["rejections"] if self.rank == 0 else [])
        if self.num_rows >= limit and not was_judged:
            self.judge()

    def judge(self) -> None:
        """Raises UserError if more rows were rejected than --max_rejected_fraction allows."""
        if self.rejected.total() > self.max_rejected_fraction * self.num_rows:
            found = f"{self.rejected.total()} of the first {self.num_rows} rows were rejected"
            limit = f"more than --max_rejected_fraction {self.max_rejected_fraction:g}"
            where = f"See {self.output_dir / 'rejected.jsonl'}; mend them or raise the limit."
            raise UserError(f"{found} ({describe_counts(self.rejected)}), {limit}. {where}")

    def figures(self) -> dict[str, float]:
        """For the log: passes over each source and its share of the rows, rows used and rejected (by reason)."""
        figures: dict[str, float] = {}
        for (name, num_rows), place in zip(self.pass_rows.items(), self.position["sources"], strict=True):
            share = num_rows / self.world_size if num_rows and self.is_dealt else num_rows
            num_rows, start = place["rows_per_pass"] or share, place["start"]
            part = min(1.0, (start["rows"] + place["offset"]) / num_rows) if num_rows else 0.0
            figures[f"pass_{name}".rstrip("_")] = round(start["pass"] + part, 4)
            figures |= {f"share_{name}": round(place["used"] / self.position["row"], 4)} if name else {}
        reasons = {f"rejected_{reason}": count for reason, count in sorted(self.rejected.items())}
        skipped = {"skipped_steps": self.num_skipped_steps} if self.num_skipped_steps else {}
        return {**figures, "rows": self.num_rows, "rejected": self.rejected.total(), **reasons, **skipped}

    def totals(self) -> dict[str, float]:
        """For the metrics and the card, by what is known so far."""
        hours = {"train_audio_hours": self.audio_in_seconds / 3600, "train_hours": self.time_in_seconds / 3600}
        return {"train_rows": self.num_rows, "train_rejected": self.rejected.total(), **hours}

    def state(self, micro_batch_size: int, positions: list[dict[str, Any]]) -> dict[str, Any]:
        """For stream_state.json. positions: of every rank. Where they are parts of one order, rank 0 takes the first
        micro-batch of each round, the others' rows follow it."""
        listing, skip = self.output_dir / "rejected.jsonl", micro_batch_size * (self.world_size - 1)
        return {
            "position": self.position | {"skip": 0 if self.is_dealt else skip},
            "dealt": [position | {"skip": 0} for position in positions if self.is_dealt],
            "counts": {name: getattr(self, name) for name in self.COUNTS},
            "rejected": dict(self.rejected),
            "rejected_bytes": listing.stat().st_size if listing.exists() else 0,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what a checkpoint saved; rows that were listed after it will be met, and listed, again. A global
        order is kept, whatever the number of ranks now; ranks with files of their own need the same number.
        Raises: UserError if an older version wrote it."""
        if "shard_row" not in state["position"]["sources"][0]["start"]:
            advice = "Finish the run with that version, or start anew in another --output_dir."
            raise UserError(f"the checkpoint's place in the data is in the form of an older version. {advice}")
        positions, was_possible = state.get("dealt", []), self.is_dealt
        self.is_dealt, self.position, self.rejected = False, state["position"], Counter(state["rejected"])
        if positions and was_possible and len(positions) == self.world_size:
            self.is_dealt, self.position = True, positions[self.rank]
        elif positions:
            logger.warning("the files were dealt to %d processes: the next pass begins.", len(positions))
            self.is_dealt, self.position = was_possible, next_pass(positions)
        vars(self).update(state["counts"])
        listing = self.output_dir / "rejected.jsonl"
        if self.rank == 0 and listing.exists() and listing.stat().st_size > state["rejected_bytes"]:
            os.truncate(listing, state["rejected_bytes"])


def list_rejections(output_dir: Path, split: str, rejections: list[Rejection]) -> None:
    """Appends rejected rows to rejected.jsonl."""
    lines = [{"split": split, "row": item.row, "reason": item.reason, "detail": item.detail} for item in rejections]
    if lines:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(output_dir / "rejected.jsonl", text, "a")


class SkipBrokenSteps(transformers.TrainerCallback):
    """Skips optimiser steps whose loss is NaN or infinite; the tenth in a row ends the run. All ranks decide alike."""

    def __init__(self, trainer: "SpeechTrainer") -> None:
        self.trainer, self.num_in_a_row, self.rows = trainer, 0, []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        loss, rows = torch.stack(self.trainer.step_losses).sum(), self.trainer.step_rows
        self.trainer.step_losses, self.trainer.step_rows = [], []
        if torch.isfinite(self.trainer.accelerator.reduce(loss)):
            self.num_in_a_row, self.rows = 0, []
            return
        optimizer.zero_grad(set_to_none=True)  # parameters without gradient are left alone, weight decay included
        self.trainer.progress.num_skipped_steps += 1
        self.num_in_a_row, self.rows = self.num_in_a_row + 1, self.rows + rows
        logger.warning("step %d: the loss is not finite; the step is skipped.", state.global_step + 1)
        if self.num_in_a_row >= MAX_BROKEN_STEPS:
            write_json(listing := Path(args.output_dir) / "diverged_rows.json", gather_object(self.rows))
            reason = f"the loss was not finite in {self.num_in_a_row} steps in a row, see {listing}"
            raise RunEnded(70, f"{reason}. Lower --learning_rate.")


class Curves(TensorBoardCallback):
    """TensorBoard without the library's dump of all arguments: the curves are uploaded, local paths are not."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes nothing."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """The untouched model's scores begin the curves of eval (the library files them under train), and one chart
        under Custom scalars has the error rates of every set."""
        is_new = self.tb_writer is None
        # Set by the library at the start of training only: a score before it would go to ./runs (5.23).
        self.logging_dir = self.logging_dir or os.path.join(args.output_dir, default_logdir())
        logs = {name.replace("zero_shot_", "eval_", 1): value for name, value in (logs or {}).items()}
        super().on_log(args, state, control, logs=logs, **kwargs)
        if is_new and self.tb_writer is not None:
            charts = {kind.upper(): ["Multiline", [rf"^eval/(\w+_)?{kind}$"]] for kind in ("wer", "cer")}
            self.tb_writer.add_custom_scalars({"error rates": charts})


def generate_ids(model: Any, encoder_outputs: Any, **generation: Any) -> torch.Tensor:
    """Token ids (batch, n_tokens) without timestamps. Two timestamps in a row would send the library's generate()
    through the window again, and without input_features into a TypeError (transformers 5.23, _maybe_reduce_batch)."""
    timestamps = list(range(model.generation_config.no_timestamps_token_id + 1, model.config.vocab_size))
    processors = [transformers.SuppressTokensLogitsProcessor(timestamps, device=encoder_outputs[0].device)]
    # Else ranks whose texts end at different tokens gather different layers' parameters (Whisper passes False, 5.23).
    generation["synced_gpus"] = isinstance(model, FSDPModule) or hasattr(model.proj_out.weight, "ds_id")  # ZeRO-3
    return model.generate(encoder_outputs=encoder_outputs, logits_processor=processors, **generation)


class SpeechTrainer(transformers.Seq2SeqTrainer):
    """Seq2SeqTrainer with a plain loader for the stream, features padded on the device, the encoder run once in
    evaluation, and checkpoints that are complete or not there."""

    def __init__(
        self, data_args: DataArguments, progress: StreamProgress, stop: StopSignals, uploads: Any, **other: Any
    ) -> None:
        super().__init__(**other)
        self.data_args, self.progress, self.stop, self.uploads = data_args, progress, stop, uploads
        self.window_in_frames = FRAMES_PER_POSITION * self.model.config.max_source_positions
        self.deadline = time.monotonic() + 3600 * (data_args.max_train_time_in_hours or math.inf)
        self.checkpoint_to_resume: str | None = None
        self.unfinished: Path | None = None  # where a checkpoint is being written
        self.save_error: Exception | None = None
        self.step_losses: list[torch.Tensor] = []
        self.step_rows: list[str] = []
        self.meter: Counter | None = None  # seconds, rows and frames since the last log line, at self.logged_at
        self.logged_at, self.is_advised = 0.0, self.args.process_index > 0
        self.add_callback(SkipBrokenSteps(self))
        if self.args.torch_compile:
            # Else torch 2.13 takes `encoder_window`'s numbers for constants and compiles anew for every window of
            # --train_window longest, from the ninth on no more.
            torch._dynamo.config.allow_unspec_int_on_nn_module = True
        if self.pop_callback(TensorBoardCallback) is not None:
            self.add_callback(Curves())

    def get_train_dataloader(self) -> DataLoader:
        """One worker that reads ahead. Not prepared by accelerate: the stream deals rows to ranks itself."""
        args, workers = self.args, self.args.dataloader_num_workers
        how = {"num_workers": workers, "worker_init_fn": ignore_signals, "pin_memory": args.dataloader_pin_memory}
        how["prefetch_factor"] = (args.dataloader_prefetch_factor or 4) if workers else None
        return DataLoader(self.train_dataset, args.per_device_train_batch_size, collate_fn=self.data_collator, **how)

    def get_eval_dataloader(self, rows: datasets.Dataset) -> DataLoader:
        """Prepared rows come from a memory-mapped file: a worker would only be one more process to end."""
        return self.accelerator.prepare(DataLoader(rows, self.args.eval_batch_size, collate_fn=self.data_collator))

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of the next step. Here, between two steps, the run can end without losing anything."""
        self.stop.is_deferred, began, endings = False, time.monotonic(), []
        try:
            self.stop.check()
            if began > self.deadline:
                raise RunEnded(75, "--max_train_time_in_hours is over")
            if self.uploads is not None:
                self.uploads.poll()
            batches = list(itertools.islice(epoch_iterator, num_batches))
            endings += [error for batch in batches for error in batch["ride"].pop("error")]
            self.stop.is_deferred = True
        except Exception as error:
            self.stop.is_deferred, endings, batches = True, [error], []
        rides = [batch["ride"] for batch in batches]
        rejections = self.agree(endings, [rejection for ride in rides for rejection in ride["rejections"]])
        if self.meter is None:  # the worker's start belongs to no figure
            self.meter, self.logged_at = Counter(), time.monotonic()
        else:
            self.meter["waited"] += time.monotonic() - began
        num_rows = sum(ride["num_rows"] for ride in rides) * self.args.world_size
        self.progress.update({"position": rides[-1]["position"], "num_rows": num_rows, "rejections": rejections})
        return super().get_batch_samples(iter(batches), num_batches, device)

    def agree(self, endings: list[Exception], rejections: list[Rejection]) -> list[Rejection]:
        """All ranks come here together, before each step and each batch of an evaluation, so that none waits for one
        that has left. Returns the rejections of all. Raises on every rank what any has brought as its ending."""
        if self.args.world_size > 1:
            has_news = torch.tensor(float(bool(endings or rejections)), device=self.args.device)
            if self.accelerator.reduce(has_news).item() == 0:
                return []
            news = gather_object([([portable(error) for error in endings], rejections)])
            endings += [error for brought, _ in news for error in brought]
            rejections = [rejection for _, found in news for rejection in found]
            del news  # no frame may hold what is raised: the traceback would keep the loader, and its worker, alive
        if endings:
            self.stop.is_deferred = False  # nothing is half done: the caller may save
            raise endings.pop(0)
        return rejections

    def padded(self, inputs: dict[str, Any], window_in_frames: int | None = None) -> torch.Tensor:
        """input_features (batch, n_mels, window) on the training device."""
        # The model's type, as DeepSpeed's bfloat16 comes without autocast.
        frames = inputs["frames"].to(self.args.device, self.model.dtype, non_blocking=True)
        return pad_features(frames, inputs["frame_counts"], window_in_frames or self.window_in_frames)

    def window_of(self, frame_counts: list[int], row: int) -> int:
        """Frames that a training batch is padded to: its longest clip's, up to a whole second; for a seeded share of
        batches the full window, so that the model does not forget it. row: where the batch ends in the stream. Ranks
        draw alike for the batches that they train on at the same time: else most would wait for one at 30 s."""
        fraction = 1.0 if self.data_args.train_window == "full" else self.data_args.full_window_fraction
        rows_at_once = self.args.train_batch_size * (1 if self.progress.is_dealt else self.args.world_size)
        if np.random.default_rng([self.args.data_seed, (row - 1) // rows_at_once, 2]).random() < fraction:
            return self.window_in_frames
        second = SAMPLE_RATE_IN_HZ // HOP_LENGTH_IN_SAMPLES
        return min(self.window_in_frames, second * math.ceil(max(frame_counts) / second))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if self.checkpoint_to_resume is not None:
            # The loader drew a seed from torch's generator after the library had restored it (transformers 5.23,
            # trainer.py:1852); without this, dropout differs from the uninterrupted run.
            self._load_rng_state(self.checkpoint_to_resume)
            self.checkpoint_to_resume = None
        ride, counts = inputs["ride"], inputs["frame_counts"]
        self.progress.audio_in_seconds += ride["seconds"] * self.args.world_size
        window = self.window_of(counts, ride["position"]["row"])
        batch = {"input_features": self.padded(inputs, window)}
        # Here, from pinned memory: the library's own copy waits for the GPU (transformers 5.23, _prepare_input).
        batch |= {n: inputs[n].to(self.args.device, non_blocking=True) for n in ("labels", "decoder_input_ids")}
        with encoder_window(self.model, window):  # the backward pass as well: it may compute activations anew
            loss = super().training_step(model, batch, num_items_in_batch)
        self.step_losses.append(loss)
        self.step_rows += (ids := ride["ids"])
        self.meter.update(seconds=ride["seconds"], rows=len(ids), frames=sum(counts), window=len(counts) * window)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: the library's formula counts log-mel values as tokens."""
        return 0

    def prediction_step(
        self, model: Any, inputs: dict, prediction_loss_only: bool, ignore_keys: Any = None, **generation: Any
    ) -> tuple[None, tuple[torch.Tensor, ...], torch.Tensor]:
        """(None, (generated ids (batch, n), loss sums (batch,), token counts (batch,)), row indices (batch,)).
        The library runs the encoder twice, once outside autocast (trainer_seq2seq.py, prediction_step)."""
        self.agree([self.stop.ending()] if self.stop.received is not None else [], [])
        generation = dict(generation or self._gen_kwargs)
        card = self.compute_metrics
        languages = [card.readings[card.rows[index]["set"]][0] for index in inputs["index"].tolist()]
        if len(set(card.readings.values())) > 1 and None not in languages:
            generation["language"] = languages  # a mix of several; of one, the generation config knows it
        with torch.no_grad(), self.accelerator.autocast():
            if max(inputs["frame_counts"]) > self.window_in_frames:
                return None, self.transcribe_long(inputs, generation), inputs["index"].to(self.args.device)
            labels, decoder_input_ids = (inputs[name].to(self.args.device) for name in ("labels", "decoder_input_ids"))
            # Through the whole model: FSDP gathers parameters for the calls that it wraps only.
            outputs = self.model(input_features=self.padded(inputs), decoder_input_ids=decoder_input_ids)
            encoder_outputs, logits = BaseModelOutput(outputs.encoder_last_hidden_state), outputs.logits.float()
            losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # -100 is ignored
            ids = generate_ids(self.model, encoder_outputs, **generation)
        return None, (ids, losses.sum(1), labels.ne(IGNORED_LABEL).sum(1)), inputs["index"].to(self.args.device)

    def transcribe_long(self, inputs: dict[str, Any], generation: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Ids (batch, n) of clips one by one, those beyond the window by Whisper's sequential long-form generation;
        losses and token counts of 0."""
        languages, ids = generation.get("language"), []
        for i, clip in enumerate(inputs["frames"].split(inputs["frame_counts"], dim=1)):
            how = generation | ({"language": languages[i]} if languages else {})
            clip = clip[None].to(self.args.device)
            if clip.shape[-1] > self.window_in_frames:
                ids.append(self.model.generate(input_features=clip, return_timestamps=True, **how)[0])
            else:
                features = pad_features(clip[0], [clip.shape[-1]], self.window_in_frames)
                ids.append(generate_ids(self.model, self.model.get_encoder()(features), **how)[0])
        nothing = torch.zeros(len(ids), device=self.args.device)
        pad = self.model.generation_config.pad_token_id
        return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad), nothing, nothing.long()

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Scores a set with its own references; every prediction goes to a file, the first ones to the log."""
        rows, card, config = eval_dataset or self.eval_dataset, self.compute_metrics, self.model.config
        card.use(rows)
        longest = self.args.generation_max_length or self.model.generation_config.max_length or sys.maxsize
        card.max_new_tokens = min(longest, config.max_target_positions - len(card.tokenizer.prefix_tokens))
        # One process may leave at any moment; several only together, see `agree`.
        was_deferred, self.stop.is_deferred = self.stop.is_deferred, self.args.world_size > 1
        # The library has ZeRO-3 prepare a model for scoring, and ZeRO-2 fail, unless one is there (5.23).
        began, prepared, self.deepspeed = time.monotonic(), self.accelerator._models, self.deepspeed or self.model
        if is_untrained := not prepared:
            # Prepared by the library (5.23), it would stay without DDP, and every rank would train a model of its own.
            # And FSDP cannot prepare a model without its optimizer (accelerate 1.15).
            prepared.append(self.model.to(self.args.device))
        with torch.random.fork_rng():  # whether and when a model is scored must not change how it is trained
            metrics = self.evaluate_in_memory(rows, metric_key_prefix=metric_key_prefix, **kwargs)
        if is_untrained:
            prepared.clear()
        self.stop.is_deferred, self.logged_at = was_deferred, self.logged_at + time.monotonic() - began
        for row in card.scored[:3]:
            logger.info("said:  %s", row["reference"])
            logger.info("heard: %s", row["prediction"])
        if self.is_world_process_zero():
            write_predictions(Path(self.args.output_dir), metric_key_prefix, card.scored)
            if "tensorboard" in self.args.report_to:
                pairs = "".join(f"| {row['reference']} | {row['prediction']} |\n" for row in card.scored[:20])
                # In a folder of their own, which is not uploaded: the data may be private.
                with SummaryWriter(os.path.join(self.args.output_dir, "runs", "transcripts")) as writer:
                    table = f"| said | heard |\n|---|---|\n{pairs}"
                    writer.add_text(f"predictions/{metric_key_prefix}", table, self.state.global_step)
        return metrics

    def evaluate_in_memory(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The library's evaluation; out of GPU memory, again with half the batch (rows come longest first)."""
        while True:
            try:
                return super().evaluate(*args, **kwargs)
            except torch.OutOfMemoryError:
                if self.args.per_device_eval_batch_size == 1 or self.args.world_size > 1:
                    raise
            self.args.per_device_eval_batch_size //= 2
            torch.cuda.empty_cache()
            logger.warning("out of GPU memory: scoring with %d rows at a time.", self.args.per_device_eval_batch_size)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the stream's figures; drops the library's epoch, which means nothing for a stream."""
        self.state.epoch = None
        if "loss" in logs:
            elapsed, meter = time.monotonic() - self.logged_at, self.meter
            names = ("rows", "seconds", "frames", "window")  # of all ranks; each waits for the slowest one's data
            sums = self.accelerator.reduce(torch.tensor([float(meter[n]) for n in names], device=self.args.device))
            num_rows, seconds, num_frames, window = sums.tolist()
            waited = meter["waited"] / elapsed
            speed = {"data_wait_fraction": waited, "padding_fraction": 1 - num_frames / window}
            speed |= {"samples_per_second": num_rows / elapsed, "audio_hours_per_hour": seconds / elapsed}
            logs = logs | self.progress.figures() | {name: round(value, 3) for name, value in speed.items()}
            logs |= self.uploads.figures() if self.uploads is not None else {}
            if waited > MAX_DATA_WAIT_FRACTION and not self.is_advised:
                self.is_advised = True
                threads, cores = self.train_dataset.num_threads, num_usable_cores(self.args.world_size)
                advice = "raise --num_decoding_threads" if threads < cores else "the network, disk or CPU is the limit"
                found = f"waiting for data ({threads} threads, {cores} cores): {advice}."
                logger.warning("%.0f %% of the time goes into %s", 100 * waited, found)
            self.progress.time_in_seconds += elapsed
            self.meter, self.logged_at = Counter(), time.monotonic()
            # Else one NaN would stay in the library's running sum for ever (transformers 5.23: tr_loss -= tr_loss).
            self._tr_loss.zero_()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Also saves what transformers 5.23 leaves out: preprocessor_config.json (older readers), normalizer.json."""
        self.model.config.use_cache = True  # the library's False is for training, not for the model's users
        super().save_model(output_dir, _internal_call)
        self.model.config.use_cache = self.args.use_cache
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            self.processing_class.feature_extractor.save_pretrained(folder)
            if not _internal_call and adapted_layers(self.model):  # a checkpoint keeps adapters apart: exact
                self.model.save_pretrained(folder, state_dict=merged_weights(self.model))
            if spelling := self.processing_class.tokenizer.english_spelling_normalizer:
                write_json(folder / "normalizer.json", spelling)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        # FSDP's state has tied weights twice, as tensors apart, of which save_pretrained (5.23) would write both.
        tied = self.model.all_tied_weights_keys
        super()._save(output_dir, state_dict and {n: tensor for n, tensor in state_dict.items() if n not in tied})

    def _get_output_dir(self, trial: Any) -> str:
        # While a checkpoint is written, the library is to write it elsewhere (transformers 5.23, trainer.py:3367).
        return str(self.unfinished) if self.unfinished else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Written aside, renamed, uploaded, and then the old ones are rotated; the library (5.23) writes in place and
        rotates first. A full disk keeps the older checkpoints; the next save tries again."""
        was_deferred, self.stop.is_deferred = self.stop.is_deferred, True
        output_dir, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self.unfinished, self.save_error = output_dir / "_unfinished", None
        if self.args.should_save:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        # Told of a best step, the library (5.23) has a barrier, where ranks would wait for one whose disk is full.
        best, self.state.best_global_step = self.state.best_global_step, None
        self.attempt(super()._save_checkpoint, model, trial)
        self.state.best_global_step = best
        # Here every rank has written its random state, or has failed to.
        ranks = gather_object([(self.progress.position, self.save_error and portable(self.save_error))])
        self.save_error = next((error for _, error in ranks if error is not None), None)
        if self.save_error is None and best == self.state.global_step:
            self.state.best_model_checkpoint = str(output_dir / name)  # on every rank: all will load it
        if self.args.should_save and self.save_error is None:
            positions = [position for position, _ in ranks]
            self.attempt(self.complete_checkpoint, self.unfinished / name, output_dir / name, positions)
        if self.save_error is not None:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        self.unfinished = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save and self.save_error is None:
            if self.uploads is not None:
                if has_adapters := bool(adapted_layers(self.model)):  # others get plain weights
                    self.attempt(self.save_model)
                folder = output_dir if has_adapters else output_dir / name
                self.attempt(self.uploads.submit, folder, self.state.log_history, output_dir / name)
            rotate_checkpoints(str(output_dir), self.args.save_total_limit, self.state.best_model_checkpoint)
        self.stop.is_deferred = was_deferred

    def attempt(self, save: Callable[..., None], *args: Any) -> None:
        """save(*args), its error noted instead of raised: older checkpoints are kept, the next save tries again."""
        try:
            save(*args)
        except Exception as error:  # OSError, RuntimeError, SafetensorError, or tokenizers' bare Exception
            self.save_error = error
            step, kind = self.state.global_step, type(error).__name__
            logger.error("checkpoint-%d could not be saved (%s: %s)", step, kind, one_line(error))

    def complete_checkpoint(self, unfinished: Path, final: Path, positions: list[dict[str, Any]]) -> None:
        """Adds the stream's position, makes everything durable, and gives the checkpoint its name in one step."""
        write_json(unfinished / "stream_state.json", self.progress.state(self.args.train_batch_size, positions))
        self.state.save_to_json(str(unfinished / "trainer_state.json"))  # with the final name of the best
        for path in (path for path in unfinished.rglob("*") if path.is_file()):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)  # a damaged one that the run had stepped over
        unfinished.rename(final)
        unfinished.parent.rmdir()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # The library keeps the checkpoint's learning rate whatever --learning_rate says now (transformers 5.23), and
        # takes the first step at the rate of the old --max_steps.
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler, rate = self.lr_scheduler, self.args.learning_rate
        if checkpoint is not None and not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            logger.warning("the learning rate goes on as in the checkpoint: %s.", type(scheduler).__name__)
        elif checkpoint is not None:
            if scheduler.base_lrs[0] != rate:
                logger.info("learning rate: %g now, %g in the checkpoint", rate, scheduler.base_lrs[0])
            scheduler.base_lrs = [rate] * len(scheduler.base_lrs)
            scheduler.last_epoch -= 1
            scheduler.step()  # computes the present rate anew

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        # Likewise with --eval_steps, --save_steps and --logging_steps, which the checkpoint's state would override.
        result = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        return result


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has everything that an exact continuation needs, and can be read."""
    try:
        with safe_open(checkpoint / "model.safetensors", framework="pt"):
            pass  # opening checks the header against the file's length
        for name in ("trainer_state.json", "stream_state.json"):
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
        names = ("optimizer.pt", "optimizer.bin", "scheduler.pt")  # FSDP writes the second
        states = [checkpoint / name for name in names if (checkpoint / name).is_file()]
        for path in states:
            zipfile.ZipFile(path).close()  # torch writes its index last
        # DeepSpeed keeps its states in the folder that `latest` names.
        return (len(states) == 2 or (checkpoint / "latest").is_file()) and any(checkpoint.glob("rng_state*.pth"))
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
        return False


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint to continue from, None for a fresh start.
    Raises: UserError if the named one is incomplete, or if a fresh start would mix with another run's files."""
    found = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]), reverse=True)
    wish = str(resume_from_checkpoint or "no")
    if wish.lower() in ("no", "none", "false"):
        if found:
            reason = f"holds {found[0].name} and --resume_from_checkpoint says {wish}"
            advice = "Choose another --output_dir, or leave out --resume_from_checkpoint to continue."
            raise UserError(f"--output_dir {output_dir} {reason}. {advice}")
        return None
    if wish.lower() not in ("auto", "true", "hub"):
        if not is_complete(Path(wish)):
            raise UserError(f"--resume_from_checkpoint {wish}: not a complete checkpoint of this script.")
        return Path(wish)
    for checkpoint in found:
        if is_complete(checkpoint):
            return checkpoint
        logger.warning("%s is incomplete or damaged; trying the one before.", checkpoint)
    return None


# ---------------------------------------------------------------------------------------------------- reporting ----
def write_json(path: Path, value: Any) -> None:
    """Writes a file that is either the old or the new one, never half of it."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    unfinished.replace(path)


def write_text(path: Path, text: str, mode: str = "w") -> None:
    """Writes or (mode "a") appends. What is only for reading later must not end a run: a full disk is a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        logger.warning("%s could not be written: %s", path, one_line(error))


def run_identity(model_args: ModelArguments, records: list[DataRecord]) -> dict[str, Any]:
    """What makes two starts the same run; a folder that holds another one's weights is refused."""
    names = "dataset_name dataset_config_name train_split_name audio_column_name text_column_name language task"
    sources = [{name: getattr(record, name) for name in names.split()} for record in records]
    model = {name: getattr(model_args, name) for name in ("model_name_or_path", "model_revision", "lora_rank")}
    return {**model, **(sources[0] if len(sources) == 1 else {"data_mix": sources})}


def check_output_dir(output_dir: Path, identity: dict[str, Any]) -> None:
    """Raises UserError if output_dir holds weights or checkpoints that are not this run's (it may be './' if not)."""
    patterns = ("checkpoint-*", "*.safetensors", "pytorch_model*.bin")
    weights = [path for pattern in patterns for path in output_dir.glob(pattern)]
    if not weights:
        return
    record = output_dir / "run_info.json"
    previous = json.loads(record.read_text(encoding="utf-8")).get("identity", {}) if record.is_file() else {}
    changed = [f"{name} was {previous.get(name)!r}" for name, value in identity.items() if previous.get(name) != value]
    if changed:
        reason = "; ".join(changed) if previous else "there is no run_info.json of this script"
        raise UserError(f"--output_dir {output_dir} has {weights[0].name} of another run ({reason}). Choose another.")


def redacted(text: str) -> str:
    """The text without anything that looks like a token or like user:password@."""
    return re.sub(r"hf_\w{8,}|(?<=://)[^/\s@]+:[^/\s@]+(?=@)", "REDACTED", text)


def without_folders(text: str) -> str:
    """The text with the last part only of every absolute path, for what is uploaded; addresses stay."""
    return re.sub(r"(?<![\w:/.])/(?:[\w.@+~-]+/)+|(?<=\d/)/(?:[\w.@+~-]+/)+", "", redacted(text))


def run_info(argv: list[str], arguments: dict, sets: dict[str, list[SpeechSet]], identity: dict) -> dict[str, Any]:
    """What is needed to understand and repeat the run: command, arguments, versions, git, data, machine."""
    packages = "torch transformers datasets accelerate huggingface_hub evaluate jiwer soundfile soxr numpy"
    versions = {name: importlib.metadata.version(name) for name in packages.split()}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names = ("record", "name", "config_name", "split", "kind", "revision", "num_rows")
    data = {role: [{n: getattr(item.source, n) for n in names} for item in items] for role, items in sets.items()}
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "gpus": gpus, "cuda": torch.version.cuda}
    return {
        "command": redacted(shlex.join(["python", Path(sys.argv[0]).name, *argv])),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "identity": identity,
        "arguments": json.loads(redacted(json.dumps(arguments, default=str))),
        "versions": {"python": platform.python_version(), **versions, "torch": torch.__version__},  # with its build
        "git": subprocess.getoutput(f"git -C '{Path(__file__).parent}' describe --always --dirty --abbrev=40"),
        "data": data,
        "machine": machine,
    }


def describe_run(model: Any, sets: dict, args: TrainingArguments, checkpoint: Path | None, is_dealt: bool) -> None:
    """The first screen of the log: what will happen, in numbers."""
    sizes = f"{model.num_parameters():,} parameters, {model.num_parameters(only_trainable=True):,} of them trainable"
    logger.info("model: %s, %s, on %s", model.name_or_path, sizes, args.device)
    for role, source in ((role, item.source) for role, items in sets.items() for item in items):
        rows = f"{source.num_rows:,} rows" if source.num_rows is not None else "rows not counted"
        place = " ".join(filter(None, (source.record, source.name, source.config_name, source.split)))
        found = f"{source.kind}, {len(source.shards())} files, {rows}; {source.audio_column}, {source.text_column}"
        logger.info("%s data: %s (%s)", role, place, found)
    if args.do_train:
        sizes = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size)
        logger.info("a step: %d rows (%d per device x %d accumulated x %d processes)", math.prod(sizes), *sizes)
        if args.world_size > 1:
            logger.info("every process reads %s", "files of its own" if is_dealt else "all, and decodes its share")
        rate, saves = args.learning_rate, args.save_steps
        logger.info("steps: %d, learning rate %g, checkpoint every %g steps", args.max_steps, rate, saves)
        logger.info("start: %s", "from the beginning" if checkpoint is None else f"continues from {checkpoint}")
        batches = (args.dataloader_prefetch_factor or 4) + 1
        need = batches * sizes[0] * model.config.num_mel_bins * model.config.max_source_positions * 8 / 2**20
        shared = Path("/dev/shm")
        have = shutil.disk_usage(shared).total / 2**20 if shared.exists() else math.inf
        if args.dataloader_num_workers and have < need:
            found = f"/dev/shm has {have:.0f} MB, batches of long clips may take {need:.0f}"
            logger.warning("%s. In Docker, start the container with --shm-size 2g.", found)
    if "tensorboard" in args.report_to:
        runs = os.environ.get("TENSORBOARD_LOGGING_DIR", str(Path(args.output_dir) / "runs"))
        logger.info("curves: tensorboard --logdir %s", runs)


def histogram(name: str, values: list[float]) -> str:
    """One line: how many values lie in each twentieth of the range up to the 99th percentile, and percentiles."""
    low, middle, high, last = np.percentile(values, [5, 50, 95, 99])
    counts, _ = np.histogram(np.minimum(values, last), bins=20, range=(0, last))
    bars = "".join(" .:-=+*#%@"[math.ceil(9 * count / max(counts))] for count in counts)
    spread = f"5 % {low:.1f}, median {middle:.1f}, 95 % {high:.1f}, max {max(values):.1f}"
    return f"{name}: 0 [{bars}] {last:.1f}   {spread}"


def describe_style(texts: list[str]) -> str:
    """'upper case, no punctuation' and the like, of transcripts as they are trained."""
    letters = [c for text in texts for c in text if c.lower() != c.upper()]
    share = sum(c.isupper() for c in letters) / max(1, len(letters))
    case = "upper case" if share > 0.9 else "mixed case" if share > 0.001 else "lower case" if letters else "no case"
    marked = sum(any(unicodedata.category(c)[0] == "P" and c not in "'-\u2019" for c in text) for text in texts)
    return f"{case}, {'punctuation' if marked > 0.2 * len(texts) else 'no punctuation'}"


def report_data(stream: SpeechStream, num_rows: int, curves: Path | None) -> None:
    """Prepares the first rows of every training source, and logs what they are like; warns where sources differ.
    curves: folder for TensorBoard's histograms. The threads end here, before any loader forks."""
    figures: dict[str, list[float]] = {"durations in s": [], "tokens": []}
    styles: dict[str, str] = {}
    for item in stream.sets:
        name = item.source.record or item.source.name
        blocks = read_pass(replace(item, max_rows=num_rows), FIRST_PLACE["start"], None, 50)
        rows = ((None, row) for block in blocks for row in block.rows)
        prepared = [example for _, example in map_in_order(item.preparer, rows, stream.num_threads)]
        good = [example for example in prepared if isinstance(example, dict)]
        reasons = Counter(example.reason for example in prepared if isinstance(example, Rejection))
        logger.info("data report: first %d rows of %s, rejected: %s", len(prepared), name, describe_counts(reasons))
        if good:
            found = {"durations in s": [e["duration"] for e in good], "tokens": [len(e["labels"]) for e in good]}
            for label, values in found.items():
                figures[label] += values
                logger.info("  %s", histogram(label, values))
            styles[name] = describe_style([example["text"] for example in good])
            rates = describe_counts(Counter(f"at {example['sampling_rate']} Hz" for example in good))
            logger.info("  clips: %s; transcripts: %s; first label:", rates, styles[name])
            logger.info("  %s", item.preparer.tokenizer.decode(good[0]["labels"]))
    if len(set(styles.values())) > 1:
        found = "; ".join(f"{name}: {style}" for name, style in styles.items())
        logger.warning("transcripts differ (%s): see --do_lower_case and --do_remove_punctuation.", found)
    elif "upper case, no punctuation" in styles.values():
        logger.warning("transcripts are in upper case: so will the model's be. --do_lower_case makes them lower case.")
    if curves is not None:
        with SummaryWriter(curves) as writer:
            for label, values in figures.items():
                writer.add_histogram(f"data/{label}", np.array(values), 0)


def write_predictions(folder: Path, prefix: str, rows: list[dict[str, Any]]) -> None:
    """predictions_<set>.jsonl with every row of an evaluation, and worst_<set>.txt with the worst 20, aligned."""
    for name in sorted({row["set"] for row in rows}):
        mine, label = [row for row in rows if row["set"] == name], f"{prefix}_{name}".rstrip("_")
        scored = [row | {"wer": word_error_rate(row)} for row in mine if "hits" in row]  # the others: no reference
        names = "id reference prediction wer substitutions deletions insertions duration set".split()
        rest = [row for row in mine if "hits" not in row]
        lines = [{key: row[key] for key in names if key in row} for row in scored + rest]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(folder / f"predictions_{label}.jsonl", text)
        kinds = ("substitutions", "deletions", "insertions")
        if not scored:
            continue
        worst = sorted(scored, key=lambda row: -sum(row[kind] for kind in kinds))[:20]
        aligned = jiwer.process_words(*([row["pairs"][""][i] for row in worst] for i in (0, 1)))
        ids = "".join(f"{i + 1}: {row['id']}, WER {row['wer']:.0f} %\n" for i, row in enumerate(worst))
        write_text(folder / f"worst_{label}.txt", f"{ids}\n{jiwer.visualize_alignment(aligned, show_measures=False)}")


def score_table(metrics: dict[str, float], names: list[str]) -> str:
    """Before, after and test side by side, in total and for each named set; at the end of a line the WER's 95 %
    interval and the changes against the untouched checkpoint."""
    after = "after training" if "train_rows" in metrics else "as it is"
    titles = {"zero_shot": "before training", "eval": after, "test": "test split", "predict": "predicted"}
    lines = [f"{'':24s}     WER      CER   subst   delet  insert    rows   loops %   95 % interval"]
    for (role, title), name in itertools.product(titles.items(), ["", *names]):
        prefix = f"{role}_{name}".rstrip("_")
        if f"{prefix}_wer" not in metrics:
            continue
        wer, cer, low, high = (metrics[f"{prefix}_{kind}"] for kind in ("wer", "cer", "wer_low", "wer_high"))
        kinds = ("substitutions", "deletions", "insertions", "num_rows")
        counts = "".join(f"{int(metrics[f'{prefix}_{kind}']):8d}" for kind in kinds)
        before = [metrics.get(f"{prefix}_{kind}".replace("eval", "zero_shot", 1)) for kind in ("wer", "cer")]
        pairs = zip((wer, cer), before, ("WER", "CER"), strict=True) if role == "eval" else ()
        change = "".join(f"  {kind} {100 * (now / then - 1):+.1f} %" for now, then, kind in pairs if then)
        loops = metrics[f"{prefix}_repetition_loops"]
        figures = f"{wer:8.2f} {cer:8.2f}{counts}{loops:10.1f}   {low:.2f} to {high:.2f}{change}"
        lines.append(f"{f'{title} {name}':24s}{figures}")
    return "\n".join(lines)


def curve_table(history: list[dict[str, Any]]) -> str:
    """Markdown: step, training loss, evaluation loss, WER and CER of every evaluation; nothing before the first."""
    lines, loss = [], math.nan
    for entry in history:
        loss = entry.get("loss", loss)
        if "eval_wer" in entry:
            scores = {name: f"{entry[name]:.4g}" for name in ("eval_loss", "eval_wer", "eval_cer")}
            lines.append({"step": entry["step"], "loss": f"{loss:.4g}", **scores})
    return make_markdown_table(lines)


def card_metadata(info: dict[str, Any], metrics: dict[str, float], languages: list[str], name: str) -> str:
    """The card's YAML: what the Hub reads, with one result for each set, split and kind of error rate."""
    base, results = info["identity"]["model_name_or_path"], []
    sources = [(role, source) for role, sources in info["data"].items() for source in sources]
    kinds = {"wer_norm": "WER, normalised", "wer_ortho": "WER, as written", "cer": "CER"}
    for (role, source), (kind, title) in itertools.product(sources, kinds.items()):
        key = "_".join(filter(None, (role, source["record"] if len(info["data"][role]) > 1 else "", kind)))
        if role != "train" and key in metrics:
            place = {f"dataset_{what}": source[what] for what in ("split", "revision")}
            place |= {"dataset_config": source["config_name"] or "default", "metric_name": title}
            what = ("automatic-speech-recognition", source["name"], source["name"], kind.split("_")[0])
            results.append(huggingface_hub.EvalResult(*what, round(metrics[key], 2), **place))
    return huggingface_hub.ModelCardData(
        language=languages[0] if len(languages) == 1 else languages,
        license=info.get("base_licence"),
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition",
        base_model=None if Path(base).exists() else base,
        datasets=sorted({source["name"] for _, source in sources if not Path(source["name"]).exists()}) or None,
        metrics=["wer", "cer"],
        tags=["whisper", "speech", "generated_from_trainer", *languages],
        model_name=name,
        eval_results=results or None,
    ).to_yaml()


def model_card(info: dict, languages: list[str], name: str, metrics: dict[str, float], history: list[dict]) -> str:
    """README.md of the trained model: metadata, scores, curve, how to use it, settings, the command, versions."""
    base = info["identity"]["model_name_or_path"]
    datasets_used = {Path(source["name"]).name for sources in info["data"].values() for source in sources}
    names = """lora_rank train_window pack_utterances timestamp_probability learning_rate max_steps
        per_device_train_batch_size gradient_accumulation_steps fp16 bf16 seed"""
    audio, hours = metrics.get("train_audio_hours", 0.0), metrics.get("train_hours", 0.0)
    rows, rejected = (int(metrics.get(key, 0)) for key in ("train_rows", "train_rejected"))
    trained = f"{rows} rows ({rejected} of them rejected), {audio:.2f} h of audio, in {hours:.2f} h"
    facts = {
        "training": trained if rows else "none by this run",
        "settings": ", ".join(f"{key} {info['arguments'][key]}" for key in names.split()),
        "hardware": ", ".join(info["machine"]["gpus"]) or f"{info['machine']['cores']} CPU cores",
        "versions": ", ".join(f"{key} {found}" for key, found in {**info["versions"], "git": info["git"]}.items()),
    }
    sets = [source["record"] for source in info["data"].get("eval", []) if source["record"]]
    spoken = f'"{languages[0]}"' if len(languages) == 1 else None
    return (
        f"---\n{card_metadata(info, metrics, languages, name)}\n---\n\n# {name}\n\n{Path(base).name} fine-tuned on "
        f"{', '.join(sorted(datasets_used))}; scored by real generation.\n\n```\n{score_table(metrics, sets)}\n```\n\n"
        f"{curve_table(history)}\n\n```python\nfrom transformers import pipeline\n\n"
        f'print(pipeline("automatic-speech-recognition", model="{name}")("speech.flac")["text"])\n```\n\n'
        "With faster-whisper:\n\n```bash\npip install faster-whisper 'av<19'\n"
        f"ct2-transformers-converter --model {name} --output_dir whisper-ct2 "
        "--copy_files tokenizer.json preprocessor_config.json\n```\n\n```python\n"
        'from faster_whisper import WhisperModel\n\nmodel = WhisperModel("whisper-ct2")\n'
        f'segments, _ = model.transcribe("speech.flac", language={spoken}, without_timestamps=True)\n'
        'print("".join(segment.text for segment in segments))\n```\n\n'
        + "".join(f"* {title}: {text}\n" for title, text in facts.items())
        + f"\n```\n{info['command']}\n```\n"
    )


# --------------------------------------------------------------------------------------------------------- main ----
def set_up_logging(args: TrainingArguments) -> None:
    """One readable log from rank 0; the others speak up only for warnings."""
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger.setLevel(logging.INFO if args.process_index == 0 else logging.WARNING)
    # Their own waiting, up to 33 minutes for one read, would come on top of ours (datasets 5.2, file_utils.py:832).
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
    datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
    for name in ("httpx", "httpx2", "datasets", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.logging.set_verbosity_warning()


def make_uploads(records: list[DataRecord], args: TrainingArguments) -> HubUploads | None:
    """Proves that the Hub can be written to, and fetches its last-checkpoint if that is to be continued."""
    output_dir, uploads, repo_id = Path(args.output_dir), None, args.hub_model_id
    if args.push_to_hub and args.process_index == 0:
        repo_id = check_hub(repo_id or output_dir.resolve().name, args.hub_private_repo)
        wait, with_transcripts = 60 * records[0].max_network_wait_in_minutes, records[0].push_predictions
        uploads = HubUploads(repo_id, output_dir, str(args.hub_strategy.value), with_transcripts, wait)
        if with_transcripts:
            warn_of_private_data(repo_id, {record.dataset_name for record in records})
    if args.resume_from_checkpoint == "hub" and args.process_index == 0:
        download_checkpoint(repo_id, output_dir)
    return uploads


def make_preparer(
    processor: transformers.WhisperProcessor, config: Any, data_args: DataArguments, language: str | None
) -> UtterancePreparer:
    """The row-to-example stage for this checkpoint's window, mel bins and decoder length, and this data's language."""
    extractor = processor.feature_extractor
    if extractor.feature_size != config.num_mel_bins:
        found = f"feature extractor makes {extractor.feature_size} mel bins, its model reads {config.num_mel_bins}"
        advice = "Copy preprocessor_config.json from the model that it was made from."
        raise UserError(f"the checkpoint's {found}. {advice}")
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.set_prefix_tokens(language=language, task=data_args.task if language else None)
    window, longest_label = FRAMES_PER_POSITION * config.max_source_positions, config.max_target_positions
    limits = (data_args.min_duration_in_seconds, data_args.max_duration_in_seconds)
    text = (data_args.do_lower_case, data_args.do_remove_punctuation)
    mel_filters, wait = np.float32(extractor.mel_filters), 60 * data_args.max_network_wait_in_minutes
    return UtterancePreparer(tokenizer, mel_filters, window, longest_label, *limits, *text, wait)


def open_sets(
    records: list[DataRecord], preparers: list[UtterancePreparer], args: TrainingArguments, cache_dir: str | None
) -> dict[str, list[SpeechSet]]:
    """What this run reads, by role: train, eval, test. Warns where scored rows are also trained on."""
    wanted = {"train": args.do_train, "eval": args.do_eval, "test": True, "predict": args.do_predict}
    sets: dict[str, list[SpeechSet]] = {}
    for role, (record, preparer) in itertools.product(wanted, zip(records, preparers, strict=True)):
        split = getattr(record, f"{role}_split_name")
        if wanted[role] and split:
            needs_text = role != "predict"
            columns = (record.audio_column_name, record.text_column_name or (None if needs_text else ""))
            changes = {"needs_text": needs_text, "takes_long_clips": record.long_form and role != "train"}
            where = (record.dataset_name, record.dataset_config_name, split, columns)
            source = load_source(*where, cache_dir, record.streaming, record.name)
            max_rows = record.max_train_samples if role == "train" else record.max_eval_samples
            item = SpeechSet(source, replace(preparer, **changes), max_rows, record.weight)
            sets.setdefault(role, []).append(item)
    for role in ("train", "eval"):
        if wanted[role] and role not in sets:
            raise UserError(f"--do_{role}: no entry of --data_mix has a {role}_split_name.")
    trained = {url for item in sets.get("train", []) for url in item.source.data_files}
    for role in ("eval", "test"):
        shared = trained & {url for item in sets.get(role, []) for url in item.source.data_files}
        if any(not Path(url).name.startswith("metadata.") for url in shared):
            logger.warning("The %s split shares files with the training split: its score will flatter.", role)
    return sets


def resolve_arguments(
    args: TrainingArguments, config: Any, pass_rows: dict[str, int | None], languages: list, has_adapters: bool = False
) -> None:
    """Fills in what depends on the model and the data: learning rate, and steps from --num_train_epochs passes.
    pass_rows: rows of a pass of each training source. Raises: UserError if they have to be counted and cannot be."""
    if has_adapters and (args.fsdp or transformers.integrations.is_deepspeed_zero3_enabled()):  # one rank merges
        raise UserError("--lora_rank: adapters take little memory. Leave out --fsdp or ZeRO-3.")
    width = max(limit for limit in LEARNING_RATE_BY_WIDTH if limit <= config.d_model)
    args.learning_rate = args.learning_rate or (LORA_LEARNING_RATE if has_adapters else LEARNING_RATE_BY_WIDTH[width])
    if args.metric_for_best_model == "wer" and set(languages) <= set(UNSPACED_LANGUAGES):
        args.metric_for_best_model = "cer"
        logger.warning("no spaces between words in %s: the best model is the one of the lowest CER.", languages)
    if args.ddp_find_unused_parameters is None:  # the library looks for them in every step; only layerdrop has any
        args.ddp_find_unused_parameters = config.encoder_layerdrop + config.decoder_layerdrop > 0
    args.data_seed = args.seed if args.data_seed is None else args.data_seed
    args.ignore_data_skip = True  # the stream continues from its own position
    if args.load_best_model_at_end and args.save_total_limit == 1:
        args.save_total_limit = 2  # the library would delete the last one for the best, and a restart train again
    if pass_rows and args.max_steps <= 0:
        if len(pass_rows) > 1 or None in pass_rows.values():
            why = "the passes of a mix end at different times" if len(pass_rows) > 1 else "rows cannot be counted"
            raise UserError(f"--num_train_epochs: {why}. Pass --max_steps N instead.")
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        args.max_steps = math.ceil(args.num_train_epochs * sum(pass_rows.values()) / batch)
    args.warmup_steps = args.get_warmup_steps(args.max_steps)  # schedule-free optimisers take the number as it is
    args.num_train_epochs = args.num_train_epochs or 0.0  # the library compares it with 0


def prepare_eval_sets(sets: dict, num_threads: int, args: TrainingArguments) -> dict[str, datasets.Dataset]:
    """Every scored split, decoded once, with its rejections in the log and in rejected.jsonl."""
    output_dir, joined = Path(args.output_dir), {}
    for role in [role for role in ("eval", "test", "predict") if role in sets]:
        prepared = {}
        for item in sets[role]:
            with args.main_process_first(local=False):  # the others find the finished cache
                rows, rejections = prepare_eval_set(item, num_threads, output_dir / "_eval_cache")
            prepared[item.source.record] = rows
            listing = [str(path) for path in output_dir.glob("rejected.jsonl")]
            listed = {line.get("row") for line in read_manifest(listing)}  # a kill may have torn the last one
            news = [rejection for rejection in rejections if rejection.row not in listed]
            list_rejections(output_dir, item.source.split, news if args.process_index == 0 else [])
            found = (len(rows) - len(rejections), describe_counts(Counter(r.reason for r in rejections)))
            logger.info("%s: %d rows to score, rejected: %s", f"{role} {item.source.record}".strip(), *found)
        joined[role] = join_eval_sets(prepared)
    return joined


def train(trainer: SpeechTrainer, checkpoint: Path | None) -> dict[str, float]:
    """Trains to max_steps and returns the library's figures. A finished run is loaded, not trained a step further."""
    if checkpoint is not None:
        for name, flag in (("pytorch_model_fsdp.bin", "fsdp"), ("latest", "deepspeed")):
            if (checkpoint / name).is_file() != bool(getattr(trainer.args, flag)):
                raise UserError(f"{checkpoint}: pass --{flag} if it was saved with it, and only then.")
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if stopper := trainer.pop_callback(transformers.EarlyStoppingCallback):
            saved = state["stateful_callbacks"].get(type(stopper).__name__, {"attributes": {}})
            vars(stopper).update(saved["attributes"])  # else it would count anew (transformers 5.23)
            trainer.add_callback(stopper)
        has_stopped = stopper and stopper.early_stopping_patience_counter >= stopper.early_stopping_patience
        if has_stopped or state["global_step"] >= trainer.args.max_steps:
            # The library would train one more step (transformers 5.23, trainer.py, _run_epoch).
            logger.info("%s is the end of a training: nothing is left to train.", checkpoint)
            best = trainer.args.load_best_model_at_end and state["best_model_checkpoint"]
            trainer._load_from_checkpoint(str(best or checkpoint))
            trainer.is_deepspeed_enabled = False  # there is no engine, and the model stays whole
            save_final_model(trainer)
            record = trainer.progress.output_dir / "all_results.json"
            previous = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
            return {name: value for name, value in previous.items() if name.startswith("train_")}
        trainer.checkpoint_to_resume = str(checkpoint)
    try:
        metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
        save_final_model(trainer)
    except pickle.UnpicklingError as error:  # torch loads numbers only
        names = "optimizer.pt, scheduler.pt or rng_state.pth"
        raise UserError(f"{checkpoint}: {names} holds code, which is never run. Use another checkpoint.") from error
    except Exception:
        if not trainer.stop.is_deferred:  # between two steps, or scoring: nothing is half done
            save_at_the_end(trainer)
        raise
    finally:
        trainer.stop.is_deferred = False
    progress = trainer.progress
    progress.judge()
    if trainer.eval_dataset is not None and trainer.args.world_size == 1:
        check_reload(trainer, progress.output_dir)
    logger.info("training rows: %d, rejected: %s", progress.num_rows, describe_counts(progress.rejected))
    return {name: value for name, value in metrics.items() if name != "total_flos"} | progress.totals()


def save_final_model(trainer: SpeechTrainer) -> None:
    """The trained model to output_dir. Raises: RunEnded(73) if it, or the last checkpoint, could not be written."""
    trainer.attempt(trainer.save_model)
    if trainer.save_error is not None:
        raise RunEnded(73, f"the trained model could not be saved: {one_line(trainer.save_error)}")


@torch.no_grad()
def check_reload(trainer: SpeechTrainer, folder: Path) -> None:
    """Loads what was saved as its users will: it must hear in 8 evaluation clips what the model in memory hears.
    Raises: RunEnded(1) with the file that differs."""
    shortest = trainer.eval_dataset.select(range(max(0, len(trainer.eval_dataset) - 8), len(trainer.eval_dataset)))
    window_in_seconds = trainer.window_in_frames * HOP_LENGTH_IN_SAMPLES / SAMPLE_RATE_IN_HZ
    rows = [row for row in shortest if row["duration"] <= window_in_seconds]
    if not rows:
        return
    try:
        features, processor = trainer.padded(trainer.data_collator(rows)), trainer.processing_class
        model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=trainer.model.dtype)
        model.to(features.device)
        fresh = transformers.AutoProcessor.from_pretrained(folder)
        how = {"max_new_tokens": min(64, trainer.compute_metrics.max_new_tokens), "max_length": None}
        pairs = ((trainer.model.eval(), processor), (model, fresh))
        ids = [generate_ids(m, m.get_encoder()(features), **how) for m, _ in pairs]
        heard = [p.batch_decode(tokens) for (_, p), tokens in zip(pairs, ids, strict=True)]  # special tokens too
    except torch.OutOfMemoryError:
        logger.warning("no GPU memory left to load the saved model beside the trained one: it was not compared.")
        return
    if heard[0] != heard[1]:
        expected = merged_weights(trainer.model)
        same = all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())
        configs = (trainer.model.generation_config.to_json_string(), model.generation_config.to_json_string())
        files = ["model.safetensors"] * (not same) + ["generation_config.json"] * (len(set(configs)) > 1)
        file = folder / (files or ["tokenizer.json"])[0]
        raise RunEnded(1, f"the saved model hears {heard[1][:1]}, the trained one {heard[0][:1]}: see {file}.")
    logger.info("%s, loaded afresh, hears the same in %d clips.", folder, len(rows))


def save_at_the_end(trainer: SpeechTrainer) -> None:
    """Saves what has been trained when a run ends between two steps, and says how to go on."""
    step, output_dir = trainer.state.global_step, Path(trainer.args.output_dir)
    if step > 0 and not is_complete(output_dir / f"checkpoint-{step}"):
        trainer._save_checkpoint(trainer.model, trial=None)  # the library has no public name for it
    newest = find_checkpoint(output_dir, "auto")
    if trainer.is_world_process_zero():
        logger.warning("saved: %s. To go on, start the same command again.", newest or "nothing, no step was finished")


def last_scores(history: list[dict[str, Any]], step: int | None = None) -> dict[str, float]:
    """The metrics of the last evaluation (of that step) in the trainer's log, if there was one."""
    entries = (entry for entry in reversed(history) if "eval_loss" in entry and step in (None, entry["step"]))
    return {name: value for name, value in next(entries, {}).items() if name.startswith("eval_")}


def zero_shot_scores(trainer: SpeechTrainer, output_dir: Path, checkpoint: Path | None) -> dict[str, float]:
    """Scores of the untouched model; a continued run reads them from zero_shot.json."""
    record = output_dir / "zero_shot.json"
    if checkpoint is not None and record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))
    metrics = trainer.evaluate(metric_key_prefix="zero_shot")
    if trainer.is_world_process_zero():
        write_json(record, metrics)
    return metrics


def write_reports(output_dir: Path, info: dict[str, Any], metrics: dict[str, float], card: str) -> None:
    """all_results.json, scorecard.json, run_info.json with the end time, the card, and the score table in the log."""
    roles = ("zero_shot", "eval", "test", "predict")
    scores = {name: metrics[name] for name in metrics if name.startswith(roles) and "preparation_time" not in name}
    ended = {"ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    for name, value in {"all_results": metrics, "scorecard": scores, "run_info": info | ended}.items():
        write_json(output_dir / f"{name}.json", value)
    (output_dir / "README.md").write_text(card, encoding="utf-8")
    if any(name.endswith("_wer") for name in metrics):
        names = [source["record"] for source in info["data"].get("eval", []) if source["record"]]
        logger.info("scores\n%s", score_table(metrics, names))
        for name in ["", *names]:
            for kind in ("wer", "cer", "repetition_loops", "cut_outputs", "empty_outputs"):
                keys = (f"{role}_{name}".rstrip("_") + f"_{kind}" for role in ("zero_shot", "eval"))
                before, after = (metrics.get(key) for key in keys)
                if before is not None and after is not None and after > before:
                    found = (name or "the model", kind.replace("_", " "), after, before)
                    logger.warning("%s is worse than before training: %s %.2f %%, was %.2f %%.", *found)


def run_job(
    trainer: SpeechTrainer, info: dict[str, Any], final_sets: dict, checkpoint: Path | None, write_card: Callable
) -> dict[str, float]:
    """Reports on the data, scores, trains, scores, reports and uploads, each if it is wanted. Returns all metrics."""
    args, data_args, uploads = trainer.args, trainer.data_args, trainer.uploads
    output_dir = Path(args.output_dir)
    metrics: dict[str, float] = {}
    if args.process_index == 0:
        write_json(output_dir / "run_info.json", info)
        if args.do_train and checkpoint is None and data_args.data_report_samples:
            curves = output_dir / "runs" / "data" if "tensorboard" in args.report_to else None
            report_data(trainer.train_dataset, data_args.data_report_samples, curves)
    if data_args.eval_before_training:
        metrics |= zero_shot_scores(trainer, output_dir, checkpoint)
    if uploads is not None:
        known = trainer.progress.totals
        uploads.write_card = lambda log: write_card(metrics=metrics | last_scores(log) | known(), history=log)
    if args.do_train:
        metrics |= train(trainer, checkpoint)
    if args.do_eval:  # of the weights that are saved; the last evaluation may have scored them already
        # The best step of all may lie between two saves: what was loaded is the best checkpoint.
        best = args.load_best_model_at_end and trainer.state.best_model_checkpoint
        step = int(best.rpartition("-")[2]) if best else trainer.state.global_step
        metrics |= last_scores(trainer.state.log_history, step) or trainer.evaluate()
    for role, rows in final_sets.items():
        metrics |= trainer.evaluate(rows, metric_key_prefix=role)
    if args.process_index == 0:
        write_reports(output_dir, info, metrics, write_card(metrics=metrics, history=trainer.state.log_history))
    if uploads is not None:
        uploads.submit(output_dir, trainer.state.log_history)
        uploads.finish()
    return metrics


def set_up(argv: list[str], stop: StopSignals | None) -> tuple[SpeechTrainer, dict, dict, Path | None, Callable]:
    """From the command line to a trainer with its model and data: what `run_job` takes. Raises: UserError."""
    model_args, data_args, args = parse_arguments(argv)
    check_arguments(data_args, args)
    records = data_records(data_args)
    check_devices(args)
    set_up_logging(args)
    output_dir, identity = Path(args.output_dir), run_identity(model_args, records)
    check_output_dir(output_dir, identity)
    data_args.num_decoding_threads = data_args.num_decoding_threads or num_usable_cores(args.world_size)
    patience = {"limit_in_seconds": 60 * data_args.max_network_wait_in_minutes}
    with args.main_process_first(local=False):  # it may fetch the checkpoint that all look for
        uploads = patiently(make_uploads, records, args, task="asking the Hub", **patience)
    args.push_to_hub = False  # from here on: the library's own push can hang for ever
    checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint) if args.do_train else None

    where = (model_args.model_name_or_path, model_args.model_revision, model_args.cache_dir)
    processor, generation_config, config = patiently(load_processor, *where, task=f"loading {where[0]}", **patience)
    languages = [check_language(record.language, generation_config, where[0]) for record in records]
    preparers = [make_preparer(processor, config, *pair) for pair in zip(records, languages, strict=True)]
    processor.tokenizer = preparers[0].tokenizer
    sets = patiently(open_sets, records, preparers, args, model_args.cache_dir, task="opening the data", **patience)
    train_sets = tuple(sets.get("train", ()))
    pass_rows = {item.source.record: item.rows_per_pass() for item in train_sets}

    resolve_arguments(args, config, pass_rows, languages, model_args.lora_rank > 0)
    output_dir.mkdir(parents=True, exist_ok=True)
    deal = (args.process_index, args.world_size, can_deal(train_sets, args.world_size))
    progress = StreamProgress(output_dir, data_args.max_rejected_fraction, pass_rows, *deal)
    if checkpoint is not None:
        progress.restore(json.loads((checkpoint / "stream_state.json").read_text(encoding="utf-8")))
    sizes = (data_args.shuffle_buffer_size, args.per_device_train_batch_size, data_args.num_decoding_threads)
    order = (args.data_seed, *sizes, progress.rank, progress.world_size, progress.position, progress.is_dealt)
    eval_sets = prepare_eval_sets(sets, data_args.num_decoding_threads, args)
    # Else the gradient of the decoder's positions differs in its last bit from run to run (torch 2.13, index_put).
    torch.use_deterministic_algorithms(args.full_determinism or args.device.type == "cpu", warn_only=True)
    language = languages[0] if len(set(languages)) == 1 else None  # of several the saved model detects each
    transformers.set_seed(args.seed)  # new adapters begin alike on every rank
    # Whole, in every process: transformers (5.23) cannot load a Whisper in ZeRO-3's parts. DeepSpeed splits it later.
    transformers.integrations.unset_hf_deepspeed_config()
    model = patiently(load_model, model_args, data_args, language, task=f"loading {where[0]}", **patience)
    ids = (config.decoder_start_token_id, processor.tokenizer.pad_token_id, config.num_mel_bins)
    readings = {r.name: (spoken, r.do_normalize_eval) for r, spoken in zip(records, languages, strict=True)}
    limit = data_args.early_stopping_patience
    is_grouped = data_args.train_window == "longest" and not data_args.pack_utterances
    stream = SpeechStream(train_sets, *order, is_grouped, data_args.speed_perturbation)
    trainer = SpeechTrainer(
        model=model,
        args=args,
        train_dataset=stream if args.do_train else None,
        eval_dataset=eval_sets.pop("eval", None),
        data_collator=SpeechCollator(*ids, window_maker(train_sets, readings, data_args, stream.own_seed())),
        processing_class=processor,
        compute_loss_func=TokenWeightedLoss(args.label_smoothing_factor),
        compute_metrics=Scorecard(processor.tokenizer, readings),
        callbacks=[transformers.EarlyStoppingCallback(limit)] if limit else [],
        data_args=data_args,
        progress=progress,
        stop=stop or StopSignals(),
        uploads=uploads,
    )
    transformers.set_seed(args.seed + args.process_index)  # else all ranks would drop out and mask alike
    info = run_info(argv, {**asdict(model_args), **asdict(data_args), **args.to_dict()}, sets, identity)
    describe_run(model, sets, args, checkpoint, progress.is_dealt)
    info["base_licence"] = base_licence(where[0]) if uploads else None
    name = model_args.model_index_name or (uploads.repo_id if uploads else output_dir.resolve().name)
    write_card = functools.partial(model_card, info, [code or "en" for code in dict.fromkeys(languages)], name)
    return trainer, info, eval_sets, checkpoint, write_card


def in_miniature(argv: list[str], wish: TrainingArguments, folder: str) -> list[str]:
    """The command line with three steps, eight rows to score, one save, nothing uploaded, all in `folder`."""
    num_rows = 3 * wish.per_device_train_batch_size * wish.gradient_accumulation_steps
    length = "--max_steps 3" if wish.max_steps > 0 else f"--num_train_epochs 1 --max_train_samples {num_rows}"
    changes = f"""--dry_run False --push_to_hub False --push_predictions False --eval_before_training False
        --save_steps 3 --eval_steps 3 --logging_steps 1 --max_eval_samples 8 --resume_from_checkpoint no
        --data_report_samples 0 --save_total_limit 2 --report_to none {length}"""
    return [*argv, *changes.split(), "--output_dir", folder]


def dry_run(argv: list[str], stop: StopSignals | None) -> dict[str, float]:
    """The whole job in miniature, in a temporary folder: 64 rows decoded, three steps of the row with most tokens, 8
    rows scored, a checkpoint saved and loaded afresh. Logs a table of checks. Raises: UserError if one fails."""
    _, data_args, wish = parse_arguments(argv)
    check_arguments(data_args, wish)
    checks = {"Hub": ("ok", "not asked for")}
    if wish.push_to_hub:
        name = wish.hub_model_id or Path(wish.output_dir).resolve().name
        ask = functools.partial(check_hub, name, None, may_create=False)
        checks["Hub"] = ("ok", f"{patiently(ask, limit_in_seconds=60, task='asking the Hub')} may be written")
    with tempfile.TemporaryDirectory() as folder:
        trainer, info, *job = set_up(in_miniature(argv, wish, folder), stop)
        stream = trainer.train_dataset
        report_data(stream, 64, None)
        rows = list(itertools.islice(stream, 64))
        good = [(position, example) for position, example in rows if isinstance(example, dict)]
        if not good:
            raise UserError("--dry_run: none of the first 64 rows is usable, see the data report above.")
        at, longest = max(good, key=lambda row: (len(row[1]["labels"]), row[1]["duration"]))
        batch = wish.per_device_train_batch_size * wish.gradient_accumulation_steps
        # First a step whose utterances share no window, then, with --pack_utterances, two in which they do.
        alone = longest | {"duration": trainer.window_in_frames * HOP_LENGTH_IN_SAMPLES / SAMPLE_RATE_IN_HZ}
        trainer.train_dataset, trainer.is_advised = [(at, alone)] * batch + [(at, longest)] * 2 * batch, True
        metrics = run_job(trainer, info, *job)
        size = sum(file.stat().st_size for file in Path(folder, "checkpoint-3").iterdir())
    rejected = 1 - len(good) / len(rows)
    state = "error" if rejected > data_args.max_rejected_fraction else "warning" if rejected > 0.1 else "ok"
    checks["data"] = (state, f"{len(good)} of {len(rows)} rows usable; most tokens: {len(longest['labels'])}")
    limit = data_args.max_eval_samples or sys.maxsize
    scored = sum(min(limit, source["num_rows"] or 0) for source in info["data"].get("eval", []))
    trained = sum(source["num_rows"] or 0 for source in info["data"]["train"])
    checks |= check_needs(trainer, wish, (trained, scored), metrics, size)
    for name, (state, found) in {"versions": ("ok", json.dumps(info["versions"])), **checks}.items():
        logger.info("%-8s %-10s %s", state, name, found)
    if failed := [f"{name}: {found}" for name, (state, found) in checks.items() if state == "error"]:
        raise UserError(f"--dry_run: {'; '.join(failed)}.")
    return metrics


def check_needs(
    trainer: SpeechTrainer, wish: TrainingArguments, rows: tuple[int, int], metrics: dict[str, float], size: int
) -> dict[str, tuple[str, str]]:
    """What the full run will need, by three steps: {check: (ok, warning or error; what was found)}. rows: to train on
    and to score; size: of a checkpoint in bytes."""
    place = Path(wish.output_dir).resolve()
    batch = wish.per_device_train_batch_size * wish.gradient_accumulation_steps
    rates = [entry["samples_per_second"] for entry in trainer.state.log_history if "samples_per_second" in entry]
    steps = wish.max_steps if wish.max_steps > 0 else math.ceil(wish.num_train_epochs * rows[0] / batch)
    every, save_every = (n if n >= 1 else math.ceil(n * steps) for n in (wish.eval_steps, wish.save_steps))
    seconds_per_clip = metrics.get("eval_runtime", 0.0) / 8
    hours = (steps * batch / rates[-1] / 3600, steps / every * rows[1] * seconds_per_clip / 3600)
    num_kept = min(steps // int(save_every), wish.save_total_limit or sys.maxsize) + 1  # one being written
    folder = next(path for path in (place, *place.parents) if path.exists())
    need, free = size * (num_kept + 1) / 1e9, shutil.disk_usage(folder).free / 1e9
    checks = {"device": ("warning", "no GPU: training on the CPU")}
    if trainer.args.device.type == "cuda":
        peak, whole = torch.cuda.max_memory_reserved() / 2**30, torch.cuda.mem_get_info()[1] / 2**30
        found = f"{torch.cuda.get_device_name()}, {peak:.1f} of {whole:.1f} GiB used at most"
        checks["device"] = ("warning" if peak > 0.9 * whole else "ok", found)
    is_finite = math.isfinite(metrics["train_loss"]) and not trainer.progress.num_skipped_steps
    found = f"loss {metrics['train_loss']:.3g}, {rates[-1]:.1f} rows/s"
    checks["training"] = ("ok" if is_finite else "error", found)
    checks["scoring"] = ("ok", f"{seconds_per_clip:.2f} s a clip" if wish.do_eval else "not asked for")
    found = f"{size / 1e9:.2f} GB a checkpoint, {need:.1f} GB in all, {free:.1f} GB free in {folder}"
    checks["disk"] = ("ok" if need < free else "error", found)
    found = f"about {hours[0]:.1f} h of training and {hours[1]:.1f} h of scoring for {steps} steps"
    return {**checks, "time": ("ok", found)}


def main(argv: list[str] | None = None, stop: StopSignals | None = None) -> dict[str, float]:
    """Trains and scores as the command line says. Returns all metrics. Raises: UserError for what can be mended."""
    argv = sys.argv[1:] if argv is None else argv
    if parse_arguments(argv)[1].dry_run:
        return dry_run(argv, stop)
    return run_job(*set_up(argv, stop))


def run(argv: list[str] | None = None) -> int:
    """`main` for the shell: one line instead of a traceback for all that has a known end, exit_status.json always."""
    argv = sys.argv[1:] if argv is None else argv
    code, reason = 1, "crashed"
    is_dry = any(word.split("=")[0] == "--dry_run" for word in argv)  # it leaves nothing, and ends with 0 or 2
    write_exit_status(argv if not is_dry else [], None, "")
    try:
        with StopSignals() as stop:
            main(argv, stop)
        code, reason = 0, "done"
    except UserError as error:
        code, reason = 2, str(error)
    except RunEnded as ending:
        code, reason = ending.code, ending.reason
    except torch.OutOfMemoryError as error:
        advice = "halve --per_device_train_batch_size and double --gradient_accumulation_steps (the same global batch)"
        code, reason = 74, f"out of GPU memory: {advice}, or add --gradient_checkpointing. {one_line(error)[:200]}"
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        code, reason = 73, f"the disk is full: {one_line(error)} Free some of it and start the same command again."
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        code, reason = 75, "another process of this run has ended. To go on, start the same command again."
    finally:
        is_first = write_exit_status(argv if not is_dry else [], code, reason)
    code = 2 if is_dry and 0 < code < 128 else code
    if code and is_first:
        sys.stderr.write(f"error: {reason}\n")
    return code


def write_exit_status(argv: list[str], code: int | None, reason: str) -> bool:
    """exit_status.json for run.sh (torchrun swallows its children's codes), if there is an output_dir to write to. Of
    several processes the first to fail writes it: the others only lose theirs by that. code None: removes an old one.
    Returns whether this process is the one to say it."""
    parser, nowhere = ArgumentParser([], add_help=False, allow_abbrev=False), Path("/dev/null")
    parser.add_argument("--output_dir", type=Path, nargs="?", default=nowhere, const=nowhere)
    folder = parser.parse_known_args(argv)[0].output_dir
    path, is_main = folder / "exit_status.json", os.environ.get("RANK", "0") == "0"
    if not (folder.is_dir() and os.access(folder, os.W_OK) and (is_main or code)):
        return is_main
    if code is None:
        path.unlink(missing_ok=True)
        return False
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    command = redacted(shlex.join(["python", Path(sys.argv[0]).name, *argv]))
    write_json(path, {"code": code, "reason": reason, "command": command})
    return True


if __name__ == "__main__":
    sys.exit(run())
