"""Audio is what the file says: decoded whole and right, or rejected with the true reason."""

import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data import audio
from speech_finetuning.data.audio import decode_audio
from speech_finetuning.data.containers import mp3_frame_size, split_streams

SECONDS = 1.4
CONTAINERS = ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF"]


def tone(
    sampling_rate: int = 16_000, seconds: float = SECONDS, frequency_in_hz: int = 440
) -> np.ndarray:
    times = np.arange(int(seconds * sampling_rate)) / sampling_rate
    return (0.3 * np.sin(2 * np.pi * frequency_in_hz * times)).astype(np.float32)


def encode(
    waveform: np.ndarray,
    audio_format: str = "WAV",
    subtype: str | None = None,
    sampling_rate: int = 16_000,
    endian: str | None = None,
) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(
        buffer, waveform, sampling_rate, format=audio_format, subtype=subtype, endian=endian
    )
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    return decode_audio(data, lambda seconds: None)[0]


def rejection_of(data: bytes) -> Rejection:
    with pytest.raises(Rejection) as caught:
        decode(data)
    return caught.value


def assert_is_tone(waveform: np.ndarray, seconds: float = SECONDS) -> None:
    """At 440 Hz and about as loud as it was made, over the whole length."""
    assert len(waveform) / 16_000 == pytest.approx(seconds, abs=0.06)
    spectrum = np.abs(np.fft.rfft(waveform))
    assert np.argmax(spectrum) * 16_000 / len(waveform) == pytest.approx(440, abs=2)
    for half in np.array_split(waveform, 2):
        assert np.sqrt(np.mean(half**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.05)


def all_encodings() -> list[tuple[str, str]]:
    """What libsndfile writes but for RAW and SD2, without headers, and XI and WVE, without a
    rate."""
    return [
        (audio_format, subtype)
        for audio_format in soundfile.available_formats()
        if audio_format not in ("RAW", "SD2", "XI", "WVE")
        for subtype in soundfile.available_subtypes(audio_format)
    ]


def test_every_codec_that_libsndfile_writes_is_decoded():
    """Some of them cannot be sought in: GSM 6.10, G.721, G.723, NMS ADPCM, DPCM."""
    num_decoded = 0
    for audio_format, subtype in all_encodings():
        for sampling_rate in (8_000, 44_100):
            try:
                data = encode(tone(sampling_rate), audio_format, subtype, sampling_rate)
            except (soundfile.LibsndfileError, ValueError):
                continue  # not every codec takes every rate
            assert len(decode(data)) / 16_000 == pytest.approx(SECONDS, abs=0.1), subtype
            num_decoded += 1
    assert num_decoded > 200


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "NMS_ADPCM_16", "NMS_ADPCM_32"])
def test_codecs_of_telephony_sound_right(subtype: str):
    data = encode(tone(8_000), "WAV", subtype, 8_000)
    assert_is_tone(decode(data))


def test_an_instrument_file_is_decoded():
    assert len(decode(encode(tone(), "XI", "DPCM_16"))) > 8_000  # 44.1 kHz, whatever was given


def test_whatever_a_decoder_raises_is_a_rejection(monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: object, **settings: object) -> None:
        raise MemoryError("no room for 3 TiB")

    monkeypatch.setattr(audio.soxr, "resample", fail)
    rejection = rejection_of(encode(tone(8_000), sampling_rate=8_000))
    assert rejection.reason == "audio_unreadable"
    assert rejection.detail == "MemoryError: no room for 3 TiB."


@pytest.mark.parametrize("encoding", ["WAV", "FLAC", "MP3", "OGG"])
@pytest.mark.parametrize("gain", [1.0, 0.9])
def test_channels_of_opposite_phase_do_not_become_silence(encoding: str, gain: float):
    waveform = tone()
    stereo = np.stack([waveform, -gain * waveform], axis=1)
    assert_is_tone(decode(encode(stereo, encoding)))


def test_other_stereo_is_the_mean_of_its_channels():
    left, right = tone(), tone(frequency_in_hz=1000)
    stereo = encode(np.stack([left, right], axis=1), subtype="FLOAT")
    assert np.array_equal(decode(stereo), np.stack([left, right], axis=1).mean(axis=1))
    one_sided = encode(np.stack([left, np.zeros_like(left)], axis=1), subtype="FLOAT")
    assert np.array_equal(decode(one_sided), left / 2)
    silent = encode(np.zeros((16_000, 2), np.float32), subtype="FLOAT")
    assert not decode(silent).any()


