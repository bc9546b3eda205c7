"""Every scored row, and the worst ones, as files."""

from pathlib import Path
from typing import Any

import jiwer

from speech_finetuning.base.files import json_line, printable, write_text
from speech_finetuning.scoring.scorecard import ScoredRow

NUM_WORST_ROWS = 20


def write_predictions(output_dir: Path, role: str, rows: list[ScoredRow]) -> list[Path]:
    """predictions_<set>.jsonl with every row, worst_<set>.txt with the worst 20, aligned.

    Returns the paths of the first kind, one for each set.
    """
    paths = []
    for set_name in sorted({row.row.set_name for row in rows}):
        label = f"{role}_{set_name}" if set_name else role
        of_set = [row for row in rows if row.row.set_name == set_name]
        with_counts = [row for row in of_set if row.counts is not None]
        without_counts = [row for row in of_set if row.counts is None]
        lines = [as_json_line(row) for row in with_counts + without_counts]
        path = output_dir / f"predictions_{label}.jsonl"
        write_text(path, "".join(lines))
        paths.append(path)
        if with_counts:
            write_text(output_dir / f"worst_{label}.txt", describe_worst(with_counts))
    return paths


def as_json_line(row: ScoredRow) -> str:
    """One line of predictions_<set>.jsonl; rows without a reference have no error counts."""
    line: dict[str, Any] = {
        "id": row.row.id,
        "reference": row.row.reference,
        "prediction": row.prediction,
    }
    if row.counts is not None:
        line["wer"] = row.counts.wer
        line["substitutions"] = row.counts.substitutions
        line["deletions"] = row.counts.deletions
        line["insertions"] = row.counts.insertions
    line["duration"] = row.row.duration_in_seconds
    line["set"] = row.row.set_name
    return json_line(line)


def describe_worst(rows: list[ScoredRow]) -> str:
    """Of rows that all have a reference those with most errors, aligned word by word."""
    worst = sorted(rows, key=lambda row: -row.num_errors)[:NUM_WORST_ROWS]
    headings = []
    for number, row in enumerate(worst, 1):
        assert row.counts is not None
        headings.append(f"{number}: {printable(row.row.id)}, WER {row.counts.wer:.0f} %\n")
    aligned = jiwer.process_words(
        [printable(row.leading.reference) for row in worst],
        [printable(row.leading.prediction) for row in worst],
    )
    alignment = jiwer.visualize_alignment(aligned, show_measures=False)
    return f"{''.join(headings)}\n{alignment}"
