"""A transcript as it is trained, and its token ids."""

import functools
import re
import unicodedata

import transformers

from speech_finetuning.base.files import printable
from speech_finetuning.base.rejections import Rejection

IGNORED_LABEL = -100  # torch's cross-entropy skips it
# Written without spaces between words, so that only characters can be counted (table 13 of
# Whisper's paper, and related languages).
UNSPACED_LANGUAGES = ("zh", "yue", "ja", "th", "lo", "my", "km")
# Invisible, and nothing that is said: zero-width space and no-break space, word joiner, soft
# hyphen, marks of the writing direction.
INVISIBLE = dict.fromkeys(
    map(
        ord,
        "\u200b\ufeff\u2060\u00ad\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
    )
)
# Zero-width joiner and non-joiner spell words in Persian, Urdu and the scripts of India; nowhere in
# Latin, Greek, Cyrillic and Armenian, which end before U+0590.
JOINERS_OUTSIDE_WORDS = re.compile(
    r"(?<![\u0590-\U0010ffff])[\u200c\u200d]+|[\u200c\u200d]+(?=[A-Za-z\u00c0-\u02af])"
)
# What a conversion puts in place of characters, and half of a pair of UTF-16, which no tokenizer
# takes.
LOST_CHARACTERS = re.compile("[\ufffd\ud800-\udfff]")
# <|endoftext|>, <|0.00|> and the like, whether or not this tokenizer knows them.
SPECIAL_TOKEN = re.compile(r"<\|[^\s|<>]{1,30}\|>")


def normalize_text(text: str, do_lower_case: bool, do_remove_punctuation: bool) -> str:
    """The transcript as it is trained: Unicode's form NFC, no invisible characters, white space
    collapsed, and beyond that only what was asked for.

    One letter has one spelling then: decomposed text costs more tokens (Vietnamese 33 instead of
    27), and counts as an error against composed text.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(INVISIBLE)
        text = JOINERS_OUTSIDE_WORDS.sub("", text)
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


def composition(text: str) -> str | None:
    """ "composed" (NFC) or "decomposed"; None where there is no difference, as in English."""
    if text.isascii():
        return None
    if not unicodedata.is_normalized("NFC", text):
        return "decomposed"
    return None if unicodedata.is_normalized("NFD", text) else "composed"


@functools.lru_cache(maxsize=16)
def longest_token(tokenizer: transformers.WhisperTokenizer) -> int:
    """Length of the vocabulary's longest token, in characters; never less in bytes of UTF-8."""
    return max(len(token) for token in tokenizer.get_vocab())


@functools.lru_cache(maxsize=16)
def special_tokens(tokenizer: transformers.WhisperTokenizer) -> frozenset[int]:
    """Ids that are no text: what the tokenizer treats as special, languages, tasks, timestamps."""
    added = tokenizer.added_tokens_decoder.items()
    named = {i for i, token in added if token.special or SPECIAL_TOKEN.fullmatch(token.content)}
    return frozenset(named | set(tokenizer.all_special_ids))


def check_length(
    text: str, tokenizer: transformers.WhisperTokenizer, max_label_length: int
) -> None:
    """Before any work on a text that cannot fit, because no token is so long.

    Raises: Rejection(label_too_long).
    """
    limit = max_label_length * longest_token(tokenizer)
    if len(text) > limit:
        detail = f"{len(text)} characters, {max_label_length} tokens have at most {limit}"
        raise Rejection("label_too_long", detail)


def encode_text(
    text: str, tokenizer: transformers.WhisperTokenizer, max_label_length: int
) -> list[int]:
    """Token ids: <|startoftranscript|> [language, task] <|notimestamps|> text <|endoftext|>.

    Raises: Rejection(label_too_long) if the decoder has too few positions for them,
    Rejection(text_has_special_tokens) if the text would become control tokens.
    """
    check_length(text, tokenizer, max_label_length)
    # What tokenizer(text) calls, in half the time.
    encoding = tokenizer.backend_tokenizer.encode(text)
    ids = encoding.ids
    special = special_tokens(tokenizer)
    num_special = sum(token in special for token in ids)
    written = SPECIAL_TOKEN.search(text)
    if num_special > sum(encoding.special_tokens_mask) or written is not None:
        found = printable(written.group() if written is not None else text[:60])
        advice = "remove it; --timestamp_probability is how timestamps are trained"
        raise Rejection("text_has_special_tokens", f"{found} is a control token: {advice}")
    num_labels = len(ids) - 1  # the first id is only input, the last one only label
    if num_labels > max_label_length:
        detail = f"{num_labels} tokens, the model has {max_label_length} positions"
        raise Rejection("label_too_long", detail)
    return ids
