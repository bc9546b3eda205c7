"""A saved model, loaded to transcribe with it, and what it can be asked for."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from speech_finetuning.base.errors import UserError, memory_that_is_out, one_line
from speech_finetuning.data.audio import FRAMES_PER_POSITION, HOP_LENGTH_IN_SAMPLES
from speech_finetuning.model.languages import find_code
from speech_finetuning.model.loading import check_all_weights_were_there, load_processor

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
    """Raises: UserError if name is neither a folder with a model nor like a Hub id. What is wrong
    with a folder of another kind is for `load_processor` to say."""
    folder = Path(name)
    like_hub_id = (
        not folder.exists() and name.count("/") < 2 and name[:1] not in ("", ".", "/", "~")
    )
    has_config = any((folder / f"{kind}config.json").is_file() for kind in ("", "adapter_"))
    if has_config or like_hub_id:
        return
    names = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
    found = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    if not names:
        found = "a file" if folder.is_file() else "nothing"
    saved = sorted(folder.glob("*/config.json"), key=modified_at)
    advice = next_model(flag, shlex.quote(str(saved[-1].parent)) if saved else "OUTPUT_DIR")
    raise UserError(f"{flag} {name}: no folder with a config.json, found {found}. {advice}")


def next_model(flag: str, folder: str) -> str:
    """What to name instead, by a flag or in MODEL's place. OUTPUT_DIR: the one of a training."""
    if flag.startswith("--"):
        return f"Next: {flag} {folder}"
    known = "the --output_dir of a training" if folder == "OUTPUT_DIR" else folder
    return f"Next: {known} as {flag}"


def modified_at(path: Path) -> float:
    return path.stat().st_mtime


def load_recogniser(flag: str, name: str, device: str | None = None) -> Recogniser:
    """The checkpoint on the GPU in float16, or else on the CPU in float32. No code of a model
    repository is ever run.

    flag: what names it on the command line, for errors. device: None: a GPU if there is one.
    Raises: UserError if it is not there, is damaged, or is no Whisper model.
    """
    check_folder(flag, name)
    where = f"{flag} {name}"
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device == "cpu" else torch.float16
    try:
        processor, generation_config, _ = load_processor(name, "main", None, flag)
        load: Any = WhisperForConditionalGeneration.from_pretrained  # whose type has no pair
        model, loading_info = load(name, dtype=dtype, output_loading_info=True)
        check_all_weights_were_there(loading_info, where)
        model = model.to(device).eval()
    except Exception as error:  # whatever the library says about files that are missing or damaged
        if kind := memory_that_is_out(error):
            raise UserError(
                f"{where}: it does not fit into the {kind}. {less_memory(device)}"
            ) from error
        text = f"{type(error).__name__}: {one_line(error)[:500]}"
        if isinstance(error, UserError):
            text = str(error).removeprefix(f"{where}: ")
        advice = next_model(flag, "OUTPUT_DIR")
        if not Path(name).is_dir():
            advice += ", or, if the model is private: hf auth login"
        raise UserError(f"{where}: {text} {advice}") from error
    model.generation_config = generation_config
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


def less_memory(device: str) -> str:
    """What to do next where memory is out."""
    if device == "cpu":
        return "Close other programs, or take a smaller model."
    return "Next: CUDA_VISIBLE_DEVICES= before the same command, which leaves out the GPU."


def code_of(told: Any) -> str | None:
    """The code of a language as configs and command lines write it: es, Spanish, <|es|>; None if
    nothing is told."""
    word = told.lower().strip("<|>") if isinstance(told, str) else ""
    return TO_LANGUAGE_CODE.get(word, word) or None


def default_language(recogniser: Recogniser) -> str:
    """The language that the model was trained on, by its generation config or its run_info.json;
    else detection."""
    told = getattr(recogniser.model.generation_config, "language", None)
    for language in (told, language_of_run(Path(recogniser.name))):
        code = code_of(language)
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
