"""The scores of an evaluation set: one object, and the flat metrics that are logged."""

from dataclasses import dataclass, field
from typing import Any

from speech_finetuning.scoring.metrics import WordCounts
from speech_finetuning.scoring.normalization import READINGS

# What is scored, in the order of the table.
ZERO_SHOT = "zero_shot"  # the evaluation set by the untouched model
EVAL = "eval"
UNTOUCHED_PROMPTED = "untouched_prompted"  # the evaluation set with its prompts, untouched model
PROMPTED = "prompted"
UNTOUCHED_TEST = "untouched_test"  # the test set by the untouched model
TEST = "test"
PREDICT = "predict"
ROLES = (ZERO_SHOT, EVAL, UNTOUCHED_PROMPTED, PROMPTED, UNTOUCHED_TEST, TEST, PREDICT)
# Whose scores a role's are compared with.
BEFORE = {EVAL: ZERO_SHOT, PROMPTED: UNTOUCHED_PROMPTED, TEST: UNTOUCHED_TEST}
OF_UNTOUCHED = frozenset(BEFORE.values())
WITH_PROMPTS = frozenset([UNTOUCHED_PROMPTED, PROMPTED])


@dataclass(frozen=True, kw_only=True)
class ErrorRates:
    """Error rates in percent of one reading of the texts."""

    wer: float
    cer: float


@dataclass(frozen=True, kw_only=True)
class TranslationScores:
    """BLEU and chrF, 0 to 100, of text as written."""

    bleu: float
    chrf: float


@dataclass(frozen=True, kw_only=True)
class Interval:
    """95 % interval of the WER in percent, or of a change in points."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class NonspeechScores:
    """What was written where nobody speaks."""

    minutes: float
    invented_words: int

    @property
    def words_per_minute(self) -> float:
        return self.invented_words / self.minutes


@dataclass(frozen=True, kw_only=True)
class PromptWords:
    """Words that a row's prompt and its reference have in common: how often they were spoken, and
    how often they were written."""

    spoken: int
    written: int

    @property
    def recall(self) -> float:
        """In percent."""
        return 100 * self.written / self.spoken


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one evaluation set, or of all sets of a role together.

    Without a single reference there are no error rates, and `leading`, `counts` and `interval` are
    None.
    """

    role: str = ""  # one of ROLES; "" in compute_metrics, which is not told
    set_name: str = ""  # "": all sets together
    num_rows: int
    empty_references: int  # rows that have none and are not counted in the error rates
    leading: ErrorRates | None = None
    counts: WordCounts | None = None  # of words, in the leading reading
    interval: Interval | None = None
    # Of the change against the untouched model, where that has scored the same rows:
    wer_change: Interval | None = None
    cer_change: Interval | None = None
    readings: dict[str, ErrorRates] = field(default_factory=dict)
    translation: TranslationScores | None = None
    nonspeech: NonspeechScores | None = None  # of rows that have no speech
    prompt_words: PromptWords | None = None  # where prompts say some of what is spoken
    empty_outputs: float  # share of the other rows in percent
    # Shares of all rows in percent:
    repetition_loops: float
    cut_outputs: float  # end at the length limit

    def to_metrics(self) -> dict[str, float]:
        """The flat form that is logged: wer, NAME_wer, ...; the trainer puts the role first."""
        metrics: dict[str, float] = {
            "num_rows": self.num_rows,
            "empty_references": self.empty_references,
        }
        if self.leading is not None:
            metrics["wer"] = self.leading.wer
            metrics["cer"] = self.leading.cer
        if self.counts is not None:
            metrics["substitutions"] = self.counts.substitutions
            metrics["deletions"] = self.counts.deletions
            metrics["insertions"] = self.counts.insertions
            metrics["hits"] = self.counts.hits
        if self.interval is not None:
            metrics["wer_low"] = self.interval.low
            metrics["wer_high"] = self.interval.high
        for name, change in (("wer", self.wer_change), ("cer", self.cer_change)):
            if change is not None:
                metrics[f"{name}_change_low"] = change.low
                metrics[f"{name}_change_high"] = change.high
        if self.translation is not None:
            metrics["bleu"] = self.translation.bleu
            metrics["chrf"] = self.translation.chrf
        if self.nonspeech is not None:
            metrics["nonspeech_minutes"] = self.nonspeech.minutes
            metrics["invented_words"] = self.nonspeech.invented_words
            metrics["invented_words_per_minute"] = self.nonspeech.words_per_minute
        if self.prompt_words is not None:
            metrics["prompt_words"] = self.prompt_words.spoken
            metrics["prompt_words_written"] = self.prompt_words.written
            metrics["prompt_words_recall"] = self.prompt_words.recall
        for reading, rates in self.readings.items():
            metrics[f"wer_{reading}"] = rates.wer
            metrics[f"cer_{reading}"] = rates.cer
        metrics["empty_outputs"] = self.empty_outputs
        metrics["repetition_loops"] = self.repetition_loops
        metrics["cut_outputs"] = self.cut_outputs
        prefix = f"{self.set_name}_" if self.set_name else ""
        return {f"{prefix}{name}": value for name, value in metrics.items()}


