"""One exact order of rows: blocks, shuffling, mixing, ranks.

How a row comes to its turn, from the inside out:

    read_pass      one pass over one source, file by file, cut into blocks
    blocks         pass after pass over one source, without end
    source_rows    the rows of each block, permuted
    rows           the sources mixed by weight, and of the mix those that are this rank's turn
    __iter__       each row prepared, by threads, in the same order

Each knows the position after the row that it yields (see `positions`), and can begin at any.
"""

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from torch.utils.data import IterableDataset

from speech_finetuning.base.errors import UserError, portable
from speech_finetuning.base.rejections import Rejection, describe_counts
from speech_finetuning.base.threads import map_in_order, read_ahead
from speech_finetuning.data.items import StreamItem
from speech_finetuning.data.positions import (
    FIRST_BLOCK,
    BlockStart,
    RowOrder,
    SourcePosition,
    StreamPosition,
)
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.shards import ShardReader, SourceRow
from speech_finetuning.data.sources import SpeechSource

logger = logging.getLogger(__name__)

MAX_BLOCK_IN_BYTES = 512 * 2**20  # bounds a shuffle block's memory, whatever the rows' size
DRAWS_PER_CHUNK = 1_000  # of sources of a mix; another number would be another order of rows
# Of speed perturbation (Ko et al., Interspeech 2015).
MIN_SPEED = 0.9
MAX_SPEED = 1.1
MAX_EMPTY_PASSES = 1_000


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """Which rows of the stream are this rank's. Either the ranks share one order, whose
    micro-batches go round among them; or each has files, and so an order, of its own."""

    rank: int = 0
    world_size: int = 1
    is_sharded_by_rank: bool = False

    def shards(self, shards: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The files that this rank reads, of all files in the order of a pass."""
        if self.is_sharded_by_rank:
            return shards[self.rank :: self.world_size]
        return shards

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


@dataclass(frozen=True, kw_only=True)
class DrawnRow:
    """A row that is about to be prepared."""

    source: int  # its index in the mix
    row: SourceRow
    speed: float  # at which it is played


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
        """At block_size rows or MAX_BLOCK_IN_BYTES, whichever comes first."""
        return len(self.rows) >= block_size or self.size_in_bytes >= MAX_BLOCK_IN_BYTES


def shard_order(source: SpeechSource, seed: int | None, pass_number: int) -> list[tuple[int, int]]:
    """The files of a source in the order of this pass, a pure function of its arguments.
    seed: None keeps their order."""
    shards = source.shards()
    if seed is None:
        return shards
    permutation = np.random.default_rng([seed, pass_number]).permutation(len(shards))
    return [shards[i] for i in permutation]


def read_pass(
    dataset: SpeechDataset,
    *,
    block_size: int,
    seed: int | None = None,
    start: BlockStart = FIRST_BLOCK,
    share: RankShare = ONE_RANK,
) -> Iterator[Block]:
    """The blocks of one pass from `start` on; no file before the one of `start` is opened.
    seed: of the order of files. None keeps it, as does max_rows, which must mean the same rows in
    every pass."""
    if dataset.max_rows is not None:
        seed = None
    shards = share.shards(shard_order(dataset.source, seed, start.pass_number))
    rows = rows_of_shards(dataset, shards, start)
    if dataset.max_rows is not None:
        rows = itertools.islice(rows, max(0, dataset.max_rows - start.rows_before))
    block = None
    block_number = start.block
    num_rows = start.rows_before
    for shard, shard_row, row in rows:
        if block is None:
            block_start = BlockStart(
                pass_number=start.pass_number,
                block=block_number,
                rows_before=num_rows,
                shard=shard,
                shard_row=shard_row,
            )
            block = Block(block_start)
        block.add(row)
        num_rows += 1
        if block.is_full(block_size):
            yield block
            block = None
            block_number += 1
    if block is not None:
        yield block


def rows_of_shards(
    dataset: SpeechDataset, shards: list[tuple[int, int]], start: BlockStart
) -> Iterator[tuple[int, int, SourceRow]]:
    """(index of the file in `shards`, row within the file, row) of all rows from `start` on."""
    for shard in range(start.shard, len(shards)):
        first_row = start.shard_row if shard == start.shard else 0
        wait_in_seconds = dataset.preprocessor.max_network_wait_in_seconds
        reader = ShardReader(
            dataset.source, shards[shard], num_rows=first_row, wait_in_seconds=wait_in_seconds
        )
        for row in reader:
            yield shard, reader.num_rows, row


def group_by_length(
    order: list[int],
    *,
    sizes: list[int],
    rows_before: int,
    group_size: int,
    seed: list[int],
) -> list[int]:
    """The order with clips of like size side by side, in groups that are shuffled as a whole: a
    batch of short clips needs a short window.

    order: indices of the block's rows; sizes: of each row's audio, in bytes; rows_before: rows of
    the source before this block: what they have begun of a group is filled up first."""
    begun = -rows_before % group_size
    ranked = sorted(order[begun:], key=lambda i: sizes[i])  # stable: equal sizes stay shuffled
    groups = [ranked[i : i + group_size] for i in range(0, len(ranked), group_size)]
    incomplete = []
    if groups and len(groups[-1]) < group_size:
        incomplete = groups.pop()
    np.random.default_rng(seed).shuffle(groups)
    return [*order[:begun], *itertools.chain(*groups), *incomplete]


def can_shard_by_rank(sets: Iterable[SpeechDataset], world_size: int) -> bool:
    """Whether every rank can have files of its own: each source has enough, and is used whole."""
    return world_size > 1 and all(
        dataset.max_rows is None and len(dataset.source.shards()) >= world_size for dataset in sets
    )


def draw_source(row_number: int, weights: tuple[float, ...], seed: int) -> int:
    """The index of the source that the n-th row of a mix comes from."""
    if len(weights) == 1:
        return 0
    chunk, place_in_chunk = divmod(row_number, DRAWS_PER_CHUNK)
    return int(draw_sources(chunk, weights, seed)[place_in_chunk])


@functools.lru_cache(maxsize=2)
def draw_sources(chunk: int, weights: tuple[float, ...], seed: int) -> np.ndarray:
    """Sources of the rows chunk * DRAWS_PER_CHUNK and following, (DRAWS_PER_CHUNK,) int."""
    probabilities = np.array(weights) / sum(weights)
    generator = np.random.default_rng([seed, len(weights), chunk])
    return generator.choice(len(weights), DRAWS_PER_CHUNK, p=probabilities)


@dataclass(eq=False, kw_only=True)
class SpeechStream(IterableDataset):
    """Endless passes over each source, block-shuffled; a seeded draw by weight mixes them to one
    global order, which goes to the ranks by micro-batch and is prepared by threads. If the files
    are sharded by rank, each rank has such an order of its own, of every world_size-th file of each
    pass.

    The order is a pure function of (seed, pass, sources), and then of the rank, whatever the
    threads, workers and timing. Pickles; runs in one DataLoader worker. Errors come as items."""

    sets: tuple[SpeechDataset, ...]
    seed: int
    block_size: int  # rows that are shuffled together; 1: the order of the files
    micro_batch_size: int
    num_threads: int
    share: RankShare = ONE_RANK
    position: StreamPosition | None = None  # None: the beginning
    is_grouped_by_length: bool = False  # clips of like length in one batch
    speed_perturbation: bool = False  # each row at a speed of its own

    def __iter__(self) -> Iterator[StreamItem]:
        outcomes = PassOutcomes(self.sets, self.begin())
        try:
            for position, result in map_in_order(self.prepare, self.rows(), self.num_threads):
                if self.share.world_size == 1:  # else a pass has rows that are other ranks'
                    outcomes.count(position, result)
                if isinstance(result, Rejection):
                    yield StreamItem(position=position, rejection=result)
                else:
                    yield StreamItem(position=position, example=result)
        except Exception as error:
            yield StreamItem(position=None, error=portable(error))

    def __post_init__(self) -> None:
        begin = self.begin()
        is_within_a_pass = any(source.offset > 0 for source in begin.sources)
        if begin.order not in (None, self.order()) and is_within_a_pass:
            logger.warning(
                "--seed, --data_seed, --shuffle_buffer_size, --max_train_samples or --train_window "
                "differ from the checkpoint's: in the rest of this pass some rows come twice, "
                "others not at all (%s; now %s).",
                begin.order,
                self.order(),
            )

    def prepare(self, drawn: DrawnRow) -> dict[str, Any] | Rejection:
        prepared = self.sets[drawn.source].preprocessor(drawn.row, drawn.speed)
        return cast("dict[str, Any] | Rejection", prepared)  # from here on examples are plain dicts

    def begin(self) -> StreamPosition:
        """Where the stream begins."""
        if self.position is None:
            return StreamPosition.beginning(len(self.sets))
        return self.position

    def order(self) -> RowOrder:
        return RowOrder(
            seed=self.seed,
            block_size=self.block_size,
            is_grouped_by_length=self.is_grouped_by_length,
            max_rows=tuple(dataset.max_rows for dataset in self.sets),
        )

    def rank_seed(self) -> int:
        """The seed of what is drawn for the n-th row. Ranks with files of their own each count from
        their own first row: with one seed they would all draw the same source, and speed, at
        once."""
        if self.share.is_sharded_by_rank:
            return self.seed + (self.share.rank << 32)
        return self.seed

    def rows(self) -> Iterator[tuple[StreamPosition, DrawnRow]]:
        """This rank's rows of the mix, each with the position after it."""
        begin = self.begin()
        order = self.order()
        first_row = begin.row + begin.rows_to_skip
        readers = [self.source_rows(number) for number in range(len(self.sets))]
        sources = list(begin.sources)  # the position of each
        weights = tuple(dataset.weight for dataset in self.sets)
        seed = self.rank_seed()
        for num_rows in itertools.count(begin.row):  # before this one
            number = draw_source(num_rows, weights, seed)
            sources[number], row = next(readers[number])
            if num_rows < first_row:
                continue  # another rank has trained on it before the checkpoint
            micro_batch = (num_rows - first_row) // self.micro_batch_size
            if not self.share.has_turn(micro_batch):
                continue
            position = StreamPosition(
                row=num_rows + 1,
                sources=tuple(sources),
                last_source=number,
                order=order,
            )
            yield position, DrawnRow(source=number, row=row, speed=self.draw_speed(position))

    def draw_speed(self, position: StreamPosition) -> float:
        """Of the row before `position`."""
        if not self.speed_perturbation:
            return 1.0
        generator = np.random.default_rng([self.rank_seed(), position.row])
        return generator.uniform(MIN_SPEED, MAX_SPEED)

    def source_rows(self, number: int) -> Iterator[tuple[SourcePosition, SourceRow]]:
        """The rows of one source, block by block, each with the source's position after it."""
        begin = self.begin().sources[number]
        offset = begin.offset
        rows_used = begin.rows_used
        rows_per_round = self.share.rows_per_round(self.micro_batch_size)
        group_size = rows_per_round
        if offset > 0 and begin.group_size is not None:
            group_size = begin.group_size
        for block, rows_per_pass in read_ahead(self.blocks(number), size_of_block):
            order = self.block_order(block, rows_used - offset, group_size)
            for place in range(offset, len(order)):
                rows_used += 1
                position = SourcePosition(
                    start=block.start,
                    offset=place + 1,
                    rows_per_pass=rows_per_pass,
                    rows_used=rows_used,
                    group_size=group_size,
                )
                yield position, block.rows[order[place]]
            offset = 0
            group_size = rows_per_round

    def block_order(self, block: Block, rows_before: int, group_size: int) -> list[int]:
        """The indices of a block's rows in the order of their use, a pure function of seed, pass
        and block. rows_before: of the source before this block."""
        seed = [self.seed, block.start.pass_number, block.start.block]
        order = list(range(len(block.rows)))
        if self.block_size > 1:
            order = np.random.default_rng(seed).permutation(len(block.rows)).tolist()
        if self.is_grouped_by_length:
            order = group_by_length(
                order,
                sizes=[row.size_in_bytes() for row in block.rows],
                rows_before=rows_before,
                group_size=group_size,
                seed=seed,
            )
        return order

    def blocks(self, number: int) -> Iterator[tuple[Block, int | None]]:
        """Endless (block, rows of the pass before if known) of one source, from the block on in
        which its position lies. Raises: UserError if there are no rows."""
        dataset = self.sets[number]
        begin = self.begin().sources[number]
        start = begin.start
        rows_per_pass = begin.rows_per_pass
        num_empty_passes = 0
        while True:
            num_rows = start.rows_before
            for block in read_pass(
                dataset,
                block_size=self.block_size,
                seed=self.seed if self.block_size > 1 else None,
                start=start,
                share=self.share,
            ):
                num_rows += len(block.rows)
                yield block, rows_per_pass
            num_empty_passes = num_empty_passes + 1 if num_rows == 0 else 0
            if num_empty_passes > self.share.max_empty_passes():
                source = dataset.source
                raise UserError(f"split '{source.split}' of {source.name} is empty.")
            rows_per_pass = num_rows
            start = BlockStart(pass_number=start.pass_number + 1)


def size_of_block(item: tuple[Block, int | None]) -> int:
    return item[0].size_in_bytes


class PassOutcomes:
    """What became of the rows of the present pass over each source, to end a stream that would
    read for ever and never find a usable row. A resumed pass is seen only in part, so it counts as
    having had a usable one."""

    def __init__(self, sets: tuple[SpeechDataset, ...], begin: StreamPosition) -> None:
        self.sets = sets
        self.pass_numbers = [source.start.pass_number for source in begin.sources]
        self.counts: list[Counter[str]] = [
            Counter(accepted=1) if source.rows_used > 0 else Counter() for source in begin.sources
        ]

    def count(self, position: StreamPosition, result: dict[str, Any] | Rejection) -> None:
        """Counts the row before `position`.
        Raises: UserError if it begins a pass and there was no usable row in the one before."""
        this_pass = position.last_pass()
        number = this_pass.source
        counts = self.counts[number]
        if this_pass.pass_number > self.pass_numbers[number]:
            if counts and not counts["accepted"]:
                name = self.sets[number].source.name
                raise UserError(
                    f"no usable row in a whole pass over {name}: {describe_counts(counts)}."
                )
            counts = self.counts[number] = Counter()
            self.pass_numbers[number] = this_pass.pass_number
        counts[result.reason if isinstance(result, Rejection) else "accepted"] += 1
