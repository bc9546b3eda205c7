"""Evaluation sets: without references, with long clips, in little memory, and their cache."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from talker import make_talker
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.audio import SAMPLE_RATE_IN_HZ
from speech_finetuning.data.preprocessing import Preprocessor, SpeechDataset
from speech_finetuning.data.sources import SpeechSource, load_source
from speech_finetuning.model.generation import generate_ids
from speech_finetuning.scoring.eval_sets import EvalSetKey, eval_set_key, prepare_eval_set

Train = Callable[[str], dict[str, float]]


def predictions(folder: Path, name: str) -> list[dict]:
    return [
        json.loads(line) for line in (folder / f"predictions_{name}.jsonl").read_text().splitlines()
    ]


def speech_like(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise that comes and goes, (n_samples,) float32 at 16 kHz."""
    generator, n = np.random.default_rng(seed), int(seconds * SAMPLE_RATE_IN_HZ)
    return (0.3 * generator.standard_normal(n) * np.abs(np.sin(np.arange(n) / 3000))).astype(
        np.float32
    )


def make_folder(folder: Path, seconds: list[float], texts: list[str] | None) -> Path:
    """Wav files and a test.csv, with a column `sentence` if there are texts."""
    folder.mkdir()
    header = "path,sentence\n" if texts else "path\n"
    lines = []
    for i, duration in enumerate(seconds):
        soundfile.write(folder / f"{i}.wav", speech_like(duration, i), SAMPLE_RATE_IN_HZ)
        lines.append(f"{i}.wav,{texts[i]}\n" if texts else f"{i}.wav\n")
    (folder / "test.csv").write_text(header + "".join(lines))
    return folder


