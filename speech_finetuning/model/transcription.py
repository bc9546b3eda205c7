"""Recordings of any length to words with times: what demo.py and `bash run.sh transcribe` share.

With the model's own timestamps (the library's long-form generation) if it predicts them; else window
by window, cut at pauses and decoded as models are scored in training.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from speech_finetuning.data.audio import SAMPLE_RATE_IN_HZ
from speech_finetuning.data.long_audio import is_silent
from speech_finetuning.model.generation import (
    NUM_PROMPT_TOKENS,
    generate_after_prompts,
    generate_ids,
)
from speech_finetuning.model.recogniser import Recogniser
from speech_finetuning.model.windows import attention_of_any_length

PAUSE_IN_SAMPLES = 800  # 50 ms, the shortest pause between two words
MIN_TIMESTAMP_SHARE = 0.01  # see predicts_timestamps

Segment = tuple[float, float, str]  # start and end in seconds, words
Piece = tuple[int, int, int]  # number of the recording, first and last sample


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """What was heard in one recording."""

    segments: list[Segment]
    language: str  # "en" of an English-only model
    has_model_times: bool  # else a segment is a window of up to 30 s, cut at pauses

    @property
    def text(self) -> str:
        return " ".join(text for _, _, text in self.segments)


def cut_at_pauses(waveform: np.ndarray, window: int) -> list[tuple[int, int]]:
    """(start, end) samples of consecutive pieces of at most window samples, each cut at the
    quietest place of the window's last quarter, so that few words are cut in two. waveform:
    (n_samples,)."""
    cuts = [0]
    while len(waveform) - cuts[-1] > window:
        first = cuts[-1] + 3 * window // 4
        last_quarter = waveform[first : cuts[-1] + window]
        whole_blocks = last_quarter[: len(last_quarter) // PAUSE_IN_SAMPLES * PAUSE_IN_SAMPLES]
        blocks = whole_blocks.reshape(-1, PAUSE_IN_SAMPLES)
        quietest = int(np.square(blocks).mean(axis=1).argmin())
        cuts.append(first + quietest * PAUSE_IN_SAMPLES + PAUSE_IN_SAMPLES // 2)
    return list(itertools.pairwise([*cuts, len(waveform)]))


def extract_features(recogniser: Recogniser, waveforms: list[np.ndarray]) -> torch.Tensor:
    """Log-mel spectrograms (batch, n_mels, n_frames) of whole clips, at least a window long, for
    the model's device; several clips must fit into the window."""
    extractor: Any = recogniser.processor.feature_extractor
    features = extractor(
        waveforms,
        sampling_rate=SAMPLE_RATE_IN_HZ,
        return_tensors="pt",
        padding="max_length",
        max_length=recogniser.window_in_samples,
        truncation=False,
    ).input_features
    return features.to(recogniser.model.device, recogniser.model.dtype)


def first_window(recogniser: Recogniser, waveform: np.ndarray) -> torch.Tensor:
    """Features (1, n_mels, n_frames) of the beginning of (n_samples,)."""
    return extract_features(recogniser, [waveform[: recogniser.window_in_samples]])


def choose_prompt(
    recogniser: Recogniser, window: torch.Tensor, language: str, task: str
) -> dict[str, str]:
    """`generate`'s language and task, as far as this model has them; a language that it lacks is
    detected in the clip's first window, (1, n_mels, n_frames)."""
    prompt = {"task": task} if task in recogniser.tasks else {}
    if recogniser.languages and language not in recogniser.languages:
        config: Any = recogniser.model.generation_config
        tokens = {token_id: token for token, token_id in config.lang_to_id.items()}
        language = tokens[recogniser.model.detect_language(window).item()].strip("<|>")
    return {"language": language, **prompt} if recogniser.languages else prompt


def first_tokens(config: Any, prompt: dict[str, str]) -> list[int]:
    """Ids of <|startoftranscript|>, language and task, as far as the model has them. config: for
    generation."""
    tokens = [config.decoder_start_token_id]
    tokens += [config.lang_to_id[f"<|{prompt['language']}|>"]] if "language" in prompt else []
    tokens += [config.task_to_id[prompt["task"]]] if "task" in prompt else []
    return tokens


@torch.no_grad()
def predicts_timestamps(
    recogniser: Recogniser, window: torch.Tensor, prompt: dict[str, str]
) -> bool:
    """Whether this model may begin with a timestamp instead of <|notimestamps|>. Fine-tuning
    without timestamps unlearns them: a tiny model with 1 % WER gave them 0.1 %, and dropped half of
    the words when made to use them.
    window: (1, n_mels, n_frames)."""
    config: Any = recogniser.model.generation_config
    without = getattr(config, "no_timestamps_token_id", None)
    if without is None:
        return False
    decoder_input_ids = torch.tensor([first_tokens(config, prompt)], device=window.device)
    outputs = recogniser.model(input_features=window, decoder_input_ids=decoder_input_ids)
    # The timestamps follow to the end of the vocabulary.
    share = outputs.logits[0, -1, without:].float().softmax(dim=-1)
    return 1 - share[0].item() >= MIN_TIMESTAMP_SHARE


