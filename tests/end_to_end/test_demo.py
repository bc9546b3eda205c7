"""demo.py: what the page shows, without gradio; and the page itself in a real browser where there
is one."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from transformers import GenerationConfig

import demo
from speech_finetuning.cli import demonstration

PROJECT = Path(demo.__file__).parent
WINDOW = 4 * demo.SAMPLE_RATE_IN_HZ  # the tiny models hear 4 s at once


@pytest.fixture
def recogniser(tiny_model: Path) -> demo.Recogniser:
    return demo.load("--model", str(tiny_model))


@pytest.fixture
def talker(tmp_path: Path) -> Path:
    """A random model that can say only letters, and only times within its window."""
    folder = demonstration.make_model(tmp_path / "talker", d_model=16, num_layers=1)
    tokens = demonstration.make_tokenizer().get_vocab()
    config = GenerationConfig.from_pretrained(folder)
    times = {f"<|{i * 0.02:.2f}|>" for i in range(201)}
    allowed = set("abcdefgh") | times | {"<|endoftext|>"}
    config.suppress_tokens = [
        token_id for token, token_id in tokens.items() if token not in allowed
    ]
    config.begin_suppress_tokens = [tokens["<|endoftext|>"]]
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def long_clip(tmp_path: Path) -> Path:
    """About 10 s, two and a half windows, 44.1 kHz stereo."""
    generator = np.random.default_rng(0)
    waveform = np.concatenate(
        [demonstration.speak(["uno", "dos", "tres", "diez"], generator) for _ in range(6)]
    )
    upsampled = soxr.resample(waveform, 16_000, 44_100)
    soundfile.write(tmp_path / "long.wav", np.stack([upsampled, upsampled], axis=1), 44_100)
    return tmp_path / "long.wav"


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (None, "Not readable as audio"),
        ([], "holds no samples"),
        ([0.5, float("nan")], "not finite"),
        ([0.0] * 1600, "Only silence"),
        ([0.3] * 1600, "Only silence"),
    ],
)
def test_a_clip_without_speech_gets_a_line(
    tmp_path: Path, samples: list[float] | None, message: str
):
    path = tmp_path / "clip.wav"
    if samples is None:
        path.write_bytes(b"no audio at all" * 100)
    else:
        soundfile.write(path, np.array(samples, dtype=np.float32), 16_000, subtype="FLOAT")
    with pytest.raises(demo.UserError, match=message) as caught:
        demo.read_audio(str(path))
    assert "\n" not in str(caught.value)


def test_no_clip_gets_a_line_and_clears_the_page(recogniser: demo.Recogniser):
    shown = demo.answer([recogniser, recogniser], None, "es", "transcribe")
    assert shown[0].startswith("No audio yet") and shown[1:] == [""] * 7


def test_a_clip_is_mixed_down_and_resampled(tmp_path: Path):
    seconds = np.arange(44_100) / 44_100
    tone = 0.5 * np.sin(2 * np.pi * 1000 * seconds)
    soundfile.write(tmp_path / "tone.wav", np.stack([tone, np.zeros_like(tone)], axis=1), 44_100)
    waveform = demo.read_audio(str(tmp_path / "tone.wav"))
    assert waveform.shape == (16_000,) and waveform.dtype == np.float32
    assert np.abs(np.fft.rfft(waveform)).argmax() == 1000
    assert np.abs(waveform[2000:-2000]).max() == pytest.approx(0.25, abs=0.01)


def test_cuts_are_in_pauses_and_lose_nothing():
    generator = np.random.default_rng(0)
    waveform = generator.normal(0, 0.1, 10 * 16_000).astype(np.float32)
    pauses = [(int(start * 16_000), int((start + 0.12) * 16_000)) for start in (0.5, 3.4, 6.9)]
    for start, end in pauses:
        waveform[start:end] = 0
    pieces = demo.cut_at_pauses(waveform, WINDOW)
    assert [start for start, _ in pieces] == [0, *[end for _, end in pieces[:-1]]] and pieces[-1][
        1
    ] == len(waveform)
    assert all(0 < end - start <= WINDOW for start, end in pieces)
    assert all(
        pause[0] <= cut[1] <= pause[1] for pause, cut in zip(pauses[1:], pieces, strict=False)
    )
    assert demo.cut_at_pauses(waveform[:WINDOW], WINDOW) == [(0, WINDOW)]


def test_choices_are_what_the_model_has(recogniser: demo.Recogniser, english_model: Path):
    assert len(recogniser.languages) == 99 and recogniser.tasks == ["transcribe", "translate"]
    assert recogniser.window_in_samples == WINDOW
    assert demo.default_language(recogniser) == demo.DETECT
    for told in ("es", "Spanish", "<|es|>"):
        recogniser.model.generation_config.language = told
        assert demo.default_language(recogniser) == "es"
    english = demo.load("--model", str(english_model))
    assert (
        english.languages == english.tasks == [] and demo.default_language(english) == demo.DETECT
    )


def test_a_model_is_asked_only_for_what_it_has(recogniser: demo.Recogniser, english_model: Path):
    window = demo.extract_features(recogniser, np.zeros(WINDOW, dtype=np.float32))
    assert demo.choose_prompt(recogniser, window, "de", "translate") == {
        "language": "de",
        "task": "translate",
    }
    detected = demo.choose_prompt(recogniser, window, demo.DETECT, "transcribe")
    assert detected["language"] in recogniser.languages
    english = demo.load("--model", str(english_model))
    assert demo.choose_prompt(english, window, "es", "translate") == {}
    segments, note = demo.transcribe(
        english, demonstration.speak(["uno"], np.random.default_rng(0)), "es", "transcribe"
    )
    assert "language: en" in note and isinstance(segments, list)


@pytest.mark.parametrize(("share", "expected"), [(0.5, True), (0.001, False)])
def test_unlearned_timestamps_are_not_used(
    recogniser: demo.Recogniser, monkeypatch: Any, share: float, expected: bool
):
    config = recogniser.model.generation_config
    without, size = config.no_timestamps_token_id, recogniser.model.config.vocab_size
    logits = demo.torch.full((1, 3, size), -1e9)
    logits[0, -1, without], logits[0, -1, without + 7] = np.log(1 - share), np.log(share)
    monkeypatch.setattr(
        recogniser.model, "forward", lambda **inputs: SimpleNamespace(logits=logits)
    )
    window = demo.torch.zeros(1, 80, 400)
    assert (
        demo.predicts_timestamps(recogniser, window, {"language": "es", "task": "transcribe"})
        == expected
    )
    del config.no_timestamps_token_id
    assert not demo.predicts_timestamps(recogniser, window, {"language": "es"})


def test_long_clip_with_the_models_own_times(talker: Path, long_clip: Path):
    """The library's long-form generation with a window that is not 30 s."""
    segments, note = demo.transcribe(
        demo.load("--model", str(talker)), demo.read_audio(str(long_clip)), "es", "transcribe"
    )
    assert note == "language: es, times: the model's own"
    duration = soundfile.info(long_clip).duration
    assert segments[-1][0] > 8 and segments[-1][1] == pytest.approx(duration, abs=0.001)
    assert all(set(text) <= set("abcdefgh") and text for _, _, text in segments)


