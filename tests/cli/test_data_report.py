"""The data report, and sources that cannot be used at all."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.cli import demonstration
from speech_finetuning.cli.data_report import (
    describe_style,
    report_data,
    warn_of_rows,
)
from speech_finetuning.cli.exit_status import exit_code_of
from speech_finetuning.data.preprocessing import Preprocessor, SpeechDataset
from speech_finetuning.data.sources import load_source
from speech_finetuning.data.stream import SpeechStream

TRAINING = "--do_train --max_steps 1".split()


def write_table(folder: Path, paths: list[str]) -> Path:
    folder.mkdir()
    lines = ["path,text", *(f"{path},uno dos" for path in paths)]
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return folder


def refuse(flags: list[str], more: list[str], capsys: pytest.CaptureFixture) -> list[str]:
    """The lines of a start that ends with exit code 2."""
    assert exit_code_of(script.main, [*flags, *TRAINING, *more]) == 2
    return capsys.readouterr().err.strip().splitlines()


def test_wrong_paths_are_told_with_three_examples(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    data = write_table(tmp_path / "data", [f"clips/{number}.wav" for number in range(30)])
    lines = refuse(flags, ["--dataset_name", str(data)], capsys)
    name = f"{data} train"
    summary = f"error: none of the first 30 rows of {name} can be used: 30 audio_missing."
    start = lines.index(summary)
    for number in range(3):
        assert str(data / "clips" / f"{number}.wav") in lines[start + 1 + number]
    assert "--audio_column_name" in lines[start + 4]
    listing = tmp_path / "output" / "rejected.jsonl"
    assert str(listing) in lines[start + 5]
    rejected = [json.loads(line) for line in listing.read_text().splitlines()]
    assert len(rejected) == 30
    assert {entry["reason"] for entry in rejected} == {"audio_missing"}


def test_swapped_columns_are_told(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    data = write_table(tmp_path / "data", ["clip.wav"] * 5)
    (data / "clip.wav").write_bytes(demonstration.make_rows(1, seed=0)[0][0])
    swapped = ["--audio_column_name", "text", "--text_column_name", "path"]
    lines = refuse(flags, ["--dataset_name", str(data), *swapped], capsys)
    assert any("5 audio_missing" in line for line in lines)
    assert any("Does --audio_column_name name the column" in line for line in lines)


def test_clips_of_an_unknown_format_name_the_command_that_converts_them(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    data = write_table(tmp_path / "data", ["clip.m4a"] * 4)
    (data / "clip.m4a").write_bytes(b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(400))
    lines = refuse(flags, ["--dataset_name", str(data)], capsys)
    assert any("4 audio_unreadable" in line for line in lines)
    assert sum("ffmpeg" in line for line in lines) == 3


def test_one_unusable_source_of_a_mix_is_told(
    flags: list[str], speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    data = write_table(tmp_path / "bad", ["missing.wav"] * 3)
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"- dataset_name: {speech}\n- dataset_name: {data}\n  name: bad\n")
    position = flags.index("--dataset_name")
    others = [*flags[:position], *flags[position + 2 :]]
    lines = refuse(others, ["--data_mix", str(mix)], capsys)
    assert any("none of the first 3 rows" in line and str(data) in line for line in lines)
    shutil.rmtree(tmp_path / "output")


def test_everything_wrong_about_the_data_is_told_at_once(
    flags: list[str], capsys: pytest.CaptureFixture
):
    wrong = """--do_eval --language Spansh --audio_column_name sound --text_column_name words
        --eval_split_name nowhere"""
    lines = refuse(flags, wrong.split(), capsys)
    lines = [line for line in lines if line.startswith("error: ")]
    assert [line.split(":")[1] for line in lines] == [
        " --language Spansh",
        " --audio_column_name sound",
        " --text_column_name words",
        " split 'nowhere'",
    ]


@pytest.mark.parametrize(
    ("texts", "style"),
    [
        (["UNO DOS", "TRES"], "upper case, no punctuation"),
        (["Uno, dos.", "Tres."], "mixed case, punctuation"),
        (["uno dos", "it's a co-op"], "lower case, no punctuation"),
        (["\u4e00\u4e8c"], "no case, no punctuation"),
    ],
)
def test_the_style_of_transcripts(texts: list[str], style: str):
    assert describe_style(texts) == style


def report(
    texts: list[str],
    preprocessor: Preprocessor,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> list[str]:
    """The lines of the report on a table of these transcripts."""
    folder.mkdir()
    (folder / "clip.flac").write_bytes(demonstration.make_rows(1, seed=0)[0][0])
    lines = ["path\ttext", *(f"clip.flac\t{text}" for text in texts)]
    (folder / "train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    dataset = SpeechDataset(load_source(str(folder), split="train"), preprocessor)
    stream = SpeechStream(sets=(dataset,), seed=0, block_size=10, micro_batch_size=1, num_threads=1)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        report_data(stream, 10, None, None)
    return caplog.messages


def test_letters_that_are_written_in_two_ways_are_warned_about_once(
    preprocessor: Preprocessor, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    lines = report(["año ñu", "an\u0303o", "uno"], preprocessor, tmp_path / "mixed", caplog)
    (warning,) = [line for line in lines if "several ways" in line]
    assert "(ñ: U+00F1 (2 times) and U+006E U+0303 (1 time))" in warning
    for number, texts in enumerate((["año", "ñu"], ["an\u0303o", "n\u0303u"], ["uno", "dos"])):
        lines = report(texts, preprocessor, tmp_path / str(number), caplog)
        assert not [line for line in lines if "several ways" in line]


def test_bad_rows_are_warned_about_and_all_listed(
    flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Also those that training does not meet, and each once where it was met."""
    data = write_table(tmp_path / "data", ["clip.flac"] * 11 + ["no.flac"] * 5)
    (data / "clip.flac").write_bytes(demonstration.make_rows(1, seed=0)[0][0])
    with caplog.at_level(logging.INFO):
        script.main([*flags, *TRAINING, "--dataset_name", str(data)])
    (record,) = [record for record in caplog.records if "data report" in record.message]
    listing = tmp_path / "output" / "rejected.jsonl"
    assert record.levelname == "WARNING"
    assert record.message.endswith(f"rejected: 5 audio_missing; see {listing}")
    splits = [json.loads(line)["split"] for line in listing.read_text().splitlines()]
    assert splits.count("data report") == 5 and set(splits) <= {"data report", "train"}