@pytest.mark.parametrize("peak", [128, 32_768, 2.0**31])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_integers_written_as_floats_are_rejected(peak: float, subtype: str):
    rejection = rejection_of(encode(tone() * peak, subtype=subtype))
    assert rejection.reason == "audio_out_of_range"
    assert f"{0.3 * peak:.0f}"[:3] in rejection.detail


def test_floats_a_little_beyond_the_range_are_kept():
    loud = 25 * tone()  # a peak of 7.5
    assert np.array_equal(decode(encode(loud, subtype="FLOAT")), loud)


@pytest.mark.parametrize(
    ("audio_format", "subtype"),
    [
        ("WAV", None),
        ("WAV", "GSM610"),
        ("AIFF", None),
        ("AU", None),
        ("CAF", None),
        ("RF64", None),
        ("W64", None),
        ("MP3", None),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
    ],
)
@pytest.mark.parametrize("times", [2, 3])
def test_joined_files_are_one_clip(audio_format: str, subtype: str | None, times: int):
    rate = 8_000 if subtype == "GSM610" else 16_000
    data = encode(tone(rate), audio_format, subtype, rate)
    clip = decode(data * times)
    assert_is_tone(clip, times * len(decode(data)) / 16_000)


def without_first_frame(mp3: bytes) -> bytes:
    """An mp3 without the frame that states its length."""
    assert b"Info" in mp3[:200] or b"Xing" in mp3[:200]
    return mp3[mp3_frame_size(mp3, 0) :]


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_mp3_whose_length_no_header_states_is_decoded_to_its_end(rate: int, channels: int):
    """Of a varying bit rate: silence takes few bytes, so that the first frames say too little."""
    noise = np.random.default_rng(0).normal(0, 0.1, (2 * rate, channels))
    sound = np.concatenate([np.zeros((2 * rate, channels)), noise])
    for samples in (sound, sound[::-1]):
        stream = without_first_frame(encode(samples, "MP3", None, rate))
        assert len(decode(stream)) / 16_000 == pytest.approx(4.0, abs=0.2)
        assert len(decode(b"ID3\x03" + bytes(6) + stream)) == len(decode(stream))
        assert len(decode(stream * 2)) == pytest.approx(2 * len(decode(stream)), rel=0.05)


def test_mp3_of_one_bit_rate_stays_as_it_is():
    """Its length is guessed right. The frames are of 32 kbit/s at 16 kHz: 144 bytes each."""
    frame = b"\xff\xf3\x48\xc4" + bytes(140)
    assert split_streams(frame * 50) == [frame * 50]
    (stream,) = split_streams(frame * 50 + b"\xff\xf3\x58\xc4" + bytes(176))
    assert stream[144:] == frame * 50 + b"\xff\xf3\x58\xc4" + bytes(176)
    assert stream[13:25] == b"Xing" + struct.pack(">II", 1, 51)


def test_mp3_of_two_sampling_rates_is_two_streams():
    parts = [
        without_first_frame(encode(tone(rate), "MP3", None, rate)) for rate in (16_000, 44_100)
    ]
    lengths = [len(decode(part)) for part in parts]
    assert len(decode(b"".join(parts))) == pytest.approx(sum(lengths), rel=0.05)


def test_joined_files_may_differ():
    joined = encode(tone(), "OGG", "VORBIS") + encode(tone(48_000), "OGG", "OPUS", 48_000)
    assert_is_tone(decode(joined), 2 * SECONDS)


def test_the_limits_are_of_joined_files_together():
    durations = []
    decode_audio(encode(tone(), "OGG") * 2, durations.append)
    assert durations[0] == pytest.approx(2 * SECONDS)


@pytest.mark.parametrize("seconds", [0.1, 3.0])
def test_joined_flac_is_rejected(seconds: float, monkeypatch: pytest.MonkeyPatch):
    noise = np.random.default_rng(0).normal(0, 0.1, int(16_000 * seconds))
    data = encode(noise, "FLAC")
    assert len(decode(data)) == len(noise)
    assert rejection_of(data * 2).reason == "audio_damaged"
    monkeypatch.delattr(os, "memfd_create", raising=False)  # as on macOS
    assert len(decode(data)) == len(noise)
    assert rejection_of(data * 2).reason == "audio_damaged"


def test_too_many_joined_files_are_rejected():
    assert "joined" in rejection_of(encode(tone(seconds=0.1), "OGG") * 500).detail


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_file_shorter_than_its_header_says_is_damaged(container: str, share: float):
    data = encode(tone(), container)
    rejection = rejection_of(data[: int(share * len(data))])
    assert rejection.reason == "audio_damaged"
    assert "broken download" in rejection.detail


