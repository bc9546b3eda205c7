"""Whole recordings as one waveform."""

from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from speech_finetuning.base.errors import UserError
from speech_finetuning.data import long_audio
from speech_finetuning.data.containers import mp3_frame_size
from speech_finetuning.data.long_audio import read_recording


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (None, "Not readable as audio"),
        ([], "holds no samples"),
        ([0.5, float("nan")], "not finite"),
        ([0.0] * 1600, "Only silence"),
        ([0.3] * 1600, "Only silence"),
    ],
)
def test_a_clip_without_speech_gets_a_line(
    tmp_path: Path, samples: list[float] | None, message: str
):
    path = tmp_path / "clip.wav"
    if samples is None:
        path.write_bytes(b"no audio at all" * 100)
    else:
        soundfile.write(path, np.array(samples, dtype=np.float32), 16_000, subtype="FLOAT")
    with pytest.raises(UserError, match=message) as caught:
        read_recording(path)
    assert "\n" not in str(caught.value)


def test_a_clip_is_mixed_down_and_resampled(tmp_path: Path):
    seconds = np.arange(44_100) / 44_100
    tone = 0.5 * np.sin(2 * np.pi * 1000 * seconds)
    soundfile.write(tmp_path / "tone.wav", np.stack([tone, np.zeros_like(tone)], axis=1), 44_100)
    waveform = read_recording(tmp_path / "tone.wav")
    assert waveform.shape == (16_000,) and waveform.dtype == np.float32
    assert np.abs(np.fft.rfft(waveform)).argmax() == 1000
    assert np.abs(waveform[2000:-2000]).max() == pytest.approx(0.25, abs=0.01)


def test_a_long_recording_is_read_in_blocks_without_a_seam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seconds = np.arange(5 * 44_100) / 44_100
    tone = (0.5 * np.sin(2 * np.pi * 440 * seconds)).astype(np.float32)
    soundfile.write(tmp_path / "tone.flac", tone, 44_100)
    whole = read_recording(tmp_path / "tone.flac")
    monkeypatch.setattr(long_audio, "BLOCK_IN_SECONDS", 1)
    in_blocks = read_recording(tmp_path / "tone.flac")
    assert whole.shape == in_blocks.shape == (5 * 16_000,)
    assert np.abs(whole - in_blocks).max() < 1e-3


@pytest.mark.parametrize("suffix", ["m4a", "webm"])
def test_what_telephones_and_browsers_record_is_read(tmp_path: Path, suffix: str):
    path = tmp_path / f"tone.{suffix}"
    codec, rate = {"m4a": ("aac", 44_100), "webm": ("libopus", 48_000)}[suffix]
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(2 * rate) / rate)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(
            tone[None].astype(np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    waveform = read_recording(path)
    assert len(waveform) == pytest.approx(32_000, abs=1_600)
    spectrum = np.abs(np.fft.rfft(waveform[8_000:24_000]))
    assert spectrum.argmax() == 1000


def test_a_playlist_opens_no_other_file(tmp_path: Path):
    path = tmp_path / "list.m4a"
    path.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n")
    with pytest.raises(UserError, match="Not readable as audio"):
        read_recording(path)


@pytest.mark.parametrize("suffix", ["mp3", "ogg"])
def test_joined_recordings_are_read_to_their_end(tmp_path: Path, suffix: str):
    """And an mp3 whose length no header states: what is left out would be missing in silence."""
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(32_000) / 16_000)
    soundfile.write(tmp_path / f"tone.{suffix}", tone, 16_000)
    data = (tmp_path / f"tone.{suffix}").read_bytes()
    joined = tmp_path / f"joined.{suffix}"
    joined.write_bytes(data * 3)
    assert len(read_recording(joined)) == pytest.approx(96_000, abs=6_000)
    if suffix == "mp3":
        joined.write_bytes(data[mp3_frame_size(data, 0) :])
        assert len(read_recording(joined)) == pytest.approx(32_000, abs=2_000)
