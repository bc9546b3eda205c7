"""--average_checkpoints and --base_weight_shares: what is tried, and that the best of it is saved."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from speech_finetuning.base.errors import UserError
from speech_finetuning.training.averaging import (
    BlendedWeights,
    MeanWeights,
    SavedWeights,
    last_checkpoints,
)

Train = Callable[[str], dict[str, float]]
STEPS = "--do_train --do_eval --max_steps 6 --save_steps 2 --eval_steps 6 --learning_rate 0.02"


def write_model(folder: Path, **tensors: torch.Tensor) -> SavedWeights:
    folder.mkdir()
    save_file(
        {name.replace("_", "."): t for name, t in tensors.items()}, folder / "model.safetensors"
    )
    return SavedWeights(folder, adapter_scale=2.0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def candidates(folder: Path) -> list[dict]:
    return json.loads((folder / "weights.json").read_text())


def test_means_and_blends_are_exact_at_their_ends(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, 5, generator=generator) for _ in range(3)]
    models = [write_model(tmp_path / str(i), fc1_weight=t) for i, t in enumerate(tensors)]
    assert torch.equal(MeanWeights(models=models[:1]).tensor("fc1.weight"), tensors[0])
    mean = MeanWeights(models=models).tensor("fc1.weight")
    torch.testing.assert_close(mean, torch.stack(tensors).double().mean(0).float())
    base = {"fc1.weight": tensors[2]}
    for share, expected in ((0.0, tensors[0]), (1.0, tensors[2])):
        blend = BlendedWeights(model=models[0], base=base, base_share=share)
        assert torch.equal(blend.tensor("fc1.weight"), expected)
    third = BlendedWeights(model=models[0], base=base, base_share=0.3).tensor("fc1.weight")
    torch.testing.assert_close(third, 0.7 * tensors[0] + 0.3 * tensors[2])


def test_a_mean_in_half_precision_is_of_single_precision(tmp_path: Path):
    halves = [torch.tensor([1.0], dtype=torch.float16), torch.tensor([2049.0]).half()]
    models = [write_model(tmp_path / str(i), fc1_weight=t) for i, t in enumerate(halves)]
    assert MeanWeights(models=models).tensor("fc1.weight").item() == 1024.5


def test_adapters_are_added_to_their_layers(tmp_path: Path):
    tensors = {
        "fc1.base_layer.weight": torch.ones(2, 3),
        "fc1.base_layer.bias": torch.zeros(2),
        "fc1.lora_A.default.weight": torch.tensor([[1.0, 2.0, 3.0]]),
        "fc1.lora_B.default.weight": torch.tensor([[1.0], [10.0]]),
        "layer_norm.weight": torch.ones(2),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    saved = SavedWeights(tmp_path, adapter_scale=2.0)
    assert set(saved.names()) == {"fc1.weight", "fc1.bias", "layer_norm.weight"}
    assert saved.tensor("fc1.weight").tolist() == [[3, 5, 7], [21, 41, 61]]
    assert saved.tensor("fc1.bias").tolist() == [0, 0]


@pytest.mark.parametrize("keeps_higher_loss", [True, False])
@pytest.mark.parametrize("adapters", ["", "--lora_rank 2"])
def test_the_better_of_trained_and_average_is_saved(
    train: Train, tmp_path: Path, keeps_higher_loss: bool, adapters: str
):
    """One of the two directions keeps the average, the other the trained weights."""
    more = f"--average_checkpoints 3 --metric_for_best_model loss {adapters}"
    metrics = train(f"{STEPS} {more} --greater_is_better {keeps_higher_loss}")
    output = tmp_path / "output"
    trained, average = candidates(output)
    assert average["weights"] == "average of steps 2, 4, 6"
    losses = [candidate["scores"]["eval_loss"] for candidate in (trained, average)]
    assert losses[0] != losses[1]
    best = max(losses) if keeps_higher_loss else min(losses)
    assert [loss == best for loss in losses] == [trained["is_kept"], average["is_kept"]]
    assert metrics["eval_loss"] == best
    scored = train(f"--do_eval --model_name_or_path {output} --output_dir {tmp_path / 'scored'}")
    assert scored["eval_loss"] == pytest.approx(best, rel=1e-5)
    for name in ("predictions_eval.jsonl", "worst_eval.txt"):
        assert (output / name).read_text() == (tmp_path / "scored" / name).read_text()
    assert not list(output.glob("*eval_average*"))
    assert "average of steps 2, 4, 6" in (output / "README.md").read_text()
    assert transcripts_on_page(output) == transcripts(output)
    if not adapters:
        folders = last_checkpoints(output, 3 if average["is_kept"] else 1)
        expected = MeanWeights(models=[SavedWeights(folder) for folder in folders])
        for name, tensor in weights(output).items():
            assert torch.equal(tensor, expected.tensor(name)), name


def test_a_finished_run_can_be_averaged(train: Train, tmp_path: Path):
    train(STEPS)
    assert not (tmp_path / "output" / "weights.json").exists()
    trained = weights(tmp_path / "output")
    more = "--metric_for_best_model loss --greater_is_better"
    for direction in ("True", "False"):
        train(f"{STEPS} --average_checkpoints 2 {more} {direction}")
        is_trained = candidates(tmp_path / "output")[0]["is_kept"]
        found = weights(tmp_path / "output")
        assert all(torch.equal(found[name], trained[name]) for name in trained) == is_trained
    train(STEPS)
    found = weights(tmp_path / "output")
    assert all(torch.equal(found[name], trained[name]) for name in trained)


@pytest.mark.parametrize("adapters", ["", "--lora_rank 2"])
def test_shares_run_from_the_trained_to_the_untouched_model(
    train: Train, tmp_path: Path, adapters: str
):
    more = "--base_weight_shares 1 0 0.5 --eval_before_training --metric_for_best_model loss"
    metrics = train(f"{STEPS} {adapters} {more}")
    trained, half, untouched = candidates(tmp_path / "output")
    assert [half["weights"], untouched["weights"]] == [
        "50 % of the untouched model",
        "100 % of the untouched model",
    ]
    for name in ("loss", "wer", "cer", "hits"):
        assert untouched["scores"][f"eval_{name}"] == metrics[f"zero_shot_{name}"]
    best = min((trained, half, untouched), key=lambda each: each["scores"]["eval_loss"])
    assert best["is_kept"] and metrics["eval_loss"] == best["scores"]["eval_loss"]


def test_the_transcripts_are_those_of_the_best_step(train: Train, tmp_path: Path):
    """Although a later step was scored after it."""
    more = "--load_best_model_at_end --metric_for_best_model loss --greater_is_better True"
    metrics = train(f"{STEPS} --eval_steps 2 {more}")
    output = tmp_path / "output"
    history = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())
    assert Path(history["best_model_checkpoint"]).name == "checkpoint-2"
    scored = train(f"--do_eval --model_name_or_path {output} --output_dir {tmp_path / 'scored'}")
    assert metrics["eval_loss"] == pytest.approx(scored["eval_loss"], rel=1e-5)
    for name in ("predictions_eval.jsonl", "worst_eval.txt"):
        assert (output / name).read_text() == (tmp_path / "scored" / name).read_text()
    assert not list(output.glob("*eval_best*"))
    assert transcripts_on_page(output) == transcripts(output)


def transcripts(folder: Path) -> dict[str, str]:
    lines = (folder / "predictions_eval.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["id"]: record["prediction"] for record in records}


def transcripts_on_page(folder: Path) -> dict[str, str]:
    """Of the explorer's last table; a text as written is left out where it is the counted one."""
    page = (folder / "report.html").read_text()
    (text,) = re.findall(r'<script type="application/json" id="tables">(.*?)</script>', page, re.S)
    return {row[0]: row[9] or row[6] for row in json.loads(text)[-1]["rows"]}


def test_equal_scores_keep_the_trained_weights(train: Train, tmp_path: Path):
    train(f"{STEPS} --base_weight_shares 0.0001 --metric_for_best_model wer")
    trained, blend = candidates(tmp_path / "output")
    assert blend["scores"]["eval_wer"] == trained["scores"]["eval_wer"] and trained["is_kept"]


def test_too_few_checkpoints_are_said(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    train(f"{STEPS} --save_steps 3 --average_checkpoints 5")
    assert "--average_checkpoints 5: there are only 2 complete ones" in caplog.text
    assert candidates(tmp_path / "output")[1]["weights"] == "average of steps 3, 6"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--do_train --max_steps 2 --average_checkpoints 2", "needs --do_train and --do_eval"),
        ("--do_eval --base_weight_shares 0.5", "needs --do_train and --do_eval"),
        (f"{STEPS} --average_checkpoints 0", "must be at least 1"),
        (f"{STEPS} --average_checkpoints 3 --save_total_limit 2", "Use --save_total_limit 3"),
        (f"{STEPS} --base_weight_shares 30", "must lie between 0"),
    ],
)
def test_flags_that_cannot_be_are_one_line(train: Train, words: str, message: str):
    with pytest.raises(UserError, match=message):
        train(words)
