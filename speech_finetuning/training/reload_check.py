"""The saved model, loaded afresh as its users will, must transcribe as the trained one does."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from speech_finetuning.base.errors import ExitCode, RunEnded
from speech_finetuning.base.files import counted
from speech_finetuning.data.audio import seconds_of_frames
from speech_finetuning.model.generation import generate_ids
from speech_finetuning.training.trainer import SpeechTrainer

logger = logging.getLogger(__name__)

NUM_RELOADED_CLIPS = 8  # that the saved model transcribes once more
MAX_RELOADED_TOKENS = 64


def check_reload(trainer: SpeechTrainer, folder: Path) -> None:
    """Loads what was saved as its users will: its transcripts of 8 evaluation clips, special tokens
    included, must match those of the model in memory. Raises: RunEnded(1)."""
    rows = shortest_clips(trainer)
    if not rows:
        return
    try:
        expected, found = transcribe_with_both(trainer, folder, rows)
    except torch.OutOfMemoryError:
        logger.warning(
            "no GPU memory left to load the saved model beside the trained one: it was not compared."
        )
        return
    if found != expected:
        raise RunEnded(
            ExitCode.CRASHED,
            f"the saved model transcribes {counted(len(rows), 'clip')} differently: {found[:1]} instead of "
            f"{expected[:1]}. Do not use {folder}; its newest checkpoint has the trained weights.",
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
def transcribe_with_both(
    trainer: SpeechTrainer, folder: Path, rows: list[dict[str, Any]]
) -> tuple[list[str], list[str]]:
    """Transcripts of the model in memory, and of the one in the folder."""
    assert trainer.eval_collator is not None
    features = trainer.pad_to_window(trainer.eval_collator(rows))
    trained_model = trainer.model.eval()
    saved_model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(
        folder, dtype=trained_model.dtype
    )
    saved_model.to(features.device)
    saved_processor = transformers.AutoProcessor.from_pretrained(folder)
    transcripts = []
    for model, processor in (
        (trained_model, trainer.processing_class),
        (saved_model, saved_processor),
    ):
        ids = generate_ids(
            model,
            model.get_encoder()(features),
            max_new_tokens=min(MAX_RELOADED_TOKENS, trainer.max_new_tokens()),
            max_length=None,
        )
        transcripts.append(processor.batch_decode(ids))
    return transcripts[0], transcripts[1]
