"""Foreign text in files and on the terminal."""

import json
from pathlib import Path

import pytest

from speech_finetuning.base.files import counted, json_line, printable, replace_text, write_text

HOSTILE = "uno\x1b]0;title\x07 \x08dos\n\x9b31m\u202etres\u2028\ud800"


def test_control_characters_are_shown_not_obeyed():
    assert printable(HOSTILE) == (r"uno\x1b]0;title\x07 \x08dos\n\x9b31m\u202etres\u2028\ud800")


@pytest.mark.parametrize(
    "text", ["", "Año über नमस्ते 你好 l'été", "می\u200cخواهم", "a\u00a0b", "😀"]
)
def test_text_of_every_alphabet_stays(text: str):
    assert printable(text) == text


def test_one_of_something_is_not_called_as_several():
    assert [counted(number, "row") for number in (0, 1, 2_000)] == ["0 rows", "1 row", "2,000 rows"]
    assert [counted(number, "process", "processes") for number in (1, 2)] == [
        "1 process",
        "2 processes",
    ]


def test_a_json_line_is_one_line_without_control_characters_and_reads_back():
    line = json_line({"text": HOSTILE, "name": "Año नमस्ते"})
    assert json.loads(line) == {"text": HOSTILE, "name": "Año नमस्ते"}
    assert line.splitlines() == [line.removesuffix("\n")]
    assert "\x1b" not in line and "\x9b" not in line and "\u202e" not in line
    assert "Año नमस्ते" in line


def test_a_text_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "folder" / "log.jsonl"
    write_text(path, "old")

    def torn(self: Path, text: str, **settings: str) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", torn)
        write_text(path, "new")  # a warning
        with pytest.raises(OSError):
            replace_text(path, "new")
    assert path.read_text() == "old" and [file.name for file in path.parent.iterdir()] == [
        path.name
    ]
    write_text(path, "\ud800 appended", mode="a")
    assert path.read_text() == "old\\ud800 appended"
