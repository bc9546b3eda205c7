"""The table of several sets, and what became worse."""

from dataclasses import replace

from example_scores import SCORES, WITHOUT_REFERENCES, logged, with_rates

from speech_finetuning.scoring.metrics import WordCounts
from speech_finetuning.scoring.score_table import describe_regressions, score_table
from speech_finetuning.scoring.scores import Interval, NonspeechScores


def test_the_table_has_a_line_for_each_scored_set():
    metrics = logged(with_rates("zero_shot", 100.0, 80.0)) | logged(SCORES)
    metrics |= logged(replace(SCORES, set_name="clean")) | logged(WITHOUT_REFERENCES)
    lines = score_table(metrics, ["clean"]).splitlines()
    assert [line[:15].strip() for line in lines[1:]] == [
        "before training",
        "as it is",
        "change",
        "as it is clean",
    ]
    assert lines[2].split() == "as it is 50.00 25.00 1 2 3 4 75.0 10.0 to 90.0".split()
    assert lines[3].strip() == "change         WER -50.0 %   CER -68.8 %"
    assert "after training" in score_table(metrics | {"train_rows": 1}, [])


def test_no_error_before_training_does_not_hide_the_change():
    metrics = logged(with_rates("zero_shot", 0.0, 20.0)) | logged(with_rates("eval", 5.0, 30.0))
    change = score_table(metrics, []).splitlines()[-1]
    assert change.endswith("WER +5.00 points   CER +50.0 %")


def test_the_widest_figures_fit_80_columns_and_stand_under_their_headings():
    widest = replace(
        with_rates("zero_shot", 100.0, 438.57),
        counts=WordCounts(substitutions=12345, deletions=12345, insertions=123456, hits=0),
        num_rows=123456,
        repetition_loops=99.9,
        interval=Interval(low=100.0, high=100.0),
    )
    header, line = score_table(logged(widest), []).splitlines()
    assert max(len(header), len(line)) <= 80
    for heading, value in (("CER", "438.57"), ("insert", "123456"), ("loops %", "99.9")):
        assert header.index(heading) + len(heading) == line.index(value) + len(value)


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


def test_a_change_whose_interval_contains_zero_is_called_none():
    before = with_rates("zero_shot", 20.0, 10.0)
    after = replace(
        with_rates("eval", 21.0, 8.0),
        wer_change=Interval(low=-0.5, high=2.5),
        cer_change=Interval(low=-3.0, high=-1.0),
    )
    metrics = logged(before) | logged(after)
    line = score_table(metrics, []).splitlines()[-1]
    assert line.endswith("  change         WER no clear change (-0.50 to +2.50)   CER -20.0 %")
    both = replace(after, cer_change=Interval(low=-3.0, high=1.0))
    lines = score_table(metrics | logged(both), []).splitlines()
    assert [line.strip() for line in lines[-2:]] == [
        "change         WER no clear change (-0.50 to +2.50)",
        "CER no clear change (-3.00 to +1.00)",
    ]
    assert not [text for text in describe_regressions(metrics, []) if "wer" in text]
    worse = replace(after, wer_change=Interval(low=0.5, high=2.5))
    assert [t for t in describe_regressions(metrics | logged(worse), []) if "wer 21.00 %" in t]


def test_the_test_split_has_a_line_before_training_too():
    roles = ("zero_shot", "eval", "untouched_test", "test")
    metrics: dict[str, float] = {}
    for number, role in enumerate(roles):
        metrics |= logged(with_rates(role, 40.0 - 10 * number, 30.0))
    lines = score_table(metrics, []).splitlines()
    titles = [line[:15].strip() for line in lines[1:]]
    assert titles == [
        "before training",
        "as it is",
        "change",
        "test before",
        "test split",
        "change",
    ]
    assert "WER -50.0 %" in lines[-1] and "WER" not in lines[-2]


def test_words_invented_without_speech_have_a_line_of_their_own():
    """Also of a set in which nobody speaks, and which has no WER."""
    before = replace(
        with_rates("zero_shot", 10.0, 10.0),
        nonspeech=NonspeechScores(minutes=2.0, invented_words=3),
    )
    found = NonspeechScores(minutes=2.0, invented_words=123_456)
    after = replace(before, role="eval", nonspeech=found)
    silence = replace(after, set_name="silence", leading=None, counts=None, readings={})
    metrics = logged(before) | logged(after) | logged(silence)
    lines = score_table(metrics, ["silence"]).splitlines()
    assert lines[2].strip() == "no speech, 2.0 min: 3 words invented, 1.5 a minute"
    assert lines[-1].startswith("as it is silence  no speech, 2.0 min: 123,456 words")
    assert max(map(len, lines)) <= 80
    worse = describe_regressions(metrics, [])
    assert "61728.0 words invented in a minute without speech, were 1.5." in worse[0]
    assert (
        len(describe_regressions(logged(after) | logged(replace(after, role="zero_shot")), [])) == 0
    )
