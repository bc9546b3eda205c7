"""Guard sets: a block of their own, and the bound. See test_metrics for the total."""

from dataclasses import replace

import pytest
from example_scores import logged, with_rates

from speech_finetuning.base.errors import UserError
from speech_finetuning.cli.run_lines import describe_guard
from speech_finetuning.scoring.guards import GuardBound
from speech_finetuning.scoring.normalization import ScoringTarget
from speech_finetuning.scoring.score_table import GUARD_TITLE, score_table
from speech_finetuning.scoring.scores import Interval, Scores

NEW = ScoringTarget(language="es", leads_normalized=True)
OLD = ScoringTarget(language="es", leads_normalized=True, is_guard=True)


def of_set(name: str, role: str, wer: float, change: Interval | None = None) -> Scores:
    return replace(with_rates(role, wer, 10.0), set_name=name, wer_change=change)


def test_the_block_of_guards_has_points_with_their_interval():
    metrics = logged(with_rates("zero_shot", 40.0, 20.0)) | logged(with_rates("eval", 20.0, 10.0))
    metrics |= logged(of_set("old", "zero_shot", 10.0))
    metrics |= logged(of_set("old", "eval", 12.5, Interval(low=-0.25, high=4.0)))
    table, block = score_table(metrics, [], ["old"]).split(f"\n\n{GUARD_TITLE}\n")
    assert len(table.splitlines()) == 4 and "old" not in table
    lines = [line.split() for line in block.splitlines()]
    assert lines[0][:4] == ["before", "training", "old", "10.00"]
    assert lines[1][:4] == ["as", "it", "is", "old"]
    assert lines[2] == "change WER +2.50 points (-0.25 to +4.00)".split()
    assert lines[3] == "CER +0.00 points".split()
    assert GUARD_TITLE not in score_table(metrics, ["old"])


def test_the_line_of_a_guard_on_the_screen():
    scores = of_set("old", "eval", 12.5, Interval(low=1.0, high=4.0))
    first, second = describe_guard(scores, rate_name="wer", before=10.0).split("\n")
    assert "old" in first and "WER 12.5 %" in first and first.endswith("a guard")
    assert second.strip() == "WER +2.50 points (+1.00 to +4.00)"
    assert "points" not in describe_guard(scores, rate_name="wer", before=None)
    other = describe_guard(scores, rate_name="cer", before=12.0)
    assert other.split("\n")[1].strip() == "CER -2.00 points"


def test_the_bound_is_of_points_above_the_untouched_model():
    targets = {"new": NEW, "old": OLD, "ja": replace(OLD, language="ja")}
    bound = GuardBound.of(targets, 2.0)
    assert bound.rates == {"old": "wer", "ja": "cer"}
    bound.note_untouched({"zero_shot_old_wer": 14.1, "zero_shot_ja_cer": 5.0})
    within = {"eval_old_wer": 16.1, "eval_ja_cer": 1.0, "eval_new_wer": 99.0}
    assert 16.1 - 14.1 > 2  # in floating point
    assert bound.broken_by(within) == {}
    assert bound.losses(within) == {"old": 2.0, "ja": -4.0}
    assert bound.broken_by({**within, "eval_ja_cer": 7.5}) == {"ja": 2.5}
    assert bound.describe({"ja": 2.5}) == "CER of ja +2.50 points"
    assert replace(bound, max_loss_in_points=None).broken_by({"eval_old_wer": 99.0}) == {}


def test_a_guard_without_an_error_rate_cannot_be_bounded():
    GuardBound.of({"old": OLD}, None).note_untouched({})
    with pytest.raises(UserError, match="no row of old has a text, so that there is no WER to bou"):
        GuardBound.of({"old": OLD}, 2.0).note_untouched({"zero_shot_old_num_rows": 3})
