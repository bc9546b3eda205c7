"""The whole job in this process: losses, what is saved, scores, rejections, refusals,
continuing."""

import functools
import itertools
import json
import logging
import math
import os
import shutil
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    BertConfig,
    WhisperForConditionalGeneration,
)

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError
from speech_finetuning.cli import demonstration
from speech_finetuning.cli.exit_status import exit_code_of
from speech_finetuning.data.audio import decode_audio, pad_features
from speech_finetuning.data.passes import read_pass
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.reading import read_audio
from speech_finetuning.data.sources import load_source
from speech_finetuning.training import reload_check
from speech_finetuning.training.stages import save_final_model
from speech_finetuning.training.trainer import SpeechTrainer

Train = Callable[[str], dict[str, float]]


def output(flags: list[str]) -> Path:
    return Path(flags[flags.index("--output_dir") + 1])


def history(folder: Path, name: str = "loss") -> list[float]:
    """What was logged at every step."""
    state = json.loads(
        max(folder.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
        .joinpath("trainer_state.json")
        .read_text()
    )
    return [entry[name] for entry in state["log_history"] if name in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_whole_job(
    train: Train, flags: list[str], tiny_model: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    metrics = train(
        "--do_train --do_eval --max_steps 4 --eval_steps 2 --save_steps 2 --eval_before_training "
        "--test_split_name test --report_to tensorboard --dataloader_num_workers 1"
    )
    folder = output(flags)
    for key in (
        "wer",
        "cer",
        "wer_ortho",
        "wer_norm",
        "wer_norm_marks",
        "substitutions",
        "deletions",
        "insertions",
    ):
        assert math.isfinite(metrics[f"eval_{key}"]) and math.isfinite(metrics[f"test_{key}"])
    assert metrics["eval_num_rows"] == metrics["test_num_rows"] == 8 and metrics["train_rows"] == 16
    assert json.loads((folder / "all_results.json").read_text()) == pytest.approx(metrics)
    info = json.loads((folder / "run_info.json").read_text())
    assert info["command"].startswith("python ") and "--max_steps 4" in info["command"]
    assert (
        info["versions"]["torch"] == torch.__version__
        and info["data"]["train"][0]["num_rows"] == 40
    )
    card = ModelCard.load(folder / "README.md").data
    assert card.language == "es" and {r.metric_type for r in card.eval_results} == {"wer", "cer"}
    assert list(folder.glob("runs/*/events*")), "TensorBoard files belong to output_dir"
    names = "config generation_config processor_config preprocessor_config tokenizer_config tokenizer".split()
    assert all((folder / f"{name}.json").is_file() for name in names)
    text = caplog.text
    for line in (
        "parameters",
        "train: ",
        "a step: 4 rows",
        "steps: 4",
        "tensorboard --logdir",
        "before training",
    ):
        assert line in text, line
    assert "<|startoftranscript|><|es|><|transcribe|><|notimestamps|>" in text
    before, after = weights(tiny_model), weights(folder)
    frozen = [name for name in after if torch.equal(before[name], after[name])]
    assert frozen == ["model.encoder.embed_positions.weight"]  # Whisper's sinusoids
    assert WhisperForConditionalGeneration.from_pretrained(folder).config.use_cache is True


def test_the_saved_folder_transcribes_like_the_scorecard(
    train: Train, flags: list[str], speech: Path
):
    train("--do_train --do_eval --max_steps 3")
    folder = output(flags)
    model, processor = (
        AutoModelForSpeechSeq2Seq.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    row = datasets.Dataset.from_parquet(str(sorted(speech.glob("validation*"))[0]))
    audio = row.cast_column("audio", datasets.Audio(decode=False))[0]["audio"]["bytes"]
    inputs = processor(
        decode_audio(audio, lambda seconds: None)[0], sampling_rate=16_000, return_tensors="pt"
    ).input_features
    ids = model.generate(inputs, max_length=12)
    heard = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert model.generation_config.language == "es" and model.generation_config.task == "transcribe"
    assert model.generation_config.forced_decoder_ids is None
    again = script.main(
        [
            *flags,
            "--do_eval",
            "--model_name_or_path",
            str(folder),
            "--output_dir",
            f"{folder}-score",
        ]
    )
    assert math.isfinite(again["eval_wer"]) and isinstance(heard, str)


@pytest.mark.parametrize("smoothing", ["0.0", "0.1"])
def test_accumulation_does_not_change_loss_or_gradient(
    train: Train, flags: list[str], tmp_path: Path, smoothing: str
):
    runs = []
    for batch, accumulation in ((8, 1), (2, 4), (1, 8)):
        folder = tmp_path / f"{batch}x{accumulation}"
        train(
            f"--do_train --max_steps 5 --per_device_train_batch_size {batch} --output_dir {folder} "
            f"--gradient_accumulation_steps {accumulation} --label_smoothing_factor {smoothing}"
        )
        runs.append((history(folder), history(folder, "grad_norm")))
    for losses, norms in runs[1:]:
        assert losses == pytest.approx(runs[0][0], abs=1e-5)
        assert norms == pytest.approx(runs[0][1], rel=1e-4)


def test_the_loss_is_the_mean_over_target_tokens(
    train: Train, flags: list[str], tiny_model: Path, speech: Path, preprocessor
):
    train("--do_train --max_steps 1 --per_device_train_batch_size 40 --shuffle_buffer_size 1")
    model = WhisperForConditionalGeneration.from_pretrained(tiny_model)
    source = load_source(str(speech), split="train")
    blocks = read_pass(SpeechDataset(source, preprocessor), block_size=40)
    examples = [preprocessor(row) for block in blocks for row in block.rows]
    total, count = 0.0, 0
    for example in examples:
        features = pad_features(example["features"], [example["features"].shape[1]], 400)
        ids = torch.tensor([example["labels"]])
        logits = model(input_features=features, decoder_input_ids=ids[:, :-1]).logits
        total += torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    assert history(output(flags))[0] == pytest.approx(total / count, abs=1e-5)


def test_a_half_precision_checkpoint_trains_in_float32(
    train: Train, flags: list[str], tmp_path: Path
):
    half = demonstration.make_model(tmp_path / "half", d_model=16, num_layers=1, dtype="float16")
    train(f"--do_train --max_steps 1 --model_name_or_path {half}")
    assert {tensor.dtype for tensor in weights(output(flags)).values()} == {torch.float32}


def test_english_only_and_turbo(
    train: Train, flags: list[str], english_model: Path, tmp_path: Path
):
    position = flags.index("--language")
    del flags[position : position + 2]
    metrics = train(f"--do_train --do_eval --max_steps 1 --model_name_or_path {english_model}")
    assert math.isfinite(metrics["eval_wer"])
    processor = AutoProcessor.from_pretrained(output(flags))
    assert processor.tokenizer.decode(processor.tokenizer("a").input_ids).startswith(
        "<|startoftranscript|><|notim"
    )
    # Turbo's shape: 128 mel bins, Cantonese, fewer decoder than encoder layers; and another window.
    shape = {"num_layers": 3, "num_decoder_layers": 1, "n_mels": 128, "window_in_seconds": 3}
    v3 = demonstration.make_model(tmp_path / "v3", d_model=16, **shape)
    metrics = train(
        f"--do_train --do_eval --max_steps 1 --model_name_or_path {v3} --language yue --output_dir {v3}-out"
    )
    assert math.isfinite(metrics["eval_loss"])


def test_frozen_encoder_and_checkpointing(train: Train, flags: list[str], tiny_model: Path):
    train("--do_train --max_steps 2 --freeze_encoder --gradient_checkpointing")
    before, after = weights(tiny_model), weights(output(flags))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith("model.encoder.") for name in changed)


def test_epochs_are_counted_in_rows(train: Train, flags: list[str]):
    assert train("--do_train --num_train_epochs 1.5")["train_rows"] == 60
    passes = history(output(flags), "pass")
    assert passes[9] == 1.0 and passes[-1] == 1.5 and passes == sorted(passes)


def test_every_bad_row_is_counted_listed_and_nothing_else_is_lost(
    train: Train, flags: list[str], tmp_path: Path
):
    good = demonstration.make_rows(12, seed=3)
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000 * 5)
    bad = [
        (b"not audio at all", "uno"),
        (None, "uno"),
        (demonstration.encode(noise), "dos"),
        (good[0][0], "  "),
        (good[0][0], None),
        (good[0][0], "uno " * 40),
    ]
    demonstration.write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", good + bad)
    demonstration.write_parquet(
        tmp_path / "data" / "validation-00000-of-00001.parquet", good[:3] + bad
    )
    metrics = train(f"--do_train --do_eval --num_train_epochs 1 --dataset_name {tmp_path / 'data'}")
    assert (
        metrics["train_rows"] == 20
        and metrics["train_rejected"] >= 6
        and metrics["eval_num_rows"] == 3
    )
    lines = [
        json.loads(line) for line in (output(flags) / "rejected.jsonl").read_text().splitlines()
    ]
    reasons = [line["reason"] for line in lines if line["split"] == "validation"]
    expected = [
        "audio_missing",
        "audio_too_long",
        "audio_unreadable",
        "label_too_long",
        "text_empty",
        "text_empty",
    ]
    assert sorted(reasons) == expected
    assert set(reasons) == {line["reason"] for line in lines if line["split"] == "train"}
    assert history(output(flags), "rejected")[-1] == metrics["train_rejected"]


def test_a_micro_batch_without_a_good_row_runs(train: Train, tmp_path: Path, flags: list[str]):
    rows = [(b"junk", "uno")] * 4 + demonstration.make_rows(4, seed=1)
    demonstration.write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows)
    train(
        f"--do_train --max_steps 4 --shuffle_buffer_size 1 --dataset_name {tmp_path / 'data'} "
        "--max_rejected_fraction 0.9 --per_device_train_batch_size 4"
    )
    losses = history(output(flags))
    assert losses[0] == losses[2] == 0.0 and losses[1] > 1 and losses[3] > 1


def test_too_many_rejections_end_the_run_with_the_reasons(
    train: Train, tmp_path: Path, flags: list[str]
):
    rows = [(b"junk", "uno")] * 12 + demonstration.make_rows(8, seed=1)
    demonstration.write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows)
    with pytest.raises(
        UserError, match=r"rejected: 12 of the first 20 rows \(12 audio_unreadable\)"
    ):
        train(f"--do_train --max_steps 50 --dataset_name {tmp_path / 'data'}")
    train(
        f"--do_train --max_steps 2 --dataset_name {tmp_path / 'data'} --max_rejected_fraction 0.7 "
        f"--output_dir {tmp_path}/another"
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--language Spansh", "Did you mean Spanish (es)?"),
        ("--language yue", "--language zh: Chinese (zh), which its readers usually read too"),
        ("--model_name_or_path /no/such/model", "--model_name_or_path /no/such/model"),
        ("--dataset_name /no/such/data", "--dataset_name /no/such/data"),
        ("--eval_split_name nowhere --do_eval", "split 'nowhere'"),
        ("--resume_from_checkpoint /no/such/checkpoint", "not a complete checkpoint"),
    ],
)
def test_mistakes_are_one_line_with_exit_code_2(
    flags: list[str], more: str, message: str, capsys: pytest.CaptureFixture
):
    assert exit_code_of(script.main, [*flags, "--do_train", "--max_steps", "1", *more.split()]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert any(line.startswith("error: ") and message in line for line in lines)


def test_language_is_required_by_multilingual_and_refused_by_english_models(
    flags: list[str], english_model: Path, train: Train
):
    with pytest.raises(UserError, match="knows English only"):
        train(f"--do_train --max_steps 1 --model_name_or_path {english_model}")
    position = flags.index("--language")
    with pytest.raises(UserError, match="--language is missing"):
        script.main([*flags[:position], *flags[position + 2 :], "--do_train", "--max_steps", "1"])


def test_other_architectures_are_refused(train: Train, tmp_path: Path):
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="bert model; only Whisper can be used here"):
        train(f"--do_train --max_steps 1 --model_name_or_path {tmp_path / 'bert'}")


