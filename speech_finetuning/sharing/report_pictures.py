"""The pictures of the report page, drawn beside the training: a GPU does not wait for them.

The page is there at once, without the new sounds and pictures; a process draws these, and replaces
the page when it has them all. The trainer waits for it at the end of the run only.
"""

import atexit
import contextlib
import json
import logging
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speech_finetuning.base.children import end_child, start_child
from speech_finetuning.base.files import printable, redacted, replace_text
from speech_finetuning.data.audio import HOP_LENGTH_IN_SAMPLES, SAMPLE_RATE_IN_HZ
from speech_finetuning.sharing.picture_process import FEATURES, ORDER, PICTURES

logger = logging.getLogger(__name__)

MAX_DRAWING_IN_SECONDS = 120.0  # 60 pictures take 10 s on an idle core


@dataclass(kw_only=True)
class PictureOrder:
    """What is to be drawn, and where it goes."""

    spectrograms: dict[str, np.ndarray]  # (n_mels, n_frames) by the word in the picture's place
    pages: dict[Path, str]  # texts with such words
    places: str  # a regular expression of all such words
    sounds: dict[str, str] = field(default_factory=dict)  # likewise, in base64
    curve: dict[str, Any] | None = None  # points, baseline, target

    def write(self, folder: Path) -> None:
        """For the process. Raises: OSError."""
        names = {place: str(number) for number, place in enumerate(self.spectrograms)}
        # Half precision has more levels than the colours of a picture.
        features: dict[str, Any] = {
            names[place]: values.astype(np.float16) for place, values in self.spectrograms.items()
        }
        np.savez(folder / FEATURES, **features)
        targets = {}
        for number, (target, text) in enumerate(self.pages.items()):
            targets[f"page-{number}.html"] = str(target.resolve())
            replace_text(folder / f"page-{number}.html", text)
        order = {
            "sample_rate_in_hz": SAMPLE_RATE_IN_HZ,
            "hop_length_in_samples": HOP_LENGTH_IN_SAMPLES,
            "spectrograms": names,
            "sounds": self.sounds,
            "places": self.places,
            "pages": targets,
            "curve": self.curve,
        }
        replace_text(folder / ORDER, json.dumps(order))


@dataclass(kw_only=True)
class Painter:
    """Has pictures drawn by a process of its own, one order at a time. Nothing that goes wrong there
    is more than a warning."""

    folder: Path  # for what is being drawn
    child: subprocess.Popen | None = field(default=None, repr=False)
    deadline: float = 0.0

    def __post_init__(self) -> None:
        atexit.register(self.cancel)

    def start(self, order: PictureOrder) -> None:
        """Has these drawn. Raises: OSError."""
        assert self.child is None
        shutil.rmtree(self.folder, ignore_errors=True)  # a start that was killed has left it
        self.folder.mkdir(parents=True)
        order.write(self.folder)
        self.child = start_child(
            "speech_finetuning.sharing.picture_process",
            [str(self.folder.resolve())],
            self.folder / "log",
            OMP_NUM_THREADS="1",
        )
        self.deadline = time.monotonic() + MAX_DRAWING_IN_SECONDS

    def is_finished(self) -> bool:
        """Whether there is something to collect without waiting for it."""
        return self.child is not None and self.child.poll() is not None

    def collect(self) -> dict[str, str] | None:
        """What has been drawn since `start`, by the words in the pictures' places; waits for it, but
        not beyond its deadline. None of what has failed."""
        if self.child is None:
            return {}
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(max(0.0, self.deadline - time.monotonic()))
        code = self.child.poll()
        pictures = self.drawn() if code == 0 else None
        if code != 0:
            reason = "they took too long" if code is None else self.last_words(code)
            logger.warning("report: pictures could not be drawn: %s", reason)
        self.cancel()
        return pictures

    def drawn(self) -> dict[str, str]:
        """None of an order without spectrograms."""
        with contextlib.suppress(OSError):
            return json.loads((self.folder / PICTURES).read_text(encoding="utf-8"))
        return {}

    def last_words(self, code: int) -> str:
        """The last line that the process wrote, as clean text."""
        text = ""
        with contextlib.suppress(OSError):
            text = (self.folder / "log").read_text(encoding="utf-8", errors="replace")
        lines = text.split("\n")
        said = [line.strip() for line in lines if line.strip()]
        last = said[-1] if said else f"their process ended with code {code}"
        return printable(redacted(last))[:300]

    def cancel(self) -> None:
        """Ends the process, if there is one, and removes what it has not put into its place."""
        if self.child is not None:
            end_child(self.child)
            self.child = None
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # the page that may be uploaded lies there
                self.folder.parent.rmdir()
