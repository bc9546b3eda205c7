"""Text tables: CSV, TSV, JSON lines. A line is a row; one that cannot be read costs no other."""

import contextlib
import csv
import io
import json
import logging
import re
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import printable
from speech_finetuning.data.addresses import suffix_of_address
from speech_finetuning.data.encodings import (
    detect_encoding,
    encoding_of,
    not_utf8,
    open_bytes,
    with_nul_bytes,
)

logger = logging.getLogger(__name__)

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
MAX_LINE_LENGTH = 2**20  # in characters; no transcript of 30 s is as long
MAX_JSON_IN_BYTES = 2**29  # of an array, which is read whole
MAX_LINES_OF_ONE_ROW = 20  # where quotation marks enclose line breaks
EXCEL_SEPARATOR = re.compile(r"\"?sep=.\"?\s*", re.IGNORECASE)
FILE_NAME = re.compile(r"\.\w{2,5}\s*$")
DELIMITERS = (",", ";", "\t", "|")
# As programs write CSV, the standard (RFC 4180) first: a space after each comma; \" for a quotation
# mark (Spark, MySQL).
DIALECTS: tuple[dict[str, Any], ...] = (
    {},
    {"skipinitialspace": True},
    {"escapechar": "\\", "doublequote": False},
)


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """cells: {column: value}, none if there is a problem. line: of the file, from 1."""

    line: int
    cells: dict[str, Any]
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class TableFormat:
    """How a file is written. names: its columns; empty for JSON, whose rows name them. is_array: of
    one JSON value over the whole file, not one a line."""

    is_array: bool = False
    delimiter: str = ","
    has_quotes: bool = True
    has_header: bool = True
    names: tuple[str, ...] = ()


def is_json(path: str) -> bool:
    return suffix_of(path) in (".jsonl", ".json")


def suffix_of(path: str) -> str:
    return suffix_of_address(path) if "://" in path else Path(path).suffix.lower()


def read_table(path: str, form: TableFormat) -> Iterator[TableRow]:
    """The rows in the order of the file. Raises: UserError if the file is not UTF-8 (or UTF-16)."""
    if form.is_array:
        for number, value in enumerate(read_json_rows(path), start=1):
            yield json_row(number, value)
        return
    with closing(numbered_lines(path)) as lines:
        if is_json(path):
            for number, line in lines:
                if line.strip():
                    yield parse_json_line(number, line)
            return
        yield from read_csv(lines, form)


# ---- text ----
def numbered_lines(path: str) -> Generator[tuple[int, str], None, None]:
    """(number from 1, line); of one beyond MAX_LINE_LENGTH only its beginning, which is longer."""
    encoding = detect_encoding(path)
    try:
        with io.TextIOWrapper(open_bytes(path), encoding=encoding) as file:
            number = 0
            while line := file.readline(MAX_LINE_LENGTH + 1):
                number += 1
                if "\0" in line:
                    raise with_nul_bytes(path, number)
                if len(line) > MAX_LINE_LENGTH:
                    skip_rest_of_line(file, line)
                yield number, line
    except UnicodeDecodeError as error:
        if encoding.startswith("utf-8"):
            raise not_utf8(path) from error
        raise UserError(f"{path}: begins as {encoding.upper()} text, but is damaged.") from error


def skip_rest_of_line(file: TextIO, line: str) -> None:
    while line and not line.endswith("\n"):
        line = file.readline(MAX_LINE_LENGTH)


