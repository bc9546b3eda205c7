"""What stands in transcripts although nobody says it, and text that was read in a wrong encoding."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import langcodes
import pytest
from rows import outcomes, read_rows, write_clips

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.listed import WindowLimits
from speech_finetuning.data.oddities import DESCRIPTIONS, ODDITIES, as_it_was, find_oddities
from speech_finetuning.data.preprocessing import Preprocessor
from speech_finetuning.data.segments import read_seconds
from speech_finetuning.data.sources import load_source
from speech_finetuning.model.languages import LANGUAGES

Train = Callable[..., dict[str, float]]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<b>uno</b>", {"markup": "<b>"}),
        ("uno &amp; dos", {"markup": "&amp;"}),
        ("uno\\ndos", {"escapes": "\\n"}),
        ("a\\u00f1o", {"escapes": "\\u00f1"}),
        (" NaN ", {"placeholders": "NaN"}),
        ("None", {"placeholders": "None"}),
        ("Speaker 1: hola", {"speaker_names": "Speaker 1:"}),
        ("[risas] sí", {"notes_in_brackets": "[risas]"}),
    ],
)
def test_what_nobody_says_is_found(text: str, found: dict[str, str]):
    assert find_oddities(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "None of them came",
        "AT&T; R&D",
        "a < b > c",
        "C:\\data",
        "it's 3: he said",
        "naan",
        "no (sí)",
    ],
)
def test_what_may_be_said_is_left_alone(text: str):
    assert find_oddities(text) == {}


def test_each_oddity_is_described():
    assert ODDITIES.keys() == DESCRIPTIONS.keys()


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "cp1251"])
@pytest.mark.parametrize(
    "text", ["señal número", "большой дом", "日本語の音声", "Ελληνικά", "œuvre à “voir”"]
)
def test_utf_8_that_was_read_as_something_else_is_told(text: str, encoding: str):
    misread = text.encode("utf-8").decode(encoding, errors="surrogateescape")
    misread = "".join(
        chr(ord(one) - 0xDC00) if 0xDC80 <= ord(one) <= 0xDCFF else one for one in misread
    )
    assert as_it_was(misread) == text
    assert as_it_was(text) is None


def test_no_language_looks_like_that():
    """The names of all languages in all languages, also in capitals and quotation marks."""
    num_names = 0
    for spoken in LANGUAGES:
        for written in LANGUAGES:
            name = langcodes.Language.get(spoken).display_name(written)
            for text in (name, name.upper(), f"{name.upper()}…", f"“{name}”", f"{name}» –"):
                assert as_it_was(text) is None, (text, written)
                num_names += not text.isascii()
    assert num_names > 10_000


def test_a_single_pair_may_be_a_word():
    assert as_it_was("Рё") is None
    assert as_it_was("РёРё") == "ии"


def test_such_a_text_is_never_trained(tmp_path: Path, preprocessor: Preprocessor):
    names = write_clips(tmp_path, 3)
    texts = ["señal", "seÃ±al", "aÃ±o y más"]  # of the last not all is wrong
    lines = [f"{name},{text}" for name, text in zip(names, texts, strict=True)]
    (tmp_path / "train.csv").write_text("\n".join(["path,sentence", *lines]), encoding="utf-8")
    rows = read_rows(load_source(str(tmp_path), split="train"))
    outcome = preprocessor(rows[1])
    assert isinstance(outcome, Rejection) and outcome.reason == "row_unreadable"
    assert "Ã± stands for ñ" in outcome.detail and "señal" not in outcome.detail
    assert not isinstance(preprocessor(rows[0]), Rejection)
    assert not isinstance(preprocessor(rows[2]), Rejection)


def test_it_costs_no_neighbour_its_window(tmp_path: Path):
    (name,) = write_clips(tmp_path, 1)
    lines = [
        "audio,text,start,end",
        f"{name},uno,0,0.3",
        f"{name},aÃ±o,0.4,0.6",
        f"{name},dos,0.6,1",
    ]
    (tmp_path / "train.csv").write_text("\n".join(lines), encoding="utf-8")
    limits = WindowLimits(seconds=4.0, num_tokens=60)
    source = load_source(str(tmp_path), split="train", window_limits=limits)
    assert [row.text for row in read_rows(source)] == ["uno", "aÃ±o", "dos"]


def test_a_run_tells_what_nobody_says(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    names = write_clips(tmp_path / "data", 3)
    texts = ["<i>uno</i>", "<b>dos</b>", "nan"]
    lines = [f"{name},{text}" for name, text in zip(names, texts, strict=True)]
    table = tmp_path / "data" / "train.csv"
    table.write_text("\n".join(["path,sentence", *lines]))
    train(f"--do_train --max_steps 1 --dataset_name {table}")
    assert "of 3 transcripts some contain what nobody says: markup in 2 (as <i>);" in caplog.text
    assert "a word for an empty cell alone in 1 (as nan)" in caplog.text


# ------------------------------------------------------------------------------- tables and times


def test_a_column_that_is_named_twice_is_told(tmp_path: Path):
    (name,) = write_clips(tmp_path, 1)
    table = tmp_path / "train.csv"
    table.write_text(f"path,sentence,sentence\n{name},uno,dos\n")
    with pytest.raises(UserError, match="the header names sentence more than once"):
        load_source(str(table), split="train")
    table.write_text(f"path,sentence,x,x\n{name},uno,dos,tres\n")  # not read
    assert [row.text for row in read_rows(load_source(str(table), split="train"))] == ["uno"]


def test_json_lines_of_an_array_may_end_in_commas(tmp_path: Path, preprocessor: Preprocessor):
    names = write_clips(tmp_path, 2)
    lines = [f'{{"audio": "{name}", "text": "uno"}},' for name in names]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    source = load_source(str(tmp_path), split="train")
    assert outcomes(source, preprocessor) == ["uno", "uno"]


def test_a_key_that_stands_twice_is_told_and_not_trained(
    tmp_path: Path, preprocessor: Preprocessor
):
    names = write_clips(tmp_path, 2)
    lines = [
        f'{{"audio": "{names[0]}", "text": "uno", "text": "dos"}}',
        f'{{"audio": "{names[1]}", "text": "tres"}}',
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    source = load_source(str(tmp_path), split="train")
    assert outcomes(source, preprocessor) == ["row_unreadable", "tres"]
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.json").write_text(f"[{', '.join(lines)}]")
    with pytest.raises(UserError, match="the key text stands twice in one object. Mend it there"):
        load_source(str(tmp_path), split="train")


def test_clips_that_are_missing_do_not_move_the_others(tmp_path: Path):
    """The first clip of a list is gone, and a folder `clips` is there, with something else."""
    names = [name.removeprefix("clips/") for name in write_clips(tmp_path, 3)]
    for name in names[1:]:
        (tmp_path / "clips" / name).rename(tmp_path / name)
    (tmp_path / "clips" / names[0]).rename(tmp_path / "clips" / "other.wav")
    lines = [f"{name},uno" for name in names]
    (tmp_path / "train.csv").write_text("\n".join(["path,sentence", *lines]))
    rows = read_rows(load_source(str(tmp_path), split="train"))
    assert [Path(str(row.audio)).is_file() for row in rows] == [False, True, True]


def test_members_of_a_tar_that_stand_twice_are_told(tmp_path: Path, preprocessor: Preprocessor):
    (name,) = write_clips(tmp_path, 1)
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for text in ("uno", "dos"):
            (tmp_path / "text").write_text(text)
            tar.add(tmp_path / name, "a.wav")
            tar.add(tmp_path / "text", "a.txt")
        tar.add(tmp_path / name, "b.wav")
        tar.add(tmp_path / "text", "b.txt")
    (tmp_path / "text").unlink()
    (tmp_path / name).unlink()
    source = load_source(str(tmp_path), split="train")
    assert outcomes(source, preprocessor) == ["row_unreadable", "dos"]


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("12.5", 12.5),
        (12.5, 12.5),
        ("0:12.5", 12.5),
        ("1:02:03,25", 3723.25),
        ("75:00", 4500.0),
        ("3,5", 3.5),
        ("0,125", 0.125),
        ("7,123456", 7.123456),
        (" 4 ", 4.0),
        ("1e1", 10.0),
    ],
)
def test_times_are_read_as_people_write_them(written: object, seconds: float):
    assert read_seconds(written) == seconds


@pytest.mark.parametrize("written", ["12,345", "1:2:3:4", "abc", "1:234", "", "1,2,3"])
def test_times_that_may_be_something_else_are_none(written: str):
    with pytest.raises(ValueError):
        read_seconds(written)


@pytest.mark.parametrize("name", ["data.zip", "data.tar.gz", "data.7z"])
def test_an_archive_is_to_be_unpacked(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(UserError, match="an archive is not read. Unpack it, and pass the folder."):
        load_source(str(tmp_path / name), split="train")
