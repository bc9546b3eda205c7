"""What is odd about the rows of a data set together: outliers, duplicates, leaks into evaluation."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.oddities import find_oddities
from speech_finetuning.data.row_check import CheckedRow, mixed_words, oddities_of

# A rate of speech is odd if it lies so many robust deviations (of its logarithm) from the median,
# and is at least so many times as fast or slow.
RATE_DEVIATIONS = 4.0
RATE_FACTOR = 1.8
MAX_CLIPPED_SHARE = 0.001
MIN_PEAK = 0.001  # -60 dB of full scale
MAX_SILENT_SHARE = 0.6
MIN_SILENCE_IN_SECONDS = 2.0
STRAY_SHARE = 0.05  # what fewer rows have is not the habit of the data
MAX_EXAMPLES = 20


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A usable row that may be wrong. reasons: {short name: what was found}."""

    split: str
    row: CheckedRow
    reasons: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """`row` is the id, as --exclude_rows takes it."""
        return {
            "split": self.split,
            "row": self.row.id,
            "reasons": self.reasons,
            "seconds": round(self.row.seconds, 2),
            "text": self.row.text,
        }


@dataclass(kw_only=True)
class SplitCheck:
    """All rows of one split."""

    name: str
    is_trained: bool
    rows: list[CheckedRow] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    num_excluded: int = 0  # rows that --exclude_rows leaves out, which are not read
    # Rows of each speaker, where the rows that are read do not tell: those of parquet files.
    rows_of_speakers: Counter[str] | None = None

    def add(self, result: CheckedRow | Rejection) -> None:
        if isinstance(result, Rejection):
            self.rejections.append(result)
        else:
            self.rows.append(result)

    def num_rejected(self) -> int:
        """Rows, of which one rejection may stand for the rest of a damaged file."""
        return sum(each.num_rows for each in self.rejections)

    def reasons(self) -> Counter[str]:
        """Rejected rows by reason."""
        counts: Counter[str] = Counter()
        for each in self.rejections:
            counts[each.reason] += each.num_rows
        return counts

    def seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    def summary(self) -> dict[str, Any]:
        """Counts, hours, durations in s, sampling rates, rows of each speaker, reasons."""
        durations = [row.seconds for row in self.rows] or [0.0]
        low, middle, high = np.percentile(durations, [5, 50, 95])
        counts, edges = np.histogram(durations, bins=20)
        speakers = self.rows_of_speakers
        if speakers is None:
            speakers = Counter(row.speaker for row in self.rows if row.speaker is not None)
        return {
            "is_trained": self.is_trained,
            "num_rows": len(self.rows) + self.num_rejected() + self.num_excluded,
            "num_usable_rows": len(self.rows),
            "num_excluded_rows": self.num_excluded,
            "hours": self.seconds() / 3600,
            "duration_in_seconds": {
                "5 %": low,
                "median": middle,
                "95 %": high,
                "max": max(durations),
            },
            "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
            "sampling_rates_in_hz": dict(Counter(row.sampling_rate for row in self.rows)),
            "num_speakers": len(speakers),
            "rows_of_speakers": dict(speakers.most_common(MAX_EXAMPLES)),
            "rejected": dict(self.reasons().most_common()),
        }


# ---- suspects ----
def find_suspects(
    splits: list[SplitCheck], misfits: dict[str, dict[str, str]] | None = None
) -> list[Suspect]:
    """Of all splits, in the order of the rows. misfits: {id: reasons} that a model has found."""
    rows = [row for split in splits for row in split.rows]
    kinds = [
        rate_outliers(rows),
        odd_characters(rows),
        audio_in_evaluation(splits),
        repeated_audio(splits),
        misfits or {},
    ]
    suspects = []
    for split in splits:
        for row in split.rows:
            reasons = of_sound(row)
            for found in kinds:
                reasons |= found.get(row.id, {})
            if reasons:
                suspects.append(Suspect(split=split.name, row=row, reasons=reasons))
    return suspects


def of_sound(row: CheckedRow) -> dict[str, str]:
    reasons = {}
    if row.peak < MIN_PEAK:
        return {"silent": f"no sample beyond {row.peak:.5f} of full scale"}
    if row.clipped_share > MAX_CLIPPED_SHARE:
        reasons["clipped"] = f"{100 * row.clipped_share:.1f} % of the samples are at full scale"
    silence_in_seconds = row.silent_share * row.seconds
    if row.silent_share > MAX_SILENT_SHARE and silence_in_seconds > MIN_SILENCE_IN_SECONDS:
        reasons["mostly_silent"] = f"{silence_in_seconds:.1f} of {row.seconds:.1f} s"
    return reasons


