"""The first screen: how long the training is, in passes over the data."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.cli.console import describe_length
from speech_finetuning.data.preprocessing import Preprocessor, SpeechDataset
from speech_finetuning.data.sources import load_source

WORDS = "--model_name_or_path m --dataset_name d --output_dir o --do_train".split()


@pytest.fixture
def dataset(speech: Path, preprocessor: Preprocessor) -> SpeechDataset:
    """Of 40 rows."""
    return SpeechDataset(load_source(str(speech), split="train"), preprocessor)


def told(caplog: pytest.LogCaptureFixture, sets: list[SpeechDataset], flags: str) -> list[str]:
    args = script.parse_arguments([*WORDS, *flags.split()])[2]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        describe_length(sets, args)
    return [record.message for record in caplog.records]


def test_steps_are_translated_to_passes(dataset: SpeechDataset, caplog: pytest.LogCaptureFixture):
    flags = "--max_steps 30 --per_device_train_batch_size 4 --gradient_accumulation_steps 2"
    assert told(caplog, [dataset], flags) == ["length: 30 steps are 6.0 passes over 40 rows"]
    flags = flags.replace("30", "1")
    assert told(caplog, [dataset], flags) == ["length: 1 step is 0.2 passes over 40 rows"]


def test_a_length_that_memorises_names_a_better_one(
    dataset: SpeechDataset, caplog: pytest.LogCaptureFixture
):
    flags = "--max_steps 2000 --per_device_train_batch_size 16"
    assert told(caplog, [dataset], flags) == [
        "length: 2,000 steps are 800 passes over 40 rows",
        "after so many passes a model recites its training set. --max_steps 25 makes 10 passes.",
    ]
    assert len(told(caplog, [dataset], flags.replace("2000", "25"))) == 1


def test_of_a_mix_the_source_that_is_used_up_first_decides(
    dataset: SpeechDataset, caplog: pytest.LogCaptureFixture
):
    often = replace(dataset, weight=3.0, source=replace(dataset.source, record="often"))
    rarely = replace(dataset, weight=1.0, source=replace(dataset.source, record="rarely"))
    lines = told(caplog, [often, rarely], "--max_steps 400 --per_device_train_batch_size 4")
    assert lines[:2] == [
        "length: 400 steps are 30.0 passes over 40 rows of often",
        "length: 400 steps are 10.0 passes over 40 rows of rarely",
    ]
    assert "--max_steps 134 makes 10" in lines[2]


def test_rows_that_are_not_counted_are_not_told(
    dataset: SpeechDataset, caplog: pytest.LogCaptureFixture
):
    uncounted = replace(dataset, source=replace(dataset.source, num_rows=None))
    assert told(caplog, [uncounted], "--max_steps 4000") == []
