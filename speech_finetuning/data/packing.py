"""Utterances that share a window, with or without timestamps.

Mostly they have nothing to do with each other, and are laid end to end. Neighbours of one recording
come as one example (`listed.SpeechWindow`), with the pauses between them as they are.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import transformers

from speech_finetuning.data.audio import (
    FRAMES_PER_POSITION,
    HOP_LENGTH_IN_SAMPLES,
    SAMPLE_RATE_IN_HZ,
    SCALED_DYNAMIC_RANGE,
    pad_features,
)
from speech_finetuning.data.items import StreamItem
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.prompts import fit_prompt
from speech_finetuning.data.text import UNSPACED_LANGUAGES


@dataclass(frozen=True, kw_only=True)
class MarkedText:
    """A text between two timestamps. start, end: positions of the encoder (20 ms)."""

    start: int
    end: int
    text_ids: list[int]  # of the text alone, as they follow a timestamp or another text


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One example of the stream, with what joining it to others needs.

    cut_position: of the encoder, where a text begins that the end of the window cuts off.
    """

    features: torch.Tensor  # log-mel of the real frames, (n_mels, n_frames)
    duration_in_seconds: float
    labels: list[int]  # token ids as trained alone: prefix, text, end
    texts: list[MarkedText]  # one, or those of neighbours
    row: int  # of the mix, from 1 on
    cut_position: int | None = None
    prompt_ids: Sequence[int] = ()  # what is read before it, if it is the first of its window

    def text_ids(self) -> list[int]:
        """Of all texts, as they follow another text."""
        return list(itertools.chain.from_iterable(text.text_ids for text in self.texts))

    def num_joined_frames(self) -> int:
        """Frames that it takes in a pack: whole positions of the encoder, so that a joint lies on a
        timestamp."""
        num_samples = round(self.duration_in_seconds * SAMPLE_RATE_IN_HZ)
        samples_per_position = FRAMES_PER_POSITION * HOP_LENGTH_IN_SAMPLES
        return FRAMES_PER_POSITION * math.ceil(num_samples / samples_per_position)

    def num_marked_tokens(self) -> int:
        """Labels that it takes in a pack with timestamps: each text between two of them."""
        num_tokens = sum(len(text.text_ids) + 2 for text in self.texts)
        return num_tokens + (self.cut_position is not None)

    def without_cut(self) -> "Utterance":
        """Ends with the last whole text: without timestamps no label says that another begins."""
        if self.cut_position is None:
            return self
        end = self.texts[-1].end if self.texts else self.cut_position  # nobody speaks before it
        num_frames = FRAMES_PER_POSITION * end
        return replace(
            self,
            features=self.features[:, :num_frames],
            duration_in_seconds=num_frames * HOP_LENGTH_IN_SAMPLES / SAMPLE_RATE_IN_HZ,
            cut_position=None,
        )


def pack_utterances(
    utterances: list[Utterance], window_in_frames: int, max_tokens: int
) -> list[list[Utterance]]:
    """Consecutive utterances in groups that fit into one window and, with two timestamps each, into
    max_tokens labels. Where one is cut off by its window's end, none follows."""
    packs: list[list[Utterance]] = []
    frames_left = 0
    tokens_left = 0
    for utterance in utterances:
        num_frames = utterance.num_joined_frames()
        num_tokens = utterance.num_marked_tokens()
        if num_frames > frames_left or num_tokens > tokens_left:
            packs.append([])
            frames_left = window_in_frames
            tokens_left = max_tokens
        packs[-1].append(utterance)
        frames_left -= num_frames
        tokens_left -= num_tokens
        if utterance.cut_position is not None:
            frames_left = 0
    return packs


def join_features(utterances: list[Utterance]) -> torch.Tensor:
    """Log-mel of the utterances end to end, (n_mels, n_frames): what `log_mel` makes of their
    joined waveforms but for the frames beside a joint, which see one clip only; the loudest of all
    bounds what is quiet."""
    clips = []
    for utterance in utterances:
        num_frames = utterance.num_joined_frames()
        frames = utterance.features[:, :num_frames]
        clips.append(pad_features(frames, [frames.shape[1]], num_frames)[0])
    joined = torch.cat(clips, dim=1)
    return joined.clamp(min=float(joined.max()) - SCALED_DYNAMIC_RANGE)


def join_texts(utterances: list[Utterance], end: int) -> list[int]:
    """Token ids of a pack without timestamps: one text. end: <|endoftext|>."""
    first, *others = [each for each in utterances if each.text_ids()] or utterances[:1]
    text_ids = (utterance.text_ids() for utterance in others)
    return [*first.labels[:-1], *itertools.chain(*text_ids), end]


def join_marked_texts(utterances: list[Utterance], prefix: list[int], end: int) -> list[int]:
    """Token ids of a pack with timestamps: each text between those of its start and its end, as in
    pre-training, and of a text that is cut off the start.

    prefix: ends in <|notimestamps|>, which timestamps replace; the next token is <|0.00|>, and one
    token is a position of the encoder (20 ms). end: <|endoftext|>."""
    labels = prefix[:-1]
    timestamp = prefix[-1] + 1
    for utterance in utterances:
        for text in utterance.texts:
            if not text.text_ids:  # nobody speaks
                continue
            labels += [timestamp + text.start, *text.text_ids, timestamp + text.end]
        if utterance.cut_position is not None:
            labels.append(timestamp + utterance.cut_position)
        timestamp += utterance.num_joined_frames() // FRAMES_PER_POSITION
    if len(labels) == len(prefix) - 1:
        # Generation with timestamps must begin with one, so that the end comes after it.
        labels.append(prefix[-1] + 1)
    return [*labels, end]


