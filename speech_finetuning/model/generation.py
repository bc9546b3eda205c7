"""Token ids from real generation."""

from typing import Any

import torch
import transformers
from torch.distributed.fsdp import FSDPModule

from speech_finetuning.data.audio import pad_features


def generate_ids(model: Any, encoder_outputs: Any, **generation: Any) -> torch.Tensor:
    """Token ids (batch, n_tokens) without timestamps, from the encoder's output.

    Two timestamps in a row would send the library's generate() through the window again, and
    without input_features into a TypeError (transformers 5.24, _maybe_reduce_batch).
    """
    first_timestamp = model.generation_config.no_timestamps_token_id + 1
    timestamps = list(range(first_timestamp, model.config.vocab_size))
    no_timestamps = transformers.SuppressTokensLogitsProcessor(
        timestamps, device=encoder_outputs[0].device
    )
    # Otherwise ranks whose texts end at different tokens gather the parameters of different layers
    # (Whisper passes False, transformers 5.24).
    is_zero3 = hasattr(model.proj_out.weight, "ds_id")
    return model.generate(
        encoder_outputs=encoder_outputs,
        logits_processor=[no_timestamps],
        synced_gpus=is_zero3 or isinstance(model, FSDPModule),
        **generation,
    )


def transcribe_long_form(
    model: Any,
    clips: list[torch.Tensor],
    *,
    window_in_frames: int,
    languages: list[str] | None = None,
    **generation: Any,
) -> torch.Tensor:
    """Token ids (batch, n_tokens) of clips of any length, transcribed one by one.

    Clips beyond the window are transcribed by Whisper's sequential long-form generation. clips:
    features (n_mels, n_frames), not padded, on the model's device; languages: one per clip.
    """
    ids = []
    for number, clip in enumerate(clips):
        if languages is not None:
            generation["language"] = languages[number]
        if clip.shape[-1] > window_in_frames:
            generated = model.generate(
                input_features=clip[None], return_timestamps=True, **generation
            )
        else:
            features = pad_features(clip, [clip.shape[-1]], window_in_frames)
            generated = generate_ids(model, model.get_encoder()(features), **generation)
        ids.append(generated[0])
    padding = model.generation_config.pad_token_id
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding)
