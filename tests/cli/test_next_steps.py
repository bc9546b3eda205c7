"""The last lines of a run: where the model is, and what can be done with it."""

import logging
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from speech_finetuning.cli import next_steps
from speech_finetuning.cli.next_steps import say_what_next


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run's folder, whose name needs quotes, below the current one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(1_600_000))
    (folder / "worst_eval.txt").touch()
    (folder / "predictions_eval.jsonl").touch()
    return folder


def told(
    caplog: pytest.LogCaptureFixture, output: Path, uploads: Any = None, do_train: bool = True
) -> list[str]:
    caplog.set_level(logging.INFO)
    args: Any = SimpleNamespace(
        output_dir=str(output), do_train=do_train, report_to=["tensorboard"]
    )
    say_what_next(args, uploads)
    return caplog.messages


def test_where_the_model_is_and_what_to_do_with_it(
    output: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(next_steps, "PROJECT", output.parent / "project")
    (output.parent / "project").mkdir()
    (output.parent / "project" / "run.sh").touch()
    assert told(caplog, output) == [
        "done: the model is in my model (1.6 MB)",
        "  transcribe   bash project/run.sh transcribe 'my model' FILE",
        "  try it       bash project/run.sh demo 'my model'",
        "  curves       tensorboard --logdir 'my model/runs'",
        "  worst clips  my model/worst_eval.txt",
        "  transcripts  my model/predictions_eval.jsonl",
        "  push         the same command with --push_to_hub",
    ]


def test_a_command_below_the_home_folder_works_as_it_is_typed(
    output: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Within quotation marks the shell would look for a folder that is called ~."""
    monkeypatch.setenv("HOME", str(output.parent))
    (output.parent / "run.sh").touch()
    monkeypatch.setattr(next_steps, "PROJECT", output.parent)
    (output.parent / "elsewhere").mkdir()
    monkeypatch.chdir(output.parent / "elsewhere")
    lines = told(caplog, output)
    command = lines[1].split(maxsplit=1)[1]
    assert command == "bash ~/run.sh transcribe ~/'my model' FILE"
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert words == ["bash", f"{output.parent}/run.sh", "transcribe", str(output), "FILE"]


def test_a_run_whose_working_folder_is_gone_says_where_all_is(
    output: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    (output.parent / "gone").mkdir()
    monkeypatch.chdir(output.parent / "gone")
    (output.parent / "gone").rmdir()
    monkeypatch.setenv("HOME", "/home/nobody")
    (output.parent / "run.sh").touch()
    monkeypatch.setattr(next_steps, "PROJECT", output.parent)
    command = told(caplog, output)[1].split(maxsplit=1)[1]
    assert command == f"bash {output.parent}/run.sh transcribe '{output}' FILE"


def test_only_what_is_there_is_named(output: Path, caplog: pytest.LogCaptureFixture):
    (output / "report.html").touch()
    (output / "worst_test.txt").touch()
    lines = told(caplog, output, SimpleNamespace(repo_id="alice/whisper-es"))
    assert "  report       my model/report.html" in lines
    assert "  worst clips  my model/worst_test.txt" in lines
    assert lines[-1] == f"  on the Hub   {huggingface_hub.constants.ENDPOINT}/alice/whisper-es"


def test_a_run_that_only_scores_has_no_model_to_try(output: Path, caplog: pytest.LogCaptureFixture):
    (output / "model.safetensors").unlink()
    lines = told(caplog, output, do_train=False)
    assert lines[0] == "done: the results are in my model"
    assert not any("demo" in line or "push" in line for line in lines)


def test_a_large_model_is_told_in_gb(output: Path):
    with open(output / "model-2.safetensors", "wb") as file:
        file.truncate(3_000_000_000)
    assert next_steps.size_of_model(output) == "3.0 GB"
