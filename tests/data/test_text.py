"""normalize_text, encode_text."""

import time
import unicodedata

import pytest

from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.text import encode_text, normalize_text, spelled_letters


def test_labels_have_the_prefix_once_and_fit_exactly(preprocessor):
    tokenizer = preprocessor.tokenizer
    text = "x" * (64 - 4)  # language, task, notimestamps and end beside it: exactly 64 labels
    ids = encode_text(text, tokenizer, 64)
    assert len(ids) == 65
    assert (
        tokenizer.decode(ids)
        == f"<|startoftranscript|><|es|><|transcribe|><|notimestamps|>{text}<|endoftext|>"
    )
    with pytest.raises(Rejection, match="label_too_long"):
        encode_text(text + "x", tokenizer, 64)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, world! (yes) [no] «sí» ¿qué?", "Hello world yes no sí qué"),
        ("don't stop", "don't stop"),
        ("'uno' dos' \u2018tres\u2019 los '90", "uno dos tres los 90"),
        ("ka'aguy, ka\u2019aguy; ka\u02bcaguy.", "ka'aguy ka\u2019aguy ka\u02bcaguy"),
        ("g\u0303ua'u \u2019", "g\u0303ua'u"),
        ("well-known fact — truly", "well known fact truly"),
        ("नमस्ते, दुनिया!", "नमस्ते दुनिया"),
        ("สวัสดี ครับ", "สวัสดี ครับ"),
        ("שָׁלוֹם, עוֹלָם.", "שָׁלוֹם עוֹלָם"),
        ("مرحبا، بالعالم؟", "مرحبا بالعالم"),
        ("你好，世界！", "你好世界"),
        ("3 + 4 = $7 100%", "3 + 4 = $7 100"),
    ],
)
def test_punctuation_and_nothing_else_is_removed(text: str, expected: str):
    assert normalize_text(text, do_lower_case=False, do_remove_punctuation=True) == expected
    assert normalize_text(text, False, False) == " ".join(text.split())
    assert normalize_text("ÀB, c", True, False) == "àb, c"


@pytest.mark.parametrize(
    "text",
    [
        "uno <|endoftext|> dos",
        "<|0.00|> uno dos<|1.20|>",
        "<|startoftranscript|><|en|><|transcribe|> uno",
        "<|nospeech|>",
        "uno <|notimestamps|> dos",
        "uno <|31.02|>",
    ],
)
def test_special_tokens_in_a_transcript_are_rejected(preprocessor, text: str):
    with pytest.raises(Rejection, match="text_has_special_tokens"):
        encode_text(text, preprocessor.tokenizer, 64)
    assert len(encode_text("uno < | dos |> <a|b>", preprocessor.tokenizer, 64)) > 5


def test_every_spelling_of_a_letter_is_trained_as_one():
    for text in ("añó tiếng Việt", "한국어", "क़लम", "שָׁלוֹם"):
        composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
        assert normalize_text(decomposed, False, False) == composed
        assert normalize_text(composed, False, False) == composed


@pytest.mark.parametrize("between", ["\u200b", "\u00ad", "\u200d", "."])
def test_a_letter_and_its_mark_join_over_what_is_removed(between: str):
    assert normalize_text(f"cafe{between}\u0301", False, True) == "café"
    assert normalize_text(f"CAFE{between}\u0301", True, True) == "café"


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("uno dos", []),
        ("año n\u0303", [("ñ", "ñ"), ("ñ", "n\u0303")]),
        ("Vie\u0323\u0302t Vi\u00ea\u0323t", [("ệ", "e\u0323\u0302"), ("ệ", "\u00ea\u0323")]),
        ("\ud55c", [("한", "한")]),
        ("\u1112\u1161\u11ab", [("한", "\u1112\u1161\u11ab")]),
        ("\u0301", [("\u0301", "\u0301")]),
    ],
)
def test_how_letters_beyond_ascii_are_spelled(text: str, spelled: list[tuple[str, str]]):
    assert list(spelled_letters(text)) == spelled


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufeffuno\u200b d\u00ados\u200e", "uno dos"),
        ("u\u200dno\u200c dos", "uno dos"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("क्\u200dष", "क्\u200dष"),
        ("അവന്\u200d dos", "അവന്\u200d dos"),
    ],
)
def test_invisible_characters_vanish_but_joiners_of_letters_stay(text: str, expected: str):
    assert normalize_text(text, False, False) == expected


def test_a_huge_transcript_costs_a_length_check(preprocessor):
    text = "uno dos " * 1_250_000
    preprocessor.prepare_text("uno")
    began = time.process_time()
    with pytest.raises(Rejection, match="label_too_long"):
        preprocessor.prepare_text(text)
    assert time.process_time() - began < 0.05


@pytest.mark.parametrize("text", ["se\ufffdal", "half \ud83d"])
def test_a_text_that_lost_characters_is_rejected(preprocessor, text: str):
    with pytest.raises(Rejection, match="row_unreadable"):
        preprocessor.prepare_text(text)
