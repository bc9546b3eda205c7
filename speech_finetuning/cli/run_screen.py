"""What the terminal shows while a run goes on, in place of transformers' progress callbacks: one
line a logging step, one block an evaluation, one bar below."""

import json
import logging
import math
import time
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import transformers
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from speech_finetuning.base.files import counted
from speech_finetuning.cli.run_lines import (
    INDENT,
    STEP_HEADER,
    Earlier,
    describe_guard,
    describe_scores_at,
    describe_set,
    describe_step,
    describe_time,
)
from speech_finetuning.cli.terminal import SCREEN, fit
from speech_finetuning.scoring.guards import GuardBound
from speech_finetuning.scoring.scorecard import Scorecard, ScoredRow
from speech_finetuning.scoring.scores import EVAL, ZERO_SHOT, metric_prefix, read_scores
from speech_finetuning.training.callbacks import evaluation_name
from speech_finetuning.training.trainer import SpeechTrainer

logger = logging.getLogger(__name__)

STEPS_BEFORE_ESTIMATE = 10
LINES_UNDER_A_HEADER = 20
COLUMNS_OF_A_TRANSCRIPT = 68
STRIDE = 7919  # from one evaluation's pair to the next: a prime, so that all rows have their turn


@dataclass(kw_only=True)
class Pace:
    """How long a step takes, scoring left out. The first step of a start only sets the clock: it
    waits for the reading worker, and compiles."""

    began: float | None = None  # on time.monotonic()
    num_steps: int = 0
    last_scoring_in_seconds: float | None = None

    def add_step(self) -> None:
        if self.began is None:
            self.began = time.monotonic()
        else:
            self.num_steps += 1

    def add_scoring(self, seconds: float) -> None:
        """Leaves an evaluation out of the steps' time."""
        self.last_scoring_in_seconds = seconds
        if self.began is not None:
            self.began += seconds

    def seconds_left(self, num_steps: int, num_evaluations: int) -> float:
        """An estimate; not finite before the second step."""
        if self.began is None or self.num_steps == 0:
            return math.inf
        of_step = (time.monotonic() - self.began) / self.num_steps
        return num_steps * of_step + num_evaluations * (self.last_scoring_in_seconds or 0.0)


def replace_progress_callbacks(trainer: SpeechTrainer) -> None:
    """The library's dicts and bars give way to a RunScreen."""
    trainer.pop_callback(transformers.PrinterCallback)
    trainer.pop_callback(DEFAULT_PROGRESS_CALLBACK)
    trainer.add_callback(RunScreen(trainer.compute_metrics, trainer.guard_bound))


def leading_rate(args: Any) -> str:
    return "cer" if (args.metric_for_best_model or "").endswith("cer") else "wer"


def untouched_error_rate(args: Any) -> float | None:
    """Of a run that goes on, as it was measured at its beginning."""
    try:
        record = (Path(args.output_dir) / "zero_shot.json").read_text(encoding="utf-8")
        return json.loads(record).get(f"{metric_prefix(ZERO_SHOT, '')}{leading_rate(args)}")
    except (OSError, ValueError, AttributeError):
        return None


