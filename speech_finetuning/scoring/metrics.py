"""Word and character error rates that cannot flatter."""

import math
import unicodedata
import zlib
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import jiwer
import numpy as np
import transformers
from transformers.models.whisper.english_normalizer import (
    BasicTextNormalizer,
    EnglishTextNormalizer,
)


def collapse_spaces(text: str) -> str:
    """jiwer separates words at plain spaces only, so every kind of white space becomes one."""
    return " ".join(text.split())


def clean_symbols(text: str) -> str:
    """transformers' remove_symbols without its loss: category M (vowel signs, tone marks) stays."""
    normalized = unicodedata.normalize("NFKC", text)
    return "".join(
        " " if unicodedata.category(character)[0] in "SP" else character for character in normalized
    )


def text_normalizers(
    language: str | None, do_normalize: bool, tokenizer: transformers.WhisperTokenizer
) -> dict[str, Callable[[str], str]]:
    """The readings of a text by the suffix of their metrics: as written, Whisper's normaliser, its basic one with
    marks kept; and without suffix the leading one."""
    keep_marks = BasicTextNormalizer()
    keep_marks.clean = clean_symbols
    is_english = language in (None, "en")
    english = (
        EnglishTextNormalizer(tokenizer.english_spelling_normalizer or {}) if is_english else None
    )
    readings = {
        "_ortho": collapse_spaces,
        "_norm": english or BasicTextNormalizer(),
        "_norm_marks": keep_marks,
    }
    return {"": readings["_norm" if do_normalize else "_ortho"], **readings}


class SpeechErrors(evaluate.Metric):
    """Word and character errors of a corpus by jiwer, as an `evaluate` metric that needs no network: rates in percent,
    counts of words, and the counts of each row."""

    def _info(self) -> evaluate.MetricInfo:
        texts = {name: datasets.Value("string") for name in ("predictions", "references")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(texts))

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        aligned = [
            jiwer.process_words([said], [heard])
            for said, heard in zip(references, predictions, strict=True)
        ]
        names = ("substitutions", "deletions", "insertions", "hits")
        rows = [{name: getattr(words, name) for name in names} for words in aligned]
        counts = {name: sum(row[name] for row in rows) for name in names}
        rates = {"wer": word_error_rate(counts), "cer": 100 * jiwer.cer(references, predictions)}
        return {**rates, **counts, "rows": rows}


def word_error_rate(counts: dict[str, int]) -> float:
    """WER in percent from the four counts of a row with a reference."""
    errors = counts["substitutions"] + counts["deletions"] + counts["insertions"]
    return 100 * (errors / (counts["substitutions"] + counts["deletions"] + counts["hits"]))


def has_loop(text: bytes, seconds: float) -> bool:
    """Whether what stands for some 30 s compresses better than 2.4 to 1: Whisper's own test for repetition
    (openai/whisper, transcribe.py), which looks at windows as well: any long text compresses."""
    size = max(1, math.ceil(len(text) / math.ceil(seconds / 30)))
    parts = (text[start : start + size] for start in range(0, len(text), size))
    return any(len(part) > 2.4 * len(zlib.compress(part)) for part in parts)


def bootstrap_interval(rows: list[dict[str, int]], num_draws: int = 1_000) -> tuple[float, float]:
    """95 % interval of the WER in percent: rows drawn with replacement, seeded (Bisani and Ney, ICASSP 2004)."""
    table, generator = np.array([list(row.values()) for row in rows]), np.random.default_rng(0)
    draws = (
        table[generator.integers(len(table), size=len(table))].sum(axis=0) for _ in range(num_draws)
    )
    low, high = np.percentile(
        [word_error_rate(dict(zip(rows[0], draw, strict=True))) for draw in draws], [2.5, 97.5]
    )
    return float(low), float(high)
