"""--lora_rank: only adapters are trained, a plain checkpoint comes out, and a continued run is
exact."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import WhisperForConditionalGeneration

from speech_finetuning.base.errors import UserError
from speech_finetuning.cli import demonstration
from speech_finetuning.model.adapters import add_adapters, merged_weights

Train = Callable[[str], dict[str, float]]


def plain(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_adapters_change_the_blocks_only_and_the_result_is_plain(
    train: Train, tmp_path: Path, tiny_model: Path
):
    """The score is that of the model with adapters in memory; the saved one is scored by a run of
    its own."""
    metrics = train(
        "--do_train --do_eval --max_steps 4 --lora_rank 2 --learning_rate 0.02 --gradient_checkpointing"
    )
    before, after = plain(tiny_model), plain(tmp_path / "output")
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    expected = {
        n for n in after if n.split(".")[-2] in "q_proj k_proj v_proj out_proj fc1 fc2".split()
    }
    assert changed == {name for name in expected if name.endswith("weight")} and len(changed) == 16
    difference = (
        after["model.decoder.layers.0.fc1.weight"] - before["model.decoder.layers.0.fc1.weight"]
    )
    assert torch.linalg.matrix_rank(difference, rtol=1e-3) == 2
    again = train(
        f"--do_eval --model_name_or_path {tmp_path / 'output'} --output_dir {tmp_path / 'again'}"
    )
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert again["eval_wer"] == metrics["eval_wer"]
    state = json.loads((tmp_path / "output" / "checkpoint-4" / "trainer_state.json").read_text())
    assert any(entry.get("grad_norm", 0) > 0 for entry in state["log_history"])


def test_a_frozen_encoder_gets_no_adapters(train: Train, tmp_path: Path, tiny_model: Path):
    train("--do_train --max_steps 2 --lora_rank 2 --freeze_encoder --learning_rate 0.02")
    before, after = plain(tiny_model), plain(tmp_path / "output")
    changed = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"decoder"}


def test_a_continued_run_is_exact_and_keeps_its_rank(train: Train, tmp_path: Path):
    model = demonstration.make_model(tmp_path / "model", d_model=16, num_layers=1, dropout=0.2)
    common = f"--do_train --max_steps 8 --save_steps 3 --model_name_or_path {model} --lora_rank 2 --label_smoothing 0.1"
    common = common.replace("label_smoothing", "label_smoothing_factor")
    for name in ("whole", "parts"):
        train(f"{common} --output_dir {tmp_path / name}")
    for name in ("checkpoint-6", "checkpoint-8"):
        (tmp_path / "parts" / name).rename(tmp_path / name)
    train(f"{common} --output_dir {tmp_path / 'parts'}")
    whole, parts = plain(tmp_path / "whole"), plain(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(UserError, match="lora_rank was 2"):
        train(f"{common} --output_dir {tmp_path / 'parts'} --lora_rank 4")


def test_the_best_of_several_checkpoints_is_saved_merged(train: Train, tmp_path: Path):
    flags = "--do_train --do_eval --max_steps 6 --save_steps 2 --eval_steps 2 --lora_rank 2 --learning_rate 0.05"
    metrics = train(f"{flags} --load_best_model_at_end True --metric_for_best_model loss")
    again = train(
        f"--do_eval --model_name_or_path {tmp_path / 'output'} --output_dir {tmp_path / 'again'}"
    )
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_merging_equals_the_adapters(tiny_model: Path):
    model = WhisperForConditionalGeneration.from_pretrained(tiny_model)
    add_adapters(model, 3, ".*")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval()  # their dropout as well
    merged = WhisperForConditionalGeneration.from_pretrained(tiny_model).eval()
    features, ids = torch.randn(2, 80, 400), torch.tensor([[1, 2, 3]] * 2)
    before = merged(input_features=features, decoder_input_ids=ids).logits
    merged.load_state_dict(merged_weights(model))
    logits = [m(input_features=features, decoder_input_ids=ids).logits for m in (model, merged)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, logits[0], atol=1e-2)


def test_without_peft_the_error_names_the_command(train: Train, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="pip install -r requirements-lora.txt"):
        train("--do_train --max_steps 1 --lora_rank 2")
