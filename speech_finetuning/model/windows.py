"""The encoder with a shorter window, how long a training batch's is, and attention for lengths that
change."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import transformers

from speech_finetuning.data.audio import (
    FRAMES_PER_POSITION,
    HOP_LENGTH_IN_SAMPLES,
    SAMPLE_RATE_IN_HZ,
)

FRAMES_PER_SECOND = SAMPLE_RATE_IN_HZ // HOP_LENGTH_IN_SAMPLES


@contextlib.contextmanager
def encoder_window(
    model: transformers.WhisperForConditionalGeneration, window_in_frames: int
) -> Iterator[None]:
    """Has the encoder read windows of this length, with its first positions, instead of 30 s.

    Two numbers decide what transformers' encoder (5.24) accepts and how many positions it adds;
    outside, they are the checkpoint's again.
    """
    config = model.config
    positions = cast(torch.nn.Embedding, model.get_encoder().embed_positions)
    full_window_in_positions = config.max_source_positions
    window_in_positions = window_in_frames // FRAMES_PER_POSITION
    config.max_source_positions = window_in_positions
    positions.num_embeddings = window_in_positions
    try:
        yield
    finally:
        config.max_source_positions = full_window_in_positions
        positions.num_embeddings = full_window_in_positions


@contextlib.contextmanager
def attention_of_any_length(is_needed: bool = True) -> Iterator[None]:
    """Without cuDNN's attention, which builds a plan for each shape that it has not met.

    torch prefers it in half precision on Hopper cards (2.11). Each plan keeps the CPU busy for some
    65 ms, forward and backward, while the GPU idles: with packed windows, whose number and labels
    change from step to step, 1.05 of 1.72 s (Whisper small on an H200, benchmarks/gpu_training.md).
    The other kernels need none; where batches of one shape come again and again, cuDNN's is faster.
    """
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(was_enabled and not is_needed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


@contextlib.contextmanager
def window_of_batch(
    model: transformers.WhisperForConditionalGeneration,
    window_in_frames: int,
    has_usual_shape: bool,
) -> Iterator[None]:
    """A training batch's window, and the attention that fits it. has_usual_shape: as many windows
    as most batches have, of the full length."""
    with encoder_window(model, window_in_frames), attention_of_any_length(not has_usual_shape):
        yield


@dataclass(frozen=True, kw_only=True)
class TrainingWindow:
    """Chooses how many frames a training batch is padded to.

    With a `full_fraction` below 1, only a seeded share of batches gets the full window, so that the
    model does not forget it; the others get that of their longest clip, up to a whole second.
    """

    full_window_in_frames: int
    full_fraction: float
    seed: int
    rows_at_once: int  # that all ranks together train on at the same time

    def frames(self, frame_counts: list[int], last_row: int) -> int:
        """The window in frames. `last_row`: where the batch ends in the stream.

        Ranks draw alike for the batches that they train on at the same time: otherwise most of them
        would wait for one that has 30 s.
        """
        turn = (last_row - 1) // self.rows_at_once
        if np.random.default_rng([self.seed, turn, 2]).random() < self.full_fraction:
            return self.full_window_in_frames
        seconds = math.ceil(max(frame_counts) / FRAMES_PER_SECOND)
        return min(self.full_window_in_frames, FRAMES_PER_SECOND * seconds)
