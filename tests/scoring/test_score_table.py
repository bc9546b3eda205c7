"""The table of several sets, and what became worse."""

from dataclasses import replace

from example_scores import SCORES, WITHOUT_REFERENCES, logged, with_rates

from speech_finetuning.scoring.score_table import describe_regressions, score_table


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
