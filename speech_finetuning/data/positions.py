"""Where the stream is: the position that every checkpoint contains."""

from typing import Any

FIRST_PLACE = {  # of one source
    "start": {"pass": 0, "block": 0, "rows": 0, "shard": 0, "shard_row": 0},
    "offset": 0,  # rows of the block already used
    "rows_per_pass": None,  # known after the first pass
    "used": 0,  # rows of this source used since the training began
}


def position_after_resharding(positions: list[dict[str, Any]]) -> dict[str, Any]:
    """Where every rank goes on after ranks with files of their own: at the pass that none of them has begun."""
    sources = []
    for places in zip(*(position["sources"] for position in positions), strict=True):
        start = FIRST_PLACE["start"] | {"pass": 1 + max(place["start"]["pass"] for place in places)}
        sources.append(
            FIRST_PLACE | {"start": start, "used": sum(place["used"] for place in places)}
        )
    return {"row": sum(position["row"] for position in positions), "skip": 0, "sources": sources}
