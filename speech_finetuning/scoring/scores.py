"""Generated ids to scores, and the table of them."""

import itertools
import logging
import sys
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import transformers

from speech_finetuning.data.text import IGNORED_LABEL
from speech_finetuning.scoring.metrics import (
    SpeechErrors,
    bootstrap_interval,
    collapse_spaces,
    has_loop,
    text_normalizers,
)

logger = logging.getLogger(__name__)


@dataclass
class Scorecard:
    """The trainer's compute_metrics: generated ids to error rates in percent, in total and for each of several sets.
    Rows are found by their index, so that rows that several processes scored twice count once."""

    tokenizer: transformers.WhisperTokenizer
    readings: dict[
        str, tuple[str | None, bool]
    ]  # set name to (language, whether normalised text leads)
    metric: SpeechErrors = field(default_factory=lambda: SpeechErrors(keep_in_memory=True))
    rows: dict[int, dict[str, Any]] = field(
        default_factory=dict
    )  # by index: id, set, reference, duration
    scored: list[dict[str, Any]] = field(
        default_factory=list
    )  # rows of the last call: and prediction, pairs, counts
    max_new_tokens: int = sys.maxsize

    def __post_init__(self) -> None:
        self.normalizers = {
            name: text_normalizers(*how, self.tokenizer) for name, how in self.readings.items()
        }

    def use(self, eval_set: datasets.Dataset) -> None:
        """Takes the references of a prepared evaluation set."""
        columns = eval_set.select_columns(["index", "set", "id", "text", "duration"])
        self.rows = {row.pop("index"): row | {"reference": row.pop("text")} for row in columns}

    def __call__(self, outputs: transformers.EvalPrediction) -> dict[str, float]:
        """outputs: predictions (ids (rows, n_tokens), loss sums (rows,), token counts (rows,)), label_ids indices."""
        place = {int(index): i for i, index in enumerate(outputs.label_ids)}
        once = [place[index] for index in sorted(place)]
        ids, loss_sums, token_counts = (values[once] for values in outputs.predictions)
        ids = np.where(ids == IGNORED_LABEL, self.tokenizer.pad_token_id, ids)
        # A long-form transcript, which has no loss, is not bounded by the limit of one window.
        lengths = (ids != self.tokenizer.pad_token_id).sum(axis=1) * (token_counts > 0)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        self.scored = []
        for index, text, length in zip(sorted(place), texts, lengths.tolist(), strict=True):
            row = self.rows[index] | {"prediction": text.strip(), "num_tokens": length}
            said_and_heard = (row["reference"], row["prediction"])
            row["pairs"] = {  # (reference, prediction) in each reading
                suffix: tuple(collapse_spaces(normalize(text)) for text in said_and_heard)
                for suffix, normalize in self.normalizers[row["set"]].items()
            }
            self.scored.append(row)
        metrics = self.rates(self.scored) | {
            "loss": float(loss_sums.sum() / max(1, token_counts.sum()))
        }
        for name in self.readings if len(self.readings) > 1 else ():
            if rows := [row for row in self.scored if row["set"] == name]:
                metrics |= {f"{name}_{key}": value for key, value in self.rates(rows).items()}
        return metrics

    def rates(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """wer_*, cer_* for each reading; for the leading one wer, cer, counts, and the WER's 95 % interval."""
        metrics = {
            "num_rows": len(rows),
            "empty_references": sum(not row["pairs"][""][0] for row in rows),
        }
        if metrics["empty_references"]:
            logger.warning(
                "%d of %d rows have no reference: not scored.",
                metrics["empty_references"],
                len(rows),
            )
        for suffix in rows[0]["pairs"]:
            kept = [row for row in rows if row["pairs"][suffix][0]]
            if not kept:
                continue
            references, predictions = (
                list(texts) for texts in zip(*(r["pairs"][suffix] for r in kept), strict=True)
            )
            errors = self.metric.compute(references=references, predictions=predictions)
            counts = errors.pop("rows")
            metrics |= {f"wer{suffix}": errors.pop("wer"), f"cer{suffix}": errors.pop("cer")}
            if not suffix:
                metrics |= errors | dict(
                    zip(("wer_low", "wer_high"), bootstrap_interval(counts), strict=True)
                )
                for row, count in zip(kept, counts, strict=True):
                    row |= count
        shares = {
            "empty_outputs": [not row["prediction"] for row in rows],
            "repetition_loops": [
                has_loop(row["prediction"].encode(), row["duration"]) for row in rows
            ],
            "cut_outputs": [row["num_tokens"] >= self.max_new_tokens for row in rows],
        }
        return metrics | {name: 100 * sum(values) / len(rows) for name, values in shares.items()}


def score_table(metrics: dict[str, float], names: list[str]) -> str:
    """Before, after and test side by side, in total and for each named set; at the end of a line the WER's 95 %
    interval and the changes against the untouched checkpoint."""
    after = "after training" if "train_rows" in metrics else "as it is"
    titles = {
        "zero_shot": "before training",
        "eval": after,
        "test": "test split",
        "predict": "predicted",
    }
    lines = [f"{'':24s}     WER      CER   subst   delet  insert    rows   loops %   95 % interval"]
    for (role, title), name in itertools.product(titles.items(), ["", *names]):
        prefix = f"{role}_{name}".rstrip("_")
        if f"{prefix}_wer" not in metrics:
            continue
        wer, cer, low, high = (
            metrics[f"{prefix}_{kind}"] for kind in ("wer", "cer", "wer_low", "wer_high")
        )
        kinds = ("substitutions", "deletions", "insertions", "num_rows")
        counts = "".join(f"{int(metrics[f'{prefix}_{kind}']):8d}" for kind in kinds)
        before = [
            metrics.get(f"{prefix}_{kind}".replace("eval", "zero_shot", 1))
            for kind in ("wer", "cer")
        ]
        pairs = zip((wer, cer), before, ("WER", "CER"), strict=True) if role == "eval" else ()
        change = "".join(
            f"  {kind} {100 * (now / then - 1):+.1f} %" for now, then, kind in pairs if then
        )
        loops = metrics[f"{prefix}_repetition_loops"]
        figures = f"{wer:8.2f} {cer:8.2f}{counts}{loops:10.1f}   {low:.2f} to {high:.2f}{change}"
        lines.append(f"{f'{title} {name}':24s}{figures}")
    return "\n".join(lines)


def last_scores(history: list[dict[str, Any]], step: int | None = None) -> dict[str, float]:
    """The metrics of the last evaluation (of that step) in the trainer's log, if there was one."""
    entries = (
        entry
        for entry in reversed(history)
        if "eval_loss" in entry and step in (None, entry["step"])
    )
    return {name: value for name, value in next(entries, {}).items() if name.startswith("eval_")}
