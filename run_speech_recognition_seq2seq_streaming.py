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

import copy
import difflib
import functools
import itertools
import json
import logging
import math
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from transformers.hf_argparser import HfArg

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import write_json
from speech_finetuning.base.network import as_user_error, retry_on_network_error
from speech_finetuning.base.rejections import Rejection, describe_counts, list_rejections
from speech_finetuning.base.shutdown import StopSignals
from speech_finetuning.base.threads import num_usable_cores
from speech_finetuning.cli.checks import check_devices, check_optimizer, sharding_rules
from speech_finetuning.cli.console import describe_run, set_up_logging
from speech_finetuning.cli.data_report import report_data
from speech_finetuning.cli.dry_run import estimate_needs, miniature_flags
from speech_finetuning.cli.exit_status import exit_code_of
from speech_finetuning.cli.flags import (
    REFUSED_ARGUMENTS,
    RETIRED_ARGUMENTS,
    ArgumentParser,
    as_flags,
    read_yaml,
)
from speech_finetuning.data.audio import (
    FRAMES_PER_POSITION,
    HOP_LENGTH_IN_SAMPLES,
    SAMPLE_RATE_IN_HZ,
    SILENCE,
)
from speech_finetuning.data.manifests import read_manifest
from speech_finetuning.data.packing import UtterancePacker, build_packer
from speech_finetuning.data.preprocessing import Preprocessor, SpeechDataset
from speech_finetuning.data.sources import load_source
from speech_finetuning.data.stream import SpeechStream, can_shard_by_rank
from speech_finetuning.data.text import IGNORED_LABEL, UNSPACED_LANGUAGES
from speech_finetuning.model.adapters import add_adapters
from speech_finetuning.model.loading import check_language, load_processor
from speech_finetuning.scoring.eval_sets import join_eval_sets, prepare_eval_set
from speech_finetuning.scoring.scores import Scorecard, last_scores, score_table
from speech_finetuning.sharing.hub import base_licence, check_hub, make_uploads
from speech_finetuning.sharing.model_card import model_card
from speech_finetuning.sharing.run_info import check_output_dir, run_identity, run_info
from speech_finetuning.training.checkpoints import find_checkpoint
from speech_finetuning.training.loss import TokenWeightedLoss
from speech_finetuning.training.progress import StreamProgress
from speech_finetuning.training.session import train
from speech_finetuning.training.trainer import SpeechTrainer

logger = logging.getLogger("speech_finetuning.script")

# Peak learning rates for full fine-tuning by the model's width, about a fortieth of pre-training's (Jong Wook Kim, as
# quoted by the whisper-finetune README). Narrower models are toys trained from nothing.
LEARNING_RATE_BY_WIDTH = {
    0: 1e-3,
    384: 3.75e-5,
    512: 2.5e-5,
    768: 1.25e-5,
    1024: 6.25e-6,
    1280: 5e-6,
}


LORA_LEARNING_RATE = 1e-3  # as peers have it, whatever the model's size


@dataclass
class ModelArguments:
    """Which model to start from."""

    model_name_or_path: str = HfArg(help="Whisper checkpoint: a Hub id or a folder (required).")
    model_revision: str = HfArg(
        default="main", help="Branch, tag or commit of the model on the Hub."
    )
    cache_dir: str | None = HfArg(
        default=None, help="Folder for what is downloaded; default: the Hub library's own."
    )
    freeze_encoder: bool = HfArg(
        default=False, help="Trains the decoder only, which takes less memory."
    )
    lora_rank: int = HfArg(
        default=0, help="Trains low-rank adapters of this rank (needs peft); 0: all weights."
    )
    model_index_name: str | None = HfArg(
        default=None, help="Name on the card; default: the repository's or folder's."
    )
    config: str | None = HfArg(
        default=None, help="YAML file of flags and values; the command line overrides it."
    )


