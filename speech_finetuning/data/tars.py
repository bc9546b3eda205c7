"""Webdatasets: tar files, in which members of one name and several endings are a row.

Read here and not by `datasets` (5.2), which reads every member whole, whatever its size, and also
decodes those that no one asked for (.pth by torch.load, .npy, .json).
"""

import contextlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import datasets
import fsspec

from speech_finetuning.base.errors import UserError, one_line
from speech_finetuning.data.columns import (
    OpenedSplit,
    SpeechColumns,
    WantedColumns,
    find_columns,
)
from speech_finetuning.data.guessing import cell_at, nested_names
from speech_finetuning.data.listed import CLIP, ListedClip
from speech_finetuning.data.manifests import text_of
from speech_finetuning.data.tables import MAX_LINE_LENGTH

NUM_ROWS_TO_INSPECT = 5
MAX_AUDIO_IN_BYTES = 2**29
MAX_TEXT_IN_BYTES = MAX_LINE_LENGTH
# name/of/clip and ending, as in webdataset's own tariterators.py: up to the first dot of the file
MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
MAX_HEADER_IN_BYTES = 2**20
# How tarfile calls a block of zeros, and the end of the file.
ENDS_OF_A_TAR = ("EOFHeaderError", "EmptyHeaderError")
TYPES_OF_NAMES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
NO_TEXTS = ("json", "jsn", "pth", "pt", "npy", "npz", "pkl", "pickle", "mp", "msg", "cbor")


