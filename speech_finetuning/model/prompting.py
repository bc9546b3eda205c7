"""A prompt for a saved model: written, cut and marked as those that models are trained with."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.prompts import START_OF_PROMPT, encode_prompt
from speech_finetuning.data.text import normalize_text
from speech_finetuning.model.recogniser import Recogniser

UNTRAINED = "this model was trained without prompts, and may do worse with one than without"


@dataclass(frozen=True, kw_only=True)
class PromptRules:
    """How the training of a model treated prompts, as far as its folder tells."""

    was_trained: bool | None = None  # with prompts; None: nobody knows, as of OpenAI's models
    do_lower_case: bool = False
    do_remove_punctuation: bool = False


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is read before every window."""

    ids: list[int]  # <|startofprev|> and the end of the text; none of an empty one
    num_tokens: int  # of the whole text


def settings_by_source(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of a phase, see training.phases, for each source: '--NAME' is of the only one,
    '--data_mix, ENTRY: NAME' of an entry."""
    sources: dict[str, dict[str, Any]] = {}
    for place, value in settings.items():
        source, _, name = place.removeprefix("--").rpartition(": ")
        sources.setdefault(source, {})[name] = value
    entries = {source: values for source, values in sources.items() if source}
    return entries or sources


def rules_of_run(folder: Path) -> PromptRules:
    """By the run_info.json in a model's folder."""
    try:
        record = json.loads((folder / "run_info.json").read_text(encoding="utf-8"))
        phases = [settings_by_source(phase["settings"]) for phase in record["phases"]]
        last = list(phases[-1].values())
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return PromptRules()
    return PromptRules(
        was_trained=were_trained([source for phase in phases for source in phase.values()]),
        do_lower_case=all(source.get("do_lower_case") is True for source in last),
        do_remove_punctuation=all(source.get("do_remove_punctuation") is True for source in last),
    )


def were_trained(sources: list[dict[str, Any]]) -> bool | None:
    """Whether any of these was read with prompts. A record from the Hub may lack the column's name,
    which is not public: then nobody knows."""
    if any(source.get("prompt_column_name") and source["prompt_probability"] for source in sources):
        return True
    is_hidden = any(
        "prompt_probability" in source and "prompt_column_name" not in source for source in sources
    )
    return None if is_hidden else False


def reads_prompts(recogniser: Recogniser) -> bool:
    """Whether its vocabulary has the token that begins one."""
    tokenizer: Any = recogniser.processor.tokenizer
    return START_OF_PROMPT in tokenizer.get_vocab()


def prepare_prompt(recogniser: Recogniser, text: str, flag: str = "--prompt") -> Prompt:
    """A prompt as this model was trained to read it. flag: what it is called in errors.
    Raises: UserError for what is no text, and of a model that reads none."""
    if not reads_prompts(recogniser):
        raise UserError(
            f"{flag}: {recogniser.name} has no token {START_OF_PROMPT}, so that it reads no "
            f"prompts. Leave out {flag}."
        )
    rules = rules_of_run(Path(recogniser.name))
    text = normalize_text(text, rules.do_lower_case, rules.do_remove_punctuation)
    tokenizer: Any = recogniser.processor.tokenizer
    num_positions = recogniser.model.config.max_target_positions
    try:
        ids = encode_prompt(text, tokenizer, num_positions)
        whole = encode_prompt(text, tokenizer, 2 * len(text.encode()) + num_positions)
    except Rejection as rejection:
        detail = rejection.detail.removeprefix("the prompt: ").removeprefix("the prompt ")
        raise UserError(f"{flag}: {detail}.") from rejection
    return Prompt(ids=ids, num_tokens=max(0, len(whole) - 1))


def notes_on(recogniser: Recogniser, prompt: Prompt) -> list[str]:
    """What to tell of a prompt before it is used."""
    notes = []
    num_read = max(0, len(prompt.ids) - 1)
    if num_read < prompt.num_tokens:
        notes.append(
            f"of the prompt's {prompt.num_tokens:,} tokens only the last {num_read} are read: no "
            "Whisper reads more"
        )
    if prompt.ids and rules_of_run(Path(recogniser.name)).was_trained is False:
        notes.append(UNTRAINED)
    return notes
