"""A transcript as it is trained, and its token ids."""

import unicodedata

import transformers

from speech_finetuning.base.rejections import Rejection

IGNORED_LABEL = -100  # torch's cross-entropy skips it
# Written without spaces between words, so that only characters can be counted (Whisper's paper, table 13, and kin).
UNSPACED_LANGUAGES = ("zh", "yue", "ja", "th", "lo", "my", "km")


def normalize_text(text: str, do_lower_case: bool, do_remove_punctuation: bool) -> str:
    """The transcript as it is trained: white space collapsed, and only what was asked for.
    Punctuation is Unicode category P, in any script; dashes separate words, all other marks vanish. Letters, digits,
    combining marks (vowel signs), symbols and brackets' contents stay."""
    if do_lower_case:
        text = text.lower()
    if do_remove_punctuation:
        kinds = ((character, unicodedata.category(character)) for character in text)
        text = "".join(
            " " if kind == "Pd" else c for c, kind in kinds if kind == "Pd" or kind[0] != "P"
        )
    return " ".join(text.split())


def encode_text(
    text: str, tokenizer: transformers.WhisperTokenizer, max_label_length: int
) -> list[int]:
    """Token ids of a transcript with prefix and end: <|startoftranscript|> [language, task] <|notimestamps|> ... .
    Raises: Rejection if the decoder has too few positions for it."""
    ids = tokenizer.backend_tokenizer.encode(
        text
    ).ids  # what tokenizer(text) calls, in half the time
    if len(ids) - 1 > max_label_length:  # the first one is only input, the last one only label
        raise Rejection(
            "label_too_long", f"{len(ids) - 1} tokens, the model has {max_label_length} positions"
        )
    return ids
