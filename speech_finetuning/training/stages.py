"""The stages of a run: scores of the untouched model, training, saving, final scores."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import datasets
import transformers

from speech_finetuning.base.errors import ExitCode, RunEnded, TimeIsOver, UserError, one_line
from speech_finetuning.base.files import write_json, write_text
from speech_finetuning.scoring.metrics import RowErrors
from speech_finetuning.scoring.scores import BEFORE, ZERO_SHOT, last_scores
from speech_finetuning.training.callbacks import ScoreKeeper
from speech_finetuning.training.checkpoints import (
    find_checkpoint,
    is_complete,
    step_of,
    try_to_save,
)
from speech_finetuning.training.compat import restore_early_stopping
from speech_finetuning.training.reload_check import check_reload
from speech_finetuning.training.settings import is_finished
from speech_finetuning.training.trainer import SpeechTrainer

logger = logging.getLogger(__name__)


def train(trainer: SpeechTrainer, checkpoint: Path | None) -> dict[str, float]:
    """Trains to max_steps and returns the library's figures. A finished run is loaded, not trained
    a step further."""
    if checkpoint is not None:
        check_sharding_flags(trainer.args, checkpoint)
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        stopper = restore_early_stopping(trainer, state["stateful_callbacks"])
        patience = None if stopper is None else stopper.early_stopping_patience
        if is_finished(state, trainer.args.max_steps, patience):
            check_was_trained(trainer, state["global_step"])
            return load_finished_run(trainer, checkpoint, state)
        trainer.checkpoint_to_resume = str(checkpoint)
    metrics = train_and_save(trainer, checkpoint)
    progress = trainer.progress
    progress.check_rejections()
    if trainer.eval_dataset is not None and trainer.args.world_size == 1:
        check_reload(trainer, progress.output_dir)
    progress.log_summary()
    return metrics | progress.totals()


def check_sharding_flags(args: transformers.Seq2SeqTrainingArguments, checkpoint: Path) -> None:
    """Raises UserError for a checkpoint that FSDP or DeepSpeed wrote if it is not used now, and the
    other way round."""
    for name, flag in (("pytorch_model_fsdp.bin", "fsdp"), ("latest", "deepspeed")):
        if (checkpoint / name).is_file() != bool(getattr(args, flag)):
            raise UserError(f"{checkpoint}: pass --{flag} if it was saved with it, and only then.")


def load_finished_run(
    trainer: SpeechTrainer, checkpoint: Path, state: dict[str, Any]
) -> dict[str, float]:
    """Loads and saves the model of a run with nothing left to train, whose log goes on with it.
    Returns the figures of its training."""
    # The library would train one more step (transformers 5.24, trainer.py, _run_epoch).
    logger.info(
        "%s is the end of a training: nothing is left to train. A larger --max_steps goes on, another "
        "--output_dir starts anew.",
        checkpoint,
    )
    best = best_checkpoint(checkpoint, state)
    if trainer.args.load_best_model_at_end and best is not None:
        checkpoint = best
    trainer._load_from_checkpoint(str(checkpoint))
    restore_log(trainer.state, state, step_of(checkpoint))
    trainer.is_deepspeed_enabled = False  # there is no engine, and the model stays whole
    save_final_model(trainer)
    record = trainer.progress.output_dir / "all_results.json"
    if not record.is_file():
        return {}
    results = json.loads(record.read_text(encoding="utf-8"))
    return {name: value for name, value in results.items() if name.startswith("train_")}


def best_checkpoint(checkpoint: Path, state: dict[str, Any]) -> Path | None:
    """The run's best checkpoint, also if its folder has been moved; None if there is none."""
    name = state["best_model_checkpoint"]
    if name is None:
        return None
    places = (Path(name), checkpoint.parent / Path(name).name)
    return next((place for place in places if place.is_dir()), None)


def restore_log(state: transformers.TrainerState, saved: dict[str, Any], step: int) -> None:
    """The log of a finished run, for its card: without the scores of the weights of this step,
    which this start will measure."""
    state.global_step = step
    state.log_history = [
        entry
        for entry in saved["log_history"]
        if not ("eval_loss" in entry and entry["step"] == step)
    ]
    state.best_metric = saved["best_metric"]
    state.best_global_step = saved["best_global_step"]
    state.best_model_checkpoint = saved["best_model_checkpoint"]


def train_and_save(trainer: SpeechTrainer, checkpoint: Path | None) -> dict[str, float]:
    """The training itself; if it is interrupted between two steps, what has been trained is saved.
    Returns the library's figures."""
    try:
        resume_from = str(checkpoint) if checkpoint is not None else None
        metrics = trainer.train(resume_from_checkpoint=resume_from).metrics
        check_was_trained(trainer, trainer.state.global_step)
        save_final_model(trainer)
    except pickle.UnpicklingError as error:  # torch loads numbers only
        names = "optimizer.pt, scheduler.pt, scaler.pt or rng_state.pth"
        raise UserError(
            f"{checkpoint}: {names} holds code, which is never run. Use another checkpoint."
        ) from error
    except Exception as ending:
        if not trainer.stop.is_deferred:  # between two steps, or scoring: nothing is half done
            save_at_the_end(trainer, ending)
        raise
    finally:
        trainer.stop.is_deferred = False
    metrics.pop("total_flos", None)  # of the library's formula, which is not of speech
    return metrics


