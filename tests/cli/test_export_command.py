"""`bash run.sh export`: what it refuses. What it writes: tests/end_to_end/test_export.py."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from speech_finetuning.cli import export


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model", "the following arguments are required: --to"),
        ("model --to onnx", "invalid choice: 'onnx'"),
        ("model --to ggml --quantization int8", "--quantization is of ctranslate2."),
        ("model --to ggml --output_dir full", "--output_dir full: is there already."),
        ("full --to ggml", "MODEL full: no folder with a config.json."),
        ("model --to ctranslate2", "python -m pip install -r requirements-export.txt"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("full", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "model" / "config.json").touch()
    assert export.main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert export.main(["model", "--to", "ggml"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
