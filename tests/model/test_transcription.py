"""The engine of demo.py and `bash run.sh transcribe`."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from talker import make_long_clip, make_talker

from speech_finetuning.base.errors import UserError
from speech_finetuning.cli import demonstration
from speech_finetuning.data.long_audio import read_recording
from speech_finetuning.model.recogniser import (
    DETECT,
    Recogniser,
    chosen_language,
    default_language,
    load_recogniser,
)
from speech_finetuning.model.transcription import (
    Segment,
    are_plausible,
    choose_prompt,
    cut_at_pauses,
    extract_features,
    predicts_timestamps,
    transcribe,
    transcribe_windows,
    transcribe_with_timestamps,
)

WINDOW = 4 * 16_000  # the tiny models hear 4 s at once


@pytest.fixture(scope="module")
def tiny_model(full_model: Path) -> Path:
    return full_model


@pytest.fixture
def recogniser(tiny_model: Path) -> Recogniser:
    return load_recogniser("--model", str(tiny_model))


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talker(tmp_path_factory.mktemp("talker") / "model")


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_long_clip(tmp_path_factory.mktemp("clip"))


def test_cuts_are_in_pauses_and_lose_nothing():
    generator = np.random.default_rng(0)
    waveform = generator.normal(0, 0.1, 10 * 16_000).astype(np.float32)
    pauses = [(int(start * 16_000), int((start + 0.12) * 16_000)) for start in (0.5, 3.4, 6.9)]
    for start, end in pauses:
        waveform[start:end] = 0
    pieces = cut_at_pauses(waveform, WINDOW)
    assert [start for start, _ in pieces] == [0, *[end for _, end in pieces[:-1]]] and pieces[-1][
        1
    ] == len(waveform)
    assert all(0 < end - start <= WINDOW for start, end in pieces)
    assert all(
        pause[0] <= cut[1] <= pause[1] for pause, cut in zip(pauses[1:], pieces, strict=False)
    )
    assert cut_at_pauses(waveform[:WINDOW], WINDOW) == [(0, WINDOW)]


def test_choices_are_what_the_model_has(recogniser: Recogniser, english_model: Path):
    assert len(recogniser.languages) == 99 and recogniser.tasks == ["transcribe", "translate"]
    assert recogniser.window_in_samples == WINDOW
    assert default_language(recogniser) == DETECT
    for told in ("es", "Spanish", "<|es|>"):
        recogniser.model.generation_config.language = told
        assert default_language(recogniser) == "es"
    english = load_recogniser("--model", str(english_model))
    assert english.languages == english.tasks == [] and default_language(english) == DETECT


def test_a_model_is_asked_only_for_what_it_has(recogniser: Recogniser, english_model: Path):
    window = extract_features(recogniser, [np.zeros(WINDOW, dtype=np.float32)])
    assert choose_prompt(recogniser, window, "de", "translate") == {
        "language": "de",
        "task": "translate",
    }
    detected = choose_prompt(recogniser, window, DETECT, "transcribe")
    assert detected["language"] in recogniser.languages
    english = load_recogniser("--model", str(english_model))
    assert choose_prompt(english, window, "es", "translate") == {}
    clip = demonstration.speak(["uno"], np.random.default_rng(0))
    (found,) = transcribe(english, [clip], language="es", task="transcribe")
    assert found.language == "en"


@pytest.mark.parametrize(("share", "expected"), [(0.5, True), (0.001, False)])
def test_unlearned_timestamps_are_not_used(
    recogniser: Recogniser, monkeypatch: Any, share: float, expected: bool
):
    config = recogniser.model.generation_config
    without, size = config.no_timestamps_token_id, recogniser.model.config.vocab_size
    logits = torch.full((1, 3, size), -1e9)
    logits[0, -1, without], logits[0, -1, without + 7] = np.log(1 - share), np.log(share)
    monkeypatch.setattr(
        recogniser.model, "forward", lambda **inputs: SimpleNamespace(logits=logits)
    )
    window = torch.zeros(1, 80, 400)
    assert (
        predicts_timestamps(recogniser, window, {"language": "es", "task": "transcribe"})
        == expected
    )
    del config.no_timestamps_token_id
    assert not predicts_timestamps(recogniser, window, {"language": "es"})


def test_long_clip_with_the_models_own_times(talker: Path, long_clip: Path):
    """The library's long-form generation with a window that is not 30 s."""
    recogniser = load_recogniser("--model", str(talker))
    (found,) = transcribe(recogniser, [read_recording(long_clip)], language="es", task="transcribe")
    assert found.has_model_times and found.language == "es"
    duration = soundfile.info(long_clip).duration
    start, end, _ = found.segments[-1]
    assert start > 8 and end == pytest.approx(duration, abs=0.001)
    assert all(set(text) <= set("abcdefgh") and text for _, _, text in found.segments)


