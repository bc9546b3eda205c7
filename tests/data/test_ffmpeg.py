"""m4a, webm, amr and their like: decoded by FFmpeg, within the same bounds, and nothing else."""

import functools
import io
from pathlib import Path

import av
import numpy as np
import pytest
from rows import make_clip, outcomes

from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data import ffmpeg
from speech_finetuning.data.audio import decode_audio
from speech_finetuning.data.cuts import cut_out
from speech_finetuning.data.segments import Segment
from speech_finetuning.data.sources import load_source

SECONDS = 6
# suffix: container, encoder, rate in Hz, how much longer the sound may become
KINDS = {
    "m4a": ("ipod", "aac", 44_100, 0.0),
    "mp4": ("mp4", "aac", 16_000, 0.0),
    "mov": ("mov", "aac", 48_000, 0.0),
    "webm": ("webm", "libopus", 48_000, 0.0),
    "mka": ("matroska", "flac", 16_000, 0.0),
    "aac": ("adts", "aac", 16_000, 0.1),
    "amr": ("amr", "libopencore_amrnb", 8_000, 0.03),
    "3gp": ("3gp", "libopencore_amrnb", 8_000, 0.01),
    "wma": ("asf", "wmav2", 44_100, 0.1),
}


def sweep(sampling_rate: int, seconds: float = SECONDS) -> np.ndarray:
    """From 300 to 900 Hz, so that every moment sounds different."""
    times = np.arange(round(seconds * sampling_rate)) / sampling_rate
    return 0.3 * np.sin(2 * np.pi * (300 + 50 * times) * times)