def rate_outliers(rows: list[CheckedRow]) -> dict[str, dict[str, str]]:
    """By id: rows whose text is far too long or too short for their sound."""
    rates = {row.id: row.letters_per_second() for row in rows if row.peak >= MIN_PEAK}
    logarithms = [math.log(rate) for rate in rates.values() if rate > 0]
    if not logarithms:
        return {}
    middle = float(np.median(logarithms))
    # 1.4826: what makes the median deviation of a normal distribution its standard deviation.
    deviation = 1.4826 * float(np.median(np.abs(np.array(logarithms) - middle)))
    limit = max(RATE_DEVIATIONS * deviation, math.log(RATE_FACTOR))
    found = {}
    for row_id, rate in rates.items():
        distance = math.log(rate) - middle if rate > 0 else -math.inf
        if abs(distance) > limit:
            name = "too_much_text" if distance > 0 else "too_little_text"
            usual = math.exp(middle)
            found[row_id] = {name: f"{rate:.1f} letters a second, {usual:.1f} are usual"}
    return found


def odd_characters(rows: list[CheckedRow]) -> dict[str, dict[str, str]]:
    """By id: texts with what few others have."""
    num_with_digits = sum("digits" in oddities_of(row) for row in rows)
    reasons: dict[str, dict[str, str]] = {}
    for row in rows:
        found = {}
        if mixed := mixed_words(row.text):
            found["mixed_scripts"] = ", ".join(mixed[:3])
        digits = [word for word in row.text.split() if any(map(str.isdigit, word))]
        if digits and num_with_digits < STRAY_SHARE * len(rows):
            found["stray_digits"] = ", ".join(digits[:3])
        found |= find_oddities(row.written)
        if found:
            reasons[row.id] = found
    return reasons


def audio_in_evaluation(splits: list[SplitCheck]) -> dict[str, dict[str, str]]:
    """By id: training rows whose audio is scored too."""
    scored = {
        row.audio_hash: f"{split.name}: {row.id}"
        for split in splits
        if not split.is_trained
        for row in split.rows
    }
    return {
        row.id: {"audio_in_evaluation": scored[row.audio_hash]}
        for split in splits
        if split.is_trained
        for row in split.rows
        if row.audio_hash in scored
    }


def repeated_audio(splits: list[SplitCheck]) -> dict[str, dict[str, str]]:
    """By id: rows whose audio an earlier row of the same kind of split has; if their texts differ,
    the earlier one is suspect as well. A row that is listed twice has one id, and is no suspect:
    to leave it out would take both."""
    reasons: dict[str, dict[str, str]] = {}
    for is_trained in (True, False):
        first: dict[str, CheckedRow] = {}
        rows = [row for split in splits if split.is_trained == is_trained for row in split.rows]
        for row in rows:
            earlier = first.setdefault(row.audio_hash, row)
            if earlier.id == row.id:
                continue
            if earlier.text == row.text:
                reasons[row.id] = {"repeated_audio": earlier.id}
            else:
                reasons[row.id] = {"same_audio_other_text": earlier.id}
                reasons[earlier.id] = {"same_audio_other_text": row.id}
    return reasons


def num_listed_twice(rows: list[CheckedRow]) -> int:
    """Rows whose file and segment an earlier row has."""
    return len(rows) - len({row.id for row in rows})


# ---- texts ----
def text_overlap(splits: list[SplitCheck]) -> dict[str, Any]:
    """How many scored rows have a text that is trained on, with examples."""
    trained = {row.text.casefold() for split in splits if split.is_trained for row in split.rows}
    scored = [row for split in splits if not split.is_trained for row in split.rows]
    shared = [row.text for row in scored if row.text.casefold() in trained]
    return {
        "num_rows": len(shared),
        "share": len(shared) / len(scored) if scored else 0.0,
        "examples": list(dict.fromkeys(shared))[:MAX_EXAMPLES],
    }


def repeated_texts(rows: Iterable[CheckedRow]) -> dict[str, int]:
    """The texts that most rows have in common, with their counts."""
    counts = Counter(row.text for row in rows)
    return {text: count for text, count in counts.most_common(MAX_EXAMPLES) if count > 1}


def describe_characters(rows: list[CheckedRow]) -> dict[str, Any]:
    """Every character with its count and an example, the rarest last; and rows with oddities."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    oddities: Counter[str] = Counter()
    places: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        counts.update(row.text)
        for character in set(row.text):
            examples.setdefault(character, row.id)
        for name in oddities_of(row):
            oddities[name] += 1
            if len(places[name]) < MAX_EXAMPLES:
                places[name].append(row.id)
    return {
        "counts": dict(counts.most_common()),
        "first_rows": examples,
        "oddities": dict(oddities.most_common()),
        "rows_with_oddities": dict(places),
    }
