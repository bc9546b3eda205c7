"""What the collators of the script are made of: labels side by side, clips end to end."""

from typing import Any

import torch

from speech_finetuning.data.text import IGNORED_LABEL


def pad_labels(labels: list[list[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Token ids of each row to what the decoder is to say and what it reads, (batch, n_tokens)
    each: `labels` without the first token, padded with -100, which the loss leaves out, and
    `decoder_input_ids` without the last one, padded with the end token."""
    longest = max(len(ids) for ids in labels)
    targets = [ids[1:] + [IGNORED_LABEL] * (longest - len(ids)) for ids in labels]
    inputs = [ids[:-1] + [pad_token_id] * (longest - len(ids)) for ids in labels]
    return {"labels": torch.tensor(targets), "decoder_input_ids": torch.tensor(inputs)}


def join_clips(clips: list[torch.Tensor]) -> dict[str, Any]:
    """Clips of (n_mels, n_frames) end to end, not padded, so that little crosses the process
    border: `frames` (n_mels, sum of frame_counts) and `frame_counts`. The trainer pads them on its
    device."""
    return {
        "frames": torch.cat(clips, dim=1),
        "frame_counts": [clip.shape[1] for clip in clips],
    }