@attention_of_any_length()
def transcribe_with_timestamps(
    recogniser: Recogniser,
    features: torch.Tensor,
    durations_in_seconds: list[float],
    prompts: list[dict[str, str]],
    prompt_ids: Sequence[int] = (),
) -> list[list[Segment] | None]:
    """The library's long-form generation: the model says where a segment ends, and goes on
    listening there.
    None where the times cannot be true. features: (batch, n_mels, n_frames); prompt_ids: read
    before every window, see `prompting`."""
    window_in_seconds = recogniser.window_in_samples / SAMPLE_RATE_IN_HZ
    # Called before each window. It bounds their number: an end at 0.02 s would move the model on by
    # only 0.02 s.
    calls = iter(range(4 * math.ceil(max(durations_in_seconds) / window_in_seconds) + 4))
    try:
        found: Any = recogniser.model.generate(
            input_features=features,
            return_timestamps=True,
            return_segments=True,
            monitor_progress=partial(count_window, calls),
            **joint_prompt(prompts),
            **read_before(recogniser, prompt_ids),
        )
    except StopIteration:
        return [None] * len(prompts)
    return [
        plausible_segments(recogniser, segments, duration)
        for segments, duration in zip(found["segments"], durations_in_seconds, strict=True)
    ]


def joint_prompt(prompts: list[dict[str, str]]) -> dict[str, Any]:
    """`generate`'s arguments for a batch: one task, and a language for each clip."""
    generation: dict[str, Any] = dict(prompts[0])
    if "language" in generation:
        generation["language"] = [prompt["language"] for prompt in prompts]
    return generation


def read_before(recogniser: Recogniser, prompt_ids: Sequence[int]) -> dict[str, Any]:
    """`generate`'s arguments for what is read before every window; none without it."""
    if not prompt_ids:
        return {}
    generation: dict[str, Any] = {
        "prompt_ids": torch.tensor(prompt_ids, device=recogniser.model.device)
    }
    config: Any = recogniser.model.generation_config
    if config.max_new_tokens is not None:  # with too many the library fails (transformers 5.24)
        positions = recogniser.model.config.max_target_positions
        room = positions - NUM_PROMPT_TOKENS - len(prompt_ids)
        generation["max_new_tokens"] = min(config.max_new_tokens, room)
    return generation


def count_window(calls: Any, progress: Any) -> None:
    """Raises: StopIteration when there have been too many."""
    next(calls)


def plausible_segments(
    recogniser: Recogniser, found: list[dict[str, Any]], duration_in_seconds: float
) -> list[Segment] | None:
    """The library's segments of one clip; None if their times cannot be true."""
    tokenizer: Any = recogniser.processor.tokenizer
    pieces = []
    for part in found:
        text = tokenizer.decode(part["tokens"].tolist(), skip_special_tokens=True).strip()
        pieces.append((float(part["start"]), float(part["end"]), text))
    if not are_plausible(pieces, recogniser.window_in_samples / SAMPLE_RATE_IN_HZ):
        return None
    # The last window is filled up with silence, in which segments may end or even begin.
    return [
        (start, min(end, duration_in_seconds), text)
        for start, end, text in pieces
        if text and start < duration_in_seconds
    ]


def are_plausible(segments: list[Segment], window_in_seconds: float) -> bool:
    """Whether the segments are in order, and none is longer than what the model hears at once."""
    starts = [start for start, _, _ in segments]
    return starts == sorted(starts) and all(
        0 <= end - start <= window_in_seconds + 0.02 for start, end, _ in segments
    )


def transcribe_windows(
    recogniser: Recogniser,
    waveforms: list[np.ndarray],
    prompts: list[dict[str, str]],
    batch_size: int,
    prompt_ids: Sequence[int] = (),
) -> list[list[Segment]]:
    """One segment for each window of each recording, decoded as models are scored in training.
    waveforms: (n_samples,) each; batch_size: windows at a time; prompt_ids: read before every
    window, see `prompting`."""
    pieces: list[Piece] = []
    for number, waveform in enumerate(waveforms):
        for start, end in cut_at_pauses(waveform, recogniser.window_in_samples):
            if not is_silent(waveform[start:end]):  # Whisper invents words for silence
                pieces.append((number, start, end))
    segments: list[list[Segment]] = [[] for _ in waveforms]
    for first in range(0, len(pieces), batch_size):
        batch = pieces[first : first + batch_size]
        texts = transcribe_batch(
            recogniser,
            [waveforms[number][start:end] for number, start, end in batch],
            [prompts[number] for number, _, _ in batch],
            prompt_ids,
        )
        for (number, start, end), text in zip(batch, texts, strict=True):
            if text:
                times = (start / SAMPLE_RATE_IN_HZ, end / SAMPLE_RATE_IN_HZ)
                segments[number].append((*times, text))
    return segments


