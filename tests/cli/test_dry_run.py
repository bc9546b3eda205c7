"""--dry_run: the table of checks, its errors, and that nothing is left behind."""

import re
import shutil
import tempfile
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hub_clients import HubClients

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.cli import demonstration
from speech_finetuning.cli.dry_run import count_evaluations, count_full_steps, take_sample
from speech_finetuning.cli.exit_status import exit_code_of
from speech_finetuning.data.items import StreamItem
from speech_finetuning.data.positions import StreamPosition
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.training.trainer import SpeechTrainer

COMMON = "--dry_run --do_train --do_eval --max_steps 4000"


def table(log: str) -> dict[str, tuple[str, str]]:
    """{check: (state, what was found)} of the log's last lines."""
    lines = [re.sub(r"^(.*py:\d+|\d\d:\d\d:\d\d) ", "", line) for line in log.splitlines()]
    states = [
        line.split(maxsplit=2) for line in lines if line.startswith(("ok ", "warning ", "error "))
    ]
    return {name: (state, found) for state, name, found in states}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_table_of_checks_and_nothing_left(
    flags: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "exit_status.json").write_text("of an earlier run")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    before = files(tmp_path)
    assert exit_code_of(script.main, [*flags, *COMMON.split(), "--save_total_limit", "3"]) == 0
    assert files(tmp_path) == before
    assert (tmp_path / "output" / "exit_status.json").read_text() == "of an earlier run"
    log = caplog.text
    checks = table(log)
    assert list(checks) == [
        "versions",
        "Hub",
        "data",
        "device",
        "training",
        "scoring",
        "disk",
        "time",
    ]
    assert {name: state for name, (state, _) in checks.items() if state != "ok"} == {
        "device": "warning"
    }
    assert checks["data"][1] == "40 of 64 rows usable" or checks["data"][1].startswith(
        "64 of 64 rows usable"
    )
    assert "for 4,000 steps" in checks["time"][1] and "GB free" in checks["disk"][1]
    assert (
        "transcribes 8 clips alike" in log
        and "data report" in log
        and "<|es|><|transcribe|>" in log
    )
    assert "report.html" not in log  # it was in the folder that is gone


def test_epochs_are_estimated_from_the_rows(flags: list[str], caplog: pytest.LogCaptureFixture):
    words = (
        "--dry_run --do_train --num_train_epochs 50 --save_steps 0.1 --save_total_limit 2".split()
    )
    assert exit_code_of(script.main, [*flags, *words]) == 0
    assert "for 500 steps" in table(caplog.text)["time"][1]  # 50 x 40 rows / 4
    assert "0.00 GB a checkpoint, 0.0 GB in all" in table(caplog.text)["disk"][1]


@dataclass
class FortyRows:
    """Of a SpeechDataset what counting asks for."""

    max_rows: int | None = None
    selection: None = None
    weight: float = 1.0

    def rows_per_pass(self) -> int:
        return 40


@pytest.mark.parametrize(
    ("settings", "num_evaluations"),
    [
        ({}, 5),  # as a short run, whose length nobody has given, will have
        ({"max_steps": 1_200}, 3),  # with the one at the end
        ({"max_steps": 1_200, "eval_steps": 0.25}, 4),
        ({"max_steps": 1_200, "eval_strategy": "no"}, 1),
        ({"max_steps": 1_200, "do_eval": False}, 0),
    ],
)
def test_evaluations_are_counted_as_the_full_run_will_have_them(
    tmp_path: Path, settings: dict[str, Any], num_evaluations: int
):
    flags = {"do_train": True, "do_eval": True, "output_dir": str(tmp_path), **settings}
    full_args = script.TrainingArguments(**flags)
    sets = cast(tuple[SpeechDataset, ...], (FortyRows(),))
    num_steps = count_full_steps(full_args, sets, None)
    assert count_evaluations(full_args, num_steps) == num_evaluations


