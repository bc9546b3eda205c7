"""Speech as it sounds elsewhere: in a room, in noise, on the telephone, louder or softer.

Of training rows only. What is drawn for a row depends on the seed and on the row's number in the
stream, as its speed does, so that a run that goes on draws the same, whatever the threads. Each of
the four draws for itself: one that is added changes nothing about the others.

A clip keeps its length, and its words their times: an echo comes after what it echoes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import soxr

from speech_finetuning.data.audio import SAMPLE_RATE_IN_HZ

USUAL_SNR_IN_DB = (5.0, 20.0)  # as Kaldi's recipes add MUSAN's noises, and quieter ones
# Numbers of the independent draws for a row; 1 is that of its timestamps (data/packing.py).
ROOM_DRAW = 2
NOISE_DRAW = 3
TELEPHONE_DRAW = 4
GAIN_DRAW = 5
SILENT_POWER = 1e-10  # 100 dB below full scale: nothing to add noise to, and no noise
INT16_RANGE = 2.0**15
TELEPHONE_RATE_IN_HZ = 8_000
TELEPHONE_BAND_IN_HZ = (300.0, 3400.0)  # ITU-T G.712
MU = 255.0  # of the companding of ITU-T G.711
MU_LAW_LEVELS = 127  # of each sign
MU_LAW_SIZES = ((1 + MU) ** (np.arange(MU_LAW_LEVELS + 1) / MU_LAW_LEVELS) - 1) / MU
MU_LAW_SIZES = MU_LAW_SIZES.astype(np.float32)


@dataclass
class AugmentationArguments:
    """What training clips are made to sound like."""

    noise_dataset: str | None = field(
        default=None,
        metadata={"help": "Folder or data set of noise that is mixed into training clips."},
    )
    noise_probability: float = field(
        default=0.5, metadata={"help": "Share of training clips with noise."}
    )
    noise_snr_in_db: list[float] = field(
        default_factory=list,
        metadata={"help": "LOW HIGH: speech above the noise, in dB; default: 5 20."},
    )
    room_dataset: str | None = field(
        default=None, metadata={"help": "Folder or data set of impulse responses of rooms."}
    )
    room_probability: float = field(
        default=0.5, metadata={"help": "Share of training clips within a room."}
    )
    telephone_probability: float = field(
        default=0.0, metadata={"help": "Share of training clips as a telephone sends them."}
    )
    gain_in_db: list[float] = field(
        default_factory=list,
        metadata={"help": "LOW HIGH: makes each training clip so much louder, as -10 5."},
    )
    nonspeech_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of training rows that become noise or silence without a text."},
    )


# --------------------------------------------------------------------------------- the sounds


def power_of(waveform: np.ndarray) -> float:
    """Mean square of (n_samples,) samples."""
    return float(np.dot(waveform, waveform)) / len(waveform)


def excerpt(recording: np.ndarray, num_samples: int, generator: np.random.Generator) -> np.ndarray:
    """(num_samples,) float32 of an int16 recording, from a place that is drawn; a shorter one goes
    on from its beginning."""
    if len(recording) >= num_samples:
        start = int(generator.integers(len(recording) - num_samples + 1))
        piece = recording[start : start + num_samples]
    else:
        start = int(generator.integers(len(recording)))
        piece = recording[(start + np.arange(num_samples)) % len(recording)]
    return (piece / INT16_RANGE).astype(np.float32)


def add_noise(waveform: np.ndarray, noise: np.ndarray, snr_in_db: float) -> np.ndarray:
    """Both (n_samples,) float32. The ratio is that of their mean powers over the whole clip, pauses
    included. Unchanged if either is silent."""
    power = power_of(waveform)
    noise_power = power_of(noise)
    if power < SILENT_POWER or noise_power < SILENT_POWER:
        return waveform
    factor = np.sqrt(power / noise_power / 10 ** (snr_in_db / 10))
    return waveform + np.float32(factor) * noise


def size_of_transform(num_samples: int) -> int:
    """The smallest 2^a 3^b 5^c that is no less: other sizes take several times as long."""
    sizes = []
    for power_of_five in (1, 5, 25, 125):
        for power_of_three in (1, 3, 9, 27, 81):
            factor = power_of_five * power_of_three
            sizes.append(factor * 2 ** max(0, math.ceil(math.log2(num_samples / factor))))
    return min(sizes)


def convolve(waveform: np.ndarray, response: np.ndarray) -> np.ndarray:
    """(n + m - 1,) float32 of two float32: numpy.convolve to a millionth of the loudest sample, in
    the time of three transforms."""
    num_samples = len(waveform) + len(response) - 1
    size = size_of_transform(num_samples)
    spectrum = np.fft.rfft(waveform, size) * np.fft.rfft(response, size)
    return np.fft.irfft(spectrum, size)[:num_samples].astype(np.float32)


def reverberate(waveform: np.ndarray, response: np.ndarray) -> np.ndarray:
    """(n_samples,) float32 in a room, of the same power. response: whose loudest sample is taken
    for the direct path, which keeps its time."""
    direct = int(np.argmax(np.abs(response)))
    echoed = convolve(waveform, response)[direct : direct + len(waveform)]
    power = power_of(echoed)
    if power < SILENT_POWER:
        return waveform
    return echoed * np.float32(np.sqrt(power_of(waveform) / power))


def telephone(waveform: np.ndarray) -> np.ndarray:
    """(n_samples,) float32 at 16 kHz after a telephone line: 300 to 3,400 Hz, 8 kHz, mu-law of 8
    bits."""
    narrow = soxr.resample(waveform, SAMPLE_RATE_IN_HZ, TELEPHONE_RATE_IN_HZ, "HQ")
    if len(narrow) == 0:
        return waveform
    size = size_of_transform(len(narrow))
    spectrum = np.fft.rfft(narrow, size)
    frequencies = np.fft.rfftfreq(size, 1 / TELEPHONE_RATE_IN_HZ)
    low, high = TELEPHONE_BAND_IN_HZ
    spectrum[(frequencies < low) | (frequencies > high)] = 0
    sent = mu_law(np.fft.irfft(spectrum, size)[: len(narrow)].astype(np.float32))
    wide = soxr.resample(sent, TELEPHONE_RATE_IN_HZ, SAMPLE_RATE_IN_HZ, "HQ")
    received = np.zeros_like(waveform)
    received[: len(wide)] = wide[: len(waveform)]
    return received


def mu_law(waveform: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] at the nearest of the levels that ITU-T G.711 sends, by its formula."""
    size = np.log1p(np.float32(MU) * np.minimum(np.abs(waveform), 1)) / np.float32(np.log1p(MU))
    level = np.round(size * MU_LAW_LEVELS).astype(np.intp)
    return np.sign(waveform) * MU_LAW_SIZES[level]


