"""Parts of a recording, as the lists of long recordings name them."""

import contextlib
import io
import itertools
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import soundfile

from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.cells import AudioCell, is_missing, path_of, shown, undecoded_cell
from speech_finetuning.data.columns import SegmentColumns, SpeechColumns
from speech_finetuning.data.footers import is_damage
from speech_finetuning.data.guessing import cell_at

logger = logging.getLogger(__name__)

CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d\d?(?:[.,]\d+)?)")  # 1:02:03.5, 2:03,5
# 3,5 as much of Europe writes 3.5. "12,345" may be twelve thousand.
DECIMAL_COMMA = re.compile(r"\d+,(?:\d{1,2}|\d{4,})|0+,\d+")
NUM_ROWS_TO_INSPECT = 5
MIN_NUM_CUT_CLIPS = 2  # a single one may have wrong times

# Lists round their times; a segment may end this much after its recording does.
TOLERANCE_IN_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Where an utterance lies in its recording. duration_in_seconds: None: up to the end."""

    start_in_seconds: float
    duration_in_seconds: float | None = None

    def __str__(self) -> str:
        """As in ids of rows: '12.5-14.25', or '12.5-end'."""
        end = "end"
        if self.duration_in_seconds is not None:
            end = str(round(self.start_in_seconds + self.duration_in_seconds, 6))
        return f"{round(self.start_in_seconds, 6)}-{end}"

    def is_possible(self) -> bool:
        """In any recording, however long it may be."""
        is_empty = self.duration_in_seconds is not None and self.duration_in_seconds <= 0
        return self.start_in_seconds >= 0 and not is_empty

    def frames(self, num_frames: int, sampling_rate_in_hz: int) -> tuple[int, int]:
        """(first frame, frame after the last) in a recording of num_frames.

        Raises: Rejection(segment_outside_audio).
        """
        start = round(self.start_in_seconds * sampling_rate_in_hz)
        stop = num_frames
        if self.duration_in_seconds is not None:
            end_in_seconds = self.start_in_seconds + self.duration_in_seconds
            stop = round(end_in_seconds * sampling_rate_in_hz)
        tolerance = round(TOLERANCE_IN_SECONDS * sampling_rate_in_hz)
        if start < 0 or start >= num_frames or stop <= start or stop > num_frames + tolerance:
            seconds = num_frames / sampling_rate_in_hz
            raise Rejection(
                "segment_outside_audio",
                f"second {self} of a file of {seconds:.2f} s. If every file is one utterance, "
                "leave the columns with these times out of the list.",
            )
        return start, min(stop, num_frames)


# ---- the columns of a row ----
def segment_of(cells: Mapping[str, Any], columns: SegmentColumns | None) -> Segment | None:
    """Raises: ValueError for times that are no seconds."""
    if columns is None:
        return None
    start = seconds_of(cells, columns.start)
    end = seconds_of(cells, columns.end)
    duration = seconds_of(cells, columns.duration)
    start = start or 0.0
    if end is not None:
        duration = end - start
    if start == 0.0 and duration is None:
        return None
    return Segment(start_in_seconds=start, duration_in_seconds=duration)


def seconds_of(cells: Mapping[str, Any], column: str | None) -> float | None:
    value = cast(Any, None if column is None else cells.get(column))
    if is_missing(value):
        return None
    try:
        if isinstance(value, bool) or not math.isfinite(seconds := read_seconds(value)):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"{column}: expected seconds, as 12.5, or 0:12.5, found {shown(value)}"
        ) from None
    return seconds


def read_seconds(value: Any) -> float:
    """Of a number, or a text like '12.5', '3,5' or '1:02:03.5'. Raises: TypeError, ValueError."""
    if isinstance(value, str):
        text = value.strip()
        clock = CLOCK.fullmatch(text)
        if clock is not None:
            hours, minutes, seconds = clock.groups()
            return 3600 * int(hours or 0) + 60 * int(minutes) + float(seconds.replace(",", "."))
        if DECIMAL_COMMA.fullmatch(text) is not None:
            return float(text.replace(",", "."))
    return float(value)


# ---- what times mean ----
def times_are_of_recordings(
    rows: Iterable[Mapping[str, Any]], columns: SpeechColumns, place: str
) -> bool:
    """Whether the audio of rows with times is that of whole recordings, by the first rows.

    Else it was cut out of them at these times, as in GigaSpeech and AMI on the Hub. Where the rows
    do not tell, audio within the rows is taken for cut, a path for that of a recording.
    place: what the rows are of, in the log.
    """
    assert columns.segments is not None
    found = []
    has_bytes = False
    for row in itertools.islice(up_to_damage(rows), NUM_ROWS_TO_INSPECT):
        rate = row.get(columns.sampling_rate) if columns.sampling_rate else None
        with contextlib.suppress(ValueError, Rejection):  # said of the row when it is read
            cell = undecoded_cell(cell_at(row, columns.audio), rate)
            has_bytes |= isinstance(cell, dict) and cell["bytes"] is not None
            found.append((cell, segment_of(row, columns.segments)))
    answer = are_of_recordings(found)
    if answer is None:
        answer = not has_bytes
    meaning = "the utterances' times in recordings" if answer else "of clips that are cut already"
    logger.info("%s: the columns %s are %s.", place, ", ".join(columns.segments.names()), meaning)
    return answer


def up_to_damage(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows before those that a damaged file has lost, of which a rejection will tell."""
    try:
        yield from rows
    except Exception as error:
        if not is_damage(error):
            raise


def are_of_recordings(rows: Iterable[tuple[AudioCell, Segment | None]]) -> bool | None:
    """None: not clear, as none of the audio is in the row or a local file, or times fit both."""
    num_clips = 0
    num_recordings = 0
    for cell, segment in rows:
        seconds = None if segment is None else length_in_seconds(cell)
        if segment is None or seconds is None or segment.duration_in_seconds is None:
            continue
        end_in_seconds = segment.start_in_seconds + segment.duration_in_seconds
        is_within = end_in_seconds <= seconds + TOLERANCE_IN_SECONDS
        is_as_long = abs(segment.duration_in_seconds - seconds) <= TOLERANCE_IN_SECONDS
        num_recordings += is_within and not is_as_long
        num_clips += is_as_long and not is_within
    if num_recordings > num_clips:
        return True
    return False if num_clips >= MIN_NUM_CUT_CLIPS else None


def length_in_seconds(cell: AudioCell) -> float | None:
    """As the header says; None if it cannot be read, or lies on another machine."""
    data = cell.get("bytes") if isinstance(cell, dict) else None
    path = path_of(cell)
    try:
        if data is not None:
            return soundfile.info(io.BytesIO(data)).duration
        if path and os.path.isfile(path):
            return soundfile.info(path).duration
    except Exception:  # whatever a decoder raises, the row itself will say when it is read
        return None
    return None
