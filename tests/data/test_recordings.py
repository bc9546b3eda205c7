"""Recordings with a transcript beside each: found, cut, rejected one by one, in a stable order."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rows import make_clip, outcomes, read_rows

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.listed import WindowLimits
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.sources import load_source
from speech_finetuning.data.stream import SpeechStream

SRT = "1\n00:00:00,000 --> 00:00:00,500\nuno\n\n2\n00:00:00,500 --> 00:00:01,000\ndos\n"
VTT = "WEBVTT\n\n00:00.000 --> 00:00.500\nuno\n\n00:00.500 --> 00:01.000\ndos\n"
LABELS = "0.0\t0.5\tuno\n0.5\t1.0\tdos\n"
TSV = "start\tend\ttext\n0\t500\tuno\n500\t1000\tdos\n"
JSON = json.dumps(
    {
        "segments": [
            {"start": 0, "end": 0.5, "text": " uno"},
            {"start": 0.5, "end": 1, "text": " dos"},
        ]
    }
)


def write_recording(folder: Path, stem: str = "talk", suffix: str = ".wav") -> Path:
    """A second: half of it low, half of it high."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}{suffix}"
    times = np.arange(8_000) / 16_000
    tones = [0.3 * np.sin(2 * np.pi * pitch_in_hz * times) for pitch_in_hz in (200, 3000)]
    soundfile.write(path, np.concatenate(tones), 16_000)
    return path


@pytest.mark.parametrize(
    ("suffix", "text"),
    [(".srt", SRT), (".vtt", VTT), (".json", JSON), (".tsv", TSV), (".txt", LABELS)],
)
@pytest.mark.parametrize("name", ["talk", "talk.wav"])
def test_each_cue_is_an_utterance(tmp_path: Path, preprocessor, suffix: str, text: str, name: str):
    write_recording(tmp_path)
    (tmp_path / f"{name}{suffix}").write_text(text)
    source = load_source(str(tmp_path), split="train")
    assert (source.kind, source.num_rows) == ("recordings", 2)
    low, high = [preprocessor(row) for row in read_rows(source)]
    assert [low["text"], high["text"]] == ["uno", "dos"]
    assert low["duration"] == high["duration"] == 0.5
    pitches = [example["features"].mean(dim=1).argmax() for example in (low, high)]
    assert pitches[0] < 10 < 40 < pitches[1]
    assert low["id"].endswith("talk.wav#0.0-0.5") and high["id"].endswith("talk.wav#0.5-1.0")


def test_of_whisper_s_five_files_one_is_read(tmp_path: Path, preprocessor):
    write_recording(tmp_path)
    texts = {".srt": SRT, ".vtt": VTT, ".json": JSON, ".tsv": TSV, ".txt": "uno\ndos\n"}
    for suffix, text in texts.items():
        (tmp_path / f"talk{suffix}").write_text(text)
    source = load_source(str(tmp_path), split="train")
    assert [Path(file).name for file in source.data_files] == ["talk.json"]
    assert outcomes(source, preprocessor) == ["uno", "dos"]


@pytest.mark.parametrize("name", ["talk.SRT", "talk.en.srt", "talk.en-orig.srt", "talk.wav.srt"])
def test_transcripts_as_other_programs_name_them(tmp_path: Path, preprocessor, name: str):
    write_recording(tmp_path)
    (tmp_path / name).write_text(SRT)
    assert outcomes(load_source(str(tmp_path), split="train"), preprocessor) == ["uno", "dos"]


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".json", '{"id": "dQw4", "title": "talk", "duration": 1}'),  # yt-dlp's, about the video
        (".json", "{"),
        (".vtt", "<!DOCTYPE html><html>sign in</html>"),
        (".vtt", "WEBVTT\n"),
        (".json", ""),
    ],
)
def test_what_is_called_as_a_transcript_and_is_none_hides_no_other(
    tmp_path: Path, preprocessor, caplog: pytest.LogCaptureFixture, suffix: str, text: str
):
    """The labels beside it are read, and it is said once."""
    write_recording(tmp_path)
    (tmp_path / f"talk{suffix}").write_text(text)
    (tmp_path / "talk.srt").write_text(SRT)
    source = load_source(str(tmp_path), split="train")
    assert [preprocessor(row)["text"] for row in read_rows(source)] == ["uno", "dos"]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning.endswith(
        f"called as transcripts, but none: 1 file (talk{suffix}). What lies beside them is read."
    )


