"""Tables of files: CSV, TSV and JSON lines."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def manifest_files(name: str, config_name: str | None) -> dict[str, list[str]]:
    """{split: [file]} of a CSV, TSV or JSON-lines file, or of a folder with such files, like a Common Voice download
    as it unpacks (its language folder, or config_name inside it). Empty if `datasets` has to look at the place."""
    path = Path(name)
    suffixes = (".csv", ".tsv", ".jsonl", ".json")
    if path.is_file() and path.suffix in suffixes:
        return {"train": [str(path)]}
    if config_name and (path / config_name).is_dir():
        path /= config_name
    files = sorted(file for file in path.glob("*") if file.suffix in suffixes)
    is_other = any((*path.glob("*.parquet"), *path.glob("*.tar"), *path.glob("metadata.*")))
    return {} if is_other else {file.stem: [str(file)] for file in files}


def read_manifest(
    files: list[str], columns: tuple[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of manifests; if columns are given, only audio (as an absolute path) and text, under these names. A TSV
    file has no quoting (Common Voice); a JSON line that cannot be read becomes a row without audio and text."""
    for name in files:
        with open(name, encoding="utf-8-sig", errors="replace", newline="") as file:
            rows: Iterable[dict] = map(parse_json_line, file)
            if name.endswith(("csv", "tsv")):
                how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if name.endswith("tsv") else {}
                rows = csv.DictReader(file, **how)
            folder = Path(name).parent
            for number, row in enumerate(rows):
                if columns is None:
                    yield row
                    continue
                audio, text = (row.get(column) for column in columns)
                is_bare = audio and Path(audio).name == audio and not (folder / audio).is_file()
                if number == 0 and is_bare and (folder / "clips").is_dir():
                    folder /= "clips"  # as in a Common Voice download
                place = str(folder / audio) if audio and "://" not in audio else audio
                yield {columns[0]: place, columns[1]: None if text is None else str(text)}


def parse_json_line(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
        return value if isinstance(value, dict) else {}
    except ValueError:
        return {}
