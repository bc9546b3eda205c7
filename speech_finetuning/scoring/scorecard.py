"""Generated token ids to scores: the trainer's compute_metrics."""

import logging
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import transformers

from speech_finetuning.base.files import counted
from speech_finetuning.data.text import IGNORED_LABEL
from speech_finetuning.scoring.metrics import (
    Change,
    RowErrors,
    SpeechErrors,
    WordCounts,
    bootstrap_interval,
    count_row_errors,
    ends_in_loop,
    has_loop,
    paired_change,
    translation_scores,
)
from speech_finetuning.scoring.normalization import (
    NORM_MARKS,
    READINGS,
    Normalizer,
    ScoringTarget,
    count_inner_apostrophes,
    leading_reading,
    read_text,
    text_normalizers,
)
from speech_finetuning.scoring.scores import (
    BEFORE,
    EVAL,
    OF_UNTOUCHED,
    PREDICT,
    ErrorRates,
    Interval,
    NonspeechScores,
    PromptWords,
    Scores,
    TranslationScores,
)

logger = logging.getLogger(__name__)

MAX_CUT_OUTPUTS = 50.0  # percent, before a warning


@dataclass(frozen=True, kw_only=True)
class ReferenceRow:
    """A row that will be scored."""

    id: str
    set_name: str
    reference: str  # "": only transcribed
    duration_in_seconds: float
    group: str | None = None  # by --group_column_name: the speaker, say
    is_nonspeech: bool = False  # nobody speaks: every word is invented
    prompt: str | None = None  # of --prompt_column_name, whether or not the model has read it


@dataclass(frozen=True, kw_only=True)
class TextPair:
    """Reference and prediction in one reading."""

    reference: str
    prediction: str


@dataclass(kw_only=True)
class ScoredRow:
    """A row with the model's transcript."""

    row: ReferenceRow
    index: int  # in the evaluation set
    prediction: str
    is_cut: bool  # ends at the length limit
    readings: dict[str, TextPair]
    leading: TextPair  # one of the readings
    counts: WordCounts | None = None  # in the leading reading; None without a reference

    @property
    def num_errors(self) -> int:
        """Wrong words in the leading reading."""
        return 0 if self.counts is None else self.counts.num_errors

    @property
    def has_loop(self) -> bool:
        if self.is_cut and ends_in_loop(self.prediction):
            return True
        return has_loop(self.prediction, self.row.duration_in_seconds)


def make_metric() -> SpeechErrors:
    return SpeechErrors(keep_in_memory=True)


