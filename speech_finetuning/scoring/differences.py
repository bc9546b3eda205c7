"""Two texts compared for somebody who reads them: how many mistakes, and which words differ."""

import transformers

from speech_finetuning.scoring.alignment import (
    DELETE,
    EQUAL,
    WORD,
    align,
    split_units,
    unit_of_language,
)
from speech_finetuning.scoring.metrics import WordCounts, count_words
from speech_finetuning.scoring.normalization import (
    LANGUAGES_WITH_ELISION,
    NORM,
    NORM_MARKS,
    Normalizer,
    read_text,
    text_normalizers,
)


def normalizer_for_readers(
    text_language: str, tokenizer: transformers.WhisperTokenizer
) -> Normalizer:
    """What makes alike what a reader takes for the same words: capitals and punctuation are no
    difference. Whisper's own normaliser would drop the vowel signs of Hindi and Thai, and cut words
    in two there."""
    reading = NORM if text_language in LANGUAGES_WITH_ELISION else NORM_MARKS
    return text_normalizers(text_language, tokenizer)[reading]


def count_mistakes(
    said: str, heard: str, text_language: str, tokenizer: transformers.WhisperTokenizer
) -> WordCounts | None:
    """How what was heard differs from what was said, in words, or in characters where words are not
    separated; None if nothing was said."""
    normalize = normalizer_for_readers(text_language, tokenizer)
    unit = unit_of_language(text_language)
    reference = split_units(read_text(said, normalize), unit)
    prediction = split_units(read_text(heard, normalize), unit)
    return count_words(" ".join(reference), " ".join(prediction)) if reference else None


def split_for_marking(text: str, text_language: str) -> list[str]:
    """A text as written, in words, or in characters where words are not separated. A space stays
    behind the piece that it follows: "".join gives the words back."""
    unit = unit_of_language(text_language)
    pieces = []
    for word in text.split():
        pieces += [word] if unit == WORD else split_units(word, unit)
        pieces[-1] += " "
    return pieces


def mark_differences(
    pieces: list[str],
    other: list[str],
    text_language: str,
    tokenizer: transformers.WhisperTokenizer,
) -> list[bool]:
    """Of each piece, whether the other text has another one in its place, or none. What is only
    punctuation is no difference.

    pieces, other: as `split_for_marking` gives them.
    """
    normalize = normalizer_for_readers(text_language, tokenizer)
    names = ["".join(read_text(piece, normalize).split()) for piece in pieces]
    other_names = ["".join(read_text(piece, normalize).split()) for piece in other]
    marks = [bool(name) for name in names]
    reference = " ".join(name for name in other_names if name)
    prediction = " ".join(name for name in names if name)
    (operations,) = align([(reference, prediction)], WORD)
    if operations is None:  # the other text is empty
        return marks
    places = [place for place, name in enumerate(names) if name]
    done = 0
    for kind, length in operations:
        if kind == EQUAL:
            for place in places[done : done + length]:
                marks[place] = False
        done += 0 if kind == DELETE else length
    return marks
