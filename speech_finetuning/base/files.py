"""Files that are whole or not there, and texts without tokens and local paths."""

import json
import logging
import os
import re
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
