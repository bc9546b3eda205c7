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
#     "librosa>=0.11,<1",
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

import argparse
import difflib
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
import socket
import subprocess
import sys
import threading
import time
import unicodedata
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

# Set before the libraries read them. Threads of our own pool tokenise; a fork after that would only bring warnings.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import evaluate
import fsspec
import jiwer
import librosa
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCardData, snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    EarlyStoppingCallback,
    EvalPrediction,
    GenerationConfig,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
    set_seed,
)
from transformers.hf_argparser import HfArg
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import default_logdir
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE
from transformers.trainer_utils import rotate_checkpoints

logger = logging.getLogger(__name__)

SAMPLE_RATE_IN_HZ = 16_000  # every Whisper checkpoint was trained on 16 kHz
HOP_LENGTH_IN_SAMPLES = 160  # 10 ms between two log-mel frames
FFT_LENGTH_IN_SAMPLES = 400  # 25 ms under each frame
FRAMES_PER_POSITION = 2  # the encoder's second convolution halves the frames
SILENCE = -1.5  # log-mel of digital silence: (log10(1e-10) + 4) / 4
MAX_BLOCK_IN_BYTES = 512 * 2**20  # bounds the shuffle block's memory, whatever the rows' size
ROWS_BEFORE_REJECTION_CHECK = 1_000
MAX_BROKEN_STEPS = 10  # steps in a row without a finite loss before the run is given up
STOP_SIGNALS = [getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, n)]
IGNORED_LABEL = -100  # torch's cross-entropy skips it

# Peak learning rates for full fine-tuning by the model's width, about a fortieth of pre-training's (Jong Wook Kim, as
# quoted by the whisper-finetune README). Narrower models are toys trained from nothing.
LEARNING_RATE_BY_WIDTH = {0: 1e-3, 384: 3.75e-5, 512: 2.5e-5, 768: 1.25e-5, 1024: 6.25e-6, 1280: 5e-6}


class UserError(ValueError):
    """Something that the user can mend: reported as one line with exit code 2."""


# ---------------------------------------------------------------------------------------------------- arguments ----
@dataclass
class ModelArguments:
    """Which model to start from."""

    model_name_or_path: str = HfArg(help="Whisper checkpoint: a Hub id or a folder (required).")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of the model on the Hub.")
    cache_dir: str | None = HfArg(default=None, help="Folder for what is downloaded from the Hub.")
    freeze_encoder: bool = HfArg(default=False, help="Trains the decoder only.")
    model_index_name: str | None = HfArg(default=None, help="Name on the model card; default: the folder's.")
    config: str | None = HfArg(default=None, help="YAML file of flags and values; the command line overrides it.")


@dataclass
class DataArguments:
    """Which speech to train and score on, and what is done to it."""

    dataset_name: str = HfArg(help="Dataset: a Hub id or a local folder (required).")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the dataset, often the language.")
    train_split_name: str = HfArg(default="train", help="Split to train on; 'train+validation' uses all of both.")
    eval_split_name: str = HfArg(default="validation", help="Split to score during training.")
    test_split_name: str | None = HfArg(default=None, help="Split to score once, at the end, with the best model.")
    audio_column_name: str = HfArg(default="audio", help="Column with the audio.")
    text_column_name: str = HfArg(default="text", help="Column with the transcript.")
    max_duration_in_seconds: float = HfArg(default=30.0, help="Rejects longer clips (or than the window); cuts none.")
    min_duration_in_seconds: float = HfArg(default=0.0, help="Rejects shorter clips.")
    max_train_samples: int | None = HfArg(default=None, help="Trains on the first rows only, rejected ones included.")
    max_eval_samples: int | None = HfArg(default=None, help="Scores the first rows of each split only.")
    max_rejected_fraction: float = HfArg(default=0.5, help="Ends the run if more of 1,000 rows are rejected.")
    do_lower_case: bool = HfArg(default=False, help="Lower-cases the transcripts.")
    do_remove_punctuation: bool = HfArg(default=False, help="Removes punctuation, and nothing else, from transcripts.")
    do_normalize_eval: bool = HfArg(default=True, help="eval_wer and eval_cer of normalised text; or as written.")
    language: str | None = HfArg(default=None, help="Language spoken, a code or an English name; not for .en models.")
    task: str = HfArg(default="transcribe", help="'transcribe', or 'translate' (into English).")
    shuffle_buffer_size: int = HfArg(default=500, help="Rows of a shuffle block, undecoded; 1 keeps the files' order.")
    streaming: bool = HfArg(default=True, help="Reads rows as they are needed; False downloads the files first.")
    num_decoding_threads: int | None = HfArg(default=None, help="Threads that decode; default: the cores, at most 8.")
    max_network_wait_in_minutes: float = HfArg(default=30.0, help="Waits so long for a lost network before it stops.")
    max_train_time_in_hours: float | None = HfArg(default=None, help="Saves and stops (exit code 75) after this time.")
    eval_before_training: bool = HfArg(default=False, help="Scores the untouched model first, for a before/after.")
    early_stopping_patience: int | None = HfArg(default=None, help="Ends after so many evaluations without a gain.")


@dataclass
class TrainingArguments(Seq2SeqTrainingArguments):
    """The library's arguments, with other defaults: those below, and greater_is_better False for every error rate (the
    library would keep the worst model)."""

    learning_rate: float | None = HfArg(default=None, help="Peak learning rate; default: by model size.")
    num_train_epochs: float | None = HfArg(default=None, help="Passes over the rows, where they can be counted.")
    predict_with_generate: bool = HfArg(default=True, help="Must stay True: WER needs real generation.")
    report_to: str = HfArg(default="tensorboard", help="Where the curves go: tensorboard, wandb, none.")
    eval_strategy: str = HfArg(default="steps", help="When --do_eval scores during training: steps or no.")
    dataloader_num_workers: int = HfArg(default=1, help="1, or 0; see --num_decoding_threads.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="True would hide NaN losses from the log.")
    resume_from_checkpoint: str | None = HfArg(default="auto", help="'auto' (newest in output_dir), PATH, 'no'.")

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
GONE = "nothing: it is gone from transformers"
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
    "--do_normalize_eval": "do_normalize_eval_only",
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
    "--torch_compile_backend": "torchdynamo",
    "--ddp_backend": "xpu_backend",
    GONE: "include_inputs_for_metrics jit_mode_eval mp_parameters past_index ray_scope save_safetensors "
    "tpu_metrics_debug tpu_num_cores use_ipex use_legacy_prediction_loop use_mps_device",
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


class ArgumentParser(HfArgumentParser):
    """HfArgumentParser whose errors are one line and which accepts no abbreviated flags."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}. Run with --help for the list of flags.")


def flags_from_config(path: str) -> list[str]:
    """The flags and values of a YAML file as a command line, so that argparse converts 1e-5 to a number.
    Raises: UserError if the file cannot be read or is not a mapping."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config {path}: expected lines like 'max_steps: 1000', found {type(settings).__name__}.")
    flags: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        if value is not None:
            flags += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return flags


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Command line (and --config file) to the three groups of arguments.
    Raises: UserError for unknown or retired flags and for values that the libraries refuse."""
    outer = ArgumentParser([], add_help=False, allow_abbrev=False)
    outer.add_argument("--config")
    config = outer.parse_known_args(argv)[0].config
    flags = (flags_from_config(config) if config else []) + argv
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
    unsafe = [name for name in (".env", ".venv", ".git") if (Path(args.output_dir or "none") / name).exists()]
    is_timed = args.max_steps > 0 or args.num_train_epochs is not None
    best = {name: getattr(data_args, name) for name in ("early_stopping_patience", "eval_before_training")}
    best["load_best_model_at_end"] = args.load_best_model_at_end
    rules = [(getattr(args, n) != defaults[n], f"--{n} is refused: {why}.") for n, why in REFUSED_ARGUMENTS.items()]
    rules += [(on and not (training and scoring), f"--{n} needs --do_train and --do_eval.") for n, on in best.items()]
    rules += [
        (not (training or scoring), "nothing to do. Pass --do_train, --do_eval or both."),
        (not args.output_dir, "--output_dir is missing. Pass --output_dir FOLDER."),
        (not args.predict_with_generate, "--predict_with_generate False: WER needs real generation. Leave it out."),
        (workers > 1, f"--dataloader_num_workers {workers}: one worker reads. Use --num_decoding_threads {workers}."),
        ("epoch" in (args.eval_strategy, args.save_strategy), "a stream has no epochs. Use the strategy steps."),
        (data_args.task not in ("transcribe", "translate"), f"--task {data_args.task}: use transcribe or translate."),
        (shortest >= longest, f"--min_duration_in_seconds {shortest} is not below the longest, {longest}."),
        (data_args.shuffle_buffer_size < 1, "--shuffle_buffer_size must be at least 1 (1 keeps the files' order)."),
        ((data_args.num_decoding_threads or 1) < 1, "--num_decoding_threads must be at least 1."),
        (not 0 <= data_args.max_rejected_fraction <= 1, "--max_rejected_fraction must lie between 0 and 1."),
        (args.max_steps > 0 and args.num_train_epochs, "pass --max_steps or --num_train_epochs, not both."),
        (
            args.push_to_hub and unsafe,
            f"--push_to_hub uploads all of --output_dir, also {unsafe}. Choose another folder.",
        ),
        (training and not is_timed, "how long to train? Pass --max_steps N (or --num_train_epochs N)."),
    ]
    for message in (message for is_broken, message in rules if is_broken):
        raise UserError(message)


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
        raise UserError(
            f"{reason}. Update the NVIDIA driver, or install the build of torch {torch.__version__.split('+')[0]} "
            "for its CUDA version (see pytorch.org), or pass --use_cpu."
        )
    if args.fp16 and reason:
        raise UserError(f"--fp16 needs a GPU: {reason}. Leave out --fp16 to train on the CPU.")


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
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.received is None:
            self.received = number
            logger.warning("%s received: saving and stopping.", signal.Signals(number).name)
            if not self.is_deferred:
                self.check()

    def check(self) -> None:
        """Raises: RunEnded if a signal has come."""
        if self.received is not None:
            raise RunEnded(128 + self.received, f"ended by {signal.Signals(self.received).name}")


def ignore_signals(worker_id: int) -> None:
    """For the reading worker: a terminal or Slurm signals the whole group, but the parent decides. SIGTERM, which the
    DataLoader itself uses at its end, gives the parent 20 s to save; a second one ends the worker at once."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: (signal.alarm(20), signal.signal(signal.SIGTERM, signal.SIG_DFL)))
    sys.excepthook = lambda *_: None  # of a parent that leaves while it fetches a batch; our errors travel as data


