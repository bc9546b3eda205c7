"""Scores of an imaginary evaluation set, in whole figures."""

from dataclasses import replace

from speech_finetuning.scoring.metrics import WordCounts
from speech_finetuning.scoring.scores import ErrorRates, Interval, Scores

SCORES = Scores(
    role="eval",
    num_rows=4,
    empty_references=1,
    leading=ErrorRates(wer=50.0, cer=25.0),
    counts=WordCounts(substitutions=1, deletions=2, insertions=3, hits=9),
    interval=Interval(low=10.0, high=90.0),
    readings={
        "ortho": ErrorRates(wer=60.0, cer=30.0),
        "norm": ErrorRates(wer=50.0, cer=25.0),
        "norm_marks": ErrorRates(wer=51.0, cer=26.0),
    },
    empty_outputs=25.0,
    repetition_loops=75.0,
    cut_outputs=100.0,
)
WITHOUT_REFERENCES = Scores(
    role="predict",
    num_rows=3,
    empty_references=3,
    empty_outputs=0.0,
    repetition_loops=0.0,
    cut_outputs=0.0,
)


def logged(scores: Scores) -> dict[str, float]:
    """As the trainer puts the role before each name."""
    return {f"{scores.role}_{name}": value for name, value in scores.to_metrics().items()}


def with_rates(role: str, wer: float, cer: float) -> Scores:
    return replace(SCORES, role=role, leading=ErrorRates(wer=wer, cer=cer))
