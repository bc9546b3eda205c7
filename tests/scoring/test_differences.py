"""What a reader is told about two texts."""

import pytest
import transformers

from speech_finetuning.cli import demonstration
from speech_finetuning.scoring.differences import (
    count_mistakes,
    mark_differences,
    split_for_marking,
)


@pytest.fixture(scope="module")
def tokenizer() -> transformers.WhisperTokenizer:
    return demonstration.make_tokenizer(num_timestamps=1)


@pytest.mark.parametrize(
    ("language", "said", "heard", "num_errors", "num_units"),
    [
        ("es", "¿El gato, duerme?", "el gato come", 1, 3),
        ("en", "I won't go.", "i will not go", 0, 4),
        ("fr", "l'été est là", "L’été est la", 1, 4),
        ("hi", "हिन्दी में है।", "हिन्दी मे है", 1, 3),  # a nasal sign is a letter of the word
        ("ja", "猫が、寝る。", "猫が見る", 1, 4),
        ("th", "น้ำ มาก", "นำ มาก", 1, 5),  # the tone mark belongs to its letter
        ("gn", "ka'aguy", "ka’aguy", 0, 1),
    ],
)
def test_mistakes_are_those_of_the_language(
    language: str,
    said: str,
    heard: str,
    num_errors: int,
    num_units: int,
    tokenizer: transformers.WhisperTokenizer,
):
    counts = count_mistakes(said, heard, language, tokenizer)
    assert counts is not None
    assert (counts.num_errors, counts.num_reference_words) == (num_errors, num_units)


def test_without_a_text_nothing_is_counted(tokenizer: transformers.WhisperTokenizer):
    assert count_mistakes(" ... ", "hola", "es", tokenizer) is None


@pytest.mark.parametrize(
    ("language", "text", "other", "marked"),
    [
        ("es", "El gato, duerme - muy bien", "el gato come bien", ["duerme ", "muy "]),
        ("ja", "猫が、見る", "猫が寝る", ["見"]),
        ("hi", "हिन्दी मे है", "हिन्दी में है।", ["मे "]),
        ("es", "uno dos", "", ["uno ", "dos "]),
        ("es", "", "uno dos", []),
    ],
)
def test_what_differs_is_marked(
    language: str,
    text: str,
    other: str,
    marked: list[str],
    tokenizer: transformers.WhisperTokenizer,
):
    pieces = split_for_marking(text, language)
    assert "".join(pieces).strip() == text
    marks = mark_differences(pieces, split_for_marking(other, language), language, tokenizer)
    assert [piece for piece, mark in zip(pieces, marks, strict=True) if mark] == marked
