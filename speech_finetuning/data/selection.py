"""Which rows of a source there are for a run: a hold-out, or all others; an even sample.

A selection is made once, when the data are opened, and is the same in every pass, in every process
and after every restart. Both ask for the rows' numbers in the order of the files. Those of lists
and parquet files are known beforehand. Of other files (tars) they are not, so that each row is
judged when it is read.
"""

import hashlib
import json
import math
from dataclasses import dataclass, replace

import numpy as np

from speech_finetuning.base.errors import UserError, one_line
from speech_finetuning.data.cells import path_of
from speech_finetuning.data.shards import SourceRow
from speech_finetuning.data.sources import SpeechSource
from speech_finetuning.data.tables import numbered_lines

# Of a parquet file a row group is read whole. An even sample of few rows of a large source may read
# this many rows for each one that it takes.
ROWS_READ_FOR_ONE = 4
HASH_RANGE = 2.0**64


def hash_of(key: str) -> int:
    """64 bits of SHA-256: the same on every machine and for ever, which Python's hash() is not."""
    digest = hashlib.sha256(key.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """The rows of a training split that are scored and never trained on. Every checkpoint contains
    it, so that rows which are added to the data later do not change what was held out.

    by: what the hash is of, "speaker", "recording" or "row".
    groups: hashes of the speakers (recordings, rows) that are held out; empty for files whose rows
    are judged as they are read: there those whose hash lies in the first `fraction` of all hashes.
    """

    by: str
    groups: frozenset[int] = frozenset()
    fraction: float = 0.0

    def to_json(self) -> dict[str, object]:
        """The hashes as hexadecimal digits: JSON's numbers have 53 bits."""
        groups = [f"{group:016x}" for group in sorted(self.groups)]
        return {"by": self.by, "groups": groups, "fraction": self.fraction}

    @classmethod
    def from_json(cls, value: dict) -> "HoldOut":
        groups = frozenset(int(group, 16) for group in value["groups"])
        return cls(by=value["by"], groups=groups, fraction=value["fraction"])

    def contains(self, key: str) -> bool:
        """Whether a row with this name, which is judged as it is read, is held out."""
        return hash_of(key) < self.fraction * HASH_RANGE


@dataclass(frozen=True, kw_only=True, eq=False)
class RowSelection:
    """The rows of a source that are used.

    mask: (num_rows,) bool, by the row's number in the order of the files; None: judged one by one.
    hold_out: by which they are judged: is_held_out: those that it has, else all others.
    max_rows: of them at most, where rows are judged one by one.
    num_held_out: rows of a hold-out, before a sample of them is drawn, if known.
    """

    mask: np.ndarray | None = None
    hold_out: HoldOut | None = None
    is_held_out: bool = False
    max_rows: int | None = None
    num_held_out: int | None = None

    def takes(self, number: int | None, row: SourceRow) -> bool:
        """number: of the row in the order of the files, where it is known. What stands for the rest
        of a damaged file is taken in any case."""
        if row.rejection is not None and row.rejection.reason == "file_damaged":
            return True
        if self.mask is not None:
            return number is not None and number < len(self.mask) and bool(self.mask[number])
        if self.hold_out is None:
            return True
        return self.hold_out.contains(path_of(row.audio) or row.id) == self.is_held_out

    def num_rows_to_judge(self, file: int, num_files: int) -> int | None:
        """How many rows of a file are judged, from its beginning, so that max_rows come of all
        files together; None: all. Of a hold-out it is about so many."""
        if self.max_rows is None or self.mask is not None:
            return None
        num_rows = round(self.max_rows / self.share())
        return num_rows * (file + 1) // num_files - num_rows * file // num_files

    def share(self) -> float:
        """Of the rows that are judged, those that are taken."""
        if self.hold_out is None:
            return 1.0
        fraction = self.hold_out.fraction
        return fraction if self.is_held_out else 1 - fraction

    def num_rows(self, of_source: int | None) -> int | None:
        """Rows that it takes, of so many in the source; an estimate where rows are judged."""
        if self.mask is not None:
            return int(self.mask.sum())
        if of_source is None:
            return None
        num_rows = round(of_source * self.share())
        return num_rows if self.max_rows is None else min(num_rows, self.max_rows)

    def fingerprint(self) -> str:
        """Changes with the rows that are selected."""
        digest = hashlib.sha256()
        if self.mask is not None:
            digest.update(np.packbits(self.mask).tobytes())
        hold_out = None if self.hold_out is None else self.hold_out.to_json()
        digest.update(repr((hold_out, self.is_held_out, self.max_rows)).encode())
        return digest.hexdigest()[:16]


def read_excluded_ids(path: str | None) -> frozenset[str]:
    """The rows that --exclude_rows names: an id on each line, or JSON objects with a `row`, as in
    rejected.jsonl and suspects.jsonl. Raises: UserError."""
    if path is None:
        return frozenset()
    ids = set()
    try:
        for number, line in numbered_lines(path):
            if line.strip():
                ids.add(excluded_id(line.strip(), f"--exclude_rows {path}, line {number}"))
    except OSError as error:
        raise UserError(f"--exclude_rows {path}: {one_line(error)}") from error
    return frozenset(ids)


def excluded_id(line: str, place: str) -> str:
    """Of one line. Raises: UserError."""
    if not line.startswith("{"):
        return line
    try:
        row = json.loads(line)["row"]
    except (ValueError, KeyError):
        row = None
    if not isinstance(row, str):
        raise UserError(f"{place}: expected an id, or an object with a row, on one line.")
    return row


def describe_excluded(ids: frozenset[str]) -> str | None:
    """'a list of 3 (1a2b3c4d5e6f)', the digits by the ids: which rows are left out, wherever the
    list lies. None for none."""
    if not ids:
        return None
    digest = hashlib.sha256()
    for row_id in sorted(ids):
        digest.update(row_id.encode("utf-8", errors="surrogatepass") + b"\n")
    return f"a list of {len(ids)} ({digest.hexdigest()[:12]})"


def even_places(num_places: int, num_drawn: int) -> np.ndarray:
    """(num_drawn,) sorted numbers below num_places: one out of each of num_drawn stretches of equal
    length. Where in its stretch is drawn, always alike: data often repeat with a period, such as a
    sentence that every speaker reads, and steps of one length would meet it."""
    bounds = np.arange(num_drawn + 1) * num_places // num_drawn
    widths = np.diff(bounds)
    draws = np.random.default_rng(0).random(num_drawn)
    return bounds[:-1] + (draws * widths).astype(np.int64)


def even_sample(rows: np.ndarray, num_rows: int, groups: np.ndarray | None = None) -> np.ndarray:
    """num_rows of these rows, evenly spread.

    rows: sorted numbers; groups: the row group of each, so that of a large source few are read.
    """
    if num_rows >= len(rows):
        return rows
    if groups is not None and len(rows) > ROWS_READ_FOR_ONE * num_rows:
        found = np.unique(groups)
        rows_per_group = len(rows) / len(found)
        num_groups = min(len(found), math.ceil(ROWS_READ_FOR_ONE * num_rows / rows_per_group))
        drawn = found[even_places(len(found), num_groups)]
        candidates = rows[np.isin(groups, drawn)]
        if len(candidates) >= num_rows:
            rows = candidates
    return rows[even_places(len(rows), num_rows)]


def select_rows(
    source: SpeechSource, *, max_rows: int | None, among: RowSelection | None = None
) -> RowSelection | None:
    """max_rows of the rows that `among` selects (None: of all), evenly spread.

    Where rows are judged as they are read, the first ones of each file. Returns `among` if nothing
    is left out.
    """
    if max_rows is None:
        return among
    if not source.has_known_rows:
        among = among or RowSelection()
        limits = [limit for limit in (max_rows, among.max_rows) if limit is not None]
        return replace(among, max_rows=min(limits))
    mask = np.ones(source.num_rows or 0, bool) if among is None else among.mask
    assert mask is not None
    rows = np.flatnonzero(mask)
    groups = None
    if source.row_groups is not None:
        sizes = [size for file in source.row_groups for size in file]
        groups = np.repeat(np.arange(len(sizes)), sizes)[rows]
    sample = np.zeros(len(mask), bool)
    sample[even_sample(rows, max_rows, groups)] = True
    return replace(among or RowSelection(), mask=sample)