def test_output_dir_of_another_run_is_refused(train: Train, flags: list[str], tmp_path: Path):
    folder = output(flags)
    folder.mkdir()
    (folder / "notes.txt").write_text("a cloned repo may hold other files")
    train("--do_train --max_steps 1")
    with pytest.raises(UserError, match="of another run .*text_column_name was None"):
        train("--do_train --max_steps 2 --text_column_name other")
    with pytest.raises(UserError, match="holds checkpoint-1 and --resume_from_checkpoint says no"):
        train("--do_train --max_steps 2 --resume_from_checkpoint no")
    (folder / "run_info.json").unlink()
    with pytest.raises(UserError, match="no run_info.json of this script"):
        train("--do_train --max_steps 2")


def test_overlapping_splits_are_warned_about(train: Train, caplog: pytest.LogCaptureFixture):
    train("--do_train --do_eval --max_steps 1 --train_split_name train+validation")
    assert "The eval split shares files with the training split" in caplog.text


@pytest.mark.parametrize("more", ["", "--gradient_accumulation_steps 3 --num_decoding_threads 1"])
def test_a_continued_run_ends_with_the_same_weights(train: Train, tmp_path: Path, more: str):
    how = {"dropout": 0.2, "apply_spec_augment": not more}
    model = demonstration.make_model(tmp_path / "model", d_model=16, num_layers=1, **how)
    common = f"--do_train --save_steps 5 --model_name_or_path {model} --shuffle_buffer_size 9 {more} --max_steps"
    train(f"{common} 14 --output_dir {tmp_path / 'whole'}")
    train(f"{common} 14 --output_dir {tmp_path / 'parts'}")
    for name in ("checkpoint-10", "checkpoint-14"):  # as if it had been killed after step 5
        (tmp_path / "parts" / name).rename(tmp_path / name)
    train(f"{common} 14 --output_dir {tmp_path / 'parts'} --num_decoding_threads 3")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert history(tmp_path / "whole") == history(tmp_path / "parts")


