"""What --model_name_or_path names, as far as that can be said without torch."""

import json
from pathlib import Path
from typing import Any

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.dataset_names import what_is_there

PASS_A_WHISPER = (
    "Pass the folder of a Whisper in transformers' format, or its id on the Hub, such as "
    "openai/whisper-small."
)


def check_is_checkpoint(name: str, flag: str) -> None:
    """Raises UserError for a path that is no folder of transformers, and says what it is instead.
    flag: with its value, for the error."""
    path = Path(name)
    if not is_unicode(name):
        raise UserError(
            f"{flag}: the name holds bytes that are not UTF-8, and weights are not opened below it. "
            "Rename the folder."
        )
    if path.is_file():
        raise UserError(f"{flag}: a file. {PASS_A_WHISPER}")
    if not path.is_dir():
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise UserError(f"{flag}: there is no such folder. {what_is_there(name)}")
        if "/" not in name:  # no Whisper on the Hub is without an owner
            raise UserError(
                f"{flag}: there is no such folder. {what_is_there(f'./{name}')} On the Hub a model has "
                "an owner, as openai/whisper-small."
            )
        return  # an id on the Hub
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        base = read_settings(path / "adapter_config.json").get("base_model_name_or_path")
        raise UserError(
            f"{flag}: a PEFT adapter, which is trained on top of {base}. Merge it first: "
            "PeftModel.from_pretrained(base_model, adapter).merge_and_unload().save_pretrained(...)."
        )
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        raise UserError(
            f"{flag}: no model, as there is no config.json. Found: {found}. {PASS_A_WHISPER}"
        )
    settings = read_settings(path / "config.json")
    if (path / "model.bin").is_file() and "model_type" not in settings:
        raise UserError(
            f"{flag}: a CTranslate2 model, as faster-whisper uses, which cannot be trained. Pass the "
            "model that it was converted from."
        )


def is_unicode(name: str) -> bool:
    """Whether a name is characters; else the system's bytes are kept as surrogates, which
    safetensors refuses."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if it is none, which is for others to judge."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}
