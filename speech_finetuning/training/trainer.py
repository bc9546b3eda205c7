"""Seq2SeqTrainer and the few overrides."""

import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import datasets
import torch
from accelerate.utils import gather_object
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.modeling_outputs import BaseModelOutput

from speech_finetuning.base.errors import TimeIsOver, portable
from speech_finetuning.base.files import counted
from speech_finetuning.base.shutdown import StopSignals
from speech_finetuning.base.threads import num_usable_cores
from speech_finetuning.data.audio import FRAMES_PER_POSITION, pad_features
from speech_finetuning.data.items import RejectedRow
from speech_finetuning.data.prompts import scored_inputs
from speech_finetuning.data.stream import SpeechStream
from speech_finetuning.data.text import IGNORED_LABEL
from speech_finetuning.model.generation import (
    generate_after_prompts,
    generate_ids,
    transcribe_long_form,
)
from speech_finetuning.model.windows import TrainingWindow, attention_of_any_length, window_of_batch
from speech_finetuning.scoring.guards import GuardBound
from speech_finetuning.scoring.scorecard import Scorecard
from speech_finetuning.scoring.scores import WITH_PROMPTS
from speech_finetuning.training.callbacks import (
    EarlyStoppingCallback,
    SavePredictions,
    SkipBrokenSteps,
    TensorBoardCurves,
    TrainerLog,
)
from speech_finetuning.training.compat import (
    compile_windows_of_any_length,
    scoring_untrained_model,
    unpacked_rows,
)
from speech_finetuning.training.meter import (
    MAX_DATA_WAIT_FRACTION,
    SECONDS_WITHOUT_ADVICE,
    SpeedMeter,
    advise_on_waiting,
)
from speech_finetuning.training.progress import StreamProgress
from speech_finetuning.training.reading_worker import ReadAheadLoader
from speech_finetuning.training.resumable import ResumableTrainer

logger = logging.getLogger(__name__)


