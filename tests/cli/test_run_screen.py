"""What is shown while a run goes on: best so far, another pair each time, what is left."""

import logging
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from example_scores import SCORES, logged, with_rates

from speech_finetuning.cli.run_lines import STEP_HEADER
from speech_finetuning.cli.run_screen import Pace, RunScreen, count_evaluations, describe_pair
from speech_finetuning.scoring.guards import GuardBound
from speech_finetuning.scoring.scorecard import ReferenceRow, ScoredRow, TextPair

FIGURES = {
    "loss": 1.5,
    "learning_rate": 1e-5,
    "pass": 0.5,
    "samples_per_second": 10.0,
    "data_wait_fraction": 0.0,
}


def scored(number: int, reference: str | None = None) -> ScoredRow:
    row = ReferenceRow(
        id=str(number),
        set_name="",
        reference=f"said {number}" if reference is None else reference,
        duration_in_seconds=1.0,
    )
    pair = TextPair(reference="", prediction="")
    return ScoredRow(
        index=number, row=row, prediction=f"heard {number}", is_cut=False, readings={}, leading=pair
    )


class Run:
    """A training of which only the callbacks are there."""

    def __init__(self, caplog: pytest.LogCaptureFixture, **args: Any) -> None:
        caplog.set_level(logging.INFO)
        self.caplog = caplog
        self.args = SimpleNamespace(
            do_eval=True, eval_strategy="steps", metric_for_best_model=None, **args
        )
        self.state = transformers.TrainerState(is_world_process_zero=True, max_steps=600)
        self.state.eval_steps = 200
        card: Any = SimpleNamespace(targets={"": None}, scored=[scored(n) for n in range(100)])
        self.screen = RunScreen(card, GuardBound(rates={}, max_loss_in_points=None))

    def evaluate(self, role: str, step: int, wer: float, cer: float = 12.9) -> list[str]:
        """The lines of its block."""
        metrics = logged(with_rates(role, wer, cer)) | {f"{role}_runtime": 62.0}
        self.state.global_step = step
        if role == "eval":
            self.state.log_history.append({"step": step, **metrics})
        self.caplog.clear()
        self.screen.on_evaluate(self.args, self.state, None, metrics=metrics)
        return self.caplog.messages

    def log(self, step: int) -> list[str]:
        self.state.global_step = step
        self.caplog.clear()
        self.screen.on_log(self.args, self.state, None, logs=FIGURES)
        return self.caplog.messages


def test_a_score_is_compared_with_the_one_before_and_the_best(caplog: pytest.LogCaptureFixture):
    run = Run(caplog)
    assert run.evaluate("zero_shot", 0, 100.0)[0].startswith("score before training   WER 100.0 %")
    assert "WER 43.1 % (was 100.0, best so far)" in run.evaluate("eval", 200, 43.1)[0]
    assert "WER 50.0 % (was 43.1, best 43.1 at 200)" in run.evaluate("eval", 400, 50.0)[0]
    assert "WER 43.1 % (was 50.0, best 43.1 at 200)" in run.evaluate("eval", 600, 43.1)[0]
    assert "(" not in run.evaluate("test", 600, 44.0)[0]


def test_a_resumed_run_knows_the_scores_of_its_checkpoint(caplog: pytest.LogCaptureFixture):
    run = Run(caplog)
    run.state.log_history = [{"step": 200, "eval_wer": 43.1}, {"step": 300, "loss": 1.0}]
    assert "(was 43.1, best so far)" in run.evaluate("eval", 400, 40.0)[0]


def test_a_resumed_run_knows_the_score_before_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """It was stopped before its first evaluation."""
    (tmp_path / "zero_shot.json").write_text('{"zero_shot_wer": 57.0}')
    run = Run(caplog, output_dir=str(tmp_path))
    run.state.global_step = 104
    run.screen.on_train_begin(run.args, run.state, None)
    assert "(was 57.0, best so far)" in run.evaluate("eval", 200, 43.1)[0]


def test_the_first_score_is_compared_with_nothing(caplog: pytest.LogCaptureFixture):
    assert "(" not in Run(caplog).evaluate("eval", 200, 43.1)[0]


def test_where_characters_choose_the_best_model_they_lead(caplog: pytest.LogCaptureFixture):
    run = Run(caplog)
    run.args.metric_for_best_model = "cer"
    run.evaluate("eval", 200, 90.0, cer=20.0)
    assert run.evaluate("eval", 400, 95.0, cer=10.0)[0] == (
        "score at 400   CER 10.0 % (was 20.0, best so far)   WER 95.0 %"
    )


def test_another_pair_each_time(caplog: pytest.LogCaptureFixture):
    run = Run(caplog)
    pairs = [tuple(run.evaluate("eval", 200 * n, 50.0)[-2:]) for n in range(1, 60)]
    assert len(set(pairs)) == 59
    said, heard = pairs[0]
    assert said.split() == ["said", "said", "0"] and heard.split() == ["heard", "heard", "0"]


