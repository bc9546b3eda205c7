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
#     "matplotlib>=3.9,<4",
#     "av>=18,<19",
#     "soxr>=1,<2",
#     "tensorboard>=2.19,<3",
#     "langcodes[data]>=3.5,<4",
#     "jinja2>=3.1,<4",
#     "rich>=14,<16",
# ]
# ///
"""Fine-tune a Whisper model on speech that is streamed from the Hugging Face Hub or from disk.

    python run_speech_recognition_seq2seq_streaming.py \\
        --model_name_or_path openai/whisper-small --language es \\
        --dataset_name facebook/multilingual_librispeech --dataset_config_name spanish \\
        --text_column_name transcript --eval_split_name dev \\
        --do_train --do_eval --max_steps 2000 --output_dir whisper-small-es
    python run_speech_recognition_seq2seq_streaming.py --config recipe.yaml --learning_rate 1e-5

The path of one utterance: load_source -> SpeechStream (one order) -> encode_text -> decode_audio ->
log_mel -> TrainCollator -> SpeechTrainer -> Scorecard -> CardWriter. `datasets` moves bytes and
never decodes; rows are shuffled before they are decoded; a bad row becomes a Rejection with a
reason and never ends the run. What is here is the recipe, to be changed; speech_finetuning/ is what
has to hold whatever is changed.
"""

import sys

from speech_finetuning.cli.early_exit import answer_early

if __name__ == "__main__":
    answer_early(sys.argv[1:], __file__)  # --help and mistakes, before the seconds that torch takes

import copy
import functools
import logging
import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import datasets
import numpy as np
import torch
import transformers
from transformers.hf_argparser import HfArg

from speech_finetuning.base.errors import Problems
from speech_finetuning.base.files import command_line, write_json
from speech_finetuning.base.network import as_user_error, limit_silence, retry_on_network_error
from speech_finetuning.base.shutdown import StopSignals
from speech_finetuning.base.threads import num_usable_cores
from speech_finetuning.cli.check_data import check_data
from speech_finetuning.cli.console import describe_run, set_up_logging
from speech_finetuning.cli.data_report import report_training_data, warn_of_rows
from speech_finetuning.cli.devices import check_adapters, check_arguments
from speech_finetuning.cli.dry_run import dry_run
from speech_finetuning.cli.exit_status import exit_code_of, forget_earlier_ending
from speech_finetuning.cli.flags import flag_name, with_config_file
from speech_finetuning.cli.next_steps import say_what_next
from speech_finetuning.cli.parsing import parse_flags, read_records
from speech_finetuning.cli.precision import (
    choose_checkpointing,
    settle_precision,
    tell_of_changed_flags,
)
from speech_finetuning.cli.run_screen import replace_progress_callbacks
from speech_finetuning.cli.translation import translate
from speech_finetuning.cli.window_choice import choose_train_window
from speech_finetuning.data.audio import FRAMES_PER_POSITION, SILENCE
from speech_finetuning.data.augmentation import AugmentationArguments, Augmenter
from speech_finetuning.data.batches import join_clips, pad_labels, pad_windows, stored_clip
from speech_finetuning.data.hold_out import choose_rows, load_or_hold_out
from speech_finetuning.data.items import StepInfo, StreamItem
from speech_finetuning.data.noise import load_augmenter
from speech_finetuning.data.packing import UtterancePacker, build_packer
from speech_finetuning.data.positions import ORDER_VERSION
from speech_finetuning.data.preprocessing import Preprocessor, SpeechDataset
from speech_finetuning.data.prompts import PromptArguments
from speech_finetuning.data.roles import languages_of_model, open_by_role
from speech_finetuning.data.selection import HoldOut, read_excluded_ids
from speech_finetuning.data.sources import load_source
from speech_finetuning.data.stream import SpeechStream
from speech_finetuning.data.text import IGNORED_LABEL, UNSPACED_LANGUAGES
from speech_finetuning.model.adapters import add_adapters
from speech_finetuning.model.languages import check_language
from speech_finetuning.model.loading import (
    LOADING_ERRORS,
    check_all_weights_were_there,
    load_processor,
)
from speech_finetuning.scoring.eval_sets import prepare_eval_sets
from speech_finetuning.scoring.normalization import ScoringTarget, scoring_targets
from speech_finetuning.scoring.scorecard import Scorecard
from speech_finetuning.sharing.claim import Run, claim_run
from speech_finetuning.sharing.model_card import CardWriter
from speech_finetuning.sharing.report_page import ReportPage, final_card
from speech_finetuning.sharing.reports import make_card_writer, write_reports
from speech_finetuning.training.arguments import settle_for_library
from speech_finetuning.training.averaging import WeightOptions, choose_weights
from speech_finetuning.training.callbacks import early_stopping
from speech_finetuning.training.checkpoints import pin_to_checkpoint
from speech_finetuning.training.compat import make_reproducible
from speech_finetuning.training.length import choose_saves, count_steps, log_within, save_within
from speech_finetuning.training.loss import TokenWeightedLoss
from speech_finetuning.training.phases import training_phases
from speech_finetuning.training.progress import StreamProgress, resume_progress
from speech_finetuning.training.settings import check_finished_run, training_settings
from speech_finetuning.training.stages import final_scores, train, zero_shot_scores
from speech_finetuning.training.trainer import SpeechTrainer