@dataclass
class DataArguments:
    """Which speech to train and score on, and what is done to it."""

    dataset_name: str | None = HfArg(
        default=None, help="Dataset: a Hub id, a folder, or a CSV, TSV or JSONL file."
    )
    data_mix: str | None = HfArg(
        default=None, help="Instead of --dataset_name: YAML list of datasets with flags."
    )
    dataset_config_name: str | None = HfArg(
        default=None, help="Configuration of the dataset, often the language."
    )
    train_split_name: str = HfArg(
        default="train", help="Split to train on; 'train+validation' uses all of both."
    )
    eval_split_name: str = HfArg(
        default="validation", help="Split to score every --eval_steps and at the end."
    )
    test_split_name: str | None = HfArg(
        default=None, help="Split to score once, at the end, with the best model."
    )
    predict_split_name: str = HfArg(
        default="test", help="Split that --do_predict transcribes; needs no references."
    )
    audio_column_name: str | None = HfArg(
        default=None, help="Column with the audio; default: audio, path, ..."
    )
    text_column_name: str | None = HfArg(
        default=None, help="Column with the text; default: text, sentence, ..."
    )
    max_duration_in_seconds: float = HfArg(
        default=30.0, help="Rejects (never cuts) clips longer than this or 30 s."
    )
    min_duration_in_seconds: float = HfArg(
        default=0.0, help="Rejects clips that are shorter than this."
    )
    max_train_samples: int | None = HfArg(
        default=None, help="Trains on the first N rows only, rejected ones counted."
    )
    max_eval_samples: int | None = HfArg(
        default=None, help="Scores the first N rows of each split; default: all."
    )
    max_rejected_fraction: float = HfArg(
        default=0.5, help="Ends the run if more of 1,000 rows are unfit; 1: never."
    )
    do_lower_case: bool = HfArg(
        default=False, help="Lower-cases the transcripts, and so what the model will write."
    )
    do_remove_punctuation: bool = HfArg(
        default=False, help="Removes punctuation, and nothing else, from transcripts."
    )
    do_normalize_eval: bool = HfArg(
        default=True, help="Normalised text for eval_wer, eval_cer; False: as written."
    )
    language: str | None = HfArg(
        default=None, help="Language spoken, a code or an English name; not for .en models."
    )
    task: str = HfArg(default="transcribe", help="'transcribe', or 'translate' (into English).")
    shuffle_buffer_size: int = HfArg(
        default=500, help="Rows of a shuffle block, undecoded; 1 keeps the files' order."
    )
    data_report_samples: int = HfArg(
        default=500, help="Rows of each source in the data report; 0: no report."
    )
    train_window: str = HfArg(
        default="full", help="'longest' pads to a batch's longest clip, not 30 s: far faster."
    )
    full_window_fraction: float = HfArg(
        default=0.1, help="Share of --train_window longest's batches padded to 30 s."
    )
    pack_utterances: bool = HfArg(
        default=False, help="Joins the utterances of a batch to windows of up to 30 s."
    )
    timestamp_probability: float = HfArg(
        default=0.0, help="Share of windows with timestamps of their utterances."
    )
    apply_spec_augment: bool = HfArg(
        default=False, help="Masks stretches of time and mel bands (SpecAugment)."
    )
    speed_perturbation: bool = HfArg(
        default=False, help="Trains on clips played at 0.9 to 1.1 of their speed."
    )
    streaming: bool = HfArg(
        default=True, help="Reads rows as they are needed; False downloads the files first."
    )
    num_decoding_threads: int | None = HfArg(
        default=None, help="Threads that decode; default: all cores, at most 8."
    )
    max_network_wait_in_minutes: float = HfArg(
        default=30.0, help="How long a lost network is waited for; 0: not."
    )
    max_train_time_in_hours: float | None = HfArg(
        default=None, help="Saves and stops (exit code 75) after this time."
    )
    eval_before_training: bool = HfArg(
        default=False, help="Scores the untouched model first, for a before/after."
    )
    long_form: bool = HfArg(
        default=False, help="Also scores longer clips, by Whisper's long-form generation."
    )
    push_predictions: bool = HfArg(
        default=False, help="Also uploads transcripts: --push_to_hub leaves them out."
    )
    early_stopping_patience: int | None = HfArg(
        default=None, help="Ends after N evaluations without a better score."
    )
    dry_run: bool = HfArg(
        default=False, help="Tries the whole job in minutes and says what it needs; leaves nothing."
    )


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

    learning_rate: float | None = HfArg(
        default=None, help="Peak learning rate; default: by size, 3.75e-5 to 5e-6."
    )
    warmup_steps: float = HfArg(
        default=0.1, help="Steps in which the rate rises; below 1, their share of all."
    )
    num_train_epochs: float | None = HfArg(
        default=None, help="Passes instead of --max_steps, if rows can be counted."
    )
    predict_with_generate: bool = HfArg(
        default=True, help="Must stay True: WER needs real generation."
    )
    report_to: str = HfArg(
        default="tensorboard", help="Where the curves go: tensorboard, wandb, none."
    )
    eval_strategy: str = HfArg(
        default="steps", help="When --do_eval scores: steps, or no (at the end only)."
    )
    dataloader_num_workers: int = HfArg(
        default=1, help="Reading processes: 1, or 0; see --num_decoding_threads."
    )
    ddp_timeout: int = HfArg(
        default=7200, help="Seconds that a process waits for the others, at most."
    )
    logging_nan_inf_filter: bool = HfArg(
        default=False, help="True would hide NaN losses from the log."
    )
    resume_from_checkpoint: str | None = HfArg(
        default="auto", help="'auto' (the newest here), 'hub', PATH or 'no'."
    )

    def __post_init__(self) -> None:
        if not self.do_eval:
            self.eval_strategy = "no"  # the library would switch do_eval on instead
        self.eval_steps = (
            self.eval_steps or self.save_steps
        )  # the library's default is logging_steps: far too often
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "wer"
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = not re.search("wer|cer|loss", self.metric_for_best_model)
        self.dataloader_pin_memory &= torch.cuda.is_available()  # torch warns otherwise
        if (
            self.gradient_checkpointing is not None
        ):  # the known name; transformers 5.23 warns about it
            self.activation_checkpointing, self.gradient_checkpointing = (
                self.gradient_checkpointing,
                None,
            )
        self.remove_unused_columns = False  # our collator takes rows apart itself
        # Dispatching, the default for evaluation on several processes, concatenates batches of unequal width
        # (RuntimeError in accelerate 1.15, data_loader.py:845).
        self.accelerator_config = self.accelerator_config or {"dispatch_batches": False}
        super().__post_init__()


