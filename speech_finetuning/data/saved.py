"""Folders that `Dataset.save_to_disk` wrote: Arrow files, and JSON that names them."""

import glob
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from speech_finetuning.base.errors import UserError, one_line
from speech_finetuning.base.files import printable

STATE = "state.json"
WRITE_ANEW = "Write the folder anew, with Dataset.save_to_disk."


def find_saved(name: str) -> dict[str, list[str]]:
    """{split: [Arrow file]} of such a folder; {} of any other. Raises: UserError if it is damaged."""
    folder = Path(name)
    listing = folder / "dataset_dict.json"
    if listing.is_file():
        splits = plain_names(listing, read_state(listing).get("splits", []))
        return {split: arrow_files(folder / split) for split in splits}
    if (folder / STATE).is_file() and (folder / "dataset_info.json").is_file():
        split = read_state(folder / STATE).get("_split") or "train"
        return {str(split): arrow_files(folder)}
    return {}


def arrow_files(folder: Path) -> list[str]:
    """Those that the folder's state names. Raises: UserError where one is missing or elsewhere."""
    listing = folder / STATE
    files = read_state(listing).get("_data_files", [])
    are_records = isinstance(files, list) and all(isinstance(file, dict) for file in files)
    names = [file.get("filename") for file in files] if are_records else [None]
    found = [folder / name for name in plain_names(listing, names)]
    for path in found:
        if not path.is_file():
            raise UserError(f"{path}: is missing, though {STATE} names it. {WRITE_ANEW}")
    return [str(path) for path in found]


def plain_names(listing: Path, names: Any) -> list[str]:
    """Names of what lies in the listing's folder: a data set reads nothing outside itself. Raises:
    UserError."""
    if not isinstance(names, list):
        names = [names]
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise UserError(
                f"{listing}: expected names of its own folder's files, found "
                f"{printable(repr(name)[:80])}. {WRITE_ANEW}"
            )
    return names


def read_state(path: Path) -> dict:
    """A JSON object. Raises: UserError."""
    try:
        state = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {one_line(error)} {WRITE_ANEW}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: expected an object, found {type(state).__name__}. {WRITE_ANEW}")
    return state


def load_saved(files: dict[str, list[str]], cache_dir: str | None) -> datasets.DatasetBuilder:
    """The builder of Arrow files, by split. `datasets` would take [ in a path for a wildcard."""
    escaped = {split: [glob.escape(path) for path in paths] for split, paths in files.items()}
    return datasets.load_dataset_builder("arrow", data_files=escaped, cache_dir=cache_dir)


def count_rows_of_arrow(paths: list[str]) -> int:
    """Of local Arrow files, whose batches are mapped and not read. Raises: pyarrow's errors."""
    num_rows = 0
    for path in paths:
        with pyarrow.memory_map(path) as file, pyarrow.ipc.open_stream(file) as reader:
            num_rows += sum(batch.num_rows for batch in reader)
    return num_rows
