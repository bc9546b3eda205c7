"""How far training clips are padded, where the command line does not say."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from speech_finetuning.cli.data_report import prepare_rows
from speech_finetuning.data.audio import FRAMES_PER_POSITION, seconds_of_frames
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.training.settings import saved_settings

logger = logging.getLogger(__name__)

# Of half of the clips or more, in a window of 30 s those below 10 s: then padding to the longest clip of
# a batch is several times as fast, and as good after equal numbers of rows (benchmarks/short_windows.md).
MUCH_PADDING_IN_SECONDS = 20.0
ROWS_FOR_WINDOW = 64  # of each source


def choose_train_window(
    data_args: Any,
    sets: Sequence[SpeechDataset],
    config: transformers.WhisperConfig,
    checkpoint: Path | None,
) -> None:
    """Sets --train_window where it is not given: that of the checkpoint, or 'longest' if most of the
    windows would be padding, which is said. On every rank alike.

    data_args: the script's.
    """
    if data_args.train_window is not None:
        return
    data_args.train_window = "full"
    if data_args.pack_utterances or not sets:
        return
    if checkpoint is not None:
        data_args.train_window = saved_settings(checkpoint).get("--train_window", "full")
        return
    window_in_seconds = seconds_of_frames(FRAMES_PER_POSITION * config.max_source_positions)
    limit_in_seconds = window_in_seconds - MUCH_PADDING_IN_SECONDS
    if limit_in_seconds <= 0:  # whatever the clips
        return
    durations = [
        example["duration"]
        for dataset in sets
        for example in prepare_rows(
            dataset, ROWS_FOR_WINDOW, data_args.num_decoding_threads
        ).examples
    ]
    if durations and np.median(durations) < limit_in_seconds:
        data_args.train_window = "longest"
        logger.info(
            "window: a batch's longest clip, as half are below %.1f s (--train_window full: %.0f s, "
            "far slower)",
            np.median(durations),
            window_in_seconds,
        )