def test_long_clip_without_usable_times_is_cut_at_pauses(
    tiny_model: Path, long_clip: Path, monkeypatch: Any
):
    """A random model gives times up to 30 s in a window of 4 s."""
    recogniser = demo.load("--model", str(tiny_model))
    waveform = demo.read_audio(str(long_clip))
    waveform[WINDOW : 3 * WINDOW // 2] = 0
    monkeypatch.setattr(recogniser.processor.tokenizer, "decode", lambda *args, **kwargs: " words ")
    segments, note = demo.transcribe(recogniser, waveform, "es", "transcribe")
    assert "whole windows" in note and {text for _, _, text in segments} == {"words"}
    assert (
        len(segments) >= 3
        and segments[0][0] == 0
        and all(end - start <= 4 for start, end, _ in segments)
    )
    assert segments[-1][1] == pytest.approx(len(waveform) / 16_000)


def test_silent_windows_are_left_out(recogniser: demo.Recogniser, monkeypatch: Any):
    lengths = []
    monkeypatch.setattr(recogniser.processor.tokenizer, "decode", lambda *args, **kwargs: "words")
    monkeypatch.setattr(
        recogniser.model, "generate", lambda **_: lengths.append(1) or demo.torch.zeros(1, 1)
    )
    waveform = demonstration.speak(["uno", "dos", "tres"], np.random.default_rng(0))
    waveform = np.concatenate([waveform, np.zeros(2 * WINDOW - len(waveform), dtype=np.float32)])
    segments = demo.transcribe_windows(recogniser, waveform, {})
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
def test_times_that_cannot_be_true(segments: list[demo.Segment], plausible: bool):
    assert demo.are_plausible(segments, window_in_seconds=4) == plausible


def test_a_model_that_hardly_moves_on_is_stopped(recogniser: demo.Recogniser, monkeypatch: Any):
    def crawl(monitor_progress: Any, **inputs: Any) -> None:
        for window in range(10_000):
            monitor_progress(window)
        pytest.fail("not stopped")

    monkeypatch.setattr(recogniser.model, "generate", crawl)
    features = demo.torch.zeros(1, 80, 1000)
    assert demo.transcribe_with_timestamps(recogniser, features, 10, {}) is None


def test_segments_are_buttons_and_text_is_not_html():
    page = demo.segments_as_html([(61.25, 3599.99, "<img src=x> & more")])
    assert 'data-start="61.25"' in page and "1:01.2 - 59:59.9" in page
    assert "&lt;img src=x&gt; &amp; more" in page


@pytest.mark.parametrize(
    ("card", "base"),
    [
        ("---\nbase_model: openai/whisper-small\n---\n", "openai/whisper-small"),
        ("---\nbase_model:\n- openai/whisper-base\n---\n", "openai/whisper-base"),
        ("---\nlanguage: es\n---\n", "from/run-info"),
        ("---\nbase_model: [\n---\n", None),
        (None, "from/run-info"),
    ],
)
def test_base_model_is_read_from_the_folder(tmp_path: Path, card: str | None, base: str | None):
    assert demo.base_model_of(str(tmp_path)) is None
    (tmp_path / "run_info.json").write_text(
        json.dumps({"identity": {"model_name_or_path": "from/run-info"}})
    )
    if card:
        (tmp_path / "README.md").write_text(card)
    assert demo.base_model_of(str(tmp_path)) == base


def test_base_model_that_was_not_asked_for_may_be_missing(
    tiny_model: Path, tmp_path: Path, capsys: Any
):
    folder = shutil.copytree(tiny_model, tmp_path / "tuned")
    (folder / "run_info.json").write_text(
        json.dumps({"identity": {"model_name_or_path": "./gone"}})
    )
    assert [found.name for found in demo.load_recognisers(str(folder), None)] == [str(folder)]
    assert (
        "note: shown without the base model. --base_model ./gone: no folder"
        in capsys.readouterr().err
    )
    assert len(demo.load_recognisers(str(folder), "none")) == 1
    assert len(demo.load_recognisers(str(folder), str(tiny_model))) == 2
    with pytest.raises(demo.UserError, match="--base_model ./gone"):
        demo.load_recognisers(str(folder), "./gone")


def damaged(kind: str, tiny_model: Path, tmp_path: Path) -> Path:
    """A folder, or what is no folder, with the given thing wrong with it."""
    folder = tmp_path / "model"
    if kind in ("weights", "processor", "architecture"):
        shutil.copytree(tiny_model, folder)
    if kind == "weights":
        os.truncate(folder / "model.safetensors", 1000)
    if kind == "processor":
        for name in ("processor_config.json", "preprocessor_config.json"):
            (folder / name).unlink()
    if kind == "architecture":
        (folder / "config.json").write_text('{"model_type": "bert"}')
    if kind == "output_dir":
        shutil.copytree(tiny_model, folder / "checkpoint-600")
    if kind == "empty":
        folder.mkdir()
    if kind == "file":
        folder.write_text("x")
    return folder


@pytest.mark.parametrize(
    ("kind", "wrong", "advice"),
    [
        ("weights", "SafetensorError", "OUTPUT_DIR"),
        ("processor", "preprocessor_config.json", "OUTPUT_DIR"),
        ("architecture", "found a bert model", "OUTPUT_DIR"),
        (
            "output_dir",
            "no folder with a config.json, found checkpoint-600",
            "model/checkpoint-600",
        ),
        ("empty", "found nothing", "OUTPUT_DIR"),
        ("file", "found a file", "OUTPUT_DIR"),
        ("absent", "found nothing", "OUTPUT_DIR"),
    ],
)
def test_wrong_model_is_one_line(
    kind: str,
    wrong: str,
    advice: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: Any,
):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: name)
    folder = damaged(kind, tiny_model, tmp_path)
    capsys.readouterr()
    assert demo.main(["--model", str(folder)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"error: --model {folder}: ") and not any(
        "Traceback" in line for line in lines
    )
    assert (
        wrong in lines[-1]
        and "Next: python demo.py --model " in lines[-1]
        and advice in lines[-1].split("Next: ")[1]
    )


def test_unknown_hub_id_is_one_line(capsys: Any, monkeypatch: Any):
    """HF_HUB_OFFLINE stands in for a hub that does not have it."""
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: name)
    assert demo.main(["--model", "nobody/no-such-model"]) == 2
    error = capsys.readouterr().err.strip()
    assert (
        error.startswith("error: --model nobody/no-such-model: ")
        and "hf auth login" in error
        and "\n" not in error
    )


