"""The trainer's part of saving and continuing."""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_utils import rotate_checkpoints

from speech_finetuning.base.files import write_json
from speech_finetuning.base.shutdown import StopSignals
from speech_finetuning.data.positions import StreamPosition
from speech_finetuning.model.adapters import adapted_layers, merged_weights
from speech_finetuning.training.checkpoints import try_to_save, written_aside
from speech_finetuning.training.compat import saving_in, without_best_step
from speech_finetuning.training.progress import StreamProgress

logger = logging.getLogger(__name__)


class ResumableTrainer(transformers.Seq2SeqTrainer):
    """Seq2SeqTrainer whose checkpoints are complete or not there, hold the stream's position, and
    continue with the flags of now.

    uploads (HubUploads), if any, follows the saves, with a card by card_writer (CardWriter).
    """

    # As they are in this project; the library's are unions with None and with other models' kinds.
    args: transformers.Seq2SeqTrainingArguments
    model: transformers.WhisperForConditionalGeneration
    processing_class: transformers.WhisperProcessor

    def __init__(
        self,
        *,
        progress: StreamProgress,
        stop: StopSignals,
        uploads: Any = None,
        card_writer: Any = None,
        **trainer_arguments: Any,
    ) -> None:
        super().__init__(**trainer_arguments)
        self.progress = progress
        self.stop = stop
        self.uploads = uploads
        self.card_writer = card_writer
        self.checkpoint_to_resume: str | None = None
        self.save_error: Exception | None = None  # why the last save failed

    def output_dir(self) -> Path:
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    # -------------------------------------------------------------------------------------- saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Also saves what transformers 5.24 leaves out: preprocessor_config.json (for older
        readers) and normalizer.json."""
        self.model.config.use_cache = True  # the library's False is for training, not for users
        super().save_model(output_dir, _internal_call)
        self.model.config.use_cache = self.args.use_cache
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.output_dir())
        self.processing_class.feature_extractor.save_pretrained(folder)
        if adapted_layers(self.model) and not _internal_call:
            # A checkpoint, in contrast, keeps adapters apart: it must continue exactly.
            self.model.save_pretrained(folder, state_dict=merged_weights(self.model))
        spelling = self.processing_class.tokenizer.english_spelling_normalizer
        if spelling:
            write_json(folder / "normalizer.json", spelling)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        if state_dict is not None:
            # FSDP's state has tied weights twice, as tensors apart, of which save_pretrained (5.24)
            # would write both.
            tied = self.model.all_tied_weights_keys
            state_dict = {name: value for name, value in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Written aside, renamed, uploaded, and only then are old ones rotated; the library (5.24)
        writes in place and rotates first. A full disk keeps the older checkpoints."""
        was_deferred = self.stop.is_deferred
        self.stop.is_deferred = True
        output_dir = self.output_dir()
        step = self.state.global_step
        with written_aside(
            output_dir,
            step,
            is_writer=self.args.should_save,
            wait_for_everyone=self.accelerator.wait_for_everyone,
        ) as checkpoint:
            with saving_in(self, checkpoint.parent), without_best_step(self.state):
                checkpoint.attempt(super()._save_checkpoint, model, trial)
            # Here every rank has written its random state, or has failed to.
            positions = checkpoint.share_outcome(self.progress.position)
            if checkpoint.error is None and self.state.best_global_step == step:
                # On every rank: all will load it.
                self.state.best_model_checkpoint = str(checkpoint.final)
            if self.args.should_save:
                checkpoint.attempt(self.save_position, checkpoint.folder, positions)
        self.save_error = checkpoint.error
        if self.args.should_save and self.save_error is None:
            self.upload(checkpoint.final)
            rotate_checkpoints(
                output_dir=str(output_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.stop.is_deferred = was_deferred

    def save_position(self, folder: Path, positions: list[StreamPosition]) -> None:
        """Adds what makes a checkpoint complete: every rank's position in the stream, and the
        trainer's state with the final name of the best checkpoint."""
        state = self.progress.state(
            micro_batch_size=self.args.train_batch_size, positions=positions
        )
        write_json(folder / "stream_state.json", state)
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def upload(self, checkpoint: Path) -> None:
        """Hands a complete checkpoint to the uploads; one with adapters as the plain model that it
        makes."""
        if self.uploads is None:
            return
        folder = checkpoint
        if adapted_layers(self.model):
            folder = self.output_dir()
            self.save_error = try_to_save(checkpoint.name, self.save_model)
        error = try_to_save(checkpoint.name, self.submit_upload, folder, checkpoint)
        self.save_error = self.save_error or error

    def submit_upload(self, model_folder: Path, checkpoint: Path) -> None:
        """Has what was saved uploaded, with a card of what is known by now."""
        card = self.card_writer.during_training(self.state.log_history, self.progress.totals())
        self.uploads.submit(model_folder, card, checkpoint)

    # ---------------------------------------------------------------------------------- continuing

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # The library keeps the checkpoint's learning rate whatever --learning_rate says now
        # (transformers 5.24), and takes the first step at the rate of the old --max_steps.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        scheduler = self.lr_scheduler
        if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            kind = type(scheduler).__name__
            logger.warning("the learning rate goes on as in the checkpoint: %s.", kind)
            return
        rate = self.args.learning_rate
        if scheduler.base_lrs[0] != rate:
            logger.info("learning rate: %g now, %g in the checkpoint", rate, scheduler.base_lrs[0])
        scheduler.base_lrs = [rate] * len(scheduler.base_lrs)
        scheduler.last_epoch -= 1
        scheduler.step()  # recomputes the present rate

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        # Likewise with --eval_steps, --save_steps and --logging_steps, which the checkpoint's state
        # would override.
        result = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        return result

    def _load_scaler(self, checkpoint: str | None) -> None:
        # A run begun with --fp16 may go on without, as is advised when losses are not finite; the
        # library (5.24) would ask the scaler that is not there.
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)
        elif checkpoint is not None and (Path(checkpoint) / "scaler.pt").is_file():
            logger.info("the checkpoint is of an --fp16 run: its loss scale is not needed now.")
