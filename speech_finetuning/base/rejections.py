"""Rows that cannot be used: the reason, the counts, the list in rejected.jsonl."""

import contextlib
import json
from collections import Counter
from pathlib import Path

from speech_finetuning.base.files import json_line, write_text

TRAIN = "train"
DATA_REPORT = "data report"
# Where nearly every row is rejected for one reason, what has probably happened.
REMEDIES = {
    "audio_empty": "Does --audio_column_name name the column with the audio?",
    "audio_missing": "Does --audio_column_name name the column with the paths? Relative paths "
    "start at the table's folder.",
    "audio_too_long": "Cut the recordings into utterances first; see --max_duration_in_seconds.",
    "audio_too_short": "See --min_duration_in_seconds.",
    "label_too_long": "Cut the recordings into shorter utterances first.",
    "text_empty": "Does --text_column_name name the column with the transcripts?",
}


class Rejection(Exception):
    """Why one row cannot be used.

    The stages raise it, Preprocessor returns it as a value, and the run counts and lists it.
    reason: a short name such as audio_too_long; detail: what was found; row: the row's id.
    num_rows: rows that it stands for: of a damaged file all that are left, as far as known.
    """

    def __init__(self, reason: str, detail: str = "", row: str = "", num_rows: int = 1) -> None:
        super().__init__(reason, detail, row, num_rows)
        self.reason = reason
        self.detail = detail
        self.row = row
        self.num_rows = num_rows


def describe_counts(counts: Counter) -> str:
    """'3 text_empty, 1 audio_too_long', the most frequent first; 'none' if there are none."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) or "none"


def remedy_for(counts: Counter) -> str:
    """' What to look at.' where most rows are rejected for one reason; "" if there is no advice."""
    remedy = REMEDIES.get(counts.most_common(1)[0][0]) if counts else None
    return "" if remedy is None else f" {remedy}"


def rejection_lines(split: str, rejections: list[Rejection]) -> str:
    """As rejected.jsonl has them."""
    lines = []
    for rejection in rejections:
        line = {
            "split": split,
            "row": rejection.row,
            "reason": rejection.reason,
            "detail": rejection.detail,
        }
        lines.append(json_line(line))
    return "".join(lines)


def list_rejections(output_dir: Path, split: str, rejections: list[Rejection]) -> None:
    """Appends rejected rows to rejected.jsonl, one line each; without any, it stays.

    split: where they were met: TRAIN, DATA_REPORT, or the scored split.
    """
    if rejections:
        write_text(output_dir / "rejected.jsonl", rejection_lines(split, rejections), mode="a")


def restart_listing(output_dir: Path, num_trained: int | None) -> None:
    """Takes out of rejected.jsonl what this start will meet, and list, again.

    num_trained: rejected training rows up to the checkpoint that the run goes on from, whose lines
    stay, as do those of its data report; None: it begins. Whether the rows of scored splits can be
    used by now, this start will say.
    """
    listing = output_dir / "rejected.jsonl"
    if not listing.is_file():
        return
    kept = []
    if num_trained is not None:
        with open(listing, encoding="utf-8", errors="replace") as file:
            for line in file:
                split = split_of(line)
                num_trained -= split == TRAIN
                if split == DATA_REPORT or (split == TRAIN and num_trained >= 0):
                    kept.append(line)
    if kept:
        write_text(listing, "".join(kept))
    else:
        listing.unlink()


def split_of(line: str) -> str | None:
    """None of a line that a kill has torn."""
    try:
        return json.loads(line)["split"]
    except (ValueError, TypeError, KeyError):
        return None


def list_new_rejections(output_dir: Path, split: str, rejections: list[Rejection]) -> None:
    """Appends the rejections whose rows rejected.jsonl does not list yet.

    Two scored splits may have rows in common.
    """
    listing = output_dir / "rejected.jsonl"
    listed: set[str] = set()
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # a kill may have torn the last line, anywhere
                listed.add(json.loads(line)["row"])
    news = [rejection for rejection in rejections if rejection.row not in listed]
    list_rejections(output_dir, split, news)