def test_a_finished_run_trains_no_further_and_incomplete_checkpoints_are_stepped_over(
    train: Train, flags: list[str], caplog: pytest.LogCaptureFixture
):
    train("--do_train --max_steps 4 --save_steps 2")
    folder = output(flags)
    finished = weights(folder)
    train("--do_train --max_steps 4 --save_steps 2")
    assert all(torch.equal(finished[name], tensor) for name, tensor in weights(folder).items())
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    train("--do_train --max_steps 4 --save_steps 2")
    assert "checkpoint-4 is incomplete" in caplog.text
    assert all(torch.equal(finished[name], tensor) for name, tensor in weights(folder).items())


def test_the_evaluation_cache_follows_what_it_depends_on(train: Train, flags: list[str]):
    train("--do_eval")
    cached = set((output(flags) / "_eval_cache").rglob("*.arrow"))
    train("--do_eval")
    assert set((output(flags) / "_eval_cache").rglob("*.arrow")) == cached
    assert train("--do_eval --do_lower_case --max_eval_samples 5")["eval_num_rows"] == 5
    assert len(set((output(flags) / "_eval_cache").rglob("*.arrow"))) == len(cached) + 1


def change_weights(folder: Path, scale: float) -> None:
    """The saved decoder's last layer, by noise."""
    tensors = {name: tensor.clone() for name, tensor in weights(folder).items()}
    tensors["model.decoder.layer_norm.bias"] += torch.randn(16) * scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_settings(folder: Path) -> None:
    """The saved model may no longer write what it wrote first."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    settings["suppress_tokens"] = list(range(size // 2))
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "spoil",
    [functools.partial(change_weights, scale=1000.0), change_settings],
    ids=["weights", "settings"],
)
def test_a_saved_model_that_transcribes_differently_is_an_error(
    spoil: Callable[[Path], None],
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    def save_and_spoil(trainer: SpeechTrainer, save=save_final_model) -> None:
        save(trainer)
        spoil(output(flags))

    monkeypatch.setattr("speech_finetuning.training.stages.save_final_model", save_and_spoil)
    assert exit_code_of(script.main, [*flags, "--do_train", "--do_eval", "--max_steps", "1"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the saved model transcribes 8 clips differently" in error and "output;" in error


def test_what_rounding_decides_is_no_other_model(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """As on a GPU, where a model that guesses between near equals may guess otherwise once loaded."""
    calls = itertools.count()

    def transcribe(*args: Any, **how: Any) -> list[str]:
        texts = untouched(*args, **how)
        return [*texts[:-1], "something else"] if next(calls) == 1 else texts

    untouched = reload_check.transcribe
    monkeypatch.setattr(reload_check, "transcribe", transcribe)
    train("--do_train --do_eval --max_steps 1")
    assert next(calls) == 3  # the trained model, the saved one, the trained one with its settings
    assert "the saved model, loaded afresh, transcribes 8 clips alike." in caplog.text


def test_trained_and_saved_model_are_compared_in_the_same_precision(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """accelerate wraps the trained model's forward pass, but neither its encoder nor the saved model."""
    with_autocast = []

    def generate_and_note(*args: Any, **how: Any) -> torch.Tensor:
        with_autocast.append(torch.is_autocast_enabled("cpu"))
        return untouched(*args, **how)

    untouched = reload_check.generate_ids
    monkeypatch.setattr(reload_check, "generate_ids", generate_and_note)
    train("--do_train --do_eval --max_steps 1 --bf16 --use_cpu")
    assert with_autocast == [True, True]
    assert "the saved model, loaded afresh, transcribes 8 clips alike." in caplog.text