def within_range(waveform: np.ndarray) -> np.ndarray:
    """As a whole so soft that no sample is cut off."""
    peak = float(np.max(np.abs(waveform)))
    return waveform if peak <= 1.0 else waveform / np.float32(peak)


# ----------------------------------------------------------------------------------- the draw


@dataclass(frozen=True, kw_only=True)
class Augmenter:
    """What may happen to a training clip, in this order: a room, noise, the telephone, gain.
    Pickles; threads share it."""

    rooms: Sequence[np.ndarray] = ()  # impulse responses, float32 at 16 kHz
    room_probability: float = 0.0
    noises: Sequence[np.ndarray] = ()  # recordings, int16 at 16 kHz
    noise_probability: float = 0.0
    snr_in_db: tuple[float, float] = USUAL_SNR_IN_DB
    telephone_probability: float = 0.0
    gain_in_db: tuple[float, float] | None = None  # None: as it is
    nonspeech_fraction: float = 0.0  # of rows whose clip is replaced, see `nonspeech`

    def __call__(self, waveform: np.ndarray, seed: Sequence[int]) -> np.ndarray:
        """(n_samples,) float32 at 16 kHz in [-1, 1], of the same length. seed: of the row."""
        drawn = draw(seed, ROOM_DRAW, self.room_probability if self.rooms else 0.0)
        if drawn is not None:
            room = self.rooms[int(drawn.integers(len(self.rooms)))]
            waveform = within_range(reverberate(waveform, room))
        drawn = draw(seed, NOISE_DRAW, self.noise_probability if self.noises else 0.0)
        if drawn is not None:
            recording = self.noises[int(drawn.integers(len(self.noises)))]
            snr_in_db = drawn.uniform(*self.snr_in_db)
            noise = excerpt(recording, len(waveform), drawn)
            waveform = within_range(add_noise(waveform, noise, snr_in_db))
        drawn = draw(seed, TELEPHONE_DRAW, self.telephone_probability)
        if drawn is not None:
            waveform = within_range(telephone(waveform))
        if self.gain_in_db is not None:
            generator = np.random.default_rng([*seed, GAIN_DRAW])
            factor = 10 ** (generator.uniform(*self.gain_in_db) / 20)
            waveform = within_range(waveform * np.float32(factor))
        return waveform


def draw(seed: Sequence[int], number: int, probability: float) -> np.random.Generator | None:
    """The generator of one of the draws if it is this row's turn."""
    if probability == 0:
        return None
    generator = np.random.default_rng([*seed, number])
    return generator if generator.random() < probability else None
