"""What a pass reads in one go: whole files, or single row groups of parquet files."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import datasets
import numpy as np

from speech_finetuning.base.errors import one_line
from speech_finetuning.base.threads import stop
from speech_finetuning.data.positions import FIRST_ORDER_VERSION
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.shards import ShardReader, SourceRow

logger = logging.getLogger(__name__)

# Row groups on another machine that are read at the same time, unless they take more memory: each
# costs four requests, one after the other (benchmarks/data_pipeline.md has the seconds).
MAX_GROUPS_AHEAD = 8
MAX_BYTES_AHEAD = 128 * 2**20


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A file, or one row group of a parquet file.

    Of a row group: its index; the numbers of its first row in its file and in all files; the number
    of the last row that is selected in it.
    """

    place: tuple[int, int]
    row_group: int | None = None
    row_of_file: int = 0
    row_of_source: int | None = None
    last_row: int | None = None


def units_of(dataset: SpeechDataset, *, is_shuffled: bool) -> list[Unit]:
    """What a pass reads, in the order of the files: row groups where their order is to change, or
    where most of them can be left out."""
    source = dataset.source
    is_new = dataset.order_version > FIRST_ORDER_VERSION
    has_groups = is_new and is_shuffled or dataset.selection is not None
    if source.row_groups is None or not (has_groups or source.windows is not None):
        return [Unit(place=place) for place in source.shards()]
    mask = None if dataset.selection is None else dataset.selection.mask
    units = []
    row_of_source = 0
    for place, sizes in zip(source.shards(), source.row_groups, strict=True):
        row_of_file = 0
        if not sizes:  # damaged, which reading it will say, or empty
            units.append(Unit(place=place))
        for row_group, size in enumerate(sizes):
            rows = np.arange(size)
            if mask is not None:
                rows = np.flatnonzero(mask[row_of_source : row_of_source + size])
            if len(rows) > 0:
                units.append(
                    Unit(
                        place=place,
                        row_group=row_group,
                        row_of_file=row_of_file,
                        row_of_source=row_of_source,
                        last_row=int(rows[-1]),
                    )
                )
            row_of_file += size
            row_of_source += size
    return units


class RowGroupsAhead:
    """Row groups on another machine, read by threads before it is their turn: each costs several
    requests, and an answer takes as long as the way there and back.

    Threads try once. What they cannot read, for whatever reason, is left to the reader whose turn
    it is, which waits for the network and judges damage.
    """

    def __init__(
        self,
        units: list[Unit],
        reader: Callable[[int, int], ShardReader],
        *,
        num_ahead: int,
    ) -> None:
        """reader: of a unit, by its number and that of its first row."""
        self.units = units
        self.reader = reader
        self.num_ahead = num_ahead
        self.pool = ThreadPoolExecutor(num_ahead, thread_name_prefix="row-groups")
        self.pending: dict[int, Future[list[SourceRow]]] = {}
        self.first_rows: dict[int, int] = {}  # of those that are pending

    def take(self, unit_number: int, first_row: int) -> list[tuple[int, SourceRow]] | None:
        """(its number within the unit, row) of the unit whose turn it is, from `first_row` on; None
        if it could not be read. Those that follow are on their way afterwards."""
        self.begin(unit_number, first_row)
        for following in range(unit_number + 1, unit_number + self.num_ahead):
            self.begin(following, 0)
        if unit_number not in self.pending:
            return None
        try:
            rows = self.pending.pop(unit_number).result()
        except Exception as error:
            logger.debug("read ahead in vain: %s", one_line(error))
            return None
        numbered = enumerate(rows, self.first_rows.pop(unit_number))
        return [(number, row) for number, row in numbered if number >= first_row]

    def begin(self, unit_number: int, first_row: int) -> None:
        if unit_number in self.pending or unit_number >= len(self.units):
            return
        if self.units[unit_number].row_group is None:
            return
        reader = self.reader(unit_number, first_row)
        self.first_rows[unit_number] = first_row
        self.pending[unit_number] = self.pool.submit(reader.read_once)

    def close(self) -> None:
        stop(self.pool, self.pending.values())


def num_groups_ahead(dataset: SpeechDataset) -> int:
    """How many row groups are read at the same time; 1 where their files are on this machine."""
    if not dataset.source.is_remote:
        return 1
    largest = max(1, dataset.source.largest_row_group_in_bytes)
    return min(MAX_GROUPS_AHEAD, max(1, MAX_BYTES_AHEAD // largest))


class UnitReader:
    """The selected rows of a dataset's units."""

    def __init__(self, dataset: SpeechDataset, units: list[Unit]) -> None:
        self.dataset = dataset
        self.units = units
        self.num_files = len(dataset.source.shards())
        # Of the files whose row groups have been looked up.
        self.row_groups: dict[tuple[int, int], datasets.IterableDataset] = {}
        self.ahead: RowGroupsAhead | None = None
        num_ahead = num_groups_ahead(dataset)
        if num_ahead > 1:
            self.ahead = RowGroupsAhead(units, self.reader, num_ahead=num_ahead)

    def reader(self, unit_number: int, first_row: int) -> ShardReader:
        unit = self.units[unit_number]
        return ShardReader(
            self.dataset.source,
            unit.place,
            num_rows=first_row,
            wait_in_seconds=self.dataset.preprocessor.max_network_wait_in_seconds,
            row_group=unit.row_group,
            row_of_file=unit.row_of_file,
            row_groups=self.row_groups,
        )

    def all_rows(self, unit_number: int, first_row: int) -> Iterator[tuple[int, SourceRow]]:
        """(its number within the unit, row) of a unit, from `first_row` on."""
        if self.ahead is not None:
            rows = self.ahead.take(unit_number, first_row)
            if rows is not None:
                yield from rows
                return
        reader = self.reader(unit_number, first_row)
        for row in reader:
            yield reader.num_rows, row

    def rows(self, unit_number: int, first_row: int) -> Iterator[tuple[int, SourceRow]]:
        """The same, of the selected rows only."""
        unit = self.units[unit_number]
        selection = self.dataset.selection
        end = None
        if selection is not None and selection.mask is None:
            file = self.dataset.source.shards().index(unit.place)
            end = selection.num_rows_to_judge(file, self.num_files)
        for row_number, row in self.all_rows(unit_number, first_row):
            if end is not None and row_number >= end:
                return
            number = unit.row_of_source
            if number is not None:
                number += row_number
            if selection is None or selection.takes(number, row):
                yield row_number, row

    def close(self) -> None:
        """Nothing is read ahead any more."""
        if self.ahead is not None:
            self.ahead.close()