def test_prediction_needs_no_references(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = make_folder(tmp_path / "clips", [0.5, 1.0, 1.5], None)
    metrics = train(f"--do_predict --dataset_name {folder}")
    rows = predictions(tmp_path / "output", "predict")
    assert [row["reference"] for row in rows] == ["", "", ""] and all(
        "prediction" in row for row in rows
    )
    assert [row["duration"] for row in rows] == [0.5, 1.0, 1.5] and "wer" not in rows[0]
    assert any(line.startswith("    heard  ") for line in caplog.messages)
    assert not any(line.startswith("    said   ") for line in caplog.messages)
    assert "no references: 3 rows transcribed, not scored." in caplog.messages
    assert f"all transcripts: {tmp_path / 'output' / 'predictions_predict.jsonl'}" in caplog.text
    assert (
        metrics["predict_num_rows"] == metrics["predict_empty_references"] == 3
        and "predict_wer" not in metrics
    )


def test_prediction_with_references_is_scored_and_training_still_needs_them(
    train: Train, tmp_path: Path
):
    folder = make_folder(tmp_path / "clips", [0.5, 1.0], ["uno", ""])
    metrics = train(f"--do_predict --dataset_name {folder}")
    assert metrics["predict_num_rows"] == 2 and metrics["predict_empty_references"] == 1
    assert metrics["predict_wer"] >= 0 and len(predictions(tmp_path / "output", "predict")) == 2
    shutil.copy(folder / "test.csv", folder / "train.csv")
    (folder / "test.csv").write_text("path\n0.wav\n")
    with pytest.raises(UserError, match="--text_column_name is missing"):
        train(f"--do_eval --eval_split_name test --dataset_name {folder}")


def test_prediction_of_a_trained_model_in_the_same_run(train: Train, tmp_path: Path):
    metrics = train(
        "--do_train --do_eval --do_predict --max_steps 2 --predict_split_name validation"
    )
    assert (
        metrics["predict_wer"] == metrics["eval_wer"]
        and metrics["predict_loss"] == metrics["eval_loss"]
    )


def test_long_clips_are_rejected_or_transcribed_whole(
    train: Train, tmp_path: Path, tiny_model: Path
):
    """Two windows and a half of 4 s; the last text has more tokens than the decoder positions."""
    texts = ["uno", "dos tres " * 5, "cuatro", "cinco " * 40, "seis " * 40]
    folder = make_folder(tmp_path / "clips", [1.0, 10.0, 2.0, 6.0, 0.5], texts)
    flags = f"--do_eval --eval_split_name test --dataset_name {folder} --max_duration_in_seconds 4"
    assert train(flags)["eval_num_rows"] == 2
    assert "audio_too_long" in (tmp_path / "output" / "rejected.jsonl").read_text()
    metrics = train(f"{flags} --long_form --output_dir {tmp_path / 'long'}")
    rows = {row["duration"]: row["prediction"] for row in predictions(tmp_path / "long", "eval")}
    assert metrics["eval_num_rows"] == 5 and set(rows) == {1.0, 10.0, 2.0, 6.0, 0.5}
    assert (
        metrics["eval_substitutions"] + metrics["eval_deletions"] + metrics["eval_hits"] == 92
    )  # none was cut
    assert {
        row["duration"]: row["prediction"] for row in predictions(tmp_path / "output", "eval")
    }.items() <= rows.items()
    processor = WhisperProcessor.from_pretrained(tiny_model)
    model = WhisperForConditionalGeneration.from_pretrained(tiny_model)
    features = processor.feature_extractor(
        speech_like(10.0, 1),
        sampling_rate=16_000,
        truncation=False,
        padding="longest",
        return_tensors="pt",
    ).input_features
    how = {"language": "es", "task": "transcribe", "max_length": 12, "return_timestamps": True}
    ids = model.generate(features, **how)
    assert rows[10.0] == processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def test_out_of_memory_halves_the_batch_and_keeps_the_score(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = train("--do_eval")
    generate, sizes = generate_ids, []

    def too_large(model, encoder_outputs, **generation):
        sizes.append(len(encoder_outputs[0]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("injected")
        return generate(model, encoder_outputs, **generation)

    monkeypatch.setattr("speech_finetuning.training.trainer.generate_ids", too_large)
    halved = train(f"--do_eval --output_dir {tmp_path / 'again'}")
    assert sizes == [4, 2] + [1] * 8
    for key in ("eval_wer", "eval_cer", "eval_num_rows", "eval_hits"):
        assert halved[key] == whole[key]


def test_unspaced_languages_choose_the_best_model_by_cer(
    train: Train, full_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    flags = "--do_train --do_eval --max_steps 3 --save_steps 1 --eval_steps 1"
    flags += " --learning_rate 0.02 --warmup_steps 0 --load_best_model_at_end True"
    metrics = train(f"{flags} --language ja --model_name_or_path {full_model}")
    best = json.loads((tmp_path / "output" / "checkpoint-3" / "trainer_state.json").read_text())
    rates = [
        (entry["eval_cer"], entry["eval_wer"])
        for entry in best["log_history"]
        if "eval_cer" in entry
    ]
    assert all(cer != wer for cer, wer in rates)
    assert best["best_metric"] == min(rates)[0] == metrics["eval_cer"]
    assert "no spaces between words in ['ja']" in caplog.text


def test_a_rejected_row_does_not_make_the_features_be_written_twice(train: Train, tmp_path: Path):
    folder = make_folder(tmp_path / "clips", [0.5, 1.0, 2.0, 3.0], ["uno", "", "dos", "tres"])
    metrics = train(f"--do_eval --eval_split_name test --dataset_name {folder}")
    assert (
        metrics["eval_num_rows"] == 3
        and '"text_empty"' in (tmp_path / "output" / "rejected.jsonl").read_text()
    )
    listing = tmp_path / "output" / "rejected.jsonl"
    with open(listing, "a") as file:
        file.write('{"split": "te')  # by a kill in the middle of a write
    train(f"--do_eval --eval_split_name test --dataset_name {folder}")
    assert listing.read_text().count("text_empty") == 1
    size = sum(
        path.stat().st_size for path in (tmp_path / "output" / "_eval_cache").rglob("*.arrow")
    )
    features_in_bytes = 5.5 * 100 * 80 * 4  # seconds, frames, mel bins, float32
    assert features_in_bytes < size < 1.3 * features_in_bytes
    assert [row["duration"] for row in predictions(tmp_path / "output", "eval")] == [0.5, 2.0, 3.0]


def test_missing_clips_are_named_with_the_path_that_was_tried_and_read_once_they_are_there(
    train: Train, tmp_path: Path
):
    """The list is right and the clips are elsewhere: one line, and nothing of it stays."""
    folder = make_folder(tmp_path / "clips", [0.5, 1.0, 1.5, 2.0], ["uno", "dos", "tres", ""])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in folder.glob("*.wav"):
        path.rename(elsewhere / path.name)
    flags = f"--do_eval --eval_split_name test --dataset_name {folder}"
    with pytest.raises(UserError) as error:
        train(flags)
    message = str(error.value)
    assert message.startswith("no usable row in split 'test'")
    assert "Rejected: 3 audio_missing, 1 text_empty. For example " in message
    assert all(str(folder / f"{number}.wav") in message for number in range(3))
    assert "\n" not in message
    listing = (tmp_path / "output" / "rejected.jsonl").read_text(encoding="utf-8")
    assert listing.count("audio_missing") == 3
    for path in elsewhere.iterdir():
        path.rename(folder / path.name)
    assert train(flags)["eval_num_rows"] == 3
    listing = (tmp_path / "output" / "rejected.jsonl").read_text(encoding="utf-8")
    assert listing.count("audio_missing") == 0 and listing.count("text_empty") == 1


def test_words_invented_in_silence_are_counted_and_leave_the_wer_as_it_is(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    spoken = make_folder(tmp_path / "spoken", [0.5, 2.0], ["uno", "dos"])
    both = make_folder(tmp_path / "both", [0.5, 2.0, 3.0, 1.5], ["uno", "dos", "", ""])
    model = make_talker(tmp_path / "talker")
    flags = "--do_train --do_eval --max_steps 1 --train_split_name test --eval_split_name test"
    flags += f" --model_name_or_path {model}"
    alone = train(
        f"{flags} --learning_rate 1e-9 --output_dir {tmp_path / 'alone'} --dataset_name {spoken}"
    )
    caplog.clear()
    more = "--keep_empty_text --eval_before_training --learning_rate 1e-9"
    metrics = train(f"{flags} {more} --dataset_name {both}")
    rows = predictions(tmp_path / "output", "eval")
    invented = sum(len(row["prediction"].split()) for row in rows if not row["reference"])
    assert len(rows) == metrics["eval_num_rows"] == 4 and metrics["eval_empty_references"] == 0
    assert metrics["train_rejected"] == 0
    assert metrics["eval_nonspeech_minutes"] == pytest.approx(4.5 / 60)
    assert metrics["eval_invented_words"] == invented > 0
    assert metrics["eval_invented_words_per_minute"] == pytest.approx(invented / (4.5 / 60))
    for name in ("wer", "cer", "hits", "insertions", "wer_low", "wer_high", "empty_outputs"):
        assert metrics[f"eval_{name}"] == pytest.approx(alone[f"eval_{name}"])
    line = f"no speech, 0.1 min: {invented} words invented"
    assert line in caplog.text and "without a reference" not in caplog.text
    for name in ("README.md", "report.html"):
        text = (tmp_path / "output" / name).read_text()
        assert text.count(line) == 2, "before and after training"
    assert "invented" in (tmp_path / "output" / "trainer_log.jsonl").read_text()


def test_a_score_of_silence_alone_has_no_wer(train: Train, tmp_path: Path):
    folder = make_folder(tmp_path / "clips", [0.5, 1.0], ["", ""])
    flags = f"--eval_split_name test --keep_empty_text --dataset_name {folder}"
    with pytest.raises(UserError, match="Score speech as well"):
        train(f"--do_eval {flags}")
    metrics = train(f"--do_predict {flags}")  # of which nobody says that it is silence
    assert "predict_invented_words" not in metrics


def test_every_field_that_can_change_the_rows_is_in_the_key_of_the_cache():
    """A new field of a source or of its preparation has to be added there, or here."""
    in_other_words = {
        "mel_filters": "num_mel_bins",
        "tokenizer": "num_tokens and prefix_tokens",
        "data_files": "files",
        "parts": "what is opened of data_files",
        "columns": "audio_column, text_column, sampling_rate_column, group_column and prompt_column",
        "prompt_probability": "of training rows",
        "max_network_wait_in_seconds": "changes no row",
        "source": "its fields",
        "preprocessor": "its fields",
        "weight": "of training rows",
        "row_groups": "what files says",
        "windows": "of training rows",
        "largest_row_group_in_bytes": "how many are read at a time",
        "is_held_out": "selection",
    }
    names = set()
    for kind in (SpeechDataset, SpeechSource, Preprocessor):
        names |= {field.name for field in fields(kind)}
    assert names - in_other_words.keys() - {field.name for field in fields(EvalSetKey)} == set()


@pytest.mark.parametrize(
    "change",
    [
        {"do_lower_case": True},
        {"needs_text": False},
        {"keeps_empty_text": True},
        {"max_duration_in_seconds": 3.0},
        {"takes_long_clips": True},
        {"mel_filters": np.zeros((201, 128), np.float32)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_preparation_is_another_cache(
    preprocessor: Preprocessor, tmp_path: Path, change: dict
):
    folder = make_folder(tmp_path / "clips", [0.5], ["uno"])
    source = load_source(str(folder), split="test")
    key = eval_set_key(SpeechDataset(source, preprocessor))
    assert key == eval_set_key(SpeechDataset(source, replace(preprocessor)))
    assert len(key.fingerprint()) == 16
    other = eval_set_key(SpeechDataset(source, replace(preprocessor, **change)))
    assert other.fingerprint() != key.fingerprint()


def test_a_changed_clip_is_another_cache(preprocessor: Preprocessor, tmp_path: Path):
    folder = make_folder(tmp_path / "clips", [0.5], ["uno"])
    dataset = SpeechDataset(load_source(str(folder), split="test"), preprocessor)
    before = eval_set_key(dataset).fingerprint()
    soundfile.write(folder / "0.wav", speech_like(0.75), SAMPLE_RATE_IN_HZ)
    assert eval_set_key(dataset).fingerprint() != before


def test_names_in_another_encoding_can_be_stored(preprocessor: Preprocessor, tmp_path: Path):
    """A clip's name is bytes to Linux; Python shows what is not UTF-8 as lone surrogates."""
    folder = make_folder(tmp_path / "clips", [0.5, 1.0], ["uno", "dos"])
    names = ["a\udcf1o.wav", "m\udcf1.wav"]
    lines = [json.dumps({"path": name, "sentence": "uno"}) for name in names]
    (folder / "test.jsonl").write_text("\n".join(lines))
    (folder / "0.wav").rename(folder / "a\udcf1o.wav")
    (folder / "test.csv").unlink()
    dataset = SpeechDataset(load_source(str(folder), split="test"), preprocessor)
    eval_set = prepare_eval_set(dataset, num_threads=1, folder=tmp_path / "cache")
    assert eval_set.num_usable == 1
    (rejection,) = eval_set.rejections
    assert rejection.row.endswith("m\\udcf1.wav")


def test_a_word_with_an_apostrophe_is_one_word_in_the_leading_score(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = make_folder(tmp_path / "clips", [0.5, 1.0], ["ka'aguy por\u00e3", "che ro\u2019y"])
    metrics = train(f"--do_eval --eval_split_name test --dataset_name {folder}")
    num_words = sum(metrics[f"eval_{kind}"] for kind in ("hits", "substitutions", "deletions"))
    assert num_words == 4  # Whisper's normaliser makes 6 of them
    assert metrics["eval_wer"] == metrics["eval_wer_norm_marks"]
    assert "2 of 2 references with apostrophes inside words" in caplog.text
    as_usual = train(
        f"--do_eval --eval_split_name test --dataset_name {folder} --language fr "
        f"--output_dir {tmp_path / 'fr'}"
    )
    assert sum(as_usual[f"eval_{kind}"] for kind in ("hits", "substitutions", "deletions")) == 6
