"""The sounds of a report, read beside a training."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from speech_finetuning.base.threads import FORK_LOCK
from speech_finetuning.sharing import report_sounds

CLIP = np.zeros(1600, np.float32)


def test_no_process_is_forked_while_a_row_is_read_but_between_two():
    """The lock is held while the source is at work, and free while a clip is encoded."""
    seen: list[bool] = []

    def rows() -> Iterator[tuple[Any, np.ndarray]]:
        for index in range(2):
            seen.append(FORK_LOCK.locked())
            yield SimpleNamespace(index=index), CLIP

    sounds: Any = Noting()
    report_sounds.add_sounds(sounds, rows())
    assert seen == [True, True] and sounds.were_locked == [False, False]
    assert set(sounds) == {0, 1}


class Noting(dict):
    """Notes whether the lock was held when a sound came in."""

    def __init__(self) -> None:
        super().__init__()
        self.were_locked: list[bool] = []

    def __setitem__(self, key: int, value: str) -> None:
        self.were_locked.append(FORK_LOCK.locked())
        super().__setitem__(key, value)


def test_a_file_that_breaks_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    rows = [SimpleNamespace(index=index, set_name="speech") for index in range(3)]
    files = {("speech", 0, number): [SimpleNamespace(row=row)] for number, row in enumerate(rows)}

    def read(dataset: Any, place: Any, wanted: Any, deadline: float) -> Iterator[Any]:
        if place[-1] == 1:
            raise FileNotFoundError("file 1 has vanished")
        yield wanted[0].row, CLIP

    monkeypatch.setattr(report_sounds, "places_in_files", lambda *_: files)
    monkeypatch.setattr(report_sounds, "read_rows", read)
    sources: Any = [SimpleNamespace(source=SimpleNamespace(record="speech"))]
    sounds = report_sounds.fetch_sounds(rows, None, sources)  # type: ignore[arg-type]
    assert set(sounds) == {0, 2}
    assert caplog.text.count("file 1 has vanished") == 1
    assert not FORK_LOCK.locked()
