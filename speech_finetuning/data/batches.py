"""What the collators of the script are made of: labels side by side, clips end to end."""

from collections.abc import Sequence
from typing import Any

import torch

from speech_finetuning.data.text import IGNORED_LABEL


def pad_labels(
    labels: list[list[int]], pad_token_id: int, prompts: Sequence[list[int]] | None = None
) -> dict[str, torch.Tensor]:
    """Token ids of each row to what the decoder is to say and what it reads, (batch, n_tokens)
    each: `labels` without the first token, padded with -100, which the loss leaves out, and
    `decoder_input_ids` without the last one, padded with the end token.

    prompts: what each row's decoder reads before its labels and is not to say; None: nothing.
    """
    rows = list(zip(prompts or [[] for _ in labels], labels, strict=True))
    longest = max(len(prompt) + len(ids) for prompt, ids in rows)
    targets = []
    inputs = []
    for prompt, ids in rows:
        padding = longest - len(prompt) - len(ids)
        # The first token after a prompt is given as well.
        targets.append([IGNORED_LABEL] * len(prompt) + ids[1:] + [IGNORED_LABEL] * padding)
        inputs.append([*prompt, *ids[:-1]] + [pad_token_id] * padding)
    return {"labels": torch.tensor(targets), "decoder_input_ids": torch.tensor(inputs)}


def pad_windows(windows: list[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """As `pad_labels`, of windows with `labels` and perhaps `prompt_ids`."""
    labels = [window["labels"] for window in windows]
    prompts = [window.get("prompt_ids") or [] for window in windows]
    return pad_labels(labels, pad_token_id, prompts)


def stored_clip(data: bytes, n_mels: int) -> torch.Tensor:
    """(n_mels, n_frames) float32, as prepared evaluation sets have it."""
    values = torch.frombuffer(bytearray(data), dtype=torch.float32)
    return values.view(n_mels, -1)


def join_clips(clips: list[torch.Tensor]) -> dict[str, Any]:
    """Clips of (n_mels, n_frames) end to end, not padded, so that little crosses the process
    border: `frames` (n_mels, sum of frame_counts) and `frame_counts`. The trainer pads them on its
    device."""
    return {
        "frames": torch.cat(clips, dim=1),
        "frame_counts": [clip.shape[1] for clip in clips],
    }
