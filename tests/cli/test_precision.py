"""What the machine decides: mixed precision and gradient checkpointing."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError
from speech_finetuning.cli import precision
from speech_finetuning.cli.precision import (
    choose_checkpointing,
    settle_precision,
    tell_of_changed_flags,
)
from speech_finetuning.training import memory

WORDS = "--model_name_or_path m --dataset_name d --output_dir o --do_train".split()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """gpu(has_bfloat16) puts one into this machine, as far as these questions go."""

    def plug_in(has_bfloat16: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bfloat16
        )

    return plug_in


def test_on_a_cpu_nothing_is_chosen():
    settled = settle_precision(WORDS)
    assert (settled.words, settled.note) == (WORDS, "precision: float32")


def test_fp16_on_a_cpu_is_a_warning_and_the_run_goes_on(caplog: pytest.LogCaptureFixture):
    tell_of_changed_flags([*WORDS, "--fp16"])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith("--fp16 is off, as it needs a GPU (")
    assert record.message.endswith("): training in float32.")
    args = script.parse_arguments([*WORDS, "--fp16"])[2]
    assert not args.fp16 and args.mixed_precision == "no"


def test_use_cpu_is_named_as_the_reason():
    assert settle_precision([*WORDS, "--fp16", "--use_cpu"]).note == (
        "--fp16 is off, as it needs a GPU (--use_cpu was given): training in float32."
    )


@pytest.mark.parametrize(("has_bfloat16", "name"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_gets_the_precision_it_has(gpu: Callable, has_bfloat16: bool, name: str):
    gpu(has_bfloat16)
    settled = settle_precision(WORDS)
    assert settled.words == [f"--{name}", "True", *WORDS]
    assert f"--{name} False: float32" in settled.note


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        ("--fp16", "precision: float16"),
        ("--bf16", "precision: bfloat16"),
        ("--bf16 False", "precision: float32"),
        ("--fp16 --fp16 False", "precision: float32"),
        ("--deepspeed ds.json", "precision: as the configuration of accelerate says"),
    ],
)
def test_what_is_said_stays_as_it_is(gpu: Callable, flags: str, note: str):
    gpu(True)
    words = [*WORDS, *flags.split()]
    settled = settle_precision(words)
    assert (settled.words, settled.note, settled.is_contrary) == (words, note, False)


@pytest.mark.parametrize(
    ("flags", "num_rows"),
    [
        ("", 8),
        ("--per_device_train_batch_size 4", 8),
        ("--per_device_train_batch_size 64", 64),
        ("--per_device_train_batch_size=64", 64),
        ("--per_device_train_batch_size 64 --per_device_eval_batch_size 8", 8),
        ("--per_device_train_batch_size 64 --use_cpu", 8),
    ],
)
def test_a_gpu_scores_as_many_rows_as_it_trains_on(gpu: Callable, flags: str, num_rows: int):
    gpu(True)
    parser = transformers.HfArgumentParser(transformers.Seq2SeqTrainingArguments)
    read = parser.parse_known_args(settle_precision([*WORDS, *flags.split()]).words)[0]
    assert read.per_device_eval_batch_size == num_rows


def test_both_at_once_are_refused_on_every_machine():
    with pytest.raises(UserError, match="--fp16 and --bf16: pass one, not both"):
        script.parse_arguments([*WORDS, "--fp16", "--bf16"])


@pytest.mark.parametrize(("memory_in_gb", "state"), [(0.5, "on"), (80, "off")])
def test_checkpointing_by_the_memory_of_the_gpu(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    memory_in_gb: float,
    state: str,
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(precision, "memory_of_gpu_in_bytes", lambda device: memory_in_gb * 1e9)
    model = transformers.WhisperForConditionalGeneration.from_pretrained(tiny_model)
    args = script.parse_arguments([*WORDS, "--max_steps", "1"])[2]
    choose_checkpointing(model, args, is_given=False)
    assert args.activation_checkpointing == (state == "on")
    assert caplog.messages[-1].startswith(f"gradient checkpointing: {state}, as a step takes")


def test_on_a_cpu_checkpointing_is_not_spoken_of(caplog: pytest.LogCaptureFixture):
    assert memory.memory_of_gpu_in_bytes(torch.device("cpu")) is None
    args = script.parse_arguments([*WORDS, "--max_steps", "1"])[2]
    caplog.set_level(logging.INFO)
    choose_checkpointing(None, args, is_given=False)
    assert caplog.messages == [] and not args.activation_checkpointing


@pytest.mark.parametrize(
    ("flags", "is_given"),
    [("", False), ("--gradient_checkpointing", True), ("--activation_checkpointing False", True)],
)
def test_whether_checkpointing_was_decided_by_the_user(flags: str, is_given: bool):
    args = script.parse_arguments([*WORDS, "--max_steps", "1", *flags.split()])[2]
    assert args.is_checkpointing_given == is_given
