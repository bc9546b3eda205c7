"""One source row to one training example."""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import NotRequired, TypedDict

import numpy as np
import torch
import transformers

from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.audio import (
    HOP_LENGTH_IN_SAMPLES,
    SAMPLE_RATE_IN_HZ,
    decode_audio,
    log_mel,
    seconds_of_frames,
)
from speech_finetuning.data.cells import AudioCell
from speech_finetuning.data.cuts import cut_out
from speech_finetuning.data.listed import (
    TIMESTAMP_IN_SECONDS,
    SpeechWindow,
    WindowLimits,
    clips_of_rows,
)
from speech_finetuning.data.oddities import as_it_was
from speech_finetuning.data.positions import ORDER_VERSION, WINDOWS_VERSION
from speech_finetuning.data.prompts import encode_prompt, fit_prompt, start_of_prompt
from speech_finetuning.data.reading import read_patiently
from speech_finetuning.data.segments import Segment
from speech_finetuning.data.selection import RowSelection
from speech_finetuning.data.shards import SourceRow
from speech_finetuning.data.sources import SpeechSource
from speech_finetuning.data.text import LOST_CHARACTERS, check_length, encode_text, normalize_text

# (n_samples,) float32 at 16 kHz to as many.
Augmentation = Callable[[np.ndarray], np.ndarray]


class Example(TypedDict):
    """A row that is ready for a batch. A dict, because evaluation sets keep such rows in Arrow."""

    id: NotRequired[str]
    group: NotRequired[str]  # of --group_column_name
    features: torch.Tensor  # log-mel of the real frames, (n_mels, n_frames) float32
    labels: list[int]  # token ids with prefix and end, see `encode_text`
    text: str  # as trained
    prompt: NotRequired[str]  # of --prompt_column_name, as the model reads it
    prompt_ids: NotRequired[list[int]]  # before the labels, as many as fit, see `encode_prompt`
    duration: float  # in seconds, of the decoded clip
    sampling_rate: int  # in Hz, of the file
    is_nonspeech: NotRequired[bool]  # True of a clip that became noise, see `nonspeech`
    window: NotRequired[SpeechWindow]  # of neighbours: where in the clip each is, as trained


def check_encoding(text: str) -> None:
    """Raises: Rejection(row_unreadable) of UTF-8 that was read as something else, and saved so."""
    original = as_it_was(text)
    if original is not None:
        place = next(
            i for i, (one, other) in enumerate(zip(text, original, strict=False)) if one != other
        )
        raise Rejection(
            "row_unreadable",
            f"the text was UTF-8 and has been read in another encoding: {text[place : place + 2]} "
            f"stands for {original[place]}. Save the list anew from its source, as UTF-8",
        )


