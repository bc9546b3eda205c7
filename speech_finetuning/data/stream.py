"""One exact order of rows: blocks, shuffling, mixing, ranks.

How a row comes to its turn, from the inside out:

    read_pass      one pass over one source, cut into blocks (see `passes`)
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
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from torch.utils.data import IterableDataset

from speech_finetuning.base.errors import UserError, portable
from speech_finetuning.base.rejections import Rejection, describe_counts
from speech_finetuning.base.threads import map_in_order, read_ahead
from speech_finetuning.data.augmentation import Augmenter, draw
from speech_finetuning.data.items import StreamItem
from speech_finetuning.data.nonspeech import NONSPEECH_DRAW, make_nonspeech
from speech_finetuning.data.passes import ONE_RANK, Block, RankShare, read_pass
from speech_finetuning.data.positions import (
    FIRST_ORDER_VERSION,
    ORDER_VERSION,
    BlockStart,
    RowOrder,
    SourcePosition,
    StreamPosition,
)
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.prompts import PROMPT_DRAW
from speech_finetuning.data.row_table import table_of
from speech_finetuning.data.shards import SourceRow
from speech_finetuning.data.units import units_of

logger = logging.getLogger(__name__)

DRAWS_PER_CHUNK = 1_000  # of sources of a mix; another number would be another order of rows
# Of speed perturbation (Ko et al., Interspeech 2015).
MIN_SPEED = 0.9
MAX_SPEED = 1.1


@dataclass(frozen=True, kw_only=True)
class DrawnRow:
    """A row that is about to be prepared."""

    source: int  # its index in the mix
    row: SourceRow
    speed: float  # at which it is played
    seed: tuple[int, int]  # of what else is drawn for it


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
    """Whether every rank can have files of its own: each source has enough, and is used whole. One
    order of rows that are only paths costs nothing, so that they need none."""
    return world_size > 1 and all(
        dataset.max_rows is None
        and len(dataset.source.shards()) >= world_size
        and (dataset.order_version == FIRST_ORDER_VERSION or is_divisible(dataset, world_size))
        for dataset in sets
    )


def is_divisible(dataset: SpeechDataset, world_size: int) -> bool:
    """Whether each rank finds a row in every pass: empty row groups are none."""
    num_units = len(units_of(dataset, is_shuffled=True))
    return num_units >= world_size and not dataset.source.has_rows_of_paths


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
    augmenter: Augmenter | None = None  # of the decoded clips; None: as they are

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
        preprocessor = self.sets[drawn.source].preprocessor
        augment = None
        is_nonspeech = False
        if self.augmenter is not None:
            augment = functools.partial(self.augmenter, seed=drawn.seed)
            fraction = self.augmenter.nonspeech_fraction
            is_nonspeech = draw(drawn.seed, NONSPEECH_DRAW, fraction) is not None
            if is_nonspeech:
                recordings = self.augmenter.noises
                augment = functools.partial(make_nonspeech, recordings=recordings, seed=drawn.seed)
        prepared = preprocessor(
            drawn.row,
            drawn.speed,
            augment,
            has_prompt=draw(drawn.seed, PROMPT_DRAW, preprocessor.prompt_probability) is not None,
            is_nonspeech=is_nonspeech,
        )
        return cast("dict[str, Any] | Rejection", prepared)  # from here on examples are plain dicts

    def begin(self) -> StreamPosition:
        """Where the stream begins."""
        if self.position is None:
            return StreamPosition.beginning(len(self.sets))
        return self.position

    def order(self) -> RowOrder:
        return RowOrder(
            version=self.sets[0].order_version if self.sets else ORDER_VERSION,
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
            drawn = DrawnRow(
                source=number,
                row=row,
                speed=self.draw_speed(position),
                seed=(seed, position.row),
            )
            yield position, drawn

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
        excluded = self.sets[number].excluded_ids
        for block, rows_per_pass in read_ahead(self.blocks(number), size_of_block):
            num_kept = sum(row.id not in excluded for row in block.rows)
            order = self.block_order(block, excluded, rows_used - min(offset, num_kept), group_size)
            for place in range(offset, len(order)):
                row = block.rows[order[place]]
                if row.id in excluded:
                    continue
                rows_used += 1
                position = SourcePosition(
                    start=block.start,
                    offset=place + 1,
                    rows_per_pass=rows_per_pass,
                    rows_used=rows_used,
                    group_size=group_size,
                )
                yield position, row
            offset = 0
            group_size = rows_per_round

    def block_order(
        self, block: Block, excluded: frozenset[str], rows_before: int, group_size: int
    ) -> list[int]:
        """The indices of a block's rows in the order of their use, a pure function of seed, pass
        and block. excluded: ids of rows that keep their places, or come last where rows are
        grouped. rows_before: of the source before this block."""
        seed = [self.seed, block.start.pass_number, block.start.block]
        order = list(range(len(block.rows)))
        if self.block_size > 1:
            order = np.random.default_rng(seed).permutation(len(block.rows)).tolist()
        if not self.is_grouped_by_length:
            return order
        kept = [place for place in order if block.rows[place].id not in excluded]
        left_out = [place for place in order if block.rows[place].id in excluded]
        grouped = group_by_length(
            kept,
            sizes=[row.size_in_bytes() for row in block.rows],
            rows_before=rows_before,
            group_size=group_size,
            seed=seed,
        )
        return grouped + left_out

    def blocks(self, number: int) -> Iterator[tuple[Block, int | None]]:
        """Endless (block, rows of the pass before if known) of one source, from the block on in
        which its position lies. Raises: UserError if there are no rows."""
        dataset = self.sets[number]
        begin = self.begin().sources[number]
        start = begin.start
        rows_per_pass = begin.rows_per_pass
        num_empty_passes = 0
        table = table_of(dataset)
        excluded = ExcludedRows(dataset, is_seen_whole=self.sees_whole_passes(start))
        while True:
            num_rows = start.rows_before
            num_kept = start.rows_before
            for block in read_pass(
                dataset,
                block_size=self.block_size,
                seed=self.seed if self.block_size > 1 else None,
                start=start,
                share=self.share,
                table=table,
            ):
                num_rows += len(block.rows)
                num_kept += sum(row.id not in dataset.excluded_ids for row in block.rows)
                excluded.look_at(block.rows)
                yield block, rows_per_pass
            excluded.warn_of_unknown()
            num_empty_passes = num_empty_passes + 1 if num_kept == 0 else 0
            if num_empty_passes > self.share.max_empty_passes():
                source = dataset.source
                named = ", or --exclude_rows names all of it" if dataset.excluded_ids else ""
                raise UserError(f"split '{source.split}' of {source.name} is empty{named}.")
            rows_per_pass = num_rows
            start = BlockStart(pass_number=start.pass_number + 1)

    def sees_whole_passes(self, start: BlockStart) -> bool:
        """Whether the pass that begins there is seen from its beginning, and by this rank alone."""
        is_first_rank = self.share.rank == 0 and not self.share.is_sharded_by_rank
        return is_first_rank and start.block == 0 and start.rows_before == 0


def size_of_block(item: tuple[Block, int | None]) -> int:
    return item[0].size_in_bytes


class ExcludedRows:
    """Which ids of --exclude_rows are those of a row. One that is of none was meant to leave out
    something: the data, or their name in a --data_mix, have changed."""

    def __init__(self, dataset: SpeechDataset, *, is_seen_whole: bool) -> None:
        source = dataset.source
        # Of a selection only the rows that it takes are seen.
        is_known = is_seen_whole and dataset.selection is None and dataset.max_rows is None
        ids = dataset.excluded_ids if is_known else ()
        self.unknown = {row_id for row_id in ids if row_id.startswith(source.id_prefix)}
        self.num_ids = len(self.unknown)
        self.place = f"split '{source.split}' of {source.name}"

    def look_at(self, rows: Iterable[SourceRow]) -> None:
        if not self.unknown:
            return
        for row in rows:
            if row.window is not None:  # of several rows, under a name of its own
                self.unknown = set()
            self.unknown.discard(row.id)

    def warn_of_unknown(self) -> None:
        """Once, after the first pass."""
        if self.unknown:
            logger.warning(
                "--exclude_rows: ids of no row in %s: %d of %d, such as %s. Have the data changed?",
                self.place,
                len(self.unknown),
                self.num_ids,
                ", ".join(sorted(self.unknown)[:3]),
            )
        self.unknown = set()


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
