"""Token ids from real generation, and the settings that it needs."""

import copy
import logging
from typing import Any, cast

import torch
import transformers
from torch.distributed.fsdp import FSDPModule
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.audio import pad_features

logger = logging.getLogger(__name__)

TASKS = ("transcribe", "translate")
# OpenAI's English-only models have GPT-2's vocabulary, which ends here; the multilingual one has a
# token more. Both have tokens for all languages, so that these decide nothing.
END_OF_ENGLISH_VOCABULARY = 50_256
NUM_PROMPT_TOKENS = 4  # <|startoftranscript|>, language, task, <|notimestamps|>


def complete_generation_config(
    generation_config: transformers.GenerationConfig,
    tokenizer: transformers.WhisperTokenizer,
    config: transformers.WhisperConfig,
) -> transformers.GenerationConfig:
    """A generation config with which this model can be trained and scored.

    What those from before 2023 lack, and generate() needs, is taken from the tokenizer's
    vocabulary; max_new_tokens beyond the decoder's positions, with which generate() fails
    (transformers 5.24), is lowered. One that lacks nothing is returned as it is.
    Raises: UserError if the tokenizer has not what is missing.
    """
    found = settings_of_vocabulary(tokenizer, config)
    if getattr(generation_config, "is_multilingual", found["is_multilingual"]):
        needed = ("is_multilingual", "no_timestamps_token_id", "lang_to_id", "task_to_id")
    else:
        needed = ("is_multilingual", "no_timestamps_token_id")
    missing = [name for name in needed if getattr(generation_config, name, None) is None]
    if missing:
        # A new object: one that says of itself that it was made from the model's config loses these
        # entries when it is saved and loaded (transformers 5.24, configuration_utils.py:501).
        settings = generation_config.to_dict()
        settings = {name: value for name, value in settings.items() if not name.startswith("_")}
        for name, value in found.items():
            if settings.get(name) is None:
                settings[name] = value
        unknown = [name for name in missing if settings.get(name) in (None, {})]
        if unknown:
            raise UserError(
                f"the checkpoint's generation_config.json lacks {', '.join(unknown)}, and its "
                "tokenizer has no such tokens. Copy both from the model that it was made from."
            )
        logger.warning(
            "the generation config lacks %s: completed from the tokenizer.", ", ".join(missing)
        )
        generation_config = transformers.GenerationConfig(**settings)
    limit_new_tokens(generation_config, config.max_target_positions - NUM_PROMPT_TOKENS)
    return generation_config


def settings_of_vocabulary(
    tokenizer: transformers.WhisperTokenizer, config: transformers.WhisperConfig
) -> dict[str, Any]:
    """What the generation config of an OpenAI checkpoint says, by the tokenizer's vocabulary."""
    vocabulary = tokenizer.get_vocab()
    languages = {}
    for code in LANGUAGES:
        token = f"<|{code}|>"
        if token in vocabulary:
            languages[token] = vocabulary[token]
    end = vocabulary.get("<|endoftext|>")
    is_multilingual = len(languages) > 0 and end != END_OF_ENGLISH_VOCABULARY
    settings = {
        "is_multilingual": is_multilingual,
        "no_timestamps_token_id": vocabulary.get("<|notimestamps|>"),
        "prev_sot_token_id": vocabulary.get("<|startofprev|>"),
        "decoder_start_token_id": config.decoder_start_token_id,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "suppress_tokens": getattr(config, "suppress_tokens", None),
        "begin_suppress_tokens": getattr(config, "begin_suppress_tokens", None),
        "max_length": config.max_target_positions,
        "return_timestamps": False,
    }
    if is_multilingual:
        settings["lang_to_id"] = languages
        settings["task_to_id"] = {
            task: vocabulary[f"<|{task}|>"] for task in TASKS if f"<|{task}|>" in vocabulary
        }
    return settings


def limit_new_tokens(generation_config: transformers.GenerationConfig, limit: int) -> None:
    """Lowers max_new_tokens to what fits into the decoder beside the prompt."""
    wanted = generation_config.max_new_tokens
    if wanted is not None and wanted > limit:
        logger.warning("max_new_tokens %d is more than the model can: %d now.", wanted, limit)
        generation_config.max_new_tokens = limit


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


def generate_after_prompts(
    model: Any,
    encoder_outputs: Any,
    *,
    decoder_input_ids: torch.Tensor,
    decoder_attention_mask: torch.Tensor,
    **generation: Any,
) -> torch.Tensor:
    """Token ids (batch, n_tokens) that follow what the decoder is given, without timestamps.

    decoder_..._ids, decoder_attention_mask: (batch, n_given): a prompt of its own for each row,
    padded at the left, and the tokens of language and task. Whisper's own generate() takes one
    prompt for all rows (transformers 5.24, `prompt_ids`); the one that it calls for each window
    takes these.
    """
    config = copy.deepcopy(model.generation_config)
    num_given = decoder_input_ids.shape[1]
    room = model.config.max_target_positions - num_given
    wanted = generation.pop("max_new_tokens", None)
    config.max_new_tokens = room if wanted is None else min(wanted, room)
    config.max_length = None
    # These are among what is given, and mean something to Whisper's own generate() only.
    for name in ("max_length", "language", "task"):
        generation.pop(name, None)
    first_timestamp = config.no_timestamps_token_id + 1
    timestamps = list(range(first_timestamp, model.config.vocab_size))
    no_timestamps = transformers.SuppressTokensLogitsProcessor(
        timestamps, device=encoder_outputs[0].device
    )
    is_zero3 = hasattr(model.proj_out.weight, "ds_id")  # see generate_ids
    ids = cast(Any, transformers.GenerationMixin).generate(
        model,
        encoder_outputs=encoder_outputs,
        generation_config=config,
        logits_processor=transformers.LogitsProcessorList([no_timestamps]),
        synced_gpus=is_zero3 or isinstance(model, FSDPModule),
        decoder_input_ids=decoder_input_ids,
        decoder_attention_mask=decoder_attention_mask,
        **generation,
    )
    return ids[:, num_given:]


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