def data_records(data_args: DataArguments) -> list[DataRecord]:
    """The datasets of the run: that of the flags, or the entries of --data_mix, where null takes a setting away.
    Raises: UserError for what an entry cannot say."""
    if data_args.data_mix is None:
        return [DataRecord(**asdict(data_args))]
    records: list[DataRecord] = []
    for number, entry in enumerate(
        read_yaml("--data_mix", data_args.data_mix, list, "- dataset_name: path/to/data")
    ):
        where = f"--data_mix {data_args.data_mix}, entry {number + 1}"
        if (
            not isinstance(entry, dict)
            or "dataset_name" not in entry
            or set(entry) - set(RECORD_KEYS)
        ):
            raise UserError(
                f"{where}: expected dataset_name and any of: {', '.join(RECORD_KEYS)}. Found: {entry}."
            )
        parts = (Path(str(entry["dataset_name"])).stem, entry.get("dataset_config_name"))
        name = "_".join(str(part) for part in parts if part)
        settings = asdict(data_args) | {"name": name} | entry
        with as_user_error(ValueError, where=where):
            (record,) = ArgumentParser(DataRecord).parse_args_into_dataclasses(as_flags(settings))
        nothing = {key: None for key in entry if entry[key] is None}
        record = replace(record, **nothing | {"name": re.sub(r"\W", "_", record.name)})
        if record.weight <= 0 or record.name in [earlier.name for earlier in records]:
            raise UserError(
                f"{where}: needs a weight above 0, and its own 'name: ...' ({record.name!r} is taken)."
            )
        records.append(record)
    return records


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Command line (and --config file) to the three groups of arguments.
    Raises: UserError for unknown or retired flags and for values that the libraries refuse."""
    outer = ArgumentParser([], add_help=False, allow_abbrev=False)
    outer.add_argument("--config")
    config = outer.parse_known_args(argv)[0].config
    flags = (
        as_flags(read_yaml("--config", config, dict, "max_steps: 1000")) if config else []
    ) + argv
    names = {flag.split("=")[0].replace("-", "_").replace("__", "--", 1) for flag in flags}
    for name in sorted(names & {f"--{retired}" for retired in RETIRED_ARGUMENTS}):
        raise UserError(f"{name} is retired. Write instead: {RETIRED_ARGUMENTS[name[2:]]}.")
    if (
        names & {"--test_split_name", "--early_stopping_patience"}
        and {"--do_train", "--do_eval"} <= names
    ):
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
        raise UserError(
            f"unknown flag {unknown[0]}." + (f" Did you mean {nearest[0]}?" if nearest else "")
        )
    return model_args, data_args, training_args


def check_arguments(data_args: DataArguments, args: TrainingArguments) -> None:
    """Raises UserError for everything that can be known to be wrong before any download or GPU work."""
    defaults = {f.name: f.default for f in fields(args)}
    training, scoring, workers = args.do_train, args.do_eval, args.dataloader_num_workers
    shortest, longest = data_args.min_duration_in_seconds, data_args.max_duration_in_seconds
    is_timed = args.max_steps > 0 or args.num_train_epochs is not None
    from_hub, wait = (
        args.resume_from_checkpoint == "hub",
        60 * data_args.max_network_wait_in_minutes,
    )
    for_training = "train_window pack_utterances timestamp_probability apply_spec_augment speed_perturbation".split()
    idle = [
        f"--{name}"
        for name in for_training
        if getattr(data_args, name) not in (0, "full") and not training
    ]
    fractions = ("max_rejected_fraction", "full_window_fraction", "timestamp_probability")
    is_odd_fraction = data_args.train_window == "full" and data_args.full_window_fraction not in (
        0.1,
        1,
    )
    best = {
        name: getattr(data_args, name)
        for name in ("early_stopping_patience", "eval_before_training")
    }
    best["load_best_model_at_end"] = args.load_best_model_at_end
    rules = [
        (getattr(args, n) != defaults[n], f"--{n} is refused: {why}.")
        for n, why in REFUSED_ARGUMENTS.items()
    ]
    rules += [
        (on and not (training and scoring), f"--{n} needs --do_train and --do_eval.")
        for n, on in best.items()
    ]
    rules += [
        (not 0 <= getattr(data_args, name) <= 1, f"--{name} must lie between 0 and 1.")
        for name in fractions
    ]
    rules += [
        (
            not (training or scoring or args.do_predict),
            "nothing to do. Pass --do_train, --do_eval or --do_predict.",
        ),
        (
            data_args.long_form and not (scoring or args.do_predict),
            "--long_form needs --do_eval or --do_predict.",
        ),
        (not args.output_dir, "--output_dir is missing. Pass --output_dir FOLDER."),
        (
            not args.predict_with_generate,
            "--predict_with_generate False: WER needs real generation. Leave it out.",
        ),
        (data_args.dry_run and not training, "--dry_run needs --do_train."),
        (
            data_args.dry_run and args.world_size > 1,
            "--dry_run tries one process: start it without torchrun.",
        ),
        (
            workers > 1,
            f"--dataloader_num_workers {workers}: one worker reads. Use --num_decoding_threads {workers}.",
        ),
        (
            "epoch" in (args.eval_strategy, args.save_strategy),
            "a stream has no epochs. Use the strategy steps.",
        ),
        (
            data_args.task not in ("transcribe", "translate"),
            f"--task {data_args.task}: use transcribe or translate.",
        ),
        (
            shortest >= longest,
            f"--min_duration_in_seconds {shortest} is not below the longest, {longest}.",
        ),
        (
            data_args.shuffle_buffer_size < 1,
            "--shuffle_buffer_size must be at least 1 (1 keeps the files' order).",
        ),
        ((data_args.num_decoding_threads or 1) < 1, "--num_decoding_threads must be at least 1."),
        (data_args.train_window not in ("full", "longest"), "--train_window: use full or longest."),
        (idle, f"{' and '.join(idle)}: of no effect without --do_train."),
        (
            is_odd_fraction,
            "--full_window_fraction needs --train_window longest: 'full' is a fraction of 1.",
        ),
        (
            args.max_steps > 0 and args.num_train_epochs,
            "pass --max_steps or --num_train_epochs, not both.",
        ),
        (
            data_args.push_predictions and not args.push_to_hub,
            "--push_predictions needs --push_to_hub.",
        ),
        (
            args.hub_always_push,
            "--hub_always_push is refused: the newest save always follows a running upload.",
        ),
        (
            from_hub and not args.hub_model_id,
            "--resume_from_checkpoint hub needs --hub_model_id USER/NAME.",
        ),
        (
            bool(data_args.dataset_name) == bool(data_args.data_mix),
            "pass either --dataset_name or --data_mix FILE.",
        ),
        (
            args.world_size > 1 and wait >= args.ddp_timeout,
            f"--ddp_timeout must exceed {wait:g} s, the network wait.",
        ),
        (
            training and not is_timed,
            "how long to train? Pass --max_steps N (or --num_train_epochs N).",
        ),
    ]
    for message in (
        message for is_broken, message in rules + sharding_rules(data_args, args) if is_broken
    ):
        raise UserError(message)
    if training:
        check_optimizer(args)


@dataclass
class SpeechCollator:
    """Examples to a batch whose clips lie end to end, unpadded, so that little crosses the process border.
    Returns `labels` and `decoder_input_ids` (batch, n_tokens), padded with -100 and the end token, `frames` (n_mels,
    sum of frame_counts), `frame_counts`, and for training a `ride`: position, rejections, num_rows, error.
    A batch whose rows were all rejected holds one silent dummy row without labels, so that every step runs."""

    decoder_start_token_id: int
    pad_token_id: int
    n_mels: int
    make_windows: UtterancePacker | None = None  # None: every utterance has one of its own

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        tagged = [item if isinstance(item, tuple) else (None, item) for item in items]
        utterances = [
            (position, example) for position, example in tagged if isinstance(example, dict)
        ]
        examples = [example for _, example in utterances]
        errors = [e for _, e in tagged if isinstance(e, Exception) and not isinstance(e, Rejection)]
        dummy_labels = [self.decoder_start_token_id, IGNORED_LABEL]
        rows = examples or [
            {"features": torch.full((self.n_mels, 1), SILENCE), "labels": dummy_labels}
        ]
        if (
            self.make_windows is not None and utterances and utterances[0][0] is not None
        ):  # not of an evaluation set
            rows = self.make_windows(utterances)
        width = max(len(row["labels"]) for row in rows)
        pairs = [(row["labels"], width - len(row["labels"])) for row in rows]
        labels = torch.tensor([ids[1:] + [IGNORED_LABEL] * gap for ids, gap in pairs])
        decoder_input_ids = torch.tensor(
            [ids[:-1] + [self.pad_token_id] * gap for ids, gap in pairs]
        )
        features = [row["features"] for row in rows]
        if isinstance(features[0], bytes):  # of a prepared evaluation set
            flat = (torch.frombuffer(bytearray(data), dtype=torch.float32) for data in features)
            features = [frames.view(self.n_mels, -1) for frames in flat]
        batch = {
            "labels": labels,
            "decoder_input_ids": decoder_input_ids,
            "frames": torch.cat(features, dim=1),
        }
        batch["frame_counts"] = [clip.shape[1] for clip in features]
        if examples and "index" in examples[0]:
            return {**batch, "index": torch.tensor([row["index"] for row in examples])}
        rejections = [example for _, example in tagged if isinstance(example, Rejection)]
        ride = {
            "position": tagged[-1][0],
            "rejections": rejections,
            "num_rows": len(items),
            "error": errors[:1],
        }
        ride |= {
            "ids": [row["id"] for row in examples],
            "seconds": sum(row["duration"] for row in examples),
        }
        return {**batch, "ride": ride}


def load_model(
    model_args: ModelArguments, data_args: DataArguments, language: str | None
) -> transformers.WhisperForConditionalGeneration:
    """The checkpoint in float32 (mixed precision comes from --fp16 or --bf16), told language and task.
    Only the generation config carries language and task; forced_decoder_ids would contradict them."""
    # Without dtype, transformers 5 loads float16 checkpoints as float16, whose gradients cannot be unscaled.
    name, revision = model_args.model_name_or_path, model_args.model_revision
    how = {"revision": revision, "cache_dir": model_args.cache_dir, "dtype": torch.float32}
    with as_user_error(OSError, where=f"--model_name_or_path {name}"):
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
        add_adapters(
            model, model_args.lora_rank, r".*decoder.*" if model_args.freeze_encoder else ".*"
        )
    # By the library, in training mode, on a batch of its own; its defaults mask time only.
    if data_args.apply_spec_augment:
        model.config.update({"apply_spec_augment": True, "mask_feature_prob": 0.05})
    return model


def make_preprocessor(
    processor: transformers.WhisperProcessor,
    config: Any,
    data_args: DataArguments,
    language: str | None,
) -> Preprocessor:
    """The row-to-example stage for this checkpoint's window, mel bins and decoder length, and this data's language."""
    extractor = processor.feature_extractor
    if extractor.feature_size != config.num_mel_bins:
        found = f"feature extractor makes {extractor.feature_size} mel bins, its model reads {config.num_mel_bins}"
        advice = "Copy preprocessor_config.json from the model that it was made from."
        raise UserError(f"the checkpoint's {found}. {advice}")
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.set_prefix_tokens(language=language, task=data_args.task if language else None)
    window, longest_label = (
        FRAMES_PER_POSITION * config.max_source_positions,
        config.max_target_positions,
    )
    limits = (data_args.min_duration_in_seconds, data_args.max_duration_in_seconds)
    text = (data_args.do_lower_case, data_args.do_remove_punctuation)
    mel_filters, wait = (
        np.float32(extractor.mel_filters),
        60 * data_args.max_network_wait_in_minutes,
    )
    return Preprocessor(tokenizer, mel_filters, window, longest_label, *limits, *text, wait)


def open_sets(
    records: list[DataRecord],
    preparers: list[Preprocessor],
    args: TrainingArguments,
    cache_dir: str | None,
) -> dict[str, list[SpeechDataset]]:
    """What this run reads, by role: train, eval, test. Warns where scored rows are also trained on."""
    wanted = {
        "train": args.do_train,
        "eval": args.do_eval,
        "test": True,
        "predict": args.do_predict,
    }
    sets: dict[str, list[SpeechDataset]] = {}
    for role, (record, preparer) in itertools.product(wanted, zip(records, preparers, strict=True)):
        split = getattr(record, f"{role}_split_name")
        if wanted[role] and split:
            needs_text = role != "predict"
            columns = (
                record.audio_column_name,
                record.text_column_name or (None if needs_text else ""),
            )
            changes = {
                "needs_text": needs_text,
                "takes_long_clips": record.long_form and role != "train",
            }
            where = (record.dataset_name, record.dataset_config_name, split, columns)
            source = load_source(*where, cache_dir, record.streaming, record.name)
            max_rows = record.max_train_samples if role == "train" else record.max_eval_samples
            item = SpeechDataset(source, replace(preparer, **changes), max_rows, record.weight)
            sets.setdefault(role, []).append(item)
    for role in ("train", "eval"):
        if wanted[role] and role not in sets:
            raise UserError(f"--do_{role}: no entry of --data_mix has a {role}_split_name.")
    trained = {url for item in sets.get("train", []) for url in item.source.data_files}
    for role in ("eval", "test"):
        shared = trained & {url for item in sets.get(role, []) for url in item.source.data_files}
        if any(not Path(url).name.startswith("metadata.") for url in shared):
            logger.warning(
                "The %s split shares files with the training split: its score will flatter.", role
            )
    return sets


def resolve_arguments(
    args: TrainingArguments,
    config: Any,
    pass_rows: dict[str, int | None],
    languages: list,
    has_adapters: bool = False,
) -> None:
    """Fills in what depends on the model and the data: learning rate, and steps from --num_train_epochs passes.
    pass_rows: rows of a pass of each training source. Raises: UserError if they have to be counted and cannot be."""
    if has_adapters and (
        args.fsdp or transformers.integrations.is_deepspeed_zero3_enabled()
    ):  # one rank merges
        raise UserError("--lora_rank: adapters take little memory. Leave out --fsdp or ZeRO-3.")
    width = max(limit for limit in LEARNING_RATE_BY_WIDTH if limit <= config.d_model)
    args.learning_rate = args.learning_rate or (
        LORA_LEARNING_RATE if has_adapters else LEARNING_RATE_BY_WIDTH[width]
    )
    if args.metric_for_best_model == "wer" and set(languages) <= set(UNSPACED_LANGUAGES):
        args.metric_for_best_model = "cer"
        logger.warning(
            "no spaces between words in %s: the best model is the one of the lowest CER.", languages
        )
    if (
        args.ddp_find_unused_parameters is None
    ):  # the library looks for them in every step; only layerdrop has any
        args.ddp_find_unused_parameters = config.encoder_layerdrop + config.decoder_layerdrop > 0
    args.data_seed = args.seed if args.data_seed is None else args.data_seed
    args.ignore_data_skip = True  # the stream continues from its own position
    if args.load_best_model_at_end and args.save_total_limit == 1:
        args.save_total_limit = (
            2  # the library would delete the last one for the best, and a restart train again
        )
    if pass_rows and args.max_steps <= 0:
        if len(pass_rows) > 1 or None in pass_rows.values():
            why = (
                "the passes of a mix end at different times"
                if len(pass_rows) > 1
                else "rows cannot be counted"
            )
            raise UserError(f"--num_train_epochs: {why}. Pass --max_steps N instead.")
        batch = (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        args.max_steps = math.ceil(args.num_train_epochs * sum(pass_rows.values()) / batch)
    args.warmup_steps = args.get_warmup_steps(
        args.max_steps
    )  # schedule-free optimisers take the number as it is
    args.num_train_epochs = args.num_train_epochs or 0.0  # the library compares it with 0


def prepare_eval_sets(
    sets: dict, num_threads: int, args: TrainingArguments
) -> dict[str, datasets.Dataset]:
    """Every scored split, decoded once, with its rejections in the log and in rejected.jsonl."""
    output_dir, joined = Path(args.output_dir), {}
    for role in [role for role in ("eval", "test", "predict") if role in sets]:
        prepared = {}
        for item in sets[role]:
            with args.main_process_first(local=False):  # the others find the finished cache
                rows, rejections = prepare_eval_set(item, num_threads, output_dir / "_eval_cache")
            prepared[item.source.record] = rows
            listing = [str(path) for path in output_dir.glob("rejected.jsonl")]
            listed = {
                line.get("row") for line in read_manifest(listing)
            }  # a kill may have torn the last one
            news = [rejection for rejection in rejections if rejection.row not in listed]
            list_rejections(output_dir, item.source.split, news if args.process_index == 0 else [])
            found = (
                len(rows) - len(rejections),
                describe_counts(Counter(r.reason for r in rejections)),
            )
            logger.info(
                "%s: %d rows to score, rejected: %s", f"{role} {item.source.record}".strip(), *found
            )
        joined[role] = join_eval_sets(prepared)
    return joined


def zero_shot_scores(
    trainer: SpeechTrainer, output_dir: Path, checkpoint: Path | None
) -> dict[str, float]:
    """Scores of the untouched model; a continued run reads them from zero_shot.json."""
    record = output_dir / "zero_shot.json"
    if checkpoint is not None and record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))
    metrics = trainer.evaluate(metric_key_prefix="zero_shot")
    if trainer.is_world_process_zero():
        write_json(record, metrics)
    return metrics


def write_reports(
    output_dir: Path, info: dict[str, Any], metrics: dict[str, float], card: str
) -> None:
    """all_results.json, scorecard.json, run_info.json with the end time, the card, and the score table in the log."""
    roles = ("zero_shot", "eval", "test", "predict")
    scores = {
        name: metrics[name]
        for name in metrics
        if name.startswith(roles) and "preparation_time" not in name
    }
    ended = {"ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    for name, value in {
        "all_results": metrics,
        "scorecard": scores,
        "run_info": info | ended,
    }.items():
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
                    logger.warning(
                        "%s is worse than before training: %s %.2f %%, was %.2f %%.", *found
                    )


def run_job(
    trainer: SpeechTrainer,
    info: dict[str, Any],
    final_sets: dict,
    checkpoint: Path | None,
    write_card: Callable,
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
        uploads.write_card = lambda log: write_card(
            metrics=metrics | last_scores(log) | known(), history=log
        )
    if args.do_train:
        metrics |= train(trainer, checkpoint)
    if (
        args.do_eval
    ):  # of the weights that are saved; the last evaluation may have scored them already
        # The best step of all may lie between two saves: what was loaded is the best checkpoint.
        best = args.load_best_model_at_end and trainer.state.best_model_checkpoint
        step = int(best.rpartition("-")[2]) if best else trainer.state.global_step
        metrics |= last_scores(trainer.state.log_history, step) or trainer.evaluate()
    for role, rows in final_sets.items():
        metrics |= trainer.evaluate(rows, metric_key_prefix=role)
    if args.process_index == 0:
        write_reports(
            output_dir,
            info,
            metrics,
            write_card(metrics=metrics, history=trainer.state.log_history),
        )
    if uploads is not None:
        uploads.submit(output_dir, trainer.state.log_history)
        uploads.finish()
    return metrics


def set_up(
    argv: list[str], stop: StopSignals | None
) -> tuple[SpeechTrainer, dict, dict, Path | None, Callable]:
    """From the command line to a trainer with its model and data: what `run_job` takes. Raises: UserError."""
    model_args, data_args, args = parse_arguments(argv)
    check_arguments(data_args, args)
    records = data_records(data_args)
    check_devices(args)
    set_up_logging(args)
    output_dir, identity = Path(args.output_dir), run_identity(model_args, records)
    check_output_dir(output_dir, identity)
    data_args.num_decoding_threads = data_args.num_decoding_threads or num_usable_cores(
        args.world_size
    )
    patience = {"limit_in_seconds": 60 * data_args.max_network_wait_in_minutes}
    with args.main_process_first(local=False):  # it may fetch the checkpoint that all look for
        uploads = retry_on_network_error(
            make_uploads, records, args, task="asking the Hub", **patience
        )
    args.push_to_hub = False  # from here on: the library's own push can hang for ever
    checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint) if args.do_train else None

    where = (model_args.model_name_or_path, model_args.model_revision, model_args.cache_dir)
    processor, generation_config, config = retry_on_network_error(
        load_processor, *where, task=f"loading {where[0]}", **patience
    )
    languages = [check_language(record.language, generation_config, where[0]) for record in records]
    preparers = [
        make_preprocessor(processor, config, *pair) for pair in zip(records, languages, strict=True)
    ]
    processor.tokenizer = preparers[0].tokenizer
    sets = retry_on_network_error(
        open_sets,
        records,
        preparers,
        args,
        model_args.cache_dir,
        task="opening the data",
        **patience,
    )
    train_sets = tuple(sets.get("train", ()))
    pass_rows = {item.source.record: item.rows_per_pass() for item in train_sets}

    resolve_arguments(args, config, pass_rows, languages, model_args.lora_rank > 0)
    output_dir.mkdir(parents=True, exist_ok=True)
    deal = (args.process_index, args.world_size, can_shard_by_rank(train_sets, args.world_size))
    progress = StreamProgress(output_dir, data_args.max_rejected_fraction, pass_rows, *deal)
    if checkpoint is not None:
        progress.restore(json.loads((checkpoint / "stream_state.json").read_text(encoding="utf-8")))
    sizes = (
        data_args.shuffle_buffer_size,
        args.per_device_train_batch_size,
        data_args.num_decoding_threads,
    )
    order = (
        args.data_seed,
        *sizes,
        progress.rank,
        progress.world_size,
        progress.position,
        progress.is_sharded_by_rank,
    )
    eval_sets = prepare_eval_sets(sets, data_args.num_decoding_threads, args)
    # Else the gradient of the decoder's positions differs in its last bit from run to run (torch 2.13, index_put).
    torch.use_deterministic_algorithms(
        args.full_determinism or args.device.type == "cpu", warn_only=True
    )
    language = (
        languages[0] if len(set(languages)) == 1 else None
    )  # of several the saved model detects each
    transformers.set_seed(args.seed)  # new adapters begin alike on every rank
    # Whole, in every process: transformers (5.23) cannot load a Whisper in ZeRO-3's parts. DeepSpeed splits it later.
    transformers.integrations.unset_hf_deepspeed_config()
    model = retry_on_network_error(
        load_model, model_args, data_args, language, task=f"loading {where[0]}", **patience
    )
    ids = (config.decoder_start_token_id, processor.tokenizer.pad_token_id, config.num_mel_bins)
    readings = {
        r.name: (spoken, r.do_normalize_eval) for r, spoken in zip(records, languages, strict=True)
    }
    limit = data_args.early_stopping_patience
    is_grouped = data_args.train_window == "longest" and not data_args.pack_utterances
    stream = SpeechStream(train_sets, *order, is_grouped, data_args.speed_perturbation)
    trainer = SpeechTrainer(
        model=model,
        args=args,
        train_dataset=stream if args.do_train else None,
        eval_dataset=eval_sets.pop("eval", None),
        data_collator=SpeechCollator(
            *ids, build_packer(train_sets, readings, data_args, stream.rank_seed())
        ),
        processing_class=processor,
        compute_loss_func=TokenWeightedLoss(args.label_smoothing_factor),
        compute_metrics=Scorecard(processor.tokenizer, readings),
        callbacks=[transformers.EarlyStoppingCallback(limit)] if limit else [],
        progress=progress,
        stop=stop or StopSignals(),
        uploads=uploads,
        train_window=data_args.train_window,
        full_window_fraction=data_args.full_window_fraction,
        max_train_time_in_hours=data_args.max_train_time_in_hours,
    )
    trainer.data_args = data_args  # for run_job
    transformers.set_seed(
        args.seed + args.process_index
    )  # else all ranks would drop out and mask alike
    info = run_info(
        argv, {**asdict(model_args), **asdict(data_args), **args.to_dict()}, sets, identity
    )
    describe_run(model, sets, args, checkpoint, progress.is_sharded_by_rank)
    info["base_licence"] = base_licence(where[0]) if uploads else None
    name = model_args.model_index_name or (
        uploads.repo_id if uploads else output_dir.resolve().name
    )
    write_card = functools.partial(
        model_card, info, [code or "en" for code in dict.fromkeys(languages)], name
    )
    return trainer, info, eval_sets, checkpoint, write_card


def dry_run(argv: list[str], stop: StopSignals | None) -> dict[str, float]:
    """The whole job in miniature, in a temporary folder: 64 rows decoded, three steps of the row with most tokens, 8
    rows scored, a checkpoint saved and loaded afresh. Logs a table of checks. Raises: UserError if one fails."""
    _, data_args, wish = parse_arguments(argv)
    check_arguments(data_args, wish)
    checks = {"Hub": ("ok", "not asked for")}
    if wish.push_to_hub:
        name = wish.hub_model_id or Path(wish.output_dir).resolve().name
        ask = functools.partial(check_hub, name, None, may_create=False)
        checks["Hub"] = (
            "ok",
            f"{retry_on_network_error(ask, limit_in_seconds=60, task='asking the Hub')} may be written",
        )
    with tempfile.TemporaryDirectory() as folder:
        trainer, info, *job = set_up(miniature_flags(argv, wish, folder), stop)
        stream = trainer.train_dataset
        report_data(stream, 64, None)
        rows = list(itertools.islice(stream, 64))
        good = [(position, example) for position, example in rows if isinstance(example, dict)]
        if not good:
            raise UserError(
                "--dry_run: none of the first 64 rows is usable, see the data report above."
            )
        at, longest = max(good, key=lambda row: (len(row[1]["labels"]), row[1]["duration"]))
        batch = wish.per_device_train_batch_size * wish.gradient_accumulation_steps
        # First a step whose utterances share no window, then, with --pack_utterances, two in which they do.
        alone = longest | {
            "duration": trainer.window_in_frames * HOP_LENGTH_IN_SAMPLES / SAMPLE_RATE_IN_HZ
        }
        trainer.train_dataset, trainer.is_advised = (
            [(at, alone)] * batch + [(at, longest)] * 2 * batch,
            True,
        )
        metrics = run_job(trainer, info, *job)
        size = sum(file.stat().st_size for file in Path(folder, "checkpoint-3").iterdir())
    rejected = 1 - len(good) / len(rows)
    state = (
        "error"
        if rejected > data_args.max_rejected_fraction
        else "warning"
        if rejected > 0.1
        else "ok"
    )
    checks["data"] = (
        state,
        f"{len(good)} of {len(rows)} rows usable; most tokens: {len(longest['labels'])}",
    )
    limit = data_args.max_eval_samples or sys.maxsize
    scored = sum(min(limit, source["num_rows"] or 0) for source in info["data"].get("eval", []))
    trained = sum(source["num_rows"] or 0 for source in info["data"]["train"])
    checks |= estimate_needs(trainer, wish, (trained, scored), metrics, size)
    for name, (state, found) in {
        "versions": ("ok", json.dumps(info["versions"])),
        **checks,
    }.items():
        logger.info("%-8s %-10s %s", state, name, found)
    if failed := [
        f"{name}: {found}" for name, (state, found) in checks.items() if state == "error"
    ]:
        raise UserError(f"--dry_run: {'; '.join(failed)}.")
    return metrics


def main(argv: list[str] | None = None, stop: StopSignals | None = None) -> dict[str, float]:
    """Trains and scores as the command line says. Returns all metrics. Raises: UserError for what can be mended."""
    argv = sys.argv[1:] if argv is None else argv
    if parse_arguments(argv)[1].dry_run:
        return dry_run(argv, stop)
    return run_job(*set_up(argv, stop))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
