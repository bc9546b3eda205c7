"""Token ids from real generation."""

from typing import Any

import torch
import transformers
from torch.distributed.fsdp import FSDPModule


def generate_ids(model: Any, encoder_outputs: Any, **generation: Any) -> torch.Tensor:
    """Token ids (batch, n_tokens) without timestamps. Two timestamps in a row would send the library's generate()
    through the window again, and without input_features into a TypeError (transformers 5.23, _maybe_reduce_batch)."""
    timestamps = list(
        range(model.generation_config.no_timestamps_token_id + 1, model.config.vocab_size)
    )
    processors = [
        transformers.SuppressTokensLogitsProcessor(timestamps, device=encoder_outputs[0].device)
    ]
    # Else ranks whose texts end at different tokens gather different layers' parameters (Whisper passes False, 5.23).
    generation["synced_gpus"] = isinstance(model, FSDPModule) or hasattr(
        model.proj_out.weight, "ds_id"
    )  # ZeRO-3
    return model.generate(
        encoder_outputs=encoder_outputs, logits_processor=processors, **generation
    )
