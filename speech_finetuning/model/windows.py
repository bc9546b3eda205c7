"""The encoder with a shorter window."""

import contextlib
from collections.abc import Iterator

import transformers

from speech_finetuning.data.audio import FRAMES_PER_POSITION


@contextlib.contextmanager
def encoder_window(
    model: transformers.WhisperForConditionalGeneration, window_in_frames: int
) -> Iterator[None]:
    """The encoder reads windows of this length, with its first positions, instead of 30 s. Both numbers decide what
    transformers' encoder (5.23) accepts and how many positions it adds; outside, they are the checkpoint's again."""
    positions, config = model.get_encoder().embed_positions, model.config
    whole = config.max_source_positions
    config.max_source_positions = positions.num_embeddings = window_in_frames // FRAMES_PER_POSITION
    try:
        yield
    finally:
        config.max_source_positions = positions.num_embeddings = whole
