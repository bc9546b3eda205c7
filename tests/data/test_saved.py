"""Folders of save_to_disk: what they name is read only if it is their own."""

import json
from pathlib import Path

import datasets
import pytest
from rows import make_clip, read_rows

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.saved import count_rows_of_arrow, find_saved
from speech_finetuning.data.sources import load_source


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """With a character of patterns in its name."""
    folder = tmp_path / "saved[1]"
    rows = datasets.Dataset.from_dict({"text": ["uno", "dos"]})
    datasets.DatasetDict({"train": rows}).save_to_disk(folder)
    return folder


def test_its_files_are_found(saved: Path):
    ((split, paths),) = find_saved(str(saved)).items()
    assert split == "train" and count_rows_of_arrow(paths) == 2


@pytest.mark.parametrize("name", ["../other.arrow", "/etc/passwd", "a/b", "..", "", None, 3])
def test_a_file_elsewhere_is_not_read(saved: Path, name: object):
    state = saved / "train" / "state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match="expected names of its own folder's files"):
        find_saved(str(saved))


@pytest.mark.parametrize("splits", [["../train"], ["/tmp"], [None], "/tmp", {"a": 1}])
def test_a_split_elsewhere_is_not_read(saved: Path, splits: object):
    (saved / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(UserError, match="expected names of its own folder's files"):
        find_saved(str(saved))


@pytest.mark.parametrize("text", ["[]", "3", "{", "", "[" * 5000, '{"_data_files": [3]}'])
def test_a_damaged_state_is_one_line(saved: Path, text: str):
    (saved / "train" / "state.json").write_text(text)
    with pytest.raises(UserError, match="Write the folder anew"):
        find_saved(str(saved))


def test_a_deleted_file_is_one_line(saved: Path):
    for path in (saved / "train").glob("*.arrow"):
        path.unlink()
    with pytest.raises(UserError, match=r"\.arrow: is missing, though state.json names it"):
        find_saved(str(saved))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_folder_with_characters_of_patterns_in_its_name_is_read(tmp_path: Path, split: str):
    clip = make_clip(1.0)
    rows = datasets.Dataset.from_dict({"audio": [clip], "text": ["uno"]})
    folder = tmp_path / "a[1]*{b}"
    datasets.DatasetDict({split: rows}).save_to_disk(folder)
    source = load_source(str(folder), split=split)
    assert [row.text for row in read_rows(source)] == ["uno"]
