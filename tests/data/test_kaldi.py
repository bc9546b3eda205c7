"""Kaldi's data folders: whole recordings, segments, and what is refused."""

import subprocess
from pathlib import Path

import pytest
from rows import make_clip, outcomes, read_rows

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.sources import load_source


def write_kaldi(folder: Path, **files: str) -> Path:
    """wav/a.wav of two seconds, and the files, whose names end in _ for a dot."""
    (folder / "wav").mkdir(parents=True)
    (folder / "wav" / "a.wav").write_bytes(make_clip(2.0))
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def test_segments_of_recordings(tmp_path: Path, preprocessor):
    folder = write_kaldi(
        tmp_path / "data",
        wav_scp="rec wav/a.wav\n",
        segments="u1 rec 0.0 0.5\nu2 rec 0.5 -1\nu3 rec 3.0 4.0\nu4 gone 0 1\nu5 rec 0\nu6 rec 0 1 2\n",
        utt2spk="u1 anna\nu2 ben\n",
        text="u1 uno dos\nu2\ttres\nu3 seis\nu4 x\nu5 x\nu6 x\nu7 unused\n",
    )
    source = load_source(str(folder), split="train")
    assert (source.kind, source.num_rows) == ("kaldi", 6)
    rows = read_rows(source)
    assert [row.speaker for row in rows[:3]] == ["anna", "ben", None]
    texts = outcomes(source, preprocessor)
    assert texts == ["uno dos", "tres", "segment_outside_audio", *["row_unreadable"] * 3]
    assert [preprocessor(row)["duration"] for row in rows[:2]] == [0.5, 1.5]
    details = [row.rejection.detail for row in rows[3:]]
    assert "recording gone is not in wav.scp" in details[0]
    assert "expected a recording and two times" in details[1] and "channel 2" in details[2]


def test_whole_recordings_splits_and_texts_without_audio(
    tmp_path: Path, preprocessor, caplog: pytest.LogCaptureFixture
):
    write_kaldi(tmp_path, wav_scp="")
    for split in ("train", "dev"):
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        (folder / "wav.scp").write_text("u1 wav/a.wav\nu2 wav/gone.wav\n")  # from the top
        (folder / "text").write_text("u1 uno\nu2 dos\nu3 tres\n")
    (tmp_path / "wav.scp").unlink()
    for split in ("train", "dev"):
        source = load_source(str(tmp_path), split=split)
        assert outcomes(source, preprocessor) == ["uno", "audio_missing"]
    assert "utterances of text without audio, which are not read: 1, the first is u3" in caplog.text


def test_commands_are_never_run(tmp_path: Path):
    ran = tmp_path / "ran"
    folder = write_kaldi(
        tmp_path / "data",
        wav_scp=f"u1 wav/a.wav\nu2 touch {ran}; cat wav/a.wav |\n",
        text="u1 uno\nu2 dos\n",
    )
    with pytest.raises(UserError, match=r"wav.scp, line 2: .* is a command, .* never run") as error:
        load_source(str(folder), split="train")
    assert not ran.exists() and "\n" not in str(error.value)
    (folder / "wav.scp").write_text("u1 wav/a.wav\nu2 raw.ark:42\n")
    with pytest.raises(UserError, match=r"line 2: raw.ark:42 is a place in an archive"):
        load_source(str(folder), split="train")


def test_the_command_of_the_refusal_mends_it(tmp_path: Path, preprocessor):
    folder = write_kaldi(tmp_path / "data", wav_scp="u1 cat wav/a.wav |\n", text="u1 uno\n")
    with pytest.raises(UserError) as error:
        load_source(str(folder), split="train")
    command = str(error.value).partition("will be read: ")[2]
    (folder / "wav" / "u1.wav").unlink(missing_ok=True)
    subprocess.run(["sh", "-c", command], cwd=folder, check=True)
    assert outcomes(load_source(str(folder), split="train"), preprocessor) == ["uno"]


def test_texts_are_needed_to_train(tmp_path: Path):
    folder = write_kaldi(tmp_path / "data", wav_scp="u1 wav/a.wav\n")
    with pytest.raises(UserError, match="has wav.scp, but no file text"):
        load_source(str(folder), split="train")
    assert load_source(str(folder), split="train", text_required=False).num_rows == 1


@pytest.mark.parametrize("separator", [" ", "\t", "  ", " \t"])
def test_a_command_is_one_whatever_is_before_it(tmp_path: Path, separator: str):
    line = f"u1{separator}touch ran; cat wav/a.wav |\n"
    folder = write_kaldi(tmp_path / "data", wav_scp=line, text="u1 uno\n")
    with pytest.raises(UserError, match="is a command, and commands in data are never run"):
        load_source(str(folder), split="train")


@pytest.mark.parametrize("name", ["wav.scp", "text", "segments", "utt2spk"])
def test_an_utterance_that_is_there_twice_is_one_line(tmp_path: Path, preprocessor, name: str):
    files = {"wav.scp": "r wav/a.wav", "text": "r uno", "segments": "r r 0 1", "utt2spk": "r anna"}
    folder = write_kaldi(tmp_path / "data")
    for other, line in files.items():
        (folder / other).write_text(f"\ufeff{line}\r\n\r\n{line}\r\n")  # alike: harmless
    assert outcomes(load_source(str(folder), split="train"), preprocessor) == ["uno"]
    with (folder / name).open("a") as file:
        file.write("r other 0 2\n")
    with pytest.raises(UserError, match=f"{name}: r is there twice, with different contents"):
        load_source(str(folder), split="train")


def test_a_first_path_that_is_too_long_is_missing(tmp_path: Path, preprocessor):
    (tmp_path / "wav.scp").write_text(f"u1 {'a' * 300}.wav\n")
    (tmp_path / "text").write_text("u1 uno\n")
    source = load_source(str(tmp_path), split="train")
    assert outcomes(source, preprocessor) == ["audio_unreadable"]
