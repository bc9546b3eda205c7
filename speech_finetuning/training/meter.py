"""How fast a training goes, and whether it waits for its data."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)

MAX_DATA_WAIT_FRACTION = 0.1  # of the time, before the log gives advice
SECONDS_WITHOUT_ADVICE = 30.0  # at the beginning, which waits for its first rows


@dataclass
class SpeedMeter:
    """What this rank has trained on since the last line of the log; scoring is not counted."""

    started_at: float | None = None  # on time.monotonic(), moved on by the time spent scoring
    waited_in_seconds: float = 0.0
    num_rows: int = 0
    audio_in_seconds: float = 0.0
    num_frames: int = 0  # of log-mel, without padding
    num_window_frames: int = 0  # with padding

    def add_wait(self, seconds: float) -> None:
        """Counts a wait for data. The first only starts the clock: the worker's start belongs to no
        figure."""
        if self.started_at is None:
            self.started_at = time.monotonic()
        else:
            self.waited_in_seconds += seconds

    def add_batch(
        self, *, num_rows: int, audio_in_seconds: float, frame_counts: list[int], window: int
    ) -> None:
        """Counts a micro-batch that is padded to a window of so many frames."""
        self.num_rows += num_rows
        self.audio_in_seconds += audio_in_seconds
        self.num_frames += sum(frame_counts)
        self.num_window_frames += len(frame_counts) * window

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time spent within."""
        began = time.monotonic()
        try:
            yield
        finally:
            if self.started_at is not None:
                self.started_at += time.monotonic() - began

    def elapsed_in_seconds(self) -> float:
        assert self.started_at is not None, "asked before the first batch"
        return time.monotonic() - self.started_at

    def figures(self, elapsed_in_seconds: float, accelerator: Any) -> dict[str, float]:
        """For the log: of all ranks together, but for the wait, as each waits for the slowest."""
        counts = (self.num_rows, self.audio_in_seconds, self.num_frames, self.num_window_frames)
        totals = torch.tensor([float(count) for count in counts], device=accelerator.device)
        num_rows, audio_in_seconds, num_frames, num_window_frames = accelerator.reduce(
            totals
        ).tolist()
        figures = {
            "data_wait_fraction": self.waited_in_seconds / elapsed_in_seconds,
            "padding_fraction": 1 - num_frames / num_window_frames,
            "samples_per_second": num_rows / elapsed_in_seconds,
            "audio_hours_per_hour": audio_in_seconds / elapsed_in_seconds,
        }
        return {name: round(value, 3) for name, value in figures.items()}


def advise_on_waiting(waited_fraction: float, num_threads: int, num_cores: int) -> None:
    """Warns of a training that waits for its data, and says what to raise."""
    if num_threads < num_cores:
        advice = "raise --num_decoding_threads"
    else:
        advice = "the network, disk or CPU is the limit"
    logger.warning(
        "%.0f %% of the time goes into waiting for data (%d threads, %d cores): %s.",
        100 * waited_fraction,
        num_threads,
        num_cores,
        advice,
    )
