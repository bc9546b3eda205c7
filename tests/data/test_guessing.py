"""Columns that no usual name tells: found by their cells, or asked for in one line."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import soundfile
from rows import make_clip, outcomes, read_rows, write_clips

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.columns import TEXT_COLUMNS, find_name
from speech_finetuning.data.sources import load_source

SENTENCES = ["uno dos tres cuatro", "seis siete ocho", "dos cinco diez once", "ocho y medio"]


def write_list(folder: Path, lines: list[str], name: str = "train.csv") -> str:
    """A list beside four clips; its path."""
    write_clips(folder)
    (folder / name).write_text("\n".join(lines))
    return str(folder / name)


# ---- lists ----
@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("take,speaker,said", "clips/{i}.wav,anna,{text}"),
        ("said;n;take", "{text};{i};clips/{i}.wav"),
        ("Take Name|Said By|What Is Said", "clips/{i}.wav|speaker {i}|{text}"),
        ("", "clips/{i}.wav,f32,de,{text}"),  # no header
        ("", "anna;{text};clips/{i}.wav"),
        ("", "clips\\{i}.wav\t{text}\t2024-01-0{i}"),  # from Windows
    ],
)
def test_columns_are_found_by_their_cells(
    tmp_path: Path, preprocessor, header: str, row: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    rows = [row.format(i=i, text=text) for i, text in enumerate(SENTENCES)]
    path = write_list(tmp_path, [*([header] if header else []), *rows])
    assert outcomes(load_source(path, split="train"), preprocessor) == SENTENCES
    assert "is the text, by its cells" in caplog.text or "has no header" in caplog.text


def test_two_columns_that_would_do_are_asked_for(tmp_path: Path, preprocessor):
    lines = ["near,far,said,meant"]
    lines += [f"clips/{i}.wav,clips/{3 - i}.wav,{t},{t} otra vez" for i, t in enumerate(SENTENCES)]
    path = write_list(tmp_path, lines)
    with pytest.raises(
        UserError, match="near, far hold audio. Name the one .* --audio_column_name near"
    ) as error:
        load_source(path, split="train")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="said, meant read as text.* --text_column_name said"):
        load_source(path, split="train", audio_column="far")
    source = load_source(path, split="train", audio_column="far", text_column="meant")
    assert outcomes(source, preprocessor)[0] == "uno dos tres cuatro otra vez"
    assert read_rows(source)[0].id.endswith("clips/3.wav")


def test_columns_without_names_can_be_named_by_number(tmp_path: Path, preprocessor):
    path = write_list(tmp_path, ["clips/0.wav,uno dos tres,no es esto,x", "clips/1.wav,seis,no,y"])
    with pytest.raises(UserError, match="column2, column3 read as text|write one: path,sentence"):
        load_source(path, split="train")
    source = load_source(path, split="train", text_column="column2", audio_column="column1")
    assert outcomes(source, preprocessor) == ["uno dos tres", "seis"]


def test_columns_within_objects(tmp_path: Path, preprocessor):
    rows: list[Any] = [
        {"talk": {"file": "clips/0.wav"}, "meta": {"said": {"raw": "Uno."}, "transcript": "uno"}},
        {"talk": {"file": "clips/1.wav"}, "meta": None},
    ]
    path = write_list(tmp_path, [json.dumps(row) for row in rows], "train.jsonl")
    source = load_source(path, split="train")
    assert (source.audio_column, source.text_column) == ("talk.file", "meta.transcript")
    assert outcomes(source, preprocessor) == ["uno", "text_empty"]
    source = load_source(path, split="train", text_column="meta.said.raw")
    assert outcomes(source, preprocessor) == ["Uno.", "text_empty"]


def test_what_is_as_written_comes_before_its_normalised_kin():
    for names in (["transcription", "raw_transcription"], ["normalized_text", "raw_text"]):
        assert find_name(names, None, TEXT_COLUMNS) == names[1]
    assert find_name(["raw_transcription", "text"], None, TEXT_COLUMNS) == "text"


# ---- parquet and its kin ----
def write_parquet(folder: Path, rows: list[dict[str, Any]], **features: Any) -> str:
    folder.mkdir(exist_ok=True)
    dataset = datasets.Dataset.from_list(rows)
    for name, feature in features.items():
        dataset = dataset.cast_column(name, feature)
    dataset.to_parquet(folder / "train-00000-of-00001.parquet")
    return str(folder)


def test_columns_of_parquet_are_found_by_type_and_cells(tmp_path: Path, preprocessor):
    rows = [
        {"take": {"bytes": make_clip(), "path": f"{i}.wav"}, "who": f"anna{i}", "said": text}
        for i, text in enumerate(SENTENCES)
    ]
    undecoded = datasets.Audio(decode=False)
    source = load_source(write_parquet(tmp_path / "a", rows, take=undecoded), split="train")
    assert (source.audio_column, source.text_column) == ("take", "said")
    assert outcomes(source, preprocessor) == SENTENCES
    two = [row | {"far": row["take"]} for row in rows]
    folder = write_parquet(tmp_path / "b", two, take=undecoded, far=undecoded)
    with pytest.raises(UserError, match="take, far hold audio.* --audio_column_name take"):
        load_source(folder, split="train")


def test_paths_in_parquet_are_found_too(tmp_path: Path, preprocessor):
    write_clips(tmp_path)
    rows = [{"take": str(tmp_path / f"clips/{i}.wav"), "said": t} for i, t in enumerate(SENTENCES)]
    source = load_source(write_parquet(tmp_path / "d", rows), split="train")
    assert outcomes(source, preprocessor) == SENTENCES


def test_columns_within_columns_of_parquet(tmp_path: Path, preprocessor):
    clip = {"bytes": make_clip(), "path": "a.wav"}
    rows = [{"talk": {"audio": clip, "n": 1}, "said": {"es": "uno", "en": "one"}}]
    feature = {"audio": datasets.Audio(), "n": datasets.Value("int64")}
    folder = write_parquet(tmp_path / "d", rows, talk=feature)
    with pytest.raises(UserError, match=r"Found: talk, said, talk.audio, talk.n, said.es"):
        load_source(folder, split="train", text_column="said.de")
    source = load_source(folder, split="train", text_column="said.en")
    assert (source.audio_column, source.num_rows) == ("talk.audio", 1)
    assert outcomes(source, preprocessor) == ["one"]


# ---- save_to_disk ----
def saved_dataset() -> datasets.Dataset:
    rows = [{"audio": {"bytes": make_clip(), "path": None}, "text": text} for text in SENTENCES]
    dataset = datasets.Dataset.from_list(rows)
    return dataset.cast_column("audio", datasets.Audio(decode=False))


def test_folders_that_save_to_disk_wrote(tmp_path: Path, preprocessor):
    saved_dataset().save_to_disk(tmp_path / "one", num_shards=2)
    source = load_source(str(tmp_path / "one"), split="train")
    assert (source.num_rows, len(source.shards())) == (4, 2)
    assert outcomes(source, preprocessor) == SENTENCES
    splits = {"train": saved_dataset(), "dev": saved_dataset().select([2])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    source = load_source(str(tmp_path / "two"), split="dev")
    assert source.num_rows == 1 and outcomes(source, preprocessor) == SENTENCES[2:3]
    (tmp_path / "two" / "dev" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state.json: .* Write the folder anew"):
        load_source(str(tmp_path / "two"), split="dev")


def test_saved_audio_is_not_decoded_by_the_library(tmp_path: Path, preprocessor):
    file = io.BytesIO()
    soundfile.write(file, [0.0] * 16_000, 16_000, format="FLAC")
    rows = [{"audio": {"bytes": file.getvalue(), "path": None}, "text": "uno"}]
    dataset = datasets.Dataset.from_list(rows, features=None)
    dataset = dataset.cast_column("audio", datasets.Audio(sampling_rate=16_000))
    dataset.save_to_disk(tmp_path / "saved")
    assert outcomes(load_source(str(tmp_path / "saved"), split="train"), preprocessor) == ["uno"]
