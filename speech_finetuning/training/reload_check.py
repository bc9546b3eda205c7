"""The saved model, loaded afresh as its users will, must transcribe as the trained one does."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch.nn import functional

from speech_finetuning.base.errors import ExitCode, RunEnded
from speech_finetuning.base.files import counted
from speech_finetuning.data.audio import seconds_of_frames
from speech_finetuning.data.prompts import scored_inputs
from speech_finetuning.data.text import IGNORED_LABEL
from speech_finetuning.model.generation import generate_ids
from speech_finetuning.training.trainer import SpeechTrainer

logger = logging.getLogger(__name__)

NUM_RELOADED_CLIPS = 8  # that the saved model transcribes once more
MAX_RELOADED_TOKENS = 64
# Of the log-probabilities of what was said. Of a tiny model on real speech: float32 against bfloat16
# 0.10, against itself before one step of training 2.7.
MAX_ROUNDING_IN_NATS = 0.3


def check_reload(trainer: SpeechTrainer, folder: Path) -> None:
    """Loads what was saved as its users will: its transcripts of 8 evaluation clips, special tokens
    included, must match those of the model in memory but for what rounding decides. Raises:
    RunEnded(1)."""
    rows = shortest_clips(trainer)
    if not rows:
        return
    try:
        expected, found, is_alike = compare(trainer, folder, rows)
    except torch.OutOfMemoryError:
        logger.warning(
            "no GPU memory left to load the saved model beside the trained one: it was not compared."
        )
        return
    if not is_alike:
        number = next(
            n for n, pair in enumerate(zip(expected, found, strict=True)) if len(set(pair)) > 1
        )
        raise RunEnded(
            ExitCode.CRASHED,
            f"the saved model transcribes {counted(len(rows), 'clip')} differently: {found[number]!r} "
            f"instead of {expected[number]!r}. Do not use {folder}; its newest checkpoint has the "
            "trained weights.",
        )
    logger.info("the saved model, loaded afresh, transcribes %s alike.", counted(len(rows), "clip"))


def shortest_clips(trainer: SpeechTrainer) -> list[dict[str, Any]]:
    """The shortest rows of the evaluation set, which is sorted, that fit into the window."""
    assert trainer.eval_dataset is not None
    num_rows = len(trainer.eval_dataset)
    first = max(0, num_rows - NUM_RELOADED_CLIPS)
    window_in_seconds = seconds_of_frames(trainer.window_in_frames)
    rows = cast(list[dict[str, Any]], trainer.eval_dataset.select(range(first, num_rows)))
    return [row for row in rows if row["duration"] <= window_in_seconds]


@torch.no_grad()
def compare(
    trainer: SpeechTrainer, folder: Path, rows: list[dict[str, Any]]
) -> tuple[list[str], list[str], bool]:
    """Transcripts of the model in memory and of the one in the folder, and whether they mean the
    same model."""
    assert trainer.eval_collator is not None
    inputs = trainer.eval_collator(rows)
    features = trainer.pad_to_window(inputs)
    trained_model = trainer.model.eval()
    saved_model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(
        folder, dtype=trained_model.dtype
    )
    saved_model.to(features.device)
    saved_processor = transformers.AutoProcessor.from_pretrained(folder)
    max_new_tokens = min(MAX_RELOADED_TOKENS, trainer.max_new_tokens())
    # As the trained model computes by itself: accelerate wraps its forward, but neither its encoder
    # nor the saved model. On a GPU nearly every run differed in a word without it.
    with trainer.accelerator.autocast():
        expected = transcribe(trained_model, trainer.processing_class, features, max_new_tokens)
        found = transcribe(saved_model, saved_processor, features, max_new_tokens)
        if found == expected:
            return expected, found, True
        # Merged adapters, for one, round otherwise than adapters that stand beside the weights.
        settings = saved_model.generation_config
        with_settings = transcribe(
            trained_model, saved_processor, features, max_new_tokens, generation_config=settings
        )
        if with_settings != expected:
            return expected, with_settings, False
        references = scored_inputs(
            inputs, trained_model.config, device=features.device, has_prompts=False
        )
        difference = mean_difference(trained_model, saved_model, features, references)
    return expected, found, difference <= MAX_ROUNDING_IN_NATS


def transcribe(
    model: Any, processor: Any, features: torch.Tensor, max_new_tokens: int, **generation: Any
) -> list[str]:
    """What a model writes, special tokens included, for features (batch, n_mels, window)."""
    ids = generate_ids(
        model,
        model.get_encoder()(features),
        max_new_tokens=max_new_tokens,
        max_length=None,
        **generation,
    )
    return processor.batch_decode(ids)


def mean_difference(
    one: Any, other: Any, features: torch.Tensor, references: dict[str, torch.Tensor]
) -> float:
    """Between the log-probabilities that two models give to the tokens of the references, in nats.
    references: `labels` and the decoder's arguments, (batch, n_tokens) each."""
    labels = references["labels"]
    decoder_inputs = {name: value for name, value in references.items() if name != "labels"}
    losses = []
    for model in (one, other):
        logits = model(input_features=features, **decoder_inputs).logits.float()
        losses.append(
            functional.cross_entropy(
                logits.transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none"
            )
        )
    differences = (losses[0] - losses[1]).abs()
    return (differences.sum() / labels.ne(IGNORED_LABEL).sum()).item()