def check_was_trained(trainer: SpeechTrainer, num_steps: int) -> None:
    """Raises RunEnded(70) for a run all of whose steps were skipped: its model is the untrained
    one, whose weights may be damaged."""
    if num_steps > 0 and trainer.progress.num_skipped_steps >= num_steps:
        raise RunEnded(
            ExitCode.DIVERGED,
            f"the loss was not finite in any of the {num_steps} steps: nothing has been trained. "
            "Download the model again, its weights may be damaged, or lower --learning_rate.",
        )


def save_final_model(trainer: SpeechTrainer) -> None:
    """The trained model to output_dir. Raises: RunEnded(73) if it, or the last checkpoint, could
    not be written."""
    checkpoint = f"checkpoint-{trainer.state.global_step}"
    error = try_to_save(checkpoint, trainer.save_model) or trainer.save_error
    if error is not None:
        reason = f"the trained model could not be saved: {one_line(error)}"
        raise RunEnded(ExitCode.DISK_FULL, reason)


def save_at_the_end(trainer: SpeechTrainer, ending: Exception) -> None:
    """Saves what has been trained when a run ends between two steps, and says how to go on.
    ending: why it ends."""
    step = trainer.state.global_step
    output_dir = trainer.output_dir()
    if step > 0 and not is_complete(output_dir / f"checkpoint-{step}"):
        trainer._save_checkpoint(trainer.model, trial=None)  # the library has no public name for it
    newest = find_checkpoint(output_dir, "auto")
    if trainer.is_world_process_zero():
        saved = newest or "nothing, no step was finished"
        # A run that was stopped says how to go on as its last word.
        is_told_later = trainer.stop.received or isinstance(ending, TimeIsOver)
        advice = "" if is_told_later else ". To go on, start the same command again."
        logger.info("saved: %s%s", saved, advice)


def zero_shot_scores(
    trainer: SpeechTrainer, checkpoint: Path | None, final_sets: dict[str, datasets.Dataset]
) -> dict[str, float]:
    """Scores of the untouched model, also with prompts and of the test split if these are scored at
    the end; a continued run reads them, and what was wrong in each row, from zero_shot.json and
    zero_shot_rows.json.

    final_sets: by the role that they are scored as at the end.
    """
    scorecard = trainer.compute_metrics
    record = trainer.output_dir() / "zero_shot.json"
    rows_record = trainer.output_dir() / "zero_shot_rows.json"
    if checkpoint is not None and record.is_file():
        if rows_record.is_file():  # not of runs that began before 2026-11-26
            scorecard.untouched = read_row_errors(rows_record)
        metrics = json.loads(record.read_text(encoding="utf-8"))
        trainer.guard_bound.note_untouched(metrics)
        return metrics
    metrics = trainer.evaluate(metric_key_prefix=ZERO_SHOT)
    trainer.guard_bound.note_untouched(metrics)
    for role, rows in final_sets.items():
        if role in BEFORE:
            metrics |= trainer.evaluate(rows, metric_key_prefix=BEFORE[role])
    if trainer.is_world_process_zero():
        write_json(record, metrics)
        text = json.dumps(scorecard.untouched)
        write_text(rows_record, f"{text}\n")
    return metrics


def read_row_errors(record: Path) -> dict[str, dict[int, RowErrors]]:
    """What `Scorecard.untouched` was. JSON has made its keys texts, and its tuples lists."""
    roles = json.loads(record.read_text(encoding="utf-8"))
    return {
        role: {int(index): RowErrors(*errors) for index, errors in rows.items()}
        for role, rows in roles.items()
    }


def final_scores(trainer: SpeechTrainer) -> dict[str, float]:
    """Scores of the weights that are saved. The last evaluation may have been of these; an earlier
    one, of the best step, is repeated, because its transcripts are no longer there."""
    step = trainer.state.global_step
    # The best step of all may lie between two saves: what was loaded is the best checkpoint.
    best_checkpoint = trainer.state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and best_checkpoint:
        step = step_of(Path(best_checkpoint))
    history = trainer.state.log_history
    if not last_scores(history, step):
        return trainer.evaluate()
    if last_scores(history) == last_scores(history, step):
        return last_scores(history, step)
    label = "eval_best"
    metrics = score_aside(trainer, label)
    adopt_scores(trainer, label)
    return metrics


def score_aside(trainer: SpeechTrainer, label: str) -> dict[str, float]:
    """Scores under the names of an evaluation, which are not logged as one of this step: its files
    and what is logged have the label instead of `eval`."""
    metrics = trainer.evaluate(metric_key_prefix=label)
    return {name.replace(label, "eval", 1): value for name, value in metrics.items()}


def adopt_scores(trainer: SpeechTrainer, label: str) -> None:
    """What was scored aside under this label is what is saved: its files take the place of the
    evaluation's."""
    if not trainer.is_world_process_zero():
        return
    for path in files_of(trainer.output_dir(), label):
        path.replace(path.with_name(path.name.replace(label, "eval", 1)))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ScoreKeeper):
            callback.adopt(label, trainer.state)


def drop_scores(trainer: SpeechTrainer, label: str) -> None:
    """Removes the files of weights that were tried and are not saved."""
    if trainer.is_world_process_zero():
        for path in files_of(trainer.output_dir(), label):
            path.unlink()


def files_of(output_dir: Path, label: str) -> list[Path]:
    """The transcripts that an evaluation under this label has written."""
    return [*output_dir.glob(f"predictions_{label}*"), *output_dir.glob(f"worst_{label}*")]
