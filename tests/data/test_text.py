"""normalize_text, encode_text."""

import pytest

from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.text import encode_text, normalize_text


def test_labels_have_the_prefix_once_and_fit_exactly(preparer):
    tokenizer = preparer.tokenizer
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
        ("don't stop", "dont stop"),
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
