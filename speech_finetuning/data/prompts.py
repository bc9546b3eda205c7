"""What the model reads before a clip: names and terms that may come, or what was said before.

Whisper's decoder may begin with <|startofprev|> and a text, which it is not asked to repeat but
which tells it about spelling, style and subject (Radford et al. 2022, section 2.3). A model that is
fine-tuned without such texts forgets what they are for. `SpeechStream` draws which training rows
have theirs, by their seed; scores are taken without them, and at the end once more with them.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.text import (
    IGNORED_LABEL,
    LOST_CHARACTERS,
    SPECIAL_TOKEN,
    longest_token,
    special_tokens,
)

START_OF_PROMPT = "<|startofprev|>"
# Number of the draw for a row, beside those of `augmentation`.
PROMPT_DRAW = 6


@dataclass
class PromptArguments:
    """Which text the model reads before a clip, and how often."""

    prompt_column_name: str | None = field(
        default=None,
        metadata={
            "help": "Column of what the model reads before a clip: names, terms; or previous_segment."
        },
    )
    prompt_probability: float = field(
        default=0.5,
        metadata={"help": "Share of training rows that are trained with their prompt."},
    )


@functools.lru_cache(maxsize=16)
def start_of_prompt(tokenizer: transformers.WhisperTokenizer) -> int:
    """Id of <|startofprev|>. Raises: UserError for a vocabulary without it."""
    token_id = tokenizer.get_vocab().get(START_OF_PROMPT)
    if token_id is None:
        raise UserError(
            f"--prompt_column_name: the model's tokenizer has no token {START_OF_PROMPT}. Leave the "
            "flag out, or take another model."
        )
    return token_id


def encode_prompt(
    text: str, tokenizer: transformers.WhisperTokenizer, max_label_length: int
) -> list[int]:
    """Token ids: <|startofprev|> and the end of the text, as many as generation takes: half of the
    decoder's positions (transformers 5.24, generation_whisper.py, `cut_off_length`). None of an
    empty text.

    Raises: Rejection(row_unreadable, text_has_special_tokens).
    """
    if LOST_CHARACTERS.search(text):
        raise Rejection("row_unreadable", "the prompt has lost characters: U+FFFD or half a pair")
    written = SPECIAL_TOKEN.search(text)
    if written is not None:
        raise Rejection(
            "text_has_special_tokens",
            f"the prompt: {written.group()} is a control token: remove it",
        )
    max_length = max_label_length // 2 - 1
    text = text[-max_length * longest_token(tokenizer) :].strip()
    if not text:
        return []
    ids = tokenizer.backend_tokenizer.encode(f" {text}", add_special_tokens=False).ids
    if not special_tokens(tokenizer).isdisjoint(ids):
        raise Rejection("text_has_special_tokens", "the prompt contains a control token: remove it")
    return [start_of_prompt(tokenizer), *ids[-max_length:]]


def fit_prompt(prompt_ids: list[int], num_labels: int, max_label_length: int) -> list[int]:
    """The prompt without as much of its beginning as leaves no room for the labels; empty if
    nothing of it fits. num_labels: token ids of the row, both ends included."""
    room = max_label_length + 1 - num_labels
    if len(prompt_ids) <= room:
        return prompt_ids
    if room < 2:  # <|startofprev|> alone says nothing
        return []
    return [prompt_ids[0], *prompt_ids[1:][-(room - 1) :]]


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Prompts of several rows side by side, as generation reads them: `prompt_ids` (batch,
    n_tokens), padded at the left, and `prompt_mask` (batch, n_tokens), 1 where a token is."""
    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    shape = (len(prompts), longest)
    return {
        "prompt_ids": torch.tensor(ids, dtype=torch.long).view(shape),
        "prompt_mask": torch.tensor(mask, dtype=torch.long).view(shape),
    }


def scored_inputs(
    batch: dict[str, Any],
    config: transformers.WhisperConfig,
    *,
    device: torch.device,
    has_prompts: bool,
) -> dict[str, torch.Tensor]:
    """`labels` and the decoder's arguments for rows that are scored, (batch, n_tokens) each, on the
    device; with each row's prompt before what it reads, if that is how they are scored.

    batch: of the script's EvalCollator.
    """
    labels = batch["labels"].to(device)
    decoder_input_ids = batch["decoder_input_ids"].to(device)
    if not has_prompts:
        return {"labels": labels, "decoder_input_ids": decoder_input_ids}
    assert config.pad_token_id is not None
    padded = left_padded(batch["prompts"], config.pad_token_id)
    prompt_ids = padded["prompt_ids"].to(device)
    prompt_mask = padded["prompt_mask"].to(device)
    mask = torch.cat([prompt_mask, torch.ones_like(decoder_input_ids)], dim=1)
    # They count from each row's own first token. Those of what pads it at its end matter to nothing.
    last_position = config.max_target_positions - 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0, max=last_position)
    ignored = torch.full_like(prompt_ids, IGNORED_LABEL)
    return {
        "labels": torch.cat([ignored, labels], dim=1),
        "decoder_input_ids": torch.cat([prompt_ids, decoder_input_ids], dim=1),
        "decoder_attention_mask": mask,
        "decoder_position_ids": positions,
    }
