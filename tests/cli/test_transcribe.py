"""`bash run.sh transcribe`: what it refuses, and what it writes."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from talker import make_long_clip, make_talker

from speech_finetuning.base.errors import UserError
from speech_finetuning.cli import subtitles, transcribe
from speech_finetuning.model.recogniser import load_recogniser
from speech_finetuning.model.transcription import Transcript

PROJECT = Path(transcribe.__file__).parents[2]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talker(tmp_path_factory.mktemp("talker") / "model")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder with two clips that are alike, a note, a hidden clip and one that is no audio."""
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    clip = make_long_clip(folder)
    shutil.copy(clip, folder / "more" / "again.WAV")
    shutil.copy(clip, folder / ".hidden.wav")
    (folder / "notes.txt").write_text("no clip")
    (folder / "broken.mp3").write_bytes(b"no audio at all" * 100)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("https://x.org/a.mp3", "https://x.org/a.mp3: addresses are not opened. Download the file"),
        (
            "sub/aa.wav",
            "sub/aa.wav: there is no such file or folder. In sub: a.wav. Did you mean sub/a.wav?",
        ),
        ("aa.wav", "In this folder: a.wav, b.wav, empty, sub. Did you mean a.wav?"),
        ("empty", "empty: no audio file in this folder. They end in .3gp, .aac, "),
        ("a.wav b.wav --format srt", "--format srt of 2 files: pass --output_dir FOLDER."),
        ("a.wav --batch_size 0", "--batch_size must be at least 1."),
        ("a.wav --output_dir b.wav", "--output_dir b.wav: is a file."),
        ("a.wav --prompt=", "--prompt is empty. Write a text, or leave it out."),
        ("a.wav --format doc", "invalid choice: 'doc'"),
        ("", "missing: FILE. bash run.sh transcribe --help has an example."),
        ("a.wav sub/a.wav --output_dir out", "several files would be written to a.wav.txt"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "sub").mkdir()
    for name in ("a.wav", "b.wav", "sub/a.wav"):
        (tmp_path / name).touch()
    assert transcribe.main(["model", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_on_a_terminal_errors_are_cut_between_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert transcribe.main(["model", "none.mp3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= 40
    assert "none.mp3: there is no such file or folder." in " ".join(line.strip() for line in lines)


def test_all_that_is_wrong_is_said_at_once(capsys: Any):
    assert transcribe.main(["model", "ftp://a/b", "gone.wav", "--batch_size", "-1"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_refusals_need_no_torch(tmp_path: Path):
    code = "import sys; from speech_finetuning.cli import transcribe; "
    code += "transcribe.main(['m', 'http://x/y']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def test_a_folder_becomes_files_and_one_bad_file_costs_no_other(
    talker: Path, clips: Path, tmp_path: Path, capsys: Any
):
    words = [str(talker), str(clips), "--format", "srt", "--output_dir", str(tmp_path / "out")]
    assert transcribe.main([*words, "--language", "es"]) == 1
    error = capsys.readouterr().err
    assert f"error: {clips / 'broken.mp3'}: Not readable as audio" in error
    assert "error: 1 of 3 files could not be read." in error
    found = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*"))
    assert found == [Path("long.srt"), Path("more/again.srt")]
    text = (tmp_path / "out" / "long.srt").read_text()
    assert text == (tmp_path / "out" / "more" / "again.srt").read_text()
    cue = r"1\n00:00:0\d,\d{3} --> 00:00:0\d,\d{3}\n[a-h]+\n\n2\n"
    assert re.match(cue, text), text[:200]


def test_names_need_not_be_unicode(talker: Path, clips: Path, tmp_path: Path, capfd: Any):
    """The file system's bytes go to the readers as they are; a terminal gets them escaped."""
    name = os.fsdecode(b"sp\xffch.wav")
    (clips / "long.wav").rename(clips / name)
    words = [str(talker), str(clips / name), "--language", "es"]
    folder = tmp_path / os.fsdecode(b"o\xff")
    assert transcribe.main([*words, "--output_dir", str(folder)]) == 0
    assert (folder / os.fsdecode(b"sp\xffch.txt")).read_text()
    assert "sp\\udcffch.wav: " in capfd.readouterr().err


def fail_above(
    limit: int, sizes: list[int], *args: Any, batch_size: int, **kwargs: Any
) -> list[str]:
    sizes.append(batch_size)
    if batch_size > limit:
        raise RuntimeError("CUDA error: out of memory")
    return ["heard"]


def test_out_of_memory_takes_fewer_windows_at_a_time(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    recogniser = load_recogniser("MODEL", str(talker), "cpu")
    sizes: list[int] = []
    target = "speech_finetuning.model.transcription.transcribe"
    monkeypatch.setattr(target, functools.partial(fail_above, 1, sizes))
    transcriber = transcribe.Transcriber(recogniser, "es", "transcribe", 5)
    assert transcriber.transcribe([]) == transcriber.transcribe([]) == ["heard"]
    assert sizes == [5, 2, 1, 1]  # what had no room is not tried again
    assert "note: out of GPU memory: 2 windows at a time (--batch_size)." in capsys.readouterr().err
    monkeypatch.setattr(target, functools.partial(fail_above, 0, sizes))
    with pytest.raises(UserError, match="out of GPU memory with one window at a time. "):
        transcriber.transcribe([])
    monkeypatch.setattr(target, functools.partial(int, "no number"))
    with pytest.raises(TypeError):
        transcriber.transcribe([])


def test_a_language_that_is_none_is_told_before_the_model_is_looked_for(clips: Path, capsys: Any):
    assert transcribe.main(["gone", str(clips / "long.wav"), "--language", "Spansh"]) == 2
    assert capsys.readouterr().err == (
        "error: --language Spansh: no such language. Did you mean Spanish (es)?\n"
    )


def test_what_is_wrong_is_called_an_error_once(talker: Path, clips: Path, capsys: Any):
    words = [str(talker), str(clips / "long.wav"), "--language", "Quechua"]
    assert transcribe.main(words) == 2
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith("error: --language Quechua: the model has no token")
    assert others[0].startswith("  --language es: ")


def test_a_transcript_that_is_there_is_kept(talker: Path, clips: Path, tmp_path: Path, capsys: Any):
    """It may have been corrected by hand."""
    words = [
        str(talker),
        str(clips / "long.wav"),
        "--language",
        "es",
        "--output_dir",
        str(tmp_path),
    ]
    target = tmp_path / "long.txt"
    target.write_text("corrected\n")
    assert transcribe.main(words) == 0
    assert target.read_text() == "corrected\n"
    assert "kept: transcripts that are there already, 1 of 1" in capsys.readouterr().err
    assert transcribe.main([*words, "--overwrite"]) == 0
    assert re.fullmatch(r"[a-h\s]+", target.read_text())


def test_a_reader_that_has_seen_enough_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    def closed(*args: Any) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(transcribe, "plan", closed)
    output = os.dup(1)
    assert transcribe.main(["model", "x.wav"]) == 128 + signal.SIGPIPE
    os.dup2(output, 1)
    assert capfd.readouterr().err == ""


def test_json_of_several_files_is_a_line_for_each(talker: Path, clips: Path, capsys: Any):
    (clips / "broken.mp3").unlink()
    words = [str(talker), str(clips), "--format", "json", "--language", "Spanish"]
    assert transcribe.main([*words, "--device", "cpu"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(record["file"]).name for record in records] == ["long.wav", "again.WAV"]
    assert records[0]["language"] == "es" and records[0]["times"] == "model"
    assert records[0]["duration"] == pytest.approx(records[0]["segments"][-1]["end"], abs=0.01)
    assert records[0]["text"] == " ".join(part["text"] for part in records[0]["segments"])


def test_text_goes_to_the_terminal(talker: Path, clips: Path, capsys: Any):
    assert transcribe.main([str(talker), str(clips / "long.wav"), "--language", "es"]) == 0
    alone = capsys.readouterr().out
    again = [str(clips / "long.wav"), str(clips / "more")]
    assert transcribe.main([str(talker), *again, "--language", "es"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert set(alone.split()[0]) <= set("abcdefgh") and len(lines) == 2
    assert lines[0] == f"{clips / 'long.wav'}: {' '.join(alone.split())}"


def test_a_wrong_model_is_one_line(tmp_path: Path, clips: Path, capsys: Any):
    assert transcribe.main([str(tmp_path / "gone"), str(clips / "long.wav")]) == 2
    assert "error: MODEL " in capsys.readouterr().err


HOSTILE = Transcript(
    segments=[
        (0.0, 3661.2345, "a <b>&\n\n-->  c"),
        (3661.5, 3662.0, "\u0645\u0631\u062d\u0628\u0627"),
    ],
    language="ar",
    has_model_times=True,
)


def test_subtitles_hold_whatever_is_said():
    assert subtitles.as_vtt(HOSTILE) == (
        "WEBVTT\n\n00:00:00.000 --> 01:01:01.234\na &lt;b&gt;&amp; --&gt; c\n\n"
        "01:01:01.500 --> 01:01:02.000\n\u0645\u0631\u062d\u0628\u0627\n"
    )
    srt = subtitles.as_srt(HOSTILE)
    assert srt.startswith("1\n00:00:00,000 --> 01:01:01,234\na <b>& --> c\n\n2\n")
    record = json.loads(subtitles.as_json("x.wav", 3662.0, HOSTILE))
    assert record["segments"][1]["text"] == "\u0645\u0631\u062d\u0628\u0627"
