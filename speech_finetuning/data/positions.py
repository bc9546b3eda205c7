"""Where the stream is: the position that every checkpoint contains, in its stream_state.json.

A position says what has been *trained on*, not what a worker has prepared in the meantime. Three
parts, each inside the one before:

    StreamPosition       how many rows the run has used, all sources together
      SourcePosition     how much of the present shuffle block of one source has been used
        BlockStart       the file, and the row in it, where this block begins

To continue, each source is opened at its BlockStart (no earlier file is touched), that block is
read again and permuted as before, since the permutation depends on nothing but seed, pass and
block, and the rows that were used are left out. So the next row is the one that would have come,
whatever the number of threads, workers or, where they share one order, processes.

`VERSION` numbers the form of stream_state.json:

    1    before the move to a package, `datasets`' own state of a file instead of a row number
    2    before the move to a package (up to commit 81b91a7), without a version number
    3    this one
"""

from dataclasses import asdict, dataclass
from typing import Any

from speech_finetuning.base.errors import UserError

VERSION = 3


@dataclass(frozen=True, kw_only=True)
class BlockStart:
    """Where the first row of a shuffle block stands in its source. The default: where it begins."""

    pass_number: int = 0  # passes over the source before this one
    block: int = 0  # blocks of this pass before this one
    rows_before: int = 0  # rows in those blocks
    shard: int = 0  # files of this pass before the one with the first row, in the pass's order
    shard_row: int = 0  # rows of that file before the first row


FIRST_BLOCK = BlockStart()


@dataclass(frozen=True, kw_only=True)
class SourcePosition:
    """How far one source has been used. The default: not at all."""

    start: BlockStart = FIRST_BLOCK  # of the present block
    offset: int = 0  # rows of the permuted block that have been used
    rows_per_pass: int | None = None  # of the pass before; None during the first one
    rows_used: int = 0  # since the training began, over all passes
    # Rows in each group of clips of like length (a batch of every rank). Of a block that has been
    # begun it stays, so that another batch size neither skips nor repeats a row of it.
    group_size: int | None = None  # None: before the first row

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "SourcePosition":
        return cls(
            start=BlockStart(**value["start"]),
            offset=value["offset"],
            rows_per_pass=value["rows_per_pass"],
            rows_used=value["rows_used"],
            group_size=value["group_size"],
        )


@dataclass(frozen=True, kw_only=True, order=True)
class SourcePass:
    """One pass over one source, of all ranks together."""

    source: int  # its index in the mix
    pass_number: int  # passes over it before this one


@dataclass(frozen=True, kw_only=True)
class RowOrder:
    """What the order of rows is a function of, beside the data."""

    seed: int
    block_size: int
    is_grouped_by_length: bool
    max_rows: tuple[int | None, ...]  # of each source

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "RowOrder":
        arguments: dict[str, Any] = value | {"max_rows": tuple(value["max_rows"])}
        return cls(**arguments)


@dataclass(frozen=True, kw_only=True)
class StreamPosition:
    """Where the stream goes on: after `row` rows of the mix."""

    row: int = 0  # rows used since the training began, of all sources and ranks together
    # Rows after them that the other ranks have used, each its micro-batch of the same round. The
    # sources' positions are those before these rows: they are read again, and passed over.
    rows_to_skip: int = 0
    sources: tuple[SourcePosition, ...]  # in the order of the mix
    last_source: int = 0  # index of the source of the last row
    order: RowOrder | None = None  # that it is a place in; None: not known (version 2)

    @classmethod
    def beginning(cls, num_sources: int) -> "StreamPosition":
        return cls(sources=(SourcePosition(),) * num_sources)

    def last_pass(self) -> SourcePass:
        """The pass that the last row belongs to."""
        start = self.sources[self.last_source].start
        return SourcePass(source=self.last_source, pass_number=start.pass_number)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, with the names of the fields."""
        value = asdict(self)
        value["sources"] = list(value["sources"])
        if self.order is not None:
            value["order"]["max_rows"] = list(self.order.max_rows)
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "StreamPosition":
        """value: as `to_json` makes it; of a checkpoint see `in_this_version`."""
        return cls(
            row=value["row"],
            rows_to_skip=value["rows_to_skip"],
            sources=tuple(SourcePosition.from_json(source) for source in value["sources"]),
            last_source=value["last_source"],
            order=RowOrder.from_json(value["order"]) if value["order"] else None,
        )


def position_after_resharding(positions: list[StreamPosition]) -> StreamPosition:
    """The position after the number of ranks changed, where each had files of its own: all start at
    the first pass that no rank has begun. positions: of every rank before the change."""
    sources = []
    for ranks in zip(*(position.sources for position in positions), strict=True):
        next_pass = 1 + max(source.start.pass_number for source in ranks)
        rows_used = sum(source.rows_used for source in ranks)
        start = BlockStart(pass_number=next_pass)
        sources.append(SourcePosition(start=start, rows_used=rows_used))
    return StreamPosition(
        row=sum(position.row for position in positions),
        sources=tuple(sources),
        order=positions[0].order,
    )


def in_this_version(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's stream_state.json contains, in the form of this version.
    Raises: UserError if its form cannot be continued."""
    version = state.get("version", 2)
    if version == 2 and "shard_row" not in state["position"]["sources"][0]["start"]:
        version = 1
    if version == VERSION:
        return state
    if version == 2:
        return _from_version_2(state)
    age = "an older" if version < VERSION else "a newer"
    raise UserError(
        f"the checkpoint's position in the data has the form of {age} version ({version}; this one "
        f"reads 2 and {VERSION}). Finish the run with that version, or start over in another "
        f"--output_dir."
    )


def saved_revisions(state: dict[str, Any]) -> dict[str, str | None]:
    """The Hub commit of each source, by its name in the mix, that a checkpoint's stream_state.json
    contains, so that a run continues on the data that it began with. None for local data; without
    an entry where the checkpoint does not tell (version 2)."""
    return in_this_version(state)["revisions"]


def _from_version_2(state: dict[str, Any]) -> dict[str, Any]:
    """The names of then to the names of now. Rows that were lost in damaged files, and rejections
    by pass, were not counted."""
    return {
        "version": VERSION,
        "position": _position_from_version_2(state["position"]),
        "rank_positions": [
            _position_from_version_2(position) for position in state.get("dealt", [])
        ],
        "counts": {**state["counts"], "num_lost_rows": 0},
        "rejected": state["rejected"],
        "rejected_in_pass": [],
        "damaged_files": {},
        "rejected_bytes": state["rejected_bytes"],
        "revisions": {},
    }


def _position_from_version_2(position: dict[str, Any]) -> dict[str, Any]:
    sources = []
    for source in position["sources"]:
        start = source["start"]
        sources.append(
            {
                "start": {
                    "pass_number": start["pass"],
                    "block": start["block"],
                    "rows_before": start["rows"],
                    "shard": start["shard"],
                    "shard_row": start["shard_row"],
                },
                "offset": source["offset"],
                "rows_per_pass": source["rows_per_pass"],
                "rows_used": source["used"],
                "group_size": source.get("group"),  # absent before the source's first row
            }
        )
    return {
        "row": position["row"],
        "rows_to_skip": position["skip"],
        "sources": sources,
        "last_source": position.get("last", 0),  # absent right after the number of ranks changed
        "order": None,
    }
