"""One exact order of rows: blocks, shuffling, mixing, ranks."""

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from speech_finetuning.base.errors import UserError, portable
from speech_finetuning.base.rejections import Rejection, describe_counts
from speech_finetuning.base.threads import MAX_BLOCK_IN_BYTES, map_in_order, read_ahead
from speech_finetuning.data.positions import FIRST_PLACE
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.shards import ShardReader, SourceRow
from speech_finetuning.data.sources import SpeechSource


@dataclass
class Block:
    """Rows that are permuted together, and the place in the source where the first of them stands (plain JSON)."""

    start: dict[str, Any]
    rows: list[SourceRow] = field(default_factory=list)
    size_in_bytes: int = 0

    def add(self, row: SourceRow) -> None:
        self.rows.append(row)
        self.size_in_bytes += (
            len(row.audio.get("bytes") or b"") if isinstance(row.audio, dict) else 0
        )


def shard_order(source: SpeechSource, seed: int | None, pass_number: int) -> list[tuple[int, int]]:
    """The files of a source in the order of this pass, a pure function of its arguments; seed None: as they are."""
    shards = source.shards()
    if seed is None:
        return shards
    return [shards[i] for i in np.random.default_rng([seed, pass_number]).permutation(len(shards))]


def read_pass(
    item: SpeechDataset,
    start: dict[str, Any],
    seed: int | None,
    block_size: int,
    share: slice = slice(None),
) -> Iterator[Block]:
    """The blocks of one pass from `start` on. Blocks end at block_size rows or 512 MB; seeking opens no earlier file.
    start: {"pass", "block", "rows" (before it), "shard" (place in the pass's order), "shard_row" (within the file)};
    seed: None keeps the files' order, as does max_rows, which must mean the same rows in every pass; share: which
    files in that order."""
    max_rows, wait_in_seconds = item.max_rows, item.preparer.max_network_wait_in_seconds
    order = shard_order(item.source, seed if max_rows is None else None, start["pass"])[share]
    block, number, num_rows = None, start["block"], start["rows"]
    for shard_number in range(start["shard"], len(order)):
        first = start["shard_row"] if shard_number == start["shard"] else 0
        reader = ShardReader(
            item.source,
            order[shard_number],
            num_rows=first,
            wait_in_seconds=wait_in_seconds,
        )
        for row in reader:
            if max_rows is not None and num_rows >= max_rows:
                break
            if block is None:
                place = {"shard": shard_number, "shard_row": reader.num_rows}
                block = Block({"pass": start["pass"], "block": number, "rows": num_rows, **place})
            block.add(row)
            num_rows += 1
            if len(block.rows) >= block_size or block.size_in_bytes >= MAX_BLOCK_IN_BYTES:
                yield block
                block, number = None, number + 1
    if block is not None:
        yield block


def group_by_length(
    order: list[int], sizes: list[int], num_used: int, group_size: int, seed: list[int]
) -> list[int]:
    """The order with clips of like size side by side, in groups that are shuffled as a whole: a batch of short clips
    needs a short window. num_used: rows of the source before these; what they have begun of a group is filled up."""
    begun = -num_used % group_size
    ranked = sorted(order[begun:], key=lambda i: sizes[i])  # stable: equal sizes stay shuffled
    groups = [ranked[i : i + group_size] for i in range(0, len(ranked), group_size)]
    rest = groups.pop() if groups and len(groups[-1]) < group_size else []
    np.random.default_rng(seed).shuffle(groups)
    return order[:begun] + [i for group in groups for i in group] + rest


def can_shard_by_rank(sets: Iterable[SpeechDataset], world_size: int) -> bool:
    """Whether every rank can have files of its own: each source has enough, and is used whole."""
    return world_size > 1 and all(
        i.max_rows is None and len(i.source.shards()) >= world_size for i in sets
    )


@functools.lru_cache(maxsize=2)
def draw_sources(seed: int, chunk: int, weights: tuple[float, ...]) -> np.ndarray:
    """Which source each of the rows chunk * 1000 ... chunk * 1000 + 999 of a mix comes from."""
    shares = np.array(weights) / sum(weights)
    return np.random.default_rng([seed, len(weights), chunk]).choice(len(weights), 1000, p=shares)


