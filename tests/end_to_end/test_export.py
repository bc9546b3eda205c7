"""A saved model elsewhere, by the commands of docs/export.md: CTranslate2 and faster-whisper write
what transformers does, and whisper.cpp's converter gets the files that transformers 5 no longer
saves."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, WhisperForConditionalGeneration

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.cli import demonstration, export
from speech_finetuning.sharing.examples import WHY_PADDED, faster_whisper_example

ctranslate2 = pytest.importorskip("ctranslate2", reason="pip install -r requirements-test.txt")
faster_whisper = pytest.importorskip(
    "faster_whisper", reason="pip install -r requirements-test.txt"
)
EXPORT_PAGE = (Path(script.__file__).parent / "docs" / "export.md").read_text()


def make_talkative_model(folder: Path) -> Path:
    """A random model with Whisper's limits, 30 s and 448 tokens; large weights give each clip an
    answer of its own."""
    demonstration.make_model(
        folder, d_model=16, num_layers=1, window_in_seconds=30, max_target_positions=448
    )
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
        model.model.decoder.embed_tokens.weight[
            model.generation_config.no_timestamps_token_id :
        ] = 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, speech: Path) -> Path:
    """What the script saves, after one small step."""
    folder = tmp_path_factory.mktemp("export")
    flags = f"--model_name_or_path {make_talkative_model(folder / 'model')} --dataset_name {speech} --language es"
    flags += f" --do_train --max_steps 1 --learning_rate 1e-9 --output_dir {folder / 'output'} --report_to none"
    script.main(
        [*flags.split(), "--per_device_train_batch_size", "2", "--dataloader_num_workers", "0"]
    )
    return folder / "output"


@pytest.fixture(scope="module")
def converted(trained: Path) -> Path:
    """By the program; float32 is the CPU's results, bit for bit."""
    target = trained.parent / "whisper-small-es-ct2"
    words = [str(trained), "--to", "ctranslate2", "--output_dir", str(target)]
    assert export.main([*words, "--quantization", "float32"]) == 0
    # CTranslate2 knows multilingual models by the empty token, which the published ones have and
    # the toy has not.
    vocabulary = json.loads((target / "vocabulary.json").read_text())
    (target / "vocabulary.json").write_text(json.dumps([*vocabulary[:-1], ""]))
    return target


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [
        demonstration.speak(list(generator.choice(demonstration.WORDS, size=size)), generator)
        for size in (5, 15, 40)
    ]


@pytest.fixture(scope="module")
def expected(trained: Path, clips: list[np.ndarray]) -> list[list[int]]:
    """The token ids of transformers, without the prefix and the end."""
    processor, model = (
        AutoProcessor.from_pretrained(trained),
        AutoModelForSpeechSeq2Seq.from_pretrained(trained),
    )
    features = processor.feature_extractor(
        clips, sampling_rate=demonstration.SAMPLE_RATE_IN_HZ, return_tensors="pt"
    )
    ids = model.generate(features.input_features, max_new_tokens=12).tolist()
    end = processor.tokenizer.eos_token_id
    rows = [row[: row.index(end)] if end in row else row for row in ids]
    assert len(set(map(tuple, rows))) == len(clips) and min(map(len, rows)) > 5
    return rows


@pytest.mark.slow
def test_ctranslate2_writes_the_same_tokens(
    trained: Path, converted: Path, clips: list[np.ndarray], expected: list[list[int]]
):
    processor, model = (
        AutoProcessor.from_pretrained(trained),
        ctranslate2.models.Whisper(str(converted)),
    )
    features = processor.feature_extractor(
        clips, sampling_rate=demonstration.SAMPLE_RATE_IN_HZ, return_tensors="np"
    )
    view = ctranslate2.StorageView.from_array(features.input_features)
    prefix = processor.tokenizer.prefix_tokens
    results = model.generate(view, [prefix] * len(clips), beam_size=1, max_length=40)
    assert model.is_multilingual
    assert [result.sequences_ids[0][:12] for result in results] == expected


@pytest.mark.slow
def test_faster_whisper_writes_the_same_tokens(
    converted: Path, clips: list[np.ndarray], expected: list[list[int]]
):
    """With the audio filled up to 30 s; faster-whisper 1.2 would fill its features up with zeros
    (audio.py:111)."""
    model = faster_whisper.WhisperModel(str(converted), device="cpu", compute_type="float32")
    for clip, ids in zip(clips, expected, strict=True):
        thresholds = dict.fromkeys(
            ("no_speech_threshold", "log_prob_threshold", "compression_ratio_threshold")
        )
        how = {
            "beam_size": 1,
            "temperature": 0,
            "without_timestamps": True,
            "max_new_tokens": 30,
            **thresholds,
        }
        how |= {"suppress_tokens": [], "suppress_blank": False}  # as in the toy's generation config
        segments, info = model.transcribe(
            np.pad(clip, (0, -len(clip) % 480_000)), language="es", **how
        )
        assert [token for segment in segments for token in segment.tokens][:12] == ids
        assert info.language == "es"


@pytest.mark.slow
def test_the_python_of_the_page_runs(converted: Path, clips: list[np.ndarray]):
    (code,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", EXPORT_PAGE, re.S)
        if "faster_whisper" in block
    )
    soundfile.write(converted.parent / "speech.flac", clips[0], demonstration.SAMPLE_RATE_IN_HZ)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=converted.parent, capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stdout.strip(), result.stderr[-2000:]


def test_the_padding_is_said_alike_everywhere(trained: Path, converted: Path):
    """On the page, on the model's card and in the converted folder."""
    program = faster_whisper_example("whisper-small-es-ct2", "es")
    assert program in EXPORT_PAGE and WHY_PADDED in " ".join(EXPORT_PAGE.split())
    card = (trained / "README.md").read_text()
    assert faster_whisper_example("whisper-ct2", "es") in card and WHY_PADDED in card
    readme = (converted / "README.md").read_text()
    assert faster_whisper_example(str(converted), "es") in readme and WHY_PADDED in readme


def test_the_files_for_whisper_cpp(trained: Path, tmp_path: Path, capsys: Any):
    folder = tmp_path / "ggml"
    assert export.main([str(trained), "--to", "ggml", "--output_dir", str(folder)]) == 0
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocabulary) == 256 and json.loads((folder / "added_tokens.json").read_text()) == {}
    tokenizer = AutoProcessor.from_pretrained(trained).tokenizer
    assert vocabulary["a"] == tokenizer.convert_tokens_to_ids("a")
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "README.md"} <= names
    steps = capsys.readouterr().out
    assert f"convert-h5-to-ggml.py {folder} whisper ." in steps and "--language es" in steps
    known = EXPORT_PAGE.replace("whisper-small-es-ggml", str(folder))
    for line in export.WHISPER_CPP_STEPS.format(folder=folder, language="es").splitlines():
        assert line in known
