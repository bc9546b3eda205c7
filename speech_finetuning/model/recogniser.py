"""A saved model, loaded to transcribe with it, and what it can be asked for."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from speech_finetuning.base.errors import UserError, one_line
from speech_finetuning.data.audio import FRAMES_PER_POSITION, HOP_LENGTH_IN_SAMPLES
from speech_finetuning.model.generation import complete_generation_config
from speech_finetuning.model.languages import find_code

logger = logging.getLogger(__name__)

DETECT = "detect"  # in place of a language code


@dataclass(kw_only=True)
class Recogniser:
    """A loaded checkpoint, what it has tokens for ([] if English-only), and what its encoder hears
    at once."""

    name: str
    model: WhisperForConditionalGeneration
    processor: WhisperProcessor
    languages: list[str]
    tasks: list[str]
    window_in_samples: int  # 30 s in OpenAI's checkpoints
    # Whether it predicts timestamps, by language and task; measured once, see `predicts_timestamps`.
    has_timestamps: dict[tuple[str, str], bool] = field(default_factory=dict)


def check_folder(flag: str, name: str) -> None:
    """Raises: UserError if name is neither a folder with a model nor like a Hub id."""
    folder = Path(name)
    like_hub_id = (
        not folder.exists() and name.count("/") < 2 and name[:1] not in ("", ".", "/", "~")
    )
    if (folder / "config.json").is_file() or like_hub_id:
        return
    names = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
    found = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    if not names:
        found = "a file" if folder.is_file() else "nothing"
    saved = sorted(folder.glob("*/config.json"), key=modified_at)
    advice = saved[-1].parent if saved else "OUTPUT_DIR (the one of training)"
    raise UserError(
        f"{flag} {name}: no folder with a config.json, found {found}. Next: {flag} {advice}"
    )


def modified_at(path: Path) -> float:
    return path.stat().st_mtime


def load_recogniser(flag: str, name: str, device: str | None = None) -> Recogniser:
    """The checkpoint on the GPU in float16, or else on the CPU in float32. No code of a model
    repository is ever run.

    flag: what names it on the command line, for errors. device: None: a GPU if there is one.
    Raises: UserError if it is not there, is damaged, or is no Whisper model.
    """
    check_folder(flag, name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device == "cpu" else torch.float16
    try:
        kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
        if kind != "whisper":
            raise UserError(f"Whisper is needed, found a {kind} model.")
        processor = WhisperProcessor.from_pretrained(name)
        model: Any = WhisperForConditionalGeneration.from_pretrained(name, dtype=dtype)
        model = model.to(device).eval()
        model.generation_config = complete_generation_config(
            model.generation_config, processor.tokenizer, model.config
        )
    except Exception as error:  # whatever the library says about files that are missing or damaged
        text = f"{type(error).__name__}: {one_line(error)[:500]}"
        advice = "" if Path(name).is_dir() else ", or, if the model is private: hf auth login"
        raise UserError(f"{flag} {name}: {text} Next: {flag} OUTPUT_DIR{advice}") from error
    generation_config = model.generation_config
    languages = getattr(generation_config, "lang_to_id", None) or {}
    window_in_frames = FRAMES_PER_POSITION * model.config.max_source_positions
    return Recogniser(
        name=name,
        model=model,
        processor=processor,
        languages=sorted(token.strip("<|>") for token in languages),
        tasks=sorted(getattr(generation_config, "task_to_id", None) or {}),
        window_in_samples=window_in_frames * HOP_LENGTH_IN_SAMPLES,
    )


def default_language(recogniser: Recogniser) -> str:
    """The language that the model was trained on, by its generation config or its run_info.json;
    else detection."""
    told = getattr(recogniser.model.generation_config, "language", None)
    for language in (told, language_of_run(Path(recogniser.name))):
        word = (language or "").lower().strip("<|>")
        code = TO_LANGUAGE_CODE.get(word, word)
        if code in recogniser.languages:
            return code
    return DETECT


def language_of_run(folder: Path) -> str | None:
    """The --language of the training that saved this folder; None of a mix, or if nobody knows."""
    try:
        record = json.loads((folder / "run_info.json").read_text(encoding="utf-8"))
        language = record["identity"].get("language")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return language if isinstance(language, str) else None


def language_of_folder(folder: Path) -> str | None:
    """The code of the one language that a saved model was trained on; None if there is none."""
    try:
        config = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        told = config.get("language")
    except (OSError, ValueError, AttributeError):
        told = None
    language = told if isinstance(told, str) else language_of_run(folder)
    word = (language or "").lower().strip("<|>")
    return TO_LANGUAGE_CODE.get(word, word) or None


def chosen_language(recogniser: Recogniser, language: str | None) -> str:
    """The model's code for what was asked for, or its own. Raises: UserError for a language without
    a token."""
    if language is None or language == DETECT:
        return language or default_language(recogniser)
    if recogniser.languages:
        return find_code(language, recogniser.languages)
    if find_code(language, ["en"]) != "en":
        raise UserError(f"--language {language}: {recogniser.name} knows English only.")
    return "en"
