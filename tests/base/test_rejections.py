"""rejected.jsonl: what it says is true of the present start."""

import json
from pathlib import Path

import pytest

from speech_finetuning.base.rejections import (
    DATA_REPORT,
    TRAIN,
    Rejection,
    list_new_rejections,
    list_rejections,
    restart_listing,
)


def rejections(*names: str) -> list[Rejection]:
    return [Rejection("audio_empty", "no bytes", name) for name in names]


def listed(folder: Path) -> list[str]:
    lines = (folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["row"] for line in lines]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As an earlier start has left it."""
    list_rejections(tmp_path, DATA_REPORT, rejections("train/0/0/b"))
    list_rejections(tmp_path, TRAIN, rejections("train/0/0/a"))
    list_rejections(tmp_path, "validation", rejections("validation/0/0/x"))
    list_rejections(tmp_path, TRAIN, rejections("train/0/0/b", "train/0/0/c"))
    with open(tmp_path / "rejected.jsonl", "a") as file:
        file.write('{"split": "train", "row": "tr')  # torn by a kill
    return tmp_path


@pytest.mark.parametrize(
    ("num_trained", "rows"),
    [
        (0, []),
        (1, ["train/0/0/a"]),
        (2, ["train/0/0/a", "train/0/0/b"]),
        (9, ["train/0/0/a", "train/0/0/b", "train/0/0/c"]),
    ],
)
def test_a_run_that_goes_on_keeps_the_rows_that_it_will_not_meet_again(
    folder: Path, num_trained: int, rows: list[str]
):
    restart_listing(folder, num_trained)
    assert listed(folder) == ["train/0/0/b", *rows]
    list_new_rejections(folder, "validation", rejections("validation/0/0/x"))
    list_new_rejections(folder, "test", rejections("validation/0/0/x", "test/0/0/y"))
    assert listed(folder) == ["train/0/0/b", *rows, "validation/0/0/x", "test/0/0/y"]


def test_a_run_that_begins_lists_only_its_own(folder: Path):
    restart_listing(folder, None)
    assert not (folder / "rejected.jsonl").exists()
    restart_listing(folder, 3)  # nothing is there
    list_rejections(folder, "train", rejections("train/0/0/z"))
    assert listed(folder) == ["train/0/0/z"]
