"""--fp16 with a real loss scaler, on the CPU: see tests/support/fp16_on_cpu.py."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fp16_on_cpu import fp16_on_cpu
from safetensors.torch import load_file

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.training.loss import TokenWeightedLoss

Train = Callable[[str], dict[str, float]]


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with fp16_on_cpu():
        yield


def losses(output: Path, step: int) -> list[float]:
    state = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def weights(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoint-{step}" / "model.safetensors")


def scale(output: Path, step: int) -> float:
    return torch.load(output / f"checkpoint-{step}" / "scaler.pt", weights_only=True)["scale"]


def are_equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(some[name], others[name]) for name in others)


def test_a_run_with_a_loss_scaler_learns_and_continues_exactly(train: Train, tmp_path: Path):
    words = "--do_train --max_steps 4 --save_steps 2 --logging_steps 1 --learning_rate 1e-2"
    train(f"{words} --fp16 --output_dir {tmp_path / 'half'}")
    train(f"{words} --output_dir {tmp_path / 'full'}")
    in_half = losses(tmp_path / "half", 4)
    in_full = losses(tmp_path / "full", 4)
    assert in_half != in_full and in_half == pytest.approx(in_full, rel=0.02)
    assert scale(tmp_path / "half", 4) == 65536

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "half" / "checkpoint-2", again / "checkpoint-2")
    shutil.copy(tmp_path / "half" / "run_info.json", again)
    train(f"{words} --fp16 --output_dir {again}")
    assert losses(again, 4) == in_half
    assert are_equal(weights(again, 4), weights(tmp_path / "half", 4))


class BrokenLoss(TokenWeightedLoss):
    """NaN in its second call."""

    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        BrokenLoss.calls += 1
        loss = super().__call__(*args, **kwargs)
        return loss * float("nan") if BrokenLoss.calls == 2 else loss


@pytest.mark.parametrize("flags_of_step", ["--max_grad_norm 0", "--optim adamw_torch"])
def test_a_nan_is_skipped_and_lowers_the_scale(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags_of_step: str
):
    """Without clipping, whose question the scaler could do without; and with an optimiser that is
    not fused, so that the scaler itself decides on the step."""
    monkeypatch.setattr(script, "TokenWeightedLoss", BrokenLoss)
    monkeypatch.setattr(BrokenLoss, "calls", 0)
    output = tmp_path / "output"
    words = "--do_train --max_steps 3 --save_steps 1 --logging_steps 1 --fp16"
    train(f"{words} {flags_of_step}")
    assert are_equal(weights(output, 1), weights(output, 2))
    assert not are_equal(weights(output, 2), weights(output, 3))
    assert [scale(output, step) for step in (1, 2, 3)] == [65536, 32768, 32768]
    state = json.loads((output / "checkpoint-3" / "stream_state.json").read_text())
    assert state["counts"]["num_skipped_steps"] == 1
