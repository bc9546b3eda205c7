"""What happens beside the training loop."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir

from speech_finetuning.base.errors import ExitCode, RunEnded
from speech_finetuning.base.files import write_json
from speech_finetuning.scoring.predictions import log_examples, write_predictions
from speech_finetuning.scoring.scorecard import Scorecard
from speech_finetuning.training.progress import StreamProgress

logger = logging.getLogger(__name__)

MAX_BROKEN_STEPS = 10  # steps in a row without a finite loss before the run is given up
NUM_LOGGED_PREDICTIONS = 3  # of each evaluation


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


class TensorBoardCurves(TensorBoardCallback):
    """TensorBoard without the library's dump of all arguments: curves are uploaded, local paths are
    not."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes nothing."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Begins the curves of eval with the untouched model's scores, which the library would file
        under train."""
        if self.logging_dir is None:
            # Set by the library at the start of training only: a score before it would go to ./runs
            # (transformers 5.24).
            self.logging_dir = os.path.join(args.output_dir, default_logdir())
        curves = {}
        for name, value in (logs or {}).items():
            curves[name.replace("zero_shot_", "eval_", 1)] = value
        super().on_log(args, state, control, logs=curves, **kwargs)


class SavePredictions(transformers.TrainerCallback):
    """Writes every transcript of an evaluation to files, and the first ones to the log."""

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
        rows = self.scorecard.scored
        log_examples(rows[:NUM_LOGGED_PREDICTIONS])
        if state.is_world_process_zero:
            name = evaluation_name(metrics or {})
            for path in write_predictions(Path(args.output_dir), name, rows):
                logger.info("all transcripts: %s", path)


def evaluation_name(metrics: dict[str, float]) -> str:
    """eval, test, zero_shot ...: the library does not tell callbacks the prefix of its metrics, but
    there is one figure that every evaluation has once."""
    figure = "_runtime"
    (name,) = [name.removesuffix(figure) for name in metrics if name.endswith(figure)]
    return name


def early_stopping(patience: int | None) -> list[transformers.TrainerCallback]:
    """Ends a training after `patience` evaluations without a better score; None: never."""
    return [] if patience is None else [transformers.EarlyStoppingCallback(patience)]
