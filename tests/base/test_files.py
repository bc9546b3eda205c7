"""Foreign text in files and on the terminal."""

import json

import pytest

from speech_finetuning.base.files import json_line, printable

HOSTILE = "uno\x1b]0;title\x07 \x08dos\n\x9b31m\u202etres\u2028\ud800"


def test_control_characters_are_shown_not_obeyed():
    assert printable(HOSTILE) == (r"uno\x1b]0;title\x07 \x08dos\n\x9b31m\u202etres\u2028\ud800")


@pytest.mark.parametrize(
    "text", ["", "Año über नमस्ते 你好 l'été", "می\u200cخواهم", "a\u00a0b", "😀"]
)
def test_text_of_every_alphabet_stays(text: str):
    assert printable(text) == text


def test_a_json_line_is_one_line_without_control_characters_and_reads_back():
    line = json_line({"text": HOSTILE, "name": "Año नमस्ते"})
    assert json.loads(line) == {"text": HOSTILE, "name": "Año नमस्ते"}
    assert line.splitlines() == [line.removesuffix("\n")]
    assert "\x1b" not in line and "\x9b" not in line and "\u202e" not in line
    assert "Año नमस्ते" in line