def test_punctuation_that_is_removed_spares_apostrophes_and_says_so(
    preprocessor: Preprocessor, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    texts = ["ka'aguy, uno", "ka\u2019aguy", "ka\u02bcaguy", "'uno'"]
    without = replace(preprocessor, do_remove_punctuation=True)
    lines = report(texts, without, tmp_path / "without", caplog)
    (line,) = [line for line in lines if "apostrophes" in line]
    assert line.strip().startswith("apostrophes inside words, in 3 transcripts, are letters")
    lines = report(texts, preprocessor, tmp_path / "with", caplog)
    assert not [line for line in lines if "apostrophes" in line]


def test_ids_to_exclude_of_no_split_that_is_read_are_told(
    speech: Path, preprocessor: Preprocessor, caplog: pytest.LogCaptureFixture
):
    """As after an entry of a mix was renamed."""
    source = load_source(str(speech), split="train")
    ids = frozenset(["train/0/0/1", "old_name/train/0/0/1", "clips/a.wav"])
    train = SpeechDataset(source, preprocessor, excluded_ids=ids)
    warn_of_rows({"train": [train]})
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(
        "--exclude_rows: ids of no split that is read here (train/): 2 of 3, such as clips/a.wav."
    )
    caplog.clear()
    warn_of_rows({"train": [replace(train, excluded_ids=frozenset(["train/0/0/1"]))]})
    assert caplog.records == []
