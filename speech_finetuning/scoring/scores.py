"""The scores of an evaluation set: one object, its flat metrics, and the table of several."""

from dataclasses import dataclass, field
from typing import Any

from speech_finetuning.scoring.metrics import WordCounts
from speech_finetuning.scoring.readings import READINGS

# What is scored, in the order of the table.
ZERO_SHOT = "zero_shot"  # the evaluation set by the untouched model
EVAL = "eval"
TEST = "test"
PREDICT = "predict"
ROLES = (ZERO_SHOT, EVAL, TEST, PREDICT)


@dataclass(frozen=True, kw_only=True)
class ErrorRates:
    """Error rates in percent of one reading of the texts."""

    wer: float
    cer: float


@dataclass(frozen=True, kw_only=True)
class Interval:
    """95 % interval of the WER in percent."""

    low: float
    high: float


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
    readings: dict[str, ErrorRates] = field(default_factory=dict)
    # Shares of all rows in percent:
    empty_outputs: float
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
    interval = None
    if "wer_low" in found:
        interval = Interval(low=found["wer_low"], high=found["wer_high"])
    return Scores(
        role=role,
        set_name=set_name,
        num_rows=int(found["num_rows"]),
        empty_references=int(found.get("empty_references", 0)),
        leading=read_rates(found, ""),
        counts=counts,
        interval=interval,
        readings={
            reading: rates
            for reading in READINGS
            if (rates := read_rates(found, f"_{reading}")) is not None
        },
        empty_outputs=found.get("empty_outputs", 0.0),
        repetition_loops=found.get("repetition_loops", 0.0),
        cut_outputs=found.get("cut_outputs", 0.0),
    )


def read_rates(metrics: dict[str, float], suffix: str) -> ErrorRates | None:
    """wer and cer with this suffix, if they are there."""
    wer = metrics.get(f"wer{suffix}")
    cer = metrics.get(f"cer{suffix}")
    if wer is None or cer is None:
        return None
    return ErrorRates(wer=wer, cer=cer)


def score_table(metrics: dict[str, float], set_names: list[str]) -> str:
    """Before, after and test side by side, in total and for each named set.

    At the end of a line stand the WER's 95 % interval and the change against the untouched model.
    """
    titles = {
        ZERO_SHOT: "before training",
        EVAL: "after training" if "train_rows" in metrics else "as it is",
        TEST: "test split",
        PREDICT: "predicted",
    }
    lines = [f"{'':24s}     WER      CER   subst   delet  insert    rows   loops %   95 % interval"]
    for role in ROLES:
        for set_name in ["", *set_names]:
            scores = read_scores(metrics, role=role, set_name=set_name)
            if scores is None or scores.leading is None:
                continue
            before = None
            if role == EVAL:
                before = read_scores(metrics, role=ZERO_SHOT, set_name=set_name)
            title = f"{titles[role]} {set_name}"
            lines.append(f"{title:24s}{describe_scores(scores, before)}")
    return "\n".join(lines)


def describe_scores(scores: Scores, before: Scores | None) -> str:
    """The figures of one line of the table, of a set with error rates."""
    now = scores.leading
    assert now is not None
    text = f"{now.wer:8.2f} {now.cer:8.2f}"
    if scores.counts is not None:
        text += f"{scores.counts.substitutions:8d}"
        text += f"{scores.counts.deletions:8d}"
        text += f"{scores.counts.insertions:8d}"
    text += f"{scores.num_rows:8d}{scores.repetition_loops:10.1f}"
    if scores.interval is not None:
        text += f"   {scores.interval.low:.2f} to {scores.interval.high:.2f}"
    if before is not None and before.leading is not None:
        text += f"  {describe_change('WER', now.wer, before.leading.wer)}"
        text += f"  {describe_change('CER', now.cer, before.leading.cer)}"
    return text


def describe_change(name: str, now: float, before: float) -> str:
    """'WER -12.3 %', or points where there was no error before."""
    if before == 0:
        return f"{name} {now - before:+.2f} points"
    return f"{name} {100 * (now / before - 1):+.1f} %"


def describe_regressions(metrics: dict[str, float], set_names: list[str]) -> list[str]:
    """One sentence for each figure that is worse than before training."""
    sentences = []
    for set_name in ["", *set_names]:
        before = read_scores(metrics, role=ZERO_SHOT, set_name=set_name)
        after = read_scores(metrics, role=EVAL, set_name=set_name)
        if before is None or after is None:
            continue
        figures = {
            "empty outputs": (before.empty_outputs, after.empty_outputs),
            "repetition loops": (before.repetition_loops, after.repetition_loops),
            "cut outputs": (before.cut_outputs, after.cut_outputs),
        }
        if before.leading is not None and after.leading is not None:
            figures["wer"] = (before.leading.wer, after.leading.wer)
            figures["cer"] = (before.leading.cer, after.leading.cer)
        for name, (earlier, later) in figures.items():
            if later > earlier:
                sentences.append(
                    f"{set_name or 'the model'} is worse than before training: "
                    f"{name} {later:.2f} %, was {earlier:.2f} %."
                )
    return sentences


def last_scores(history: list[dict[str, Any]], step: int | None = None) -> dict[str, float]:
    """The metrics of the last evaluation in the trainer's log (of that step), or none."""
    for entry in reversed(history):
        if "eval_loss" not in entry:
            continue
        if step is None or entry["step"] == step:
            return {name: value for name, value in entry.items() if name.startswith("eval_")}
    return {}
