"""Rows aligned with their references, unit by unit: what the report page shows and sums up."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import jiwer

from speech_finetuning.data.text import UNSPACED_LANGUAGES
from speech_finetuning.scoring.metrics import Change, WordCounts, paired_change
from speech_finetuning.scoring.normalization import read_text
from speech_finetuning.scoring.scorecard import Scorecard

WORD = "word"
CHARACTER = "character"  # of languages that are written without spaces
EQUAL = "="
SUBSTITUTE = "s"
DELETE = "d"
INSERT = "i"
LETTER_OF_JIWER = {"equal": EQUAL, "substitute": SUBSTITUTE, "delete": DELETE, "insert": INSERT}


@dataclass(frozen=True, kw_only=True)
class AlignedRow:
    """A scored row. Reference and prediction are as written; `read_` is the leading reading, which
    is what is counted."""

    index: int  # in the evaluation set
    id: str
    set_name: str
    group: str | None  # the speaker, say
    duration_in_seconds: float
    reference: str
    prediction: str
    read_reference: str
    read_prediction: str
    unit: str  # WORD or CHARACTER
    # Runs of units, [("=", 3), ("s", 1), ...]; None without a reference.
    operations: list[tuple[str, int]] | None

    @cached_property
    def counts(self) -> WordCounts | None:
        """Of units, which may be characters."""
        if self.operations is None:
            return None
        sums = Counter[str]()
        for kind, length in self.operations:
            sums[kind] += length
        return WordCounts(
            substitutions=sums[SUBSTITUTE],
            deletions=sums[DELETE],
            insertions=sums[INSERT],
            hits=sums[EQUAL],
        )


def split_units(text: str, unit: str) -> list[str]:
    """Words, or characters with the marks that are written on them."""
    if unit == WORD:
        return text.split()
    units: list[str] = []
    for character in text:
        if units and unicodedata.category(character).startswith("M"):
            units[-1] += character
        elif not character.isspace():
            units.append(character)
    return units


def align(pairs: list[tuple[str, str]], unit: str) -> list[list[tuple[str, int]] | None]:
    """Runs of operations for each (reference, prediction), by jiwer; None for an empty
    reference."""
    found: list[list[tuple[str, int]] | None] = [None] * len(pairs)
    references = []
    predictions = []
    places = []
    for place, (reference, prediction) in enumerate(pairs):
        units = split_units(reference, unit)
        if units:
            places.append(place)
            references.append(" ".join(units))
            predictions.append(" ".join(split_units(prediction, unit)))
    if not references:
        return found
    aligned = jiwer.process_words(references, predictions)
    for place, chunks in zip(places, aligned.alignments, strict=True):
        runs = []
        for chunk in chunks:
            num_reference = chunk.ref_end_idx - chunk.ref_start_idx
            num_predicted = chunk.hyp_end_idx - chunk.hyp_start_idx
            runs.append((LETTER_OF_JIWER[chunk.type], max(num_reference, num_predicted)))
        found[place] = runs
    return found


@dataclass(kw_only=True)
class CommonErrors:
    """How often each unit, or pair of units, was wrong."""

    substitutions: Counter[tuple[str, str]] = field(default_factory=Counter)
    deletions: Counter[str] = field(default_factory=Counter)
    insertions: Counter[str] = field(default_factory=Counter)


def count_common_errors(rows: Iterable[AlignedRow]) -> CommonErrors:
    """Over all rows that have a reference."""
    common = CommonErrors()
    for row in rows:
        if row.operations is None:
            continue
        reference = split_units(row.read_reference, row.unit)
        prediction = split_units(row.read_prediction, row.unit)
        first = 0
        second = 0
        for kind, length in row.operations:
            of_reference = reference[first : first + length]
            of_prediction = prediction[second : second + length]
            if kind == SUBSTITUTE:
                common.substitutions.update(zip(of_reference, of_prediction, strict=True))
            elif kind == DELETE:
                common.deletions.update(of_reference)
            elif kind == INSERT:
                common.insertions.update(of_prediction)
            first += 0 if kind == INSERT else length
            second += 0 if kind == DELETE else length
    return common


def unit_of_language(text_language: str) -> str:
    """What is counted in texts: words, or characters where words are not separated."""
    return CHARACTER if text_language in UNSPACED_LANGUAGES else WORD


def unit_of(scorecard: Scorecard, set_name: str) -> str:
    """What is counted in a set."""
    target = scorecard.targets.get(set_name)
    return WORD if target is None else unit_of_language(target.text_language)


def scored_rows(scorecard: Scorecard) -> list[AlignedRow]:
    """The rows of the last evaluation, aligned, in the order of the evaluation set."""
    units = [unit_of(scorecard, scored.row.set_name) for scored in scorecard.scored]
    pairs = [(scored.leading.reference, scored.leading.prediction) for scored in scorecard.scored]
    operations = align_in_units(pairs, units)
    rows = []
    for scored, unit, runs in zip(scorecard.scored, units, operations, strict=True):
        rows.append(
            AlignedRow(
                index=scored.index,
                id=scored.row.id,
                set_name=scored.row.set_name,
                group=scored.row.group,
                duration_in_seconds=scored.row.duration_in_seconds,
                reference=scored.row.reference,
                prediction=scored.prediction,
                read_reference=scored.leading.reference,
                read_prediction=scored.leading.prediction,
                unit=unit,
                operations=runs,
            )
        )
    return rows


def align_in_units(
    pairs: list[tuple[str, str]], units: list[str]
) -> list[list[tuple[str, int]] | None]:
    """As `align`, with a unit for each pair."""
    found: list[list[tuple[str, int]] | None] = [None] * len(pairs)
    for unit in set(units):
        places = [place for place, each in enumerate(units) if each == unit]
        aligned = align([pairs[place] for place in places], unit)
        for place, runs in zip(places, aligned, strict=True):
            found[place] = runs
    return found


def rows_of_files(paths: Iterable[Path], scorecard: Scorecard) -> list[AlignedRow]:
    """The rows of predictions_<set>.jsonl that an earlier start of the run has written, read in
    the leading reading of now. Raises: OSError, ValueError, KeyError."""
    lines = []
    for path in paths:
        lines += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = []
    for line in lines:
        set_name = line["set"]
        normalize = scorecard.normalizers[set_name][scorecard.leading[set_name]]
        pairs.append(
            (read_text(line["reference"], normalize), read_text(line["prediction"], normalize))
        )
    units = [unit_of(scorecard, line["set"]) for line in lines]
    operations = align_in_units(pairs, units)
    rows = []
    for line, pair, unit, runs in zip(lines, pairs, units, operations, strict=True):
        rows.append(
            AlignedRow(
                index=-1,
                id=line["id"],
                set_name=line["set"],
                group=None,
                duration_in_seconds=line["duration"],
                reference=line["reference"],
                prediction=line["prediction"],
                read_reference=pair[0],
                read_prediction=pair[1],
                unit=unit,
                operations=runs,
            )
        )
    return rows


def pair_rows(
    before: list[AlignedRow], after: list[AlignedRow]
) -> list[tuple[AlignedRow | None, AlignedRow]]:
    """Each row of `after` with its like in `before`: same set, id and reference; ids may repeat."""
    waiting: dict[tuple[str, str, str], list[AlignedRow]] = {}
    for row in reversed(before):
        waiting.setdefault((row.set_name, row.id, row.reference), []).append(row)
    pairs = []
    for row in after:
        alike = waiting.get((row.set_name, row.id, row.reference))
        pairs.append((alike.pop() if alike else None, row))
    return pairs


def change_between(before: list[AlignedRow], after: list[AlignedRow]) -> Change | None:
    """The change of the error rate from one evaluation to the other; None unless all rows that are
    scored are the same."""
    errors_before = []
    errors_after = []
    units = []
    for earlier, row in pair_rows(before, after):
        if row.counts is None:
            continue
        if earlier is None or earlier.counts is None:
            return None
        errors_before.append(earlier.counts.num_errors)
        errors_after.append(row.counts.num_errors)
        units.append(row.counts.num_reference_words)
    if len(units) != sum(row.counts is not None for row in before):
        return None
    return paired_change(errors_before, errors_after, units)