@dataclass(eq=False)
class SpeechStream(IterableDataset):
    """Endless passes over each source, block-shuffled; a seeded draw by weight mixes them to one global order, which
    goes to the ranks by micro-batch and is prepared by threads. If `is_sharded_by_rank`, each rank has such an order
    of its own, of every world_size-th file of each pass. The order is a pure function of (seed, pass, sources), and
    then of the rank, whatever the threads, workers and timing. Every item is (position after it, example or Rejection
    or an error of the reader). Pickles; runs in one DataLoader worker."""

    sets: tuple[SpeechDataset, ...]
    seed: int
    block_size: int
    micro_batch_size: int
    num_threads: int
    rank: int = 0
    world_size: int = 1
    position: dict[str, Any] | None = None  # None: the beginning
    is_sharded_by_rank: bool = False
    is_grouped: bool = False  # clips of like length in one batch
    has_speeds: bool = False  # each row at its own speed

    def place(self, number: int) -> dict[str, Any]:
        """Where reading of one source begins."""
        return self.position["sources"][number] if self.position else FIRST_PLACE

    def rank_seed(self) -> int:
        """Of what is drawn for the n-th row: ranks with files of their own count each for itself, and draw so too."""
        return self.seed + (self.rank << 32) * self.is_sharded_by_rank

    def blocks(self, number: int) -> Iterator[tuple[Block, int | None]]:
        """Endless (block, rows of a whole pass if known) of one source, beginning with the block of its place."""
        item = self.sets[number]
        start, rows_per_pass = self.place(number)["start"], self.place(number)["rows_per_pass"]
        seed = self.seed if self.block_size > 1 else None
        share = slice(self.rank, None, self.world_size) if self.is_sharded_by_rank else slice(None)
        while True:
            num_rows = start["rows"]
            for block in read_pass(item, start, seed, self.block_size, share):
                num_rows += len(block.rows)
                yield block, rows_per_pass
            if num_rows == 0 and not self.is_sharded_by_rank:
                raise UserError(f"split '{item.source.split}' of {item.source.name} is empty.")
            rows_per_pass = num_rows
            start = FIRST_PLACE["start"] | {"pass": start["pass"] + 1}

    def source_rows(self, number: int) -> Iterator[tuple[dict[str, Any], SourceRow]]:
        """Endless (place after it, row) of one source."""
        offset, used = self.place(number)["offset"], self.place(number)["used"]
        present = self.micro_batch_size * (1 if self.is_sharded_by_rank else self.world_size)
        group = (
            self.place(number).get("group", present) if offset else present
        )  # a begun block keeps its order
        for block, rows_per_pass in read_ahead(
            self.blocks(number), lambda item: item[0].size_in_bytes
        ):
            start, seed = block.start, [self.seed, block.start["pass"], block.start["block"]]
            order = list(range(len(block.rows)))
            if self.block_size > 1:
                order = np.random.default_rng(seed).permutation(len(block.rows)).tolist()
            if self.is_grouped:
                sizes = [row.size_in_bytes() for row in block.rows]
                order = group_by_length(order, sizes, used - offset, group, seed)
            for i in range(offset, len(block.rows)):
                used += 1
                place = {
                    "start": start,
                    "offset": i + 1,
                    "rows_per_pass": rows_per_pass,
                    "used": used,
                    "group": group,
                }
                yield place, block.rows[order[i]]
            offset, group = 0, present

    def rows(self) -> Iterator[tuple[dict[str, Any], tuple[int, SourceRow, float]]]:
        """(position after it, (number of its source, row, speed)) of this rank's share of the one global order."""
        # row: rows used, by all ranks together; skip: rows after them that other ranks have
        position = self.position or {"row": 0, "skip": 0, "sources": [FIRST_PLACE] * len(self.sets)}
        places, row_number, first = (
            list(position["sources"]),
            position["row"],
            position["row"] + position["skip"],
        )
        streams = [self.source_rows(number) for number in range(len(self.sets))]
        weights, seed = tuple(item.weight for item in self.sets), self.rank_seed()
        while True:
            chunk, place_in_chunk = divmod(row_number, 1000)
            number = (
                int(draw_sources(seed, chunk, weights)[place_in_chunk]) if len(weights) > 1 else 0
            )
            places[number], row = next(streams[number])
            row_number += 1
            turn = (row_number - 1 - first) // self.micro_batch_size
            if turn >= 0 and (self.is_sharded_by_rank or turn % self.world_size == self.rank):
                speed = (
                    np.random.default_rng([seed, row_number]).uniform(0.9, 1.1)
                    if self.has_speeds
                    else 1.0
                )
                yield (
                    {"row": row_number, "sources": list(places), "last": number},
                    (number, row, speed),
                )

    def prepare(self, item: tuple[int, SourceRow, float]) -> dict[str, Any] | Rejection:
        return self.sets[item[0]].preparer(*item[1:])

    def __iter__(self) -> Iterator[tuple[dict[str, Any] | None, Any]]:
        # What became of the rows of (source, pass); of a pass that is continued only the rest is seen: taken as good.
        begun = {
            number: self.place(number)
            for number in range(len(self.sets))
            if self.place(number)["used"]
        }
        tallies = {
            (number, place["start"]["pass"]): Counter(accepted=1) for number, place in begun.items()
        }
        try:
            for position, example in map_in_order(self.prepare, self.rows(), self.num_threads):
                number = position["last"]
                this_pass = position["sources"][number]["start"]["pass"]
                tally = tallies.pop((number, this_pass - 1), None)
                if (
                    tally and not tally["accepted"] and not self.is_sharded_by_rank
                ):  # else it may be one damaged file
                    name = self.sets[number].source.name
                    raise UserError(
                        f"no usable row in a whole pass over {name}: {describe_counts(tally)}."
                    )
                outcome = example.reason if isinstance(example, Rejection) else "accepted"
                tallies.setdefault((number, this_pass), Counter())[outcome] += 1
                yield position, example
        except Exception as error:  # travels as data: a DataLoader worker would lose its type
            yield None, portable(error)