def test_if_no_transcript_can_be_read_the_first_says_why(tmp_path: Path, preprocessor):
    write_recording(tmp_path)
    (tmp_path / "talk.json").write_text("{")
    (tmp_path / "talk.srt").write_text("no times")
    source = load_source(str(tmp_path), split="train")
    (outcome,) = [preprocessor(row) for row in read_rows(source)]
    assert isinstance(outcome, Rejection) and "talk.json, line 1: no JSON" in outcome.detail


def test_transcripts_in_several_languages_are_asked_for(tmp_path: Path, preprocessor):
    write_recording(tmp_path)
    for language in ("en", "es"):
        (tmp_path / f"talk.{language}.srt").write_text(SRT)
    with pytest.raises(UserError, match=r"talk.wav: .* several languages, en, es. Leave one"):
        load_source(str(tmp_path), split="train")
    (tmp_path / "talk.vtt").write_text(VTT)
    assert outcomes(load_source(str(tmp_path), split="train"), preprocessor) == ["uno", "dos"]


def test_two_recordings_with_one_transcript_are_read_once(tmp_path: Path, preprocessor):
    write_recording(tmp_path)
    write_recording(tmp_path, suffix=".flac")
    (tmp_path / "talk.srt").write_text(SRT)
    source = load_source(str(tmp_path), split="train")
    assert source.num_rows == 2 and outcomes(source, preprocessor) == ["uno", "dos"]
    assert "talk.flac" in read_rows(source)[0].id


def test_a_text_beside_a_clip_is_that_of_the_whole(tmp_path: Path, preprocessor):
    write_recording(tmp_path)
    (tmp_path / "talk.txt").write_text("\ufeffuno\r\ndos\r\n", encoding="utf-8")
    (row,) = read_rows(load_source(str(tmp_path), split="train"))
    example = preprocessor(row)
    assert (row.segment, example["text"], example["duration"]) == (None, "uno dos", 1.0)


def test_subfolders_named_as_splits_are_splits_others_are_not(tmp_path: Path, preprocessor):
    for folder in ("train/anna", "dev", "test"):
        write_recording(tmp_path / folder)
        (tmp_path / folder / "talk.srt").write_text(SRT)
    for split, expected in {"train": 2, "validation": 2, "test": 2, "train+test": 4}.items():
        assert load_source(str(tmp_path), split=split).num_rows == expected
    with pytest.raises(UserError, match="Found: .*validation"):
        load_source(str(tmp_path), split="anna")


def test_what_is_wrong_costs_its_own_cue_or_file(
    tmp_path: Path, preprocessor, caplog: pytest.LogCaptureFixture
):
    for stem in ("a", "b", "c", "d", "e", "f"):
        write_recording(tmp_path, stem)
    late = "3\n00:00:05,000 --> 00:00:06,000\nlate\n\n4\n00:00:00,100 --> 00:00:00,600\n\n"
    (tmp_path / "a.srt").write_text(SRT + "\n" + late)
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.srt").write_bytes("1\n00:00:00,000 --> 00:00:00,500\nseñal\n".encode("latin-1"))
    (tmp_path / "d.srt").write_bytes(SRT.encode("utf-16"))
    (tmp_path / "f.srt").write_bytes(SRT.encode("utf-16-be"))
    source = load_source(str(tmp_path), split="train")
    rows = read_rows(source)
    assert source.num_rows == len(rows) == 9
    reasons = [
        found.reason if isinstance(found := preprocessor(row), Rejection) else found["text"]
        for row in rows
    ]
    of_a = ["uno", "dos", "segment_outside_audio", "text_empty"]
    assert reasons == [*of_a, "row_unreadable", "row_unreadable", "uno", "dos", "row_unreadable"]
    details = [row.rejection.detail for row in rows if row.rejection is not None]
    assert "b.json, line 1: no JSON" in details[0] and "is not UTF-8" in details[1]
    assert "is UTF-16BE without a byte order mark" in details[2]
    assert "without a transcript, and not read: 1 recording (e.wav)" in caplog.text


def test_overlapping_cues_keep_their_own_text_and_are_said(
    tmp_path: Path, preprocessor, caplog: pytest.LogCaptureFixture
):
    write_recording(tmp_path)
    text = SRT.replace("00:00:00,500 -->", "00:00:00,000 -->").replace("00,500", "00,900")
    (tmp_path / "talk.srt").write_text(text)
    assert outcomes(load_source(str(tmp_path), split="train"), preprocessor) == ["uno", "dos"]
    assert "overlap the one before by more than 0.5 s: 1 of 2" in caplog.text