class SpeechTrainer(ResumableTrainer):
    """Seq2SeqTrainer with a plain loader for the stream, features padded on the device, and the
    encoder run once in evaluation. compute_metrics must be a Scorecard."""

    # As they are in this project, see ResumableTrainer.
    train_dataset: SpeechStream
    eval_dataset: datasets.Dataset | None
    compute_metrics: Scorecard

    def __init__(
        self,
        *,
        progress: StreamProgress,
        stop: StopSignals,
        eval_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        uploads: Any = None,
        card_writer: Any = None,
        train_window: Literal["full", "longest"] = "full",
        full_window_fraction: float = 0.1,
        max_guard_loss_in_points: float | None = None,
        max_train_time_in_hours: float | None = None,
        max_network_wait_in_seconds: float = 0.0,
        **trainer_arguments: Any,
    ) -> None:
        super().__init__(
            progress=progress,
            stop=stop,
            uploads=uploads,
            card_writer=card_writer,
            **trainer_arguments,
        )
        self.eval_collator = eval_collator
        self.deadline = time.monotonic() + 3600 * (max_train_time_in_hours or math.inf)
        self.max_network_wait_in_seconds = max_network_wait_in_seconds
        self.window_in_frames = FRAMES_PER_POSITION * self.model.config.max_source_positions
        self.train_window = TrainingWindow(
            full_window_in_frames=self.window_in_frames,
            full_fraction=1.0 if train_window == "full" else full_window_fraction,
            seed=cast(int, self.args.data_seed),  # of the script
            rows_at_once=progress.share.rows_per_round(self.args.train_batch_size),
        )
        self.guard_bound = GuardBound.of(self.compute_metrics.targets, max_guard_loss_in_points)
        self.meter = SpeedMeter()
        self.is_advised = self.args.process_index > 0  # on what to do about waiting for data
        self.broken_steps = SkipBrokenSteps(self.accelerator, progress)
        self.add_callback(self.broken_steps)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.guard_bound = self.guard_bound
        self.add_callback(SavePredictions(self.compute_metrics))
        self.add_callback(TrainerLog(self.output_dir()))
        if self.pop_callback(TensorBoardCallback) is not None:
            self.add_callback(TensorBoardCurves())
        if self.args.torch_compile:
            compile_windows_of_any_length()

    # --------------------------------------------------------------------------- batches and steps

    def get_train_dataloader(self) -> DataLoader:
        """One worker that reads ahead. Not prepared by accelerate: the stream deals rows to ranks
        itself."""
        num_workers = self.args.dataloader_num_workers
        return ReadAheadLoader(
            self.train_dataset,
            max_network_wait_in_seconds=self.max_network_wait_in_seconds,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=num_workers,
            prefetch_factor=(self.args.dataloader_prefetch_factor or 4) if num_workers else None,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_eval_dataloader(self, rows: datasets.Dataset) -> DataLoader:
        """Prepared rows come from a memory-mapped file: a worker would only be one more process to
        end."""
        loader = DataLoader(
            cast(Any, rows),  # a sequence, which is all that torch needs
            batch_size=self.args.eval_batch_size,
            collate_fn=self.eval_collator,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """The micro-batches of the next step. Here, between two steps, the run can end without
        losing anything."""
        began = time.monotonic()
        batches, endings = self.fetch_batches(epoch_iterator, num_batches)
        infos = [batch["step_info"] for batch in batches]
        rejections = self.raise_on_all_ranks(
            endings, [rejection for info in infos for rejection in info.rejections]
        )
        self.meter.add_wait(time.monotonic() - began)
        self.progress.update(
            position=infos[-1].position,
            num_rows=sum(info.num_rows for info in infos) * self.args.world_size,
            rejections=rejections,
        )
        if self.args.world_size == 1:
            # Nothing is gathered: on the GPU the number of target tokens would only make the CPU
            # wait for it (transformers 5.24, _get_num_items_in_batch).
            device = torch.device("cpu")
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
                raise TimeIsOver()
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
        self, endings: list[Exception], rejections: list[RejectedRow]
    ) -> list[RejectedRow]:
        """Returns the rejections of all ranks. Raises on every rank what any has brought as its
        ending.

        All ranks come here together, before each step and each batch of an evaluation, so that none
        waits for one that has left.
        """
        if self.args.world_size > 1:
            has_news = torch.tensor(float(bool(endings or rejections)), device=self.args.device)
            if cast(torch.Tensor, self.accelerator.reduce(has_news)).item() == 0:
                return []
            news = gather_object([([portable(error) for error in endings], rejections)])
            endings += [error for brought, _ in news for error in brought]
            rejections = [rejection for _, found in news for rejection in found]
            # No frame may hold what is raised: the traceback would keep the loader, and its worker,
            # alive.
            del news
        if endings:
            self.stop.is_deferred = False  # nothing is half done: the caller may save
            raise endings.pop(0)
        return rejections

    def pad_to_window(
        self, inputs: dict[str, Any], window_in_frames: int | None = None
    ) -> torch.Tensor:
        """input_features (batch, n_mels, window) on the training device; None: the full window."""
        # The model's type, as DeepSpeed's bfloat16 comes without autocast.
        frames = inputs["frames"].to(self.args.device, self.model.dtype, non_blocking=True)
        window = window_in_frames or self.window_in_frames
        return pad_features(frames, inputs["frame_counts"], window)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward of a micro-batch. Returns its share of the step's loss."""
        if self.checkpoint_to_resume is not None:
            # The loader drew a seed from torch's generator after the library had restored it
            # (transformers 5.24, trainer.py:1852); without this, dropout differs from the
            # uninterrupted run.
            self._load_rng_state(self.checkpoint_to_resume)
            self.checkpoint_to_resume = None
        info = inputs["step_info"]
        frame_counts = inputs["frame_counts"]
        window = self.train_window.frames(frame_counts, last_row=info.position.row)
        # Here, from pinned memory: the library's own copy waits for the GPU (transformers 5.24,
        # _prepare_input).
        device = self.args.device
        batch = {
            "input_features": self.pad_to_window(inputs, window),
            "labels": inputs["labels"].to(device, non_blocking=True),
            "decoder_input_ids": inputs["decoder_input_ids"].to(device, non_blocking=True),
        }
        is_usual = (len(frame_counts), window) == (
            self.args.train_batch_size,
            self.window_in_frames,
        )
        # Around the backward pass as well: it may recompute activations.
        with window_of_batch(self.model, window, is_usual), unpacked_rows(self.args.torch_compile):
            loss = super().training_step(model, batch, num_items_in_batch)
        self.broken_steps.add(loss, info.ids)
        self.progress.audio_in_seconds += info.audio_in_seconds * self.args.world_size
        self.progress.num_nonspeech_rows += info.num_nonspeech_rows * self.args.world_size
        self.meter.add_batch(
            num_rows=len(info.ids),
            audio_in_seconds=info.audio_in_seconds,
            frame_counts=frame_counts,
            window=window,
        )
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: the library's formula counts log-mel values as tokens."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the stream's figures; drops the library's epoch, which means nothing for a
        stream."""
        cast(Any, self.state).epoch = None  # the library's type is float
        if "loss" in logs:
            logs = logs | self.training_figures()
            # Otherwise one NaN would stay in the library's running sum for ever (transformers 5.24:
            # tr_loss -= tr_loss).
            self._tr_loss.zero_()
        super().log(logs, start_time)

    def training_figures(self) -> dict[str, float]:
        """Rows, rejections, speed and uploads since the last line of the log; all counts start again."""
        elapsed = self.meter.elapsed_in_seconds()
        speed = self.meter.figures(elapsed, self.accelerator)
        figures = self.progress.figures() | speed
        if self.uploads is not None:
            figures |= self.uploads.figures()
        is_waiting = speed["data_wait_fraction"] > MAX_DATA_WAIT_FRACTION
        is_settled = self.progress.time_in_seconds + elapsed > SECONDS_WITHOUT_ADVICE
        if is_waiting and is_settled and not self.is_advised:
            self.is_advised = True
            advise_on_waiting(
                speed["data_wait_fraction"],
                num_threads=self.train_dataset.num_threads,
                num_cores=num_usable_cores(self.args.world_size),
            )
        self.progress.time_in_seconds += elapsed
        self.meter = SpeedMeter(started_at=time.monotonic())
        return figures

    # ------------------------------------------------------------------------------------- scoring

    def evaluate(
        self, eval_dataset: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> dict[str, float]:
        """Scores a prepared set with its own references."""
        rows = cast(datasets.Dataset, eval_dataset or self.eval_dataset)
        self.compute_metrics.set_references(rows, role=metric_key_prefix)
        self.compute_metrics.max_new_tokens = self.max_new_tokens()
        with (
            scoring_untrained_model(self),
            torch.random.fork_rng(),  # when a model is scored must not change how it is trained
            self.meter.paused(),
        ):
            return self.evaluate_in_memory(rows, metric_key_prefix=metric_key_prefix, **kwargs)

    def compares_guards(self) -> bool:
        """Whether guards are scored before and after a training."""
        return self.args.do_train and bool(self.guard_bound.rates)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Weights that have lost more on a guard than they may are never the best."""
        broken = self.guard_bound.broken_by(metrics)
        if not broken:
            return super()._determine_best_metric(metrics, trial)
        logger.info(
            "not for the best model: %s (--max_guard_loss_in_points %g)",
            self.guard_bound.describe(broken),
            self.guard_bound.max_loss_in_points,
        )
        return False

    def max_new_tokens(self) -> int:
        """How long a transcript can become, in tokens beside the prefix."""
        longest = (
            self.args.generation_max_length
            or self.model.generation_config.max_new_tokens
            or self.model.generation_config.max_length
            or sys.maxsize
        )
        num_prefix_tokens = len(self.compute_metrics.tokenizer.prefix_tokens)
        return min(longest, self.model.config.max_target_positions - num_prefix_tokens)

    def evaluate_in_memory(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The library's evaluation; out of GPU memory, again with half the batch (rows come longest
        first)."""
        while True:
            try:
                return super().evaluate(*args, **kwargs)
            except torch.OutOfMemoryError:
                if self.args.per_device_eval_batch_size == 1 or self.args.world_size > 1:
                    raise
            self.args.per_device_eval_batch_size //= 2
            torch.cuda.empty_cache()
            logger.warning(
                "out of GPU memory: scoring with %s at a time.",
                counted(self.args.per_device_eval_batch_size, "row"),
            )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The library's. One process may be interrupted at any moment of it; several only together,
        see `raise_on_all_ranks`."""
        was_deferred = self.stop.is_deferred
        self.stop.is_deferred = self.args.world_size > 1
        output = super().evaluation_loop(*args, **kwargs)
        # Not after an error: it came between two steps, so that what was trained can be saved.
        self.stop.is_deferred = was_deferred
        return output

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
        **generation: Any,
    ) -> tuple[None, tuple[torch.Tensor, ...], torch.Tensor]:
        """(None, (generated ids (batch, n_tokens), loss sums (batch,), token counts (batch,)), row
        indices (batch,)). The library would run the encoder twice, once outside autocast
        (transformers 5.24, trainer_seq2seq.py)."""
        endings: list[Exception] = [self.stop.ending()] if self.stop.received is not None else []
        self.raise_on_all_ranks(endings, [])
        generation = dict(generation or self._gen_kwargs)
        if self.model.generation_config.max_new_tokens is not None:
            # The checkpoint's own would win against --generation_max_length.
            generation.pop("max_length", None)
            generation["max_new_tokens"] = self.compute_metrics.max_new_tokens
        languages = self.compute_metrics.languages_of(inputs["index"].tolist())
        if languages is not None:
            generation["language"] = languages
        with torch.no_grad(), self.accelerator.autocast(), attention_of_any_length():
            if max(inputs["frame_counts"]) > self.window_in_frames:
                outputs = self.transcribe_long(inputs, generation)
            else:
                outputs = self.transcribe(inputs, generation)
        return None, outputs, inputs["index"].to(self.args.device)

    def transcribe(
        self, inputs: dict[str, Any], generation: dict[str, Any]
    ) -> tuple[torch.Tensor, ...]:
        """Generated ids (batch, n_tokens), loss sums (batch,) and token counts (batch,) of clips
        within the window."""
        has_prompts = self.compute_metrics.role in WITH_PROMPTS
        decoder_inputs = scored_inputs(
            inputs, self.model.config, device=self.args.device, has_prompts=has_prompts
        )
        labels = decoder_inputs.pop("labels")
        # Through the whole model: FSDP gathers parameters for the calls that it wraps only.
        outputs = self.model(input_features=self.pad_to_window(inputs), **decoder_inputs)
        losses = functional.cross_entropy(
            outputs.logits.float().transpose(1, 2),
            labels,
            ignore_index=IGNORED_LABEL,
            reduction="none",
        )
        encoder_outputs = BaseModelOutput(outputs.encoder_last_hidden_state)
        if has_prompts:
            num_prefix_tokens = len(self.compute_metrics.tokenizer.prefix_tokens)
            num_given = labels.shape[1] - inputs["labels"].shape[1] + num_prefix_tokens
            generation |= {"max_new_tokens": self.compute_metrics.max_new_tokens}
            ids = generate_after_prompts(
                self.model,
                encoder_outputs,
                decoder_input_ids=decoder_inputs["decoder_input_ids"][:, :num_given],
                decoder_attention_mask=decoder_inputs["decoder_attention_mask"][:, :num_given],
                **generation,
            )
        else:
            ids = generate_ids(self.model, encoder_outputs, **generation)
        return ids, losses.sum(1), labels.ne(IGNORED_LABEL).sum(1)

    def transcribe_long(
        self, inputs: dict[str, Any], generation: dict[str, Any]
    ) -> tuple[torch.Tensor, ...]:
        """Likewise of clips of any length; the losses and token counts are 0."""
        frames = inputs["frames"].to(self.args.device)
        ids = transcribe_long_form(
            self.model,
            list(frames.split(inputs["frame_counts"], dim=1)),
            window_in_frames=self.window_in_frames,
            languages=generation.pop("language", None),
            **generation,
        )
        nothing = torch.zeros(len(ids), device=self.args.device)
        return ids, nothing, nothing.long()
