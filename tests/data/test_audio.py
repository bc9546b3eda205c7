"""decode_audio, log_mel, normalize_text, encode_text, Preprocessor."""

import io
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor

from speech_finetuning.base.rejections import Rejection
from speech_finetuning.cli import demonstration
from speech_finetuning.data.audio import decode_audio, log_mel, pad_features
from speech_finetuning.data.shards import SourceRow
from speech_finetuning.data.text import encode_text, normalize_text


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


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"", "audio_empty", ""),
        (demonstration.encode(np.ones(1), "WAV", 48_000), "audio_empty", "no samples"),
        (b"this is not audio" * 20, "audio_unreadable", "Format not recognised"),
        (demonstration.encode(np.zeros(0), "WAV"), "audio_empty", "no samples"),
        (
            demonstration.encode(np.random.default_rng(0).normal(0, 0.1, 16_000))[:4_000],
            "audio_unreadable",
            "",
        ),
        (b"\0\0\0\x20ftypM4A " + bytes(64), "audio_unreadable", "ffmpeg -i IN.m4a"),
        (b"\x1aE\xdf\xa3" + bytes(64), "audio_unreadable", "ffmpeg -i IN.webm"),
    ],
)
def test_bad_audio_is_rejected_with_a_reason(preparer, data: bytes, reason: str, detail: str):
    row = SourceRow(id="a row", audio={"bytes": data, "path": None}, text="uno")
    descriptors = Path("/proc/self/fd")  # of Linux, where a clip has one
    before = len(list(descriptors.glob("*")))
    rejection = preparer(row)
    assert isinstance(rejection, Rejection)
    assert (rejection.reason, rejection.row) == (reason, "a row") and detail in rejection.detail
    assert len(list(descriptors.glob("*"))) == before


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("sampling_rate", [16_000, 48_000])
def test_samples_that_are_not_finite_are_rejected(sampling_rate: int, bad: float):
    buffer = io.BytesIO()
    clip = np.full(3 * sampling_rate, 0.1)
    clip[len(clip) // 2] = bad  # one of many
    soundfile.write(buffer, clip, sampling_rate, format="WAV", subtype="FLOAT")
    with pytest.raises(Rejection, match="audio_not_finite"):
        decode_audio(buffer.getvalue(), lambda seconds: None)


@pytest.mark.parametrize(
    ("seconds", "limits", "reason"),
    [
        (4.0, {}, None),
        (4.1, {}, "audio_too_long"),  # the window of the tiny model
        (2.1, {"max_duration_in_seconds": 2.0}, "audio_too_long"),
        (0.4, {"min_duration_in_seconds": 0.5}, "audio_too_short"),
        (0.5, {"min_duration_in_seconds": 0.5}, None),
        (0.05, {}, None),
    ],
)
def test_duration_filters_and_never_cuts(
    preparer, seconds: float, limits: dict, reason: str | None
):
    for name, value in limits.items():
        setattr(preparer, name, value)
    clip = np.random.default_rng(0).normal(0, 0.1, round(16_000 * seconds))
    result = preparer(
        SourceRow(id="r", audio={"bytes": demonstration.encode(clip), "path": None}, text="uno")
    )
    assert (result.reason if isinstance(result, Rejection) else None) == reason
    if reason is None:
        assert result["duration"] == pytest.approx(seconds)


def test_text_is_checked_before_audio_is_decoded(preparer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("speech_finetuning.data.preprocessing.decode_audio", pytest.fail)
    for text, reason in (
        (None, "text_empty"),
        ("  \n", "text_empty"),
        ("uno " * 40, "label_too_long"),
    ):
        assert (
            preparer(SourceRow(id="r", audio={"bytes": b"x", "path": None}, text=text)).reason
            == reason
        )


def test_labels_have_the_prefix_once_and_fit_exactly(preparer):
    tokenizer = preparer.tokenizer
    text = "x" * (64 - 4)  # language, task, notimestamps and end beside it: exactly 64 labels
    ids = encode_text(text, tokenizer, 64)
    assert len(ids) == 65
    assert (
        tokenizer.decode(ids)
        == f"<|startoftranscript|><|es|><|transcribe|><|notimestamps|>{text}<|endoftext|>"
    )
    with pytest.raises(Rejection, match="label_too_long"):
        encode_text(text + "x", tokenizer, 64)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, world! (yes) [no] «sí» ¿qué?", "Hello world yes no sí qué"),
        ("don't stop", "dont stop"),
        ("well-known fact — truly", "well known fact truly"),
        ("नमस्ते, दुनिया!", "नमस्ते दुनिया"),
        ("สวัสดี ครับ", "สวัสดี ครับ"),
        ("שָׁלוֹם, עוֹלָם.", "שָׁלוֹם עוֹלָם"),
        ("مرحبا، بالعالم؟", "مرحبا بالعالم"),
        ("你好，世界！", "你好世界"),
        ("3 + 4 = $7 100%", "3 + 4 = $7 100"),
    ],
)
def test_punctuation_and_nothing_else_is_removed(text: str, expected: str):
    assert normalize_text(text, do_lower_case=False, do_remove_punctuation=True) == expected
    assert normalize_text(text, False, False) == " ".join(text.split())
    assert normalize_text("ÀB, c", True, False) == "àb, c"


def test_padding_is_the_clips_own_silence():
    loud, silent = torch.tensor([[0.9, 0.1]]), torch.tensor([[-1.5, -1.5, -1.5]])
    batch = pad_features(torch.cat([loud, silent], dim=1), [2, 3], 4)
    assert torch.allclose(
        batch[:, 0], torch.tensor([[0.9, 0.1, -1.1, -1.1], [-1.5, -1.5, -1.5, -1.5]])
    )