def test_tables_and_other_kinds_come_first(tmp_path: Path, preprocessor):
    write_recording(tmp_path)
    (tmp_path / "talk.json").write_text(JSON)
    (tmp_path / "train.csv").write_text("path,sentence\ntalk.wav,tres\n")
    assert outcomes(load_source(str(tmp_path), split="train"), preprocessor) == ["tres"]
    (tmp_path / "train.csv").unlink()
    (tmp_path / "talk.json").rename(tmp_path / "talk.srt")  # JSON would be a list to `datasets`
    (tmp_path / "metadata.csv").write_text("file_name,text\ntalk.wav,tres\n")
    assert outcomes(load_source(str(tmp_path), split="train"), preprocessor) == ["tres"]


def test_each_recording_is_a_shard_and_reading_goes_on_within(tmp_path: Path):
    for stem in ("a", "b", "c"):
        write_recording(tmp_path, stem)
        (tmp_path / f"{stem}.srt").write_text(SRT)
    source = load_source(str(tmp_path), split="train")
    assert len(source.shards()) == 3
    texts = [row.id.rpartition("/")[2] for row in read_rows(source)]
    assert texts == [f"{s}.wav#{span}" for s in "abc" for span in ("0.0-0.5", "0.5-1.0")]


@pytest.mark.parametrize("has_windows", [False, True])
def test_the_order_is_exact_and_continues_anywhere(tmp_path: Path, preprocessor, has_windows: bool):
    for stem, count in {"a": 3, "b": 5, "c": 1, "d": 4}.items():
        samples = np.random.default_rng(0).normal(0, 0.1, 16_000 * count)
        soundfile.write(tmp_path / f"{stem}.wav", samples, 16_000)
        labels = [f"{second}.0\t{second}.9\t{stem}{second}" for second in range(count)]
        (tmp_path / f"{stem}.txt").write_text("\n".join(labels))
    limits = WindowLimits(seconds=2.5, num_tokens=60) if has_windows else None
    source = load_source(str(tmp_path), split="train", window_limits=limits)
    assert source.num_rows == (8 if has_windows else 13)
    stream = SpeechStream(
        sets=(SpeechDataset(source, preprocessor),),
        seed=1,
        block_size=3,
        micro_batch_size=2,
        num_threads=2,
    )
    items = list(itertools.islice(stream, 30))
    ids = [item.content()["id"] for item in items]
    passes = [ids[: source.num_rows], ids[source.num_rows : 2 * source.num_rows]]
    assert sorted(passes[0]) == sorted(passes[1]) and passes[0] != passes[1]
    assert len(set(passes[0])) == source.num_rows
    for seen in range(1, 25, 4):
        rest = itertools.islice(replace(stream, position=items[seen - 1].position), 5)
        assert [item.content()["id"] for item in rest] == ids[seen : seen + 5]


def test_columns_that_are_not_there_to_choose_have_no_effect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_recording(tmp_path)
    (tmp_path / "talk.srt").write_text(SRT)
    source = load_source(str(tmp_path), split="train", text_column="sentence")
    assert source.num_rows == 2 and "--speaker_column_name have no effect" in caplog.text


def test_clips_are_not_taken_for_transcripts(tmp_path: Path):
    (tmp_path / "a.wav").write_bytes(make_clip())
    (tmp_path / "readme.txt").write_text("no transcript")
    with pytest.raises(UserError, match="text_column_name"):
        load_source(str(tmp_path), split="train")


@pytest.mark.parametrize("other", ["talk.info.json", "talk.en.json", "talk.wav.json", "talk.tsv"])
def test_what_belongs_to_a_recording_is_no_list(tmp_path: Path, other: str):
    """As yt-dlp and Whisper leave it beside the subtitles."""
    (tmp_path / "talk.wav").write_bytes(make_clip(2.0))
    (tmp_path / "talk.en.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nuno\n")
    text = "start\tend\ttext\n0\t1000\tuno\n" if other.endswith("tsv") else ""
    segments = {"segments": [{"start": 0, "end": 1, "text": "uno"}], "title": "a talk"}
    (tmp_path / other).write_text(text or json.dumps(segments))
    source = load_source(str(tmp_path), split="train")
    assert source.kind == "recordings" and [row.text for row in read_rows(source)] == ["uno"]
