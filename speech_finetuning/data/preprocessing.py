"""One source row to one training example."""

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers

from speech_finetuning.base.network import retry_on_network_error
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.audio import (
    HOP_LENGTH_IN_SAMPLES,
    SAMPLE_RATE_IN_HZ,
    decode_audio,
    log_mel,
    read_audio,
)
from speech_finetuning.data.sources import SourceRow, SpeechSource
from speech_finetuning.data.text import encode_text, normalize_text


@dataclass
class Preprocessor:
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
        limit = (
            math.inf
            if self.takes_long_clips
            else min(self.max_duration_in_seconds, window_in_seconds)
        )
        if seconds > limit:
            raise Rejection("audio_too_long", f"{seconds:.2f} s, the limit is {limit:g} s")
        if seconds < self.min_duration_in_seconds:
            raise Rejection(
                "audio_too_short",
                f"{seconds:.2f} s, the limit is {self.min_duration_in_seconds:g} s",
            )

    def prepare(
        self, audio: str | dict[str, Any] | None, text: str | None, speed: float = 1.0
    ) -> dict[str, Any]:
        """Features (n_mels, n_frames), label ids, text as trained and duration. Raises: Rejection."""
        if audio is None and text is None and self.needs_text:
            raise Rejection("row_unreadable", "neither audio nor text")
        text = normalize_text(text or "", self.do_lower_case, self.do_remove_punctuation)
        if self.needs_text and not text:
            raise Rejection("text_empty")
        labels = encode_text(
            text, self.tokenizer, sys.maxsize if self.takes_long_clips else self.max_label_length
        )
        data = retry_on_network_error(
            read_audio,
            audio,
            limit_in_seconds=self.max_network_wait_in_seconds,
            task="reading audio",
        )
        waveform, sampling_rate = decode_audio(data, self.check_duration, speed)
        seconds = len(waveform) / SAMPLE_RATE_IN_HZ
        num_frames = (
            math.ceil(len(waveform) / HOP_LENGTH_IN_SAMPLES) if self.takes_long_clips else 0
        )
        features = log_mel(waveform, self.mel_filters, max(self.window_in_frames, num_frames))
        # A long clip has no loss, so that its labels may be cut; its reference is the text.
        texts = {"labels": labels[: self.max_label_length + 1], "text": text}
        return {"features": features, **texts, "duration": seconds, "sampling_rate": sampling_rate}

    def __call__(self, row: SourceRow, speed: float = 1.0) -> dict[str, Any] | Rejection:
        if row.rejection is not None:
            return row.rejection
        try:
            return {"id": row.id, **self.prepare(row.audio, row.text, speed)}
        except Rejection as rejection:
            return Rejection(rejection.reason, rejection.detail, row.id)


@dataclass(frozen=True)
class SpeechDataset:
    """A source with the way its rows are prepared; max_rows: its first ones only; weight: in the draw of a mix."""

    source: SpeechSource
    preparer: Preprocessor
    max_rows: int | None = None
    weight: float = 1.0

    def rows_per_pass(self) -> int | None:
        return self.source.num_rows and min(
            self.source.num_rows, self.max_rows or self.source.num_rows
        )
