"""Lengths of training: passes, and what is chosen where nothing is given."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError
from speech_finetuning.data.preprocessing import Preprocessor, SpeechDataset
from speech_finetuning.data.sources import load_source
from speech_finetuning.training.length import count_steps, log_within, save_within


@pytest.fixture
def dataset(speech: Path, preprocessor: Preprocessor) -> SpeechDataset:
    """Of 40 rows."""
    return SpeechDataset(load_source(str(speech), split="train"), preprocessor)


def of_rows(dataset: SpeechDataset, num_rows: int | None, **changes: object) -> SpeechDataset:
    return replace(dataset, source=replace(dataset.source, num_rows=num_rows), **changes)


@pytest.mark.parametrize(
    ("num_rows", "num_steps"),
    [
        (40, 13),  # ten passes: 400 clips
        (2_000, 500),  # 16,000 clips: eight passes
        (10_000, 1_563),  # five passes
        (1_000_000, 5_000),  # 160,000 clips, which is a sixth of a pass
        (None, 2_000),
    ],
)
def test_a_length_by_the_number_of_rows(
    dataset: SpeechDataset,
    num_rows: int | None,
    num_steps: int,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.INFO)
    assert count_steps(None, [of_rows(dataset, num_rows)], rows_per_step=32) == num_steps
    rows = f"for {num_rows:,} rows" if num_rows else "as the rows cannot be counted"
    assert caplog.messages == [
        f"length: {num_steps:,} steps, chosen {rows}; --max_steps N: another"
    ]


def test_of_a_mix_the_source_that_is_used_up_first_decides(dataset: SpeechDataset):
    """A thousand rows with three quarters of the draw are over after 1,333 rows of the mix."""
    often = of_rows(dataset, 1_000, weight=3.0)
    rarely = of_rows(dataset, 100_000, weight=1.0)
    of_unknown_length = of_rows(dataset, None, weight=0.0001)
    sets = [often, rarely, of_unknown_length]
    assert count_steps(None, sets, rows_per_step=10) == 1_334


def test_passes_that_are_asked_for(dataset: SpeechDataset, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    assert count_steps(2.5, [dataset], rows_per_step=32) == 4
    assert caplog.messages == []
    with pytest.raises(UserError, match="rows cannot be counted"):
        count_steps(1, [of_rows(dataset, None)], rows_per_step=32)
    with pytest.raises(UserError, match="passes of a mix"):
        count_steps(1, [dataset, dataset], rows_per_step=32)


@pytest.mark.parametrize(
    ("flags", "max_steps", "steps"),
    [
        ("", 13, (3, 3)),
        ("", 1_563, (313, 313)),
        ("", 5_000, (500, 500)),
        ("--save_steps 100", 13, (100, 100)),
        ("--save_steps 500", 13, (500, 500)),
        ("--save_steps 500 --eval_steps 500", 13, (500, 500)),
        ("--save_steps 500 --eval_steps 3", 13, (500, 3)),
        ("--eval_steps 2", 13, (2, 2)),
        ("--eval_steps 2 --load_best_model_at_end", 113, (22, 2)),
        ("--eval_steps 500", 13, (500, 500)),
        ("--eval_steps 200 --test_split_name test", 5_000, (400, 200)),
        ("--eval_steps 0.1", 130, (0.1, 0.1)),
        ("--save_steps 0.2 --eval_steps 0.1", 130, (0.2, 0.1)),
    ],
)
def test_a_short_run_is_saved_and_scored_on_its_way(
    flags: str, max_steps: int, steps: tuple[int, int]
):
    words = "--model_name_or_path m --dataset_name d --output_dir o --do_train --do_eval"
    args = script.parse_arguments([*words.split(), *flags.split()])[2]
    args.max_steps = max_steps
    save_within(args)
    assert (args.save_steps, args.eval_steps) == steps


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ("", (500, 500)),
        ("--eval_steps 200", (400, 200)),
        ("--eval_steps 1000", (1000, 1000)),
        ("--eval_steps 0.25", (0.25, 0.25)),
        ("--save_steps 30", (30, 30)),
        ("--save_steps 600 --eval_steps 200", (600, 200)),
    ],
)
def test_saves_fall_on_evaluations(flags: str, steps: tuple[float, float]):
    """Only a model that is both scored and saved can be the best: the library refuses others."""
    words = "--model_name_or_path m --dataset_name d --output_dir o --do_train --do_eval"
    words += f" --max_steps 5000 --test_split_name test {flags}"
    args = script.parse_arguments(words.split())[2]
    assert (args.save_steps, args.eval_steps) == steps and args.load_best_model_at_end


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ("--max_steps 17", 4),
        ("--max_steps 2", 1),
        ("--max_steps 2000", 25),
        ("--max_steps 17 --logging_steps 25", 25),
        ("--max_steps 17 --logging_steps 0.5", 0.5),
    ],
)
def test_a_short_run_shows_its_loss(flags: str, steps: float):
    words = f"--model_name_or_path m --dataset_name d --output_dir o --do_train {flags}"
    args = script.parse_arguments(words.split())[2]
    log_within(args)
    assert args.logging_steps == steps