def is_network_error(error: BaseException) -> bool:
    """Whether waiting may help: everything that the network or a server does but 401, 403 and 404."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    statuses = [e.response.status_code for e in chain if isinstance(e, HfHubHTTPError) and e.response is not None]
    if HF_HUB_OFFLINE or any(status in (401, 403, 404) for status in statuses):
        return False
    clients = ("httpx", "httpcore", "requests", "urllib3", "aiohttp")
    kinds = (ConnectionError, TimeoutError, socket.gaierror)
    return bool(statuses) or any(isinstance(e, kinds) or type(e).__module__.startswith(clients) for e in chain)


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

    name: str
    config_name: str | None
    split: str
    kind: str  # the `datasets` builder: parquet, audiofolder, ...
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
    export = "refs/convert/parquet"
    logger.warning("%s is a script dataset, which is never run; trying its parquet export, %s.", name, export)
    try:
        return datasets.load_dataset_builder(name, data_dir=config_name, cache_dir=cache_dir, revision=export)
    except (FileNotFoundError, ValueError, HfHubHTTPError) as error:
        if is_network_error(error):
            raise
        folder = f", folder {config_name}" if config_name else ""
        raise UserError(
            f"--dataset_name {name}: a script dataset, which is never run, and it has no parquet export "
            f"(revision {export}{folder}). Look for a parquet copy of it on the Hub."
        ) from error


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
    return snapshot_download(repo_id, allow_patterns=patterns, **where)


def open_part(builder: datasets.DatasetBuilder, part: str, columns: tuple[str, str]) -> datasets.IterableDataset:
    """One split with its audio as bytes or path, never decoded, and its text. Raises: UserError for a wrong column.
    Folder builders import torchcodec even for Audio(decode=False) (datasets 5.2, features/audio.py:106), so that their
    column becomes the file's path."""
    dataset = builder.as_streaming_dataset(part)
    if dataset.features is None:
        dataset = dataset._resolve_features()  # reads the first rows; datasets 5.2 has no public name for it
    features = dataset.features or {}
    for flag, column in zip(("audio_column_name", "text_column_name"), columns, strict=True):
        if column not in features:
            found = ", ".join(features) or "nothing: the split is empty"
            raise UserError(f"--{flag} {column}: not in split '{part}' of {builder.dataset_name}. Found: {found}.")
    audio, text = (features[column] for column in columns)
    dtype = getattr(text, "dtype", type(text).__name__)
    if dtype not in ("string", "large_string"):
        raise UserError(f"--text_column_name {columns[1]}: holds {dtype}, not text. Found: {', '.join(features)}.")
    if isinstance(audio, datasets.Audio):  # else it holds bytes, a path, or both already
        is_folder = builder.name.endswith("folder")
        feature = datasets.Value("string") if is_folder else datasets.Audio(decode=False)
        dataset = dataset.cast_column(columns[0], feature)
    return dataset.select_columns(list(columns))


def load_source(
    name: str, config_name: str | None, split: str, columns: tuple[str, str], cache_dir: str | None, streaming: bool
) -> SpeechSource:
    """Opens a dataset without reading its audio; 'train+validation' becomes one source with the files of both.
    columns: (audio, text). Raises: UserError for a missing dataset, configuration, split or column, or no rows."""
    builder = load_builder(name, config_name, cache_dir)
    if not streaming and (folder := downloaded(builder, cache_dir)):
        builder = load_builder(folder, config_name if builder.config.name == config_name else None, cache_dir)
    if hasattr(builder.config, "decode_num_threads"):
        builder.config.decode_num_threads = 0  # else folders on the Hub are decoded whatever we cast (builder.py:1186)
    files = {str(part): list(urls) for part, urls in (builder.config.data_files or {}).items()}
    parts = [part.strip() for part in split.split("+")]
    for part in parts:
        if part not in files:
            raise UserError(f"split '{part}': {name} has no such split. Found: {', '.join(files)}.")
    opened = tuple(open_part(builder, part, columns) for part in parts)
    data_files = tuple(url for part in parts for url in files[part])
    num_rows = count_rows(builder, parts, opened, data_files)
    if num_rows == 0:
        raise UserError(f"split '{split}' of {name} is empty, or none of its {len(data_files)} files is readable.")
    commit = re.match(r"hf://datasets/[^@]+@([^/]+)/", data_files[0])
    revision = commit.group(1) if commit else None
    return SpeechSource(name, config_name, split, builder.name, revision, opened, data_files, *columns, num_rows)


def count_rows(builder: datasets.DatasetBuilder, parts: list[str], opened: tuple, urls: tuple[str, ...]) -> int | None:
    """Rows of a source without reading its audio: from parquet footers, metadata files or split info, else None."""
    if builder.name == "parquet":
        with ThreadPoolExecutor(16) as pool:
            return sum(pool.map(count_parquet_rows, urls))
    if builder.name.endswith("folder"):
        return sum(1 for dataset in opened for _ in dataset)  # paths and metadata only
    counts = [splits[part].num_examples if part in (splits := builder.info.splits or {}) else None for part in parts]
    return sum(counts) if all(counts) else None


def count_parquet_rows(url: str) -> int:
    """Rows according to the file's footer; 0 if the file is damaged (its rejection is counted while reading)."""
    try:
        with fsspec.open(url, "rb") as file:
            return pq.ParquetFile(file).metadata.num_rows
    except pa.ArrowInvalid:
        return 0


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