# ---- JSON lines ----
def parse_json_line(number: int, line: str) -> TableRow:
    problem = None
    value = None
    if len(line) > MAX_LINE_LENGTH:
        problem = too_long()
    else:
        try:
            # A comma at the end: of an array cut into lines.
            value = json.loads(line.rstrip().removesuffix(","), object_pairs_hook=without_doubles)
        except (ValueError, RecursionError) as error:
            problem = f"no JSON: {error}"
    if problem is not None:
        return TableRow(line=number, cells={}, problem=problem)
    return json_row(number, value)


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises: ValueError for a key that stands twice: which one is meant?"""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {printable(twice)} stands twice in one object")
    return found


def json_row(number: int, value: Any) -> TableRow:
    if not isinstance(value, dict):
        problem = f"expected a JSON object, found {type(value).__name__}"
        return TableRow(line=number, cells={}, problem=problem)
    return TableRow(line=number, cells=cast(dict[str, Any], value))


def is_json_array(first: str, second: str) -> bool:
    """Whether a file with these lines is one JSON value, not one a line."""
    if re.match(r"\s*\[\s*(\{|$)", first) or first.strip() == "{":
        return True
    if second:
        return False
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(first)
        return isinstance(value, dict) and len(value) == 1 and bool(rows_within(value))
    return False


def rows_within(value: Any) -> list[Any] | None:
    """An array of objects, by itself or as the only one in an object, as {"data": [...]}."""
    if isinstance(value, list):
        return value
    arrays = [
        inner
        for inner in (value.values() if isinstance(value, dict) else ())
        if isinstance(inner, list) and inner and all(isinstance(row, dict) for row in inner)
    ]
    return arrays[0] if len(arrays) == 1 else None


def read_json_rows(path: str) -> list[Any]:
    """Raises: UserError for a file that is too large, no JSON, or without rows."""
    name = Path(path).name
    with open_bytes(path) as file:
        data = file.read(MAX_JSON_IN_BYTES + 1)
    remedy = f"Write one object a line: jq -c '.[]' '{name}' > '{Path(path).stem}.jsonl'"
    if len(data) > MAX_JSON_IN_BYTES:
        raise UserError(
            f"{path}: one JSON value of more than {MAX_JSON_IN_BYTES:,} bytes. {remedy}"
        )
    try:
        text = data.decode(encoding_of(data))
        rows = rows_within(json.loads(text, object_pairs_hook=without_doubles))
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: no JSON: {error}. Mend it there, or write one object a line into "
            f"{Path(path).stem}.jsonl."
        ) from None
    if rows is None:
        raise UserError(
            f"{path}: expected an array of objects, or one object a line, one for each clip."
        )
    return rows


def too_long() -> str:
    return f"longer than {MAX_LINE_LENGTH:,} characters"


# ---- CSV and TSV ----
def split_line(line: str, form: TableFormat) -> list[str] | None:
    """The cells; None if quotation marks do not match."""
    if not form.has_quotes:
        return line.rstrip("\r\n").split(form.delimiter)
    first = None
    for dialect in DIALECTS:
        try:
            rows = list(csv.reader([line], delimiter=form.delimiter, strict=True, **dialect))
        except csv.Error:
            continue
        cells = rows[0] if rows else []
        if len(cells) <= len(form.names):
            return cells
        if first is None:
            first = cells
    return first


def read_csv(lines: Iterator[tuple[int, str]], form: TableFormat) -> Iterator[TableRow]:
    """The rows after the header. Blank lines are none."""
    ahead: deque[tuple[int, str]] = deque()
    is_header = form.has_header
    while True:
        look_ahead(ahead, lines, 1)
        if not ahead:
            return
        number, line = ahead.popleft()
        if not is_filled(number, line):
            continue
        if is_header:
            is_header = False
            continue
        if len(line) > MAX_LINE_LENGTH:
            yield TableRow(line=number, cells={}, problem=too_long())
            continue
        cells = split_line(line, form)
        if cells is None:
            cells = split_quoted_lines(line, ahead, lines, form)
        look_ahead(ahead, lines, 1)
        if cells and ahead and goes_on(cells, ahead[0][1], form):
            problem = (
                f"a cell goes on in line {ahead[0][0]}. Put cells that contain line breaks in "
                "quotation marks"
            )
            yield TableRow(line=number, cells={}, problem=problem)
            continue
        yield csv_row(number, cells, form)


def is_filled(number: int, line: str) -> bool:
    """Whether a line is a header or a row: not blank, nor the `sep=;` that Excel takes above both."""
    return bool(line.strip()) and not (number == 1 and EXCEL_SEPARATOR.fullmatch(line))


def goes_on(cells: list[str], following: str, form: TableFormat) -> bool:
    """Whether a line break within the row has torn it in two, of which the first would be taken for
    all that is said. Seen where rows begin with the name of a file, and the next line does not."""
    rest = split_line(following, form)
    if not rest or not any(rest) or not FILE_NAME.search(cells[0]) or FILE_NAME.search(rest[0]):
        return False
    return len(cells) + len(rest) - 1 == len(form.names)


def look_ahead(
    ahead: deque[tuple[int, str]], lines: Iterator[tuple[int, str]], num_lines: int
) -> None:
    """Fills `ahead` up to num_lines, where the file has as many."""
    while len(ahead) < num_lines:
        item = next(lines, None)
        if item is None:
            return
        ahead.append(item)


def split_quoted_lines(
    line: str,
    ahead: deque[tuple[int, str]],
    lines: Iterator[tuple[int, str]],
    form: TableFormat,
) -> list[str] | None:
    """The cells of a row whose quotation marks enclose line breaks; its other lines leave `ahead`.

    None, and nothing is taken, if the marks are not closed before a line that is a row in itself:
    then one is missing, and what follows would become part of a transcript.
    """
    joined = line
    for num_lines in range(1, MAX_LINES_OF_ONE_ROW):
        look_ahead(ahead, lines, num_lines)
        if len(ahead) < num_lines:
            return None
        next_line = ahead[num_lines - 1][1]
        joined += next_line
        alone = split_line(next_line, form)
        is_row = alone is not None and len(alone) >= len(form.names)
        if is_row or len(joined) > MAX_LINE_LENGTH:
            return None
        cells = split_line(joined, form)
        if cells is not None and len(cells) == len(form.names):
            for _ in range(num_lines):
                ahead.popleft()
            return cells
    return None


def csv_row(number: int, cells: list[str] | None, form: TableFormat) -> TableRow:
    if cells is None:
        problem = 'a quotation mark is not closed. Write "" for one within a cell'
        return TableRow(line=number, cells={}, problem=problem)
    if any(cell.strip() for cell in cells[len(form.names) :]):
        if form.has_quotes:
            remedy = f"Put cells that contain '{form.delimiter}' in quotation marks"
        else:
            remedy = "The transcript contains the character that separates the columns"
        problem = f"{len(cells)} cells, but the table has {len(form.names)} columns. {remedy}"
        return TableRow(line=number, cells={}, problem=problem)
    return TableRow(line=number, cells=dict(zip(form.names, cells, strict=False)))


# ---- the format ----
def detect_format(
    path: str,
    is_header: Callable[[list[str]], bool],
    names_without_header: Callable[[list[str]], tuple[str, ...]],
) -> TableFormat:
    """The delimiter and the columns, judged by the first line.

    is_header: whether cells are names of columns that will be read.
    names_without_header: names for the cells of a first row; empty if they are no row either.
    """
    with closing(numbered_lines(path)) as lines:
        filled = (line for number, line in lines if is_filled(number, line))
        first = next(filled, "")
        second = next(filled, "") if is_json(path) else ""
    if is_json(path):
        return TableFormat(is_array=is_json_array(first, second))
    is_tsv = suffix_of(path) == ".tsv"
    usual = "\t" if is_tsv else ","
    forms = []
    for delimiter in sorted(DELIMITERS, key=lambda candidate: candidate != usual):
        # Quotation marks mean nothing in Common Voice's TSV, nor in LJSpeech's lists.
        has_quotes = delimiter != "|" and not is_tsv
        form = TableFormat(delimiter=delimiter, has_quotes=has_quotes)
        names = tuple(cell.strip() for cell in split_line(first, form) or [])
        forms.append(TableFormat(delimiter=delimiter, has_quotes=has_quotes, names=names))
    for form in forms:
        if is_header(list(form.names)):
            log_delimiter(path, form, usual)
            return form
    for form in forms:
        if names := names_without_header(list(form.names)):
            log_delimiter(path, form, usual)
            logger.warning("%s has no header; its columns are: %s.", path, ", ".join(names))
            return TableFormat(
                delimiter=form.delimiter,
                has_quotes=form.has_quotes,
                has_header=False,
                names=names,
            )
    return max(forms, key=lambda form: len(form.names))


def log_delimiter(path: str, form: TableFormat, usual: str) -> None:
    if form.delimiter != usual:
        shown = "tabs" if form.delimiter == "\t" else f"'{form.delimiter}'"
        logger.info("%s: its columns are separated by %s.", path, shown)
