"""How long to train: passes over the data to steps, and a sensible length where none is given."""

import logging
import math
from collections.abc import Sequence
from typing import Any

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import counted
from speech_finetuning.data.preprocessing import SpeechDataset

logger = logging.getLogger(__name__)

# Fine-tuning takes some passes; after many a model recites its training set.
MANY_PASSES = 20
SOME_PASSES = 10
# Where neither --max_steps nor --num_train_epochs is given: USUAL_PASSES, but at least FEWEST_CLIPS
# as far as SOME_PASSES allow, and at most MOST_CLIPS, which are the 2022 event's 5,000 steps of 32.
USUAL_PASSES = 5
FEWEST_CLIPS = 16_000
MOST_CLIPS = 160_000
STEPS_IF_NOT_COUNTED = 2_000
USUAL_SAVE_STEPS = 500
USUAL_LOGGING_STEPS = 25
FEWEST_SAVES = 5


def count_steps(
    num_passes: float | None, train_sets: Sequence[SpeechDataset], rows_per_step: int
) -> int:
    """Steps of --num_train_epochs passes; None: of a length by the number of rows.
    Raises: UserError if passes are given and cannot be counted."""
    if num_passes is None:
        return sensible_steps(train_sets, rows_per_step)
    if len(train_sets) > 1:
        raise UserError(
            "--num_train_epochs: the passes of a mix end at different times. Pass --max_steps N "
            "instead."
        )
    num_rows = train_sets[0].rows_per_pass()
    if num_rows is None:
        raise UserError("--num_train_epochs: rows cannot be counted. Pass --max_steps N instead.")
    return math.ceil(num_passes * num_rows / rows_per_step)


def sensible_steps(train_sets: Sequence[SpeechDataset], rows_per_step: int) -> int:
    """A length by the number of rows, which is told; of a mix by the source that is used up
    first."""
    weights = sum(dataset.weight for dataset in train_sets)
    rows_of_sources = [
        num_rows * weights / dataset.weight
        for dataset in train_sets
        if (num_rows := dataset.rows_per_pass())
    ]
    num_steps = STEPS_IF_NOT_COUNTED
    reason = "as the rows cannot be counted"
    if rows_of_sources:
        rows_per_pass = min(rows_of_sources)
        fewest = min(FEWEST_CLIPS, SOME_PASSES * rows_per_pass)
        num_clips = min(MOST_CLIPS, max(fewest, USUAL_PASSES * rows_per_pass))
        num_steps = math.ceil(num_clips / rows_per_step)
        reason = f"for {counted(round(rows_per_pass), 'row')}"
    steps = counted(num_steps, "step")
    logger.info("length: %s, chosen %s; --max_steps N: another", steps, reason)
    return num_steps


def choose_saves(args: Any) -> None:
    """Fills in what is not given of --save_steps, --eval_steps and --logging_steps. args: the
    script's TrainingArguments.

    The library would score at every --logging_steps, which is far too often. Saves fall on
    evaluations: only a model that is both scored and saved can be kept as the best.
    """
    args.is_logging_given = bool(args.logging_steps)
    if not args.logging_steps:
        args.logging_steps = USUAL_LOGGING_STEPS
    args.is_saving_given = bool(args.save_steps)
    args.is_scoring_given = bool(args.eval_steps)
    if not args.save_steps:
        args.save_steps = saves_on_evaluations(args.eval_steps, USUAL_SAVE_STEPS)
    if not args.eval_steps:
        args.eval_steps = args.save_steps


def saves_on_evaluations(eval_steps: float | None, wanted: int) -> float:
    """The largest multiple of --eval_steps that is at most the wanted --save_steps, or
    --eval_steps if that is more, or a share of all steps."""
    if not eval_steps:
        return wanted
    if eval_steps < 1:
        return eval_steps
    return eval_steps * max(1, wanted // eval_steps)


def save_within(args: Any) -> None:
    """Where the length was not known to the user, the usual --save_steps and --eval_steps may lie
    beyond it: a short run is saved and scored at least five times. What is given stays."""
    if args.is_saving_given:
        return
    wanted = min(USUAL_SAVE_STEPS, math.ceil(args.max_steps / FEWEST_SAVES))
    if args.is_scoring_given:
        args.save_steps = saves_on_evaluations(args.eval_steps, wanted)
    else:
        args.save_steps = wanted
        args.eval_steps = wanted


def log_within(args: Any) -> None:
    """A short run has at least five lines of the log, where --logging_steps does not say."""
    if args.max_steps > 0 and not args.is_logging_given:
        args.logging_steps = min(USUAL_LOGGING_STEPS, math.ceil(args.max_steps / FEWEST_SAVES))