@functools.cache
def encoded(suffix: str, seconds: float = SECONDS, layout: str = "mono") -> bytes:
    """A sweep, as PyAV's encoder writes it."""
    container, encoder, rate, _ = KINDS[suffix]
    try:
        av.Codec(encoder, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this FFmpeg has no encoder {encoder}")
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(encoder, rate=rate, layout=layout, bit_rate=64_000)
        stream.bit_rate = 12_200 if "amr" in encoder else 64_000
        samples = np.float32([sweep(rate, seconds)] * stream.layout.nb_channels)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate = rate
        frame.pts = 0
        for source in (frame, None):
            for packet in stream.encode(source):
                output.mux(packet)
    return file.getvalue()


def accept(seconds: float) -> None:
    """In place of check_duration."""


def rejection_of(data: bytes, segment: Segment | None = None) -> Rejection:
    with pytest.raises(Rejection) as caught:
        if segment is None:
            decode_audio(data, accept)
        else:
            cut_out(data, segment, accept)
    return caught.value


@pytest.mark.parametrize("suffix", KINDS)
def test_every_kind_sounds_as_it_was_encoded(suffix: str):
    _, _, rate, longer = KINDS[suffix]
    waveform, found_rate = decode_audio(encoded(suffix), accept)
    assert found_rate == rate
    assert -0.1 < len(waveform) / 16_000 - SECONDS <= longer + 1e-3
    second = waveform[48_000:64_000]  # 300 + 2 * 50 * 3.5 Hz in its middle
    peak_in_hz = np.abs(np.fft.rfft(second * np.hanning(len(second)))).argmax()
    assert 600 < peak_in_hz < 700
    assert np.sqrt(np.mean(second**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.2)


@pytest.mark.parametrize("suffix", KINDS)
def test_a_segment_is_that_part_of_the_whole(suffix: str, tmp_path: Path):
    """Bit for bit, but for AAC's bands of noise, which are random, and AMR's prediction."""
    tolerance = {"m4a": 1e-4, "mov": 1e-4, "mp4": 1e-4, "3gp": 0.03}.get(suffix, 0)
    data = encoded(suffix, 20.0)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(data)
    whole, rate = ffmpeg.decode_foreign(data, accept)
    for start, duration in [(0.0, 0.5), (0.3, 1.0), (12.7, 0.613), (18.9, 1.0)]:
        segment = Segment(start_in_seconds=start, duration_in_seconds=duration)
        for recording in (data, str(path)):
            part, _ = ffmpeg.decode_foreign(recording, accept, segment)
            expected = whole[round(start * rate) : round((start + duration) * rate)]
            assert part.shape == expected.shape
            assert np.abs(part - expected).max() <= tolerance


def test_a_recording_whose_index_leads_astray_is_read_from_its_beginning(
    monkeypatch: pytest.MonkeyPatch,
):
    data = encoded("m4a", 20.0)
    segment = Segment(start_in_seconds=12.7, duration_in_seconds=1.0)
    expected, _ = ffmpeg.decode_foreign(data, accept, segment)
    honest = ffmpeg.frames_from
    starts = []

    def astray(container, stream, start_in_seconds: float):
        starts.append(start_in_seconds)
        return honest(container, stream, start_in_seconds + (2.0 if start_in_seconds > 0 else 0.0))

    monkeypatch.setattr(ffmpeg, "frames_from", astray)
    found, _ = ffmpeg.decode_foreign(data, accept, segment)
    assert starts == [11.7, 0.0] and np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("suffix", KINDS)
def test_a_segment_has_to_lie_in_its_recording(suffix: str):
    for start, duration in [(5.5, 2.0), (60.0, 1.0), (2.0, -1.0)]:
        segment = Segment(start_in_seconds=start, duration_in_seconds=duration)
        assert rejection_of(encoded(suffix), segment).reason == "segment_outside_audio"
    samples, rate = ffmpeg.decode_foreign(encoded(suffix), accept, Segment(start_in_seconds=5.0))
    assert len(samples) / rate == pytest.approx(1.0, abs=0.11)


def test_channels_are_kept_until_they_are_mixed():
    samples, _ = ffmpeg.decode_foreign(encoded("m4a", 1.0, "stereo"), accept)
    assert samples.shape == (44_100, 2)


@pytest.mark.parametrize("suffix", KINDS)
def test_what_is_cut_short_is_rejected(suffix: str):
    data = encoded(suffix)
    assert rejection_of(data[: len(data) // 2]).reason in ("audio_unreadable", "audio_damaged")


@pytest.mark.parametrize("suffix", ["m4a", "webm", "amr"])
def test_a_clip_beyond_the_limit_is_not_decoded_to_its_end(suffix: str):
    """Nor is the length that its header states believed."""
    seen = []

    def check(seconds: float) -> None:
        seen.append(seconds)
        if seconds > 31:
            raise Rejection("audio_too_long")

    with pytest.raises(Rejection, match="audio_too_long"):
        decode_audio(encoded(suffix, 60.0), check)
    assert max(seen) < 32


def test_damage_of_any_kind_is_a_rejection():
    generator = np.random.default_rng(0)
    for suffix in ("m4a", "webm", "amr", "aac"):
        data = encoded(suffix)
        for _ in range(30):
            changed = bytearray(data[: generator.integers(40, len(data))])
            for position in generator.integers(12, len(changed), 6):
                changed[position] = generator.integers(256)
            try:
                decode_audio(bytes(changed), accept)
            except Rejection as rejection:
                assert rejection.reason.startswith("audio_")


def test_a_file_without_sound_is_empty():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for source in (frame, None):
            for packet in stream.encode(source):
                output.mux(packet)
    assert rejection_of(file.getvalue()).reason == "audio_empty"


# ---- strangers ----
def test_a_clip_makes_ffmpeg_open_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Playlists and lists of files, under names and beginnings that are not theirs."""
    secret = tmp_path / "secret.wav"
    secret.write_bytes(make_clip())
    formats = []
    real_open = av.open

    def watched_open(file, *args, **kwargs):
        formats.append((type(file), kwargs["format"]))
        return real_open(file, *args, **kwargs)

    monkeypatch.setattr(av, "open", watched_open)
    hls = f"#EXTM3U\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n".encode()
    concat = f"ffconcat version 1.0\nfile {secret}\n".encode()
    for text in (hls, concat):
        assert rejection_of(text).reason == "audio_unreadable"
        for head in (
            b"\0\0\0\x20ftypM4A ",
            b"\x1aE\xdf\xa3",
            b"#!AMR\n",
            b"\xff\xf1\x50\x80\x10\x7f",
        ):
            assert rejection_of(head + text).reason == "audio_unreadable"
    assert len(formats) == 8
    assert {kind for kind, _ in formats} == {io.BytesIO}
    assert {name for _, name in formats} <= set(ffmpeg.DEMUXERS.values())
    with pytest.raises(PermissionError):
        ffmpeg.refuse_to_open(str(secret), 1, {})


def test_a_reference_to_another_file_is_not_followed(tmp_path: Path):
    """QuickTime's data references may name files; FFmpeg follows none, and none is handed to it."""
    data = bytearray(encoded("mov"))
    place = data.index(b"dref") + 12  # entry: size, kind, flags
    assert data[place + 4 : place + 8] == b"url "
    data[place + 8 : place + 12] = bytes(4)  # no longer "in this same file"
    samples, rate = ffmpeg.decode_foreign(bytes(data), accept)
    assert len(samples) / rate == pytest.approx(SECONDS, abs=0.1)  # it has read these bytes only


def test_the_size_of_a_file_is_bounded_before_it_is_decoded(
    tmp_path: Path, preprocessor, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a.m4a").write_bytes(encoded("m4a", 1.0))
    (tmp_path / "train.csv").write_text("path,sentence\na.m4a,uno\n")
    source = load_source(str(tmp_path), split="train")
    assert outcomes(source, preprocessor) == ["uno"]
    monkeypatch.setattr("speech_finetuning.data.reading.MAX_FILE_IN_BYTES", 1000)
    assert outcomes(source, preprocessor) == ["audio_too_large"]
