"""One pass over one source: its rows in the order of reading, cut into blocks.

The order depends on the form of the data, as `positions` describes: rows that are only paths are
permuted one by one, row groups of parquet files as a whole, and of other files, which can only be
read from their beginning, several are read in turn.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import counted
from speech_finetuning.data.positions import FIRST_BLOCK, FIRST_ORDER_VERSION, BlockStart
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.row_table import RowTable, table_of
from speech_finetuning.data.shards import SourceRow
from speech_finetuning.data.units import Unit, UnitReader, units_of

# Bounds the memory of a shuffle block, whatever the size of its rows.
MAX_BLOCK_IN_BYTES = 512 * 2**20
# A block is made of at least so many row groups of parquet files, so that speakers mix whose rows
# lie side by side, unless they take more than this: the first batch waits for a whole block.
ROW_GROUPS_PER_BLOCK = 8
MAX_MIXED_BYTES = 128 * 2**20
MAX_MIXED_ROWS = 20_000
# Files that are read in turn, if they can only be read from their beginning. A run that continues
# reads this many of them up to its place (benchmarks/shuffle_mixing.md).
NUM_LANES = 4
MAX_EMPTY_PASSES = 1_000


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """Which rows of the stream are this rank's. Either the ranks share one order, whose
    micro-batches go round among them; or each has files, and so an order, of its own."""

    rank: int = 0
    world_size: int = 1
    is_sharded_by_rank: bool = False

    def part(self, units: Any) -> Any:
        """The files, row groups or rows that this rank reads, of all in the order of a pass."""
        if self.is_sharded_by_rank:
            return units[self.rank :: self.world_size]
        return units

    def has_turn(self, micro_batch: int) -> bool:
        """Whether the n-th micro-batch of the order that this rank reads is its own."""
        return self.is_sharded_by_rank or micro_batch % self.world_size == self.rank

    def max_empty_passes(self) -> int:
        """Passes without a row in this rank's files before it gives up: where it has only some of
        the files, they may be empty ones for a while."""
        return MAX_EMPTY_PASSES if self.is_sharded_by_rank else 0

    def rows_per_round(self, micro_batch_size: int) -> int:
        """Rows of one order that are trained on at the same time."""
        if self.is_sharded_by_rank:
            return micro_batch_size
        return micro_batch_size * self.world_size


ONE_RANK = RankShare()


@dataclass
class Block:
    """Rows that are permuted together."""

    start: BlockStart
    rows: list[SourceRow] = field(default_factory=list)
    size_in_bytes: int = 0  # of the encoded audio in memory

    def add(self, row: SourceRow) -> None:
        self.rows.append(row)
        if isinstance(row.audio, dict):
            self.size_in_bytes += len(row.audio.get("bytes") or b"")

    def is_full(self, block_size: int) -> bool:
        """At block_size rows or 512 MB, whichever comes first, so that memory is bounded."""
        return len(self.rows) >= block_size or self.size_in_bytes >= MAX_BLOCK_IN_BYTES

    def is_full_of_groups(self, block_size: int, num_groups: int, *, is_end_of_group: bool) -> bool:
        """The same of a block of row groups, which are not torn apart unless they are huge.
        num_groups: that have rows in the block."""
        if self.size_in_bytes >= MAX_BLOCK_IN_BYTES:
            return True
        if len(self.rows) >= max(block_size, MAX_MIXED_ROWS):
            return True
        is_mixed = num_groups >= ROW_GROUPS_PER_BLOCK or self.size_in_bytes >= MAX_MIXED_BYTES
        return is_end_of_group and is_mixed and len(self.rows) >= block_size


def permuted(units: list, seed: int | None, pass_number: int) -> list:
    """In the order of this pass, a pure function of its arguments. seed: None keeps the order."""
    if seed is None:
        return units
    permutation = np.random.default_rng([seed, pass_number]).permutation(len(units))
    return [units[i] for i in permutation]


@dataclass
class Lane:
    """One of the units that are read in turn."""

    unit: int
    rows: Iterator[tuple[int, SourceRow]]
    head: tuple[int, SourceRow] | None = None  # the next row, if it has been looked at

    def next_row(self) -> tuple[int, SourceRow] | None:
        """(its number within the unit, row); None at the end."""
        head = self.head if self.head is not None else next(self.rows, None)
        self.head = None
        return head


class LaneReader:
    """The rows of units that are read in turn, a row of each, num_lanes at a time. When one ends,
    the next one takes its place."""

    def __init__(
        self, reader: UnitReader, places: list[tuple[int, int]], next_unit: int, num_lanes: int
    ) -> None:
        self.reader = reader
        self.next_unit = next_unit
        self.num_lanes = num_lanes
        self.lanes = [
            Lane(unit=unit, rows=reader.rows(unit, row))
            for unit, row in places
            if unit < len(reader.units)  # the data may have become smaller
        ]
        self.turn = 0

    def open_next(self) -> Lane | None:
        """None if all units have been opened."""
        if self.next_unit >= len(self.reader.units):
            return None
        self.next_unit += 1
        return Lane(unit=self.next_unit - 1, rows=self.reader.rows(self.next_unit - 1, 0))

    def begin_block(self) -> None:
        """The first lane has its turn, and each knows its next row: a run that continues here takes
        the same turns. At the end there are no lanes left."""
        self.turn = 0
        while len(self.lanes) < self.num_lanes and (lane := self.open_next()) is not None:
            self.lanes.append(lane)
        place = 0
        while place < len(self.lanes):
            lane = self.lanes[place]
            lane.head = lane.next_row()
            if lane.head is None:
                self.replace(lane, self.open_next())
            else:
                place += 1

    def replace(self, lane: Lane, following: Lane | None) -> None:
        place = self.lanes.index(lane)
        self.lanes[place : place + 1] = [] if following is None else [following]

    def take(self) -> tuple[int, int, SourceRow] | None:
        """(unit, number within it, row) of the lane whose turn it is; None at the end."""
        while self.lanes:
            self.turn %= len(self.lanes)
            lane = self.lanes[self.turn]
            head = lane.next_row()
            if head is not None:
                self.turn += 1
                return lane.unit, *head
            self.replace(lane, self.open_next())
        return None

    def places(self) -> tuple[tuple[int, int], ...]:
        """(unit, number of its next row) of each lane, right after `begin_block`."""
        return tuple((lane.unit, lane.head[0]) for lane in self.lanes if lane.head is not None)


# ---- a pass ----
def blocks_of_table(
    dataset: SpeechDataset,
    table: RowTable,
    *,
    block_size: int,
    seed: int | None,
    start: BlockStart,
    share: RankShare,
) -> Iterator[Block]:
    """As `read_pass`. `rows_before` of a block is its place in the permutation."""
    numbers = np.arange(len(table))
    selection = dataset.selection
    if selection is not None and selection.mask is not None:
        if selection.hold_out is not None and len(selection.mask) != len(table):
            raise UserError(
                f"{dataset.source.name} has changed since this run opened it: "
                f"{counted(len(table), 'row')}, "
                f"were {len(selection.mask)}. Start the same command again."
            )
        numbers = np.flatnonzero(selection.mask[: len(table)])
    if seed is not None:
        numbers = np.random.default_rng([seed, start.pass_number]).permutation(numbers)
    numbers = share.part(numbers)
    block_number = start.block
    place = start.rows_before
    while place < len(numbers):
        block = Block(
            BlockStart(
                pass_number=start.pass_number,
                block=block_number,
                rows_before=place,
                shard_row=place,
            )
        )
        while place < len(numbers) and not block.is_full(block_size):
            block.add(table.row(numbers[place]))
            place += 1
        yield block
        block_number += 1


def read_pass(
    dataset: SpeechDataset,
    *,
    block_size: int,
    seed: int | None = None,
    start: BlockStart = FIRST_BLOCK,
    share: RankShare = ONE_RANK,
    table: RowTable | None = None,
) -> Iterator[Block]:
    """The blocks of one pass from `start` on; nothing that comes before it is read.

    seed: of the order; None keeps that of the files, as does max_rows in the first version of the
    order, where it meant the first rows, which must be the same ones in every pass.
    table: of the rows of this dataset, see `table_of`; if it is needed and not given, it is read.
    """
    is_new = dataset.order_version > FIRST_ORDER_VERSION
    if dataset.max_rows is not None and not is_new:
        seed = None
    if table is None and dataset.selection is not None and dataset.source.has_rows_of_paths:
        table = table_of(dataset)
    if table is not None:
        yield from blocks_of_table(
            dataset, table, block_size=block_size, seed=seed, start=start, share=share
        )
        return
    units = units_of(dataset, is_shuffled=seed is not None)
    units = share.part(permuted(units, seed, start.pass_number))
    num_lanes = 1
    if is_new and seed is not None and dataset.source.row_groups is None:
        num_lanes = NUM_LANES
    yield from blocks_of_units(
        dataset, units, block_size=block_size, start=start, num_lanes=num_lanes
    )


def blocks_of_units(
    dataset: SpeechDataset,
    units: list[Unit],
    *,
    block_size: int,
    start: BlockStart,
    num_lanes: int,
) -> Iterator[Block]:
    """As `read_pass`, of units in the order of the pass."""
    places = list(start.lanes)
    next_unit = start.shard
    if num_lanes == 1:
        places = [(start.shard, start.shard_row)]
        next_unit = start.shard + 1
    with contextlib.closing(UnitReader(dataset, units)) as unit_reader:
        reader = LaneReader(unit_reader, places, next_unit, num_lanes)
        yield from blocks_of_lanes(reader, dataset, block_size=block_size, start=start)


def blocks_of_lanes(
    reader: LaneReader, dataset: SpeechDataset, *, block_size: int, start: BlockStart
) -> Iterator[Block]:
    """The rest of a pass from `start` on."""
    left = max_rows_left(dataset, start)
    block_number = start.block
    num_rows = start.rows_before
    reader.begin_block()
    while reader.lanes and left > 0:
        block = Block(start_at(reader, start.pass_number, block_number, num_rows))
        fill(block, reader, block_size, left)
        num_rows += len(block.rows)
        left -= len(block.rows)
        yield block
        block_number += 1
        reader.begin_block()


def fill(block: Block, reader: LaneReader, block_size: int, left: float) -> None:
    """Reads the rows of a block. left: rows of the pass that are left at most."""
    groups: set[int] = set()
    while len(block.rows) < left and (taken := reader.take()) is not None:
        number, row_number, row = taken
        block.add(row)
        unit = reader.reader.units[number]
        if unit.row_group is None:
            is_full = block.is_full(block_size)
        else:
            groups.add(number)
            is_full = block.is_full_of_groups(
                block_size, len(groups), is_end_of_group=row_number == unit.last_row
            )
        if is_full:
            return


def max_rows_left(dataset: SpeechDataset, start: BlockStart) -> float:
    """Rows of this pass from `start` on, where they are the first ones."""
    if dataset.order_version > FIRST_ORDER_VERSION:
        selection = dataset.selection
        if selection is None or selection.max_rows is None or not selection.is_held_out:
            return float("inf")
        return selection.max_rows
    if dataset.max_rows is None:
        return float("inf")
    return dataset.max_rows - start.rows_before


def start_at(reader: LaneReader, pass_number: int, block_number: int, num_rows: int) -> BlockStart:
    """Where the reader is now."""
    places = reader.places()
    shard = reader.next_unit
    shard_row = 0
    if reader.num_lanes == 1:
        ((shard, shard_row),) = places
        places = ()
    return BlockStart(
        pass_number=pass_number,
        block=block_number,
        rows_before=num_rows,
        shard=shard,
        shard_row=shard_row,
        lanes=places,
    )
