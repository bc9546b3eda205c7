"""bash run.sh check DATA --model_name_or_path MODEL: rows whose transcript is of another clip."""

import json
from pathlib import Path

import numpy as np
import pytest
from rows import read_rows

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError
from speech_finetuning.cli import model_check
from speech_finetuning.cli.check_data import preprocessor_without_model
from speech_finetuning.cli.model_check import (
    HeardRow,
    Listener,
    find_misfits,
    median_cer,
    other_languages,
    unlike_transcripts,
)
from speech_finetuning.data.row_check import CheckedRow, RowChecker
from speech_finetuning.data.sources import load_source
from speech_finetuning.model.generation import generate_ids
from speech_finetuning.model.recogniser import DETECT, Recogniser, load_recogniser
from speech_finetuning.model.transcription import transcribe_batch


def heard(cer: float | None, language: str | None = "es", text: str = "uno") -> HeardRow:
    return HeardRow(text=text, cer=cer, language=language)


def test_a_transcript_far_from_what_was_heard_does_not_fit():
    rows = {f"r{number}": heard(float(number)) for number in range(20)}
    # "near" is far from the others; but half of it is right.
    rows |= {"swapped": heard(92.4, text="tres"), "near": heard(49.0), "silent": heard(None)}
    assert unlike_transcripts(rows) == {
        "swapped": {"does_not_fit": "CER 92 %, 10 % are usual; heard: tres"}
    }
    assert median_cer(rows) == 10.5


def test_a_model_that_hears_badly_accuses_nobody():
    """Of rows that are all far off, only one that is further off by far."""
    rows = {f"r{number}": heard(60.0 + number) for number in range(20)}
    assert unlike_transcripts(rows) == {}
    assert unlike_transcripts(rows | {"worse": heard(160.0)}).keys() == {"worse"}
    assert unlike_transcripts({}) == {} and median_cer({"a": heard(None)}) is None


@pytest.fixture(scope="module")
def recogniser(tiny_model: Path) -> Recogniser:
    return load_recogniser("--model_name_or_path", str(tiny_model), device="cpu")


def test_few_rows_in_another_language_are_told(recogniser: Recogniser):
    listener = Listener.of(recogniser, "es")
    listener.heard = {f"r{number}": heard(1.0) for number in range(9)} | {"x": heard(1.0, "pt")}
    assert other_languages(listener) == {"x": {"other_language": "sounds like Portuguese"}}
    assert find_misfits([listener]) == other_languages(listener)
    listener.heard |= {f"p{number}": heard(1.0, "pt") for number in range(3)}
    assert other_languages(listener) == {}  # a model that cannot tell them apart
    listener.language = DETECT
    assert other_languages(listener) == {}


def checked_rows(speech: Path) -> list[CheckedRow]:
    words = f"--check_data --dataset_name {speech} --output_dir o".split()
    preprocessor = preprocessor_without_model(script.parse_arguments(words)[1])
    checker = RowChecker(preprocessor=preprocessor, keeps_waveform=True)
    checked = [checker(row) for row in read_rows(load_source(str(speech), split="train"))]
    return [row for row in checked if isinstance(row, CheckedRow)]


def test_rows_are_heard_as_a_transcription_hears_them(recogniser: Recogniser, speech: Path):
    rows = checked_rows(speech)[:19]  # a batch, and some
    listener = Listener.of(recogniser, "es")
    kept = [listener.add(row) for row in rows]
    assert len(listener.heard) == 16 and all(row.waveform is None for row in kept)
    assert [row.id for row in kept] == [row.id for row in rows]
    listener.finish()
    assert list(listener.heard) == [row.id for row in rows]
    waveforms = [row.waveform for row in rows if row.waveform is not None]
    prompts = [{"language": "es", "task": "transcribe"}]
    alone = [transcribe_batch(recogniser, [one], prompts)[0] for one in waveforms]
    assert [found.text for found in listener.heard.values()] == alone
    assert {found.language for found in listener.heard.values()} <= set(recogniser.languages)
    first = next(iter(listener.heard.values()))
    assert first.cer is not None and first.cer > 0
    assert listener.error_rate("Uno, dos", "uno dos") == 0.0
    assert listener.error_rate("uno", "dos") == pytest.approx(100.0)
    assert listener.error_rate("...", "uno") is None


@pytest.mark.parametrize(("told", "asked"), [("Spanish", "es"), (None, None)])
def test_the_model_is_told_the_language_of_the_data(
    recogniser: Recogniser,
    speech: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: str | None,
    asked: str | None,
):
    calls = []

    def generate(model: object, encoded: object, **generation: str) -> object:
        calls.append(generation)
        return generate_ids(model, encoded, **generation)

    monkeypatch.setattr(model_check, "generate_ids", generate)
    listener = Listener.of(recogniser, told)
    listener.add(checked_rows(speech)[0])
    listener.finish()
    assert [call.get("language") for call in calls] == [asked]


def test_what_is_longer_than_the_window_is_not_heard(recogniser: Recogniser, speech: Path):
    (row, *_) = checked_rows(speech)
    listener = Listener.of(recogniser, None)
    window = recogniser.window_in_samples
    for num_samples in (window + 1, 0):
        object.__setattr__(row, "waveform", np.zeros(num_samples, np.float32))
        listener.add(row)
    listener.finish()
    assert listener.heard == {}


def test_a_check_with_a_model_tells_how_near_it_came(
    tiny_model: Path, speech: Path, tmp_path: Path
):
    words = f"--check_data --dataset_name {speech} --language es --output_dir {tmp_path / 'out'}"
    script.main([*words.split(), "--model_name_or_path", str(tiny_model)])
    found = json.loads((tmp_path / "out" / "check.json").read_text(encoding="utf-8"))["model"]
    assert found["num_rows"] == 56 and found["median_cer"] > 50
    page = (tmp_path / "out" / "check.html").read_text(encoding="utf-8")
    assert "heard 56 rows; the CER of its" in " ".join(page.split())
    with pytest.raises(UserError, match="--model_name_or_path ./nowhere: no folder"):
        script.main([*words.split(), "--model_name_or_path", "./nowhere"])
