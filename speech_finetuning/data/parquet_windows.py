"""Neighbours of one recording in a parquet file: which rows of each row group share a window.

That is decided when the data are opened, by the columns of texts, times and paths alone, so that
windows are counted and numbered as rows are, and none is read to find the place of another. A row
group is read in one go, and in any order: no window goes on from one into the next.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet

from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.cells import AudioCell, path_of, undecoded_cell
from speech_finetuning.data.columns import SpeechColumns, group_of
from speech_finetuning.data.footers import is_damage
from speech_finetuning.data.guessing import cell_at
from speech_finetuning.data.listed import CLIP, ListedClip, WindowLimits, join_neighbours, joined
from speech_finetuning.data.segments import segment_of

OUTSIDE = "outside://"


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupWindows:
    """What of one row group is read together: rows that stand next to each other.

    first_rows: (num_windows + 1,) number in the group of each window's first row, and of its end.
    cuts_in_seconds: of the windows that cut an utterance off, where it begins in them.
    """

    first_rows: np.ndarray
    cuts_in_seconds: dict[int, float]
    limits: WindowLimits

    def __len__(self) -> int:
        return len(self.first_rows) - 1

    @property
    def num_rows(self) -> int:
        return int(self.first_rows[-1])


FileWindows = tuple[GroupWindows, ...]  # of each row group of a file


# ---- which rows share a window ----
def find_windows(
    url: str,
    sizes: Sequence[int],
    columns: SpeechColumns,
    limits: WindowLimits,
    own_audio: Callable[[AudioCell], AudioCell],
) -> FileWindows:
    """Of a parquet file. sizes: rows of its row groups; own_audio: what a row's audio is in its
    data set, see `SpeechSource`. Rows of a group that is damaged stay single: reading it will say
    so. Raises: errors of the network."""
    found: list[GroupWindows] = []
    try:
        with fsspec.open(url, "rb") as file:
            parquet = pyarrow.parquet.ParquetFile(file)
            for group in range(len(sizes)):
                found.append(windows_of_group(parquet, group, columns, limits, own_audio))
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if not is_damage(error):
            raise
    return (*found, *(single_rows(size, limits) for size in sizes[len(found) :]))


def single_rows(num_rows: int, limits: WindowLimits) -> GroupWindows:
    return GroupWindows(first_rows=np.arange(num_rows + 1), cuts_in_seconds={}, limits=limits)


def windows_of_group(
    parquet: pyarrow.parquet.ParquetFile,
    group: int,
    columns: SpeechColumns,
    limits: WindowLimits,
    own_audio: Callable[[AudioCell], AudioCell],
) -> GroupWindows:
    num_rows = parquet.metadata.row_group(group).num_rows
    path = column_of_paths(parquet, columns.audio)
    if path is None or columns.text is None or columns.segments is None:
        return single_rows(num_rows, limits)
    table = parquet.read_row_group(group, columns=[path, columns.text, *columns.segments.names()])
    clips = (
        clip_to_join(row, number, columns, limits, own_audio)
        for number, row in enumerate(table.to_pylist())
    )
    first_rows = []
    cuts = {}
    for clip in join_neighbours(clips, limits):
        if clip.window is not None and clip.window.cut_in_seconds is not None:
            cuts[len(first_rows)] = clip.window.cut_in_seconds
        first_rows.append(int(clip.place))
    return GroupWindows(
        first_rows=np.array([*first_rows, num_rows]), cuts_in_seconds=cuts, limits=limits
    )


def column_of_paths(parquet: pyarrow.parquet.ParquetFile, audio: str) -> str | None:
    """The column that names a row's recording, if it does; never one of encoded audio, which would
    be read for that."""
    for number in range(parquet.metadata.num_columns):
        column = parquet.schema.column(number)
        is_text = column.logical_type.type == "STRING"
        if is_text and column.path in (audio, f"{audio}.path"):
            return column.path
    return None


def clip_to_join(
    row: dict[str, Any],
    number: int,
    columns: SpeechColumns,
    limits: WindowLimits,
    own_audio: Callable[[AudioCell], AudioCell],
) -> ListedClip:
    """place: its number in the row group. One that is to stay single has a problem."""
    place = str(number)
    try:
        clip = clip_of_row(row, columns, place)
        path = path_of(clip.audio)
        if not path or f"{path}#{clip.segment}" in limits.excluded_clips:
            return ListedClip(place=place, problem="names no recording, or is left out")
        return replace(clip, audio=name_of_recording(path, own_audio))
    except (ValueError, Rejection) as error:
        return ListedClip(place=place, problem=str(error))


def name_of_recording(path: str, own_audio: Callable[[AudioCell], AudioCell]) -> str:
    """The path in the row's data set. One that leads out of it is no file that is looked at, but
    tells recordings apart where the rows hold them."""
    try:
        return path_of(own_audio(path))
    except Rejection:
        return f"{OUTSIDE}{path}"


def clip_of_row(row: dict[str, Any], columns: SpeechColumns, place: str = "") -> ListedClip:
    """Raises: ValueError, Rejection."""
    text = None if columns.text is None else cell_at(row, columns.text)
    cell = undecoded_cell(cell_at(row, columns.audio))
    if isinstance(cell, dict) and cell["bytes"] is None:
        cell = cell["path"]  # of a file, of which only the segment is read
    return ListedClip(
        place=place,
        audio=cell,
        text=text if isinstance(text, str) else None,
        segment=segment_of(row, columns.segments),
        group=None if columns.group is None else group_of(cell_at(row, columns.group)),
        prompt=None if columns.prompt is None else cell_at(row, columns.prompt),
    )


# ---- their rows ----
def read_windows(
    rows: Iterator[dict[str, Any]], windows: GroupWindows, first: int, columns: SpeechColumns
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of its first row in the group, row as it is or {CLIP: window}) of a row group, from
    the window `first` on. rows: of the group, from that window's first row on."""
    for number in range(first, len(windows)):
        first_row, end = map(int, windows.first_rows[number : number + 2])
        members = list(itertools.islice(rows, end - first_row))
        cut = windows.cuts_in_seconds.get(number)
        if len(members) == 1 and cut is None:
            yield first_row, members[0]
        elif members:
            yield first_row, {CLIP: window_of(members, cut, columns, windows.limits)}


def window_of(
    rows: list[dict[str, Any]],
    cut_in_seconds: float | None,
    columns: SpeechColumns,
    limits: WindowLimits,
) -> ListedClip:
    """The rows of one window as one clip."""
    clips = [clip_of_row(row, columns) for row in rows]
    first = clips[0]
    if any(clip.audio != first.audio for clip in clips):
        path = path_of(first.audio)
        problem = f"{path}: {len(clips)} rows in turn hold different audio under this name"
        return ListedClip(place=f"{path}#{first.segment}", problem=problem)
    (window,) = joined(clips, cut_in_seconds, limits)
    return window
