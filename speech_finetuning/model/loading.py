"""The checkpoint's processor and its language."""

from typing import Any

import transformers
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.network import as_user_error
from speech_finetuning.model.languages import find_code


def check_language(
    language: str | None, generation_config: transformers.GenerationConfig, name: str
) -> str | None:
    """The language's code as the checkpoint knows it; None for English-only models.

    Raises: UserError if it is missing or has no token in this checkpoint, or if an English-only
    checkpoint is given another language.
    """
    known = getattr(generation_config, "lang_to_id", None) or {}
    if not getattr(generation_config, "is_multilingual", bool(known)):
        if language is not None and find_code(language, list(LANGUAGES)) != "en":
            raise UserError(
                f"--language {language}: {name} knows English only. Leave out --language and "
                "--task."
            )
        return None
    codes = sorted(token.strip("<|>") for token in known)
    if language is None:
        raise UserError(
            f"--language is missing: {name} knows {len(codes)} languages. Pass --language es, say."
        )
    return find_code(language, codes)


def load_processor(
    name: str, revision: str, cache_dir: str | None
) -> tuple[transformers.WhisperProcessor, Any, Any]:
    """Processor, generation config and model config; small files, read before anything large.
    Raises: UserError if they are not there or belong to another architecture."""
    flag, where = f"--model_name_or_path {name}", {"revision": revision, "cache_dir": cache_dir}
    with as_user_error(OSError, where=flag):
        config = transformers.AutoConfig.from_pretrained(name, **where)
        if config.model_type != "whisper":
            raise UserError(f"{flag}: {config.model_type} model; this script trains Whisper only.")
        processor = transformers.WhisperProcessor.from_pretrained(name, **where)
        return processor, transformers.GenerationConfig.from_pretrained(name, **where), config
