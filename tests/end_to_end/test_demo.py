"""demo.py: what the page shows, without gradio; and the page itself in a real browser where there
is one."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from browser import BROWSER_ARGUMENTS, find_browser
from talker import make_long_clip, make_talker

import demo
from speech_finetuning.model.transcription import Transcript

PROJECT = Path(demo.__file__).parent


@pytest.fixture(scope="module")
def tiny_model(full_model: Path) -> Path:
    return full_model


@pytest.fixture
def recogniser(tiny_model: Path) -> demo.Recogniser:
    return demo.load("--model", str(tiny_model))


@pytest.fixture
def talker(tmp_path: Path) -> Path:
    return make_talker(tmp_path / "talker")


@pytest.fixture
def long_clip(tmp_path: Path) -> Path:
    return make_long_clip(tmp_path)


def heard(text: str, language: str = "es") -> Transcript:
    segments = [(0.0, 1.0, text)] if text else []
    return Transcript(segments=segments, language=language, has_model_times=True)


def test_no_clip_gets_a_line_and_clears_the_page(recogniser: demo.Recogniser, tmp_path: Path):
    shown = demo.answer([recogniser, recogniser], tmp_path, None, "es", "transcribe", "")
    assert shown[0].startswith("No audio yet")
    assert shown[1:] == ["", "", "", None, None] * 2


def test_a_clip_that_does_not_fit_is_said(
    recogniser: demo.Recogniser, long_clip: Path, monkeypatch: Any
):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(demo, "transcribe", fail)
    shown = demo.answer([recogniser], long_clip.parent, str(long_clip), "es", "transcribe", "")
    assert shown[0] == "Not enough GPU memory for this clip: choose a shorter one."


def test_a_prompt_is_read_by_all_models_and_told(
    recogniser: demo.Recogniser, long_clip: Path, monkeypatch: Any
):
    read: list[list[int]] = []

    def note(*args: Any, prompt_ids: list[int], **kwargs: Any) -> list[Transcript]:
        read.append(prompt_ids)
        return [heard("uno")]

    monkeypatch.setattr(demo, "transcribe", note)
    what = ([recogniser] * 2, long_clip.parent, str(long_clip), "es", "transcribe", "")
    assert demo.answer(*what)[0] == demo.answer(*what, prompt="Ana")[0] == ""
    assert read[:2] == [[], []] and read[2] == read[3] and len(read[2]) == 5
    assert demo.answer(*what, prompt="x" * 100)[0].startswith("Of the prompt's 101 tokens only")
    shown = demo.answer(*what, prompt="a <|es|>")
    assert shown[0].startswith("What may come up: ") and shown[1] == ""


def test_segments_are_buttons_and_text_is_not_html():
    segments = [(61.25, 3599.99, "<img src=x> & more")]
    page = demo.segments_as_html(segments, [[("<img ", False), ("src=x> ", True), ("&", True)]])
    assert 'data-start="61.25"' in page and "1:01.2 - 59:59.9" in page
    assert "&lt;img <mark>src=x&gt; &amp;</mark></p>" in page


def test_words_that_the_other_model_has_not_are_marked(recogniser: demo.Recogniser):
    segments = [(0.0, 1.0, "El gato, duerme"), (1.0, 2.0, "muy bien")]
    found = Transcript(segments=segments, language="es", has_model_times=True)
    marked = demo.marked_segments(found, [heard("el gato come bien")], recogniser, "transcribe")
    assert marked == [
        [("El ", False), ("gato, ", False), ("duerme ", True)],
        [("muy ", True), ("bien ", False)],
    ]
    (alone,) = demo.marked_segments(heard("猫が", "ja"), [], recogniser, "transcribe")
    assert alone == [("猫", False), ("が ", False)]


def test_mistakes_are_counted_against_what_was_said(recogniser: demo.Recogniser):
    found = heard("El gato come.")
    assert demo.compare("", found, recogniser) == demo.compare(" ... ", found, recogniser) == ""
    assert demo.compare("el gato duerme bien", found, recogniser) == (
        "**2 mistakes in 4 words**: 1 wrong, 1 missing (word error rate 50.0 %)"
    )
    assert "**No mistakes in 3 words** (" in demo.compare("El gato: come", found, recogniser)
    assert "1 mistake in 1 word**: 1 missing" in demo.compare("hola", heard(""), recogniser)
    assert "3 mistakes in 1 word**: 1 wrong, 2 too many" in demo.compare("no", found, recogniser)
    japanese = demo.compare("猫が寝る", heard("猫が", "ja"), recogniser)
    assert japanese == "**2 mistakes in 4 characters**: 2 missing (character error rate 50.0 %)"


def test_a_transcript_can_be_taken_along(tmp_path: Path):
    found = Transcript(segments=[(0, 1.5, "hola")], language="es", has_model_times=True)
    text, subtitles = map(Path, demo.files_of(found, "clip", tmp_path))
    assert (text.name, text.read_text()) == ("clip.txt", "hola\n")
    assert subtitles.name == "clip.srt" and "00:00:01,500" in subtitles.read_text()
    assert text.is_relative_to(tmp_path)
    os.utime(text.parent, (0, 0))  # an old one
    assert demo.files_of(heard(""), "clip", tmp_path) == [None, None]
    assert list(tmp_path.iterdir()) == []


def test_a_model_has_a_name_that_says_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("output", "checkpoint-200", "whisper-small-es"):
        (tmp_path / "whisper-learn" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "whisper-learn")
    assert demo.shown_name("output") == "whisper-learn/output"
    assert demo.shown_name("../whisper-learn/checkpoint-200") == "whisper-learn/checkpoint-200"
    assert demo.shown_name("whisper-small-es") == "whisper-small-es"
    assert demo.shown_name("openai/whisper-small") == "whisper-small"
    assert demo.is_same_model("output", str(tmp_path / "whisper-learn" / "output"))
    assert demo.is_same_model("openai/whisper-small", "openai/whisper-small")
    assert not demo.is_same_model("output", "checkpoint-200")
    assert not demo.is_same_model("output", None)


def test_the_title_says_what_the_model_is_and_how_good(recogniser: demo.Recogniser, tmp_path: Path):
    folder = tmp_path / "whisper_[es]"
    folder.mkdir()
    recogniser.name = str(folder)
    recogniser.model.generation_config.language = "es"
    assert demo.introduce(recogniser, None).startswith(
        "# whisper\\_\\[es\\] · Spanish\n\nSpeech to text."
    )
    scores = {"eval_wer": 7.26, "eval_num_rows": 1000, "zero_shot_wer": 20.0}
    (folder / "all_results.json").write_text(json.dumps(scores))
    assert (
        "Speech to text by whisper-small, trained further: 7.3 of 100 words are wrong "
        "(before training 20.0), measured on 1,000 recordings."
    ) in demo.introduce(recogniser, "openai/whisper-small")
    scores |= {"eval_wer_low": 6.0, "eval_wer_high": 8.26, "eval_cer": 2.0, "eval_num_rows": 1}
    assert demo.describe_scores(scores, "es").endswith(
        " (95 % interval 6.0 to 8.3; before training 20.0), measured on 1 recording"
    )
    assert demo.describe_scores(scores, "th").startswith("2.0 of 100 characters are wrong,")
    assert demo.describe_scores({"eval_wer": 249.7, "eval_num_rows": 2}, "es") == (
        "word error rate 249.7 %, as more words are added than were said, measured on 2 recordings"
    )
    assert demo.describe_scores({"eval_wer": "x"}, "es") == ""
    (folder / "all_results.json").write_text("[")
    assert "words are wrong" not in demo.introduce(recogniser, None)


def test_examples_are_taken_from_the_report_of_the_run(tmp_path: Path):
    sound = base64.b64encode(b"mp3").decode()
    rows = [
        ["id", "", 1.0, errors, 3, f"read {errors}", "", "", "", "", "", None]
        for errors in (2, 0, 1, 2)
    ]
    rows[1][8] = "Written."
    clips = {
        "0": {"audio": sound},
        "1": {"audio": sound},
        "2": {"audio": ""},
        "3": {"audio": sound},
    }
    tables = json.dumps([{"rows": rows, "clips": clips}])
    page = f'<script type="application/json" id="tables">{tables}</script>'
    (tmp_path / "report.html").write_text(page)
    (tmp_path / "examples").mkdir()
    found = demo.examples_of(str(tmp_path), tmp_path / "examples")
    assert [said for _, said in found] == ["Written.", "read 2"]
    assert Path(found[0][0]).read_bytes() == b"mp3"
    (tmp_path / "report.html").write_text("nothing")
    assert demo.examples_of(str(tmp_path), tmp_path) == []


@pytest.mark.parametrize(
    ("card", "base"),
    [
        ("---\nbase_model: openai/whisper-small\n---\n", "openai/whisper-small"),
        ("---\nbase_model:\n- openai/whisper-base\n---\n", "openai/whisper-base"),
        ("---\nlanguage: es\n---\n", "from/run-info"),
        ("---\nbase_model: [\n---\n", None),
        (None, "from/run-info"),
        ("---\nbase_model: local model\n---\n", None),  # as in a run_info.json of the Hub
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
    assert demo.load_other(str(folder), None, "./gone") == []
    assert (
        "note: shown without the base model. --base_model ./gone: no folder"
        in capsys.readouterr().err
    )
    assert demo.load_other(str(folder), "none", str(tiny_model)) == []
    assert demo.load_other(str(folder), None, str(folder)) == []
    (found,) = demo.load_other(str(folder), None, str(tiny_model))
    assert found.name == str(tiny_model)
    with pytest.raises(demo.UserError, match="--base_model ./gone"):
        demo.load_other(str(folder), "./gone", None)


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
        ("weights", "model.safetensors: Error while deserializing", "OUTPUT_DIR"),
        ("processor", "preprocessor_config.json", "OUTPUT_DIR"),
        ("architecture", "bert model; only Whisper", "OUTPUT_DIR"),
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
        and "Next: --model " in lines[-1]
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


def test_a_port_that_is_taken_is_told_with_one_that_is_free(monkeypatch: Any, capsys: Any):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: name)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        monkeypatch.setattr(demo, "FIRST_PORT", port)
        monkeypatch.setattr(demo, "LAST_PORT", port)
        assert demo.main(["model", "--port", str(port)]) == 2
        assert capsys.readouterr().err == (
            f"error: --port {port}: in use by another program, or by one that has just ended. "
            "Next: --port with a free one\n"
        )
        with pytest.raises(demo.UserError, match=f"none of {port} to {port} is free"):
            demo.choose_port(None)
    assert demo.choose_port(None) == demo.choose_port(port) == port
    for wrong in (0, -1, 65536):
        with pytest.raises(demo.UserError, match=f"from 1 to 65535. Next: --port {port}"):
            demo.choose_port(wrong)


@pytest.mark.slow
def test_importing_needs_no_gradio():
    code = "import sys, demo; "
    code += "sys.exit('gradio' in sys.modules or demo.os.environ['GRADIO_ANALYTICS_ENABLED'] != 'False')"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0


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
    browser = find_browser("gradio")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--model", str(talker), "--base_model", str(tiny_model), "--port", str(port)]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    process = subprocess.Popen([sys.executable, str(PROJECT / "demo.py"), *words], env=environment)
    try:
        wait_for_port(port, process)
        with socket.socket() as neighbour:  # reaches a server that listens on every address
            assert neighbour.connect_ex(("127.0.0.2", port)) != 0
        visit(browser, f"http://127.0.0.1:{port}/", talker, long_clip, tmp_path)
    finally:
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    assert list(temporary.iterdir()) == []  # nothing that was said stays behind


def visit(browser: str, address: str, talker: Path, clip: Path, tmp_path: Path) -> None:
    """No clip, a long clip, a click on its last segment, then a file that is no audio."""
    from playwright.sync_api import sync_playwright

    recogniser = demo.load("--model", str(talker))
    heard = demo.hear(recogniser, demo.read_audio(str(clip)), demo.DETECT, "transcribe")
    expected = heard.segments
    junk = tmp_path / "junk.wav"
    junk.write_bytes(b"no audio at all" * 100)
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=BROWSER_ARGUMENTS)
        page = chromium.new_page()
        addresses: list[str] = []
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(address)
        page.click("#transcribe")
        page.get_by_text("No audio yet").wait_for()
        assert page.get_by_text("Download as text").first.is_disabled()

        page.set_input_files("#speech input[type=file]", clip)
        page.locator("#speech audio").first.wait_for(state="attached")
        page.get_by_text("No audio yet").wait_for(state="detached")  # a new clip clears the page
        page.fill("#said textarea, #said input", "uno dos")
        assert page.locator("#prompt").is_visible()
        page.click("#transcribe")
        page.locator("#model-0 button.segment").last.wait_for(timeout=120_000)
        assert page.input_value("#model-0 textarea") == "\n".join(text for _, _, text in expected)
        assert "mistakes in 2 words" in page.inner_text("#model-0")
        assert "in pieces cut at pauses" in page.inner_text("#model-1")
        assert page.locator("#model-0 mark").count() > 0
        buttons = page.locator("#model-0 button.segment")
        assert buttons.count() == len(expected)
        buttons.last.click()
        page.wait_for_function(
            "document.querySelector('#speech audio').readyState >= 2 && "
            f"document.querySelector('#speech audio').currentTime >= {expected[-1][0]}"
        )
        with page.expect_download() as download:
            page.locator("#model-0").get_by_text("Download as subtitles").click()
        assert " --> " in Path(download.value.path()).read_text()
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