def test_packing_is_tried_at_its_most_expensive(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Utterances so long that none shares a window, before those that do."""
    collate = script.TrainCollator.__call__
    num_windows = []

    def counted(self: script.TrainCollator, items: list) -> dict:
        assert self.packer is not None
        batch = collate(self, items)
        num_windows.append(len(batch["frame_counts"]))
        return batch

    monkeypatch.setattr(script.TrainCollator, "__call__", counted)
    roomy = {"window_in_seconds": 12, "max_target_positions": 200}
    model = demonstration.make_model(tmp_path / "model", d_model=16, num_layers=1, **roomy)
    words = f"--dry_run --do_train --max_steps 40 --per_device_train_batch_size 6 --pack_utterances {model}".split()
    words.insert(-1, "--model_name_or_path")
    assert exit_code_of(script.main, [*flags, *words]) == 0
    assert len(num_windows) == 3 and num_windows[0] == 6 > num_windows[1] == num_windows[2]


def test_a_full_disk_and_a_loss_that_is_not_finite_are_errors(
    flags: list[str],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        assert exit_code_of(script.main, [*flags, *COMMON.split()]) == 2
    assert (
        table(caplog.text)["disk"][0] == "error"
        and "error: --dry_run: disk: " in capsys.readouterr().err
    )
    assert exit_code_of(script.main, [*flags, *COMMON.split(), "--learning_rate", "1e30"]) == 2
    assert table(caplog.text)["training"][0] == "error"


def test_unusable_data_is_an_error(
    flags: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture,
):
    rows = [
        (demonstration.encode(np.zeros(8000), "WAV"), "" if i % 4 else "uno") for i in range(64)
    ]
    demonstration.write_parquet(tmp_path / "data" / "train-00000.parquet", rows)
    words = [
        *flags,
        "--dry_run",
        "--do_train",
        "--max_steps",
        "9",
        "--dataset_name",
        str(tmp_path / "data"),
    ]
    assert exit_code_of(script.main, words) == 2
    log = capsys.readouterr().err
    assert "error: " in log and "16 of 64 rows usable" in log
    assert exit_code_of(script.main, [*words, "--max_rejected_fraction", "0.8"]) == 0
    assert table(caplog.text)["data"][0] == "warning"


def test_other_failures_are_exit_code_2(
    flags: list[str], capsys: pytest.CaptureFixture, monkeypatch
):
    assert exit_code_of(script.main, [*flags, "--dry_run", "--do_eval"]) == 2
    assert "--dry_run needs --do_train" in capsys.readouterr().err

    def too_large(*args: object) -> None:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(SpeechTrainer, "training_step", too_large)
    assert exit_code_of(script.main, [*flags, *COMMON.split()]) == 2
    assert "out of GPU memory. Append" in capsys.readouterr().err


@pytest.mark.slow
def test_the_hub_is_asked_but_nothing_is_made_there(
    tmp_path: Path, tiny_model: Path, speech: Path, hub_clients: HubClients
):
    words = [*COMMON.split(), "--push_to_hub", "--language", "es"]
    words += ["--model_name_or_path", tiny_model, "--dataset_name", speech, "--output_dir", "out"]
    words += ["--per_device_train_batch_size", "2", "--report_clips", "0"]
    with hub_clients.new_hub() as hub:
        hub.add_repo("model", "alice/mine", {"README.md": b"x"})
        codes = {}
        tokens = ("hf_owner_token", "hf_reader_token")
        cases = [(name, token) for name in ("alice/new", "alice/mine", "mine") for token in tokens]
        for name, token in cases:
            code, _, log = hub.clients.run(tmp_path, [*words, "--hub_model_id", name], token=token)
            codes[name, token] = (code, table(log).get("Hub", ("", ""))[1])
        found = [
            "alice/new does not exist yet, by the token (write) it may be written",
            *["alice/mine may be written"] * 2,
        ]
        assert codes == dict(
            zip(cases, [end for text in found for end in ((0, text), (2, ""))], strict=True)
        )
        assert ("model", "alice/new") not in hub.repos and len(
            hub.commits("model", "alice/mine")
        ) == 1
    assert not (tmp_path / "out").exists()


def test_what_ends_the_stream_ends_the_dry_run():
    position = StreamPosition(row=1, sources=())
    rows = [
        StreamItem(position=position, example={"labels": [1], "duration": 1.0}),
        StreamItem(position=None, error=PermissionError(13, "keep out")),
    ]
    with pytest.raises(PermissionError, match="keep out"):
        take_sample(rows, 64)
    assert take_sample(rows, 1).num_usable_rows == 1


def test_a_run_that_saves_no_checkpoints_is_tried_with_one(
    flags: list[str], caplog: pytest.LogCaptureFixture
):
    """Else nothing would be known of what its model takes."""
    words = "--dry_run --do_train --max_steps 4000 --save_strategy no".split()
    assert exit_code_of(script.main, [*flags, *words]) == 0
    assert table(caplog.text)["disk"][0] == "ok"
