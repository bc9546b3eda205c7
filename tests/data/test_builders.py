"""What `datasets` opens: columns of every known kind, shards that differ, odd metadata."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import make_clip, outcomes, read_rows, write_clips

from speech_finetuning.base.errors import UserError
from speech_finetuning.cli import demonstration
from speech_finetuning.data.sources import load_source

SAMPLES = [0.1, -0.1] * 8_000


def write_parquet(path: Path, audio: list, schema: pa.Schema | None = None, **more: list) -> str:
    columns = {"audio": audio, "text": ["uno"] * len(audio), **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), path)
    return str(path.parent)


# ---- columns of every known kind ----
@pytest.mark.parametrize(
    ("cell", "more"),
    [
        (make_clip(), {}),
        ({"bytes": make_clip(), "path": "x.wav"}, {}),
        ([{"bytes": make_clip(), "path": "x.wav"}], {}),
        (SAMPLES, {"sampling_rate": [16_000] * 3}),
        ({"array": SAMPLES, "sampling_rate": 16_000}, {}),
        ({"array": SAMPLES, "path": "x.wav", "sampling_rate": 16_000}, {}),
        ({"array": [3277, -3277] * 8_000, "sampling_rate": 16_000}, {}),
    ],
    ids=["bytes", "struct", "list of one", "samples", "array", "array and path", "integers"],
)
def test_audio_columns_of_every_known_kind(tmp_path: Path, preprocessor, cell: Any, more: dict):
    source = load_source(
        write_parquet(tmp_path / "train.parquet", [cell] * 3, **more), split="train"
    )
    examples = [preprocessor(row) for row in read_rows(source)]
    assert [(example["text"], example["duration"]) for example in examples] == [("uno", 1.0)] * 3


def test_a_list_of_audio_is_not_decoded_by_the_library(tmp_path: Path, preprocessor):
    features = datasets.Features(
        {"audio": datasets.List(datasets.Audio()), "text": datasets.Value("string")}
    )
    cells = [[{"bytes": make_clip(), "path": "x.wav"}]] * 2
    folder = write_parquet(tmp_path / "train.parquet", cells, features.arrow_schema)
    assert outcomes(load_source(folder, split="train"), preprocessor) == ["uno", "uno"]


def test_several_clips_in_one_row_are_rejected(tmp_path: Path, preprocessor):
    cell = [{"bytes": make_clip(), "path": "x.wav"}] * 2
    folder = write_parquet(tmp_path / "train.parquet", [cell, cell[:1]])
    assert outcomes(load_source(folder, split="train"), preprocessor) == ["row_unreadable", "uno"]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (SAMPLES, "--audio_column_name audio: holds lists of samples, whose rate is unknown"),
        (7, "--audio_column_name audio: holds int64, not audio. Found: audio, text"),
        ({"id": 7}, "--audio_column_name audio: holds dict, not audio"),
        (["a", "b"], "--audio_column_name audio: holds List, not audio"),
    ],
)
def test_columns_that_are_no_audio_are_one_line(tmp_path: Path, cell: Any, message: str):
    folder = write_parquet(tmp_path / "train.parquet", [cell] * 3)
    with pytest.raises(UserError, match=message):
        load_source(folder, split="train")


# ---- shards that differ ----
def test_additional_columns_in_some_shards_do_not_matter(tmp_path: Path, preprocessor):
    write_parquet(tmp_path / "train-00000-of-00003.parquet", [make_clip()] * 2)
    write_parquet(tmp_path / "train-00001-of-00003.parquet", [make_clip()] * 2, speaker=[1, 2])
    folder = write_parquet(tmp_path / "train-00002-of-00003.parquet", [make_clip()], words=[["a"]])
    source = load_source(folder, split="train")
    assert outcomes(source, preprocessor) == ["uno"] * 5 and source.num_rows == 5


def test_a_shard_without_a_column_is_one_line_that_names_it(tmp_path: Path):
    folder = write_parquet(tmp_path / "train-00000-of-00002.parquet", [make_clip()] * 2)
    other = pa.table({"audio": [make_clip()], "sentence": ["dos"]})
    pq.write_table(other, tmp_path / "train-00001-of-00002.parquet")
    message = r"train-00001-of-00002.parquet: has no column text.*Found: audio, sentence"
    with pytest.raises(UserError, match=message):
        load_source(folder, split="train")


def test_a_shard_whose_audio_is_of_another_kind_is_one_line_that_names_it(tmp_path: Path):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [{"bytes": make_clip(), "path": "x"}])
    folder = write_parquet(tmp_path / "train-00001-of-00002.parquet", [make_clip()])
    with pytest.raises(UserError, match="00001-of-00002.parquet: its column audio holds binary"):
        load_source(folder, split="train")


def test_a_footer_that_is_damaged_costs_its_file(tmp_path: Path, preprocessor):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [make_clip()] * 2)
    folder = write_parquet(tmp_path / "train-00001-of-00002.parquet", [make_clip()])
    path = tmp_path / "train-00001-of-00002.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:-60] + bytes(52) + data[-8:])
    assert outcomes(load_source(folder, split="train"), preprocessor) == [
        "uno",
        "uno",
        "file_damaged",
    ]


# ---- audio folders ----
def write_metadata(folder: Path, lines: list[str], name: str = "metadata.csv", encoding="utf-8"):
    """Four clips, and metadata beside them."""
    (folder / "train").mkdir(parents=True)
    for number in range(4):
        (folder / "train" / f"{number}.wav").write_bytes(make_clip())
    (folder / "train" / name).write_bytes("\n".join(lines).encode(encoding))
    return str(folder)


@pytest.mark.parametrize(
    ("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8"), ("\t", "utf-8"), (",", "utf-16")]
)
def test_metadata_as_other_programs_write_it(
    tmp_path: Path, preprocessor, delimiter: str, encoding: str
):
    lines = [f"file_name{delimiter}transcription"]
    lines += [f"{number}.wav{delimiter}señal" for number in range(4)]
    folder = write_metadata(tmp_path, lines, encoding=encoding)
    source = load_source(folder, split="train", audio_column="audio")
    assert outcomes(source, preprocessor) == ["señal"] * 4
    assert (source.kind, source.audio_column) == ("audiofolder", "audio")


def test_metadata_that_is_not_utf_8_is_one_line(tmp_path: Path):
    lines = ["file_name,transcription", "0.wav,uno", "1.wav,señal"]
    folder = write_metadata(tmp_path, lines, encoding="latin-1")
    with pytest.raises(UserError, match="metadata.csv, line 3: is not UTF-8.*iconv"):
        load_source(folder, split="train")


def test_rows_of_metadata_are_judged_one_by_one(tmp_path: Path, preprocessor):
    lines = ["file_name,text", "0.wav,uno, dos", '1.wav,"tres', "2.wav,cuatro", "9.wav,cinco"]
    source = load_source(write_metadata(tmp_path, lines), split="train")
    expected = ["row_unreadable", "row_unreadable", "cuatro", "audio_missing"]
    assert outcomes(source, preprocessor) == expected


def test_ljspeech_in_its_folder_is_read_as_it_unpacks(tmp_path: Path, preprocessor):
    (tmp_path / "wavs").mkdir()
    for number in range(3):
        (tmp_path / "wavs" / f"LJ00{number}.wav").write_bytes(make_clip())
    lines = [f"LJ00{number}|uno, dos|uno dos" for number in range(3)]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    source = load_source(str(tmp_path), split="train")
    assert outcomes(source, preprocessor) == ["uno, dos"] * 3


def test_metadata_above_the_splits_is_said_to_be_unread(tmp_path: Path):
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "0.wav").write_bytes(make_clip())
    row = {"file_name": "data/train/0.wav", "text": "uno"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="metadata.jsonl was not read: put it beside the audio"):
        load_source(str(tmp_path), split="train")


def test_what_a_builder_cannot_read_is_one_line(tmp_path: Path):
    folder = Path(write_metadata(tmp_path, ["file_name,text", "0.wav,uno"]))
    (folder / "train" / "metadata.parquet").write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(UserError, match="audiofolder cannot read its files"):
        load_source(str(folder), split="train")


def test_a_folder_of_notes_holds_no_data(tmp_path: Path):
    (tmp_path / "readme.md").write_text("x")
    with pytest.raises(UserError, match=r"--dataset_name \S+: this folder holds no data\. Put"):
        load_source(str(tmp_path), split="train")


def test_a_folder_is_told_what_its_recordings_or_its_spreadsheet_lack(tmp_path: Path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "memo 1.M4A").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"audio files, such as clips/memo 1\.M4A, but nothing says"
    ):
        load_source(str(tmp_path), split="train")
    (tmp_path / "list.xlsx").write_bytes(b"")
    with pytest.raises(UserError, match=r"list\.xlsx: a spreadsheet is not read\. Save it as CSV"):
        load_source(str(tmp_path), split="train")


def test_a_damaged_parquet_file_is_named(tmp_path: Path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no")
    message = r"Damaged: \S+/train.parquet\. Fetch it again, or take it out of the folder\.$"
    with pytest.raises(UserError, match=message):
        load_source(str(tmp_path), split="train")


@pytest.mark.parametrize("suffix", [".csv.gz", ".jsonl.gz"])
def test_a_packed_list_is_to_be_unpacked(tmp_path: Path, suffix: str):
    rows = [{"path": name, "text": "uno"} for name in write_clips(tmp_path)]
    lines = ["path,text", *(f"{row['path']},uno" for row in rows)]
    if "json" in suffix:
        lines = [json.dumps(row) for row in rows]
    (tmp_path / f"train{suffix}").write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(UserError, match=f"train{suffix}: a packed list is not read. Unpack it"):
        load_source(str(tmp_path), split="train")


# ---- names ----
def test_a_folder_with_the_name_of_a_list_is_none(tmp_path: Path, preprocessor):
    names = write_clips(tmp_path)
    (tmp_path / "train.tsv").mkdir()
    (tmp_path / "train.csv").write_text("\n".join(["path,text", *(f"{n},uno" for n in names)]))
    assert outcomes(load_source(str(tmp_path), split="train"), preprocessor) == ["uno"] * 4


@pytest.mark.parametrize("name", ["a" * 300, "/tmp/" + "a" * 300 + "/b.csv", "a/" * 3000])
def test_a_name_that_is_too_long_is_one_line(name: str):
    with pytest.raises(UserError, match="too long for the name of a file"):
        load_source(name, split="train")


@pytest.mark.parametrize("kind", ["parquet", "folder", "list"])
def test_a_folder_whose_name_has_wildcards(tmp_path: Path, preprocessor, kind: str):
    folder = tmp_path / "speech [v2] (new)*"
    if kind == "parquet":
        demonstration.make_speech(folder, {"train": 4, "validation": 2})
    elif kind == "folder":
        write_metadata(folder, ["file_name,text", *(f"{number}.wav,uno" for number in range(4))])
    else:
        names = write_clips(folder)
        lines = ["path,text", *(f"{name},uno" for name in names)]
        (folder / "train.csv").write_text("\n".join(lines))
    source = load_source(str(folder), split="train")
    assert len(outcomes(source, preprocessor)) == 4 == source.num_rows
    assert all(str(folder) in url for url in source.data_files)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mydata/tran.csv", "does not exist. In mydata: data.csv. Did you mean mydata/"),
        ("./speach", "does not exist. In .*: .*speech.* Did you mean speech"),
        ("speach", "Did you mean speech.*OWNER/speach"),
        ("mydata/sub/train", "does not exist. In mydata: data.csv"),
        ("/no/such/folder", "does not exist. In /"),
        ("x.xlsx", "a spreadsheet is not read. Save it as CSV in UTF-8: x.csv"),
        ("a.wav", "one clip is not a data set"),
        ("notes.docx", "a document is not read. Save it as plain text in UTF-8, notes.txt"),
        ("nothing.csv", "does not exist. In ."),
    ],
)
def test_a_path_is_not_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
):
    (tmp_path / "mydata").mkdir()
    (tmp_path / "speech").mkdir()
    (tmp_path / "mydata" / "data.csv").write_text("path,text\n")
    for file in ("x.xlsx", "a.wav", "notes.docx"):
        (tmp_path / file).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset_builder", pytest.fail)
    with pytest.raises(UserError, match=f"--dataset_name {name}: .*{message}"):
        load_source(name, split="train")


@pytest.mark.parametrize("split", ["train[:50%]", "train[10:20]+validation"])
def test_slices_are_answered(speech: Path, split: str):
    with pytest.raises(UserError, match=r"'train'\. --do_eval holds out a tenth of it"):
        load_source(str(speech), split=split)
