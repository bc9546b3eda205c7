"""Where the stream is: the position that every checkpoint contains, in its stream_state.json.

A position says what has been *trained on*, not what a worker has prepared in the meantime. Three
parts, each inside the one before:

    StreamPosition       how many rows the run has used, all sources together
      SourcePosition     how much of the present shuffle block of one source has been used
        BlockStart       where in the order of the pass this block begins

To continue, each source is opened at its BlockStart (what stands before it in the pass is not
touched), that block is read again and permuted as before, since the permutation depends on nothing
but seed, pass and block, and the rows that were used are left out. So the next row is the one that
would have come, whatever the number of threads, workers or, where they share one order, processes.

What the order of a pass is depends on the form of the data (`passes`), and a BlockStart counts in
its units. Each order is computed from seed and pass, never replayed:

    rows that are only paths     One permutation of all rows. `rows_before` is the place in it.
    parquet                      A permutation of the row groups of all files, read one after the
                                 other; a block is made of several. `shard` counts row groups of
                                 that order, `shard_row` rows within one.
    other files (tars)           A permutation of the files. They can only be read from their
                                 beginning: `passes.NUM_LANES` are open at a time, and a block
                                 takes a row of each in turn. `lanes` says where each one is,
                                 `shard` how many files of the order have been opened.

That is version 3 of the order. In version 2 neighbours of one recording shared a window only where
lists name them; in version 3 they do so in parquet files too, whose windows are then their rows
(`parquet_windows`). In version 1 a source's files were permuted and read one after the other, a
block was a run of neighbours in one file, `shard` counted files, and --max_train_samples were the
first rows. A run keeps the version that it began with (`RowOrder.version`): a checkpoint of version
1 goes on in its own order, and scores the rows that it has scored before.

Which rows there are at all (a hold-out, an even sample: `selection`) is decided before they are
ordered, so that no place is spent on the others. Rows that --exclude_rows names keep their places
and are passed over there, so that the order of all others stays.

`VERSION` numbers the form of stream_state.json:

    1    before the move to a package, `datasets`' own state of a file instead of a row number
    2    before the move to a package (up to commit 81b91a7), without a version number
    3    without the order's version, which is 1, and without hold-outs
    4    this one
"""

from dataclasses import asdict, dataclass
from typing import Any

from speech_finetuning.base.errors import UserError

VERSION = 4
FIRST_ORDER_VERSION = 1
WINDOWS_VERSION = 3  # the first one in which rows of parquet files share windows
ORDER_VERSION = 3  # of runs that begin now


@dataclass(frozen=True, kw_only=True)
class BlockStart:
    """Where a shuffle block begins in the order of a pass. The default: where the pass does."""

    pass_number: int = 0  # passes over the source before this one
    block: int = 0  # blocks of this pass before this one
    rows_before: int = 0  # rows in those blocks
    shard: int = 0  # files or row groups of this pass before the one with the first row
    shard_row: int = 0  # rows of that one before the first row
    # (file, row in it) of each file that is open, where several are read in turn; `shard` is then
    # the first one that has not been opened.
    lanes: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "BlockStart":
        lanes = tuple((shard, row) for shard, row in value["lanes"])
        arguments: dict[str, Any] = value | {"lanes": lanes}
        return cls(**arguments)


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
            start=BlockStart.from_json(value["start"]),
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

    version: int
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
        for source in value["sources"]:
            source["start"]["lanes"] = [list(lane) for lane in source["start"]["lanes"]]
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
    if version == 3:
        return _from_version_3(state)
    if version == 2:
        return _from_version_3(_from_version_2(state))
    age = "an older" if version < VERSION else "a newer"
    raise UserError(
        f"the checkpoint's position in the data has the form of {age} version ({version}; this one "
        f"reads 2 to {VERSION}). Finish the run with that version, or start over in another "
        f"--output_dir."
    )


def saved_order_version(state: dict[str, Any]) -> int:
    """The version of the order that a run goes on in."""
    order = in_this_version(state)["position"]["order"]
    return FIRST_ORDER_VERSION if order is None else order["version"]


def _from_version_3(state: dict[str, Any]) -> dict[str, Any]:
    return state | {
        "version": VERSION,
        "position": _position_from_version_3(state["position"]),
        "rank_positions": [_position_from_version_3(each) for each in state["rank_positions"]],
        "hold_outs": {},
    }


def _position_from_version_3(position: dict[str, Any]) -> dict[str, Any]:
    order = position["order"]
    sources = [
        source | {"start": source["start"] | {"lanes": []}} for source in position["sources"]
    ]
    return position | {
        "sources": sources,
        "order": None if order is None else {"version": FIRST_ORDER_VERSION, **order},
    }


def _from_version_2(state: dict[str, Any]) -> dict[str, Any]:
    """The names of then to the names of now. Rows that were lost in damaged files, and rejections
    by pass, were not counted."""
    return {
        "version": 3,
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
