"""Segments of recordings: the same samples as a clip of its own, wherever the times come from."""

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
from rows import outcomes, read_rows

from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.cuts import cut_out
from speech_finetuning.data.segments import Segment
from speech_finetuning.data.sources import load_source

FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".gsm.wav": ("WAV", "GSM610"),  # cannot be sought in
}


def noise(seconds: float, rate_in_hz: int = 16_000) -> np.ndarray:
    count = round(seconds * rate_in_hz)
    times = np.arange(count) / rate_in_hz
    tone = np.sin(2 * np.pi * (200 + 30 * times) * times)
    return 0.2 * tone + np.random.default_rng(0).normal(0, 0.03, count)


def encode(samples: np.ndarray, kind: str, rate_in_hz: int = 16_000) -> bytes:
    file = io.BytesIO()
    name, subtype = FORMATS[kind]
    soundfile.write(file, samples, rate_in_hz, format=name, subtype=subtype)
    return file.getvalue()


def accept(seconds: float) -> None:
    """In place of check_duration."""


@pytest.mark.parametrize("kind", FORMATS)
def test_a_segment_is_bit_for_bit_that_part_of_the_recording(kind: str, tmp_path: Path):
    data = encode(noise(20, 8_000), kind, 8_000)
    path = tmp_path / f"a{kind}"
    path.write_bytes(data)
    rate = 8_000
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        whole = file.read(file.frames, dtype="float32")
    for start, duration in [(0.0, 1.0), (7.3, 2.5), (18.9, 1.1)]:
        segment = Segment(start_in_seconds=start, duration_in_seconds=duration)
        expected = whole[round(start * rate) : round((start + duration) * rate)]
        for recording in (data, str(path)):
            cut, _ = soundfile.read(
                io.BytesIO(cut_out(recording, segment, accept)), dtype="float32"
            )
            assert len(cut) == len(expected)
            # mpg123's synthesis sums in another order after a seek.
            assert np.abs(cut - expected).max() <= (2e-7 if kind == ".mp3" else 0)


def test_features_are_those_of_the_stand_alone_clip(tmp_path: Path, preprocessor):
    samples = noise(6)
    (tmp_path / "long.flac").write_bytes(encode(samples, ".flac"))
    (tmp_path / "clip.flac").write_bytes(encode(samples[16_000:40_000], ".flac"))
    (tmp_path / "train.csv").write_text(
        "path,start,end,text\nlong.flac,1.0,2.5,uno\nclip.flac,,,uno\n"
    )
    rows = read_rows(load_source(str(tmp_path), split="train"))
    segment, clip = [preprocessor(row) for row in rows]
    assert (segment["features"] == clip["features"]).all()
    assert segment["labels"] == clip["labels"] and segment["duration"] == clip["duration"] == 1.5


def test_a_long_segment_is_rejected_before_it_is_decoded(tmp_path: Path, preprocessor):
    (tmp_path / "a.flac").write_bytes(encode(noise(9), ".flac"))
    segment = Segment(start_in_seconds=1.0, duration_in_seconds=7.0)
    seen = []

    def refuse(seconds: float) -> None:
        seen.append(seconds)
        raise Rejection("audio_too_long")

    with pytest.raises(Rejection, match="audio_too_long"):
        cut_out(str(tmp_path / "a.flac"), segment, refuse)
    assert seen == [7.0]


# ---- parquet ----
def write_parquet(folder: Path, rows: list[dict[str, Any]]) -> str:
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    return str(folder)


def times(index: int, names: tuple[str, str]) -> dict[str, float]:
    start_name, end_name = names
    length = 1.0 if end_name == "duration" else 1.0 + index
    return {start_name: float(index), end_name: length}


@pytest.mark.parametrize("names", [("offset", "duration"), ("start", "end"), ("begin", "end")])
@pytest.mark.parametrize("has_bytes", [False, True])
def test_segments_in_columns_of_parquet(
    tmp_path: Path, preprocessor, names: tuple[str, str], has_bytes: bool
):
    data = encode(noise(4), ".wav")
    (tmp_path / "long.wav").write_bytes(data)
    audio: Any = {"bytes": data, "path": "long.wav"} if has_bytes else str(tmp_path / "long.wav")
    rows = [{"audio": audio, "text": f"t{i}", **times(i, names)} for i in range(4)]
    rows.append({"audio": audio, "text": "out", names[0]: 9.0, names[1]: 10.0})
    source = load_source(write_parquet(tmp_path / "d", rows), split="train")
    assert outcomes(source, preprocessor) == ["t0", "t1", "t2", "t3", "segment_outside_audio"]
    read = read_rows(source)
    assert len({row.id for row in read}) == 5
    assert preprocessor(read[2])["duration"] == 1.0


def test_paths_in_parquet_are_relative_to_it(
    tmp_path: Path, preprocessor, monkeypatch: pytest.MonkeyPatch
):
    folder = Path(write_parquet(tmp_path / "d", [{"audio": "clips/a.wav", "text": "uno"}]))
    (folder / "clips").mkdir()
    (folder / "clips" / "a.wav").write_bytes(encode(noise(1), ".wav"))
    source = load_source(str(folder), split="train")
    assert outcomes(source, preprocessor) == ["uno"]
    (tmp_path / "clips").mkdir()  # as `datasets` would find it
    (tmp_path / "clips" / "a.wav").write_bytes(encode(noise(2), ".wav"))
    monkeypatch.chdir(tmp_path)
    assert preprocessor(read_rows(source)[0])["duration"] == 2.0


def test_clips_that_are_cut_already_are_read_whole(
    tmp_path: Path, preprocessor, caplog: pytest.LogCaptureFixture
):
    """As in GigaSpeech and AMI on the Hub, whose times are places in recordings that are not
    there."""
    caplog.set_level("INFO")
    rows = [
        {
            "audio": {"bytes": encode(noise(1.0 + i), ".wav"), "path": f"{i}.wav"},
            "text": f"t{i}",
            "begin_time": 100.0 * i,
            "end_time": 100.0 * i + 1.0 + i,
        }
        for i in range(3)
    ]
    source = load_source(write_parquet(tmp_path / "d", rows), split="train")
    assert [preprocessor(row)["duration"] for row in read_rows(source)] == [1.0, 2.0, 3.0]
    assert "begin_time, end_time are of clips that are cut already" in caplog.text


def test_a_list_of_clips_that_are_cut_already(tmp_path: Path, preprocessor):
    lines = ["path,start,end,text"]
    for i in range(1, 4):
        (tmp_path / f"{i}.wav").write_bytes(encode(noise(i), ".wav"))
        lines.append(f"{i}.wav,{10 * i},{11 * i},t{i}")
    (tmp_path / "train.csv").write_text("\n".join(lines))
    rows = read_rows(load_source(str(tmp_path), split="train"))
    assert [preprocessor(row)["duration"] for row in rows] == [1.0, 2.0, 3.0]


def test_times_of_parquet_that_are_none_are_rejected_alone(tmp_path: Path, preprocessor):
    (tmp_path / "a.wav").write_bytes(encode(noise(4), ".wav"))
    audio = str(tmp_path / "a.wav")
    rows = [
        {"audio": audio, "text": "uno", "start": "0.5", "end": "1"},
        {"audio": audio, "text": "dos", "start": "half", "end": "1"},
        {"audio": audio, "text": "tres", "start": None, "end": None},
    ]
    source = load_source(write_parquet(tmp_path / "d", rows), split="train")
    assert outcomes(source, preprocessor) == ["uno", "row_unreadable", "tres"]
