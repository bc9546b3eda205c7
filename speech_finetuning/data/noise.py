"""Recordings that are kept in memory: noise, and impulse responses of rooms.

They come through the doors of all other data: a folder, a list or a data set of the Hub, which
reads only itself. What cannot be used is counted and left out.
"""

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from speech_finetuning.base.errors import Problems, UserError
from speech_finetuning.base.files import counted
from speech_finetuning.base.rejections import Rejection, describe_counts
from speech_finetuning.data.audio import SAMPLE_RATE_IN_HZ, accept_duration, decode_audio
from speech_finetuning.data.augmentation import INT16_RANGE, USUAL_SNR_IN_DB, Augmenter
from speech_finetuning.data.reading import read_patiently
from speech_finetuning.data.shards import ShardReader, SourceRow
from speech_finetuning.data.sources import MissingSplit, SpeechSource, load_source

logger = logging.getLogger(__name__)

MOST_RECORDINGS = 200  # of a larger set an even sample
NOISE_IN_SECONDS = 6_000.0  # of all recordings together: 192 MB
SHORTEST_SHARE_IN_SECONDS = 30.0  # of one recording
SHORTEST_NOISE_IN_SECONDS = 0.1
LONGEST_RECORDING_IN_SECONDS = 3_600.0
LONGEST_RESPONSE_IN_SECONDS = 3.0  # large halls


@dataclass(frozen=True, kw_only=True)
class RecordingSet:
    """What a flag names. flag: --noise_dataset or --room_dataset."""

    flag: str
    name: str
    cache_dir: str | None
    wait_in_seconds: float

    def open(self) -> SpeechSource:
        """Its training split, or the only one. Raises: UserError."""
        load = functools.partial(
            load_source, self.name, text_required=False, cache_dir=self.cache_dir
        )
        try:
            try:
                return load(split="train")
            except MissingSplit as error:
                if len(error.found) != 1:
                    raise
                return load(split=error.found[0])
        except UserError as error:  # which takes it for the speech
            raise UserError(
                *(message.replace("--dataset_name", self.flag) for message in error.args)
            ) from error

    def rows(self, source: SpeechSource) -> Iterator[SourceRow]:
        """At most MOST_RECORDINGS of its rows, evenly spread if their number is known."""
        step = max(1, math.ceil((source.num_rows or 0) / MOST_RECORDINGS))
        number = 0
        for shard in source.shards():
            reader = ShardReader(source, shard, num_rows=0, wait_in_seconds=self.wait_in_seconds)
            for row in reader:
                if number % step == 0:
                    yield row
                number += 1
                if number == step * MOST_RECORDINGS:
                    return

    def read(
        self, source: SpeechSource, keep: Callable[[np.ndarray], np.ndarray]
    ) -> list[np.ndarray]:
        """What `keep` makes of each recording, float32 at 16 kHz; it may raise Rejection.
        Raises: UserError if none can be used."""
        kept = []
        reasons: Counter[str] = Counter()
        for row in self.rows(source):
            try:
                kept.append(keep(self.decode(row)))
            except Rejection as rejection:
                reasons[rejection.reason] += 1
        if not kept:
            found = f": {describe_counts(reasons)}" if reasons else ""
            raise UserError(
                f"{self.flag} {self.name}: no usable recording{found}. Name a folder of audio files."
            )
        if reasons:
            logger.warning("%s: left out: %s", self.flag, describe_counts(reasons))
        return kept

    def decode(self, row: SourceRow) -> np.ndarray:
        """Raises: Rejection."""
        if row.rejection is not None:
            raise row.rejection
        data = read_patiently(row.audio, self.wait_in_seconds)
        return decode_audio(data, check_recording)[0]


def check_recording(seconds: float) -> None:
    """Raises: Rejection of what would take too much memory to decode."""
    accept_duration(seconds)
    if seconds > LONGEST_RECORDING_IN_SECONDS:
        raise Rejection("audio_too_long", f"{seconds:.0f} s, the limit is an hour")