def metric_prefix(role: str, set_name: str) -> str:
    """'eval_' or 'eval_NAME_': what the names of a set's metrics begin with."""
    return f"{role}_{set_name}_" if set_name else f"{role}_"


def read_scores(metrics: dict[str, float], *, role: str, set_name: str = "") -> Scores | None:
    """Back from the flat metrics of a run, also of an earlier one; None if this was not scored."""
    prefix = metric_prefix(role, set_name)
    found = {
        name.removeprefix(prefix): value
        for name, value in metrics.items()
        if name.startswith(prefix)
    }
    if "num_rows" not in found:
        return None
    counts = None
    if "substitutions" in found:
        counts = WordCounts(
            substitutions=int(found["substitutions"]),
            deletions=int(found["deletions"]),
            insertions=int(found["insertions"]),
            hits=int(found.get("hits", 0)),
        )
    return Scores(
        role=role,
        set_name=set_name,
        num_rows=int(found["num_rows"]),
        empty_references=int(found.get("empty_references", 0)),
        leading=read_rates(found, ""),
        counts=counts,
        interval=read_interval(found, "wer"),
        wer_change=read_interval(found, "wer_change"),
        cer_change=read_interval(found, "cer_change"),
        readings={
            reading: rates
            for reading in READINGS
            if (rates := read_rates(found, f"_{reading}")) is not None
        },
        translation=(
            TranslationScores(bleu=found["bleu"], chrf=found["chrf"]) if "bleu" in found else None
        ),
        nonspeech=read_nonspeech(found),
        prompt_words=read_prompt_words(found),
        empty_outputs=found.get("empty_outputs", 0.0),
        repetition_loops=found.get("repetition_loops", 0.0),
        cut_outputs=found.get("cut_outputs", 0.0),
    )


def read_interval(metrics: dict[str, float], name: str) -> Interval | None:
    """NAME_low and NAME_high, if they are there."""
    low = metrics.get(f"{name}_low")
    high = metrics.get(f"{name}_high")
    if low is None or high is None:
        return None
    return Interval(low=low, high=high)


def read_nonspeech(metrics: dict[str, float]) -> NonspeechScores | None:
    """What was invented, if there were rows without speech."""
    if "invented_words" not in metrics:
        return None
    return NonspeechScores(
        minutes=metrics["nonspeech_minutes"], invented_words=int(metrics["invented_words"])
    )


def read_prompt_words(metrics: dict[str, float]) -> PromptWords | None:
    if "prompt_words" not in metrics:
        return None
    return PromptWords(
        spoken=int(metrics["prompt_words"]), written=int(metrics["prompt_words_written"])
    )


def read_rates(metrics: dict[str, float], suffix: str) -> ErrorRates | None:
    """wer and cer with this suffix, if they are there."""
    wer = metrics.get(f"wer{suffix}")
    cer = metrics.get(f"cer{suffix}")
    if wer is None or cer is None:
        return None
    return ErrorRates(wer=wer, cer=cer)


def last_scores(history: list[dict[str, Any]], step: int | None = None) -> dict[str, float]:
    """The metrics of the last evaluation in the trainer's log (of that step), or none."""
    for entry in reversed(history):
        if "eval_loss" not in entry:
            continue
        if step is None or entry["step"] == step:
            return {name: value for name, value in entry.items() if name.startswith("eval_")}
    return {}
