"""Exit codes, the line on the terminal, and exit_status.json."""

import errno
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import RunEnded, UserError
from speech_finetuning.cli.exit_status import exit_code_of, is_dry_run

ENDINGS = [
    (UserError("wrong flag\nwrong file"), 2, "error: wrong flag\nerror: wrong file\n"),
    (RunEnded(75, "no network"), 75, "error: no network\n"),
    (RunEnded(130, "ended by SIGINT"), 130, "stopped by Ctrl-C. "),
    (RunEnded(143, "ended by SIGTERM"), 143, "stopped: ended by SIGTERM. "),
    (torch.OutOfMemoryError("x"), 74, "error: out of GPU memory. Append "),
    (OSError(errno.ENOSPC, "No space left"), 73, "error: the disk is full: "),
    (
        RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space (28)"
        ),
        2,
        "error: shared memory is full: unable to allocate",
    ),
]


class Failing:
    """A main() that ends with an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, argv: list[str], stop: object) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "told"), ENDINGS, ids=[f"{e[1]} {type(e[0]).__name__}" for e in ENDINGS]
)
def test_expected_failures_are_lines(
    error: Exception, code: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert exit_code_of(Failing(error), ["--output_dir", str(tmp_path)]) == code
    assert capsys.readouterr().err.startswith(told)
    assert json.loads((tmp_path / "exit_status.json").read_text())["code"] == code


def test_a_refusal_leaves_nothing_among_the_data(tmp_path: Path):
    words = ["--dataset_name", str(tmp_path), "--output_dir", str(tmp_path)]
    assert exit_code_of(Failing(UserError("lies in the folder of the data")), words) == 2
    assert list(tmp_path.iterdir()) == []


def test_being_stopped_is_no_error(capsys: pytest.CaptureFixture):
    assert exit_code_of(Failing(RunEnded(128 + signal.SIGINT, "ended by SIGINT")), []) == 130
    assert "error" not in capsys.readouterr().err


def test_a_signal_that_a_library_took_for_its_own_failure_is_no_error(
    capsys: pytest.CaptureFixture,
):
    failed = UserError("the configuration cannot be loaded")
    failed.__context__ = OSError("cannot be loaded")
    failed.__context__.__context__ = RunEnded(128 + signal.SIGINT, "ended by SIGINT")
    assert exit_code_of(Failing(failed), []) == 130
    assert capsys.readouterr().err.startswith("stopped by Ctrl-C. ")


def test_on_a_terminal_a_long_reason_is_cut_between_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Elsewhere it is one line, which `grep` finds whole."""
    reason = f"{'a word or two ' * 10}--a_flag"
    exit_code_of(Failing(UserError(reason)), [])
    assert capsys.readouterr().err == f"error: {reason}\n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    exit_code_of(Failing(UserError(reason)), [])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= 80
    assert lines[0].startswith("error: a word") and lines[1].startswith("  ")
    assert " ".join(" ".join(lines).split()) == f"error: {reason}"


def test_a_bug_keeps_its_traceback(tmp_path: Path):
    with pytest.raises(ZeroDivisionError):
        exit_code_of(Failing(ZeroDivisionError()), ["--output_dir", str(tmp_path)])
    assert json.loads((tmp_path / "exit_status.json").read_text())["reason"] == "crashed"


def test_the_output_folder_is_found_in_the_config_file(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(f"output_dir: {tmp_path}\n")
    words = ["--config", str(tmp_path / "recipe.yaml")]
    assert exit_code_of(Failing(RunEnded(75, "no network")), words) == 75
    assert (tmp_path / "exit_status.json").is_file()


def test_a_refused_start_leaves_a_finished_run_alone(flags: list[str], tmp_path: Path):
    ending = tmp_path / "output" / "exit_status.json"
    words = [*flags, "--do_train", "--max_steps", "1"]
    assert exit_code_of(script.main, words) == 0
    of_run = ending.read_text()
    assert json.loads(of_run)["code"] == 0
    for refused in ("--max_stesp 3", "--do_eval --eval_split_name nowhere"):
        make_older(ending)
        assert exit_code_of(script.main, [*words, *refused.split()]) == 2
        assert ending.read_text() == of_run, refused
    make_older(ending)
    assert exit_code_of(Failing(RunEnded(75, "no network")), words) == 75
    assert json.loads(ending.read_text())["code"] == 75


def make_older(file: Path) -> None:
    """As if it had been written a minute ago, by another process."""
    os.utime(file, (file.stat().st_mtime - 60, file.stat().st_mtime - 60))


@pytest.mark.parametrize(
    ("words", "is_dry"),
    [
        ("--dry_run", True),
        ("--dry_run=True --fp16", True),
        ("--dry-run", True),
        ("--dry_run False", False),
        ("--dry_run --dry_run False", False),
        ("--output_dir --dry_run_of_mine", False),
    ],
)
def test_whether_a_run_is_dry(words: str, is_dry: bool):
    assert is_dry_run(words.split()) == is_dry


def test_an_ending_from_the_future_silences_nobody(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    """A clock was set back, or that of a file server is ahead."""
    folder = tmp_path / "output"
    folder.mkdir()
    ending = folder / "exit_status.json"
    for code in (75, 76):
        ending.write_text("how it ended")
        os.utime(ending, (time.time() + 3600,) * 2)
        assert exit_code_of(Failing(RunEnded(code, "no network")), flags) == code
        assert "error: no network" in capsys.readouterr().err
        assert json.loads(ending.read_text())["code"] == code


@pytest.mark.parametrize("name", ["touch", "write_text"])
def test_an_ending_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str
):
    def fail(*arguments: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, name, fail)
    words = ["--output_dir", str(tmp_path)]
    assert exit_code_of(Failing(OSError(errno.ENOSPC, "No space left")), words) == 73
    assert capsys.readouterr().err.startswith("error: the disk is full")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_may_be_full_in_several_ways(number: int, capsys: pytest.CaptureFixture):
    assert exit_code_of(Failing(OSError(number, os.strerror(number), "a/b")), []) == 73
    assert "the disk is full" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize("name", ["speech/train.csv", "/root/.cache"])
def test_what_may_not_be_read_or_written_is_a_line(
    number: int, name: str, capsys: pytest.CaptureFixture
):
    """A list of somebody else's; the libraries' cache, for a user without a home folder."""
    assert exit_code_of(Failing(OSError(number, os.strerror(number), name)), []) == 2
    (line,) = " ".join(capsys.readouterr().err.split()).splitlines()
    assert line.startswith(f"error: {name}: {os.strerror(number)}. Change who may use it")
    assert ("HF_HOME" in line) == (".cache" in name)


def test_shared_memory_of_a_gpu_is_not_that_of_processes(tmp_path: Path):
    """Triton's, which a kernel may want too much of: that is a bug, with a traceback."""
    error = RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448")
    with pytest.raises(RuntimeError, match="out of resource"):
        exit_code_of(Failing(error), ["--output_dir", str(tmp_path)])
