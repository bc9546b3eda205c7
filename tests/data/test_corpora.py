"""Corpora and what annotation programs export, as they come: read, or answered in one line."""

import base64
import json
from pathlib import Path

import pytest
from rows import make_clip, outcomes, read_rows

from speech_finetuning.data.places import clips_below
from speech_finetuning.data.sources import MissingSplit, load_source

CLIP = make_clip(0.5)


def write(folder: Path, files: dict[str, str | bytes]) -> str:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def read(folder: Path, preprocessor, files: dict[str, str | bytes], split: str = "train") -> list:
    return outcomes(load_source(write(folder, files), split=split), preprocessor)


# ---- what annotation programs export ----
def prodigy_row(text: str, answer: str = "accept", audio: str = "a.wav") -> str:
    row = {"audio": audio, "text": "a", "transcript": text, "answer": answer, "_task_hash": 1}
    return json.dumps(row | {"path": "/home/alice/a.wav", "meta": {"file": "a.wav"}})


def test_of_prodigy_the_transcript_is_trained_where_it_was_accepted(tmp_path: Path, preprocessor):
    """Its own column `text` is the name of the file."""
    lines = [prodigy_row("uno dos"), prodigy_row("no", "reject"), prodigy_row("no", "ignore")]
    files = {"train.jsonl": "\n".join(lines), "a.wav": CLIP}
    assert read(tmp_path, preprocessor, files) == ["uno dos", "row_unreadable", "row_unreadable"]


def test_audio_within_an_export_is_read(tmp_path: Path, preprocessor):
    audio = f"data:audio/x-wav;base64,{base64.b64encode(CLIP).decode()}"
    lines = [prodigy_row("uno", audio=audio), prodigy_row("dos", audio=audio)]
    broken = prodigy_row("tres", audio="data:audio/wav;base64,A")
    assert read(tmp_path, preprocessor, {"train.jsonl": "\n".join([*lines, broken])}) == [
        *("uno", "dos"),
        "row_unreadable",
    ]
    ids = [row.id for row in read_rows(load_source(str(tmp_path), split="train"))]
    assert ids == ["train/0/0/line 1", "train/0/0/line 2", "train/0/0/line 3"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.json", '[{"id": 1, "audio": "/data/upload/1/ab-a.wav", "transcription": "uno"}]'),
        ("train.csv", "audio,id,transcription\n/data/upload/1/ab-a.wav,1,uno\n"),
    ],
)
def test_what_label_studio_exports_lies_beside_the_clips(
    tmp_path: Path, preprocessor, name: str, content: str
):
    """JSON_MIN and CSV, whose paths are those of its server."""
    assert read(tmp_path, preprocessor, {name: content, "ab-a.wav": CLIP}) == ["uno"]


# ---- corpora ----
def test_texts_of_timit_lose_their_samples(tmp_path: Path, preprocessor):
    files = {
        "TRAIN/DR1/FCJF0/SA1.WAV": CLIP,
        "TRAIN/DR1/FCJF0/SA1.TXT": "0 46797 She had your dark suit.\n",
        "TRAIN/DR1/FCJF0/SA1.PHN": "0 3050 h#\n",
        "TRAIN/DR1/FCJF0/SA2.WAV": CLIP,
        "TRAIN/DR1/FCJF0/SA2.TXT": "0 1 2 are digits\n",
        "TRAIN/DR1/FCJF0/SA3.WAV": CLIP,
        "TRAIN/DR1/FCJF0/SA3.TXT": "0 46797 a number\n0 46797 twice\n",
    }
    assert read(tmp_path, preprocessor, files) == [
        "She had your dark suit.",
        "0 1 2 are digits",
        "0 46797 a number 0 46797 twice",
    ]


@pytest.mark.parametrize(
    ("lists", "clips"),
    [
        (
            {"asr_train.tsv": "id\traw_text\tspeaker_id\n2011-en\tUno.\t7\n"},
            ["en/2011/2011-en.wav"],
        ),
        ({"utt_spk_text.tsv": "0000f7\t17f3b\tUno.\n"}, ["data/00/0000f7.wav"]),
        ({"train.tsv": "1_2_3\tUno.\n"}, ["train/audio/1/2/1_2_3.wav"]),
        ({"train.csv": "path,text\n100.wav,Uno.\n"}, ["audio/train/100.wav"]),
    ],
    ids=["voxpopuli", "openslr", "mls", "fleurs"],
)
def test_clips_are_found_by_their_names_in_folders_below(
    tmp_path: Path, preprocessor, lists: dict[str, str], clips: list[str]
):
    files = {**lists, **dict.fromkeys(clips, CLIP)}
    (split,) = [Path(name).stem for name in lists]
    assert read(tmp_path, preprocessor, files, split) == ["Uno."]


def test_of_two_clips_with_one_name_none_is_taken(tmp_path: Path, preprocessor):
    files = {
        "train.csv": "path,text\na.wav,uno\nb.wav,dos\nc.wav,tres\n",
        **dict.fromkeys(["one/a.wav", "one/b.wav", "two/b.wav"], CLIP),
    }
    expected = ["uno", "audio_missing", "audio_missing"]
    assert read(tmp_path, preprocessor, files) == expected
    assert set(clips_below(str(tmp_path))) == {"a", "a.wav"}


def test_what_listeners_approved_of_is_no_split_to_score(tmp_path: Path, preprocessor):
    files = {"validated.tsv": "client_id\tpath\tsentence\nx\ta.mp3\tuno\n", "clips/a.mp3": CLIP}
    with pytest.raises(MissingSplit) as error:
        read(tmp_path, preprocessor, files)
    assert error.value.only_split("train", "train") == "validated"
    assert MissingSplit("", ["validation"]).only_split("train", "train") is None