logger = logging.getLogger("speech_finetuning.script")


# ----------------------------------------------------------------------------- arguments ----
@dataclass
class ModelArguments:
    """Which model to start from."""

    model_name_or_path: str = HfArg(help="Whisper checkpoint: a Hub id or a folder.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of the model.")
    cache_dir: str | None = HfArg(default=None, help="Folder for downloads; default: the Hub's.")
    freeze_encoder: bool = HfArg(default=False, help="Trains the decoder only: takes less memory.")
    lora_rank: int = HfArg(default=0, help="Rank of low-rank adapters (peft); 0: all weights.")
    average_checkpoints: int = HfArg(
        default=1, help="At the end also scores the mean of the last N; the better is saved."
    )
    base_weight_shares: list[float] = HfArg(
        default_factory=list, help="Also scores such shares of the untouched model, as 0.3 0.5."
    )
    model_index_name: str | None = HfArg(default=None, help="Name of the model on its card.")
    config: str | None = HfArg(default=None, help="YAML file of flags and values.")


@dataclass
class SourceArguments(PromptArguments):
    """Where speech comes from and how it is read: the flags that an entry of --data_mix may set."""

    dataset_name: str | None = HfArg(default=None, help="Hub id, folder, or CSV, TSV, JSONL file.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration, often the language.")
    train_split_name: str = HfArg(
        default="train", help="Split to train on; 'train+validation' joins two."
    )
    eval_split_name: str = HfArg(
        default="validation", help="Split that --do_eval scores, every --eval_steps and at the end."
    )
    test_split_name: str | None = HfArg(default=None, help="Split for the best model, at the end.")
    predict_split_name: str = HfArg(default="test", help="Split that --do_predict transcribes.")
    audio_column_name: str | None = HfArg(default=None, help="Audio column; default: usual names.")
    text_column_name: str | None = HfArg(default=None, help="Text column; default: usual names.")
    group_column_name: str | None = HfArg(
        default=None, help="The speaker, say: report.html tells error rates apart by it."
    )
    max_duration_in_seconds: float = HfArg(
        default=30.0, help="Rejects longer clips; beyond 30 s always."
    )
    min_duration_in_seconds: float = HfArg(default=0.0, help="Rejects shorter clips.")
    max_train_samples: int | None = HfArg(default=None, help="Trains on an even sample of N rows.")
    max_eval_samples: int | None = HfArg(default=None, help="Scores an even sample of N rows.")
    eval_fraction: float = HfArg(
        default=0.1, help="Share of rows, at most 500, held out where no split is there to score."
    )
    speaker_column_name: str | None = HfArg(
        default=None, help="Speakers are held out whole; default: usual names."
    )
    exclude_rows: str | None = HfArg(default=None, help="File of ids of rows to leave out.")
    do_lower_case: bool = HfArg(default=False, help="Lower-cases what the model learns to write.")
    do_remove_punctuation: bool = HfArg(default=False, help="Removes punctuation from transcripts.")
    keep_empty_text: bool = HfArg(default=False, help="Rows without a text are not speech.")
    do_normalize_eval: bool = HfArg(default=True, help="False: WER and CER of the text as written.")
    language: str | None = HfArg(default=None, help="Code or English name; none for .en models.")


