"""How the text of a file is encoded: by its byte order mark, or what to convert it from."""

import codecs
import shlex
from pathlib import Path
from typing import BinaryIO

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.reading import open_address

WINDOWS = "CP1252"  # how Excel saves a plain "CSV" in western Europe; LATIN1 lacks its “ and €
BYTES_OF_A_LOOK = 2**16  # at a file whose encoding is not clear
MIN_SHARE_OF_UTF_32 = 0.9  # of characters with two NUL bytes: all but emoji
ASCII_MARKS = b'\n\t,;./"'
MIN_SHARE_OF_MARKS = 0.01  # of characters, in UTF-16
# The first that begins the file; UTF-32's begins with UTF-16's.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def open_bytes(path: str) -> BinaryIO:
    """path: of a local file, or an address."""
    return open_address(path).open() if "://" in path else open(path, "rb")


def detect_encoding(path: str) -> str:
    with open_bytes(path) as file:
        return encoding_of(file.read(4))


def encoding_of(beginning: bytes) -> str:
    """Of the byte order mark, else UTF-8."""
    for mark, encoding in BYTE_ORDER_MARKS:
        if beginning.startswith(mark):
            return encoding
    return "utf-8"


def encoding_without_mark(beginning: bytes) -> str | None:
    """UTF-16 or UTF-32 that no byte order mark tells, by its commas, dots and line ends, which a
    table in any alphabet has: in the other byte order they would be letters that hardly occur. None
    for others."""
    num_fours = len(beginning) // 4
    first, second, third, fourth = (beginning[place::4].count(0) for place in range(4))
    if num_fours and min(third, fourth) >= MIN_SHARE_OF_UTF_32 * num_fours:
        return "UTF-32LE"
    if num_fours and min(first, second) >= MIN_SHARE_OF_UTF_32 * num_fours:
        return "UTF-32BE"
    pairs = list(zip(beginning[::2], beginning[1::2], strict=False))
    low_first = sum(high == 0 and low in ASCII_MARKS for low, high in pairs)
    high_first = sum(high == 0 and low in ASCII_MARKS for high, low in pairs)
    fewest = max(3, MIN_SHARE_OF_MARKS * len(pairs))
    if low_first >= fewest and low_first > 4 * high_first:
        return "UTF-16LE"
    if high_first >= fewest and high_first > 4 * low_first:
        return "UTF-16BE"
    return None


def not_utf8(path: str) -> UserError:
    """What a text is converted from that has no byte order mark and is not UTF-8."""
    with open_bytes(path) as file:
        encoding = encoding_without_mark(file.read(BYTES_OF_A_LOOK))
    if encoding is not None:
        return wrong_encoding(path, 1, f"is {encoding} without a byte order mark", encoding)
    return wrong_encoding(path, first_line_not_utf8(path), "is not UTF-8", WINDOWS)


def with_nul_bytes(path: str, line: int) -> UserError:
    """NUL bytes are UTF-8, but no text: ASCII in UTF-16, or what a crash left of a file."""
    with open_bytes(path) as file:
        encoding = encoding_without_mark(file.read(BYTES_OF_A_LOOK))
    if encoding is not None:
        return wrong_encoding(path, 1, f"is {encoding} without a byte order mark", encoding)
    return UserError(
        f"{path}, line {line}: contains NUL bytes, which no text has: the file is damaged, or no "
        "table. Fetch or save it again."
    )


def first_line_not_utf8(path: str) -> int:
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def wrong_encoding(path: str, line: int, found: str, likely: str) -> UserError:
    name = Path(path).name
    source = name if "://" in path else path
    return UserError(
        f'{path}, line {line}: {found}. In Excel, save it as "CSV UTF-8". Or convert it from the '
        f"encoding that it was saved in, and put the new file in its place: iconv -f {likely} -t UTF-8 "
        f"{shlex.quote(source)} > {shlex.quote(f'new-{name}')}"
    )
