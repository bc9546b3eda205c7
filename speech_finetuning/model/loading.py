"""The checkpoint's processor and its language."""

from typing import Any

import transformers
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.network import as_user_error


def check_language(
    language: str | None, generation_config: transformers.GenerationConfig, name: str
) -> str | None:
    """The language's code as the checkpoint knows it; None for English-only models.
    Raises: UserError if it is missing, unknown to this checkpoint, or given for an English-only one."""
    known = getattr(generation_config, "lang_to_id", None) or {}
    if not getattr(generation_config, "is_multilingual", bool(known)):
        if language is not None:
            raise UserError(
                f"--language {language}: {name} knows English only. Leave out --language and --task."
            )
        return None
    codes = sorted(token.strip("<|>") for token in known)
    if language is None:
        raise UserError(
            f"--language is missing: {name} knows {len(codes)} languages. Pass --language es, say."
        )
    code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    if code not in codes:
        advice = "Choose a near language, in the same script if possible: its token then stands for yours"
        raise UserError(
            f"--language {language}: {name} has no token for it. {advice}. Known: {' '.join(codes)}."
        )
    return code


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
