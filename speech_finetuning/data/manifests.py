"""Tables of files: CSV, TSV and JSON lines."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets

from speech_finetuning.data.columns import SpeechColumns, WantedColumns, find_columns

MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")


def manifest_files(name: str, config_name: str | None) -> dict[str, list[str]]:
    """{split: [file]} of a CSV, TSV or JSON-lines file, or of a folder with such files.

    A Common Voice download as it unpacks is such a folder (its language folder, or config_name
    inside it). Empty if `datasets` has to look at the place.
    """
    path = Path(name)
    if path.is_file() and path.suffix in MANIFEST_SUFFIXES:
        return {"train": [str(path)]}
    if config_name and (path / config_name).is_dir():
        path /= config_name
    if any((*path.glob("*.parquet"), *path.glob("*.tar"), *path.glob("metadata.*"))):
        return {}
    files = sorted(file for file in path.glob("*") if file.suffix in MANIFEST_SUFFIXES)
    return {file.stem: [str(file)] for file in files}


def open_manifest(
    files: list[str],
    wanted: WantedColumns,
) -> tuple[datasets.IterableDataset, SpeechColumns]:
    """The rows of one split as {audio column: path, text column: text}; and these columns.

    Raises: UserError for a wrong column.
    """
    columns = find_columns(list(next(read_manifest(files), {})), wanted, files[0])
    dataset = datasets.IterableDataset.from_generator(
        read_speech,
        gen_kwargs={"files": files, "columns": columns},
    )
    return dataset, columns


def count_manifest(files: Iterable[str]) -> int:
    return sum(1 for _ in read_manifest(files))


def read_speech(files: list[str], columns: SpeechColumns) -> Iterator[dict[str, str | None]]:
    """The audio, as an absolute path or an address, and the text of every row."""
    for name in files:
        folder = None
        for row in read_manifest([name]):
            audio = row.get(columns.audio)
            folder = folder or folder_of_audio(Path(name).parent, audio)
            if audio and "://" not in audio:
                audio = str(folder / audio)
            speech = {columns.audio: audio}
            if columns.text is not None:
                text = row.get(columns.text)
                speech[columns.text] = None if text is None else str(text)
            yield speech


def folder_of_audio(folder: Path, first_audio: str | None) -> Path:
    """The folder that a list's paths start from: its own, or `clips` in it, as in a Common Voice
    download, if the first row is a bare file name that is not there."""
    is_bare_name = first_audio and Path(first_audio).name == first_audio
    if is_bare_name and not (folder / first_audio).is_file() and (folder / "clips").is_dir():
        return folder / "clips"
    return folder


def read_manifest(files: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The rows of manifests. A TSV file has no quoting (Common Voice); a JSON line that cannot be
    read becomes a row without cells."""
    for name in files:
        with open(name, encoding="utf-8-sig", errors="replace", newline="") as file:
            rows: Iterable[dict]
            if name.endswith(".tsv"):
                rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            elif name.endswith(".csv"):
                rows = csv.DictReader(file)
            else:
                rows = map(parse_json_line, file)
            yield from rows


def parse_json_line(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
