"""A transcript as it is trained, and its token ids."""

import unicodedata

import transformers

from speech_finetuning.base.rejections import Rejection

IGNORED_LABEL = -100  # torch's cross-entropy skips it
# Written without spaces between words, so that only characters can be counted (table 13 of
# Whisper's paper, and related languages).
UNSPACED_LANGUAGES = ("zh", "yue", "ja", "th", "lo", "my", "km")


def normalize_text(text: str, do_lower_case: bool, do_remove_punctuation: bool) -> str:
    """The transcript as it is trained: white space collapsed, and only what was asked for."""
    if do_lower_case:
        text = text.lower()
    if do_remove_punctuation:
        text = "".join(without_punctuation(character) for character in text)
    return " ".join(text.split())


def without_punctuation(character: str) -> str:
    """The character itself, nothing, or the space that a dash stands for between words.

    Punctuation is Unicode category P, in any script. Letters, digits, combining marks (vowel signs)
    and symbols stay, and so does what is inside brackets.
    """
    category = unicodedata.category(character)
    if category == "Pd":
        return " "
    return "" if category.startswith("P") else character


def encode_text(
    text: str, tokenizer: transformers.WhisperTokenizer, max_label_length: int
) -> list[int]:
    """Token ids: <|startoftranscript|> [language, task] <|notimestamps|> text <|endoftext|>.

    Raises: Rejection(label_too_long) if the decoder has too few positions for them.
    """
    # What tokenizer(text) calls, in half the time.
    ids = tokenizer.backend_tokenizer.encode(text).ids
    num_labels = len(ids) - 1  # the first id is only input, the last one only label
    if num_labels > max_label_length:
        detail = f"{num_labels} tokens, the model has {max_label_length} positions"
        raise Rejection("label_too_long", detail)
    return ids