def test_missing_gradio_is_said_before_a_model_is_loaded(capsys: Any, monkeypatch: Any):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert demo.main(["--model", "./absent"]) == 2
    error = "error: gradio is not installed. Next: python -m pip install -r requirements-demo.txt\n"
    assert capsys.readouterr().err == error


@pytest.mark.slow
def test_importing_needs_no_gradio():
    code = "import sys, demo; "
    code += "sys.exit('gradio' in sys.modules or demo.os.environ['GRADIO_ANALYTICS_ENABLED'] != 'False')"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


def find_browser() -> str:
    """Skips the test, naming what is missing, where the page cannot be opened."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    browser = next(filter(None, map(shutil.which, names)), None)
    missing = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
    missing += [] if browser else ["chromium (or Chrome)"]
    if missing:
        advice = "pip install -r requirements-demo.txt playwright; apt-get install chromium"
        pytest.skip(f"the page is not opened: {', '.join(missing)} not installed ({advice})")
    return browser


def wait_for_port(port: int, process: subprocess.Popen, limit_in_seconds: float = 120) -> None:
    end = time.monotonic() + limit_in_seconds
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"demo.py did not start: code {process.poll()}")


@pytest.mark.slow
def test_the_page_in_a_browser(talker: Path, tiny_model: Path, long_clip: Path, tmp_path: Path):
    browser = find_browser()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--model", str(talker), "--base_model", str(tiny_model), "--port", str(port)]
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(tmp_path / "uploads")}
    process = subprocess.Popen([sys.executable, str(PROJECT / "demo.py"), *words], env=environment)
    try:
        wait_for_port(port, process)
        with socket.socket() as neighbour:  # reaches a server that listens on every address
            assert neighbour.connect_ex(("127.0.0.2", port)) != 0
        visit(browser, f"http://127.0.0.1:{port}/", talker, long_clip, tmp_path)
    finally:
        process.terminate()
        process.wait(30)


def visit(browser: str, address: str, talker: Path, clip: Path, tmp_path: Path) -> None:
    """No clip, a long clip, a click on its last segment, then a file that is no audio."""
    from playwright.sync_api import sync_playwright

    recogniser = demo.load("--model", str(talker))
    expected, note = demo.transcribe(
        recogniser, demo.read_audio(str(clip)), demo.DETECT, "transcribe"
    )
    junk = tmp_path / "junk.wav"
    junk.write_bytes(b"no audio at all" * 100)
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        addresses: list[str] = []
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(address)
        page.click("#transcribe")
        page.get_by_text("No audio yet").wait_for()

        page.set_input_files("#speech input[type=file]", clip)
        page.locator("#speech #waveform, #speech audio").first.wait_for(state="attached")
        page.get_by_text("No audio yet").wait_for(state="detached")  # a new clip clears the page
        page.click("#transcribe")
        page.locator("#model-0 button.segment").last.wait_for(timeout=120_000)
        assert page.input_value("#model-0 textarea") == "\n".join(text for _, _, text in expected)
        assert note in page.inner_text("#model-0") and "whole windows" in page.inner_text(
            "#model-1"
        )
        buttons = page.locator("#model-0 button.segment")
        assert buttons.count() == len(expected)
        buttons.last.click()
        page.wait_for_function(
            f"player.readyState >= 2 && player.currentTime >= {expected[-1][0]}"
        )  # and is loaded
        page.screenshot(path=tmp_path / "page.png", full_page=True)

        page.click("#speech button[aria-label='Clear']")
        page.set_input_files("#speech input[type=file]", junk)
        page.wait_for_function("document.querySelector('#model-0 textarea').value === ''")
        page.locator("#speech audio").first.wait_for(state="attached")
        page.click("#transcribe")
        page.get_by_text("Not readable as audio").wait_for()
        assert page.input_value("#model-0 textarea") == ""
        chromium.close()
    outside = {url for url in addresses if url.startswith("http") and not url.startswith(address)}
    assert outside == set()
