"""Corpora and what annotation programs export, as they come: read, or answered in one line."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rows import make_clip, outcomes, read_rows

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.dataset_names import check_path_exists
from speech_finetuning.data.places import clips_below
from speech_finetuning.data.sources import MissingSplit, load_source

CLIP = make_clip(0.5)
SRT = "1\n00:00:00,100 --> 00:00:00,400\nuno\n"


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


# ---- what is not read ----
def answer(folder: Path, files: dict[str, str | bytes], split: str = "train") -> str:
    with pytest.raises(UserError) as error:
        load_source(write(folder, files), split=split)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("talk.eaf", "In ELAN, File, Export As, Subtitles Text writes talk.srt"),
        ("talk.TextGrid", "File, Import, Praat TextGrid File; there File, Export As"),
        ("talk.ass", "ffmpeg -i {folder}/talk.ass {folder}/talk.srt"),
        ("talk.docx", "plain text in UTF-8, talk.txt, beside the recording"),
        ("talk.ttml", "Save them as SubRip: {folder}/talk.srt"),
        ("talk.lab", "cp {folder}/talk.lab {folder}/talk.txt"),
        ("list.xlsx", "Save it as CSV in UTF-8: list.csv"),
    ],
)
@pytest.mark.parametrize("has_clips", [True, False])
def test_what_another_program_has_left_is_answered_with_what_to_do(
    tmp_path: Path, name: str, advice: str, has_clips: bool
):
    clips = {"talk.wav": CLIP, "train/a.wav": CLIP} if has_clips else {}
    found = answer(tmp_path / "d", {name: "x", "~$list.xlsx": "x", **clips})
    assert advice.format(folder=tmp_path / "d") in found
    assert "metadata.csv" not in found
    with pytest.raises(UserError, match=re.escape(advice.format(folder=tmp_path / "d"))):
        check_path_exists(str(tmp_path / "d" / name))


def test_a_transcript_alone_is_answered_with_its_folder(tmp_path: Path):
    write(tmp_path, {"talk.srt": SRT, "talk.wav": CLIP})
    with pytest.raises(UserError, match=f"pass its folder, {tmp_path}, with the recording"):
        check_path_exists(str(tmp_path / "talk.srt"))


LABEL_STUDIO = [
    {
        "data": {"audio": "/data/upload/1/ab-talk.wav"},
        "annotations": [
            {
                "result": [
                    {"type": "labels", "value": {"start": 0.1, "end": 0.4, "labels": ["S"]}},
                    {"type": "textarea", "value": {"start": 0.1, "end": 0.4, "text": ["Uno."]}},
                ]
            }
        ],
    },
    {
        "data": {"audio": "/data/upload/1/cd-clip.wav"},
        "annotations": [{"result": [{"type": "textarea", "value": {"text": ["Dos."]}}]}],
    },
]
REGIONS = '[{"start": 0.1, "end": 0.4, "channel": 0, "labels": ["S"]}]'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.json", f'[{{"audio": "a.wav", "labels": {REGIONS}, "transcription": "uno", %s}}]'),
        ("train.csv", 'audio,labels,transcription,%s\na.wav,"{}",uno,7,3.1\n'),
    ],
)
def test_regions_without_their_texts_are_not_trained_as_the_whole_recording(
    tmp_path: Path, name: str, content: str
):
    columns = '"annotator": 7, "lead_time": 3.1' if "json" in name else "annotator,lead_time"
    content = (content % columns).replace("{}", REGIONS.replace('"', '""'))
    assert "Export them as JSON" in answer(tmp_path, {name: content, "a.wav": CLIP})


STM = ";; a comment\na 1 Ann 0.10 0.40 <o,f0,female> Uno , dos.\na 1 Ann 0.1 0.2 "
STM += "ignore_time_segment_in_scoring\nb 1 Bob 0.00 0.50 Tres\n"
CLIPS_OF_VCTK = {"wav48/p1/p1_1.wav": CLIP, "wav48/p2/p2_1.wav": CLIP}
CLIPS_OF_MLS = {"audio/1/2/1_2_0.flac": CLIP, "audio/1/2/1_2_1.flac": CLIP}


@pytest.mark.parametrize(
    ("files", "texts"),
    [
        (
            {"export.json": json.dumps(LABEL_STUDIO), "ab-talk.wav": CLIP, "cd-clip.wav": CLIP},
            {"train": ["Uno.", "Dos."]},
        ),
        (
            {"dev/stm/a.stm": STM, "dev/sph/a.sph": CLIP, "dev/sph/b.sph": CLIP},
            {"dev": ["Uno , dos.", "Tres"]},
        ),
        (
            {"transcripts.txt": "1_2_0\tUno.\n1_2_1\tDos tres.\n", **CLIPS_OF_MLS},
            {"train": ["Uno.", "Dos tres."]},
        ),
        (
            {
                "Libri/train/1/2/1-2.trans.txt": "1-2-0 UNO DOS\n",
                "Libri/dev-clean/1/3/1-3.trans.txt": "1-3-0 TRES\n",
                "Libri/train/1/2/1-2-0.flac": CLIP,
                "Libri/dev-clean/1/3/1-3-0.flac": CLIP,
            },
            {"train": ["UNO DOS"], "dev-clean": ["TRES"]},
        ),
        ({"lists/texts_v0.8.txt": "B1 而 对\n", "wav/train/S/B1.wav": CLIP}, {"train": ["而 对"]}),
        (
            {"txt/p1/p1_1.txt": "Uno dos.\n", "txt/p2/p2_1.txt": "Tres.", **CLIPS_OF_VCTK},
            {"train": ["Uno dos.", "Tres."]},
        ),
    ],
    ids=["label studio", "stm", "mls", "librispeech", "aishell", "vctk"],
)
def test_the_command_of_an_answer_makes_a_table(
    tmp_path: Path, preprocessor, files: dict[str, str | bytes], texts: dict[str, list[str]]
):
    folder = tmp_path / "a folder"
    found = answer(folder, files, "export" if "export.json" in files else "train")
    command = re.search(": ((find|for|python) .*)", found)[1].replace("python", sys.executable, 1)
    subprocess.run(["bash", "-c", command], check=True)
    clips_below.cache_clear()  # in another process it is empty
    tables = sorted(folder.rglob("*.?sv"))
    read = {table.stem: load_source(str(table), split="train") for table in tables}
    # find takes the files of a folder in any order.
    found = {name: sorted(outcomes(source, preprocessor)) for name, source in read.items()}
    assert found == {name: sorted(of_split) for name, of_split in texts.items()}


@pytest.mark.parametrize(
    "files",
    [
        {
            "export.json": json.dumps(LABEL_STUDIO).replace('"audio"', '"$(touch pwned)"'),
            "ab-talk.wav": CLIP,
        },
        {"x;touch pwned;.ass": "[Events]", "x;touch pwned;.wav": CLIP},
        {"x';touch pwned;'.txt": "B1 uno\n", "wav/B1.wav": CLIP},
    ],
    ids=["label studio", "subtitles", "names"],
)
def test_a_strangers_names_run_nothing_in_the_command_of_an_answer(
    tmp_path: Path, files: dict[str, str | bytes]
):
    """Commands are pasted into a shell, and file names and keys are whatever a corpus says."""
    folder = tmp_path / "data"
    found = answer(folder, files, "export" if "export.json" in files else "train")
    command = re.search(": ((find|for|python|ffmpeg) .*)", found)[1]
    command = command.replace("python", sys.executable, 1).replace("ffmpeg", "true", 1)
    subprocess.run(["bash", "-c", command], cwd=tmp_path)
    assert list(tmp_path.rglob("pwned")) == []
