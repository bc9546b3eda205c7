"""`bash run.sh export`: what it refuses. What it writes: tests/end_to_end/test_export.py."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from speech_finetuning.cli import export


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model", "missing: --to. bash run.sh export --help has an example."),
        ("model --to onnx", "invalid choice: 'onnx'"),
        ("model --to ggml --quantization int8", "--quantization is of ctranslate2."),
        ("model --to ggml --output_dir full", "--output_dir full: is there already."),
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


def test_on_a_terminal_errors_are_cut_between_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert export.main(["model", "--to", "ggml", "--quantization", "int8"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= 40
    assert "whisper.cpp has a tool of its own for it." in " ".join(line.strip() for line in lines)


def damaged(kind: str, tiny_model: Path, folder: Path) -> Path:
    """A model with the given thing wrong with it."""
    shutil.copytree(tiny_model, folder)
    weights = folder / "model.safetensors"
    if kind == "cut":
        os.truncate(weights, 1000)
    if kind == "none":
        weights.unlink()
    if kind == "another kind":
        (folder / "config.json").write_text('{"model_type": "bert"}')
    if kind == "adapter":
        (folder / "config.json").unlink()
        settings = {"base_model_name_or_path": "openai/whisper-small"}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    if kind in ("checkpoint of adapters", "weights left out"):
        tensors = load_file(weights)
        name = next(name for name in tensors if name.endswith("fc1.weight"))
        tensor = tensors.pop(name)
        if kind == "checkpoint of adapters":
            tensors[name.replace("weight", "lora_A.default.weight")] = tensor
        save_file(tensors, weights, metadata={"format": "pt"})
    if kind == "tokenizer":
        (folder / "tokenizer.json").write_text('{"model": {}}')
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "model.safetensors: "),
        ("none", "no file named model.safetensors"),
        ("another kind", "bert model; only Whisper"),
        ("adapter", "a PEFT adapter, which is trained on top of openai/whisper-small"),
        ("checkpoint of adapters", "a checkpoint of --lora_rank"),
        ("weights left out", "1 of its weights are missing, such as model."),
        ("tokenizer", "KeyError: "),
    ],
)
def test_a_model_that_nothing_can_use_is_not_written(
    kind: str,
    message: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
):
    """They were copied for whisper.cpp as they are."""
    monkeypatch.chdir(tmp_path)
    damaged(kind, tiny_model, tmp_path / "model")
    capsys.readouterr()
    assert export.main(["model", "--to", "ggml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: MODEL model: ") and message in line
    assert line.endswith("Next: the --output_dir of a training as MODEL")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def stop_halfway(model: Path, folder: Path, quantization: str | None) -> None:
    folder.mkdir()
    (folder / "half").touch()
    raise KeyboardInterrupt


def test_ctrl_c_leaves_nothing_behind(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(export.WRITERS, "ggml", stop_halfway)
    assert export.main([str(tiny_model), "--to", "ggml"]) == 130
    assert capsys.readouterr().err.endswith("stopped by Ctrl-C; nothing was written.\n")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_named_after_the_model_and_never_within_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "model" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    parse = export.make_parser().parse_args
    for name in ("model", "model/", "./model", str(tmp_path / "model"), "owner/model"):
        assert export.check(parse([name, "--to", "ggml"])) == Path("model-ggml")
    monkeypatch.chdir(tmp_path / "model" / "runs")
    assert export.check(parse(["..", "--to", "ggml"])) == tmp_path / "model-ggml"
    assert export.check(parse(["/", "--to", "ggml", "--output_dir", "x"])) == Path("x")


def test_what_is_said_can_be_typed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    """Names may hold spaces, and bytes that are no characters."""
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"my \xff model")
    assert export.main([str(tiny_model), "--to", "ggml", "--output_dir", name]) == 0
    command = b"python whisper.cpp/models/convert-h5-to-ggml.py 'my \xff model' whisper ."
    assert command in (tmp_path / name / "README.md").read_bytes()
    assert "convert-h5-to-ggml.py 'my \\udcff model' whisper ." in capfd.readouterr().out


def test_weights_of_torch_save_are_written_anew(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import torch

    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert export.main(["model", "--to", "ggml"]) == 0
    assert set(load_file(tmp_path / "model-ggml" / "model.safetensors")) == set(tensors)
