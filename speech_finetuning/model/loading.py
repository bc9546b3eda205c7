"""The checkpoint: what is read of it before anything large, and what is wrong with it."""

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.network import as_user_error
from speech_finetuning.model.checkpoint_folder import PASS_A_WHISPER, check_is_checkpoint
from speech_finetuning.model.generation import complete_generation_config

logger = logging.getLogger(__name__)

FILES_OF_THE_ORIGINAL = "Copy that file from the model that it was made from, or fetch it again."
TIMESTAMP = re.compile(r"<\|\d+\.\d\d\|>")
# What the libraries raise for files that are missing, damaged, of another kind, or that hold code
# (transformers 5.24, tokenizers 0.22, safetensors 0.6, torch 2.13).
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    pickle.UnpicklingError,
)


def load_processor(
    name: str, revision: str, cache_dir: str | None, flag: str = "--model_name_or_path"
) -> tuple[
    transformers.WhisperProcessor, transformers.GenerationConfig, transformers.WhisperConfig
]:
    """Processor, generation config and model config; small files, read before anything large.

    A generation config from before 2023 is completed. The weights of a local folder are looked at,
    not loaded. No code of the checkpoint is ever run, or asked about. flag: what names the model on
    the command line, for errors.
    Raises: UserError if something is missing, damaged, or of another architecture.
    """
    flag = f"{flag} {name}"
    check_is_checkpoint(name, flag)
    where = {"revision": revision, "cache_dir": cache_dir}
    # Of the Hub's models the library says what to do.
    advice = f" {FILES_OF_THE_ORIGINAL}" if Path(name).is_dir() else ""
    with as_user_error(*LOADING_ERRORS, where=flag, advice=advice):
        settings, _ = transformers.PreTrainedConfig.get_config_dict(name, **where)
    check_architecture(settings, flag)
    with as_user_error(*LOADING_ERRORS, where=flag, advice=advice):
        config = transformers.WhisperConfig.from_pretrained(name, **where)
        processor = transformers.WhisperProcessor.from_pretrained(
            name, trust_remote_code=False, **where
        )
    check_feature_extractor(processor.feature_extractor, config, flag)
    check_tokenizer(processor.tokenizer, config, flag)
    check_weights(Path(name))
    generation_config = load_generation_config(name, processor.tokenizer, config, flag, **where)
    return processor, generation_config, config


def check_feature_extractor(
    extractor: transformers.WhisperFeatureExtractor, config: transformers.WhisperConfig, flag: str
) -> None:
    """Raises UserError if the spectrograms are not those that the model reads."""
    if extractor.feature_size != config.num_mel_bins:
        raise UserError(
            f"{flag}: the checkpoint's feature extractor makes {extractor.feature_size} mel bins, "
            f"its model reads {config.num_mel_bins}. Copy preprocessor_config.json from the model "
            "that it was made from."
        )


def check_architecture(settings: Any, flag: str) -> None:
    """Raises UserError for anything but a Whisper, whatever code it brings."""
    model_type = settings.get("model_type") if isinstance(settings, dict) else None
    if model_type is None:
        raise UserError(
            f"{flag}: its config.json names no model_type; expected whisper. {PASS_A_WHISPER}"
        )
    if model_type != "whisper":
        raise UserError(
            f"{flag}: {model_type} model; only Whisper can be used here. {PASS_A_WHISPER}"
        )


def check_tokenizer(
    tokenizer: transformers.WhisperTokenizer, config: transformers.WhisperConfig, flag: str
) -> None:
    """Raises UserError for a tokenizer that is missing, of another model, or larger than the model,
    whose embedding would be indexed beyond its end."""
    start = "<|startoftranscript|>"
    vocabulary = tokenizer.get_vocab()
    advice = "Copy tokenizer.json and tokenizer_config.json from the model that it was made from."
    if vocabulary.get(start) != config.decoder_start_token_id:
        raise UserError(
            f"{flag}: its tokenizer has {start} as token {vocabulary.get(start)}, its model expects "
            f"{config.decoder_start_token_id}: they do not belong together. {advice}"
        )
    # A model may lack timestamps, which are trained with --timestamp_probability only.
    num_tokens = 1 + max(
        number for token, number in vocabulary.items() if not TIMESTAMP.fullmatch(token)
    )
    if num_tokens > config.vocab_size:
        raise UserError(
            f"{flag}: its tokenizer has {num_tokens} tokens, its model only {config.vocab_size}. Call "
            f"model.resize_token_embeddings({num_tokens}) and save it, or leave out the added "
            f"tokens. {advice}"
        )


def check_weights(folder: Path) -> None:
    """Raises UserError for weights in a local folder that cannot be read, or that hold code, which
    is never run. Only headers are read, which takes milliseconds."""
    for path in sorted(folder.glob("*.safetensors")):
        with as_user_error(OSError, SafetensorError, where=str(path), advice=" Fetch it again."):
            safe_open(path, framework="pt")  # checks the header against the file's length
    if any(folder.glob("*.safetensors")):
        return  # what is loaded
    for path in sorted(folder.glob("pytorch_model*.bin")):
        check_pickle(path)


def check_pickle(path: Path) -> None:
    """Raises UserError for a file of torch.save that cannot be read as numbers only."""
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than numbers, maybe code, which is never run. Pass a model in "
            "safetensors, from a source that you trust."
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} is damaged. Fetch it again.") from error


def load_generation_config(
    name: str,
    tokenizer: transformers.WhisperTokenizer,
    config: transformers.WhisperConfig,
    flag: str,
    **where: Any,
) -> transformers.GenerationConfig:
    """The checkpoint's generation_config.json, completed; made from its other files if it has none.
    Raises: UserError if there is one that cannot be read."""
    try:
        generation_config = transformers.GenerationConfig.from_pretrained(name, **where)
    except OSError as error:
        if "does not appear to have a file named" not in str(error):
            with as_user_error(OSError, where=flag):
                raise
        logger.warning("%s has no generation_config.json.", name)
        generation_config = transformers.GenerationConfig()
    return complete_generation_config(generation_config, tokenizer, config)


def check_all_weights_were_there(loading_info: dict[str, Any], flag: str) -> None:
    """Raises UserError if from_pretrained had to make up weights: a model would be trained from
    noise, or speak it.

    loading_info: from_pretrained's with output_loading_info=True; flag: with its value, for the
    error.
    """
    missing = sorted(loading_info["missing_keys"])
    if missing and any(".lora_" in key for key in loading_info["unexpected_keys"]):
        raise UserError(
            f"{flag}: a checkpoint of --lora_rank, whose adapters are merged only in the model that "
            "its training leaves in --output_dir."
        )
    if missing:
        raise UserError(
            f"{flag}: {len(missing)} of its weights are missing, such as {missing[0]}. Its "
            "config.json and its weights do not belong together."
        )
