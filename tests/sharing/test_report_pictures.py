"""Pictures of the report that are drawn beside the training: where they go, and what a process that
fails, hangs or is left alone leaves behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speech_finetuning.sharing import report_pictures
from speech_finetuning.sharing.report_clips import Clip, ClipShelf
from speech_finetuning.sharing.report_pictures import Painter, PictureOrder

PROJECT = Path(__file__).parents[2]
PNG = b"\x89PNG"
WEBP_IN_BASE64 = "UklGR"  # RIFF


def make_order(folder: Path, num_pictures: int = 1, num_frames: int = 100) -> PictureOrder:
    """A page with words in the places of its pictures, and a curve."""
    generator = np.random.default_rng(0)
    places = [f"@picture-00-{number}@" for number in range(num_pictures)]
    spectrograms = {
        place: generator.normal(0, 0.5, (80, num_frames)).astype(np.float32) for place in places
    }
    curve = {
        "points": [(2, 50.0), (4, 25.0)],
        "baseline": 80.0,
        "target": str(folder / "curve.png"),
    }
    pages = {folder / "report.html": f"<p>{' '.join(places)}</p>"}
    return PictureOrder(spectrograms=spectrograms, pages=pages, curve=curve)


def hang(module: str, words: list[str], log: Path, **variables: str) -> subprocess.Popen:
    """In place of `start_child`: a process that does not end."""
    code = "import time; time.sleep(600)"
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.slow
def test_pictures_come_into_the_page_and_nothing_else_is_left(tmp_path: Path):
    painter = Painter(folder=tmp_path / "_report" / "drawing")
    (tmp_path / "report.html").write_text("<p></p>")
    order = make_order(tmp_path, num_pictures=12)
    painter.start(order)
    assert (tmp_path / "report.html").read_text() == "<p></p>", "whole until it is replaced"
    pictures = painter.collect()
    assert list(pictures) == list(order.spectrograms)
    assert all(picture.startswith(WEBP_IN_BASE64) for picture in pictures.values())
    page = (tmp_path / "report.html").read_text()
    assert page == f"<p>{' '.join(pictures.values())}</p>"
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "curve.png"}
    assert painter.collect() == {}


@pytest.mark.slow
def test_a_process_that_fails_is_a_warning_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    order = make_order(tmp_path)
    order.spectrograms = {place: np.zeros(7) for place in order.spectrograms}  # of no shape to draw
    painter = Painter(folder=tmp_path / "drawing")
    painter.start(order)
    assert painter.collect() == {}
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("report: pictures could not be drawn: ") and "Error" in message
    assert not (tmp_path / "report.html").exists() and not painter.folder.exists()


def test_a_process_that_hangs_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(report_pictures, "start_child", hang)
    monkeypatch.setattr(report_pictures, "MAX_DRAWING_IN_SECONDS", 0.2)
    painter = Painter(folder=tmp_path / "drawing")
    painter.start(make_order(tmp_path))
    assert painter.child is not None
    pid = painter.child.pid
    assert painter.collect() == {}
    assert "report: pictures could not be drawn: they took too long" in caplog.text
    assert not is_running(pid) and not painter.folder.exists()


def test_an_interrupt_is_not_held_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As of StopSignals, whose handler raises; what was begun goes at the end of the process."""
    monkeypatch.setattr(report_pictures, "start_child", hang)
    painter = Painter(folder=tmp_path / "drawing")
    painter.start(make_order(tmp_path))
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(InterruptedError):
            painter.collect()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert painter.child is not None
    pid = painter.child.pid
    painter.cancel()
    assert not is_running(pid) and not painter.folder.exists()


def interrupt(number: int, frame: Any) -> None:
    raise InterruptedError


PARENT = """
import sys, time
from pathlib import Path
sys.path[:0] = ["tests/sharing"]
from test_report_pictures import make_order
from speech_finetuning.sharing.report_pictures import Painter
folder = Path(sys.argv[1])
painter = Painter(folder=folder / "drawing")
painter.start(make_order(folder, num_pictures=200, num_frames=3000))
print(painter.child.pid, flush=True)
if sys.argv[2] == "wait":
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, None])
def test_the_drawing_ends_with_the_trainer(tmp_path: Path, ending: signal.Signals | None):
    """Killed, it leaves a folder that the next start removes; ended, nothing."""
    words = [str(tmp_path), "leave" if ending is None else "wait"]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *words], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    if ending is not None:
        assert is_running(pid)
        os.kill(parent.pid, ending)
    parent.wait(60)
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while is_running(pid):
        assert time.monotonic() < deadline, "the drawing goes on"
        time.sleep(0.05)
    assert not (tmp_path / "report.html").exists()
    assert (tmp_path / "drawing").exists() == (ending is not None)


def test_words_in_the_places_of_pictures_are_not_those_of_transcripts():
    shelf = ClipShelf(num_clips=2)
    clip = Clip(audio="sound")
    shelf.have_drawn(("eval", 3), clip, np.zeros((80, 10), np.float32))
    assert not clip.is_drawn and clip.num_bytes > 10_000
    said = "@picture-00-0@"
    assert shelf.without_places(f"{said} {clip.picture}") == f"{said} "
    shelf.put({clip.picture: "picture"})
    assert clip.picture == "picture" and clip.num_bytes == len("soundpicture")
    assert shelf.pictures == {("eval", 3): "picture"} and not shelf.spectrograms


def test_a_picture_that_could_not_be_drawn_is_tried_again():
    shelf = ClipShelf(num_clips=2)
    clip = Clip()
    shelf.have_drawn(("eval", 3), clip, np.zeros((80, 10), np.float32))
    shelf.put({})
    assert clip.picture == "" and clip.is_drawn and not shelf.pictures and not shelf.undrawn


def test_the_training_does_not_wait_for_pictures(
    train: Callable[..., dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """With a process that never ends, the page is there without pictures, and the run ends well."""
    seen: list[tuple[str, bool]] = []
    report = tmp_path / "output" / "report.html"

    def note(painter: Painter) -> dict[str, str]:
        if painter.child is not None:
            seen.append((report.read_text(encoding="utf-8"), painter.child.poll() is None))
        return original(painter)

    original = Painter.collect
    monkeypatch.setattr(Painter, "collect", note)
    monkeypatch.setattr(report_pictures, "start_child", hang)
    monkeypatch.setattr(report_pictures, "MAX_DRAWING_IN_SECONDS", 0.5)
    train("--do_train --do_eval --max_steps 2 --eval_steps 2 --save_steps 2 --report_clips 4")
    page, is_drawing = seen[0]
    assert is_drawing and '"audio":"' in page and '"picture":""' in page
    assert "@picture-" not in page and "@picture-" not in report.read_text(encoding="utf-8")
    assert "pictures could not be drawn: they took too long" in caplog.text
    assert not (tmp_path / "output" / "_report").exists()
