"""decode_audio, log_mel, pad_features."""

import io

import librosa
import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor

from speech_finetuning.base.rejections import Rejection
from speech_finetuning.cli import demonstration
from speech_finetuning.data.audio import decode_audio, log_mel, pad_features


@pytest.mark.parametrize("n_mels", [80, 128])
def test_features_equal_the_library(n_mels: int):
    extractor = WhisperFeatureExtractor(feature_size=n_mels)
    generator = np.random.default_rng(0)
    lengths = [1, 159, 160, 161, 200, 399, 800, 479_000, 479_700, 479_999, 480_000]
    lengths += [int(n) for n in generator.integers(800, 480_000, size=10)]
    clips = [
        generator.normal(0, 10.0 ** generator.uniform(-6, 0), n).astype(np.float32) for n in lengths
    ]
    clips += [
        np.zeros(48_000, np.float32),
        np.ones(16_000, np.float32),
        np.zeros(480_000, np.float32),
    ]
    for clip in clips:
        ours = log_mel(clip, extractor.mel_filters, 3000)
        padded = pad_features(ours, [ours.shape[1]], 3000)[0]
        theirs = extractor(clip, sampling_rate=16_000, return_tensors="pt").input_features[0]
        assert padded.shape == theirs.shape == (n_mels, 3000)
        assert (padded - theirs).abs().max() < 1e-5, len(clip)
        assert ours.shape[1] <= len(clip) // 160 + 3


@pytest.mark.parametrize("sampling_rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("audio_format", ["WAV", "FLAC", "MP3"])
def test_decoding_gives_mono_16_khz(sampling_rate: int, audio_format: str):
    seconds = np.arange(sampling_rate) / sampling_rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * seconds)
    stereo = np.stack([tone, np.zeros_like(tone)], axis=1)
    decoded, found = decode_audio(
        demonstration.encode(stereo, audio_format, sampling_rate), lambda seconds: None
    )
    assert found == sampling_rate
    assert decoded.dtype == np.float32 and decoded.ndim == 1
    assert abs(len(decoded) - 16_000) <= (1 if audio_format != "MP3" else 2_400)
    spectrum = np.abs(np.fft.rfft(decoded[:16_000]))
    assert abs(np.argmax(spectrum) - 440) <= 1  # the right pitch, so the right rate
    assert 0.2 < np.abs(decoded).max() < 0.3  # the mean of the channels


@pytest.mark.slow
@pytest.mark.parametrize("sampling_rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_resampling_equals_librosa(sampling_rate: int):
    """But for the number of samples, which librosa rounds up with a zero."""
    waveform = np.random.default_rng(0).normal(0, 0.1, 3 * sampling_rate + 7).astype(np.float32)
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, sampling_rate, format="WAV", subtype="FLOAT")
    ours, _ = decode_audio(buffer.getvalue(), lambda seconds: None)
    theirs = librosa.resample(waveform, orig_sr=sampling_rate, target_sr=16_000, res_type="soxr_hq")
    shorter = min(len(ours), len(theirs))
    assert abs(len(ours) - len(theirs)) <= 1 and np.array_equal(ours[:shorter], theirs[:shorter])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("sampling_rate", [16_000, 48_000])
def test_samples_that_are_not_finite_are_rejected(sampling_rate: int, bad: float):
    buffer = io.BytesIO()
    clip = np.full(3 * sampling_rate, 0.1)
    clip[len(clip) // 2] = bad  # one of many
    soundfile.write(buffer, clip, sampling_rate, format="WAV", subtype="FLOAT")
    with pytest.raises(Rejection, match="audio_not_finite"):
        decode_audio(buffer.getvalue(), lambda seconds: None)


def test_padding_is_the_clips_own_silence():
    loud, silent = torch.tensor([[0.9, 0.1]]), torch.tensor([[-1.5, -1.5, -1.5]])
    batch = pad_features(torch.cat([loud, silent], dim=1), [2, 3], 4)
    assert torch.allclose(
        batch[:, 0], torch.tensor([[0.9, 0.1, -1.1, -1.1], [-1.5, -1.5, -1.5, -1.5]])
    )
