"""Utterances that share a window, with or without timestamps."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from speech_finetuning.data.audio import (
    FRAMES_PER_POSITION,
    HOP_LENGTH_IN_SAMPLES,
    SAMPLE_RATE_IN_HZ,
    pad_features,
)
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.text import UNSPACED_LANGUAGES


def joined_frames(utterance: dict[str, Any]) -> int:
    """Frames that it takes in a pack: whole positions of the encoder, so that a joint lies on a timestamp."""
    num_samples = round(utterance["duration"] * SAMPLE_RATE_IN_HZ)
    return FRAMES_PER_POSITION * math.ceil(
        num_samples / (FRAMES_PER_POSITION * HOP_LENGTH_IN_SAMPLES)
    )


def pack_utterances(
    utterances: list[dict[str, Any]], window_in_frames: int, max_label_length: int
) -> list[list[dict[str, Any]]]:
    """Consecutive utterances in groups that fit into one window and, with two timestamps each, into max_label_length.
    utterances: with `duration` in seconds and `segment`, the token ids of the text."""
    packs: list[list[dict[str, Any]]] = []
    frames_left = labels_left = 0
    for utterance in utterances:
        frames, num_labels = joined_frames(utterance), len(utterance["segment"]) + 2
        if frames > frames_left or num_labels > labels_left:
            packs.append([])
            frames_left, labels_left = window_in_frames, max_label_length
        packs[-1].append(utterance)
        frames_left, labels_left = frames_left - frames, labels_left - num_labels
    return packs


def join_features(utterances: list[dict[str, Any]]) -> torch.Tensor:
    """Log-mel of the utterances end to end, (n_mels, n_frames): what `log_mel` makes of their joined waveforms but for
    the frames beside a joint, which see one clip only; all are limited to 8 (2 after scaling) below the loudest."""
    pairs = [(utterance["features"], joined_frames(utterance)) for utterance in utterances]
    clips = (
        pad_features(clip[:, :size], [min(size, clip.shape[1])], size)[0] for clip, size in pairs
    )
    frames = torch.cat(list(clips), dim=1)
    return frames.clamp(min=float(frames.max()) - 2.0)


def join_labels(
    utterances: list[dict[str, Any]], prefix: list[int], end: int, has_timestamps: bool
) -> list[int]:
    """Token ids of a pack; with timestamps, each text between those of its start and its end, as in pre-training.
    prefix: ends in <|notimestamps|>, which timestamps replace; the next token is <|0.00|>."""
    labels, position = prefix[:-1], prefix[-1] + 1
    if not has_timestamps:
        texts = (utterance["segment"] for utterance in utterances[1:])
        return [*utterances[0]["labels"][:-1], *itertools.chain(*texts), end]
    for utterance in utterances:
        begin, position = position, position + joined_frames(utterance) // FRAMES_PER_POSITION
        labels = [*labels, begin, *utterance["segment"], position]
    return [*labels, end]


@dataclass
class UtterancePacker:
    """The utterances of a micro-batch to its windows: packed (--pack_utterances), with timestamps
    (--timestamp_probability). A micro-batch stays a fixed number of rows, so that the position in the stream, and the
    rows of a step, are those of an unpacked run."""

    tokenizers: tuple[transformers.WhisperTokenizer, ...]  # of each source
    separators: tuple[str, ...]  # before the text of a segment
    window_in_frames: int
    max_label_length: int
    is_packing: bool
    timestamp_probability: float
    seed: int

    def __call__(
        self, utterances: list[tuple[dict[str, Any], dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """utterances: (position, example), in the order of the stream; only those of one source share a window."""
        windows = []
        for number in sorted({position["last"] for position, _ in utterances}):
            tokenizer, separator = self.tokenizers[number], self.separators[number]
            mine = [
                {**example, "row": at["row"]} for at, example in utterances if at["last"] == number
            ]
            for example in mine:
                # With a space, also the first one: long-form generation joins the texts of windows as they are.
                example["segment"] = tokenizer(
                    separator + example["text"], add_special_tokens=False
                ).input_ids
            room = self.max_label_length - len(tokenizer.prefix_tokens) + 1
            packs = (
                pack_utterances(mine, self.window_in_frames, room)
                if self.is_packing
                else [[e] for e in mine]
            )
            windows += [self.join(pack, tokenizer, room) for pack in packs]
        return windows

    def join(
        self, pack: list[dict[str, Any]], tokenizer: transformers.WhisperTokenizer, room: int
    ) -> dict[str, Any]:
        """One example of a pack. Its first row decides on timestamps; a pack that has them has them at every joint."""
        is_marked = (
            np.random.default_rng([self.seed, pack[0]["row"], 1]).random()
            < self.timestamp_probability
        )
        is_marked &= (
            sum(len(example["segment"]) + 2 for example in pack) <= room
        )  # a single one may be longer
        if len(pack) == 1 and not is_marked:
            return pack[0]
        labels = join_labels(pack, tokenizer.prefix_tokens, tokenizer.eos_token_id, is_marked)
        return {"features": join_features(pack), "labels": labels}


def build_packer(
    sets: tuple[SpeechDataset, ...],
    readings: dict[str, tuple[str | None, bool]],
    data_args: Any,
    seed: int,
) -> UtterancePacker | None:
    """What --pack_utterances and --timestamp_probability ask for. readings: the language of each record, first."""
    if not sets or not (data_args.pack_utterances or data_args.timestamp_probability):
        return None
    tokenizers = tuple(item.preparer.tokenizer for item in sets)
    written = [
        "en" if data_args.task == "translate" else readings[item.source.record][0] for item in sets
    ]
    separators = tuple("" if language in UNSPACED_LANGUAGES else " " for language in written)
    limits = (sets[0].preparer.window_in_frames, sets[0].preparer.max_label_length)
    how = (data_args.pack_utterances, data_args.timestamp_probability, seed)
    return UtterancePacker(tokenizers, separators, *limits, *how)
