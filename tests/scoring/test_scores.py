"""One object of scores per set: to flat metrics and back, the table, what became worse."""

from dataclasses import replace

import pytest

from speech_finetuning.scoring.metrics import WordCounts
from speech_finetuning.scoring.scores import (
    ErrorRates,
    Interval,
    Scores,
    describe_regressions,
    last_scores,
    read_scores,
    score_table,
)

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


def test_the_names_of_the_metrics_are_fixed():
    assert set(SCORES.to_metrics()) == {
        "num_rows",
        "empty_references",
        "wer",
        "cer",
        "substitutions",
        "deletions",
        "insertions",
        "hits",
        "wer_low",
        "wer_high",
        "wer_ortho",
        "cer_ortho",
        "wer_norm",
        "cer_norm",
        "wer_norm_marks",
        "cer_norm_marks",
        "empty_outputs",
        "repetition_loops",
        "cut_outputs",
    }
    assert "clean_wer_norm_marks" in replace(SCORES, set_name="clean").to_metrics()


@pytest.mark.parametrize("set_name", ["", "clean", "a_wer", "norm", "zero_shot"])
@pytest.mark.parametrize("scores", [SCORES, WITHOUT_REFERENCES], ids=["scored", "transcribed"])
def test_scores_are_read_back_from_flat_metrics(scores: Scores, set_name: str):
    scores = replace(scores, set_name=set_name)
    others = logged(with_rates("zero_shot", 1.0, 2.0)) | logged(with_rates("test", 3.0, 4.0))
    metrics = others | {"train_rows": 5} | logged(scores)
    assert read_scores(metrics, role=scores.role, set_name=set_name) == scores
    assert read_scores(metrics, role=scores.role, set_name="other") is None


def test_the_table_has_a_line_for_each_scored_set():
    metrics = logged(with_rates("zero_shot", 100.0, 80.0)) | logged(SCORES)
    metrics |= logged(replace(SCORES, set_name="clean")) | logged(WITHOUT_REFERENCES)
    lines = score_table(metrics, ["clean"]).splitlines()
    assert [line[:24].strip() for line in lines[1:]] == [
        "before training",
        "as it is",
        "as it is clean",
    ]
    assert lines[2].split() == [
        *"as it is 50.00 25.00 1 2 3 4 75.0 10.00 to 90.00".split(),
        *"WER -50.0 % CER -68.8 %".split(),
    ]
    assert "after training" in score_table(metrics | {"train_rows": 1}, [])


def test_no_error_before_training_does_not_hide_the_change():
    metrics = logged(with_rates("zero_shot", 0.0, 20.0)) | logged(with_rates("eval", 5.0, 30.0))
    after = score_table(metrics, []).splitlines()[-1]
    assert after.endswith("WER +5.00 points  CER +50.0 %")


def test_every_figure_that_became_worse_is_named():
    before = replace(with_rates("zero_shot", 0.0, 30.0), repetition_loops=0.0)
    metrics = logged(before) | logged(with_rates("eval", 5.0, 20.0))
    of_clean = replace(before, set_name="clean", cut_outputs=0.0, empty_outputs=0.0)
    metrics |= logged(of_clean) | logged(replace(SCORES, set_name="clean", empty_outputs=0.0))
    assert describe_regressions(metrics, ["clean", "unknown"]) == [
        "the model is worse than before training: repetition loops 75.00 %, was 0.00 %.",
        "the model is worse than before training: wer 5.00 %, was 0.00 %.",
        "clean is worse than before training: repetition loops 75.00 %, was 0.00 %.",
        "clean is worse than before training: cut outputs 100.00 %, was 0.00 %.",
        "clean is worse than before training: wer 50.00 %, was 0.00 %.",
    ]


def test_the_last_scores_are_those_of_the_step_that_is_asked_for():
    history = [
        {"step": 2, "eval_loss": 2.0, "eval_wer": 20.0},
        {"step": 3, "loss": 1.0},
        {"step": 4, "eval_loss": 4.0, "eval_wer": 40.0, "epoch": 1.0},
        {"step": 4, "test_loss": 5.0},
    ]
    assert last_scores(history) == {"eval_loss": 4.0, "eval_wer": 40.0}
    assert last_scores(history, step=2) == {"eval_loss": 2.0, "eval_wer": 20.0}
    assert last_scores(history, step=3) == {}
    assert last_scores([]) == {}