@dataclass(kw_only=True)
class Scorecard:
    """The trainer's compute_metrics: generated ids to error rates, in total and for each set. Guard
    sets have no part in the total, nor in the loss.

    Rows are found by their index, so that rows that several processes scored twice count once.
    """

    tokenizer: transformers.WhisperTokenizer
    targets: dict[str, ScoringTarget]  # by the name of the set
    metric: SpeechErrors = field(default_factory=make_metric)
    max_new_tokens: int = sys.maxsize  # the length limit of generation
    rows: dict[int, ReferenceRow] = field(default_factory=dict)  # by index
    scored: list[ScoredRow] = field(default_factory=list)  # by the last call
    leading: dict[str, str] = field(default_factory=dict)  # reading by the name of the set
    announced: set[str] = field(default_factory=set)  # what the log already says
    role: str = ""  # of the set that is scored: eval, test, zero_shot ...
    # What was wrong with the rows of a role, by index, when the untouched model transcribed them.
    untouched: dict[str, dict[int, RowErrors]] = field(default_factory=dict)
    normalizers: dict[str, dict[str, Normalizer]] = field(init=False)  # by set and reading

    def __post_init__(self) -> None:
        self.normalizers = {
            name: text_normalizers(target.text_language, self.tokenizer)
            for name, target in self.targets.items()
        }

    def set_references(self, eval_set: datasets.Dataset, role: str = "") -> None:
        """Takes the references of a prepared evaluation set, and decides which reading leads. role:
        what the set is scored as."""
        self.role = role
        self.rows = {}
        columns = ["index", "set", "id", "text", "duration", "group", "prompt"]
        columns = [name for name in columns if name in eval_set.column_names]
        for row in eval_set.select_columns(columns).to_list():
            self.rows[row["index"]] = ReferenceRow(
                id=row["id"],
                set_name=row["set"],
                reference=row["text"],
                duration_in_seconds=row["duration"],
                group=row.get("group"),
                prompt=row.get("prompt"),
                # What is only transcribed may be speech whose text nobody knows.
                is_nonspeech=not row["text"]
                and role != PREDICT
                and self.targets[row["set"]].has_nonspeech,
            )
        self.leading = {}
        for set_name, target in self.targets.items():
            references = [row.reference for row in self.rows.values() if row.set_name == set_name]
            self.leading[set_name] = leading_reading(target, references)
            if self.leading[set_name] == NORM_MARKS:
                self.announce_apostrophes(set_name, references)

    def announce_apostrophes(self, set_name: str, references: list[str]) -> None:
        """Says once why wer is not wer_norm."""
        place = f" of {set_name}" if set_name else ""
        sentence = (
            f"{count_inner_apostrophes(references)} of {counted(len(references), 'reference')}{place} with "
            "apostrophes inside words: wer and cer count these as letters, as wer_norm_marks does. "
            "wer_norm, like published scores, splits such words."
        )
        self.announce(sentence)

    def announce(self, sentence: str) -> None:
        """Says it in the log, once."""
        if sentence not in self.announced:
            self.announced.add(sentence)
            logger.info("%s", sentence)

    def languages_of(self, indices: list[int]) -> list[str] | None:
        """The language spoken in each of these rows; None where all sets have the same, which the
        generation config knows."""
        if len({target.language for target in self.targets.values()}) == 1:
            return None
        languages = []
        for index in indices:
            language = self.targets[self.rows[index].set_name].language
            if language is None:
                return None
            languages.append(language)
        return languages

    def __call__(self, outputs: transformers.EvalPrediction) -> dict[str, float]:
        """Flat metrics, rates in percent.

        outputs.predictions: ids (rows, n_tokens), sums of the loss (rows,), numbers of target
        tokens (rows,); outputs.label_ids: indices of the rows (rows,).
        """
        place_of = {int(index): place for place, index in enumerate(outputs.label_ids)}
        indices = sorted(place_of)
        places = [place_of[index] for index in indices]
        ids, loss_sums, token_counts = (values[places] for values in outputs.predictions)
        self.scored = self.score_rows(indices, ids, token_counts)
        is_in_total = np.array([not self.is_guard(row) for row in self.scored])
        scores = self.score_set([row for row in self.scored if not self.is_guard(row)], set_name="")
        self.warn_of_cut_outputs(scores)
        metrics = scores.to_metrics()
        num_tokens = token_counts[is_in_total].sum()
        metrics["loss"] = float(loss_sums[is_in_total].sum() / max(1, num_tokens))
        if len(self.targets) > 1:
            for set_name in self.targets:
                rows = [row for row in self.scored if row.row.set_name == set_name]
                if rows:
                    metrics |= self.score_set(rows, set_name=set_name).to_metrics()
        self.remember_untouched()
        return metrics

    def is_guard(self, row: ScoredRow) -> bool:
        """Whether a row is of a set that must not get worse, and so has no part in the total."""
        return self.targets[row.row.set_name].is_guard

    def remember_untouched(self) -> None:
        """Keeps what the untouched model did, to compare the trained one with."""
        for role, before in BEFORE.items():
            if self.role == before:
                self.untouched[role] = self.errors_by_index(self.scored)

    def errors_by_index(self, rows: list[ScoredRow]) -> dict[int, RowErrors]:
        """Of the rows that have counts, in the leading reading."""
        return {
            row.index: count_row_errors(row.leading.reference, row.leading.prediction, row.counts)
            for row in rows
            if row.counts is not None
        }

    def changes(self, rows: list[ScoredRow]) -> tuple[Interval | None, Interval | None]:
        """The intervals of the changes of WER and CER against the untouched model; None if it has
        not scored exactly these rows."""
        # eval_best, eval_share_0.3 ...: other weights on the rows of an evaluation.
        role = EVAL if self.role.startswith(f"{EVAL}_") else self.role
        before = self.untouched.get(role)
        if not before:
            return None, None
        after = self.errors_by_index(rows)
        pairs = [(before[index], now) for index, now in after.items() if index in before]
        is_same = all(earlier[1::2] == now[1::2] for earlier, now in pairs)
        if not pairs or len(pairs) != len(after) or not is_same:
            return None, None
        words = paired_change(
            [earlier.wrong_words for earlier, _ in pairs],
            [now.wrong_words for _, now in pairs],
            [now.num_words for _, now in pairs],
        )
        characters = paired_change(
            [earlier.wrong_characters for earlier, _ in pairs],
            [now.wrong_characters for _, now in pairs],
            [now.num_characters for _, now in pairs],
        )
        return interval_of(words), interval_of(characters)

    def warn_of_cut_outputs(self, scores: Scores) -> None:
        """Most transcripts without an end are no accident; said once, as every score tells the
        share, and of weights that this run is to answer for."""
        if self.role in OF_UNTOUCHED:
            return
        if scores.cut_outputs > MAX_CUT_OUTPUTS and "cut" not in self.announced:
            self.announced.add("cut")
            logger.warning(
                "%.0f %% of %s end at the length limit of %d tokens. Either the model "
                "does not stop (%.0f %% end in a loop), or --generation_max_length is too low.",
                scores.cut_outputs,
                counted(scores.num_rows, "transcript"),
                self.max_new_tokens,
                scores.repetition_loops,
            )

    def score_rows(
        self, indices: list[int], ids: np.ndarray, token_counts: np.ndarray
    ) -> list[ScoredRow]:
        """ids: (rows, n_tokens), padded with -100 or the pad token; token_counts: (rows,)."""
        pad_token_id: Any = self.tokenizer.pad_token_id
        ids = np.where(ids == IGNORED_LABEL, pad_token_id, ids)
        lengths = (ids != pad_token_id).sum(axis=1)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        scored = []
        for index, text, length, num_targets in zip(
            indices, texts, lengths.tolist(), token_counts.tolist(), strict=True
        ):
            row = self.rows[index]
            prediction = text.strip()
            readings = {
                reading: TextPair(
                    reference=read_text(row.reference, normalize),
                    prediction=read_text(prediction, normalize),
                )
                for reading, normalize in self.normalizers[row.set_name].items()
            }
            # A long-form transcript, which has no loss, is not bounded by the limit of one window.
            is_cut = num_targets > 0 and length >= self.max_new_tokens
            scored.append(
                ScoredRow(
                    row=row,
                    index=index,
                    prediction=prediction,
                    is_cut=is_cut,
                    readings=readings,
                    leading=readings[self.leading[row.set_name]],
                )
            )
        return scored

    def score_set(self, rows: list[ScoredRow], *, set_name: str) -> Scores:
        """The scores of these rows; sets the counts of each."""
        kept = [row for row in rows if row.leading.reference]
        spoken = [row for row in rows if not row.row.is_nonspeech]
        num_empty = len(spoken) - len(kept)
        if spoken and not any(row.row.reference for row in spoken):
            rows_to_tell = counted(len(spoken), "row")
            logger.info("no references: %s transcribed, not scored.", rows_to_tell)
        elif num_empty:
            logger.warning(
                "without a reference, and not scored: %d of %s.",
                num_empty,
                counted(len(spoken), "row"),
            )
        errors = self.errors_of([row.leading for row in rows])
        interval = None
        if errors is not None:
            for row, counts in zip(kept, errors["rows"], strict=True):
                row.counts = counts
            low, high = bootstrap_interval(errors["rows"])
            interval = Interval(low=low, high=high)
        wer_change, cer_change = self.changes(rows)
        readings = {}
        for reading in READINGS:
            errors_of_reading = self.errors_of([row.readings[reading] for row in rows])
            if errors_of_reading is not None:
                readings[reading] = error_rates(errors_of_reading)
        return Scores(
            set_name=set_name,
            num_rows=len(rows),
            empty_references=num_empty,
            leading=None if errors is None else error_rates(errors),
            counts=None if errors is None else errors["counts"],
            interval=interval,
            wer_change=wer_change,
            cer_change=cer_change,
            readings=readings,
            translation=self.translation_of(rows),
            nonspeech=nonspeech_scores([row for row in rows if row.row.is_nonspeech]),
            prompt_words=self.prompt_words_of(rows),
            empty_outputs=percentage([not row.prediction for row in spoken]),
            repetition_loops=percentage([row.has_loop for row in rows]),
            cut_outputs=percentage([row.is_cut for row in rows]),
        )

    def prompt_words_of(self, rows: list[ScoredRow]) -> PromptWords | None:
        """Of the words that a row's prompt and reference have in common, in the leading reading,
        how many its transcript contains; None if there is no such word."""
        spoken = 0
        written = 0
        for row in rows:
            if row.row.prompt is None:
                continue
            name = row.row.set_name
            normalize = self.normalizers[name][self.leading[name]]
            prompted = set(read_text(row.row.prompt, normalize).split())
            asked = Counter(word for word in row.leading.reference.split() if word in prompted)
            found = Counter(row.leading.prediction.split())
            spoken += asked.total()
            written += (asked & found).total()
        return PromptWords(spoken=spoken, written=written) if spoken else None

    def translation_of(self, rows: list[ScoredRow]) -> TranslationScores | None:
        """BLEU and chrF, where all rows are translations with a reference."""
        targets = {row.row.set_name for row in rows}
        if not all(self.targets[name].is_translated for name in targets):
            return None
        kept = [row for row in rows if row.row.reference]
        found = translation_scores(
            [row.row.reference for row in kept], [row.prediction for row in kept]
        )
        if found is None:
            self.announce("BLEU and chrF of translations need sacrebleu: pip install sacrebleu")
            return None
        return TranslationScores(bleu=found[0], chrf=found[1])

    def errors_of(self, pairs: list[TextPair]) -> dict[str, Any] | None:
        """What SpeechErrors computes of the pairs with a reference; None if there is none."""
        kept = [pair for pair in pairs if pair.reference]
        if not kept:
            return None
        return self.metric.compute(
            references=[pair.reference for pair in kept],
            predictions=[pair.prediction for pair in kept],
        )


def nonspeech_scores(rows: list[ScoredRow]) -> NonspeechScores | None:
    """Words in the leading reading, as the WER counts them, of rows in which nobody speaks."""
    if not rows:
        return None
    return NonspeechScores(
        minutes=sum(row.row.duration_in_seconds for row in rows) / 60,
        invented_words=sum(len(row.leading.prediction.split()) for row in rows),
    )


def interval_of(change: Change | None) -> Interval | None:
    return None if change is None else Interval(low=change.low, high=change.high)


def error_rates(errors: dict[str, Any]) -> ErrorRates:
    return ErrorRates(wer=errors["wer"], cer=errors["cer"])


def percentage(values: list[bool]) -> float:
    """0 of none."""
    return 100 * sum(values) / max(1, len(values))