def test_a_batch_says_what_its_clips_say_alone(talker: Path, long_clip: Path, tiny_model: Path):
    """Long and short recordings, with the model's own times and by windows."""
    whole = read_recording(long_clip)
    clips = [whole[: WINDOW // 2], whole[: WINDOW + 8_000], whole[WINDOW // 3 : WINDOW]]
    for model, has_times in ((talker, True), (tiny_model, False)):
        recogniser = load_recogniser("--model", str(model))
        alone = []
        for clip in clips:
            alone += transcribe(recogniser, [clip], language="es", task="transcribe")
        together = transcribe(recogniser, clips, language="es", task="transcribe", batch_size=2)
        assert together == alone and alone[0].segments != alone[1].segments
        assert {found.has_model_times for found in alone} == {has_times}


def test_long_clip_without_usable_times_is_cut_at_pauses(
    tiny_model: Path, long_clip: Path, monkeypatch: Any
):
    """A random model gives times up to 30 s in a window of 4 s."""
    recogniser = load_recogniser("--model", str(tiny_model))
    waveform = read_recording(long_clip)
    waveform[WINDOW : 3 * WINDOW // 2] = 0
    monkeypatch.setattr(recogniser.processor.tokenizer, "decode", lambda *args, **kwargs: " words ")
    (found,) = transcribe(recogniser, [waveform], language="es", task="transcribe")
    segments = found.segments
    assert not found.has_model_times and {text for _, _, text in segments} == {"words"}
    assert (
        len(segments) >= 3
        and segments[0][0] == 0
        and all(end - start <= 4 for start, end, _ in segments)
    )
    assert segments[-1][1] == pytest.approx(len(waveform) / 16_000)


def test_silent_windows_are_left_out(recogniser: Recogniser, monkeypatch: Any):
    lengths = []
    monkeypatch.setattr(recogniser.processor.tokenizer, "decode", lambda *args, **kwargs: "words")
    monkeypatch.setattr(
        recogniser.model, "generate", lambda **_: lengths.append(1) or torch.zeros(1, 1)
    )
    waveform = demonstration.speak(["uno", "dos", "tres"], np.random.default_rng(0))
    waveform = np.concatenate([waveform, np.zeros(2 * WINDOW - len(waveform), dtype=np.float32)])
    (segments,) = transcribe_windows(recogniser, [waveform], [{}], batch_size=4)
    assert len(segments) == len(lengths) == 1


@pytest.mark.parametrize(
    ("segments", "plausible"),
    [
        ([(0, 2, "a"), (2, 6, ""), (6, 10, "c")], True),
        ([(0, 2, "a"), (2, 6.5, "b")], False),
        ([(2, 3, "a"), (0, 1, "b")], False),
        ([(2, 1, "a")], False),
        ([], True),
    ],
)
def test_times_that_cannot_be_true(segments: list[Segment], plausible: bool):
    assert are_plausible(segments, window_in_seconds=4) == plausible


def test_a_model_that_hardly_moves_on_is_stopped(recogniser: Recogniser, monkeypatch: Any):
    def crawl(monitor_progress: Any, **inputs: Any) -> None:
        for window in range(10_000):
            monitor_progress(window)
        pytest.fail("not stopped")

    monkeypatch.setattr(recogniser.model, "generate", crawl)
    features = torch.zeros(1, 80, 1000)
    assert transcribe_with_timestamps(recogniser, features, [10.0], [{}]) == [None]


def test_the_language_is_the_one_that_the_model_was_trained_on(tiny_model: Path, tmp_path: Path):
    recogniser = load_recogniser("--model", str(tiny_model))
    recogniser.name = str(tmp_path)
    record = {"identity": {"language": "Spanish"}}
    (tmp_path / "run_info.json").write_text(json.dumps(record))
    assert chosen_language(recogniser, None) == "es"
    assert chosen_language(recogniser, "Dutch") == "nl"
    assert chosen_language(recogniser, DETECT) == DETECT
    recogniser.model.generation_config.language = "<|fr|>"  # what the model itself says comes first
    assert chosen_language(recogniser, None) == "fr"
    with pytest.raises(UserError, match="no such language"):
        chosen_language(recogniser, "Qwertyish")
    recogniser.model.generation_config.language = None
    (tmp_path / "run_info.json").write_text("[")
    assert chosen_language(recogniser, None) == DETECT


def test_transcribing_leaves_cudnn_s_attention_as_it_was(
    recogniser: Recogniser, monkeypatch: pytest.MonkeyPatch
):
    """Each token is a new length, for which that one would build a plan."""
    settings = []

    def generate(*args: Any, **how: Any) -> Any:
        settings.append(torch.backends.cuda.cudnn_sdp_enabled())
        return original(*args, **how)

    original = recogniser.model.generate
    monkeypatch.setattr(recogniser.model, "generate", generate)
    clip = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    prompts = [{"language": "es", "task": "transcribe"}]
    transcribe_windows(recogniser, [clip], prompts, batch_size=1)
    features = extract_features(recogniser, [clip])
    transcribe_with_timestamps(recogniser, features, [1.0], prompts)
    assert set(settings) == {False} and len(settings) >= 2
    assert torch.backends.cuda.cudnn_sdp_enabled()
