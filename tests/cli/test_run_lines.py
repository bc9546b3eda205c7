"""The lines of a run, character by character."""

from dataclasses import replace

import pytest
from example_scores import SCORES, WITHOUT_REFERENCES

from speech_finetuning.cli.run_lines import (
    STEP_HEADER,
    Earlier,
    describe_role,
    describe_scores_at,
    describe_set,
    describe_step,
    describe_time,
)
from speech_finetuning.scoring.scores import ErrorRates, Interval

FIGURES = {
    "loss": 1.312,
    "learning_rate": 1e-5,
    "pass": 0.4,
    "samples_per_second": 12.1,
    "data_wait_fraction": 0.02,
}
SCORED = replace(
    SCORES,
    num_rows=500,
    leading=ErrorRates(wer=43.14, cer=12.9),
    interval=Interval(low=41.0, high=45.3),
    empty_outputs=0.0,
    repetition_loops=0.0,
    cut_outputs=0.0,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (59.5, "1:00 min"),
        (62, "1:02 min"),
        (119.4, "1:59 min"),
        (119.7, "2:00 min"),
        (3599, "59:59 min"),
        (3599.7, "1:00 h"),
        (3629, "1:00 h"),
        (7199, "2:00 h"),
        (6000, "1:40 h"),
        (187_200, "52:00 h"),
        (float("inf"), "-"),
    ],
)
def test_times(seconds: float, text: str):
    assert describe_time(seconds) == text


@pytest.mark.parametrize("border", [1, 10, 60, 600, 3600, 36_000, 86_400])
def test_no_time_has_sixty_seconds_or_minutes(border: int):
    for hundredths in range(-200, 200):
        text = describe_time(border + hundredths / 100)
        assert ":60" not in text and not text.startswith("60")


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.0, "0"), (9.96e-6, "1.0e-5"), (9.94e-6, "9.9e-6"), (0.002, "2.0e-3"), (1.0, "1.0e0")],
)
def test_rates(rate: float, text: str):
    assert describe_step(1, {**FIGURES, "learning_rate": rate}, 1).split()[2] == text


def test_a_step_stands_under_its_header():
    assert [STEP_HEADER, describe_step(200, FIGURES, 6000)] == [
        "    step     loss      rate    pass  clips/s  waiting       left",
        "     200   1.3120    1.0e-5    0.40     12.1      2 %     1:40 h",
    ]


def test_the_widest_step_has_the_same_columns():
    widest = {**FIGURES, "loss": 123.4567, "learning_rate": 3.7e-10, "data_wait_fraction": 1.0}
    widest |= {"samples_per_second": 12345.6}
    del widest["pass"]
    line = describe_step(1_000_000, {**widest, "pass_a": 1.0, "pass_b": 123.456}, 59 * 60 + 59)
    assert line == " 1000000 123.4567   3.7e-10  123.46  12345.6    100 %  59:59 min"
    assert len(line) == len(STEP_HEADER)


def test_a_step_whose_loss_is_not_finite():
    assert describe_step(3, {**FIGURES, "loss": float("nan")}, 1).split()[1] == "nan"


def block(role: str, step: int, **changes: object) -> list[str]:
    how = {"lead": "wer", "earlier": None, "seconds": 62.0, "scores": SCORED, **changes}
    scores = how.pop("scores")
    return describe_scores_at(role, step, scores, **how)


def test_an_evaluation_that_is_the_best_so_far():
    assert block("eval", 200, earlier=Earlier(last=57.0, best=57.0, step_of_best=0)) == [
        "score at 200   WER 43.1 % (was 57.0, best so far)   CER 12.9 %",
        "    95 % interval 41.0 to 45.3   500 rows in 1:02 min",
    ]


def test_an_evaluation_that_is_worse_names_the_best():
    earlier = Earlier(last=42.0, best=41.2, step_of_best=400)
    assert block("eval", 600, earlier=earlier)[0] == (
        "score at 600   WER 43.1 % (was 42.0, best 41.2 at 400)   CER 12.9 %"
    )
    earlier = Earlier(last=42.0, best=41.2, step_of_best=0)
    assert "(was 42.0, best 41.2 before training)" in block("eval", 600, earlier=earlier)[0]


def test_without_spaces_between_words_characters_lead():
    earlier = Earlier(last=13.5, best=13.5, step_of_best=100)
    assert block("eval", 200, lead="cer", earlier=earlier)[0] == (
        "score at 200   CER 12.9 % (was 13.5, best so far)   WER 43.1 %"
    )


def test_the_titles_of_other_evaluations_and_what_no_error_rate_shows():
    assert block("zero_shot", 0)[0].startswith("score before training   WER 43.1 %   CER")
    assert block("test", 600)[0].startswith("score of the test split   WER")
    assert block("eval", 0)[0].startswith("score   WER")
    faulty = replace(SCORED, empty_outputs=1.25, repetition_loops=3.0, cut_outputs=100.0)
    assert block("eval", 200, scores=faulty)[2] == "    empty 1.2 %   loops 3.0 %   cut 100.0 %"


def test_a_transcription_without_references():
    assert block("predict", 0, scores=WITHOUT_REFERENCES) == [
        "transcribed   3 rows in 1:02 min, without references"
    ]


def test_the_sets_of_a_mix_have_a_line_each():
    assert describe_set(replace(SCORED, set_name="clean")) == (
        "    clean              WER 43.1 %   CER 12.9 %   500 rows"
    )
    assert describe_set(replace(WITHOUT_REFERENCES, set_name="x")).endswith("3 rows")


def test_no_line_is_wider_than_80_columns():
    widest = replace(
        SCORED,
        num_rows=1_000_000,
        leading=ErrorRates(wer=143.14, cer=112.9),
        interval=Interval(low=141.0, high=145.3),
    )
    earlier = Earlier(last=157.0, best=141.2, step_of_best=18_000)
    lines = block("eval", 20_000, scores=widest, earlier=earlier, seconds=36_000)
    assert max(map(len, lines)) <= 80


def test_weights_that_are_tried_are_named():
    roles = ("eval_average", "eval_share_0.3", "eval_best", "test")
    assert [describe_role(role, 6) for role in roles] == [
        "score of average",
        "score of share 0.3",
        "score of best",
        "score of the test split",
    ]
    assert describe_role("eval", 6) == "score at 6" and describe_role("eval", 0) == "score"


def test_an_evaluation_with_every_fault_has_a_line_of_its_own_for_them():
    """Nothing is wider than 80 columns, at which the terminal would cut between a number and its
    sign."""
    faults = {"empty_outputs": 12.5, "repetition_loops": 100.0, "cut_outputs": 100.0}
    wide = Interval(low=100.0, high=100.0)
    lines = block("eval", 200, scores=replace(SCORED, interval=wide, num_rows=12_000, **faults))
    assert lines[1:] == [
        "    95 % interval 100.0 to 100.0   12,000 rows in 1:02 min",
        "    empty 12.5 %   loops 100.0 %   cut 100.0 %",
    ]
