"""Every scored row, and the worst ones, as files."""

import json
from pathlib import Path
from typing import Any

import jiwer

from speech_finetuning.base.files import write_text
from speech_finetuning.scoring.metrics import word_error_rate


def write_predictions(folder: Path, prefix: str, rows: list[dict[str, Any]]) -> None:
    """predictions_<set>.jsonl with every row of an evaluation, and worst_<set>.txt with the worst 20, aligned."""
    for name in sorted({row["set"] for row in rows}):
        mine, label = [row for row in rows if row["set"] == name], f"{prefix}_{name}".rstrip("_")
        scored = [
            row | {"wer": word_error_rate(row)} for row in mine if "hits" in row
        ]  # the others: no reference
        names = (
            "id reference prediction wer substitutions deletions insertions duration set".split()
        )
        rest = [row for row in mine if "hits" not in row]
        lines = [{key: row[key] for key in names if key in row} for row in scored + rest]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(folder / f"predictions_{label}.jsonl", text)
        kinds = ("substitutions", "deletions", "insertions")
        if not scored:
            continue
        worst = sorted(scored, key=lambda row: -sum(row[kind] for kind in kinds))[:20]
        aligned = jiwer.process_words(*([row["pairs"][""][i] for row in worst] for i in (0, 1)))
        ids = "".join(
            f"{i + 1}: {row['id']}, WER {row['wer']:.0f} %\n" for i, row in enumerate(worst)
        )
        write_text(
            folder / f"worst_{label}.txt",
            f"{ids}\n{jiwer.visualize_alignment(aligned, show_measures=False)}",
        )
