"""Files that are whole or not there, and texts without tokens and local paths."""

import json
import logging
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from speech_finetuning.base.errors import one_line

logger = logging.getLogger(__name__)


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is either the old or the new one, never half of it."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(
        json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8"
    )
    unfinished.replace(path)


def write_text(path: Path, text: str, mode: str = "w") -> None:
    """Writes or (mode "a") appends. What is only for reading later must not end a run: a full disk is a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        logger.warning("%s could not be written: %s", path, one_line(error))


def redacted(text: str) -> str:
    """The text without anything that looks like a token or like user:password@."""
    return re.sub(r"hf_\w{8,}|(?<=://)[^/\s@]+:[^/\s@]+(?=@)", "REDACTED", text)


def without_folders(text: str) -> str:
    """The text with the last part only of every absolute path, for what is uploaded; addresses stay."""
    return re.sub(r"(?<![\w:/.])/(?:[\w.@+~-]+/)+|(?<=\d/)/(?:[\w.@+~-]+/)+", "", redacted(text))


# Overrides of the writing direction, which make a text look like another one.
DIRECTION_MARKS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def is_control(character: str) -> bool:
    """Whether a terminal or an editor might obey the character instead of showing it."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or (
        character in DIRECTION_MARKS
    )


def printable(text: str) -> str:
    """Foreign text for a terminal or a text file: one line, control characters as \\x1b or \\u202e."""
    if text.isprintable():  # all but a few
        return text
    return "".join(
        character.encode("unicode_escape").decode() if is_control(character) else character
        for character in text
    )


def json_line(value: Any) -> str:
    """One line of a .jsonl file, in letters of every alphabet; control characters are escaped, and
    a reader gets them back."""
    text = json.dumps(value, ensure_ascii=False)
    if not text.isprintable():
        text = "".join(
            f"\\u{ord(character):04x}" if is_control(character) else character for character in text
        )
    return f"{text}\n"
