"""Seq2SeqTrainer and the few overrides."""

import itertools
import logging
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import transformers
from accelerate.utils import gather_object
from torch.nn import functional
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.modeling_outputs import BaseModelOutput
from transformers.trainer_utils import rotate_checkpoints

from speech_finetuning.base.errors import RunEnded, one_line, portable
from speech_finetuning.base.files import write_json
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.base.shutdown import StopSignals, ignore_signals
from speech_finetuning.base.threads import num_usable_cores
from speech_finetuning.data.audio import (
    FRAMES_PER_POSITION,
    HOP_LENGTH_IN_SAMPLES,
    SAMPLE_RATE_IN_HZ,
    pad_features,
)
from speech_finetuning.data.positions import StreamPosition
from speech_finetuning.data.text import IGNORED_LABEL
from speech_finetuning.model.adapters import adapted_layers, merged_weights
from speech_finetuning.model.generation import generate_ids
from speech_finetuning.model.windows import encoder_window
from speech_finetuning.scoring.predictions import log_examples, write_predictions
from speech_finetuning.training.callbacks import SkipBrokenSteps, TensorBoardCurves
from speech_finetuning.training.progress import StreamProgress

logger = logging.getLogger(__name__)

MAX_DATA_WAIT_FRACTION = 0.1  # of the time, before the log gives advice