@pytest.mark.parametrize("endian", ["LITTLE", "BIG"])
@pytest.mark.parametrize("container", ["WAV", "AIFF", "AU"])
def test_both_byte_orders_are_checked(container: str, endian: str):
    data = encode(tone(), container, endian=endian)
    assert_is_tone(decode(data))
    assert rejection_of(data[: len(data) // 2]).reason == "audio_damaged"


@pytest.mark.parametrize(
    ("encoding", "reason"),
    [
        (("OGG", "VORBIS"), "audio_damaged"),
        (("OGG", "OPUS"), "audio_damaged"),
        (("MP3", None), "audio_damaged"),
        (("FLAC", None), "audio_unreadable"),
    ],
)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_compressed_file_that_is_cut_is_rejected(encoding: tuple, reason: str, share: float):
    waveform = np.random.default_rng(0).normal(0, 0.1, 64_000)
    data = encode(waveform, *encoding)
    rejection = rejection_of(data[: int(share * len(data))])
    assert rejection.reason == reason
    assert rejection.detail != "no samples"


def test_a_few_missing_bytes_are_not_damage():
    """Programs that count the header of 44 bytes as samples write whole files."""
    data = bytearray(encode(tone()))
    data[40:44] = struct.pack("<I", len(data))
    assert_is_tone(decode(bytes(data)))


@pytest.mark.parametrize("size", [0, 0x7FFF_F000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF])
@pytest.mark.parametrize("total", [0, 0xFFFF_FFFF])
def test_a_header_that_was_never_completed_is_no_obstacle(size: int, total: int):
    """0: of a recorder that died; the others: what programs write into a pipe."""
    data = bytearray(encode(tone()))
    data[4:8] = struct.pack("<I", total)
    data[40:44] = struct.pack("<I", size)
    assert_is_tone(decode(bytes(data)))


def test_a_header_without_samples_is_empty():
    assert rejection_of(encode(np.zeros(0))).reason == "audio_empty"
    with_metadata = encode(np.zeros(0)) + b"LIST" + struct.pack("<I", 600) + bytes(600)
    assert rejection_of(with_metadata).reason == "audio_empty"


@pytest.mark.parametrize(
    "appendix",
    [
        b"LIST" + struct.pack("<I", 400) + b"INFO" + b"x" * 396,
        bytes(1000),
        b"ID3\x03" + b"\xff" * 500,
        b"TAG" + b"x" * 500,
    ],
)
@pytest.mark.parametrize("num_samples", [16_000, 16_001])
def test_metadata_after_the_samples_is_no_damage(appendix: bytes, num_samples: int):
    waveform = np.resize(tone(), num_samples)
    data = encode(waveform, subtype="PCM_U8")
    assert len(decode(data + appendix)) == num_samples
    if num_samples % 2:  # written by programs that forget the byte of padding
        assert len(decode(data[:-1] + appendix)) == num_samples


def test_samples_after_those_of_the_header_are_damage():
    data = encode(tone())
    rejection = rejection_of(data + data[44:])
    assert rejection.reason == "audio_damaged"
    assert "more bytes follow" in rejection.detail


def unknown_length(flac: bytes) -> bytes:
    """As an encoder leaves the header that writes into a pipe: 36 bits of samples are 0."""
    header = bytearray(flac)
    header[21] &= 0xF0
    header[22:26] = bytes(4)
    return bytes(header)


@pytest.mark.parametrize("seconds", [1.4, 30.0, 61.0])
def test_flac_of_unknown_length_is_decoded(seconds: float):
    data = unknown_length(encode(tone(seconds=seconds), "FLAC"))
    assert_is_tone(decode(data), seconds)


def test_flac_of_unknown_length_keeps_the_limits():
    def limit(seconds: float) -> None:
        if seconds > 31:
            raise Rejection("audio_too_long", f"{seconds:.2f} s")

    data = unknown_length(encode(tone(seconds=200.0), "FLAC"))
    with pytest.raises(Rejection, match="audio_too_long") as caught:
        decode_audio(data, limit)
    assert caught.value.detail == "60.00 s", "the rest is not decoded"
    short = unknown_length(encode(tone(seconds=31.4), "FLAC"))
    with pytest.raises(Rejection, match=r"31\.40 s"):
        decode_audio(short, limit)


def test_the_usual_files_are_one_stream():
    for audio_format, subtype in all_encodings():
        try:
            data = encode(tone(8_000), audio_format, subtype, 8_000)
        except (soundfile.LibsndfileError, ValueError):
            continue
        assert split_streams(data) == [data]


def test_arbitrary_bytes_never_raise_anything_else():
    """Headers of all kinds with random bytes, and whole files with some bytes changed or cut
    off."""
    generator = np.random.default_rng(0)
    kinds = ("WAV", "OGG", "MP3", "FLAC", "AIFF", "AU", "CAF", "W64", "RF64")
    whole = [encode(tone(8_000), kind, sampling_rate=8_000) for kind in kinds]
    for data in whole:
        for _ in range(60):
            changed = bytearray(data[: generator.integers(1, len(data))])
            for position in generator.integers(0, min(len(changed), 200), 4):
                changed[position] = generator.integers(256)
            try:
                decode(bytes(changed))
            except Rejection as rejection:
                assert rejection.reason.startswith("audio_")


CONTENTS = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64, "git lfs pull"),
    "page": (b"<!DOCTYPE html><html>" * 30, "a web page"),
    "page with a mark": (b"\xef\xbb\xbf\r\n<HTML lang=en>" + b" " * 99, "a web page"),
    "amr": (b"#!AMR\n" + b"\xff" * 200, "If it plays, convert with ffmpeg -i IN.amr"),
    "wma": (bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + bytes(500), "ffmpeg -i IN.wma"),
    "aac": (b"\xff\xf1\x50\x80\x10\x7f\xfc" + bytes(500), "no sound is found in this aac file"),
    "m4a": (b"\0\0\0\x20ftypM4A " + bytes(64), "ffmpeg -i IN.m4a"),
    "mp4": (b"\0\0\0\x20ftypisom" + bytes(64), "ffmpeg -i IN.m4a"),
    "3gp": (b"\0\0\0\x20ftyp3gp4" + bytes(64), "ffmpeg -i IN.3gp"),
    "webm": (b"\x1aE\xdf\xa3" + bytes(64), "ffmpeg -i IN.webm"),
    "silk": (b"\x02#!SILK_V3" + bytes(64), "ffmpeg -i IN.silk"),
    "zip": (b"PK\x03\x04" + bytes(64), "a zip archive: unpack it"),
    "gzip": (b"\x1f\x8b\x08" + bytes(64), "compressed with gzip"),
    "link": (b"../../single-mic/example1.wav\n", 'to "../../single-mic/example1.wav": put that'),
    "link with escapes": (b"\x1b]0;gone\x07.wav", 'to "\\x1b]0;gone\\x07.wav"'),
    "json": (b'{"error": "Rate limit"}', "JSON, not audio: a server's answer"),
    "text": ("señal\n".encode() * 2_000, "text, not audio"),
    "samples": ((tone() * 9e3).astype("<i2").tobytes(), "ffmpeg -f s16le"),
    "mp3 without its start": (encode(tone(), "MP3")[100:], "mp3 whose start is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_no_audio_is_named(name: str):
    data, message = CONTENTS[name]
    rejection = rejection_of(data)
    assert rejection.reason == "audio_unreadable"
    assert message in rejection.detail


@pytest.mark.parametrize(
    "data",
    [
        b"root:x:0:0:root:/root:/bin/bash\n",
        b'{"token": "root:x:0"}',
        b"# root:x:0\nexport A=b.wav\n",
    ],
)
def test_a_text_that_is_no_audio_is_not_quoted(data: bytes):
    """A row may name any file of the user, and what is said of it goes into logs."""
    assert "root" not in rejection_of(data).detail


def test_a_clip_that_libsndfile_names_keeps_that_message():
    data = encode(np.random.default_rng(0).normal(0, 0.1, 64_000), "FLAC")
    assert "flac decoder lost sync" in rejection_of(data[: len(data) // 2]).detail


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are counted in /proc")
def test_rejections_leave_no_descriptor_open():
    code = """if True:
        import os, sys
        from tests.data.test_odd_audio import encode, rejection_of, tone
        clips = [encode(tone(), "OGG") * 70, encode(tone())[:9000], b"x" * 999,
                 encode(tone(), "OGG") + encode(tone(), "OGG")[:60] + bytes(200)]
        for clip in clips:
            try:
                rejection_of(clip)
            except BaseException:
                pass
        before = len(os.listdir("/proc/self/fd"))
        for clip in clips * 20:
            try:
                rejection_of(clip)
            except BaseException:
                pass
        assert len(os.listdir("/proc/self/fd")) == before
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