def audio_duration_in_seconds(data: bytes) -> float:
    """Duration according to the file's header, without decoding. Raises: Rejection if libsndfile cannot read it."""
    try:
        info = soundfile.info(io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        kind = "m4a" if data[4:8] == b"ftyp" else "webm" if data[:4] == b"\x1aE\xdf\xa3" else None
        advice = f"{kind} is not supported: convert with ffmpeg -i IN.{kind} -ar 16000 -ac 1 OUT.flac"
        raise Rejection("audio_unreadable", advice if kind else one_line(error.error_string)) from error
    return info.frames / info.samplerate


def decode_audio(data: bytes) -> np.ndarray:
    """An encoded file as (n_samples,) float32 in [-1, 1], mono, 16 kHz.
    soundfile reads wav, flac, ogg, opus and mp3 from memory; librosa resamples with soxr.
    Raises: Rejection if the file is damaged, empty or holds numbers that are not finite."""
    try:
        waveform, sampling_rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise Rejection("audio_unreadable", one_line(error.error_string)) from error
    mono = waveform.mean(axis=1) if waveform.shape[1] > 1 else waveform[:, 0]
    if len(mono) == 0:
        raise Rejection("audio_empty", "no samples")
    if not np.isfinite(mono).all():
        raise Rejection("audio_not_finite", "NaN or infinite samples")
    if sampling_rate != SAMPLE_RATE_IN_HZ:
        mono = librosa.resample(mono, orig_sr=sampling_rate, target_sr=SAMPLE_RATE_IN_HZ, res_type="soxr_hq")
    return np.ascontiguousarray(mono, dtype=np.float32)


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
    audio = torch.from_numpy(waveform[:window_in_samples])
    half = FFT_LENGTH_IN_SAMPLES // 2
    num_frames = min(max_frames, math.ceil((len(audio) + half) / HOP_LENGTH_IN_SAMPLES))
    # Zeros as the library pads, as many as the last frames can see: its reflection at the end then holds zeros too.
    padding = min(len(audio) + 2 * FFT_LENGTH_IN_SAMPLES, window_in_samples) - len(audio)
    audio = functional.pad(audio, (0, padding))
    window = torch.hann_window(FFT_LENGTH_IN_SAMPLES)
    stft = torch.stft(audio, FFT_LENGTH_IN_SAMPLES, HOP_LENGTH_IN_SAMPLES, window=window, return_complex=True)
    power = stft[:, :num_frames].abs() ** 2
    mel = torch.from_numpy(mel_filters).to(torch.float32).T @ power
    log_spectrogram = mel.clamp(min=1e-10).log10()
    return (torch.maximum(log_spectrogram, log_spectrogram.max() - 8.0) + 4.0) / 4.0


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


def encode_text(text: str, tokenizer: WhisperTokenizer, max_label_length: int) -> list[int]:
    """Token ids of a transcript with prefix and end: <|startoftranscript|> [language, task] <|notimestamps|> ... .
    Raises: Rejection if the text is empty or the decoder has too few positions for it."""
    if not text:
        raise Rejection("text_empty")
    ids = tokenizer(text).input_ids
    if len(ids) - 1 > max_label_length:  # the first one is only input, the last one only label
        raise Rejection("label_too_long", f"{len(ids) - 1} tokens, the model has {max_label_length} positions")
    return ids


@dataclass
class UtterancePreparer:
    """One source row to one training example; cheap checks first. Pickles; threads share it."""

    tokenizer: WhisperTokenizer
    mel_filters: np.ndarray  # (201, n_mels)
    window_in_frames: int
    max_label_length: int
    min_duration_in_seconds: float
    max_duration_in_seconds: float
    do_lower_case: bool
    do_remove_punctuation: bool
    max_network_wait_in_seconds: float

    def check_duration(self, seconds: float) -> None:
        """Raises: Rejection outside the limits."""
        window_in_seconds = self.window_in_frames * HOP_LENGTH_IN_SAMPLES / SAMPLE_RATE_IN_HZ
        limit = min(self.max_duration_in_seconds, window_in_seconds)
        if seconds > limit:
            raise Rejection("audio_too_long", f"{seconds:.2f} s, the limit is {limit:g} s")
        if seconds < self.min_duration_in_seconds:
            raise Rejection("audio_too_short", f"{seconds:.2f} s, the limit is {self.min_duration_in_seconds:g} s")

    def prepare(self, audio: str | dict[str, Any] | None, text: str | None) -> dict[str, Any]:
        """Features (n_mels, n_frames), label ids, text as trained and duration. Raises: Rejection."""
        text = normalize_text(text or "", self.do_lower_case, self.do_remove_punctuation)
        labels = encode_text(text, self.tokenizer, self.max_label_length)
        wait = self.max_network_wait_in_seconds
        data = patiently(read_audio, audio, limit_in_seconds=wait, task="reading audio")
        self.check_duration(audio_duration_in_seconds(data))
        waveform = decode_audio(data)
        seconds = len(waveform) / SAMPLE_RATE_IN_HZ
        features = log_mel(waveform, self.mel_filters, self.window_in_frames)
        return {"features": features, "labels": labels, "text": text, "duration": seconds}

    def __call__(self, row: "SourceRow") -> dict[str, Any] | Rejection:
        if row.rejection is not None:
            return row.rejection
        try:
            return {"id": row.id, **self.prepare(row.audio, row.text)}
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
    """The rows of one file from a place on. Network errors are waited out and reading goes on at the same row; a
    damaged file ends in one rejected row that says so."""

    def __init__(
        self, source: SpeechSource, place: tuple[int, int], state: dict[str, Any] | None, wait_in_seconds: float
    ) -> None:
        self.source, self.place, self.patience = source, place, Patience(wait_in_seconds)
        self.id = "/".join(map(str, (source.split, *place)))
        self.open(state)

    def open(self, state: dict[str, Any] | None) -> None:
        self.dataset = self.source.open_shard(*self.place)
        if state is None:
            self.dataset.state_dict()  # datasets keeps track of its place only once it has been asked
        else:
            self.dataset.load_state_dict(state)

    def __iter__(self) -> Iterator[SourceRow]:
        while True:
            try:
                for row in self.dataset:
                    audio, text = row[self.source.audio_column], row[self.source.text_column]
                    path = audio.get("path") if isinstance(audio, dict) else audio
                    self.patience.reset()
                    yield SourceRow(f"{self.id}/{path or ''}", audio, text)
                return
            except Exception as error:
                # pyarrow's "Corrupt snappy compressed data" is a bare OSError; the disk's have a number.
                if type(error) in (pa.ArrowInvalid, OSError) and getattr(error, "errno", None) is None:
                    yield SourceRow(self.id, None, None, Rejection("file_damaged", one_line(error)[:200], self.id))
                    return
                state = self.dataset.state_dict()
                self.patience.wait(error, f"reading {self.source.name} {self.id}")
                self.open(state)


def read_pass(
    source: SpeechSource, start: dict[str, Any], seed: int | None, block_size: int, max_rows: int | None, wait: float
) -> Iterator[Block]:
    """The blocks of one pass from `start` on. Blocks end at block_size rows or 512 MB; seeking opens no earlier file.
    start: {"pass", "block", "shard" (place in the pass's order), "shard_state" (of datasets), "rows" (before it)};
    seed: None keeps the files' order, as does max_rows, which must mean the same rows in every pass; wait: in s."""
    order = shard_order(source, seed if max_rows is None else None, start["pass"])
    block = Block(dict(start))
    num_rows = start["rows"]
    for shard_number in range(start["shard"], len(order)):
        state = start["shard_state"] if shard_number == start["shard"] else None
        reader = ShardReader(source, order[shard_number], state, wait)
        for row in reader:
            if max_rows is not None and num_rows >= max_rows:
                break
            block.add(row)
            num_rows += 1
            if len(block.rows) >= block_size or block.size_in_bytes >= MAX_BLOCK_IN_BYTES:
                yield block
                place = {"shard": shard_number, "shard_state": reader.dataset.state_dict()}
                block = Block({"pass": start["pass"], "rows": num_rows, "block": block.start["block"] + 1, **place})
    if block.rows:
        yield block


def read_ahead(iterator: Iterator[Any]) -> Iterator[Any]:
    """The same items, the next one being fetched by a thread while the last one is used."""
    reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
    try:
        upcoming = reader.submit(next, iterator, None)
        while (item := upcoming.result()) is not None:
            upcoming = reader.submit(next, iterator, None)
            yield item
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


def map_in_order(function: Callable[[Any], Any], items: Iterable[tuple], num_threads: int) -> Iterator[tuple]:
    """(tag, function(item)) for (tag, item) in order, computed by threads with a bounded number in flight."""
    pending: deque = deque()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        for tag, item in items:
            pending.append((tag, pool.submit(function, item)))
            if len(pending) >= 4 * num_threads:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()


FIRST_POSITION = {
    "start": {"pass": 0, "block": 0, "shard": 0, "shard_state": None, "rows": 0},
    "offset": 0,  # rows of the block already used
    "row": 0,  # rows used since the training began, by all ranks together
    "skip": 0,  # rows after this position that other ranks have used
    "rows_per_pass": None,  # known after the first pass
}


@dataclass(eq=False)
class SpeechStream(torch.utils.data.IterableDataset):
    """Endless passes over a source: block-shuffled, dealt to ranks by micro-batch, prepared by threads, in one order.
    The order is a pure function of (seed, pass, source), whatever the threads, workers and timing. Every item is
    (position after it, example or Rejection or an error of the reader). Pickles; runs in one DataLoader worker."""

    source: SpeechSource
    preparer: UtterancePreparer
    seed: int
    block_size: int
    micro_batch_size: int
    num_threads: int
    max_rows: int | None = None
    rank: int = 0
    world_size: int = 1
    position: dict[str, Any] = field(default_factory=lambda: FIRST_POSITION)

    def blocks(self) -> Iterator[tuple[Block, int | None]]:
        """Endless (block, rows of a whole pass if known), beginning with the block of `self.position`."""
        start, rows_per_pass = self.position["start"], self.position["rows_per_pass"]
        while True:
            num_rows = start["rows"]
            wait, seed = self.preparer.max_network_wait_in_seconds, self.seed if self.block_size > 1 else None
            for block in read_pass(self.source, start, seed, self.block_size, self.max_rows, wait):
                num_rows += len(block.rows)
                yield block, rows_per_pass
            if num_rows == 0:
                raise UserError(f"split '{self.source.split}' of {self.source.name} is empty.")
            rows_per_pass = num_rows
            start = {"pass": start["pass"] + 1, "block": 0, "shard": 0, "shard_state": None, "rows": 0}

    def rows(self) -> Iterator[tuple[dict[str, Any], SourceRow]]:
        """(position after it, row) of this rank's share of the one global order."""
        offset, row_number = self.position["offset"], self.position["row"]
        first = row_number + self.position["skip"]
        for block, rows_per_pass in read_ahead(self.blocks()):
            start = block.start
            generator = np.random.default_rng([self.seed, start["pass"], start["block"]])
            order = generator.permutation(len(block.rows)) if self.block_size > 1 else range(len(block.rows))
            for place in range(offset, len(block.rows)):
                row_number += 1
                turn = (row_number - 1 - first) // self.micro_batch_size
                if turn >= 0 and turn % self.world_size == self.rank:
                    position = {"start": start, "offset": place + 1, "row": row_number, "rows_per_pass": rows_per_pass}
                    yield position, block.rows[order[place]]
            offset = 0

    def __iter__(self) -> Iterator[tuple[dict[str, Any] | None, Any]]:
        accepted, reasons, current_pass = 0, Counter(), None
        try:
            for position, example in map_in_order(self.preparer, self.rows(), self.num_threads):
                if position["start"]["pass"] != current_pass:
                    if current_pass is not None and accepted == 0:
                        raise UserError(f"no usable row in a whole pass: {describe_counts(reasons)}.")
                    accepted, reasons, current_pass = 0, Counter(), position["start"]["pass"]
                if isinstance(example, Rejection):
                    reasons[example.reason] += 1
                else:
                    accepted += 1
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
    return max(1, min(8, cores // world_size))


# ----------------------------------------------------------------------------------------------------- collator ----
@dataclass
class SpeechCollator:
    """Examples to a batch whose clips lie end to end, unpadded, so that little crosses the process border.
    Returns `labels` and `decoder_input_ids` (batch, n_tokens), padded with -100 and the end token, `frames` (n_mels,
    sum of frame_counts), `frame_counts`, and for training a `ride`: position, rejections, num_rows, error.
    A batch whose rows were all rejected holds one silent dummy row without labels, so that every step runs."""

    decoder_start_token_id: int
    pad_token_id: int
    n_mels: int

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        tagged = [item if isinstance(item, tuple) else (None, item) for item in items]
        examples = [example for _, example in tagged if isinstance(example, dict)]
        errors = [e for _, e in tagged if isinstance(e, Exception) and not isinstance(e, Rejection)]
        dummy = {"features": torch.full((self.n_mels, 1), SILENCE), "labels": [self.decoder_start_token_id, None]}
        rows = examples or [dummy]
        width = max(len(row["labels"]) for row in rows) - 1
        labels = torch.full((len(rows), width), IGNORED_LABEL)
        decoder_input_ids = torch.full((len(rows), width), self.pad_token_id)
        for i, row in enumerate(rows):
            ids = row["labels"]
            decoder_input_ids[i, : len(ids) - 1] = torch.tensor(ids[:-1])
            if ids[-1] is not None:
                labels[i, : len(ids) - 1] = torch.tensor(ids[1:])
        features = [row["features"].view(self.n_mels, -1) for row in rows]
        batch = {"labels": labels, "decoder_input_ids": decoder_input_ids, "frames": torch.cat(features, dim=1)}
        batch["frame_counts"] = [clip.shape[1] for clip in features]
        if examples and "index" in examples[0]:
            return {**batch, "index": torch.tensor([row["index"] for row in examples])}
        rejections = [example for _, example in tagged if isinstance(example, Rejection)]
        ride = {"position": tagged[-1][0], "rejections": rejections, "num_rows": len(items), "error": errors[:1]}
        ride |= {"ids": [row["id"] for row in examples], "seconds": sum(row["duration"] for row in examples)}
        return {**batch, "ride": ride}


# -------------------------------------------------------------------------------------------------------- model ----
def check_language(language: str | None, generation_config: GenerationConfig, name: str) -> str | None:
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
        raise UserError(
            f"--language {language}: {name} has no token for it. Choose a near language, in the same script if "
            f"possible: its token then stands for yours. Known: {' '.join(codes)}."
        )
    return code


def load_processor(name: str, revision: str, cache_dir: str | None) -> tuple[WhisperProcessor, GenerationConfig, Any]:
    """Processor, generation config and model config; small files, read before anything large.
    Raises: UserError if they are not there or belong to another architecture."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, cache_dir=cache_dir)
        if config.model_type != "whisper":
            raise UserError(
                f"--model_name_or_path {name}: {config.model_type} model; this script trains Whisper only."
            )
        processor = WhisperProcessor.from_pretrained(name, revision=revision, cache_dir=cache_dir)
        generation_config = GenerationConfig.from_pretrained(name, revision=revision, cache_dir=cache_dir)
    except OSError as error:
        if is_network_error(error):
            raise
        raise UserError(f"--model_name_or_path {name}: {one_line(error)}") from error
    return processor, generation_config, config


def load_model(
    name: str, revision: str, cache_dir: str | None, language: str | None, task: str, freeze_encoder: bool
) -> WhisperForConditionalGeneration:
    """The checkpoint in float32 (mixed precision comes from --fp16 or --bf16), told language and task.
    Only the generation config carries language and task; forced_decoder_ids would contradict them."""
    # Without dtype, transformers 5 loads float16 checkpoints as float16, whose gradients cannot be unscaled.
    where = {"revision": revision, "cache_dir": cache_dir}
    model = WhisperForConditionalGeneration.from_pretrained(name, dtype=torch.float32, **where)
    # Whisper's sinusoids are constants, but transformers 5.23 loads them with requires_grad=True.
    model.model.encoder.embed_positions.requires_grad_(False)
    model.generation_config.forced_decoder_ids = None
    if language is not None:
        model.generation_config.language = language
        model.generation_config.task = task
    if freeze_encoder:
        model.freeze_encoder()
    return model


# ------------------------------------------------------------------------------------------------------ metrics ----
def collapse_spaces(text: str) -> str:
    """jiwer separates words at plain spaces only, so every kind of white space becomes one."""
    return " ".join(text.split())


def clean_symbols(text: str) -> str:
    """transformers' remove_symbols without its loss: category M (vowel signs, tone marks) stays."""
    normalized = unicodedata.normalize("NFKC", text)
    return "".join(" " if unicodedata.category(character)[0] in "SP" else character for character in normalized)


def text_normalizers(language: str | None, tokenizer: WhisperTokenizer) -> dict[str, Callable[[str], str]]:
    """The three readings of a text: as written, Whisper's normaliser, and Whisper's basic one with marks kept."""
    keep_marks = BasicTextNormalizer()
    keep_marks.clean = clean_symbols
    is_english = language in (None, "en")
    english = EnglishTextNormalizer(tokenizer.english_spelling_normalizer or {}) if is_english else None
    return {"ortho": collapse_spaces, "norm": english or BasicTextNormalizer(), "norm_marks": keep_marks}


class SpeechErrors(evaluate.Metric):
    """Word and character errors of a corpus by jiwer, as an `evaluate` metric that needs no network."""

    def _info(self) -> evaluate.MetricInfo:
        texts = {name: datasets.Value("string") for name in ("predictions", "references")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(texts))

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        words = jiwer.process_words(references, predictions)
        characters = jiwer.process_characters(references, predictions)
        counts = {name: getattr(words, name) for name in ("substitutions", "deletions", "insertions", "hits")}
        return {"wer": 100 * words.wer, "cer": 100 * characters.cer, **counts}


@dataclass
class Scorecard:
    """The trainer's compute_metrics for one evaluation set: generated ids to error rates in percent.
    Rows are found by their index, so that rows that several processes scored twice count once."""

    tokenizer: WhisperTokenizer
    language: str | None
    do_normalize: bool
    rows: datasets.Dataset | None = None  # with index and text
    metric: SpeechErrors = field(default_factory=lambda: SpeechErrors(keep_in_memory=True))
    examples: list[tuple[str, str]] = field(default_factory=list)  # (reference, prediction) of the last call

    def __call__(self, outputs: EvalPrediction) -> dict[str, float]:
        """outputs: predictions (ids (rows, n_tokens), loss sums (rows,), token counts (rows,)), label_ids indices."""
        ids, loss_sums, token_counts = outputs.predictions
        ids = np.where(ids == IGNORED_LABEL, self.tokenizer.pad_token_id, ids)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        place = {int(index): i for i, index in enumerate(outputs.label_ids)}
        references = dict(zip(self.rows["index"], self.rows["text"], strict=True))
        order = sorted(place)
        self.examples = [(references[index], texts[place[index]].strip()) for index in order]
        once = [place[index] for index in order]
        loss = float(np.sum(loss_sums[once]) / max(1, np.sum(token_counts[once])))
        return {**self.error_rates(), "loss": loss, "num_rows": len(order)}

    def error_rates(self) -> dict[str, float]:
        """wer_*, cer_* for each reading; wer, cer and counts as --do_normalize_eval says."""
        metrics: dict[str, float] = {}
        for name, normalize in text_normalizers(self.language, self.tokenizer).items():
            pairs = [(collapse_spaces(normalize(r)), collapse_spaces(normalize(p))) for r, p in self.examples]
            kept = [(reference, prediction) for reference, prediction in pairs if reference]
            is_leading = name == ("norm" if self.do_normalize else "ortho")
            if is_leading:
                metrics["empty_references"] = len(pairs) - len(kept)
            if not kept:
                logger.warning("No reference is left after normalisation (%s): its error rates are not defined.", name)
                continue
            errors = self.metric.compute(references=[r for r, _ in kept], predictions=[p for _, p in kept])
            metrics |= {f"wer_{name}": errors["wer"], f"cer_{name}": errors["cer"]}
            metrics |= errors if is_leading else {}
        return metrics


def prepare_eval_set(
    source: SpeechSource, preparer: UtterancePreparer, max_rows: int | None, num_threads: int, folder: Path
) -> tuple[datasets.Dataset, list[Rejection]]:
    """Decodes an evaluation split once into a memory-mapped Arrow file, unpadded features, longest clips first.
    Raises: UserError if no row is usable."""
    path = folder / f"{eval_set_key(source, preparer, max_rows)}.arrow"
    listing = path.with_suffix(".json")  # written last: its presence makes the cache complete
    if not listing.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rejections = write_eval_set(source, preparer, max_rows, num_threads, path)
        list_rejections(folder.parent, source.split, rejections)
        write_json(listing, [rejection.args for rejection in rejections])
    rejections = [Rejection(*args) for args in json.loads(listing.read_text(encoding="utf-8"))]
    rows = datasets.Dataset.from_file(str(path))
    if len(rows) == 0:
        reasons = describe_counts(Counter(rejection.reason for rejection in rejections))
        raise UserError(f"no usable row in split '{source.split}' of {source.name}. Rejected: {reasons}.")
    longest_first = np.argsort(-np.array(rows["duration"]), kind="stable")
    return rows.select(longest_first).with_format("torch", columns=["features"], output_all_columns=True), rejections


def eval_set_key(source: SpeechSource, preparer: UtterancePreparer, max_rows: int | None) -> str:
    """Changes with whatever changes the prepared rows: the files, the model's limits, the prefix, the text options."""
    stats = [(url, os.path.getmtime(url), os.path.getsize(url)) for url in source.data_files if os.path.exists(url)]
    others = ("tokenizer", "mel_filters", "max_network_wait_in_seconds")
    settings = {f.name: getattr(preparer, f.name) for f in fields(preparer) if f.name not in others}
    parts = [source.name, source.config_name, source.split, source.revision, source.audio_column, source.text_column]
    prefix = [preparer.mel_filters.shape[1], len(preparer.tokenizer), preparer.tokenizer.prefix_tokens]
    return datasets.fingerprint.Hasher.hash([stats, settings, parts, prefix, max_rows])


def write_eval_set(
    source: SpeechSource, preparer: UtterancePreparer, max_rows: int | None, num_threads: int, path: Path
) -> list[Rejection]:
    """Writes the accepted rows of a split to an Arrow stream file. Returns the rejected ones."""
    schema = pa.schema(
        {"index": pa.int64(), "id": pa.string(), "text": pa.string(), "duration": pa.float64()}
        | {"labels": pa.list_(pa.int32()), "features": pa.large_list(pa.float32())}
    )
    wait = preparer.max_network_wait_in_seconds
    blocks = read_pass(source, FIRST_POSITION["start"], None, 100, max_rows, wait)
    rows = enumerate(row for block in read_ahead(blocks) for row in block.rows)
    total = min(source.num_rows or sys.maxsize, max_rows or sys.maxsize)
    rejections: list[Rejection] = []
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        prepared = map_in_order(preparer, rows, num_threads)
        total = total if total < sys.maxsize else None
        for index, example in tqdm(prepared, total=total, desc=f"preparing {source.split}", unit="row"):
            if isinstance(example, Rejection):
                rejections.append(example)
                continue
            record = {**example, "index": index, "features": example["features"].flatten().numpy()}
            writer.write_batch(pa.RecordBatch.from_pylist([record], schema=schema))
    unfinished.replace(path)
    return rejections


# ------------------------------------------------------------------------------------------------------ trainer ----
@dataclass
class TokenWeightedLoss:
    """Cross-entropy summed over this micro-batch, divided by the target tokens of the optimiser step on all ranks.
    Whisper's own loss ignores that number and comes out multiplied by accumulation and processes (transformers 5.23,
    modeling_whisper.py:1126); this one makes 8x1, 2x4 and 1x8 equal."""

    label_smoothing: float

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """outputs.logits: (batch, n_tokens, vocabulary); labels: (batch, n_tokens), -100 where nothing is said."""
        logits, how = outputs.logits.float().flatten(0, 1), {"ignore_index": IGNORED_LABEL, "reduction": "sum"}
        total = functional.cross_entropy(logits, labels.flatten(), label_smoothing=self.label_smoothing, **how)
        num_tokens = labels.ne(IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
        return total / torch.as_tensor(num_tokens, device=total.device).clamp(min=1)


@dataclass
class StreamProgress:
    """What has been trained so far, as opposed to what the worker has already prepared."""

    output_dir: Path
    max_rejected_fraction: float
    pass_rows: int | None  # rows of a pass, None until they are known
    position: dict[str, Any] = field(default_factory=lambda: dict(FIRST_POSITION))
    num_rows: int = 0
    rejected: Counter = field(default_factory=Counter)
    is_checked: bool = False
    num_skipped_steps: int = 0  # steps whose loss was not finite

    def update(self, ride: dict[str, Any]) -> None:
        """Counts one trained micro-batch and lists its rejections. Raises: UserError if there are too many."""
        # A pass shorter than the limit is judged when the next one begins.
        is_enough = self.num_rows >= ROWS_BEFORE_REJECTION_CHECK or ride["position"]["start"]["pass"] > 0
        if is_enough and not self.is_checked:
            self.is_checked = True
            check_rejected_fraction(self.rejected, self.num_rows, self.max_rejected_fraction, self.output_dir)
        self.position = ride["position"]
        self.pass_rows = self.position["rows_per_pass"] or self.pass_rows
        self.num_rows += ride["num_rows"]
        self.rejected.update(rejection.reason for rejection in ride["rejections"])
        list_rejections(self.output_dir, "train", ride["rejections"])

    def figures(self) -> dict[str, float]:
        """For the log: passes over the source with their fraction, rows used and rejected (by reason)."""
        start = self.position["start"]
        rows_in_pass = start["rows"] + self.position["offset"]
        passes = start["pass"] + (min(1.0, rows_in_pass / self.pass_rows) if self.pass_rows else 0.0)
        reasons = {f"rejected_{reason}": count for reason, count in sorted(self.rejected.items())}
        skipped = {"skipped_steps": self.num_skipped_steps} if self.num_skipped_steps else {}
        counts = {"rows": self.num_rows, "rejected": self.rejected.total()}
        return {"pass": round(passes, 4), **counts, **reasons, **skipped}

    def state(self, micro_batch_size: int, world_size: int) -> dict[str, Any]:
        """For stream_state.json. Rank 0 takes the first micro-batch of each round, the others' rows follow it."""
        listing = self.output_dir / "rejected.jsonl"
        return {
            "position": self.position | {"skip": micro_batch_size * (world_size - 1)},
            "num_rows": self.num_rows,
            "rejected": dict(self.rejected),
            "is_checked": self.is_checked,
            "num_skipped_steps": self.num_skipped_steps,
            "rejected_bytes": listing.stat().st_size if listing.exists() else 0,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what a checkpoint saved; rows that were listed after it will be met, and listed, again."""
        self.position, self.num_rows, self.is_checked = state["position"], state["num_rows"], state["is_checked"]
        self.rejected, self.num_skipped_steps = Counter(state["rejected"]), state["num_skipped_steps"]
        listing = self.output_dir / "rejected.jsonl"
        if listing.exists() and listing.stat().st_size > state["rejected_bytes"]:
            os.truncate(listing, state["rejected_bytes"])


def check_rejected_fraction(rejected: Counter, num_rows: int, limit: float, output_dir: Path) -> None:
    """Raises UserError if more rows were rejected than --max_rejected_fraction allows."""
    if rejected.total() > limit * num_rows:
        raise UserError(
            f"{rejected.total()} of the first {num_rows} rows were rejected ({describe_counts(rejected)}), more than "
            f"--max_rejected_fraction {limit:g}. See {output_dir / 'rejected.jsonl'}; mend them or raise the limit."
        )


def list_rejections(output_dir: Path, split: str, rejections: list[Rejection]) -> None:
    """Appends rejected rows to rejected.jsonl."""
    if rejections:
        with open(output_dir / "rejected.jsonl", "a", encoding="utf-8") as file:
            for item in rejections:
                line = {"split": split, "row": item.row, "reason": item.reason, "detail": item.detail}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


class SkipBrokenSteps(TrainerCallback):
    """Skips optimiser steps whose loss is NaN or infinite; the tenth in a row ends the run. All ranks decide alike."""

    def __init__(self, trainer: "SpeechTrainer") -> None:
        self.trainer, self.num_in_a_row, self.rows = trainer, 0, []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
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
            listing = Path(args.output_dir) / "diverged_rows.json"
            write_json(listing, self.rows)
            reason = f"the loss was not finite in {self.num_in_a_row} steps in a row, see {listing}"
            raise RunEnded(70, f"{reason}. Lower --learning_rate.")


class SpeechTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer with a plain loader for the stream, features padded on the device, the encoder run once, and
    checkpoints that are complete or not there."""

    def __init__(
        self, window_in_frames: int, progress: StreamProgress, stop: StopSignals, max_hours: float | None, **other: Any
    ) -> None:
        super().__init__(**other)
        self.window_in_frames, self.progress, self.stop = window_in_frames, progress, stop
        self.deadline = time.monotonic() + 3600 * max_hours if max_hours else math.inf
        self.checkpoint_to_resume: str | None = None
        self.unfinished: Path | None = None  # where a checkpoint is being written
        self.save_error: Exception | None = None
        self.step_losses: list[torch.Tensor] = []
        self.step_rows: list[str] = []
        self.waited, self.heard, self.logged_at = 0.0, 0.0, time.monotonic()  # seconds since the last log line
        self.add_callback(SkipBrokenSteps(self))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                # Set by the library at the start of training only: a score before it would go to ./runs (5.23).
                callback.logging_dir = os.path.join(self.args.output_dir, default_logdir())

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """One worker that reads ahead. Not prepared by accelerate: the stream deals rows to ranks itself."""
        workers = self.args.dataloader_num_workers
        return torch.utils.data.DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=workers,
            prefetch_factor=(self.args.dataloader_prefetch_factor or 4) if workers else None,
            pin_memory=self.args.dataloader_pin_memory,
            worker_init_fn=ignore_signals,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """Prepared rows come from a memory-mapped file: a worker would only be one more process to end."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = torch.utils.data.DataLoader(rows, self.args.eval_batch_size, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of the next step. Here, between two steps, the run can end without losing anything."""
        self.stop.is_deferred = False
        self.stop.check()
        if time.monotonic() > self.deadline:
            raise RunEnded(75, "--max_train_time_in_hours is over")
        began = time.monotonic()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.waited += time.monotonic() - began
        for error in (error for batch in batches for error in batch["ride"]["error"]):
            raise error
        self.stop.is_deferred = True
        return batches, num_items

    def padded(self, inputs: dict[str, Any]) -> torch.Tensor:
        """input_features (batch, n_mels, window) on the training device."""
        frames = inputs["frames"].to(self.args.device, non_blocking=True)
        return pad_features(frames, inputs["frame_counts"], self.window_in_frames)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        if self.checkpoint_to_resume is not None:
            # The loader drew a seed from torch's generator after the library had restored it (transformers 5.23,
            # trainer.py:1852); without this, dropout differs from the uninterrupted run.
            self._load_rng_state(self.checkpoint_to_resume)
            self.checkpoint_to_resume = None
        self.progress.update(inputs["ride"])
        features = {"input_features": self.padded(inputs)}
        batch = features | {name: inputs[name] for name in ("labels", "decoder_input_ids")}
        loss = super().training_step(model, batch, num_items_in_batch)
        self.step_losses.append(loss)
        self.step_rows += inputs["ride"]["ids"]
        self.heard += inputs["ride"]["seconds"]
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: the library's formula counts log-mel values as tokens."""
        return 0

    def prediction_step(
        self, model: Any, inputs: dict, prediction_loss_only: bool, ignore_keys: Any = None, **generation: Any
    ) -> tuple[None, tuple[torch.Tensor, ...], torch.Tensor]:
        """(None, (generated ids (batch, n), loss sums (batch,), token counts (batch,)), row indices (batch,)).
        The library runs the encoder twice, once outside autocast (trainer_seq2seq.py, prediction_step)."""
        labels = inputs["labels"].to(self.args.device)
        decoder_input_ids = inputs["decoder_input_ids"].to(self.args.device)
        with torch.no_grad(), self.accelerator.autocast():
            encoder_outputs = self.model.get_encoder()(self.padded(inputs))
            logits = self.model(encoder_outputs=encoder_outputs, decoder_input_ids=decoder_input_ids).logits.float()
            losses = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # -100 is ignored
            ids = self.model.generate(encoder_outputs=encoder_outputs, **(generation or self._gen_kwargs))
        counts = labels.ne(IGNORED_LABEL).sum(dim=1)
        return None, (ids, losses.sum(dim=1), counts), inputs["index"].to(self.args.device)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> dict[str, float]:
        """Scores a set with its own references; the first pairs go to the log."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        self.compute_metrics.rows = rows
        was_deferred, self.stop.is_deferred = self.stop.is_deferred, False
        self.stop.check()
        began = time.monotonic()
        with torch.random.fork_rng():  # whether and when a model is scored must not change how it is trained
            metrics = super().evaluate(rows, ignore_keys, metric_key_prefix, **kwargs)
        self.stop.is_deferred, self.logged_at = was_deferred, self.logged_at + time.monotonic() - began
        for reference, prediction in self.compute_metrics.examples[:3]:
            logger.info("said:  %s", reference)
            logger.info("heard: %s", prediction)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the stream's figures; drops the library's epoch, which means nothing for a stream."""
        self.state.epoch = None
        if "loss" in logs:
            elapsed = time.monotonic() - self.logged_at
            speed = {"data_wait_fraction": self.waited / elapsed, "audio_hours_per_hour": self.heard / elapsed}
            logs = logs | self.progress.figures() | {name: round(value, 3) for name, value in speed.items()}
            self.waited, self.heard, self.logged_at = 0.0, 0.0, time.monotonic()
            # Else one NaN would stay in the library's running sum for ever (transformers 5.23: tr_loss -= tr_loss).
            self._tr_loss.zero_()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Also saves what transformers 5.23 leaves out: preprocessor_config.json (older readers), normalizer.json."""
        self.model.config.use_cache = True  # the library's False is for training, not for the model's users
        super().save_model(output_dir, _internal_call)
        self.model.config.use_cache = self.args.use_cache
        if self.args.should_save:
            save_processor(self.processing_class, Path(output_dir or self.args.output_dir))

    def create_model_card(self, **kwargs: Any) -> None:
        """The card is `model_card`'s; the library's push would overwrite it."""

    def _get_output_dir(self, trial: Any) -> str:
        # While a checkpoint is written, the library is to write it elsewhere (transformers 5.23, trainer.py:3367).
        return str(self.unfinished) if self.unfinished else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Written aside, then renamed, then pushed, then the old ones rotated. The library (5.23) writes in place and
        rotates first. A full disk keeps the older checkpoints; the next save tries again."""
        was_deferred, self.stop.is_deferred = self.stop.is_deferred, True
        output_dir, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self.unfinished, self.save_error, pushes = output_dir / "_unfinished", None, self.args.push_to_hub
        if self.args.should_save:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.push_to_hub = False
        self.attempt(super()._save_checkpoint, model, trial)
        self.accelerator.wait_for_everyone()  # every rank has written its random state
        if self.args.should_save and self.save_error is None:
            self.attempt(self.complete_checkpoint, self.unfinished / name, output_dir / name)
        if self.save_error is not None:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        self.unfinished, self.args.push_to_hub = None, pushes
        self.accelerator.wait_for_everyone()
        if self.args.should_save and self.save_error is None:
            if pushes:
                self._push_from_checkpoint(str(output_dir / name))
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(output_dir=str(output_dir), save_total_limit=limit, best_model_checkpoint=best)
        self.stop.is_deferred = was_deferred

    def attempt(self, save: Callable[..., None], *args: Any) -> None:
        """save(*args), its error noted instead of raised: older checkpoints are kept, the next save tries again."""
        try:
            save(*args)
        except Exception as error:  # OSError, RuntimeError, SafetensorError, or tokenizers' bare Exception
            self.save_error = error
            step, kind = self.state.global_step, type(error).__name__
            logger.error("checkpoint-%d could not be saved (%s: %s)", step, kind, one_line(error))

    def complete_checkpoint(self, unfinished: Path, final: Path) -> None:
        """Adds the stream's position, makes everything durable, and gives the checkpoint its name in one step."""
        state = self.progress.state(self.args.per_device_train_batch_size, self.args.world_size)
        write_json(unfinished / "stream_state.json", state)
        if self.state.best_model_checkpoint and Path(self.state.best_model_checkpoint) == unfinished:
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(unfinished / "trainer_state.json"))
        for path in unfinished.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)  # a damaged one that the run had stepped over
        unfinished.rename(final)
        unfinished.parent.rmdir()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # The library keeps the checkpoint's learning rate whatever --learning_rate says now (transformers 5.23).
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            use_learning_rate(self.optimizer, self.lr_scheduler, self.args.learning_rate)

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        # Likewise with --eval_steps, --save_steps and --logging_steps, which the checkpoint's state would override.
        result = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        return result


def use_learning_rate(optimizer: Any, scheduler: Any, learning_rate: float) -> None:
    """Puts a schedule that has been loaded at its present place under today's --learning_rate and --max_steps; loading
    alone would take the first step at the old schedule's rate (transformers 5.23)."""
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        logger.warning("the learning rate goes on as in the checkpoint: %s decides.", type(scheduler).__name__)
        return
    if scheduler.base_lrs[0] != learning_rate:
        logger.info("learning rate: %g now, %g in the checkpoint", learning_rate, scheduler.base_lrs[0])
    scheduler.base_lrs = [learning_rate] * len(scheduler.base_lrs)
    scheduler._last_lr = [learning_rate * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
        group["initial_lr"], group["lr"] = learning_rate, rate


def save_processor(processor: WhisperProcessor, folder: Path) -> None:
    """Writes preprocessor_config.json and the tokenizer's normalizer.json beside a saved processor."""
    processor.feature_extractor.save_pretrained(folder)
    spelling = processor.tokenizer.english_spelling_normalizer
    if spelling:
        write_json(folder / "normalizer.json", spelling)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has everything that an exact continuation needs, and can be read."""
    try:
        with safe_open(checkpoint / "model.safetensors", framework="pt"):
            pass  # opening checks the header against the file's length
        for name in ("trainer_state.json", "stream_state.json"):
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
        for name in ("optimizer.pt", "scheduler.pt"):
            zipfile.ZipFile(checkpoint / name).close()  # torch writes its index last
        return any(checkpoint.glob("rng_state*.pth"))
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
        return False


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint to continue from, None for a fresh start.
    Raises: UserError if the named one is incomplete, or if a fresh start would mix with another run's files."""
    found = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]), reverse=True)
    wish = str(resume_from_checkpoint or "no")
    if wish.lower() in ("no", "none", "false"):
        if found:
            raise UserError(
                f"--output_dir {output_dir} holds {found[0].name} and --resume_from_checkpoint says {wish}. "
                "Choose another --output_dir, or leave out --resume_from_checkpoint to continue."
            )
        return None
    if wish.lower() not in ("auto", "true"):
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


def run_identity(model_args: ModelArguments, data_args: DataArguments) -> dict[str, Any]:
    """What makes two starts the same run; a folder that holds another one's weights is refused."""
    names = "dataset_name dataset_config_name train_split_name audio_column_name text_column_name language task"
    model = {name: getattr(model_args, name) for name in ("model_name_or_path", "model_revision")}
    return {**model, **{name: getattr(data_args, name) for name in names.split()}}


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


def run_info(argv: list[str], arguments: dict, sources: dict[str, SpeechSource], identity: dict) -> dict[str, Any]:
    """What is needed to understand and repeat the run: command, arguments, versions, git, data, machine."""
    packages = "torch transformers datasets accelerate huggingface_hub evaluate jiwer soundfile librosa soxr numpy"
    versions = {name: importlib.metadata.version(name) for name in packages.split()}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names = ("name", "config_name", "split", "kind", "revision", "num_rows")
    machine = {"platform": platform.platform(), "cores": os.cpu_count(), "gpus": gpus, "cuda": torch.version.cuda}
    return {
        "command": redacted(shlex.join(["python", Path(sys.argv[0]).name, *argv])),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "identity": identity,
        "arguments": json.loads(redacted(json.dumps(arguments, default=str))),
        "versions": {"python": platform.python_version(), **versions, "torch": torch.__version__},  # with its build
        "git": subprocess.getoutput(f"git -C '{Path(__file__).parent}' describe --always --dirty --abbrev=40"),
        "data": {role: {name: getattr(source, name) for name in names} for role, source in sources.items()},
        "machine": machine,
    }


def first_label(stream: SpeechStream) -> str:
    """The first accepted training row's label as the model will see it, special tokens included."""
    rows = (row for block, _ in replace(stream, block_size=1).blocks() for row in block.rows)  # reads no whole block
    for row in itertools.islice(rows, ROWS_BEFORE_REJECTION_CHECK):
        example = stream.preparer(row)
        if not isinstance(example, Rejection):
            return stream.preparer.tokenizer.decode(example["labels"])
    return "(no usable row among the first)"


def describe_run(
    model: Any, sources: dict[str, SpeechSource], args: TrainingArguments, checkpoint: Path | None, stream: Any
) -> None:
    """The first screen of the log: what will happen, in numbers."""
    sizes = f"{model.num_parameters():,} parameters, {model.num_parameters(only_trainable=True):,} of them trainable"
    logger.info("model: %s, %s, on %s", model.name_or_path, sizes, args.device)
    for role, source in sources.items():
        rows = f"{source.num_rows:,} rows" if source.num_rows is not None else "rows not counted"
        place = " ".join(filter(None, (source.name, source.config_name, source.split)))
        logger.info("%s data: %s (%s, %d files, %s)", role, place, source.kind, len(source.shards()), rows)
    if stream is not None:
        sizes = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size)
        logger.info("a step: %d rows (%d per device x %d accumulated x %d processes)", math.prod(sizes), *sizes)
        rate, saves = args.learning_rate, args.save_steps
        logger.info("steps: %d, learning rate %g, checkpoint every %g steps", args.max_steps, rate, saves)
        logger.info("start: %s", "from the beginning" if checkpoint is None else f"continues from {checkpoint}")
        logger.info("first label: %s", first_label(stream))
    if "tensorboard" in args.report_to:
        runs = os.environ.get("TENSORBOARD_LOGGING_DIR", str(Path(args.output_dir) / "runs"))
        logger.info("curves: tensorboard --logdir %s", runs)


