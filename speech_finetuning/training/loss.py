"""The loss: cross-entropy over all target tokens of a step."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from speech_finetuning.data.text import IGNORED_LABEL


@dataclass
class TokenWeightedLoss:
    """Cross-entropy summed over a micro-batch, divided by the target tokens of the whole step.

    The step is the optimiser's, on all ranks. Whisper's own loss ignores that number and comes out
    multiplied by accumulation and processes (transformers 5.24, modeling_whisper.py:1126); this one
    makes 8x1, 2x4 and 1x8 equal.
    """

    label_smoothing: float

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """outputs.logits: (batch, n_tokens, vocabulary); labels: (batch, n_tokens), -100 where
        nothing is to be predicted."""
        total = functional.cross_entropy(
            outputs.logits.float().flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORED_LABEL,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        num_tokens = num_items_in_batch
        if num_tokens is None:
            num_tokens = labels.ne(IGNORED_LABEL).sum()
        # A number that is not on the GPU stays where it is: the copy would wait for the GPU.
        return total / torch.as_tensor(num_tokens).clamp(min=1)
