"""What people write for a language, misspellings, and neighbours of languages without a token."""

import pytest
import transformers
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from speech_finetuning.base.errors import UserError
from speech_finetuning.model.languages import (
    check_is_language,
    check_language,
    find_code,
    neighbours,
)

CODES = [code for code in LANGUAGES if code != "yue"]  # as before large-v3


@pytest.mark.parametrize(
    ("written", "code"),
    [
        *(("es", "es"), ("ES", "es"), ("Spanish", "es"), ("spa", "es"), ("es-MX", "es")),
        *(("es_419", "es"), ("<|es|>", "es"), ("castilian", "es"), ("pt-BR", "pt"), ("iw", "he")),
        *(("deu", "de"), ("ger", "de"), ("cmn", "zh"), ("zh-TW", "zh"), ("Mandarin", "zh")),
        *(("nb", "no"), ("nno", "nn"), ("fil", "tl"), ("Tagalog", "tl"), ("jv", "jw")),
        *(("Farsi", "fa"), ("sr-Latn", "sr"), ("Flemish", "nl"), ("Burmese", "my")),
    ],
)
def test_a_language_is_understood_however_it_is_written(written: str, code: str):
    assert find_code(written, CODES) == code


@pytest.mark.parametrize(
    ("written", "meant"), [("Spansh", "Spanish (es)"), ("protuguese", "Portuguese (pt)")]
)
def test_a_misspelt_language_is_corrected(written: str, meant: str):
    with pytest.raises(UserError) as error:
        find_code(written, CODES)
    assert str(error.value) == f"--language {written}: no such language. Did you mean {meant}?"


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        ("yucatec", "Is it Dutch (nl) or Czech (cs)?"),
        ("xx", "Write its English name or its code, such as Spanish or es."),
    ],
)
def test_what_is_far_from_all_languages_gets_one_line_too(written: str, advice: str):
    with pytest.raises(UserError) as error:
        find_code(written, CODES)
    assert str(error.value).startswith(f"--language {written}: no such language. {advice}")
    assert len(str(error.value)) < 150 and "\n" not in str(error.value)


def test_what_is_no_language_is_known_without_a_model():
    for language in ("es", "Spanish", "<|es|>", "pt_BR", "qu", "castilian"):
        check_is_language(language)
    with pytest.raises(UserError, match="Did you mean Spanish"):
        check_is_language("Spansh")


def test_a_language_without_a_token_gets_neighbours_with_reasons():
    with pytest.raises(UserError) as error:
        find_code("Guarani", CODES)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("--language Guarani: the model has no token for Guarani (gn).")
    assert lines[1] == "  --language es: Spanish (es), which its readers usually read too"
    assert 3 <= len(lines) <= 4


@pytest.mark.parametrize(
    ("tag", "first", "reason"),
    [
        ("qu", "es", "which its readers usually read too"),
        ("gsw", "de", "which its readers usually read too"),
        ("yue", "zh", "which its readers usually read too"),
        ("fy", "nl", "which its readers usually read too"),
        ("ce", "ru", "the same script, in the same country"),
        ("scn", "it", "the same script, in the same country"),
    ],
)
def test_neighbours_are_read_by_the_same_people_or_live_nearby(tag: str, first: str, reason: str):
    assert neighbours(tag, CODES)[0] == (first, reason)


def test_an_english_model_accepts_english_only():
    config = transformers.GenerationConfig()
    config.is_multilingual = False
    assert check_language(None, config, "m") is None
    assert check_language("English", config, "m") is None
    with pytest.raises(UserError, match="knows English only"):
        check_language("es", config, "m")
