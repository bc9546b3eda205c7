"""What the rows of a list say: values that are no text, segments, columns to choose from."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from rows import make_clip, outcomes, read_rows, write_clips

from speech_finetuning.data.manifests import audio_of
from speech_finetuning.data.places import AudioPlace
from speech_finetuning.data.sources import load_source


def write_jsonl(folder: Path, rows: list[dict[str, Any]]) -> str:
    write_clips(folder)
    path = folder / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        (float("nan"), "text_empty"),
        (None, "text_empty"),
        (["uno", "dos"], "row_unreadable"),
        ({"es": "uno"}, "row_unreadable"),
        (True, "row_unreadable"),
        (float("inf"), "row_unreadable"),
        (12, "12"),
    ],
)
def test_json_values_that_are_no_texts_are_not_trained(
    tmp_path: Path, preprocessor, value: Any, outcome: str
):
    path = write_jsonl(tmp_path, [{"audio": "clips/0.wav", "text": value}])
    assert outcomes(load_source(path, split="train"), preprocessor) == [outcome]


@pytest.mark.parametrize(
    "audio",
    [
        {"path": "clips/0.wav", "bytes": None},
        ["clips/0.wav"],
        {"array": [0.1] * 16_000, "sampling_rate": 16_000},
    ],
)
def test_audio_as_a_json_object(tmp_path: Path, preprocessor, audio: Any):
    path = write_jsonl(tmp_path, [{"audio": audio, "text": "uno"}])
    assert outcomes(load_source(path, split="train"), preprocessor) == ["uno"]


@pytest.mark.parametrize("audio", [12, True, {"bytes": "UklGRg=="}, ["a.wav", "b.wav"], {}])
def test_other_audio_in_json_is_rejected(tmp_path: Path, preprocessor, audio: Any):
    rows = [{"audio": audio, "text": "uno"}, {"audio": "clips/0.wav", "text": "dos"}]
    path = write_jsonl(tmp_path, rows)
    assert outcomes(load_source(path, split="train"), preprocessor) == ["row_unreadable", "dos"]


# ---- segments ----
@pytest.mark.parametrize(
    "times",
    [
        lambda i: {"offset": 0.2 * i, "duration": 0.2},
        lambda i: {"start": 0.2 * i, "end": 0.2 * (i + 1)},
        lambda i: {"begin": 0.2 * i, "end": 0.2 * (i + 1)},
        lambda i: {"start": f"{0.2 * i:.2f}", "duration": "0.2"},
    ],
)
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_only_the_segment_is_trained(tmp_path: Path, preprocessor, times: Any, suffix: str):
    write_clips(tmp_path, 1, suffix)
    texts = ["uno", "dos", "tres", "cuatro", "cinco"]
    rows = [
        {"audio_filepath": f"clips/0{suffix}", "text": text, **times(i)}
        for i, text in enumerate(texts)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    read = read_rows(load_source(str(path), split="train"))
    examples = [preprocessor(row) for row in read]
    assert [example["text"] for example in examples] == texts
    assert [example["duration"] for example in examples] == pytest.approx([0.2] * 5, abs=1e-3)
    assert len({example["id"] for example in examples}) == 5


def test_a_segment_is_the_right_part_of_its_recording(tmp_path: Path, preprocessor):
    tones = [make_clip(0.5, pitch_in_hz=200), make_clip(0.5, pitch_in_hz=3000)]
    samples = np.concatenate([soundfile.read(io.BytesIO(tone))[0] for tone in tones])
    soundfile.write(tmp_path / "a.wav", samples, 16_000)
    rows = [
        {"audio_filepath": "a.wav", "text": "bajo", "offset": 0.0, "duration": 0.5},
        {"audio_filepath": "a.wav", "text": "alto", "offset": 0.5, "duration": 0.5},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    low, high = (
        preprocessor(row)["features"] for row in read_rows(load_source(str(path), split="train"))
    )
    assert low.mean(dim=1).argmax() < 10 < 40 < high.mean(dim=1).argmax()


@pytest.mark.parametrize(
    ("times", "outcome"),
    [
        ({"offset": 5.0, "duration": 1.0}, "segment_outside_audio"),
        ({"offset": 0.9, "duration": 1.0}, "segment_outside_audio"),
        ({"start": 0.5, "end": 0.4}, "segment_outside_audio"),
        ({"offset": -1, "duration": 0.5}, "segment_outside_audio"),
        ({"offset": 0.5, "duration": 0.55}, "uno"),  # rounded
        ({"offset": 0.5}, "uno"),
        ({"offset": 0, "duration": 1.0}, "uno"),
        ({"start": "00:01:02"}, "segment_outside_audio"),
        ({"start": "00:00:00.5"}, "uno"),
        ({"start": "at noon"}, "row_unreadable"),
        ({"start": True}, "row_unreadable"),
    ],
)
def test_a_segment_has_to_lie_in_its_audio(tmp_path: Path, preprocessor, times: dict, outcome: str):
    path = write_jsonl(tmp_path, [{"audio": "clips/0.wav", "text": "uno", **times}])
    assert outcomes(load_source(path, split="train"), preprocessor) == [outcome]


def test_a_duration_alone_is_that_of_the_file(tmp_path: Path, preprocessor):
    path = write_jsonl(tmp_path, [{"audio": "clips/0.wav", "text": "uno", "duration": 0.2}])
    (row,) = read_rows(load_source(path, split="train"))
    assert row.segment is None and preprocessor(row)["duration"] == 1.0


# ---- columns and folders ----
def test_the_audio_column_is_the_one_whose_files_exist(
    tmp_path: Path, preprocessor, caplog: pytest.LogCaptureFixture
):
    names = write_clips(tmp_path)
    lines = ["path,file_name,sentence", *(f"/gone/{name},{name},uno" for name in names)]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    source = load_source(str(tmp_path), split="train")
    assert outcomes(source, preprocessor) == ["uno"] * 4
    assert source.audio_column == "file_name"
    assert "audio is read from the column file_name" in caplog.text


def test_a_column_that_is_named_is_taken_at_its_word(tmp_path: Path, preprocessor):
    names = write_clips(tmp_path)
    lines = ["path,file_name,sentence", *(f"/gone/{name},{name},uno" for name in names)]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    source = load_source(str(tmp_path), split="train", audio_column="path")
    assert outcomes(source, preprocessor) == ["audio_missing"] * 4


def test_ljspeech_is_read_as_it_unpacks(tmp_path: Path, preprocessor):
    (tmp_path / "wavs").mkdir()
    for name in ("LJ001-0001", "LJ001-0002"):
        (tmp_path / "wavs" / f"{name}.wav").write_bytes(make_clip())
    lines = ['LJ001-0001|Dr. "A"|Doctor A', "LJ001-0002|uno, dos|uno, dos"]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    source = load_source(str(tmp_path / "train.csv"), split="train")
    assert outcomes(source, preprocessor) == ['Dr. "A"', "uno, dos"]


def test_addresses_of_an_own_list_stay_as_they_are():
    place = AudioPlace(folder="/lists", suffix=".wav")
    assert audio_of("https://example.org/a.flac", place) == "https://example.org/a.flac"
    assert audio_of("a", place) == "/lists/a.wav"
    assert audio_of("/clips/a", place) == "/clips/a.wav"


def test_an_empty_row_of_a_spreadsheet_is_rejected_with_its_line(tmp_path: Path, preprocessor):
    write_clips(tmp_path)
    path = tmp_path / "list.csv"
    path.write_text("file;text;\r\nclips/0.wav;uno;\r\n;;\r\n")
    _, empty = read_rows(load_source(str(path), split="train"))
    assert empty.rejection is not None
    assert empty.rejection.detail == f"{path}, line 3: neither audio nor text."
    assert outcomes(load_source(str(path), split="train"), preprocessor) == [
        "uno",
        "row_unreadable",
    ]