class RunScreen(transformers.TrainerCallback):
    """Of the first process; the others show nothing."""

    def __init__(self, scorecard: Scorecard, guards: GuardBound) -> None:
        self.scorecard = scorecard
        self.guards = guards
        self.pace = Pace()
        self.is_training = False
        self.num_lines = 0  # since the last header
        self.num_evaluations = 0
        self.num_batches = 0  # of the evaluation that goes on
        self.before: float | None = None  # the untouched model's error rate

    # ----------------------------------------------------------------------------------- training

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_training = True
        if self.before is None and state.global_step:
            self.before = untouched_error_rate(args)
        self.pace = Pace(last_scoring_in_seconds=self.pace.last_scoring_in_seconds)
        self.draw(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pace.add_step()
        self.draw(args, state)
        if self.pace.num_steps == STEPS_BEFORE_ESTIMATE and state.is_world_process_zero:
            self.estimate(args, state)

    def draw(self, args: Any, state: Any) -> None:
        """The bar of the training, as it is now."""
        if state.is_world_process_zero:
            seconds_left = self.seconds_left(args, state)
            steps = "step" if state.max_steps == 1 else "steps"
            text = f"{state.global_step}/{state.max_steps} {steps}"
            if math.isfinite(seconds_left):
                text = f"{text}, {describe_time(seconds_left)} left"
            SCREEN.show_bar("training", state.global_step, state.max_steps, text)

    def seconds_left(self, args: Any, state: Any) -> float:
        num_steps = state.max_steps - state.global_step
        return self.pace.seconds_left(num_steps, count_evaluations(args, state))

    def estimate(self, args: Any, state: Any) -> None:
        """After ten steps: when the run will be over."""
        num_steps = state.max_steps - state.global_step
        if num_steps <= STEPS_BEFORE_ESTIMATE:
            return
        num_evaluations = count_evaluations(args, state)
        scoring = ""
        if num_evaluations:
            is_known = self.pace.last_scoring_in_seconds is not None
            scoring = f" and {counted(num_evaluations, 'evaluation')}"
            if not is_known:
                scoring = f", not counting {counted(num_evaluations, 'evaluation')}"
        left = describe_time(self.seconds_left(args, state))
        logger.info("time: about %s for %s more steps%s", left, f"{num_steps:,}", scoring)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        assert logs is not None
        if self.num_lines % LINES_UNDER_A_HEADER == 0:
            logger.info(STEP_HEADER)
        self.num_lines += 1
        logger.info(describe_step(state.global_step, logs, self.seconds_left(args, state)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_training = False
        SCREEN.hide_bar()

    # ------------------------------------------------------------------------------------ scoring

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        self.num_batches += 1
        if state.is_world_process_zero:
            text = f"{self.num_batches}/{len(eval_dataloader)} batches"
            SCREEN.show_bar("scoring", self.num_batches, len(eval_dataloader), text)

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_batches = 0
        self.num_lines = 0  # the next step's line has a header
        if not state.is_world_process_zero:
            return
        assert metrics is not None
        name = evaluation_name(metrics)
        seconds = metrics[f"{name}_runtime"]
        if name == EVAL:
            self.pace.add_scoring(seconds)
        elif name == ZERO_SHOT:
            self.pace.last_scoring_in_seconds = seconds
        for line in self.describe(name, args, state, metrics):
            logger.info("%s", line)
        if self.is_training:
            self.draw(args, state)
        else:
            SCREEN.hide_bar()

    def describe(self, role: str, args: Any, state: Any, metrics: dict[str, float]) -> list[str]:
        """The block of an evaluation, with one pair of its texts."""
        lead = leading_rate(args)
        scores = read_scores(metrics, role=role)
        assert scores is not None
        earlier = self.earlier(f"{metric_prefix(EVAL, '')}{lead}", state.log_history)
        if role == ZERO_SHOT:
            self.before = metrics.get(f"{metric_prefix(role, '')}{lead}")
        lines = describe_scores_at(
            role,
            state.global_step,
            scores,
            lead=lead,
            earlier=earlier,
            seconds=metrics[f"{role}_runtime"],
        )
        lines += self.describe_sets(role, metrics)
        rows = self.scorecard.scored
        if rows:
            lines += describe_pair(rows[self.num_evaluations * STRIDE % len(rows)])
        self.num_evaluations += 1
        return lines

    def describe_sets(self, role: str, metrics: dict[str, float]) -> list[str]:
        """The lines of the sets of a --data_mix, guards last."""
        targets = self.scorecard.targets
        is_total = len(targets) - len(self.guards.rates) == 1  # the one that is no guard
        lines = []
        for set_name in targets:
            of_set = read_scores(metrics, role=role, set_name=set_name) if set_name else None
            if of_set is None:
                continue
            if set_name in self.guards.rates:
                before = None if role == ZERO_SHOT else self.guards.untouched.get(set_name)
                rate_name = self.guards.rates[set_name]
                lines += describe_guard(of_set, rate_name=rate_name, before=before).split("\n")
            elif not is_total or not self.guards.rates:
                lines.append(describe_set(of_set))
        return lines

    def earlier(self, metric: str, history: list[dict[str, Any]]) -> Earlier | None:
        """The scores before the one that was logged last, in this start and those before it."""
        scores = [(entry["step"], entry[metric]) for entry in history if metric in entry][:-1]
        if self.before is not None:
            scores.insert(0, (0, self.before))
        if not scores:
            return None
        step_of_best, best = min(scores, key=itemgetter(1))
        return Earlier(last=scores[-1][1], best=best, step_of_best=step_of_best)


def count_evaluations(args: Any, state: Any) -> int:
    """Evaluations that are still to come, the one at the end included."""
    if not args.do_eval:
        return 0
    if args.eval_strategy == "no":
        return 1
    steps = state.eval_steps
    at_end = 1 if state.max_steps % steps else 0
    return state.max_steps // steps - state.global_step // steps + at_end


def describe_pair(row: ScoredRow) -> list[str]:
    """What was said in a clip, if that is known, and what the model heard."""
    lines = []
    if row.row.reference:
        lines.append(f"{INDENT}said   {fit(row.row.reference, COLUMNS_OF_A_TRANSCRIPT)}")
    lines.append(f"{INDENT}heard  {fit(row.prediction, COLUMNS_OF_A_TRANSCRIPT)}")
    return lines