@dataclass
class DataArguments(AugmentationArguments, SourceArguments):
    """Which speech to train and score on, and what is done to it."""

    data_mix: str | None = HfArg(default=None, help="YAML file that lists several datasets.")
    max_rejected_fraction: float = HfArg(
        default=0.5,
        help="Ends the run if more of the first 1,000 rows, or of a pass, are rejected; 1: never.",
    )
    task: Literal["transcribe", "translate"] = HfArg(
        default="transcribe", help="What the model writes; a translation is into English."
    )
    shuffle_buffer_size: int = HfArg(default=500, help="Rows that are shuffled together; 1: none.")
    data_report_samples: int = HfArg(default=500, help="Rows of each source for the data report.")
    train_window: Literal["full", "longest"] | None = HfArg(default=None, help="Default: by clips.")
    full_window_fraction: float = HfArg(
        default=0.1, help="Share of batches still padded to 30 s with --train_window longest."
    )
    pack_utterances: bool = HfArg(default=False, help="Joins short utterances to windows of 30 s.")
    timestamp_probability: float = HfArg(default=0.0, help="Share of windows that have timestamps.")
    apply_spec_augment: bool = HfArg(default=False, help="Masks stretches of time and mel bands.")
    speed_perturbation: bool = HfArg(default=False, help="Plays clips at 0.9 to 1.1 of the speed.")
    streaming: bool = HfArg(default=True, help="False: downloads all files before reading them.")
    allow_audio_urls: bool = HfArg(default=False, help="Lets Hub rows name http(s):// audio.")
    num_decoding_threads: int | None = HfArg(default=None, help="Default: all cores, at most 8.")
    max_network_wait_in_minutes: float = HfArg(
        default=30.0, help="How long to wait for a lost network (3.5 longer if servers are silent)."
    )
    max_train_time_in_hours: float | None = HfArg(
        default=None, help="Saves and stops with exit code 75 after this time."
    )
    report_clips: int = HfArg(
        default=60, help="Rows with sound and picture in report.html, at most; 0: none."
    )
    eval_before_training: bool = HfArg(default=False, help="Scores the untouched model first.")
    long_form: bool = HfArg(default=False, help="Also scores clips of more than 30 s.")
    push_predictions: bool = HfArg(default=False, help="Uploads the transcripts of scored rows.")
    max_guard_loss_in_points: float | None = HfArg(default=None, help="Most that a guard may lose.")
    early_stopping_patience: int | None = HfArg(
        default=None, help="Ends after N evaluations without a better score."
    )
    check_data: bool = HfArg(default=False, help="Only reads all data and tells what is odd.")
    dry_run: bool = HfArg(default=False, help="Tries the whole job in minutes; leaves nothing.")

    @property
    def max_network_wait_in_seconds(self) -> float:
        return 60 * self.max_network_wait_in_minutes


@dataclass
class DataRecord(DataArguments):
    """One dataset of the run: the flags above, overridden by its entries in --data_mix."""

    name: str = ""  # in the log, in row ids and metric names; empty without --data_mix
    weight: float = 1.0  # its share of the training rows, to the sum of all weights
    guard: bool = False  # only scored: what must not get worse
    # Of a run that goes on, as its checkpoint says.
    is_continued: bool = False
    revision: str | None = None  # on the Hub; None: the newest
    order_version: int = ORDER_VERSION
    hold_out: HoldOut | None = None


