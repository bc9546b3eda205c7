"""Readings of a text: what counts as the same word, and which reading leads."""

import logging
import unicodedata

import datasets
import pytest
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

from speech_finetuning.data.text import has_inner_apostrophe
from speech_finetuning.scoring.normalization import (
    MAX_NORMALIZED_AT_ONCE,
    NORM,
    NORM_MARKS,
    ORTHO,
    READINGS,
    ScoringTarget,
    leading_reading,
    read_text,
    split_long_text,
    text_normalizers,
)
from speech_finetuning.scoring.scorecard import Scorecard

SPANISH = ScoringTarget(language="es", leads_normalized=True)
APOSTROPHES = ["'", "\u2019", "\u02bc", "\u2018", "\u02bb", "\ua78c", "\uff07", "`", "\u00b4"]


@pytest.fixture
def read(tokenizer):
    """read(text, reading, language) of this checkpoint's tokenizer."""

    def read_with(text: str, reading: str, language: str = "es") -> str:
        return read_text(text, text_normalizers(language, tokenizer)[reading])

    return read_with


@pytest.mark.parametrize("apostrophe", APOSTROPHES, ids=unicodedata.name)
@pytest.mark.parametrize("word", ["ka'aguy", "ng'ombe", "g\u0303ua'u", "mba\u02bce'ỹ"])
def test_an_apostrophe_inside_a_word_is_a_letter_however_it_is_typed(read, apostrophe, word):
    typed = word.replace("'", apostrophe)
    assert len(read(typed, NORM_MARKS).split()) == 1
    assert read(typed, NORM_MARKS) == read(word, NORM_MARKS)
    assert has_inner_apostrophe(typed)


@pytest.mark.parametrize(
    "text",
    ["'uno' dos", "\u2018uno\u2019 dos", "los '90", "uno' 'dos", "5'10", "uno ' dos", "'", "uno'"],
)
def test_quotation_marks_and_other_apostrophes_are_no_letters(read, text: str):
    assert not has_inner_apostrophe(text)
    assert "'" not in read(text, NORM_MARKS)


def test_whispers_own_reading_stays_as_published(read):
    texts = ["ka'aguy", "Ña \u2018uno\u2019 (dos) l\u2019été", "नमस्ते, दुनिया!", "mba\u02bce [x]"]
    for text in texts:
        assert read(text, NORM) == " ".join(BasicTextNormalizer()(text).split())
    assert read("ka'aguy", NORM) == "ka aguy"


def test_marks_stay_beside_apostrophes(read):
    expected = unicodedata.normalize("NFC", "mbo'ehára g̃uahẽ")
    assert read("Mbo'ehára, g̃uahẽ!", NORM_MARKS) == expected


@pytest.mark.parametrize(
    ("language", "leading"),
    [
        ("es", NORM_MARKS),  # stands for a language that Whisper does not know, such as Guarani
        ("sw", NORM_MARKS),
        ("uk", NORM_MARKS),
        ("en", NORM),
        ("fr", NORM),
        ("it", NORM),
        ("ca", NORM),
        (None, NORM),  # a checkpoint that knows English only
    ],
)
def test_the_reading_that_leads_by_language(language: str | None, leading: str):
    target = ScoringTarget(language=language, leads_normalized=True)
    assert leading_reading(target, ["ka'aguy porã", "che ro'y", "ahy'o"]) == leading
    assert leading_reading(target, ["uno", "dos"]) == NORM


def test_translations_are_english_texts():
    target = ScoringTarget(language="es", leads_normalized=True, is_translated=True)
    assert target.text_language == "en"
    assert leading_reading(target, ["I don't know"]) == NORM


def test_text_as_written_leads_when_it_is_asked_for():
    target = ScoringTarget(language="es", leads_normalized=False)
    assert leading_reading(target, ["ka'aguy"]) == ORTHO


def test_a_foreign_name_does_not_cost_the_comparison_with_published_scores():
    plain = ["uno dos tres"] * 199
    assert leading_reading(SPANISH, [*plain, "Bernardo O'Higgins"]) == NORM
    assert leading_reading(SPANISH, [*plain, "ka'aguy", "ro'y", "ahy'o"]) == NORM_MARKS
    assert leading_reading(SPANISH, []) == NORM


def test_the_log_says_once_that_apostrophes_count(tokenizer, caplog: pytest.LogCaptureFixture):
    card = Scorecard(tokenizer=tokenizer, targets={"": SPANISH})
    columns = {"index": [0, 1], "id": ["a", "b"], "set": ["", ""], "duration": [1.0, 1.0]}
    rows = datasets.Dataset.from_dict(columns | {"text": ["ka'aguy porã", "uno"]})
    with caplog.at_level(logging.INFO):
        card.set_references(rows)
        card.set_references(rows)
    (message,) = caplog.messages
    assert message.startswith("1 of 2 references with apostrophes inside words: wer and cer count")


@pytest.mark.parametrize("reading", [ORTHO, NORM, NORM_MARKS])
def test_two_spellings_of_the_same_letters_are_equal(read, reading: str):
    text = "tiếng Việt, cafe\u0301 ñandú 한국어"
    composed = unicodedata.normalize("NFC", text)
    decomposed = unicodedata.normalize("NFD", text)
    assert composed != decomposed
    assert read(composed, reading) == read(decomposed, reading)


@pytest.mark.parametrize("reading", [ORTHO, NORM, NORM_MARKS])
@pytest.mark.parametrize("invisible", ["\u00ad", "\u200b", "\u2060", "\ufeff", "\u200e", "\u202b"])
def test_what_nobody_can_hear_is_no_error(read, reading: str, invisible: str):
    assert read(f"{invisible}uno do{invisible}s{invisible}", reading) == "uno dos"


@pytest.mark.parametrize("reading", [ORTHO, NORM_MARKS])
def test_joiners_that_persian_spells_with_stay(read, reading: str):
    assert read("می\u200cخواهم", reading, "fa") == "می\u200cخواهم"


HOSTILE = {
    "apostrophes": "a'" * 5_000,
    "brackets": "[" * 5_000,
    "parentheses": "(a" * 5_000,
    "digits": "0" * 5_000,  # of one number: the English normaliser by itself raises
    "numbers": "one " * 5_000,
    "one word": "\u4e00" * 5_000,
    "sentences": "Uno. " * 5_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_long_text_is_normalised_in_parts(read, text: str):
    """By itself Whisper's normaliser takes a minute for 100,000 brackets."""
    parts = split_long_text(text)
    assert "".join(parts) == text
    assert max(map(len, parts)) <= MAX_NORMALIZED_AT_ONCE
    assert len(parts) <= 2 + 2 * len(text) / MAX_NORMALIZED_AT_ONCE
    for language in ("es", "en"):
        for reading in READINGS:
            assert len(read(text, reading, language)) <= 2 * len(text)


@pytest.mark.parametrize("text", ["", " ", "\u200b", "a"])
@pytest.mark.parametrize("reading", [ORTHO, NORM, NORM_MARKS])
def test_next_to_nothing_is_read(read, reading: str, text: str):
    assert read(text, reading) == text.strip("\u200b ")


def test_a_long_text_is_read_as_its_sentences_are(read):
    sentences = [f"Uno (dos), l'{number} tres [x]" for number in range(400)]
    whole = read(". ".join(sentences), NORM)
    assert whole == " ".join(read(sentence, NORM) for sentence in sentences)
    words = " ".join(f"palabra{number}" for number in range(900))  # no sentence ends
    assert read(words, NORM) == words
    assert read("\u4e00" * 5_000, NORM) == "\u4e00" * 5_000  # nor a word
