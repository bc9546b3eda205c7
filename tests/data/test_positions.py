"""Positions on disk: JSON with a version; the form of 81b91a7 can be continued, older ones not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.positions import (
    VERSION,
    BlockStart,
    RowOrder,
    SourcePass,
    SourcePosition,
    StreamPosition,
    in_this_version,
    position_after_resharding,
    saved_order_version,
)

CHECKPOINT_81B91A7 = Path(__file__).parents[1] / "golden" / "checkpoint_81b91a7"
POSITION = StreamPosition(
    row=60,
    rows_to_skip=8,
    sources=(
        SourcePosition(
            start=BlockStart(
                pass_number=3,
                block=2,
                rows_before=32,
                shard=1,
                shard_row=12,
                lanes=((0, 7), (2, 0)),
            ),
            offset=3,
            rows_per_pass=40,
            rows_used=155,
            group_size=10,
        ),
        SourcePosition(),
    ),
    last_source=1,
    order=RowOrder(version=2, seed=1, block_size=16, is_grouped_by_length=True, max_rows=(None, 9)),
)


def state_of_81b91a7() -> dict[str, Any]:
    return json.loads((CHECKPOINT_81B91A7 / "stream_state.json").read_text(encoding="utf-8"))


def test_a_position_survives_json():
    assert StreamPosition.from_json(json.loads(json.dumps(POSITION.to_json()))) == POSITION


def test_a_position_knows_the_pass_of_its_last_row():
    assert POSITION.last_pass() == SourcePass(source=1, pass_number=0)
    assert replace(POSITION, last_source=0).last_pass() == SourcePass(source=0, pass_number=3)


def test_a_position_is_not_changed_in_place():
    with pytest.raises(AttributeError):
        POSITION.row = 61
    assert replace(POSITION, row=61) != POSITION


def test_a_checkpoint_of_81b91a7_is_read():
    state = in_this_version(state_of_81b91a7())
    assert StreamPosition.from_json(state["position"]) == StreamPosition(
        row=60,
        sources=(
            SourcePosition(
                start=BlockStart(block=2, rows_before=32, shard=1, shard_row=12),
                offset=3,
                rows_used=35,
                group_size=10,
            ),
            SourcePosition(
                start=BlockStart(pass_number=1),
                offset=9,
                rows_per_pass=16,
                rows_used=25,
                group_size=10,
            ),
        ),
        last_source=1,
    )
    assert state["counts"]["num_rows"] == 60 and state["rejected"]["text_empty"] == 2
    assert state["rank_positions"] == []


def test_the_positions_of_ranks_with_files_of_their_own_are_read_too():
    state = state_of_81b91a7()
    del state["position"]["last"]  # as right after the number of ranks had changed
    del state["position"]["sources"][0]["group"]  # as before the first row of a source
    state["dealt"] = [state["position"] | {"row": row} for row in (30, 31)]
    positions = [
        StreamPosition.from_json(value) for value in in_this_version(state)["rank_positions"]
    ]
    assert [position.row for position in positions] == [30, 31]
    assert positions[0].sources[0].group_size is None


def test_a_state_of_this_version_stays_as_it_is():
    state = {"version": VERSION, "position": POSITION.to_json(), "revisions": {"": "abc"}}
    assert in_this_version(state) is state


def state_of_version_3() -> dict[str, Any]:
    """As commits wrote it between 81b91a7 and the second version of the order."""
    position = replace(POSITION, order=replace(POSITION.order, version=1)).to_json()
    del position["order"]["version"]
    for source in position["sources"]:
        del source["start"]["lanes"]
    return {
        "version": 3,
        "position": position,
        "rank_positions": [position | {"row": row} for row in (30, 31)],
        "revisions": {"": "abc"},
    }


def test_a_state_of_version_3_goes_on_in_the_first_order():
    old = state_of_version_3()
    state = in_this_version(json.loads(json.dumps(old)))
    position = StreamPosition.from_json(state["position"])
    source = replace(POSITION.sources[0], start=replace(POSITION.sources[0].start, lanes=()))
    assert position == replace(
        POSITION,
        sources=(source, POSITION.sources[1]),
        order=replace(POSITION.order, version=1),
    )
    assert [StreamPosition.from_json(each).row for each in state["rank_positions"]] == [30, 31]
    assert saved_order_version(old) == saved_order_version(state_of_81b91a7()) == 1
    assert state["hold_outs"] == in_this_version(state_of_81b91a7())["hold_outs"] == {}


def test_the_version_of_the_order_is_that_of_the_position():
    state = {"version": VERSION, "position": POSITION.to_json()}
    assert saved_order_version(state) == 2


def test_other_versions_are_refused():
    state = state_of_81b91a7()
    for source in state["position"]["sources"]:
        del source["start"]["shard_row"]  # a state of `datasets` stood in its place
    with pytest.raises(UserError, match=r"an older version \(1; this one reads 2 to 4\)"):
        in_this_version(state)
    with pytest.raises(UserError, match=r"a newer version \(5; this one reads 2 to 4\)"):
        in_this_version({"version": 5})


def test_after_resharding_all_start_at_the_first_pass_that_no_rank_has_begun():
    source = SourcePosition(start=BlockStart(pass_number=1, block=4), offset=2, rows_used=50)
    ahead = replace(source, start=BlockStart(pass_number=2), rows_used=70)
    positions = [
        StreamPosition(row=50, sources=(source,)),
        StreamPosition(row=70, sources=(ahead,)),
    ]
    start = BlockStart(pass_number=3)
    assert position_after_resharding(positions) == StreamPosition(
        row=120, sources=(SourcePosition(start=start, rows_used=120),)
    )