def score_table(metrics: dict[str, float]) -> str:
    """Before, after and test side by side; the last column is WER's change against the untouched checkpoint."""
    names = {"zero_shot": "before training", "eval": "after training", "test": "test split"}
    before = metrics.get("zero_shot_wer")
    lines = ["                      WER      CER   subst   delet  insert    rows"]
    for prefix, name in names.items():
        if f"{prefix}_wer" not in metrics:
            continue
        wer, cer = metrics[f"{prefix}_wer"], metrics[f"{prefix}_cer"]
        kinds = ("substitutions", "deletions", "insertions", "num_rows")
        counts = "".join(f"{int(metrics[f'{prefix}_{kind}']):8d}" for kind in kinds)
        change = f"  {100 * (wer / before - 1):+.1f} %" if before and prefix == "eval" else ""
        lines.append(f"{name:16s} {wer:8.2f} {cer:8.2f}{counts}{change}")
    return "\n".join(lines)


def model_card(info: dict[str, Any], metrics: dict[str, float], language: str | None, model_name: str) -> str:
    """README.md of the trained model: metadata that the Hub reads, the scores, the command, the versions."""
    identity = info["identity"]
    results = [
        EvalResult(
            task_type="automatic-speech-recognition",
            dataset_type=source["name"],
            dataset_name=source["name"],
            dataset_config=source["config_name"] or "default",
            dataset_split=source["split"],
            dataset_revision=source["revision"],
            metric_type=kind,
            metric_value=round(metrics[f"{role}_{kind}"], 2),
        )
        for (role, source), kind in itertools.product(info["data"].items(), ("wer", "cer"))
        if f"{role}_{kind}" in metrics
    ]
    data = ModelCardData(
        language=language or "en",
        library_name="transformers",
        pipeline_tag="automatic-speech-recognition",
        base_model=None if Path(identity["model_name_or_path"]).exists() else identity["model_name_or_path"],
        datasets=None if Path(identity["dataset_name"]).exists() else identity["dataset_name"],
        metrics=["wer", "cer"],
        tags=["whisper", "speech"],
        model_name=model_name,
        eval_results=results or None,
    )
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {model_name}\n\n"
        f"{Path(identity['model_name_or_path']).name} fine-tuned on {Path(identity['dataset_name']).name}, scored by "
        f"real generation.\n\n```\n{score_table(metrics)}\n```\n\n"
        f"Trained with\n\n```\n{info['command']}\n```\n\n{versions}\n"
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


