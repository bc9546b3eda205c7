"""The undecoded rows of one file; after a network error, reading goes on at the same row."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets

from speech_finetuning.base.errors import one_line
from speech_finetuning.base.network import Backoff
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.audio import SAMPLE_RATE_IN_HZ
from speech_finetuning.data.cells import AudioCell, path_of, undecoded_cell
from speech_finetuning.data.columns import group_of
from speech_finetuning.data.footers import is_damage, rows_of_groups
from speech_finetuning.data.guessing import cell_at
from speech_finetuning.data.listed import CLIP, ListedClip, SpeechWindow
from speech_finetuning.data.parquet_windows import read_windows
from speech_finetuning.data.segments import Segment, segment_of
from speech_finetuning.data.sources import SpeechSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SourceRow:
    """One undecoded row.

    audio: an encoded file as {"bytes", "path"}, or the path of one.
    segment: the part of that file that the text belongs to; None: all of it.
    window: of several utterances that follow each other, where each is.
    speaker: who says it, where a list tells.
    rejection: why the row, or its file from here on, cannot be read.
    """

    id: str
    audio: AudioCell = None
    text: str | None = None
    segment: Segment | None = None
    window: SpeechWindow | None = None
    group: str | None = None  # of --group_column_name
    prompt: str | None = None  # of --prompt_column_name
    speaker: str | None = None
    rejection: Rejection | None = None

    def size_in_bytes(self) -> int:
        """Size of the encoded audio; 0 if it lies on another machine. Of a segment, which has its
        file in common with others, the size that it would have as a wav file at 16 kHz."""
        if self.segment is not None and self.segment.duration_in_seconds is not None:
            return round(2 * SAMPLE_RATE_IN_HZ * self.segment.duration_in_seconds)
        cell = self.audio if isinstance(self.audio, dict) else {"path": self.audio}
        data = cell.get("bytes")
        if data is not None:
            return len(data)
        path = cell.get("path") or ""
        with contextlib.suppress(OSError, ValueError):  # reading it will say why
            return os.path.getsize(path)
        return 0


class ShardReader:
    """The rows of one file of a source, or of one row group of it, without the first `num_rows`.

    Network errors are waited out and reading goes on at the same row. A file that is found damaged
    is read once more, if it comes over the network, and ends in one rejected row that says so.
    `num_rows` counts the rows before the one that was yielded last.

    row_group, row_of_file: its index, and the rows of the file before it; None: the whole file.
    row_groups: datasets by file, of which each shard is a row group; looked up as needed.
    """

    def __init__(
        self,
        source: SpeechSource,
        place: tuple[int, int],
        *,
        num_rows: int,
        wait_in_seconds: float,
        row_group: int | None = None,
        row_of_file: int = 0,
        row_groups: dict[tuple[int, int], datasets.IterableDataset] | None = None,
    ) -> None:
        self.source = source
        self.place = place
        self.num_rows = num_rows
        self.row_group = row_group
        self.row_of_file = row_of_file
        self.row_groups = {} if row_groups is None else row_groups
        self.has_empty_row_groups = False
        self.backoff = Backoff(wait_in_seconds)
        self.id = source.id_prefix + "/".join(map(str, place))

    def __iter__(self) -> Iterator[SourceRow]:
        num_rows_when_damaged = None
        while True:
            try:
                for number, row in self.numbered_rows():
                    self.backoff.reset()
                    yield self.source_row(row, number)
                    self.num_rows += 1
                return
            except Exception as error:
                task = f"reading {self.source.name} {self.id}"
                if not is_damage(error) and not self.is_gone(error):
                    self.backoff.wait(error, task)
                elif is_of_empty_row_group(error) and not self.has_empty_row_groups:
                    self.has_empty_row_groups = True
                elif self.source.is_remote and num_rows_when_damaged != self.num_rows:
                    logger.warning("%s: %s Reading it once more.", task, one_line(error)[:300])
                    num_rows_when_damaged = self.num_rows
                else:
                    yield self.damaged_row(error)
                    return

    def read_once(self) -> list[SourceRow]:
        """All rows that are left, in one go. Raises: whatever reading raises, which iteration would
        have waited out or turned into a rejection."""
        return [self.source_row(row, number) for number, row in self.numbered_rows()]

    def numbered_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number in the file, row) of the rows after the first `num_rows`. Of a window it is that
        of its first row."""
        if self.source.windows is None:
            yield from enumerate(self.rows_left(), self.row_of_file + self.num_rows)
            return
        num_windows_to_skip = self.num_rows
        row_of_file = 0  # the first one of a group
        for number, windows in enumerate(self.source.windows[self.number_of_file()]):
            is_read = self.row_group in (None, number)
            if is_read and num_windows_to_skip < len(windows):
                first_row = int(windows.first_rows[num_windows_to_skip])
                rows = iter(self.group(number).skip(first_row))
                columns = self.source.columns
                for row_of_group, row in read_windows(rows, windows, num_windows_to_skip, columns):
                    yield row_of_file + row_of_group, row
            if is_read:
                num_windows_to_skip = max(0, num_windows_to_skip - len(windows))
            row_of_file += windows.num_rows

    def is_gone(self, error: Exception) -> bool:
        """Whether a file that is on this machine was there when the run began, and can no longer be
        opened."""
        return not self.source.is_remote and isinstance(error, FileNotFoundError | PermissionError)

    def rows_left(self) -> Iterator[dict[str, Any]]:
        """The rows after the first `num_rows`: from a parquet file only the row groups that contain
        them are read, other files are read from their beginning."""
        if self.row_group is not None:
            yield from self.group(self.row_group).skip(self.num_rows)
            return
        shard = self.source.open_shard(*self.place)
        num_rows_to_skip = self.num_rows
        is_read_whole = num_rows_to_skip == 0 and not self.has_empty_row_groups
        if self.source.kind != "parquet" or is_read_whole:
            yield from shard.skip(num_rows_to_skip)
            return
        sizes = rows_of_groups(self.source.url(*self.place))
        groups = shard.reshard()  # one shard for each row group
        for number, size in enumerate(sizes):
            if num_rows_to_skip < size:
                group = groups.shard(num_shards=len(sizes), index=number)
                yield from group.skip(num_rows_to_skip)
            num_rows_to_skip = max(0, num_rows_to_skip - size)

    def shards_of_groups(self) -> datasets.IterableDataset:
        """The file's dataset, whose shards are its row groups."""
        if self.place not in self.row_groups:
            self.row_groups[self.place] = self.source.open_shard(*self.place).reshard()
        return self.row_groups[self.place]

    def group(self, number: int) -> datasets.IterableDataset:
        """The rows of one row group of the file."""
        return self.shards_of_groups().shard(num_shards=len(self.group_sizes()), index=number)

    def group_sizes(self) -> tuple[int, ...]:
        """Rows of each row group of the file."""
        assert self.source.row_groups is not None
        return self.source.row_groups[self.number_of_file()]

    def number_of_file(self) -> int:
        return self.source.shards().index(self.place)

    def damaged_row(self, error: Exception) -> SourceRow:
        """Stands for the rest of the file, or of its row group. Its id ends in the file's name,
        where it is known."""
        row_id = self.id
        num_rows = 1
        if self.row_group is not None:
            sizes = self.group_sizes()
            row_id += f"/{self.source.url(*self.place).rpartition('/')[2]}"
            if len(sizes) > 1:
                row_id += f"#row-group-{self.row_group}"
            num_rows = max(1, sizes[self.row_group] - self.num_rows)
        elif self.source.kind == "parquet":
            url = self.source.url(*self.place)
            row_id = f"{self.id}/{url.rpartition('/')[2]}"
            with contextlib.suppress(Exception):  # the count is not worth a run
                num_rows = max(1, sum(rows_of_groups(url)) - self.num_rows)
        rejection = Rejection("file_damaged", one_line(error)[:200], row_id, num_rows)
        return SourceRow(id=row_id, rejection=rejection)

    def source_row(self, row: dict[str, Any], number: int) -> SourceRow:
        """The row as it will be prepared; whatever its cells hold, it is a row.
        number: of it in the file."""
        if CLIP in row:
            return self.listed_row(row[CLIP])
        columns = self.source.columns
        text = None if columns.text is None else cell_at(row, columns.text)
        prompt = None if columns.prompt is None else cell_at(row, columns.prompt)
        sampling_rate = row.get(columns.sampling_rate) if columns.sampling_rate else None
        row_id = f"{self.id}/"
        try:
            audio = undecoded_cell(cell_at(row, columns.audio), sampling_rate)
            row_id += path_of(audio) or f"row-{number}"
            segment = segment_of(row, columns.segments)
            if segment is not None:
                row_id += f"#{segment}"
            audio = self.source.own_audio(audio, self.place)
            return SourceRow(
                id=row_id,
                audio=audio,
                text=text,
                segment=segment,
                group=name_at(row, columns.group),
                prompt=prompt,
                speaker=name_at(row, columns.speaker),
            )
        except ValueError as error:
            return rejected_row(row_id, Rejection("row_unreadable", str(error)))
        except Rejection as rejection:
            return rejected_row(row_id, rejection)

    def listed_row(self, clip: ListedClip) -> SourceRow:
        if clip.problem is not None:
            problem = Rejection("row_unreadable", clip.problem)
            return rejected_row(f"{self.id}/{clip.place}", problem)
        row_id = f"{self.id}/{path_of(clip.audio) or clip.place}"
        if clip.segment is not None:
            row_id += f"#{clip.segment}"
        try:
            audio = self.source.own_audio(clip.audio, self.place)
        except Rejection as rejection:
            return rejected_row(row_id, rejection)
        return SourceRow(
            id=row_id,
            audio=audio,
            text=clip.text,
            segment=clip.segment,
            window=clip.window,
            group=clip.group,
            prompt=clip.prompt,
            speaker=clip.speaker,
        )


def name_at(row: dict[str, Any], column: str | None) -> str | None:
    """The name of a speaker or group in a row; None if nothing names one."""
    return None if column is None else group_of(cell_at(row, column))


def rejected_row(row_id: str, rejection: Rejection) -> SourceRow:
    named = Rejection(rejection.reason, rejection.detail, row_id)
    return SourceRow(id=row_id, rejection=named)


def is_of_empty_row_group(error: Exception) -> bool:
    """Whether `datasets` (5.0, parquet.py:206) stumbles over a first row group without rows, as
    pyarrow writes of an empty table. Read group by group, the empty ones are left out."""
    return "BatchSize must be greater than 0" in str(error)
