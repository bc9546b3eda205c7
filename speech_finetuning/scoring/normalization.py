"""How two texts are made comparable before their errors are counted."""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.models.whisper.english_normalizer import (
    BasicTextNormalizer,
    EnglishTextNormalizer,
)

from speech_finetuning.data.text import (
    APOSTROPHES,
    INVISIBLE,
    has_inner_apostrophe,
    is_inside_word,
)

Normalizer = Callable[[str], str]

ORTHO = "ortho"  # as written
NORM = "norm"  # by Whisper's own normaliser: what published scores are of
NORM_MARKS = "norm_marks"  # the same, with vowel signs, tone marks and apostrophes inside words
READINGS = (ORTHO, NORM, NORM_MARKS)

# Where an apostrophe joins two words (l'été, dell'arte, i'r): two words are right there, and what
# is published counts them so. English has a normaliser of its own, which expands "can't".
LANGUAGES_WITH_ELISION = ("en", "ca", "cy", "fr", "ht", "it", "lb", "mt", "oc")

# A name such as O'Higgins in a Spanish corpus must not cost the comparison with published scores.
MIN_SHARE_OF_APOSTROPHES = 0.01  # of the references

# In characters, some five times what can be said in 30 s. Whisper's normalisers take time that
# grows with the square of a text (10,000 opening brackets: 0.7 s), and the English one raises
# ValueError for a number of more than 4,300 digits.
MAX_NORMALIZED_AT_ONCE = 2_000
ENDS_OF_SENTENCES = re.compile("[.?!] |[\u3002\uff1f\u0964]")  # the last ones: 。？।


@dataclass(frozen=True, kw_only=True)
class ScoringTarget:
    """What is spoken in an evaluation set, and which reading of its texts leads."""

    language: str | None  # spoken; None: the checkpoint knows only English
    leads_normalized: bool  # whether wer and cer are those of normalised text
    is_translated: bool = False  # into English
    has_nonspeech: bool = False  # rows without a text are not speech
    is_guard: bool = False  # what must not get worse: has no part in the total

    @property
    def text_language(self) -> str:
        """The language of references and predictions."""
        return "en" if self.is_translated or self.language is None else self.language


def scoring_targets(
    records: Iterable[Any], languages: Iterable[str | None], is_translated: bool
) -> dict[str, ScoringTarget]:
    """By the name of each of the script's records. languages: what is spoken in each of them."""
    return {
        record.name: ScoringTarget(
            language=language,
            leads_normalized=record.do_normalize_eval,
            is_translated=is_translated,
            has_nonspeech=record.keep_empty_text,
            is_guard=record.guard,
        )
        for record, language in zip(records, languages, strict=True)
    }


class MarksNormalizer(BasicTextNormalizer):
    """Whisper's basic normaliser without its loss; see `keep_marks`."""

    def __init__(self) -> None:
        super().__init__()
        self.clean = keep_marks  # the attribute's name is transformers' own (5.24)


def collapse_spaces(text: str) -> str:
    """jiwer separates words at plain spaces only, so every kind of white space becomes one."""
    return " ".join(text.split())


def as_written(text: str) -> str:
    """One spelling of what looks the same: NFC, nothing invisible, single plain spaces."""
    return collapse_spaces(unicodedata.normalize("NFC", text.translate(INVISIBLE)))


def unify_apostrophes(text: str) -> str:
    """Every apostrophe inside a word as U+0027; all other characters stay."""
    characters = list(text)
    for match in APOSTROPHES.finditer(text):
        if is_inside_word(text, match.start()):
            characters[match.start()] = "'"
    return "".join(characters)


def keep_marks(text: str) -> str:
    """transformers' remove_symbols, but category M (vowel signs, tone marks) and apostrophes inside
    words stay."""
    # Before NFKC, which takes the acute accent U+00B4 apart.
    text = unicodedata.normalize("NFKC", unify_apostrophes(text))
    kept = []
    for place, character in enumerate(text):
        is_symbol = unicodedata.category(character)[0] in "SP"
        is_letter = character == "'" and is_inside_word(text, place)
        kept.append(" " if is_symbol and not is_letter else character)
    return "".join(kept)


def split_long_text(text: str) -> list[str]:
    """The text itself, or of a long one parts of at most MAX_NORMALIZED_AT_ONCE characters: whole
    sentences, where there are any, else whole words."""
    parts = []
    start = 0
    while start < len(text):
        part = text[start : start + MAX_NORMALIZED_AT_ONCE]
        if start + len(part) < len(text):
            ends = [match.end() for match in ENDS_OF_SENTENCES.finditer(part)]
            end_of_word = part.rfind(" ") + 1
            part = part[: ends[-1] if ends else end_of_word] or part
        parts.append(part)
        start += len(part)
    return parts


def normalize_in_parts(normalize: Normalizer, text: str) -> str:
    """normalize(text), in time that grows with the length of the text and not with its square."""
    normalized = []
    for part in split_long_text(text):
        normalized.append(normalize(part))
        if unicodedata.category(part[-1])[0] in "ZP":  # else within a word
            normalized.append(" ")
    return "".join(normalized)


def text_normalizers(
    text_language: str, tokenizer: transformers.WhisperTokenizer
) -> dict[str, Normalizer]:
    """How a text of this language is read, by the name of the reading."""
    whispers_own: Normalizer = BasicTextNormalizer()
    if text_language == "en":
        whispers_own = EnglishTextNormalizer(tokenizer.english_spelling_normalizer or {})
    return {
        ORTHO: as_written,
        NORM: functools.partial(normalize_in_parts, whispers_own),
        NORM_MARKS: functools.partial(normalize_in_parts, MarksNormalizer()),
    }


def read_text(text: str, normalize: Normalizer) -> str:
    """A text in one reading: words separated by single plain spaces."""
    return collapse_spaces(normalize(as_written(text)))


def count_inner_apostrophes(references: Iterable[str]) -> int:
    """The number of references with an apostrophe inside a word."""
    return sum(has_inner_apostrophe(text) for text in references)


def leading_reading(target: ScoringTarget, references: list[str]) -> str:
    """The reading whose error rates are called wer and cer.

    Where the references have apostrophes that are letters (ka'aguy, ng'ombe), Whisper's normaliser
    would count one word as two, so the reading that keeps them leads.
    """
    if not target.leads_normalized:
        return ORTHO
    if target.text_language in LANGUAGES_WITH_ELISION:
        return NORM
    num_with = count_inner_apostrophes(references)
    if num_with and num_with >= MIN_SHARE_OF_APOSTROPHES * len(references):
        return NORM_MARKS
    return NORM