@torch.no_grad()
@attention_of_any_length()
def transcribe_batch(
    recogniser: Recogniser,
    clips: list[np.ndarray],
    prompts: list[dict[str, str]],
    prompt_ids: Sequence[int] = (),
) -> list[str]:
    """The words of clips that fit into the window, (n_samples,) each."""
    model = recogniser.model
    encoded = model.get_encoder()(extract_features(recogniser, clips))
    if prompt_ids:
        config: Any = model.generation_config
        end = [config.no_timestamps_token_id]
        given = [[*prompt_ids, *first_tokens(config, prompt), *end] for prompt in prompts]
        decoder_input_ids = torch.tensor(given, device=model.device)
        ids = generate_after_prompts(
            model,
            encoded,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=torch.ones_like(decoder_input_ids),
            max_new_tokens=config.max_new_tokens,
        )
    else:
        ids = generate_ids(model, encoded, **joint_prompt(prompts))
    tokenizer: Any = recogniser.processor.tokenizer
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids.tolist()]


def transcribe(
    recogniser: Recogniser,
    waveforms: list[np.ndarray],
    *,
    language: str,
    task: str,
    batch_size: int = 1,
    prompt_ids: Sequence[int] = (),
) -> list[Transcript]:
    """The words of recordings, (n_samples,) each at 16 kHz. language: a code that the model has, or
    anything else to have it detected in each; batch_size: windows at a time; prompt_ids: read
    before every window, see `prompting`."""
    prompts = []
    for waveform in waveforms:
        needs_window = bool(recogniser.languages) and language not in recogniser.languages
        window = first_window(recogniser, waveform) if needs_window else torch.empty(0)
        prompts.append(choose_prompt(recogniser, window, language, task))
    timed = transcribe_timed(recogniser, waveforms, prompts, batch_size, prompt_ids)
    untimed = [number for number in range(len(waveforms)) if timed.get(number) is None]
    windows = transcribe_windows(
        recogniser,
        [waveforms[number] for number in untimed],
        [prompts[number] for number in untimed],
        batch_size,
        prompt_ids,
    )
    found = {**timed, **dict(zip(untimed, windows, strict=True))}
    return [
        Transcript(
            segments=found[number] or [],
            language=prompt.get("language", "en"),
            has_model_times=number not in untimed,
        )
        for number, prompt in enumerate(prompts)
    ]


def transcribe_timed(
    recogniser: Recogniser,
    waveforms: list[np.ndarray],
    prompts: list[dict[str, str]],
    batch_size: int,
    prompt_ids: Sequence[int] = (),
) -> dict[int, list[Segment] | None]:
    """By the number of the recording, with the model's own timestamps; not there, or None, where it
    has none for this language and task, or where its times cannot be true."""
    batches: list[list[int]] = []
    for number, (waveform, prompt) in enumerate(zip(waveforms, prompts, strict=True)):
        if not has_timestamps(recogniser, waveform, prompt):
            continue
        is_long = len(waveform) > recogniser.window_in_samples
        if is_long or not batches or len(batches[-1]) == batch_size:
            batches.append([number])
        elif len(waveforms[batches[-1][0]]) > recogniser.window_in_samples:
            batches.append([number])  # a long recording is generated alone
        else:
            batches[-1].append(number)
    timed: dict[int, list[Segment] | None] = {}
    for batch in batches:
        clips = [waveforms[number] for number in batch]
        segments = transcribe_with_timestamps(
            recogniser,
            extract_features(recogniser, clips),
            [len(clip) / SAMPLE_RATE_IN_HZ for clip in clips],
            [prompts[number] for number in batch],
            prompt_ids,
        )
        timed |= dict(zip(batch, segments, strict=True))
    return timed


def has_timestamps(recogniser: Recogniser, waveform: np.ndarray, prompt: dict[str, str]) -> bool:
    """`predicts_timestamps`, asked at the first recording of each language and task."""
    asked_for = (prompt.get("language", ""), prompt.get("task", ""))
    if asked_for not in recogniser.has_timestamps:
        window = first_window(recogniser, waveform)
        recogniser.has_timestamps[asked_for] = predicts_timestamps(recogniser, window, prompt)
    return recogniser.has_timestamps[asked_for]