class CheckedHeader(tarfile.TarInfo):
    """A header as tarfile reads it (Python 3.11 to 3.13), which takes any that is damaged for the
    end of the tar, and reads names and attributes whole, of whatever size they say they are."""

    @classmethod
    def frombuf(cls, *args: Any, **settings: Any) -> "CheckedHeader":
        """Raises: tarfile.ReadError."""
        try:
            header = super().frombuf(*args, **settings)
        except tarfile.HeaderError as error:
            if type(error).__name__ in ENDS_OF_A_TAR:
                raise
            raise tarfile.ReadError(f"a damaged header ({one_line(error)})") from error
        if header.type in TYPES_OF_NAMES and header.size > MAX_HEADER_IN_BYTES:
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file of a row. data: None if it is larger than its bound, was not asked for, or is a link
    to another member."""

    ending: str
    size_in_bytes: int
    data: bytes | None
    is_link: bool = False


def open_tars(urls: list[str], wanted: WantedColumns, num_rows: int | None) -> OpenedSplit:
    """The rows of one split as {CLIP: ListedClip}, a shard for each tar.

    num_rows: if it is known. Raises: UserError for a wrong column.
    """
    found = endings_of_first_rows(urls[0])
    columns = find_columns([*found, *names_in_json(urls[0], found)], wanted, urls[0])
    is_in_json = columns.text is not None and ending_of(columns.text) != columns.text
    if (
        columns.text is not None
        and not is_in_json
        and columns.text.rpartition(".")[2].lower() in NO_TEXTS
    ):
        raise UserError(
            f"--text_column_name {columns.text}: is not a plain text. Found: {', '.join(found)}."
        )
    dataset = datasets.IterableDataset.from_generator(
        read_tars,
        gen_kwargs={"urls": urls, "columns": columns},
    )
    return OpenedSplit(dataset=dataset, columns=columns, num_rows=num_rows)


def endings_of_first_rows(url: str) -> list[str]:
    """Of a damaged tar those before the damage, which is a rejection when it is read.

    Raises: UserError if there are none.
    """
    found: dict[str, None] = {}
    try:
        for _, members in itertools.islice(read_members(url, {}), NUM_ROWS_TO_INSPECT):
            found |= dict.fromkeys(member.ending for member in members)
    except tarfile.ReadError as error:
        if not found:
            reason = one_line(error)
            raise UserError(f"{url}: damaged, or not a tar: {reason} Fetch it again.") from error
    return list(found)


def names_in_json(url: str, endings: list[str]) -> list[str]:
    """'json.text' and so on, of the JSON members of the first rows."""
    names: list[str] = []
    if "json" not in endings:
        return names
    bounds = {"json": MAX_TEXT_IN_BYTES}
    with contextlib.suppress(tarfile.ReadError):
        for _, members in itertools.islice(read_members(url, bounds), NUM_ROWS_TO_INSPECT):
            for member in members:
                with contextlib.suppress(ValueError, RecursionError):
                    value = json.loads(member.data or b"")
                    if isinstance(value, dict):
                        names += [f"json.{name}" for name in [*value, *nested_names(value)]]
    return list(dict.fromkeys(names))


def ending_of(column: str) -> str:
    """Of the member that a column is, or lies in."""
    return "json" if column.startswith("json.") else column


def read_tars(urls: list[str], columns: SpeechColumns) -> Iterator[dict[str, ListedClip]]:
    bounds = {columns.audio: MAX_AUDIO_IN_BYTES}
    for column in (columns.text, columns.prompt):
        if column is not None:
            bounds[ending_of(column)] = MAX_TEXT_IN_BYTES
    for url in urls:
        for name, members in read_members(url, bounds):
            yield {CLIP: clip_of(name, members, columns, bounds)}


def read_members(url: str, bounds: dict[str, int]) -> Iterator[tuple[str, list[Member]]]:
    """(name, its members) of each row in the order of the tar.

    bounds: the endings to read, and how many bytes of each at most.
    """
    # block_size 0: one request for the whole file, not one for each part of it.
    with (
        cast(Any, fsspec.open(url, "rb", block_size=0)) as file,
        tarfile.open(fileobj=file, mode="r|*", tarinfo=CheckedHeader) as tar,
    ):
        current = ""
        members: list[Member] = []
        for info in tar:
            cast(Any, tar).members = []  # a stream needs no list of what was read
            match = MEMBER.fullmatch(info.name)
            is_hidden = os.path.basename(info.name).startswith((".", "__"))
            is_link = info.islnk() or info.issym()
            if match is None or is_hidden or not (info.isreg() or is_link):
                continue
            name, ending = match.groups()
            if name != current and members:
                yield current, members
                members = []
            current = name
            data = None
            if not is_link and info.size <= bounds.get(ending, -1):
                content = tar.extractfile(info)
                assert content is not None  # of a regular file
                data = content.read()
            members.append(
                Member(ending=ending, size_in_bytes=info.size, data=data, is_link=is_link)
            )
        if members:
            yield current, members


def clip_of(
    name: str, members: list[Member], columns: SpeechColumns, bounds: dict[str, int]
) -> ListedClip:
    """A row of a tar. Anything unexpected becomes its `problem`, never a label."""
    found = {member.ending: member for member in members}
    path = f"{name}.{columns.audio}"
    if len(found) < len(members):
        endings = [member.ending for member in members]
        twice = next(ending for ending in endings if endings.count(ending) > 1)
        return ListedClip(place=path, problem=f"{name}.{twice} stands twice in the tar")
    for ending, bound in bounds.items():
        member = found.get(ending)
        if member is not None and member.is_link:
            problem = f"{name}.{ending}: a link, not a file. Write the tar with --hard-dereference"
            return ListedClip(place=path, problem=problem)
        if member is not None and member.data is None:
            problem = f"{name}.{ending}: {member.size_in_bytes:,} bytes, the limit is {bound:,}"
            return ListedClip(place=path, problem=problem)
    audio = found.get(columns.audio)
    texts: dict[str, str | None] = {}
    for column in filter(None, (columns.text, columns.prompt)):
        member = found.get(ending_of(column))
        try:
            texts[column] = None if member is None else text_in(cast(bytes, member.data), column)
        except (ValueError, RecursionError) as error:
            detail = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else one_line(error)
            return ListedClip(place=path, problem=f"{name}.{column}: {detail}")
    return ListedClip(
        place=path,
        audio=None if audio is None else {"bytes": audio.data, "path": path},
        text=texts.get(columns.text or ""),
        prompt=texts.get(columns.prompt or ""),
    )


def text_in(data: bytes, column: str) -> str | None:
    """The member's text, or of 'json.text' what its object calls text.

    Raises: ValueError, RecursionError.
    """
    if ending_of(column) == column:
        return data.decode("utf-8")
    value = json.loads(data.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return text_of(cell_at(value, column.partition(".")[2]))