def load_sources(model: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> dict[str, SpeechSource]:
    """The sources that this run needs, by role: train, eval, test. Warns where scored rows are also trained on."""
    roles = {"train": args.do_train and data_args.train_split_name, "eval": args.do_eval and data_args.eval_split_name}
    splits = {role: split for role, split in {**roles, "test": data_args.test_split_name}.items() if split}
    columns = (data_args.audio_column_name, data_args.text_column_name)
    where, how = (data_args.dataset_name, data_args.dataset_config_name), (model.cache_dir, data_args.streaming)
    sources = {role: load_source(*where, split, columns, *how) for role, split in splits.items()}
    for role, source in sources.items():
        shared = set(source.data_files) & set(sources["train"].data_files) if "train" in sources else set()
        if role != "train" and any(not Path(url).name.startswith("metadata.") for url in shared):
            logger.warning("The %s split shares files with the training split: its score will flatter.", role)
    return sources


def make_preparer(processor: WhisperProcessor, config: Any, data_args: DataArguments) -> UtterancePreparer:
    """The row-to-example stage for this checkpoint's window, mel bins and decoder length."""
    extractor: WhisperFeatureExtractor = processor.feature_extractor
    if extractor.feature_size != config.num_mel_bins:
        raise UserError(
            f"the checkpoint's feature extractor makes {extractor.feature_size} mel bins, its model reads "
            f"{config.num_mel_bins}. Copy preprocessor_config.json from the model that it was made from."
        )
    limits = (data_args.min_duration_in_seconds, data_args.max_duration_in_seconds)
    text = (data_args.do_lower_case, data_args.do_remove_punctuation)
    window, longest_label = FRAMES_PER_POSITION * config.max_source_positions, config.max_target_positions
    mel_filters, wait = np.asarray(extractor.mel_filters), 60 * data_args.max_network_wait_in_minutes
    return UtterancePreparer(processor.tokenizer, mel_filters, window, longest_label, *limits, *text, wait)


def resolve_arguments(args: TrainingArguments, width: int, source: SpeechSource | None, max_rows: int | None) -> None:
    """Fills in what depends on the model and the data: learning rate, and steps from --num_train_epochs passes.
    Raises: UserError if the rows of `source` have to be counted and cannot be."""
    narrowest = max(limit for limit in LEARNING_RATE_BY_WIDTH if limit <= width)
    args.learning_rate = args.learning_rate or LEARNING_RATE_BY_WIDTH[narrowest]
    args.data_seed = args.seed if args.data_seed is None else args.data_seed
    args.ignore_data_skip = True  # the stream continues from its own position
    if args.load_best_model_at_end and args.save_total_limit == 1:
        args.save_total_limit = 2  # the library would delete the last one for the best, and a restart train again
    if source is not None and args.max_steps <= 0:
        if source.num_rows is None:
            raise UserError(f"--num_train_epochs: {source.name} has no row count. Pass --max_steps N instead.")
        rows = min(source.num_rows, max_rows or source.num_rows)
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        args.max_steps = math.ceil(args.num_train_epochs * rows / batch)
    args.num_train_epochs = args.num_train_epochs or 0.0  # the library compares it with 0


def prepare_eval_sets(
    sources: dict[str, SpeechSource], preparer: UtterancePreparer, data_args: DataArguments, args: TrainingArguments
) -> dict[str, datasets.Dataset]:
    """Every scored split, decoded once, with its rejections in the log and in rejected.jsonl."""
    how, sets = (preparer, data_args.max_eval_samples, data_args.num_decoding_threads), {}
    for role in [role for role in sources if role != "train"]:
        with args.main_process_first(local=False):  # the others find the finished cache
            sets[role], rejections = prepare_eval_set(sources[role], *how, Path(args.output_dir) / "_eval_cache")
        reasons = Counter(rejection.reason for rejection in rejections)
        logger.info("%s: %d rows to score, rejected: %s", role, len(sets[role]), describe_counts(reasons))
    return sets


def make_stream(
    source: SpeechSource,
    preparer: UtterancePreparer,
    data_args: DataArguments,
    args: TrainingArguments,
    position: dict,
) -> SpeechStream:
    """This rank's endless training stream, from `position` on."""
    sizes = (data_args.shuffle_buffer_size, args.per_device_train_batch_size, data_args.num_decoding_threads)
    ranks = (data_args.max_train_samples, args.process_index, args.world_size)
    return SpeechStream(source, preparer, args.data_seed, *sizes, *ranks, position)


def train(trainer: SpeechTrainer, checkpoint: Path | None) -> dict[str, float]:
    """Trains to max_steps and returns the library's figures. A finished run is loaded, not trained a step further."""
    if checkpoint is not None:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if state["global_step"] >= trainer.args.max_steps:
            # The library would train one more step (transformers 5.23, trainer.py, _run_epoch).
            logger.info("%s has all %d steps: nothing is left to train.", checkpoint, trainer.args.max_steps)
            best = trainer.args.load_best_model_at_end and state["best_model_checkpoint"]
            trainer._load_from_checkpoint(str(best or checkpoint))
            save_final_model(trainer)
            record = trainer.progress.output_dir / "all_results.json"
            previous = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
            return {name: value for name, value in previous.items() if name.startswith("train_")}
        trainer.checkpoint_to_resume = str(checkpoint)
    try:
        metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
        save_final_model(trainer)
    except Exception:
        if not trainer.stop.is_deferred:  # between two steps, or scoring: nothing is half done
            save_at_the_end(trainer)
        raise
    finally:
        trainer.stop.is_deferred = False
    progress = trainer.progress
    check_rejected_fraction(progress.rejected, progress.num_rows, progress.max_rejected_fraction, progress.output_dir)
    rejected = {"train_rows": progress.num_rows, "train_rejected": progress.rejected.total()}
    logger.info("training rows: %d, rejected: %s", progress.num_rows, describe_counts(progress.rejected))
    return {name: value for name, value in metrics.items() if name != "total_flos"} | rejected


def save_final_model(trainer: SpeechTrainer) -> None:
    """The trained model to output_dir. Raises: RunEnded(73) if it, or the last checkpoint, could not be written."""
    trainer.attempt(trainer.save_model)
    if trainer.save_error is not None:
        raise RunEnded(73, f"the trained model could not be saved: {one_line(trainer.save_error)}")


def save_at_the_end(trainer: SpeechTrainer) -> None:
    """Saves what has been trained when a run ends between two steps, and says how to go on."""
    step, output_dir = trainer.state.global_step, Path(trainer.args.output_dir)
    if step > 0 and not is_complete(output_dir / f"checkpoint-{step}"):
        trainer._save_checkpoint(trainer.model, trial=None)  # the library has no public name for it
    newest = find_checkpoint(output_dir, "auto")
    logger.warning("saved: %s. To go on, start the same command again.", newest or "nothing, no step was finished")


def final_scores(trainer: SpeechTrainer) -> dict[str, float]:
    """Metrics of the weights that are saved, from the log if the last evaluation has already scored them."""
    state = trainer.state
    step = state.best_global_step if trainer.args.load_best_model_at_end else state.global_step
    for entry in reversed(state.log_history):
        if entry["step"] == step and "eval_loss" in entry:
            return {name: value for name, value in entry.items() if name.startswith("eval_")}
    return trainer.evaluate()


def restore_progress(
    checkpoint: Path | None, source: SpeechSource, data_args: DataArguments, output_dir: Path
) -> StreamProgress:
    """The progress that a checkpoint saved, or that of a beginning."""
    pass_rows = source.num_rows and min(source.num_rows, data_args.max_train_samples or source.num_rows)
    progress = StreamProgress(output_dir, data_args.max_rejected_fraction, pass_rows)
    if checkpoint is not None:
        progress.restore(json.loads((checkpoint / "stream_state.json").read_text(encoding="utf-8")))
    return progress


def zero_shot_scores(trainer: SpeechTrainer, output_dir: Path, checkpoint: Path | None) -> dict[str, float]:
    """Scores of the untouched model; a continued run reads them from zero_shot.json."""
    record = output_dir / "zero_shot.json"
    if checkpoint is not None and record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))
    metrics = trainer.evaluate(metric_key_prefix="zero_shot")
    if trainer.is_world_process_zero():
        write_json(record, metrics)
    return metrics