def test_a_pair_fits_the_screen_and_obeys_nobody():
    lines = describe_pair(scored(1, reference="uno\x1b[2J " + 100 * "palabra "))
    assert lines[0].startswith(r"    said   uno\x1b[2J palabra") and lines[0].endswith("…")
    assert max(map(len, lines)) <= 80
    assert describe_pair(scored(1, reference="")) == ["    heard  heard 1"]


def test_lines_of_steps_have_a_header_first_and_after_each_block(
    caplog: pytest.LogCaptureFixture,
):
    run = Run(caplog)
    assert run.log(10)[0] == STEP_HEADER and len(run.log(20)) == 1
    run.evaluate("eval", 200, 50.0)
    assert run.log(210)[0] == STEP_HEADER
    lines = [line for step in range(220, 420, 10) for line in run.log(step)]
    assert lines.count(STEP_HEADER) == 1  # once more after twenty lines


def test_other_processes_show_nothing(caplog: pytest.LogCaptureFixture):
    run = Run(caplog)
    run.state.is_world_process_zero = False
    assert run.log(10) == [] and run.evaluate("eval", 200, 50.0) == []
    run.screen.on_train_begin(run.args, run.state, None)
    for _ in range(20):
        run.screen.on_step_end(run.args, run.state, None)
    assert run.caplog.messages == []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """clock.now is what time.monotonic() says."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def test_after_ten_steps_the_time_that_is_left_is_told(
    caplog: pytest.LogCaptureFixture, clock: SimpleNamespace
):
    run = Run(caplog)
    run.evaluate("zero_shot", 0, 100.0)
    caplog.clear()
    run.screen.on_train_begin(run.args, run.state, None)
    clock.now += 500  # the worker's start, which belongs to no step
    for step in range(1, 15):
        run.state.global_step = step
        clock.now += 2
        run.screen.on_step_end(run.args, run.state, None)
    # After the eleventh step: 589 of 2 s, and three evaluations of 62 s.
    assert caplog.messages == ["time: about 22:44 min for 589 more steps and 3 evaluations"]


def test_of_an_evaluation_that_was_never_done_the_time_is_not_known(
    caplog: pytest.LogCaptureFixture, clock: SimpleNamespace
):
    run = Run(caplog)
    run.screen.on_train_begin(run.args, run.state, None)
    for step in range(1, 12):
        run.state.global_step = step
        clock.now += 2
        run.screen.on_step_end(run.args, run.state, None)
    assert caplog.messages == [
        "time: about 19:38 min for 589 more steps, not counting 3 evaluations"
    ]


def test_a_run_that_is_nearly_over_estimates_nothing(
    caplog: pytest.LogCaptureFixture, clock: SimpleNamespace
):
    run = Run(caplog)
    run.state.max_steps = 20
    for step in range(1, 21):
        run.state.global_step = step
        clock.now += 2
        run.screen.on_step_end(run.args, run.state, None)
    assert caplog.messages == []


def test_scoring_does_not_slow_the_estimate(clock: SimpleNamespace):
    pace = Pace()
    assert pace.seconds_left(10, 0) == math.inf
    pace.add_step()
    for _ in range(4):
        clock.now += 1
        pace.add_step()
    clock.now += 300
    pace.add_scoring(300)
    assert pace.seconds_left(10, 2) == 10 + 600


@pytest.mark.parametrize(
    ("step", "max_steps", "eval_steps", "left"),
    [(0, 600, 200, 3), (200, 600, 200, 2), (0, 500, 200, 3), (450, 500, 200, 1), (3, 4, 500, 1)],
)
def test_evaluations_that_are_still_to_come(step: int, max_steps: int, eval_steps: int, left: int):
    args = SimpleNamespace(do_eval=True, eval_strategy="steps")
    state = SimpleNamespace(global_step=step, max_steps=max_steps, eval_steps=eval_steps)
    assert count_evaluations(args, state) == left
    assert count_evaluations(SimpleNamespace(do_eval=True, eval_strategy="no"), state) == 1
    assert count_evaluations(SimpleNamespace(do_eval=False), state) == 0


def test_the_sets_of_a_mix_are_in_the_block(caplog: pytest.LogCaptureFixture):
    run = Run(caplog)
    run.screen.scorecard.targets = {"clean": None, "noisy": None}
    metrics = logged(SCORES) | {"eval_runtime": 3.0}
    metrics |= {f"eval_clean_{name}": 7 for name in ("wer", "cer", "num_rows")}
    run.screen.on_evaluate(run.args, run.state, None, metrics=metrics)
    assert [line for line in caplog.messages if "clean" in line] == [
        "    clean              WER 7.0 %   CER 7.0 %   7 rows"
    ]
    assert not any("noisy" in line for line in caplog.messages)
