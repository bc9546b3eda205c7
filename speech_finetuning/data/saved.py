"""Folders that `Dataset.save_to_disk` wrote: Arrow files, and JSON that names them."""

import json
from pathlib import Path

import pyarrow

from speech_finetuning.base.errors import UserError, one_line

STATE = "state.json"


def find_saved(name: str) -> dict[str, list[str]]:
    """{split: [Arrow file]} of such a folder; {} of any other. Raises: UserError if it is damaged."""
    folder = Path(name)
    if (folder / "dataset_dict.json").is_file():
        splits = read_state(folder / "dataset_dict.json").get("splits", [])
        return {split: arrow_files(folder / split) for split in splits}
    if (folder / STATE).is_file() and (folder / "dataset_info.json").is_file():
        split = read_state(folder / STATE).get("_split") or "train"
        return {split: arrow_files(folder)}
    return {}


def arrow_files(folder: Path) -> list[str]:
    state = read_state(folder / STATE)
    return [str(folder / file["filename"]) for file in state.get("_data_files", [])]


def read_state(path: Path) -> dict:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: {one_line(error)} Write the folder anew, with Dataset.save_to_disk."
        ) from error


def count_rows_of_arrow(paths: list[str]) -> int:
    """Of local Arrow files, whose batches are mapped and not read. Raises: pyarrow's errors."""
    num_rows = 0
    for path in paths:
        with pyarrow.memory_map(path) as file, pyarrow.ipc.open_stream(file) as reader:
            num_rows += sum(batch.num_rows for batch in reader)
    return num_rows
