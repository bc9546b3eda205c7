"""Word and character error rates that cannot flatter, and what else is wrong with a transcript."""

import importlib.util
import math
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import evaluate
import jiwer
import numpy as np

# Whisper's own test for repetition (openai/whisper, transcribe.py, compression_ratio_threshold).
MAX_COMPRESSION_RATIO = 2.4
WINDOW_IN_SECONDS = 30
MIN_REPETITIONS = 4  # at the end of a transcript that was cut
MAX_REPEATED_CHARACTERS = 250  # far beyond: compression tells
INDICES_AT_ONCE = 20_000  # of rows that are drawn for an interval: a fraction of a megabyte


@dataclass(frozen=True, kw_only=True)
class WordCounts:
    """How the words of a prediction are aligned with those of its reference."""

    substitutions: int
    deletions: int
    insertions: int
    hits: int

    @property
    def num_errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def num_reference_words(self) -> int:
        return self.substitutions + self.deletions + self.hits

    @property
    def wer(self) -> float:
        """Word error rate in percent, of at least one word in the reference."""
        return 100 * (self.num_errors / self.num_reference_words)


def count_words(reference: str, prediction: str) -> WordCounts:
    """The counts of one row; words are separated by single spaces."""
    alignment = jiwer.process_words([reference], [prediction])
    return WordCounts(
        substitutions=alignment.substitutions,
        deletions=alignment.deletions,
        insertions=alignment.insertions,
        hits=alignment.hits,
    )


def total_counts(rows: list[WordCounts]) -> WordCounts:
    """The sums over all rows."""
    return WordCounts(
        substitutions=sum(row.substitutions for row in rows),
        deletions=sum(row.deletions for row in rows),
        insertions=sum(row.insertions for row in rows),
        hits=sum(row.hits for row in rows),
    )


class SpeechErrors(evaluate.Metric):
    """Word and character errors of a corpus by jiwer, as an `evaluate` metric without network.

    compute(references=[...], predictions=[...]) returns wer and cer in percent, `counts` of words
    (WordCounts), and the `rows` that they are the sum of. References must not be empty.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        )
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        rows = []
        for reference, prediction in zip(references, predictions, strict=True):
            rows.append(count_words(reference, prediction))
        counts = total_counts(rows)
        cer = 100 * jiwer.cer(references, predictions)
        return {"wer": counts.wer, "cer": cer, "counts": counts, "rows": rows}


def bootstrap_rates(errors: np.ndarray, units: np.ndarray, num_draws: int = 1_000) -> np.ndarray:
    """Error rates in percent of rows drawn with replacement, seeded: (num_draws,).

    errors, units: of each row, (num_rows,). Small sets are drawn many times at once: of 8 rows 1,000
    draws one by one took 6.9 ms of CPU time, and take 0.3 ms (numpy 2.4).
    """
    generator = np.random.default_rng(0)
    draws_at_once = max(1, INDICES_AT_ONCE // len(units))
    rates = []
    for first in range(0, num_draws, draws_at_once):
        size = (min(draws_at_once, num_draws - first), len(units))
        drawn = generator.integers(len(units), size=size)
        rates.append(100 * (errors[drawn].sum(axis=1) / units[drawn].sum(axis=1)))
    return np.concatenate(rates)


def bootstrap_interval(rows: list[WordCounts], num_draws: int = 1_000) -> tuple[float, float]:
    """95 % interval of the WER in percent: rows drawn with replacement, seeded.

    Source: Bisani and Ney, ICASSP 2004.
    """
    errors = np.array([row.num_errors for row in rows])
    words = np.array([row.num_reference_words for row in rows])
    low, high = np.percentile(bootstrap_rates(errors, words, num_draws), [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Change:
    """The change of an error rate between two models on the same rows, in points."""

    points: float
    low: float  # 95 % interval
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero; else other rows might have shown none."""
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        if not self.is_clear:
            return "no clear change"
        return "better" if self.points < 0 else "worse"


def paired_change(before: list[int], after: list[int], units: list[int]) -> Change | None:
    """The change and its interval, by paired bootstrap over utterances: both models are scored on
    the same draw of rows, so that hard and easy rows cancel out. None without rows.

    before, after: errors of each row; units: words or characters of its reference.
    Source: Bisani and Ney, ICASSP 2004; Koehn, EMNLP 2004.
    """
    if not units:
        return None
    differences = np.array(after) - np.array(before)
    lengths = np.array(units)
    low, high = np.percentile(bootstrap_rates(differences, lengths), [2.5, 97.5])
    points = 100 * (differences.sum() / lengths.sum())
    return Change(points=float(points), low=float(low), high=float(high))


class RowErrors(NamedTuple):
    """What was wrong in one row, and of how much."""

    wrong_words: int
    num_words: int
    wrong_characters: int
    num_characters: int


def count_row_errors(reference: str, prediction: str, counts: WordCounts) -> RowErrors:
    """counts: of the row's words, which are known already."""
    characters = jiwer.process_characters([reference], [prediction])
    wrong = characters.substitutions + characters.deletions
    return RowErrors(
        wrong_words=counts.num_errors,
        num_words=counts.num_reference_words,
        wrong_characters=wrong + characters.insertions,
        num_characters=characters.hits + wrong,
    )


def translation_scores(references: list[str], predictions: list[str]) -> tuple[float, float] | None:
    """Corpus BLEU and chrF, 0 to 100, of text as written; None unless sacrebleu is installed.

    Source: Papineni et al., ACL 2002; Popović, WMT 2015; Post, WMT 2018.
    """
    if not references or importlib.util.find_spec("sacrebleu") is None:
        return None
    import sacrebleu  # here, because it is optional

    bleu = sacrebleu.corpus_bleu(predictions, [references]).score
    return bleu, sacrebleu.corpus_chrf(predictions, [references]).score


def has_loop(text: str, seconds: float) -> bool:
    """Whether the transcript of some 30 s compresses better than 2.4 to 1, as repetitions do.

    Whisper looks at windows as well: any long text compresses.
    """
    encoded = text.encode("utf-8", errors="replace")
    num_windows = max(1, math.ceil(seconds / WINDOW_IN_SECONDS))
    size = max(1, math.ceil(len(encoded) / num_windows))
    for start in range(0, len(encoded), size):
        part = encoded[start : start + size]
        if len(part) > MAX_COMPRESSION_RATIO * len(zlib.compress(part)):
            return True
    return False


def ends_in_loop(text: str) -> bool:
    """Whether a text ends with the same characters four times over.

    For transcripts that were cut at the length limit: a dozen tokens of "aaaa" are too short for
    zlib, whose header alone has 11 bytes. Speech may end with "no no no no", but it ends.
    """
    text = f" {text}"  # the first of "la la la la" is a word like the others
    longest = min(len(text) // MIN_REPETITIONS, MAX_REPEATED_CHARACTERS)
    for length in range(1, longest + 1):
        unit = text[-length:]
        if text.endswith(unit * MIN_REPETITIONS):
            return True
    return False