@dataclass(kw_only=True)
class UtterancePacker:
    """The utterances of a micro-batch to its windows: packed (--pack_utterances), with timestamps
    (--timestamp_probability). A micro-batch stays a fixed number of rows, so that the position in
    the stream, and the rows of a step, are those of an unpacked run."""

    tokenizers: Sequence[transformers.WhisperTokenizer]  # of each source
    separators: Sequence[str]  # of each source, before the text of a segment
    window_in_frames: int
    max_label_length: int  # positions of the decoder
    packs_utterances: bool  # else every utterance has a window of its own
    timestamp_probability: float
    seed: int

    def __call__(self, items: list[StreamItem]) -> list[dict[str, Any]]:
        """The windows, each with `features` (n_mels, n_frames), `labels`, the token ids, and
        `prompt_ids`, those of the first utterance's prompt that fit before them.
        items: with examples, in the order of the stream; only those of one source share a window."""
        windows: list[dict[str, Any]] = []
        for source in sorted({item.place().last_source for item in items}):
            tokenizer = self.tokenizers[source]
            utterances = [
                self.utterance(item) for item in items if item.place().last_source == source
            ]
            if self.packs_utterances:
                packs = pack_utterances(
                    utterances, self.window_in_frames, self.num_text_positions(tokenizer)
                )
            else:
                packs = [[utterance] for utterance in utterances]
            for pack in packs:
                window = self.join(pack, tokenizer)
                window["prompt_ids"] = fit_prompt(
                    list(pack[0].prompt_ids), len(window["labels"]), self.max_label_length
                )
                windows.append(window)
        return windows

    def utterance(self, item: StreamItem) -> Utterance:
        source = item.place().last_source
        example = item.content()
        window = example.get("window")
        utterance = Utterance(
            features=example["features"],
            duration_in_seconds=example["duration"],
            labels=example["labels"],
            texts=[],
            row=item.place().row,
            prompt_ids=example.get("prompt_ids", ()),
        )
        num_positions = utterance.num_joined_frames() // FRAMES_PER_POSITION
        if window is None:
            text_ids = self.text_ids(example["text"], source)
            return replace(
                utterance, texts=[MarkedText(start=0, end=num_positions, text_ids=text_ids)]
            )
        texts = [
            MarkedText(
                start=min(position_of(one.start_in_seconds), num_positions),
                end=min(position_of(one.end_in_seconds), num_positions),
                text_ids=self.text_ids(one.text, source),
            )
            for one in window.texts
        ]
        cut = window.cut_in_seconds
        joined = self.separators[source].join(one.text for one in window.texts)
        return replace(
            utterance,
            labels=self.tokenizers[source](joined).input_ids,
            texts=texts,
            cut_position=None if cut is None else min(position_of(cut), num_positions),
        )

    def text_ids(self, text: str, source: int) -> list[int]:
        """As they follow another text. With a space, also the first one: long-form generation joins
        the texts of windows as they are."""
        if not text:  # else the separator would be one
            return []
        tokenizer = self.tokenizers[source]
        return tokenizer(self.separators[source] + text, add_special_tokens=False).input_ids

    def num_text_positions(self, tokenizer: transformers.WhisperTokenizer) -> int:
        """Labels that a window has for texts and timestamps: <|notimestamps|>, the last token of
        the prefix, leaves its position to them."""
        return self.max_label_length - len(tokenizer.prefix_tokens) + 1

    def join(
        self, pack: list[Utterance], tokenizer: transformers.WhisperTokenizer
    ) -> dict[str, Any]:
        """The window of a pack. Its first row decides on timestamps; a pack that has them has them
        at every joint."""
        # The 1 makes the draw independent of that of the row's speed.
        generator = np.random.default_rng([self.seed, pack[0].row, 1])
        is_drawn = generator.random() < self.timestamp_probability
        num_tokens = sum(utterance.num_marked_tokens() for utterance in pack)
        end = cast(int, tokenizer.eos_token_id)
        # A single utterance has a window to itself even if timestamps leave no room for its text.
        if is_drawn and num_tokens <= self.num_text_positions(tokenizer):
            labels = join_marked_texts(pack, tokenizer.prefix_tokens, end)
            return {"features": join_features(pack), "labels": labels}
        whole = [utterance.without_cut() for utterance in pack]
        if len(whole) == 1:
            return {"features": whole[0].features, "labels": whole[0].labels}
        return {"features": join_features(whole), "labels": join_texts(whole, end)}


def position_of(seconds: float) -> int:
    """Of the encoder, the nearest."""
    samples_per_position = FRAMES_PER_POSITION * HOP_LENGTH_IN_SAMPLES
    return round(seconds * SAMPLE_RATE_IN_HZ / samples_per_position)


def build_packer(
    sets: tuple[SpeechDataset, ...],
    *,
    packs_utterances: bool,
    timestamp_probability: float,
    written_languages: Sequence[str | None],
    seed: int,
) -> UtterancePacker | None:
    """None if nothing is packed and nothing has timestamps, so that utterances stay as they are.
    written_languages: codes of the languages that each source's texts are written in, None where
    unknown. seed: of the draw of timestamps, `SpeechStream.rank_seed`."""
    if not sets or not (packs_utterances or timestamp_probability > 0):
        return None
    separators = ["" if code in UNSPACED_LANGUAGES else " " for code in written_languages]
    return UtterancePacker(
        tokenizers=[dataset.preprocessor.tokenizer for dataset in sets],
        separators=separators,
        window_in_frames=sets[0].preprocessor.window_in_frames,
        max_label_length=sets[0].preprocessor.max_label_length,
        packs_utterances=packs_utterances,
        timestamp_probability=timestamp_probability,
        seed=seed,
    )