@dataclass(kw_only=True)
class Preprocessor:
    """One source row to one training example, the cheap checks first. Pickles; threads share it."""

    tokenizer: transformers.WhisperTokenizer
    mel_filters: np.ndarray  # (201, n_mels)
    window_in_frames: int
    max_label_length: int
    min_duration_in_seconds: float
    max_duration_in_seconds: float
    do_lower_case: bool
    do_remove_punctuation: bool
    max_network_wait_in_seconds: float
    needs_text: bool = True  # else rows without a text are transcribed all the same
    keeps_empty_text: bool = False  # a row without a text has no speech, and is used
    takes_long_clips: bool = False  # longer than the window, for long-form generation
    prompt_probability: float = 0.0  # share of training rows that keep their prompt

    def check_duration(self, seconds: float) -> None:
        """Raises: Rejection(audio_too_long, audio_too_short) outside the limits."""
        window_in_seconds = seconds_of_frames(self.window_in_frames)
        longest = min(self.max_duration_in_seconds, window_in_seconds)
        if self.takes_long_clips:
            longest = math.inf
        shortest = self.min_duration_in_seconds
        if seconds > longest:
            raise Rejection("audio_too_long", f"{seconds:.2f} s, the limit is {longest:g} s")
        if seconds < shortest:
            raise Rejection("audio_too_short", f"{seconds:.2f} s, the limit is {shortest:g} s")

    def prepare_text(self, text: str | None) -> tuple[str, list[int]]:
        """(text as trained, token ids).

        Raises: Rejection(text_empty, label_too_long, text_has_special_tokens), and row_unreadable
        for a text that lost characters on its way here.
        """
        # A long clip has no loss, so its labels may be cut; its reference is the text.
        max_length = sys.maxsize if self.takes_long_clips else self.max_label_length
        check_length(text or "", self.tokenizer, max_length)
        text = self.clean_text(text)
        labels = encode_text(text, self.tokenizer, max_length)
        return text, labels[: self.max_label_length + 1]

    def clean_text(self, text: str | None) -> str:
        """The text as trained. Raises: Rejection(row_unreadable, text_empty)."""
        text = text or ""
        if LOST_CHARACTERS.search(text):
            raise Rejection(
                "row_unreadable", "the text has lost characters: U+FFFD, half a pair or NUL"
            )
        check_encoding(text)
        is_nonspeech = self.keeps_empty_text and not normalize_text(text, False, False)
        text = normalize_text(text, self.do_lower_case, self.do_remove_punctuation)
        # Of "..." nothing may be left either, but nobody has said that it is no speech.
        if self.needs_text and not text and not is_nonspeech:
            raise Rejection("text_empty")
        return text

    def prepare_prompt(self, prompt: str | None, labels: list[int]) -> tuple[str, list[int]]:
        """(prompt as the model reads it, token ids that fit before the labels), written as
        transcripts are. Raises: Rejection(row_unreadable, text_has_special_tokens)."""
        text = normalize_text(prompt or "", self.do_lower_case, self.do_remove_punctuation)
        prompt_ids = encode_prompt(text, self.tokenizer, self.max_label_length)
        return text, fit_prompt(prompt_ids, len(labels), self.max_label_length)

    def normalize_window(self, window: SpeechWindow) -> SpeechWindow:
        """Its texts as they are trained, without those of which nothing is left."""
        texts = []
        for one in window.texts:
            text = normalize_text(one.text, self.do_lower_case, self.do_remove_punctuation)
            if text:
                texts.append(replace(one, text=text))
        return replace(window, texts=tuple(texts))

    def window_limits(
        self, excluded_ids: frozenset[str], order_version: int = ORDER_VERSION
    ) -> WindowLimits:
        """Of neighbours that are trained together, without those rows. A timestamp less than the
        longest clip, which the rounding of times to samples may fill."""
        window_in_seconds = self.window_in_frames * HOP_LENGTH_IN_SAMPLES / SAMPLE_RATE_IN_HZ
        longest = min(self.max_duration_in_seconds, window_in_seconds)
        num_tokens = self.max_label_length - len(self.tokenizer.prefix_tokens)
        return WindowLimits(
            seconds=longest - TIMESTAMP_IN_SECONDS,
            num_tokens=num_tokens,
            excluded_clips=clips_of_rows(excluded_ids),
            joins_parquet=order_version >= WINDOWS_VERSION,
        )

    def prepare_audio(
        self, audio: AudioCell, segment: Segment | None, speed: float
    ) -> tuple[np.ndarray, int]:
        """((n_samples,) float32 at 16 kHz, sampling rate of the file in Hz). Raises: Rejection."""
        if segment is not None and isinstance(audio, str) and os.path.isfile(audio):
            # A recording may be hours long: only the segment is read.
            return decode_audio(
                cut_out(audio, segment, self.check_duration), self.check_duration, speed
            )
        data = read_patiently(audio, self.max_network_wait_in_seconds)
        if segment is not None:
            data = cut_out(data, segment, self.check_duration)
        return decode_audio(data, self.check_duration, speed)

    def prepare(
        self,
        audio: AudioCell,
        text: str | None,
        speed: float = 1.0,
        segment: Segment | None = None,
        window: SpeechWindow | None = None,
        augment: Augmentation | None = None,
    ) -> Example:
        """An example without its id. Raises: Rejection, network errors that lasted too long."""
        if audio is None and text is None and self.needs_text:
            raise Rejection("row_unreadable", "neither audio nor text")
        if window is not None:
            text = " ".join(one.text for one in window.texts)  # of which nothing may be left
            window = self.normalize_window(window)
            if window.texts:
                text = " ".join(one.text for one in window.texts)
        text, labels = self.prepare_text(text)
        waveform, sampling_rate = self.prepare_audio(audio, segment, speed)
        if augment is not None:
            waveform = augment(waveform)
        window_in_frames = self.window_in_frames
        if self.takes_long_clips:
            num_frames = math.ceil(len(waveform) / HOP_LENGTH_IN_SAMPLES)
            window_in_frames = max(window_in_frames, num_frames)
        duration = len(waveform) / SAMPLE_RATE_IN_HZ
        example: Example = {
            "features": log_mel(waveform, self.mel_filters, window_in_frames),
            "labels": labels,
            "text": text,
            "duration": duration,
            "sampling_rate": sampling_rate,
        }
        if window is not None and segment is not None and segment.duration_in_seconds:
            example["window"] = window.played_in(duration, segment.duration_in_seconds)
        return example

    def without_speech(self, example: Example) -> Example:
        """The example of a clip that has become noise: nobody speaks in it."""
        labels = encode_text("", self.tokenizer, self.max_label_length)
        example = {**example, "text": "", "labels": labels, "is_nonspeech": True}
        example.pop("window", None)
        return example

    def __call__(
        self,
        row: SourceRow,
        speed: float = 1.0,
        augment: Augmentation | None = None,
        *,
        has_prompt: bool = True,
        is_nonspeech: bool = False,
    ) -> Example | Rejection:
        """Whatever is wrong with the row becomes a Rejection with its id.

        speed: of playing the clip, see `decode_audio`. augment: of training rows; what is random
        about it has been drawn by the stream, as whether a row keeps its prompt, and whether it is
        to have no speech: `augment` makes its clip into noise then, and it has no text.
        Raises: errors of the network that lasted too long.
        """
        if row.rejection is not None:
            return row.rejection
        try:
            example = self.prepare(row.audio, row.text, speed, row.segment, row.window, augment)
            if is_nonspeech:
                example = self.without_speech(example)
            example["id"] = row.id
            if row.group is not None:
                example["group"] = row.group
            if row.prompt is not None and has_prompt:
                prompt, prompt_ids = self.prepare_prompt(row.prompt, example["labels"])
                example["prompt"] = prompt
                example["prompt_ids"] = prompt_ids
            return example
        except Rejection as rejection:
            return Rejection(rejection.reason, rejection.detail, row.id)


@dataclass(frozen=True)
class SpeechDataset:
    """A source, and how its rows are prepared."""

    source: SpeechSource
    preprocessor: Preprocessor
    _: KW_ONLY
    max_rows: int | None = None  # an even sample of so many; in the first order the first ones
    weight: float = 1.0  # in the draw of a mix
    order_version: int = ORDER_VERSION  # see `positions`
    selection: RowSelection | None = None  # None: all rows, or the first max_rows
    is_held_out: bool = False  # its rows are those of a training split that are not trained on
    excluded_ids: frozenset[str] = frozenset()  # of rows that are passed over

    def __post_init__(self) -> None:
        """Raises: UserError for prompts that the tokenizer cannot mark."""
        if self.source.columns.has_prompts:
            start_of_prompt(self.preprocessor.tokenizer)

    def rows_per_pass(self) -> int | None:
        """None when only reading everything would tell."""
        num_rows = self.source.num_rows
        if self.selection is not None:
            return self.selection.num_rows(num_rows)
        if num_rows is None or self.max_rows is None:
            return num_rows
        return min(num_rows, self.max_rows)
