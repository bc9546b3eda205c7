"""A transcript as it is trained, and its token ids."""

import functools
import re
import unicodedata
from collections.abc import Iterator

import transformers

from speech_finetuning.base.files import printable
from speech_finetuning.base.rejections import Rejection

IGNORED_LABEL = -100  # torch's cross-entropy skips it
# Written without spaces between words, so that only characters can be counted (table 13 of
# Whisper's paper, and related languages).
UNSPACED_LANGUAGES = ("zh", "yue", "ja", "th", "lo", "my", "km")
# For str.translate, of texts that are trained and of those that are scored: characters that nobody
# sees or says. Zero-width space and no-break space, word joiner, soft hyphen, marks of the writing
# direction. The zero-width joiners U+200C and U+200D stay: Persian and Hindi spell with them.
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
# All of them are typed for the same letter: ' ’ ʼ first, then ‘ ʻ (Hawaiian, Uzbek), the saltillo
# in both cases, the fullwidth one, and the accents and the prime that keyboards offer.
APOSTROPHES = re.compile("['\u2019\u02bc\u2018\u02bb\ua78b\ua78c\uff07`\u00b4\u2032]")
# Vowels and finals of Hangul, which belong to the consonant before them although they are letters.
HANGUL_ENDINGS = range(0x1160, 0x1200)
# What a conversion puts in place of characters; half of a pair of UTF-16, which no tokenizer takes;
# and the NUL bytes of UTF-16 that was read as ASCII.
LOST_CHARACTERS = re.compile("[\0\ufffd\ud800-\udfff]")
# <|endoftext|>, <|0.00|> and the like, whether or not this tokenizer knows them.
SPECIAL_TOKEN = re.compile(r"<\|[^\s|<>]{1,30}\|>")


def normalize_text(text: str, do_lower_case: bool, do_remove_punctuation: bool) -> str:
    """The transcript as it is trained: no invisible characters, Unicode's form NFC, white space
    collapsed, and beyond that only what was asked for.

    One letter has one spelling then: decomposed text costs more tokens (Vietnamese 33 instead of
    27), and counts as an error against composed text.
    """
    if not text.isascii():
        text = JOINERS_OUTSIDE_WORDS.sub("", text.translate(INVISIBLE))
        text = unicodedata.normalize("NFC", text)
    if do_lower_case:
        text = text.lower()
    if do_remove_punctuation:
        text = without_punctuation(text)
    if not text.isascii():
        # What stood between a letter and its mark may have gone.
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def without_punctuation(text: str) -> str:
    """The text without Unicode category P, in any script; a dash between words becomes a space.

    Letters, digits, combining marks (vowel signs) and symbols stay, and so does what is inside
    brackets. An apostrophe inside a word (ka'aguy, don't) is a letter.
    """
    kept = []
    for place, character in enumerate(text):
        category = unicodedata.category(character)
        if not category.startswith("P") or is_inner_apostrophe(text, place):
            kept.append(character)
        elif category == "Pd":
            kept.append(" ")
    return "".join(kept)


def is_inside_word(text: str, place: int) -> bool:
    """Whether the character at `place` has a letter, mark or digit before it and a letter after."""
    if place == 0 or place + 1 == len(text):
        return False
    before = unicodedata.category(text[place - 1])[0]
    after = unicodedata.category(text[place + 1])[0]
    return before in "LMN" and after == "L"


def is_inner_apostrophe(text: str, place: int) -> bool:
    return APOSTROPHES.match(text, place) is not None and is_inside_word(text, place)


def has_inner_apostrophe(text: str) -> bool:
    """Whether a word contains an apostrophe, as ka'aguy does; quotation marks do not count."""
    return any(is_inside_word(text, match.start()) for match in APOSTROPHES.finditer(text))


def spelled_letters(text: str) -> Iterator[tuple[str, str]]:
    """(letter in Unicode's form NFC, the same as it is written) for every letter beyond ASCII.

    A letter is a character with the marks that follow it.
    """
    if text.isascii():
        return
    start = 0
    for place in range(1, len(text) + 1):
        if place < len(text) and continues_letter(text[place]):
            continue
        written = text[start:place]
        start = place
        if not written.isascii():
            yield unicodedata.normalize("NFC", written), written


def continues_letter(character: str) -> bool:
    return unicodedata.category(character).startswith("M") or ord(character) in HANGUL_ENDINGS


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