def test_early_stopping_and_the_best_model(train: Train, flags: list[str]):
    metrics = train(
        "--do_train --do_eval --max_steps 12 --eval_steps 2 --save_steps 2 --early_stopping_patience 1 "
        "--learning_rate 1e-9"
    )
    state = json.loads(
        sorted(output(flags).glob("checkpoint-*"))[0].joinpath("trainer_state.json").read_text()
    )
    assert metrics["train_rows"] == 16  # two evaluations without a gain
    assert state["best_metric"] == metrics["eval_wer"]


def test_streaming_false_on_local_files_warns(train: Train, caplog: pytest.LogCaptureFixture):
    train("--do_train --max_steps 1 --streaming False")
    assert "--streaming False has no effect" in caplog.text


def test_the_stall_meter_rises_when_the_source_is_slow(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    common = "--do_train --max_steps 6 --logging_steps 3 --num_decoding_threads 1"
    train(f"{common} --output_dir {tmp_path / 'fast'}")
    monkeypatch.setattr(
        "speech_finetuning.data.reading.read_audio",
        lambda value: time.sleep(0.1) or read_audio(value),
    )
    train(f"{common} --output_dir {tmp_path / 'slow'}")
    fast, slow = (history(tmp_path / name, "data_wait_fraction")[-1] for name in ("fast", "slow"))
    assert slow > 0.5 and 0 <= fast < slow
    hours = [history(tmp_path / name, "audio_hours_per_hour")[-1] for name in ("fast", "slow")]
    assert hours[0] > hours[1] > 0
    assert (
        history(tmp_path / "slow", "samples_per_second")[-1] < 14
    )  # 0.1 s for each row, and some were read ahead


class Intruder:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_from_elsewhere_never_runs_code(train: Train, tmp_path: Path, name: str):
    train("--do_train --max_steps 1")
    torch.save(
        {"state": Intruder(tmp_path / "intruded")}, tmp_path / "output" / "checkpoint-1" / name
    )
    with pytest.raises(
        UserError, match=rf"checkpoint-1: .*{name}.* holds code, which is never run"
    ):
        train("--do_train --max_steps 2")
    assert not (tmp_path / "intruded").exists()


def test_tensorboard_shows_the_score_before_training_as_the_beginning_of_the_curve(
    train: Train, tmp_path: Path
):
    metrics = train(
        "--do_train --do_eval --eval_before_training --max_steps 4 --eval_steps 2 --report_to tensorboard"
    )
    (folder,) = [path.parent for path in (tmp_path / "output" / "runs").glob("[A-Z]*/events*")]
    events = EventAccumulator(str(folder)).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("1 overview/eval_wer")]
    assert [step for step, _ in curve] == [0, 2, 4]
    assert curve[0][1] == pytest.approx(metrics["zero_shot_wer"]) and curve[2][1] == pytest.approx(
        metrics["eval_wer"]
    )
    tags = sorted(events.Tags()["scalars"])
    assert not [tag for tag in tags if "zero_shot" in tag]
    assert tags[:5] == [
        "1 overview/data_wait_fraction",
        "1 overview/eval_loss",
        "1 overview/eval_wer",
        "1 overview/learning_rate",
        "1 overview/loss",
    ]
    assert {tag.split("/")[0] for tag in tags[5:]} == {"2 evaluation", "4 training"}


def test_too_little_shared_memory_is_said_at_the_start(
    train: Train, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    usage = namedtuple("usage", "total used free")(2**19, 0, 2**19)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    train("--do_train --max_steps 1 --dataloader_num_workers 1 --per_device_train_batch_size 8")
    # 5 batches x 8 rows x 80 mel bins x 400 frames x 4 bytes = 4.9 MiB
    assert "/dev/shm has 0 MB, batches of long clips may take 5. In Docker" in caplog.text
    assert "--shm-size 2g" in caplog.text