class SpeechTrainer(transformers.Seq2SeqTrainer):
    """Seq2SeqTrainer with a plain loader for the stream, features padded on the device, the encoder run once in
    evaluation, and checkpoints that are complete or not there."""

    def __init__(
        self,
        *,
        progress: StreamProgress,
        stop: StopSignals,
        eval_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        uploads: Any = None,
        card_writer: Any = None,
        train_window: Literal["full", "longest"] = "full",
        full_window_fraction: float = 1.0,
        max_train_time_in_hours: float | None = None,
        **trainer_arguments: Any,
    ) -> None:
        super().__init__(**trainer_arguments)
        self.eval_collator = eval_collator
        self.progress = progress
        self.stop = stop
        self.uploads = uploads
        self.card_writer = card_writer
        self.train_window = train_window
        self.full_window_fraction = full_window_fraction
        self.deadline = time.monotonic() + 3600 * (max_train_time_in_hours or math.inf)
        self.window_in_frames = FRAMES_PER_POSITION * self.model.config.max_source_positions
        self.checkpoint_to_resume: str | None = None
        self.unfinished: Path | None = None  # where a checkpoint is being written
        self.save_error: Exception | None = None
        self.step_losses: list[torch.Tensor] = []
        self.step_rows: list[str] = []
        self.meter: Counter | None = (
            None  # seconds, rows and frames since the last log line, at self.logged_at
        )
        self.logged_at, self.is_advised = 0.0, self.args.process_index > 0
        self.add_callback(SkipBrokenSteps(self))
        if self.args.torch_compile:
            # Else torch 2.13 takes `encoder_window`'s numbers for constants and compiles anew for every window of
            # --train_window longest, from the ninth on no more.
            torch._dynamo.config.allow_unspec_int_on_nn_module = True
        if self.pop_callback(TensorBoardCallback) is not None:
            self.add_callback(TensorBoardCurves())

    def get_train_dataloader(self) -> DataLoader:
        """One worker that reads ahead. Not prepared by accelerate: the stream deals rows to ranks itself."""
        args, workers = self.args, self.args.dataloader_num_workers
        how = {
            "num_workers": workers,
            "worker_init_fn": ignore_signals,
            "pin_memory": args.dataloader_pin_memory,
        }
        how["prefetch_factor"] = (args.dataloader_prefetch_factor or 4) if workers else None
        return DataLoader(
            self.train_dataset,
            args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            **how,
        )

    def get_eval_dataloader(self, rows: datasets.Dataset) -> DataLoader:
        """Prepared rows come from a memory-mapped file: a worker would only be one more process to end."""
        return self.accelerator.prepare(
            DataLoader(rows, self.args.eval_batch_size, collate_fn=self.eval_collator)
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """The micro-batches of the next step. Here, between two steps, the run can end without losing anything."""
        began = time.monotonic()
        batches, endings = self.fetch_batches(epoch_iterator, num_batches)
        infos = [batch["step_info"] for batch in batches]
        rejections = self.raise_on_all_ranks(
            endings, [rejection for info in infos for rejection in info.rejections]
        )
        if self.meter is None:  # the worker's start belongs to no figure
            self.meter = Counter()
            self.logged_at = time.monotonic()
        else:
            self.meter["waited"] += time.monotonic() - began
        self.progress.update(
            position=infos[-1].position,
            num_rows=sum(info.num_rows for info in infos) * self.args.world_size,
            rejections=rejections,
        )
        return super().get_batch_samples(iter(batches), num_batches, device)

    def fetch_batches(
        self, epoch_iterator: Iterator, num_batches: int
    ) -> tuple[list[dict[str, Any]], list[Exception]]:
        """The next micro-batches, or none and why the run ends. No frame may hold an error that is
        raised: its traceback would keep the loader, and its worker, alive."""
        self.stop.is_deferred = False
        try:
            self.stop.check()
            if time.monotonic() > self.deadline:
                raise RunEnded(75, "--max_train_time_in_hours is over")
            if self.uploads is not None:
                self.uploads.poll()
            batches = list(itertools.islice(epoch_iterator, num_batches))
        except Exception as error:
            self.stop.is_deferred = True
            return [], [error]
        self.stop.is_deferred = True
        errors = [batch["step_info"].error for batch in batches]
        errors = [error for error in errors if error is not None]
        return ([], errors) if errors else (batches, [])

    def raise_on_all_ranks(
        self, endings: list[Exception], rejections: list[Rejection]
    ) -> list[Rejection]:
        """All ranks come here together, before each step and each batch of an evaluation, so that none waits for one
        that has left. Returns the rejections of all. Raises on every rank what any has brought as its ending."""
        if self.args.world_size > 1:
            has_news = torch.tensor(float(bool(endings or rejections)), device=self.args.device)
            if self.accelerator.reduce(has_news).item() == 0:
                return []
            news = gather_object([([portable(error) for error in endings], rejections)])
            endings += [error for brought, _ in news for error in brought]
            rejections = [rejection for _, found in news for rejection in found]
            del news  # no frame may hold what is raised: the traceback would keep the loader, and its worker, alive
        if endings:
            self.stop.is_deferred = False  # nothing is half done: the caller may save
            raise endings.pop(0)
        return rejections

    def padded(self, inputs: dict[str, Any], window_in_frames: int | None = None) -> torch.Tensor:
        """input_features (batch, n_mels, window) on the training device."""
        # The model's type, as DeepSpeed's bfloat16 comes without autocast.
        frames = inputs["frames"].to(self.args.device, self.model.dtype, non_blocking=True)
        return pad_features(
            frames, inputs["frame_counts"], window_in_frames or self.window_in_frames
        )

    def window_of(self, frame_counts: list[int], row: int) -> int:
        """Frames that a training batch is padded to: its longest clip's, up to a whole second; for a seeded share of
        batches the full window, so that the model does not forget it. row: where the batch ends in the stream. Ranks
        draw alike for the batches that they train on at the same time: else most would wait for one at 30 s."""
        fraction = 1.0 if self.train_window == "full" else self.full_window_fraction
        rows_at_once = self.progress.share.rows_per_round(self.args.train_batch_size)
        if (
            np.random.default_rng([self.args.data_seed, (row - 1) // rows_at_once, 2]).random()
            < fraction
        ):
            return self.window_in_frames
        second = SAMPLE_RATE_IN_HZ // HOP_LENGTH_IN_SAMPLES
        return min(self.window_in_frames, second * math.ceil(max(frame_counts) / second))

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if self.checkpoint_to_resume is not None:
            # The loader drew a seed from torch's generator after the library had restored it (transformers 5.23,
            # trainer.py:1852); without this, dropout differs from the uninterrupted run.
            self._load_rng_state(self.checkpoint_to_resume)
            self.checkpoint_to_resume = None
        info = inputs["step_info"]
        counts = inputs["frame_counts"]
        self.progress.audio_in_seconds += info.audio_in_seconds * self.args.world_size
        window = self.window_of(counts, info.position.row)
        batch = {"input_features": self.padded(inputs, window)}
        # Here, from pinned memory: the library's own copy waits for the GPU (transformers 5.23, _prepare_input).
        batch |= {
            n: inputs[n].to(self.args.device, non_blocking=True)
            for n in ("labels", "decoder_input_ids")
        }
        with encoder_window(
            self.model, window
        ):  # the backward pass as well: it may compute activations anew
            loss = super().training_step(model, batch, num_items_in_batch)
        self.step_losses.append(loss)
        self.step_rows += info.ids
        self.meter.update(
            seconds=info.audio_in_seconds,
            rows=len(info.ids),
            frames=sum(counts),
            window=len(counts) * window,
        )
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: the library's formula counts log-mel values as tokens."""
        return 0

    def prediction_step(
        self,
        model: Any,
        inputs: dict,
        prediction_loss_only: bool,
        ignore_keys: Any = None,
        **generation: Any,
    ) -> tuple[None, tuple[torch.Tensor, ...], torch.Tensor]:
        """(None, (generated ids (batch, n), loss sums (batch,), token counts (batch,)), row indices (batch,)).
        The library runs the encoder twice, once outside autocast (trainer_seq2seq.py, prediction_step)."""
        self.raise_on_all_ranks([self.stop.ending()] if self.stop.received is not None else [], [])
        generation = dict(generation or self._gen_kwargs)
        languages = self.compute_metrics.languages_of(inputs["index"].tolist())
        if languages is not None:
            generation["language"] = languages
        with torch.no_grad(), self.accelerator.autocast():
            if max(inputs["frame_counts"]) > self.window_in_frames:
                return (
                    None,
                    self.transcribe_long(inputs, generation),
                    inputs["index"].to(self.args.device),
                )
            labels, decoder_input_ids = (
                inputs[name].to(self.args.device) for name in ("labels", "decoder_input_ids")
            )
            # Through the whole model: FSDP gathers parameters for the calls that it wraps only.
            outputs = self.model(
                input_features=self.padded(inputs), decoder_input_ids=decoder_input_ids
            )
            encoder_outputs, logits = (
                BaseModelOutput(outputs.encoder_last_hidden_state),
                outputs.logits.float(),
            )
            losses = functional.cross_entropy(
                logits.transpose(1, 2), labels, reduction="none"
            )  # -100 is ignored
            ids = generate_ids(self.model, encoder_outputs, **generation)
        return (
            None,
            (ids, losses.sum(1), labels.ne(IGNORED_LABEL).sum(1)),
            inputs["index"].to(self.args.device),
        )

    def transcribe_long(
        self, inputs: dict[str, Any], generation: dict[str, Any]
    ) -> tuple[torch.Tensor, ...]:
        """Ids (batch, n) of clips one by one, those beyond the window by Whisper's sequential long-form generation;
        losses and token counts of 0."""
        languages, ids = generation.get("language"), []
        for i, clip in enumerate(inputs["frames"].split(inputs["frame_counts"], dim=1)):
            how = generation | ({"language": languages[i]} if languages else {})
            clip = clip[None].to(self.args.device)
            if clip.shape[-1] > self.window_in_frames:
                ids.append(
                    self.model.generate(input_features=clip, return_timestamps=True, **how)[0]
                )
            else:
                features = pad_features(clip[0], [clip.shape[-1]], self.window_in_frames)
                ids.append(generate_ids(self.model, self.model.get_encoder()(features), **how)[0])
        nothing = torch.zeros(len(ids), device=self.args.device)
        pad = self.model.generation_config.pad_token_id
        return (
            torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad),
            nothing,
            nothing.long(),
        )

    def evaluate(
        self, eval_dataset: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> dict[str, float]:
        """Scores a set with its own references; every prediction goes to a file, the first ones to the log."""
        rows, card, config = (
            eval_dataset or self.eval_dataset,
            self.compute_metrics,
            self.model.config,
        )
        card.set_references(rows)
        longest = (
            self.args.generation_max_length
            or self.model.generation_config.max_length
            or sys.maxsize
        )
        card.max_new_tokens = min(
            longest, config.max_target_positions - len(card.tokenizer.prefix_tokens)
        )
        # One process may leave at any moment; several only together, see `raise_on_all_ranks`.
        was_deferred, self.stop.is_deferred = self.stop.is_deferred, self.args.world_size > 1
        # The library has ZeRO-3 prepare a model for scoring, and ZeRO-2 fail, unless one is there (5.23).
        began, prepared, self.deepspeed = (
            time.monotonic(),
            self.accelerator._models,
            self.deepspeed or self.model,
        )
        if is_untrained := not prepared:
            # Prepared by the library (5.23), it would stay without DDP, and every rank would train a model of its own.
            # And FSDP cannot prepare a model without its optimizer (accelerate 1.15).
            prepared.append(self.model.to(self.args.device))
        with (
            torch.random.fork_rng()
        ):  # whether and when a model is scored must not change how it is trained
            metrics = self.evaluate_in_memory(rows, metric_key_prefix=metric_key_prefix, **kwargs)
        if is_untrained:
            prepared.clear()
        self.stop.is_deferred, self.logged_at = (
            was_deferred,
            self.logged_at + time.monotonic() - began,
        )
        log_examples(card.scored[:3])
        if self.is_world_process_zero():
            output_dir = Path(self.args.output_dir)
            for path in write_predictions(output_dir, metric_key_prefix, card.scored):
                logger.info("all transcripts: %s", path)
            if "tensorboard" in self.args.report_to:
                pairs = "".join(
                    f"| {row.row.reference} | {row.prediction} |\n" for row in card.scored[:20]
                )
                # In a folder of their own, which is not uploaded: the data may be private.
                with SummaryWriter(
                    os.path.join(self.args.output_dir, "runs", "transcripts")
                ) as writer:
                    table = f"| reference | transcribed |\n|---|---|\n{pairs}"
                    writer.add_text(
                        f"predictions/{metric_key_prefix}", table, self.state.global_step
                    )
        return metrics

    def evaluate_in_memory(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The library's evaluation; out of GPU memory, again with half the batch (rows come longest first)."""
        while True:
            try:
                return super().evaluate(*args, **kwargs)
            except torch.OutOfMemoryError:
                if self.args.per_device_eval_batch_size == 1 or self.args.world_size > 1:
                    raise
            self.args.per_device_eval_batch_size //= 2
            torch.cuda.empty_cache()
            logger.warning(
                "out of GPU memory: scoring with %d rows at a time.",
                self.args.per_device_eval_batch_size,
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the stream's figures; drops the library's epoch, which means nothing for a stream."""
        self.state.epoch = None
        if "loss" in logs:
            elapsed, meter = time.monotonic() - self.logged_at, self.meter
            names = (
                "rows",
                "seconds",
                "frames",
                "window",
            )  # of all ranks; each waits for the slowest one's data
            sums = self.accelerator.reduce(
                torch.tensor([float(meter[n]) for n in names], device=self.args.device)
            )
            num_rows, seconds, num_frames, window = sums.tolist()
            waited = meter["waited"] / elapsed
            speed = {"data_wait_fraction": waited, "padding_fraction": 1 - num_frames / window}
            speed |= {
                "samples_per_second": num_rows / elapsed,
                "audio_hours_per_hour": seconds / elapsed,
            }
            logs = (
                logs
                | self.progress.figures()
                | {name: round(value, 3) for name, value in speed.items()}
            )
            logs |= self.uploads.figures() if self.uploads is not None else {}
            if waited > MAX_DATA_WAIT_FRACTION and not self.is_advised:
                self.is_advised = True
                threads, cores = (
                    self.train_dataset.num_threads,
                    num_usable_cores(self.args.world_size),
                )
                advice = (
                    "raise --num_decoding_threads"
                    if threads < cores
                    else "the network, disk or CPU is the limit"
                )
                found = f"waiting for data ({threads} threads, {cores} cores): {advice}."
                logger.warning("%.0f %% of the time goes into %s", 100 * waited, found)
            self.progress.time_in_seconds += elapsed
            self.meter, self.logged_at = Counter(), time.monotonic()
            # Else one NaN would stay in the library's running sum for ever (transformers 5.23: tr_loss -= tr_loss).
            self._tr_loss.zero_()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Also saves what transformers 5.23 leaves out: preprocessor_config.json (older readers), normalizer.json."""
        self.model.config.use_cache = (
            True  # the library's False is for training, not for the model's users
        )
        super().save_model(output_dir, _internal_call)
        self.model.config.use_cache = self.args.use_cache
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            self.processing_class.feature_extractor.save_pretrained(folder)
            if not _internal_call and adapted_layers(
                self.model
            ):  # a checkpoint keeps adapters apart: exact
                self.model.save_pretrained(folder, state_dict=merged_weights(self.model))
            if spelling := self.processing_class.tokenizer.english_spelling_normalizer:
                write_json(folder / "normalizer.json", spelling)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        # FSDP's state has tied weights twice, as tensors apart, of which save_pretrained (5.23) would write both.
        tied = self.model.all_tied_weights_keys
        super()._save(
            output_dir,
            state_dict and {n: tensor for n, tensor in state_dict.items() if n not in tied},
        )

    def _get_output_dir(self, trial: Any) -> str:
        # While a checkpoint is written, the library is to write it elsewhere (transformers 5.23, trainer.py:3367).
        return str(self.unfinished) if self.unfinished else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Written aside, renamed, uploaded, and then the old ones are rotated; the library (5.23) writes in place and
        rotates first. A full disk keeps the older checkpoints; the next save tries again."""
        was_deferred, self.stop.is_deferred = self.stop.is_deferred, True
        output_dir, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self.unfinished, self.save_error = output_dir / "_unfinished", None
        if self.args.should_save:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        # Told of a best step, the library (5.23) has a barrier, where ranks would wait for one whose disk is full.
        best, self.state.best_global_step = self.state.best_global_step, None
        self.try_to_save(super()._save_checkpoint, model, trial)
        self.state.best_global_step = best
        # Here every rank has written its random state, or has failed to.
        ranks = gather_object(
            [(self.progress.position, self.save_error and portable(self.save_error))]
        )
        self.save_error = next((error for _, error in ranks if error is not None), None)
        if self.save_error is None and best == self.state.global_step:
            self.state.best_model_checkpoint = str(
                output_dir / name
            )  # on every rank: all will load it
        if self.args.should_save and self.save_error is None:
            positions = [position for position, _ in ranks]
            self.try_to_save(
                self.complete_checkpoint, self.unfinished / name, output_dir / name, positions
            )
        if self.save_error is not None:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        self.unfinished = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save and self.save_error is None:
            if self.uploads is not None:
                if has_adapters := bool(adapted_layers(self.model)):  # others get plain weights
                    self.try_to_save(self.save_model)
                folder = output_dir if has_adapters else output_dir / name
                self.try_to_save(self.submit_upload, folder, output_dir / name)
            rotate_checkpoints(
                str(output_dir), self.args.save_total_limit, self.state.best_model_checkpoint
            )
        self.stop.is_deferred = was_deferred

    def submit_upload(self, model_folder: Path, checkpoint: Path) -> None:
        """Has what was saved uploaded, with a card of what is known by now."""
        card = self.card_writer.during_training(self.state.log_history, self.progress.totals())
        self.uploads.submit(model_folder, card, checkpoint)

    def try_to_save(self, save: Callable[..., None], *args: Any) -> None:
        """save(*args), its error noted instead of raised: older checkpoints are kept, the next save tries again."""
        try:
            save(*args)
        except (
            Exception
        ) as error:  # OSError, RuntimeError, SafetensorError, or tokenizers' bare Exception
            self.save_error = error
            step, kind = self.state.global_step, type(error).__name__
            logger.error("checkpoint-%d could not be saved (%s: %s)", step, kind, one_line(error))

    def complete_checkpoint(
        self, unfinished: Path, final: Path, positions: list[StreamPosition]
    ) -> None:
        """Adds the stream's position, makes everything durable, and gives the checkpoint its name in one step."""
        write_json(
            unfinished / "stream_state.json",
            self.progress.state(micro_batch_size=self.args.train_batch_size, positions=positions),
        )
        self.state.save_to_json(
            str(unfinished / "trainer_state.json")
        )  # with the final name of the best
        for path in (path for path in unfinished.rglob("*") if path.is_file()):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)  # a damaged one that the run had stepped over
        unfinished.rename(final)
        unfinished.parent.rmdir()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # The library keeps the checkpoint's learning rate whatever --learning_rate says now (transformers 5.23), and
        # takes the first step at the rate of the old --max_steps.
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler, rate = self.lr_scheduler, self.args.learning_rate
        if checkpoint is not None and not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            logger.warning(
                "the learning rate goes on as in the checkpoint: %s.", type(scheduler).__name__
            )
        elif checkpoint is not None:
            if scheduler.base_lrs[0] != rate:
                logger.info(
                    "learning rate: %g now, %g in the checkpoint", rate, scheduler.base_lrs[0]
                )
            scheduler.base_lrs = [rate] * len(scheduler.base_lrs)
            scheduler.last_epoch -= 1
            scheduler.step()  # computes the present rate anew

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        # Likewise with --eval_steps, --save_steps and --logging_steps, which the checkpoint's state would override.
        result = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        return result
