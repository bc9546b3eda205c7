"""Rows that cannot be used: the reason, the counts, the list in rejected.jsonl."""

import contextlib
import json
from collections import Counter
from pathlib import Path

from speech_finetuning.base.files import write_text


class Rejection(Exception):
    """Why a row cannot be used. Raised by the stages, returned as a value by Preprocessor, listed by the run."""

    def __init__(self, reason: str, detail: str = "", row: str = "") -> None:
        super().__init__(reason, detail, row)
        self.reason, self.detail, self.row = reason, detail, row


def describe_counts(counts: Counter) -> str:
    """'3 text_empty, 1 audio_too_long', the commonest first."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) or "none"


def list_rejections(output_dir: Path, split: str, rejections: list[Rejection]) -> None:
    """Appends rejected rows to rejected.jsonl."""
    lines = [
        {"split": split, "row": item.row, "reason": item.reason, "detail": item.detail}
        for item in rejections
    ]
    if lines:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(output_dir / "rejected.jsonl", text, "a")


def list_new_rejections(output_dir: Path, split: str, rejections: list[Rejection]) -> None:
    """Appends those that rejected.jsonl does not list yet: a continued run prepares the same
    evaluation rows again."""
    listing = output_dir / "rejected.jsonl"
    listed: set[str] = set()
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a kill may have torn the last line
                listed.add(json.loads(line)["row"])
    news = [rejection for rejection in rejections if rejection.row not in listed]
    list_rejections(output_dir, split, news)
