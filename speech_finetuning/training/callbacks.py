"""What happens beside the training loop."""

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir

from speech_finetuning.base.errors import ExitCode, RunEnded
from speech_finetuning.base.files import finite_or_none, json_line, write_json, write_text
from speech_finetuning.scoring.guards import GuardBound
from speech_finetuning.scoring.predictions import write_predictions
from speech_finetuning.scoring.scorecard import Scorecard
from speech_finetuning.scoring.scores import PREDICT
from speech_finetuning.training.progress import StreamProgress

logger = logging.getLogger(__name__)

MAX_BROKEN_STEPS = 10  # steps in a row without a finite loss before the run is given up


class SkipBrokenSteps(transformers.TrainerCallback):
    """Skips optimiser steps whose loss is NaN or infinite; the tenth in a row ends the run.

    The trainer adds the loss of every micro-batch; all ranks decide alike.
    """

    def __init__(self, accelerator: Any, progress: StreamProgress) -> None:
        self.accelerator = accelerator
        self.progress = progress
        self.step_losses: list[torch.Tensor] = []
        self.step_rows: list[str] = []
        self.num_in_a_row = 0
        self.suspicious_rows: list[str] = []  # ids of the rows of these steps

    def add(self, loss: torch.Tensor, row_ids: list[str]) -> None:
        """Notes a micro-batch of the step."""
        self.step_losses.append(loss)
        self.step_rows += row_ids

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Decides on the step. Raises: RunEnded(70) at the tenth in a row that is skipped."""
        loss = torch.stack(self.step_losses).sum()
        rows = self.step_rows
        self.step_losses = []
        self.step_rows = []
        if torch.isfinite(self.accelerator.reduce(loss)):
            self.num_in_a_row = 0
            self.suspicious_rows = []
            return
        # Parameters without a gradient are left alone by the optimiser, weight decay included.
        optimizer.zero_grad(set_to_none=True)
        self.progress.num_skipped_steps += 1
        self.num_in_a_row += 1
        self.suspicious_rows += rows
        step = state.global_step + 1
        logger.warning("step %d: the loss is not finite; the step is skipped.", step)
        if self.num_in_a_row >= MAX_BROKEN_STEPS:
            self.give_up(Path(args.output_dir) / "diverged_rows.json")

    def give_up(self, listing: Path) -> None:
        """Lists the rows of the skipped steps. Raises: RunEnded(70)."""
        write_json(listing, gather_object(self.suspicious_rows))
        reason = f"the loss was not finite in {self.num_in_a_row} steps in a row, see {listing}"
        raise RunEnded(ExitCode.DIVERGED, f"{reason}. Lower --learning_rate.")


# The untouched model's scores begin the curves of the trained one's.
UNTOUCHED_CURVES = {"zero_shot_": "eval_", "untouched_test_": "test_"}
# TensorBoard opens on the first group, as it sorts groups by name.
FIRST_GROUP = "1 overview"
IN_FIRST_GROUP = ("loss", "eval_loss", "eval_wer", "learning_rate", "data_wait_fraction")
GROUPS = {"eval_": "2 evaluation", "test_": "3 test"}
LAST_GROUP = "4 training"


def tag_of(name: str) -> str:
    """Where TensorBoard shows a figure of the log: 'eval_wer' as '1 overview/eval_wer'."""
    for before, after in UNTOUCHED_CURVES.items():
        if name.startswith(before):
            return tag_of(f"{after}{name.removeprefix(before)}")
    if name in IN_FIRST_GROUP:
        return f"{FIRST_GROUP}/{name}"
    for prefix, group in GROUPS.items():
        if name.startswith(prefix):
            return f"{group}/{name.removeprefix(prefix)}"
    return f"{LAST_GROUP}/{name}"


class TensorBoardCurves(TensorBoardCallback):
    """TensorBoard without the library's dump of all arguments: curves are uploaded, local paths are
    not. What people look at first comes first."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes nothing."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The library would file everything that is not of eval or test under train."""
        if not state.is_world_process_zero:
            return
        if self.logging_dir is None:
            # Set by the library at the start of training only: a score before it would go to ./runs
            # (transformers 5.24).
            self.logging_dir = os.path.join(args.output_dir, default_logdir())
        if self.tb_writer is None:
            self._init_summary_writer(args)
        assert self.tb_writer is not None
        for name, value in (logs or {}).items():
            if isinstance(value, int | float):
                self.tb_writer.add_scalar(tag_of(name), value, state.global_step)
        self.tb_writer.flush()


class TrainerLog(transformers.TrainerCallback):
    """Every figure that is logged, as a line of trainer_log.jsonl; the terminal shows a few."""

    def __init__(self, output_dir: Path) -> None:
        self.file = output_dir / "trainer_log.jsonl"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drops the lines of steps that will be trained again."""
        if not state.is_world_process_zero or not self.file.is_file():
            return
        kept = []
        for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # torn by a kill
                if json.loads(line)["step"] <= state.global_step:
                    kept.append(f"{line}\n")
        write_text(self.file, "".join(kept))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "step": state.global_step,
            "max_steps": state.max_steps,
        }
        line |= {name: finite_or_none(value) for name, value in logs.items()}
        write_text(self.file, json_line(line), mode="a")


class SavePredictions(transformers.TrainerCallback):
    """Writes every transcript of an evaluation to files."""

    def __init__(self, scorecard: Scorecard) -> None:
        self.scorecard = scorecard

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            name = evaluation_name(metrics or {})
            paths = write_predictions(Path(args.output_dir), name, self.scorecard.scored)
            for path in paths if name == PREDICT else []:
                logger.info("all transcripts: %s", path)


class ScoreKeeper(transformers.TrainerCallback):
    """A callback that keeps what evaluations found, and is told when scores that were measured
    aside (see stages.score_aside) become those of the evaluation set."""

    def adopt(self, label: str, state: transformers.TrainerState) -> None:
        """The scores that were measured under this label are those of the saved weights."""
        raise NotImplementedError


def evaluation_name(metrics: dict[str, float]) -> str:
    """eval, test, zero_shot ...: the library does not tell callbacks the prefix of its metrics, but
    there is one figure that every evaluation has once."""
    figure = "_runtime"
    (name,) = [name.removesuffix(figure) for name in metrics if name.endswith(figure)]
    return name


class EarlyStoppingCallback(transformers.EarlyStoppingCallback):
    """The library's, under whose name checkpoints keep the count; an evaluation that is beyond the
    bound of a guard is no better one, whatever its metric."""

    guard_bound: GuardBound | None = None  # the trainer's

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.guard_bound is None or not self.guard_bound.broken_by(metrics or {}):
            super().on_evaluate(args, state, control, metrics, **kwargs)
            return
        self.early_stopping_patience_counter += 1
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


def early_stopping(patience: int | None) -> list[transformers.TrainerCallback]:
    """Ends a training after `patience` evaluations without a better score; None: never."""
    return [] if patience is None else [EarlyStoppingCallback(patience)]
