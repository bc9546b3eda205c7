"""Files that are whole or not there, and texts without tokens and local paths."""

import json
import logging
import math
import os
import re
import shlex
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from speech_finetuning.base.errors import one_line

logger = logging.getLogger(__name__)

TOKEN = r"hf_\w{8,}"
USER_AND_PASSWORD = r"(?<=://)[^/\s@]+:[^/\s@]+(?=@)"
FOLDERS = r"/(?:[\w.@+~-]+/)+"
LONGEST_NAME = 255  # in bytes, on all usual file systems
LONGEST_PATH = 4096
# Overrides of the writing direction, which make a text look like another one.
DIRECTION_MARKS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def replace_text(path: Path, text: str) -> None:
    """Replaces a file, whose folder is made if need be: it holds the old text or the new, never
    half. What is no character becomes its escape. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replaces a file by `value` as JSON, as `replace_text`. Raises: OSError."""
    replace_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str, mode: str = "w") -> None:
    """Writes (mode "w", as `replace_text`) or appends (mode "a") a text for later reading.

    Such a file must not end a run: if it cannot be written, say on a full disk, that is a warning.
    """
    try:
        if mode == "w":
            replace_text(path, text)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, mode, encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        logger.warning("%s could not be written: %s", path, one_line(error))


def is_too_long(name: str) -> bool:
    """Whether no file system takes it for a path: Path raises an error of such a name, where it
    says that others do not exist."""
    parts = [os.fsencode(part) for part in name.split("/")]
    return len(os.fsencode(name)) > LONGEST_PATH or max(map(len, parts)) > LONGEST_NAME


def lies_among_data(dataset_name: str | None, output_dir: str | Path) -> bool:
    """Whether the output would lie in the folder of the data, where the next start would take a
    run's own files for data; or right beside its table, whose README would be replaced."""
    if not dataset_name or not os.path.exists(dataset_name):  # Path's raises of a long name
        return False
    data = Path(dataset_name).resolve()
    output = Path(output_dir).resolve()
    if data.is_file():
        return output == data.parent
    return output.is_relative_to(data)


def redacted(text: str) -> str:
    """The text without anything that looks like a token or like user:password@."""
    return re.sub(f"{TOKEN}|{USER_AND_PASSWORD}", "REDACTED", text)


def command_line(argv: Iterable[str]) -> str:
    """What was typed, without tokens: argv are the words after the script's name."""
    return redacted(shlex.join(["python", Path(sys.argv[0]).name, *argv]))


def without_folders(text: str) -> str:
    """The text with only the last part of every absolute path, for uploads; addresses stay."""
    # The second alternative is a path after a row's id, such as test/0/0//home/alice/x.ogg.
    return re.sub(rf"(?<![\w:/.]){FOLDERS}|(?<=\d/){FOLDERS}", "", redacted(text))


def is_control(character: str) -> bool:
    """Whether a terminal or an editor might obey the character instead of showing it."""
    category = unicodedata.category(character)
    return category in ("Cc", "Cs", "Zl", "Zp") or character in DIRECTION_MARKS


def printable(text: str) -> str:
    """Foreign text for a terminal or a text file: one line, with controls as \\x1b or \\u202e."""
    if text.isprintable():  # all but a few
        return text
    return "".join(
        character.encode("unicode_escape").decode() if is_control(character) else character
        for character in text
    )


def counted(number: int, noun: str, plural: str = "") -> str:
    """'1 row', '2,000 rows'; plural: of a noun that takes more than an s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {plural or noun + 's'}"


def finite_or_none(value: Any) -> Any:
    """The value, but None for a number that is not finite: JSON has no word for those."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def json_line(value: Any) -> str:
    """One line of a .jsonl file, in letters of every alphabet.

    Control characters are escaped, and a reader gets them back.
    """
    text = json.dumps(value, ensure_ascii=False)
    if not text.isprintable():
        text = "".join(
            f"\\u{ord(character):04x}" if is_control(character) else character for character in text
        )
    return f"{text}\n"
