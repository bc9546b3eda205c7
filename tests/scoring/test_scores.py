"""One object of scores per set: to flat metrics and back."""

from dataclasses import replace

import pytest
from example_scores import SCORES, WITHOUT_REFERENCES, logged, with_rates

from speech_finetuning.scoring.scores import (
    Interval,
    NonspeechScores,
    PromptWords,
    Scores,
    TranslationScores,
    last_scores,
    read_scores,
)


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
    compared = replace(
        SCORES,
        wer_change=Interval(low=-2.0, high=1.0),
        cer_change=Interval(low=-3.0, high=-1.0),
        translation=TranslationScores(bleu=30.0, chrf=50.0),
    )
    assert set(compared.to_metrics()) - set(SCORES.to_metrics()) == {
        "wer_change_low",
        "wer_change_high",
        "cer_change_low",
        "cer_change_high",
        "bleu",
        "chrf",
    }
    prompted = replace(SCORES, prompt_words=PromptWords(spoken=8, written=6))
    assert set(prompted.to_metrics()) - set(SCORES.to_metrics()) == {
        "prompt_words",
        "prompt_words_written",
        "prompt_words_recall",
    }
    assert prompted.to_metrics()["prompt_words_recall"] == 75.0
    assert read_scores(logged(compared), role=SCORES.role) == compared
    assert "clean_wer_norm_marks" in replace(SCORES, set_name="clean").to_metrics()


@pytest.mark.parametrize("set_name", ["", "clean", "a_wer", "norm", "zero_shot"])
@pytest.mark.parametrize(
    "scores",
    [
        SCORES,
        WITHOUT_REFERENCES,
        replace(SCORES, nonspeech=NonspeechScores(minutes=2.5, invented_words=4)),
        replace(SCORES, prompt_words=PromptWords(spoken=8, written=6)),
    ],
    ids=["scored", "transcribed", "with silence", "with prompts"],
)
def test_scores_are_read_back_from_flat_metrics(scores: Scores, set_name: str):
    scores = replace(scores, set_name=set_name)
    others = logged(with_rates("zero_shot", 1.0, 2.0)) | logged(with_rates("test", 3.0, 4.0))
    metrics = others | {"train_rows": 5} | logged(scores)
    assert read_scores(metrics, role=scores.role, set_name=set_name) == scores
    assert read_scores(metrics, role=scores.role, set_name="other") is None


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
