"""Clips in which nobody speaks, for a model that would write something all the same.

A row that is drawn keeps its place and its length, loses its text, and sounds of nothing: of a noise
recording, of made noise, or not at all. Which rows these are, and what they sound like, is drawn by
the row's seed, as augmentation is.
"""

from collections.abc import Sequence

import numpy as np

from speech_finetuning.data.audio import SAMPLE_RATE_IN_HZ
from speech_finetuning.data.augmentation import SILENT_POWER, excerpt, power_of, within_range

# Of the row's own draw, beside those of `augmentation` and `prompts`.
NONSPEECH_DRAW = 7
# From a quiet room to noise that is as loud as speech.
LEVEL_IN_DBFS = (-70.0, -20.0)
# Power falls with frequency to the minus: 0 is white, 1 pink, 2 brown.
COLOURS = (0.0, 2.0)
SHARE_OF_SILENCE = 0.1  # all samples 0
SHARE_OF_RECORDINGS = 0.7  # of the rest, where there are any
LOWEST_FREQUENCY_IN_HZ = 20.0  # below it made noise is flat: brown noise would be one slow wave


def make_nonspeech(
    waveform: np.ndarray, recordings: Sequence[np.ndarray], seed: Sequence[int]
) -> np.ndarray:
    """(n_samples,) float32 in [-1, 1] in which nobody speaks, as long as the waveform. recordings:
    int16 at 16 kHz, without speech. seed: of the row."""
    generator = np.random.default_rng([*seed, NONSPEECH_DRAW, 1])
    num_samples = len(waveform)
    if generator.random() < SHARE_OF_SILENCE or num_samples == 0:
        return np.zeros_like(waveform)
    if recordings and generator.random() < SHARE_OF_RECORDINGS:
        recording = recordings[int(generator.integers(len(recordings)))]
        noise = excerpt(recording, num_samples, generator)
    else:
        noise = coloured_noise(num_samples, generator.uniform(*COLOURS), generator)
    return within_range(at_level(noise, generator.uniform(*LEVEL_IN_DBFS)))


def coloured_noise(num_samples: int, colour: float, generator: np.random.Generator) -> np.ndarray:
    """(num_samples,) float32 whose power falls with frequency ** -colour."""
    spectrum = np.fft.rfft(generator.normal(size=num_samples))
    frequencies = np.fft.rfftfreq(num_samples, 1 / SAMPLE_RATE_IN_HZ)
    frequencies = np.maximum(frequencies, LOWEST_FREQUENCY_IN_HZ)
    return np.fft.irfft(spectrum / frequencies ** (colour / 2), num_samples).astype(np.float32)


def at_level(noise: np.ndarray, level_in_dbfs: float) -> np.ndarray:
    """(n_samples,) float32 at this root mean square, 0 dB being full scale; silence stays so."""
    power = power_of(noise)
    if power < SILENT_POWER:
        return noise
    return noise * np.float32(np.sqrt(10 ** (level_in_dbfs / 10) / power))
