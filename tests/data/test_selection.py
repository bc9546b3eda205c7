"""Which rows of a source there are: hashes, even samples, rows that --exclude_rows names."""

import json
from pathlib import Path

import numpy as np
import pytest

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.selection import (
    HoldOut,
    RowSelection,
    even_places,
    even_sample,
    hash_of,
    read_excluded_ids,
)
from speech_finetuning.data.shards import SourceRow


def test_a_hash_is_the_same_for_ever():
    """Also in another process, where Python's own would differ."""
    hashes = [f"{hash_of(key):016x}" for key in ("", "speaker 1", "日本")]
    assert hashes == ["e3b0c44298fc1c14", "395a8e596565a15f", "cf2abf0c5be326cb"]


@pytest.mark.parametrize(("num_places", "num_drawn"), [(10, 10), (10, 3), (1_000_000, 777), (7, 1)])
def test_even_places_are_one_of_each_stretch(num_places: int, num_drawn: int):
    places = even_places(num_places, num_drawn)
    bounds = np.arange(num_drawn + 1) * num_places // num_drawn
    assert len(places) == num_drawn
    assert all(bounds[:-1] <= places) and all(places < bounds[1:])
    assert np.array_equal(places, even_places(num_places, num_drawn))


def test_even_places_do_not_meet_a_period():
    """Every tenth row of a list is the same sentence."""
    phases = np.bincount(even_places(10_000, 1_000) % 10, minlength=10)
    assert phases.min() > 60


def test_an_even_sample_of_few_rows_reads_few_row_groups():
    rows = np.arange(100_000)
    groups = rows // 100
    sample = even_sample(rows, 200, groups)
    assert len(np.unique(sample)) == 200
    assert len(np.unique(sample // 100)) <= 8  # 800 rows, four for each
    assert sample.min() < 15_000 and sample.max() > 85_000
    assert len(np.unique(even_sample(rows, 30_000, groups) // 100)) == 1_000
    assert len(np.unique(even_sample(rows, 200) // 100)) > 150  # of a list


def test_a_sample_of_more_rows_than_there_are_is_all_of_them():
    rows = np.array([3, 5, 9])
    assert even_sample(rows, 4).tolist() == [3, 5, 9]


def test_a_hold_out_survives_json():
    hold_out = HoldOut(by="speaker", groups=frozenset([2**64 - 1, 7]), fraction=0.1)
    assert HoldOut.from_json(json.loads(json.dumps(hold_out.to_json()))) == hold_out


def test_rows_are_judged_by_their_names():
    hold_out = HoldOut(by="recording", fraction=0.1)
    rows = [SourceRow(id=f"train/0/0/{n}.wav", audio={"path": f"{n}.wav"}) for n in range(2_000)]
    trained = RowSelection(hold_out=hold_out)
    scored = RowSelection(hold_out=hold_out, is_held_out=True)
    assert all(trained.takes(None, row) != scored.takes(None, row) for row in rows)
    assert 150 < sum(scored.takes(None, row) for row in rows) < 250
    moved = [SourceRow(id=f"b/{row.id}", audio=row.audio["path"]) for row in rows]
    assert [scored.takes(None, row) for row in moved] == [scored.takes(None, row) for row in rows]


def test_what_stands_for_the_rest_of_a_file_is_never_left_out():
    row = SourceRow(id="r", rejection=Rejection("file_damaged", "", "r", 9))
    assert RowSelection(mask=np.zeros(3, bool)).takes(1, row)
    assert not RowSelection(mask=np.zeros(3, bool)).takes(1, SourceRow(id="r"))


def test_fingerprints_differ_with_the_rows():
    masks = [np.array([True, False]), np.array([True, True])]
    fingerprints = {RowSelection(mask=mask).fingerprint() for mask in masks}
    fingerprints |= {RowSelection(max_rows=n).fingerprint() for n in (None, 5)}
    fingerprints.add(RowSelection(hold_out=HoldOut(by="row", fraction=0.1)).fingerprint())
    assert len(fingerprints) == 5
    assert RowSelection(mask=masks[0]).fingerprint() in fingerprints


def test_rows_of_files_are_judged_up_to_a_share_of_the_limit():
    selection = RowSelection(max_rows=10)
    assert [selection.num_rows_to_judge(file, 3) for file in range(3)] == [3, 3, 4]
    hold_out = HoldOut(by="recording", fraction=0.1)
    scored = RowSelection(hold_out=hold_out, is_held_out=True, max_rows=10)
    assert scored.num_rows_to_judge(0, 1) == 100
    assert RowSelection().num_rows_to_judge(0, 3) is None


def test_excluded_rows_are_ids_or_lines_of_rejected_jsonl(tmp_path: Path):
    file = tmp_path / "bad.txt"
    file.write_text('train/0/0/a.wav\n\n{"split": "train", "row": "train/0/0/b.wav"}\n')
    assert read_excluded_ids(str(file)) == {"train/0/0/a.wav", "train/0/0/b.wav"}
    assert read_excluded_ids(None) == frozenset()


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"id": 3}\n', "line 1: expected an id"), ("a\n{\n", "line 2"), (None, "No such file")],
)
def test_a_list_of_excluded_rows_that_is_none_says_so(
    tmp_path: Path, text: str | None, message: str
):
    file = tmp_path / "bad.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=rf"--exclude_rows .*bad.txt.*{message}"):
        read_excluded_ids(str(file))


def test_a_list_of_rows_is_read_as_other_lists_are(tmp_path: Path):
    path = tmp_path / "rows.txt"
    path.write_text('\ufeffa/0\r\n\r\nb\u2028c/1\r\n{"row": "d/2"}\r\n', encoding="utf-8")
    assert read_excluded_ids(str(path)) == {"a/0", "b\u2028c/1", "d/2"}


@pytest.mark.parametrize("line", ["{", '{"row": 3}', '{"row": null}', '{"id": "a"}'])
def test_a_line_that_names_no_row_is_named(tmp_path: Path, line: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"a/0\n{line}\n")
    with pytest.raises(UserError, match="rows.jsonl, line 2: expected an id, or an object"):
        read_excluded_ids(str(path))
