"""How much GPU memory a training step takes without gradient checkpointing, calculated.

The same sum as benchmarks/memory.py, which counts the saved bytes with torch's fake tensors: what a
layer saves for the backward pass is, in numbers per position and unit of width, fitted to its
figures (docs/memory.md) to within a tenth.
"""

import torch
import transformers

# Half-precision numbers that a layer saves for each position and unit of its width.
SAVED_BY_ENCODER_LAYER = 21.0
SAVED_BY_DECODER_LAYER = 30.0  # of the target tokens, with both attentions
SAVED_BY_CROSS_ATTENTION = 5.6  # of the audio's positions, in each layer of the decoder
BYTES_PER_LOGIT = 16  # in half precision, as float, and their gradients
BYTES_OF_CUDA = 1e9
BYTES_PER_TRAINED_PARAMETER = 18  # weight 4, gradient 4, AdamW 8, autocast's copy 2
BYTES_PER_FROZEN_PARAMETER = 6
USABLE_SHARE_OF_MEMORY = 0.85  # the rest is lost between the allocator's blocks


def step_in_bytes(model: transformers.WhisperForConditionalGeneration, num_rows: int) -> float:
    """The peak of a step of AdamW in mixed precision, of so many rows of the full window and the
    longest transcripts."""
    config = model.config
    num_positions = config.max_source_positions
    num_tokens = config.max_target_positions
    per_position = (
        SAVED_BY_ENCODER_LAYER * config.encoder_layers
        + SAVED_BY_CROSS_ATTENTION * config.decoder_layers
    )
    saved = num_positions * per_position
    saved += num_tokens * SAVED_BY_DECODER_LAYER * config.decoder_layers
    of_row = 2 * config.d_model * saved + BYTES_PER_LOGIT * num_tokens * config.vocab_size
    num_trained = model.num_parameters(only_trainable=True)
    num_frozen = model.num_parameters() - num_trained
    of_parameters = (
        BYTES_PER_TRAINED_PARAMETER * num_trained + BYTES_PER_FROZEN_PARAMETER * num_frozen
    )
    return BYTES_OF_CUDA + of_parameters + num_rows * of_row


def memory_of_gpu_in_bytes(device: torch.device) -> float | None:
    """None: no GPU, whose memory is of no concern."""
    if device.type != "cuda":
        return None
    return float(torch.cuda.get_device_properties(device).total_memory)


def needs_checkpointing(need_in_bytes: float, memory_in_bytes: float | None) -> bool:
    """Whether gradient checkpointing is worth its time, a fifth more."""
    return memory_in_bytes is not None and need_in_bytes > USABLE_SHARE_OF_MEMORY * memory_in_bytes