def write_reports(
    output_dir: Path, info: dict[str, Any], metrics: dict[str, float], language: str | None, model_name: str
) -> None:
    """all_results.json, run_info.json with the end time, the model card, and the score table on the screen."""
    write_json(output_dir / "all_results.json", metrics)
    write_json(output_dir / "run_info.json", {**info, "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    (output_dir / "README.md").write_text(model_card(info, metrics, language, model_name), encoding="utf-8")
    if any(name.endswith("_wer") for name in metrics):
        logger.info("scores\n%s", score_table(metrics))


def push(trainer: SpeechTrainer, output_dir: Path) -> None:
    """Uploads what output_dir holds. Raises: RunEnded(76) with the command that finishes it."""
    try:
        trainer.push_to_hub()
    except Exception as error:
        words = ["hf", "upload", trainer.hub_model_id, str(output_dir), ".", "--exclude", "checkpoint-*", "_*"]
        reason = f"trained and saved, but not uploaded ({one_line(error)[:300]})"
        raise RunEnded(76, f"{reason}. Finish with: {shlex.join(words)}") from error


def main(argv: list[str] | None = None, stop: StopSignals | None = None) -> dict[str, float]:
    """Trains and scores as the command line says. Returns all metrics. Raises: UserError for what can be mended."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, args = parse_arguments(argv)
    check_arguments(data_args, args)
    check_devices(args)
    set_up_logging(args)
    output_dir, identity = Path(args.output_dir), run_identity(model_args, data_args)
    check_output_dir(output_dir, identity)
    data_args.num_decoding_threads = data_args.num_decoding_threads or num_usable_cores(args.world_size)
    checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint) if args.do_train else None

    where = (model_args.model_name_or_path, model_args.model_revision, model_args.cache_dir)
    patience = {"limit_in_seconds": 60 * data_args.max_network_wait_in_minutes}
    processor, generation_config, config = patiently(load_processor, *where, task=f"loading {where[0]}", **patience)
    language = check_language(data_args.language, generation_config, where[0])
    processor.tokenizer.set_prefix_tokens(language=language, task=data_args.task if language else None)
    preparer = make_preparer(processor, config, data_args)
    task = f"opening {data_args.dataset_name}"
    sources = patiently(load_sources, model_args, data_args, args, task=task, **patience)

    resolve_arguments(args, config.d_model, sources.get("train"), data_args.max_train_samples)
    output_dir.mkdir(parents=True, exist_ok=True)
    progress = restore_progress(checkpoint, next(iter(sources.values())), data_args, output_dir)
    stream = make_stream(sources["train"], preparer, data_args, args, progress.position) if args.do_train else None
    eval_sets = prepare_eval_sets(sources, preparer, data_args, args)
    set_seed(args.seed)
    # Else the gradient of the decoder's positions differs in its last bit from run to run (torch 2.13, index_put).
    torch.use_deterministic_algorithms(args.full_determinism or args.device.type == "cpu", warn_only=True)
    how = (language, data_args.task, model_args.freeze_encoder)
    model = patiently(load_model, *where, *how, task=f"loading {where[0]}", **patience)
    ids = (config.decoder_start_token_id, processor.tokenizer.pad_token_id, config.num_mel_bins)
    trainer = SpeechTrainer(
        model=model,
        args=args,
        train_dataset=stream,
        eval_dataset=eval_sets.get("eval"),
        data_collator=SpeechCollator(*ids),
        processing_class=processor,
        compute_loss_func=TokenWeightedLoss(args.label_smoothing_factor),
        callbacks=[EarlyStoppingCallback(limit)] if (limit := data_args.early_stopping_patience) else [],
        window_in_frames=preparer.window_in_frames,
        progress=progress,
        compute_metrics=Scorecard(processor.tokenizer, language, data_args.do_normalize_eval),
        stop=stop or StopSignals(),
        max_hours=data_args.max_train_time_in_hours,
    )
    arguments = {**asdict(model_args), **asdict(data_args), **args.to_dict()}
    info = run_info(argv, arguments, sources, identity)
    describe_run(model, sources, args, checkpoint, stream)

    metrics: dict[str, float] = {}
    if trainer.is_world_process_zero():
        write_json(output_dir / "run_info.json", info)
    if data_args.eval_before_training:
        metrics |= zero_shot_scores(trainer, output_dir, checkpoint)
    if args.do_train:
        metrics |= train(trainer, checkpoint)
    if args.do_eval:
        metrics |= final_scores(trainer)
    if "test" in eval_sets:
        metrics |= trainer.evaluate(eval_sets["test"], metric_key_prefix="test")
    if trainer.is_world_process_zero():
        write_reports(output_dir, info, metrics, language, model_args.model_index_name or output_dir.resolve().name)
    if args.push_to_hub:
        push(trainer, output_dir)
    return metrics


def run(argv: list[str] | None = None) -> int:
    """`main` for the shell: one line instead of a traceback for all that has a known end, exit_status.json always."""
    argv = sys.argv[1:] if argv is None else argv
    code, reason = 1, "crashed"
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
    finally:
        write_exit_status(argv, code, reason)
    if code:
        print(f"error: {reason}", file=sys.stderr)
    return code


def write_exit_status(argv: list[str], code: int, reason: str) -> None:
    """exit_status.json for run.sh (torchrun swallows its children's codes), if there is an output_dir to write to."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--output_dir", type=Path, default=Path("/dev/null"))
    folder = parser.parse_known_args(argv)[0].output_dir
    if folder.is_dir() and os.environ.get("RANK", "0") == "0" and os.access(folder, os.W_OK):
        command = redacted(shlex.join(["python", Path(sys.argv[0]).name, *argv]))
        write_json(folder / "exit_status.json", {"code": code, "reason": reason, "command": command})


if __name__ == "__main__":
    sys.exit(run())
