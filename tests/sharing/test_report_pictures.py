"""Pictures of the report that are drawn beside the training: where they go, and what a process that
fails, hangs or is left alone leaves behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from speech_finetuning.scoring.alignment import AlignedRow
from speech_finetuning.sharing import report_pictures, report_sounds
from speech_finetuning.sharing.picture_process import fill_places
from speech_finetuning.sharing.report_clips import ClipShelf
from speech_finetuning.sharing.report_page import ReportPage
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
    return PictureOrder(spectrograms=spectrograms, pages=pages, places=r"@\w+-00-\d+@", curve=curve)


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
    assert painter.collect() is None
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
    assert painter.collect() is None
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


def test_sounds_come_into_the_page_with_the_pictures_and_what_is_missing_leaves_nothing(
    tmp_path: Path,
):
    order = make_order(tmp_path)
    order.pages = {tmp_path / "report.html": "@sound-00-0@ @sound-00-1@ @picture-00-0@"}
    order.sounds = {"@sound-00-0@": "heard"}
    painter = Painter(folder=tmp_path / "drawing")
    painter.start(order)
    pictures = painter.collect()
    assert pictures is not None
    assert (tmp_path / "report.html").read_text() == f"heard  {pictures['@picture-00-0@']}"


def make_row(index: int, num_errors: int = 0) -> AlignedRow:
    return AlignedRow(
        index=index,
        id=f"validation/0/0/{index}.flac",
        set_name="",
        group=None,
        duration_in_seconds=1.0,
        reference="a",
        prediction="a",
        read_reference="a",
        read_prediction="a",
        unit="word",
        operations=[],
    )


def make_eval_set(num_rows: int) -> datasets.Dataset:
    features = np.zeros((80, 100), np.float32).tobytes()
    return datasets.Dataset.from_dict(
        {"index": list(range(num_rows)), "features": [features] * num_rows}
    )


def test_words_in_places_are_not_those_of_transcripts_and_are_replaced_once():
    shelf = ClipShelf(num_clips=2)
    rows = [make_row(3), make_row(4)]
    clips = shelf.clips_of("eval", rows, make_eval_set(5))
    said = "@picture-00-0@"
    assert fill_places(f"{said} {clips[3].picture}", shelf.places(), {}) == f"{said} "
    assert list(shelf.spectrograms) == [clips[3].picture, clips[4].picture]
    assert clips[3].num_bytes > 10_000
    places = (clips[3].audio, clips[4].audio)
    assert shelf.put_sounds({("eval", 3): "sound"}) == {places[0]: "sound", places[1]: ""}
    shelf.put_pictures({clips[3].picture: "picture"})
    assert (clips[3].audio, clips[3].picture) == ("sound", "picture")
    assert (clips[4].audio, clips[4].picture) == ("", "")
    again = shelf.clips_of("eval", rows, make_eval_set(5))
    assert (again[3].audio, again[3].picture) == ("sound", "picture"), "made before"
    assert fill_places(again[4].audio + again[4].picture, shelf.places(), {}) == "", "tried again"
    assert again[4].audio and again[4].picture


def test_an_evaluation_forgets_what_the_one_before_was_to_show():
    shelf = ClipShelf(num_clips=1)
    first = shelf.clips_of("eval", [make_row(0)], make_eval_set(3))
    other = shelf.clips_of("test", [make_row(0)], make_eval_set(3))
    second = shelf.clips_of("eval", [make_row(1)], make_eval_set(3))
    assert (first[0].audio, first[0].picture) == ("", "")
    assert set(shelf.spectrograms) == {other[0].picture, second[1].picture}
    places = {other[0].audio, second[1].audio}
    assert set(shelf.put_sounds({})) == places


def note_pages(monkeypatch: pytest.MonkeyPatch, report: Path) -> list[str]:
    """The page as it is when the end of the run begins to wait for its rest."""
    pages: list[str] = []

    def read_and_finish(page: ReportPage) -> None:
        pages.append(report.read_text(encoding="utf-8"))
        finish(page)

    finish = ReportPage.finish
    monkeypatch.setattr(ReportPage, "finish", read_and_finish)
    return pages


REPORTED = "--do_train --do_eval --max_steps 2 --save_steps 2 --report_clips 4"


def test_the_training_does_not_wait_for_pictures(
    train: Callable[..., dict[str, float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """With a process that never ends, the page is there at once, in the end with its sounds, and the
    run ends well."""
    report = tmp_path / "output" / "report.html"
    pages = note_pages(monkeypatch, report)
    monkeypatch.setattr(report_pictures, "start_child", hang)
    monkeypatch.setattr(report_pictures, "MAX_DRAWING_IN_SECONDS", 0.5)
    train(f"{REPORTED} --eval_steps 2")
    assert '"picture":""' in pages[0] and "@picture-" not in pages[0] and "@sound-" not in pages[0]
    page = report.read_text(encoding="utf-8")
    assert '"picture":""' in page and '"audio":"' in page and '"audio":""' not in page
    assert "@picture-" not in page and "@sound-" not in page
    assert "pictures could not be drawn: they took too long" in caplog.text
    assert not (tmp_path / "output" / "_report").exists()


def test_the_training_does_not_wait_for_sounds(
    train: Callable[..., dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """They are held back until the training is over."""
    is_over = threading.Event()
    readers: list[str] = []

    def fetch_late(*args: Any) -> dict[int, str]:
        assert is_over.wait(60)
        readers.append(threading.current_thread().name)
        return fetch(*args)

    def finish(page: ReportPage) -> None:
        is_over.set()
        original(page)

    fetch = report_sounds.fetch_sounds
    report = tmp_path / "output" / "report.html"
    pages = note_pages(monkeypatch, report)
    original = ReportPage.finish
    monkeypatch.setattr(report_sounds, "fetch_sounds", fetch_late)
    monkeypatch.setattr(ReportPage, "finish", finish)
    train(f"{REPORTED} --eval_steps 1")
    assert set(readers) == {"report sounds"}
    assert '"audio":""' in pages[0]
    page = report.read_text(encoding="utf-8")
    assert '"audio":""' not in page and '"picture":""' not in page
    assert "@picture-" not in page and "@sound-" not in page


def test_a_page_that_comes_while_another_is_drawn_takes_its_place(
    train: Callable[..., dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first drawing hangs; after the second evaluation it is ended, and all is drawn anew."""
    children: list[subprocess.Popen] = []

    def hang_once(*args: Any, **variables: str) -> subprocess.Popen:
        start = start_child if children else hang
        children.append(start(*args, **variables))
        return children[-1]

    def advance_when_read(page: ReportPage) -> None:
        page.reader.wait()
        advance(page)

    start_child = report_pictures.start_child
    advance = ReportPage.advance
    monkeypatch.setattr(report_pictures, "start_child", hang_once)
    monkeypatch.setattr(ReportPage, "advance", advance_when_read)
    train(f"{REPORTED} --eval_steps 1")
    assert len(children) == 2 and not is_running(children[0].pid)
    page = (tmp_path / "output" / "report.html").read_text(encoding="utf-8")
    assert '"audio":""' not in page and '"picture":""' not in page
    assert "@picture-" not in page and "@sound-" not in page


def test_no_thread_reads_while_the_worker_of_a_training_is_forked(
    train: Callable[..., dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is scored before a training has its sounds with the first evaluation in it."""
    alive: list[bool] = []
    roles: list[str] = []

    def begin(page: ReportPage, *args: Any, **how: Any) -> None:
        alive.append(page.reader.is_reading())
        on_train_begin(page, *args, **how)

    def start(reader: report_sounds.SoundReader, order: report_sounds.SoundOrder) -> None:
        roles.append(order.role)
        read(reader, order)

    on_train_begin = ReportPage.on_train_begin
    read = report_sounds.SoundReader.start
    monkeypatch.setattr(ReportPage, "on_train_begin", begin)
    monkeypatch.setattr(report_sounds.SoundReader, "start", start)
    train(f"{REPORTED} --eval_steps 2 --eval_before_training")
    assert alive == [False] and roles == ["eval"]
    page = (tmp_path / "output" / "report.html").read_text(encoding="utf-8")
    assert '"audio":"' in page and '"audio":""' not in page