@dataclass
class TrainingArguments(transformers.Seq2SeqTrainingArguments):
    """The library's arguments, with other defaults."""

    learning_rate: float | None = HfArg(
        default=None, help="Peak; default by the model's size: 3.75e-5 to 5e-6."
    )
    warmup_steps: float = HfArg(default=0.1, help="Steps to the peak rate; below 1: share of all.")
    num_train_epochs: float | None = HfArg(default=None, help="Data passes instead of --max_steps.")
    predict_with_generate: bool = HfArg(default=True, help="Stays True: WER needs generated text.")
    report_to: str = HfArg(default="tensorboard", help="Curves go to tensorboard, wandb, none, ...")
    logging_steps: float | None = HfArg(
        default=None, help="Steps between two lines of the log. Default: 25, or five lines."
    )
    save_steps: float | None = HfArg(
        default=None, help="Default: 500 or five saves of a short run, at evaluations."
    )
    eval_strategy: Literal["steps", "no"] = HfArg(
        default="steps", help="When --do_eval scores: every --eval_steps, or no: at the end only."
    )
    dataloader_num_workers: int = HfArg(default=1, help="0 or 1; see --num_decoding_threads.")
    ddp_timeout: int = HfArg(default=7200, help="Seconds that a process waits for the others.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="True hides NaN losses from the log.")
    resume_from_checkpoint: str | None = HfArg(
        default="auto", help="auto: newest in --output_dir; or hub, PATH, no."
    )

    def __post_init__(self) -> None:
        if not self.do_eval:
            self.eval_strategy = "no"  # the library would switch do_eval on instead
        choose_saves(self)
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "wer"
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            # The library would take the highest error rate for the best: it would keep the worst.
            is_error = re.search("wer|cer|loss", self.metric_for_best_model) is not None
            self.greater_is_better = not is_error
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # torch warns otherwise
        if self.gradient_checkpointing is not None:
            # The known name; transformers 5.23 warns about it.
            self.activation_checkpointing = self.gradient_checkpointing
            self.gradient_checkpointing = None
        self.is_checkpointing_given = self.activation_checkpointing is not None
        self.remove_unused_columns = False  # our collator takes rows apart itself
        if not self.accelerator_config:
            # Dispatching, the default for evaluation on several processes, concatenates batches of
            # unequal width (RuntimeError in accelerate 1.15, data_loader.py:845).
            self.accelerator_config = {"dispatch_batches": False}
        super().__post_init__()

    @property
    def rows_per_step(self) -> int:
        """Of all processes together, rejected ones counted."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


def data_records(data_args: DataArguments) -> list[DataRecord]:
    """The data of the run: that of the flags, or the entries of --data_mix. Raises: UserError."""
    if data_args.data_mix is None:
        return [DataRecord(**asdict(data_args))]
    return read_records(data_args.data_mix, data_args, DataRecord, SourceArguments)


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The command line, with its --config file, to the three groups of arguments.
    Raises: UserError with all that is wrong with it."""
    words = settle_precision(translate(with_config_file(argv)).words).words
    given = {flag_name(word) for word in words}
    # All are about the best model. Put first, so that an explicit flag wins.
    wants_best = given & {"test_split_name", "early_stopping_patience", "max_guard_loss_in_points"}
    if wants_best and {"do_train", "do_eval"} <= given:
        words = ["--load_best_model_at_end", "True", *words]
    training_args, model_args, data_args = parse_flags(
        words, (TrainingArguments, ModelArguments, DataArguments)
    )
    if data_args.num_decoding_threads is None:
        data_args.num_decoding_threads = num_usable_cores(training_args.world_size)
    return model_args, data_args, training_args


@dataclass(kw_only=True)
class TrainCollator:
    """Rows of the stream to a micro-batch: `labels`, `decoder_input_ids` (see `pad_labels`),
    `frames`, `frame_counts` (see `join_clips`) and `step_info`, a StepInfo. A micro-batch whose
    rows were all rejected holds one silent dummy row without labels, so that every step runs."""

    decoder_start_token_id: int
    pad_token_id: int
    n_mels: int
    packer: UtterancePacker | None = None  # None: every utterance has a window of its own

    def __call__(self, items: list[StreamItem]) -> dict[str, Any]:
        windows = self.windows([item for item in items if item.example is not None])
        return {
            **pad_windows(windows, self.pad_token_id),
            **join_clips([window["features"] for window in windows]),
            "step_info": StepInfo.of(items),
        }

    def windows(self, items: list[StreamItem]) -> list[dict[str, Any]]:
        """The windows of the accepted rows, each with `features` and `labels`."""
        if not items:
            silence = torch.full((self.n_mels, 1), SILENCE)
            labels = [self.decoder_start_token_id, IGNORED_LABEL]
            return [{"features": silence, "labels": labels}]
        if self.packer is not None:
            return self.packer(items)
        return [item.example for item in items]


@dataclass(kw_only=True)
class EvalCollator:
    """Rows of a prepared evaluation set to a batch: as TrainCollator's, but with `index` (batch,),
    the rows' numbers in the set, instead of `step_info`."""

    pad_token_id: int
    n_mels: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        clips = [stored_clip(row["features"], self.n_mels) for row in rows]
        return {
            **pad_labels([row["labels"] for row in rows], self.pad_token_id),
            **join_clips(clips),
            "index": torch.tensor([row["index"] for row in rows]),
            "prompts": [row["prompt_ids"] or [] for row in rows],
        }


# ---------------------------------------------------------------------------------- data ----
@dataclass(kw_only=True)
class Inputs:
    """What is trained on and scored, and how it is read; nothing is decoded yet."""

    processor: transformers.WhisperProcessor
    config: transformers.WhisperConfig
    generation_config: transformers.GenerationConfig
    languages: list[str | None]  # of each record but guards; None: the model knows English only
    targets: dict[str, ScoringTarget]  # by the record's name
    speech: dict[str, list[SpeechDataset]]  # by role: train, eval, guard, test, predict
    augmenter: Augmenter | None = None  # of training clips

    @property
    def train_sets(self) -> tuple[SpeechDataset, ...]:
        return tuple(self.speech.get("train", ()))


def make_preprocessor(
    processor: transformers.WhisperProcessor,
    config: transformers.WhisperConfig,
    data_args: DataArguments,
    language: str | None,
) -> Preprocessor:
    """The row-to-example stage for this checkpoint's window, mel bins and decoder length, and for
    this data's language and limits."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.set_prefix_tokens(language=language, task=data_args.task if language else None)
    return Preprocessor(
        tokenizer=tokenizer,
        mel_filters=np.float32(processor.feature_extractor.mel_filters),
        window_in_frames=FRAMES_PER_POSITION * config.max_source_positions,
        max_label_length=config.max_target_positions,
        min_duration_in_seconds=data_args.min_duration_in_seconds,
        max_duration_in_seconds=data_args.max_duration_in_seconds,
        do_lower_case=data_args.do_lower_case,
        do_remove_punctuation=data_args.do_remove_punctuation,
        keeps_empty_text=data_args.keep_empty_text,
        prompt_probability=data_args.prompt_probability,
        max_network_wait_in_seconds=data_args.max_network_wait_in_seconds,
    )


def open_dataset(
    role: str, split: str, record: DataRecord, preprocessor: Preprocessor, cache_dir: str | None
) -> SpeechDataset:
    """One split of one entry, undecoded, or a hold-out of the training split where the usual one is
    not there. Rows to predict need no text; long clips are scored with --long_form, but never
    trained on."""
    needs_text = role != "predict"
    excluded_ids = read_excluded_ids(record.exclude_rows)
    # With timestamps, neighbours of one recording are trained together, pauses and all.
    has_windows = record.pack_utterances and record.timestamp_probability > 0 and role == "train"
    limits = preprocessor.window_limits(excluded_ids, record.order_version)
    load = functools.partial(
        load_source,
        record.dataset_name,
        config_name=record.dataset_config_name,
        audio_column=record.audio_column_name,
        text_column=record.text_column_name,
        text_required=needs_text,
        cache_dir=cache_dir,
        streaming=record.streaming,
        record=record.name,
        revision=record.revision,
        allow_audio_urls=record.allow_audio_urls,
        window_limits=limits if has_windows else None,
        group_column=None if role == "train" else record.group_column_name,
        prompt_column=record.prompt_column_name,
    )
    source, is_held_out = load_or_hold_out(load, role, split, record)
    return SpeechDataset(
        source=source,
        preprocessor=replace(
            preprocessor,
            needs_text=needs_text,
            takes_long_clips=record.long_form and role != "train",
        ),
        max_rows=record.max_train_samples if role == "train" else record.max_eval_samples,
        weight=record.weight,
        order_version=record.order_version,
        is_held_out=is_held_out,
        excluded_ids=excluded_ids,
    )


def load_speech(
    records: list[DataRecord],
    preprocessors: list[Preprocessor],
    training_args: TrainingArguments,
    cache_dir: str | None,
) -> dict[str, list[SpeechDataset]]:
    """What this run reads, undecoded, by role: train, eval, guard, test, predict.
    Raises: UserError with all that cannot be opened."""
    is_wanted = {
        "train": training_args.do_train,
        "eval": training_args.do_eval,
        "test": True,  # wherever --test_split_name is given
        "predict": training_args.do_predict,
    }
    open_one = functools.partial(open_dataset, cache_dir=cache_dir)
    speech = open_by_role(records, preprocessors, is_wanted, open_one)
    warn_of_rows(speech)
    return choose_rows(speech, records)


# --------------------------------------------------------------------------------- model ----
# Peak learning rates for full fine-tuning by the model's width, about a fortieth of pre-training's
# (Jong Wook Kim, as quoted by the whisper-finetune README). Narrower models are toys trained from
# nothing.
LEARNING_RATE_BY_WIDTH = {
    0: 1e-3,
    384: 3.75e-5,
    512: 2.5e-5,
    768: 1.25e-5,
    1024: 6.25e-6,
    1280: 5e-6,
}
LORA_LEARNING_RATE = 1e-3  # as peers have it, whatever the model's size


def load_model(
    model_args: ModelArguments,
    data_args: DataArguments,
    generation_config: transformers.GenerationConfig,
    languages: list[str | None],
) -> transformers.WhisperForConditionalGeneration:
    """The checkpoint in float32 (mixed precision comes from --fp16 or --bf16), told language and
    task. Only the generation config carries them; forced_decoder_ids would contradict it."""
    name = model_args.model_name_or_path
    load = functools.partial(
        transformers.WhisperForConditionalGeneration.from_pretrained,
        revision=model_args.model_revision,
        cache_dir=model_args.cache_dir,
        # Else transformers 5 loads float16 checkpoints as float16, whose gradients cannot be
        # unscaled.
        dtype=torch.float32,
        output_loading_info=True,
    )
    with as_user_error(*LOADING_ERRORS, where=f"--model_name_or_path {name}"):
        model, loading_info = retry_on_network_error(
            load,
            name,
            task=f"loading {name}",
            limit_in_seconds=data_args.max_network_wait_in_seconds,
        )
    check_all_weights_were_there(loading_info, f"--model_name_or_path {name}")
    # Whisper's sinusoids are constants, but transformers 5.23 loads them with requires_grad=True.
    model.model.encoder.embed_positions.requires_grad_(False)
    model.generation_config = generation_config
    model.generation_config.forced_decoder_ids = None
    if getattr(model.generation_config, "is_multilingual", False):
        model.generation_config.task = data_args.task
        # With several languages, the saved model detects the language of each clip.
        language = languages[0] if len(set(languages)) == 1 else None
        model.generation_config.language = language
    if model_args.freeze_encoder:
        model.freeze_encoder()
    if model_args.lora_rank:
        adapted = r".*decoder.*" if model_args.freeze_encoder else ".*"
        add_adapters(model, model_args.lora_rank, adapted)
    if data_args.apply_spec_augment:
        # By the library, in training mode, on a batch of its own; its defaults mask time only.
        model.config.update({"apply_spec_augment": True, "mask_feature_prob": 0.05})
    return model


def choose_learning_rate(config: transformers.WhisperConfig, has_adapters: bool) -> float:
    """The default peak learning rate: by the model's width, or one for adapters of any size."""
    if has_adapters:
        return LORA_LEARNING_RATE
    width = max(limit for limit in LEARNING_RATE_BY_WIDTH if limit <= config.d_model)
    return LEARNING_RATE_BY_WIDTH[width]


def resolve_arguments(training_args: TrainingArguments, inputs: Inputs, has_adapters: bool) -> None:
    """Fills in what depends on the model and the data: learning rate, steps, the best model's
    metric. Raises: UserError if rows must be counted and cannot be."""
    check_adapters(training_args, has_adapters)
    config = inputs.config
    languages = inputs.languages
    if not training_args.learning_rate:
        training_args.learning_rate = choose_learning_rate(config, has_adapters)
    if inputs.train_sets and training_args.max_steps <= 0:
        training_args.max_steps = count_steps(
            training_args.num_train_epochs, inputs.train_sets, training_args.rows_per_step
        )
        save_within(training_args)
    log_within(training_args)
    if training_args.metric_for_best_model == "wer" and set(languages) <= set(UNSPACED_LANGUAGES):
        training_args.metric_for_best_model = "cer"
        logger.warning(
            "no spaces between words in %s: the best model is the one of the lowest CER.", languages
        )
    settle_for_library(training_args, config)


# ------------------------------------------------------------------------------- the job ----
@dataclass(kw_only=True)
class Job:
    """What `run_job` needs: everything is opened, nothing is trained."""

    run: Run
    data_args: DataArguments
    trainer: SpeechTrainer
    final_sets: dict[str, datasets.Dataset]  # scored once, at the end, by role: prompted, test ...
    weight_options: WeightOptions

    @property
    def run_info(self) -> dict[str, Any]:
        """What is needed to understand and repeat the run."""
        return self.trainer.card_writer.run_info


def load_inputs(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    records: list[DataRecord],
) -> Inputs:
    """Small files first, before anything large: processor, configs, languages; then the data."""
    name = model_args.model_name_or_path
    processor, generation_config, config = retry_on_network_error(
        load_processor,
        name,
        model_args.model_revision,
        model_args.cache_dir,
        task=f"loading {name}",
        limit_in_seconds=data_args.max_network_wait_in_seconds,
    )
    problems = Problems()
    languages = [
        problems.attempt(record.name, check_language, record.language, generation_config, name)
        for record in records
    ]
    preprocessors = [
        make_preprocessor(processor, config, record, language)
        for record, language in zip(records, languages, strict=True)
    ]
    # The one that is saved; in a mix its prefix is that of the first entry's language.
    processor.tokenizer = preprocessors[0].tokenizer
    opening = functools.partial(
        retry_on_network_error,
        task="opening the data",
        limit_in_seconds=data_args.max_network_wait_in_seconds,
    )
    cache_dir = model_args.cache_dir
    speech = problems.attempt(
        "data", opening, load_speech, records, preprocessors, training_args, cache_dir
    )
    augmenter = problems.attempt("augmentation", opening, load_augmenter, data_args, cache_dir)
    problems.raise_if_any()
    return Inputs(
        processor=processor,
        config=config,
        generation_config=generation_config,
        languages=languages_of_model(records, languages),
        targets=scoring_targets(records, languages, is_translated=data_args.task == "translate"),
        speech=speech,
        augmenter=augmenter,
    )


def make_train_collator(inputs: Inputs, data_args: DataArguments, seed: int) -> TrainCollator:
    """Rows to micro-batches for this checkpoint. seed: of the draw of windows with timestamps."""
    packer = build_packer(
        inputs.train_sets,
        packs_utterances=data_args.pack_utterances,
        timestamp_probability=data_args.timestamp_probability,
        written_languages=[
            inputs.targets[dataset.source.record].text_language for dataset in inputs.train_sets
        ],
        seed=seed,
    )
    return TrainCollator(
        decoder_start_token_id=inputs.config.decoder_start_token_id,
        pad_token_id=inputs.processor.tokenizer.pad_token_id,
        n_mels=inputs.config.num_mel_bins,
        packer=packer,
    )


def all_flags(
    model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> dict[str, Any]:
    """Every flag with its value."""
    return {**asdict(model_args), **asdict(data_args), **training_args.to_dict()}


def resume_stream(
    run: Run,
    data_args: DataArguments,
    training_args: TrainingArguments,
    inputs: Inputs,
    phases: list[dict[str, Any]],
) -> tuple[StreamProgress, SpeechStream]:
    """What has been trained so far, and one exact order of rows from there on. phases: with which
    flags, see training.phases."""
    progress = resume_progress(
        checkpoint=run.checkpoint,
        output_dir=run.output_dir,
        max_rejected_fraction=data_args.max_rejected_fraction,
        datasets=inputs.train_sets,
        phases=phases,
        rank=training_args.process_index,
        world_size=training_args.world_size,
    )
    # Packs are of consecutive rows, whatever their length.
    is_grouped = data_args.train_window == "longest" and not data_args.pack_utterances
    stream = SpeechStream(
        sets=inputs.train_sets,
        seed=training_args.data_seed,
        block_size=data_args.shuffle_buffer_size,
        micro_batch_size=training_args.per_device_train_batch_size,
        num_threads=data_args.num_decoding_threads,
        share=progress.share,
        position=progress.position,
        is_grouped_by_length=is_grouped,
        speed_perturbation=data_args.speed_perturbation,
        augmenter=inputs.augmenter,
    )
    return progress, stream


def make_trainer(
    *,
    model: transformers.WhisperForConditionalGeneration,
    inputs: Inputs,
    stream: SpeechStream,
    progress: StreamProgress,
    eval_rows: datasets.Dataset | None,
    run: Run,
    card_writer: CardWriter,
    stop: StopSignals,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> SpeechTrainer:
    """Seq2SeqTrainer with its collators, loss, metrics and callbacks."""
    tokenizer = inputs.processor.tokenizer
    return SpeechTrainer(
        model=model,
        args=training_args,
        train_dataset=stream if training_args.do_train else None,
        eval_dataset=eval_rows,
        data_collator=make_train_collator(inputs, data_args, seed=stream.rank_seed()),
        eval_collator=EvalCollator(
            n_mels=inputs.config.num_mel_bins, pad_token_id=tokenizer.pad_token_id
        ),
        processing_class=inputs.processor,
        compute_loss_func=TokenWeightedLoss(training_args.label_smoothing_factor),
        compute_metrics=Scorecard(tokenizer=tokenizer, targets=inputs.targets),
        callbacks=early_stopping(data_args.early_stopping_patience),
        progress=progress,
        stop=stop,
        uploads=run.uploads,
        card_writer=card_writer,
        train_window=data_args.train_window,
        full_window_fraction=data_args.full_window_fraction,
        max_guard_loss_in_points=data_args.max_guard_loss_in_points,
        max_train_time_in_hours=data_args.max_train_time_in_hours,
        max_network_wait_in_seconds=data_args.max_network_wait_in_seconds,
    )


def build_job(argv: list[str], stop: StopSignals | None) -> Job:
    """From the command line to a trainer with its model and data. Raises: UserError."""
    model_args, data_args, training_args = parse_arguments(argv)
    check_arguments(data_args, training_args)
    set_up_logging(training_args)
    tell_of_changed_flags(argv)
    records = data_records(data_args)
    run = claim_run(model_args, data_args, training_args, records)
    if run.checkpoint is not None:
        pin_to_checkpoint(records, run.checkpoint)

    inputs = load_inputs(model_args, data_args, training_args, records)
    resolve_arguments(training_args, inputs, has_adapters=model_args.lora_rank > 0)
    choose_train_window(data_args, inputs.train_sets, inputs.config, run.checkpoint)
    settings = training_settings(all_flags(model_args, data_args, training_args), records)
    if run.checkpoint is not None:
        check_finished_run(run.checkpoint, settings, data_args.early_stopping_patience)
    phases = training_phases(run.checkpoint, settings, command_line(argv))
    progress, stream = resume_stream(run, data_args, training_args, inputs, phases)
    eval_sets = prepare_eval_sets(inputs.speech, data_args.num_decoding_threads, training_args)

    make_reproducible(training_args)
    model = load_model(model_args, data_args, inputs.generation_config, inputs.languages)
    choose_checkpointing(model, training_args, training_args.is_checkpointing_given)
    flags = all_flags(model_args, data_args, training_args)
    trainer = make_trainer(
        model=model,
        inputs=inputs,
        stream=stream,
        progress=progress,
        eval_rows=eval_sets.pop("eval", None),
        run=run,
        card_writer=make_card_writer(argv, flags, inputs.speech, inputs.languages, run, phases),
        stop=stop or StopSignals(),
        data_args=data_args,
        training_args=training_args,
    )
    trainer.add_callback(ReportPage(trainer, inputs.speech, data_args))
    replace_progress_callbacks(trainer)
    # From here on every rank draws dropout and masks of its own.
    transformers.set_seed(training_args.seed + training_args.process_index)
    describe_run(trainer, inputs.speech, run.checkpoint)
    return Job(
        run=run,
        data_args=data_args,
        trainer=trainer,
        final_sets=eval_sets,
        weight_options=WeightOptions.of(model_args, data_args, training_args),
    )


def run_job(job: Job) -> dict[str, float]:
    """Reports on the data, scores, trains, scores, reports and uploads, each if it is wanted.
    Returns all metrics."""
    trainer = job.trainer
    training_args = trainer.args
    run = job.run
    metrics: dict[str, float] = {}
    if trainer.is_world_process_zero():
        forget_earlier_ending(run.output_dir)
        write_json(run.output_dir / "run_info.json", job.run_info)
        if training_args.do_train and run.checkpoint is None:
            report_training_data(trainer, job.data_args.data_report_samples)
    if job.data_args.eval_before_training or trainer.compares_guards():
        metrics |= zero_shot_scores(trainer, run.checkpoint, job.final_sets)
    trainer.card_writer.early_metrics = dict(metrics)
    if training_args.do_train:
        metrics |= train(trainer, run.checkpoint)
    if training_args.do_eval:
        metrics |= final_scores(trainer)
    if training_args.do_train and training_args.do_eval:
        metrics |= choose_weights(trainer, job.weight_options, metrics)
    for role, rows in job.final_sets.items():
        metrics |= trainer.evaluate(rows, metric_key_prefix=role)
    if trainer.is_world_process_zero():
        card = final_card(trainer, metrics)
        write_reports(run.output_dir, job.run_info, metrics, card)
        if run.uploads is not None:
            run.uploads.submit(run.output_dir, card)
            run.uploads.finish()
    return metrics


def main(argv: list[str] | None = None, stop: StopSignals | None = None) -> dict[str, float]:
    """Trains and scores as the command line says. Returns all metrics.
    Raises: UserError for what the user can fix."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, training_args = parse_arguments(argv)
    limit_silence(data_args.max_network_wait_in_seconds)
    if data_args.check_data:
        records = data_records(data_args)
        model_name = model_args.model_name_or_path or None
        return check_data(records, model_args.cache_dir, training_args, model_name)
    if data_args.dry_run:
        check_arguments(data_args, training_args)
        return dry_run(
            argv,
            data_args=data_args,
            full_args=training_args,
            build_job=functools.partial(build_job, stop=stop),
            run_job=run_job,
        )
    job = build_job(argv, stop)
    metrics = run_job(job)
    say_what_next(training_args, job.run.uploads)
    return metrics


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
