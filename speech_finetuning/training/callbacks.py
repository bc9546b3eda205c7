"""What happens beside the training loop."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir

from speech_finetuning.base.errors import RunEnded
from speech_finetuning.base.files import write_json

logger = logging.getLogger(__name__)

MAX_BROKEN_STEPS = 10  # steps in a row without a finite loss before the run is given up


class SkipBrokenSteps(transformers.TrainerCallback):
    """Skips optimiser steps whose loss is NaN or infinite; the tenth in a row ends the run. All ranks decide alike."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.num_in_a_row, self.rows = trainer, 0, []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        loss, rows = torch.stack(self.trainer.step_losses).sum(), self.trainer.step_rows
        self.trainer.step_losses, self.trainer.step_rows = [], []
        if torch.isfinite(self.trainer.accelerator.reduce(loss)):
            self.num_in_a_row, self.rows = 0, []
            return
        optimizer.zero_grad(
            set_to_none=True
        )  # parameters without gradient are left alone, weight decay included
        self.trainer.progress.num_skipped_steps += 1
        self.num_in_a_row, self.rows = self.num_in_a_row + 1, self.rows + rows
        logger.warning(
            "step %d: the loss is not finite; the step is skipped.", state.global_step + 1
        )
        if self.num_in_a_row >= MAX_BROKEN_STEPS:
            write_json(
                listing := Path(args.output_dir) / "diverged_rows.json", gather_object(self.rows)
            )
            reason = f"the loss was not finite in {self.num_in_a_row} steps in a row, see {listing}"
            raise RunEnded(70, f"{reason}. Lower --learning_rate.")


class TensorBoardCurves(TensorBoardCallback):
    """TensorBoard without the library's dump of all arguments: the curves are uploaded, local paths are not."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes nothing."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The untouched model's scores begin the curves of eval (the library files them under train), and one chart
        under Custom scalars has the error rates of every set."""
        is_new = self.tb_writer is None
        # Set by the library at the start of training only: a score before it would go to ./runs (5.23).
        self.logging_dir = self.logging_dir or os.path.join(args.output_dir, default_logdir())
        logs = {
            name.replace("zero_shot_", "eval_", 1): value for name, value in (logs or {}).items()
        }
        super().on_log(args, state, control, logs=logs, **kwargs)
        if is_new and self.tb_writer is not None:
            charts = {
                kind.upper(): ["Multiline", [rf"^eval/(\w+_)?{kind}$"]] for kind in ("wer", "cer")
            }
            self.tb_writer.add_custom_scalars({"error rates": charts})