def keep_noise(waveform: np.ndarray, longest_in_seconds: float) -> np.ndarray:
    """int16, the loudest sample at full scale: the middle of what is too long.
    Raises: Rejection of what cannot be heard."""
    if len(waveform) < SHORTEST_NOISE_IN_SECONDS * SAMPLE_RATE_IN_HZ:
        raise Rejection("audio_too_short", f"{len(waveform)} samples")
    longest = int(longest_in_seconds * SAMPLE_RATE_IN_HZ)
    start = max(0, len(waveform) - longest) // 2
    piece = waveform[start : start + longest]
    peak = float(np.max(np.abs(piece)))
    if peak == 0:
        raise Rejection("audio_empty", "digital silence")
    return np.round(piece / peak * (INT16_RANGE - 1)).astype(np.int16)


def keep_response(waveform: np.ndarray) -> np.ndarray:
    """float32, its beginning. Raises: Rejection of digital silence."""
    response = waveform[: int(LONGEST_RESPONSE_IN_SECONDS * SAMPLE_RATE_IN_HZ)].copy()
    if not np.any(response):
        raise Rejection("audio_empty", "digital silence")
    return response


def load_noises(recordings: RecordingSet) -> list[np.ndarray]:
    """int16 at 16 kHz; of few recordings more of each. Raises: UserError."""
    source = recordings.open()
    num_recordings = min(source.num_rows or MOST_RECORDINGS, MOST_RECORDINGS)
    share_in_seconds = max(SHORTEST_SHARE_IN_SECONDS, NOISE_IN_SECONDS / num_recordings)
    keep = functools.partial(keep_noise, longest_in_seconds=share_in_seconds)
    noises = recordings.read(source, keep)
    minutes = sum(map(len, noises)) / SAMPLE_RATE_IN_HZ / 60
    logger.info("noise: %s, %.1f minutes", counted(len(noises), "recording"), minutes)
    return noises


def load_rooms(recordings: RecordingSet) -> list[np.ndarray]:
    """Impulse responses, float32 at 16 kHz. Raises: UserError."""
    responses = recordings.read(recordings.open(), keep_response)
    logger.info("rooms: %s", counted(len(responses), "impulse response"))
    return responses


def load_augmenter(args: Any, cache_dir: str | None) -> Augmenter | None:
    """None if training clips stay as they are. args: AugmentationArguments and how long a network
    is waited for. Raises: UserError with all that cannot be opened."""
    wanted = (
        args.noise_dataset,
        args.room_dataset,
        args.telephone_probability,
        args.gain_in_db,
        args.nonspeech_fraction,
    )
    if not any(wanted):
        return None
    problems = Problems()
    found: dict[str, list[np.ndarray]] = {"noise": [], "room": []}
    for kind, load in (("noise", load_noises), ("room", load_rooms)):
        name = getattr(args, f"{kind}_dataset")
        if name is None:
            continue
        recordings = RecordingSet(
            flag=f"--{kind}_dataset",
            name=name,
            cache_dir=cache_dir,
            wait_in_seconds=args.max_network_wait_in_seconds,
        )
        found[kind] = problems.attempt(kind, load, recordings) or []
    problems.raise_if_any()
    if args.nonspeech_fraction:
        logger.info(
            "no speech: %g %% of the training rows become noise or silence without a text "
            "(--nonspeech_fraction)",
            100 * args.nonspeech_fraction,
        )
    return Augmenter(
        rooms=found["room"],
        room_probability=args.room_probability,
        noises=found["noise"],
        noise_probability=args.noise_probability,
        snr_in_db=pair_of(args.noise_snr_in_db) or USUAL_SNR_IN_DB,
        telephone_probability=args.telephone_probability,
        gain_in_db=pair_of(args.gain_in_db),
        nonspeech_fraction=args.nonspeech_fraction,
    )


def pair_of(values: list[float]) -> tuple[float, float] | None:
    if not values:
        return None
    low, high = values
    return low, high
