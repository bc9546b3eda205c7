"""A training from its checkpoint to its saved, reloaded model."""

import json
import logging
import pickle
from pathlib import Path

import torch
import transformers

from speech_finetuning.base.errors import RunEnded, UserError, one_line
from speech_finetuning.base.files import write_json
from speech_finetuning.base.rejections import describe_counts
from speech_finetuning.data.audio import HOP_LENGTH_IN_SAMPLES, SAMPLE_RATE_IN_HZ
from speech_finetuning.model.adapters import merged_weights
from speech_finetuning.model.generation import generate_ids
from speech_finetuning.scoring.scores import last_scores
from speech_finetuning.training.checkpoints import find_checkpoint, is_complete
from speech_finetuning.training.trainer import SpeechTrainer

logger = logging.getLogger(__name__)


def train(trainer: SpeechTrainer, checkpoint: Path | None) -> dict[str, float]:
    """Trains to max_steps and returns the library's figures. A finished run is loaded, not trained a step further."""
    if checkpoint is not None:
        for name, flag in (("pytorch_model_fsdp.bin", "fsdp"), ("latest", "deepspeed")):
            if (checkpoint / name).is_file() != bool(getattr(trainer.args, flag)):
                raise UserError(
                    f"{checkpoint}: pass --{flag} if it was saved with it, and only then."
                )
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if stopper := trainer.pop_callback(transformers.EarlyStoppingCallback):
            saved = state["stateful_callbacks"].get(type(stopper).__name__, {"attributes": {}})
            vars(stopper).update(
                saved["attributes"]
            )  # else it would count anew (transformers 5.23)
            trainer.add_callback(stopper)
        has_stopped = (
            stopper and stopper.early_stopping_patience_counter >= stopper.early_stopping_patience
        )
        if has_stopped or state["global_step"] >= trainer.args.max_steps:
            # The library would train one more step (transformers 5.23, trainer.py, _run_epoch).
            logger.info("%s is the end of a training: nothing is left to train.", checkpoint)
            best = trainer.args.load_best_model_at_end and state["best_model_checkpoint"]
            trainer._load_from_checkpoint(str(best or checkpoint))
            trainer.is_deepspeed_enabled = False  # there is no engine, and the model stays whole
            save_final_model(trainer)
            record = trainer.progress.output_dir / "all_results.json"
            previous = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
            return {name: value for name, value in previous.items() if name.startswith("train_")}
        trainer.checkpoint_to_resume = str(checkpoint)
    try:
        metrics = trainer.train(
            resume_from_checkpoint=str(checkpoint) if checkpoint else None
        ).metrics
        save_final_model(trainer)
    except pickle.UnpicklingError as error:  # torch loads numbers only
        names = "optimizer.pt, scheduler.pt or rng_state.pth"
        raise UserError(
            f"{checkpoint}: {names} holds code, which is never run. Use another checkpoint."
        ) from error
    except Exception:
        if not trainer.stop.is_deferred:  # between two steps, or scoring: nothing is half done
            save_at_the_end(trainer)
        raise
    finally:
        trainer.stop.is_deferred = False
    progress = trainer.progress
    progress.check_rejections()
    if trainer.eval_dataset is not None and trainer.args.world_size == 1:
        check_reload(trainer, progress.output_dir)
    logger.info(
        "training rows: %d, rejected: %s", progress.num_rows, describe_counts(progress.rejected)
    )
    return {
        name: value for name, value in metrics.items() if name != "total_flos"
    } | progress.totals()


def save_final_model(trainer: SpeechTrainer) -> None:
    """The trained model to output_dir. Raises: RunEnded(73) if it, or the last checkpoint, could not be written."""
    trainer.try_to_save(trainer.save_model)
    if trainer.save_error is not None:
        raise RunEnded(73, f"the trained model could not be saved: {one_line(trainer.save_error)}")


@torch.no_grad()
def check_reload(trainer: SpeechTrainer, folder: Path) -> None:
    """Loads what was saved as its users will: it must hear in 8 evaluation clips what the model in memory hears.
    Raises: RunEnded(1) with the file that differs."""
    shortest = trainer.eval_dataset.select(
        range(max(0, len(trainer.eval_dataset) - 8), len(trainer.eval_dataset))
    )
    window_in_seconds = trainer.window_in_frames * HOP_LENGTH_IN_SAMPLES / SAMPLE_RATE_IN_HZ
    rows = [row for row in shortest if row["duration"] <= window_in_seconds]
    if not rows:
        return
    try:
        features, processor = trainer.padded(trainer.eval_collator(rows)), trainer.processing_class
        model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(
            folder, dtype=trainer.model.dtype
        )
        model.to(features.device)
        fresh = transformers.AutoProcessor.from_pretrained(folder)
        how = {
            "max_new_tokens": min(64, trainer.compute_metrics.max_new_tokens),
            "max_length": None,
        }
        pairs = ((trainer.model.eval(), processor), (model, fresh))
        ids = [generate_ids(m, m.get_encoder()(features), **how) for m, _ in pairs]
        heard = [
            p.batch_decode(tokens) for (_, p), tokens in zip(pairs, ids, strict=True)
        ]  # special tokens too
    except torch.OutOfMemoryError:
        logger.warning(
            "no GPU memory left to load the saved model beside the trained one: it was not compared."
        )
        return
    if heard[0] != heard[1]:
        expected = merged_weights(trainer.model)
        same = all(
            torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items()
        )
        configs = (
            trainer.model.generation_config.to_json_string(),
            model.generation_config.to_json_string(),
        )
        files = ["model.safetensors"] * (not same) + ["generation_config.json"] * (
            len(set(configs)) > 1
        )
        file = folder / (files or ["tokenizer.json"])[0]
        raise RunEnded(
            1, f"the saved model hears {heard[1][:1]}, the trained one {heard[0][:1]}: see {file}."
        )
    logger.info("%s, loaded afresh, hears the same in %d clips.", folder, len(rows))


def save_at_the_end(trainer: SpeechTrainer) -> None:
    """Saves what has been trained when a run ends between two steps, and says how to go on."""
    step, output_dir = trainer.state.global_step, Path(trainer.args.output_dir)
    if step > 0 and not is_complete(output_dir / f"checkpoint-{step}"):
        trainer._save_checkpoint(trainer.model, trial=None)  # the library has no public name for it
    newest = find_checkpoint(output_dir, "auto")
    if trainer.is_world_process_zero():
        logger.warning(
            "saved: %s. To go on, start the same command again.",
            newest or "nothing, no step was finished",
        )


def zero_shot_scores(
    trainer: SpeechTrainer, output_dir: Path, checkpoint: Path | None
) -> dict[str, float]:
    """Scores of the untouched model; a continued run reads them from zero_shot.json."""
    record = output_dir / "zero_shot.json"
    if checkpoint is not None and record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))
    metrics = trainer.evaluate(metric_key_prefix="zero_shot")
    if trainer.is_world_process_zero():
        write_json(record, metrics)
    return metrics


def final_scores(trainer: SpeechTrainer) -> dict[str, float]:
    """Scores of the weights that are saved; the last evaluation may have scored them already."""
    step = trainer.state.global_step
    # The best step of all may lie between two saves: what was loaded is the best checkpoint.
    best_checkpoint = trainer.state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and best_checkpoint:
        step = int(best_checkpoint.rpartition("-")[2])
    return last_scores(trainer.state.log_history, step) or trainer.evaluate()
