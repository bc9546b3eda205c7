"""Which column holds what, by its cells, where the names of columns do not tell."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from speech_finetuning.base.errors import UserError

# A column is audio if more of its cells are than this; files may be missing.
MIN_SHARE = 0.5
MIN_ROWS_TO_COMPARE = 3  # before a column that repeats itself is no transcript
WORDS_OF_A_SENTENCE = 3.0  # on average; names, places and labels have fewer
# Thai to Chinese, written without spaces: some two characters a word.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
NO_TEXT = re.compile(r"\S*[\d/\\]\S*|\S+@\S+|[\d\W]*")  # ids, paths, numbers, dates

Cells = Mapping[str, Sequence[Any]]  # of each column those of the first rows


def guess_audio(
    cells: Cells, audio_tests: Sequence[Callable[[Any], bool]], place: str, advice: str
) -> str | None:
    """The one column whose cells are audio. Raises: UserError if there are several."""
    for is_audio in audio_tests:
        found = [name for name, values in cells.items() if share(values, is_audio) > MIN_SHARE]
        if found:
            return only_one(found, "--audio_column_name", "hold audio", place, advice)
    return None


def guess_text(cells: Cells, audio: str | None, place: str, advice: str) -> str | None:
    """The one column that can be a transcript, or among several the one of sentences.

    audio: the column that it is not. Raises: UserError if there are several.
    """
    possible = [name for name, values in cells.items() if name != audio and may_be_text(values)]
    if len(possible) > 1:
        sentences = [name for name in possible if words_a_cell(cells[name]) >= WORDS_OF_A_SENTENCE]
        possible = sentences or possible
    return only_one(possible, "--text_column_name", "read as text", place, advice)


def only_one(found: list[str], flag: str, what: str, place: str, advice: str) -> str | None:
    if len(found) > 1:
        raise UserError(
            f"{place}: the columns {', '.join(found)} {what}. Name the one to read, for example: "
            f"{flag} {found[0]}.{advice}"
        )
    return found[0] if found else None


def share(values: Sequence[Any], test: Callable[[Any], bool]) -> float:
    """Of the cells that are not empty."""
    filled = [value for value in values if value not in (None, "")]
    return sum(map(test, filled)) / len(filled) if filled else 0.0


def may_be_text(values: Sequence[Any]) -> bool:
    """Whether most cells have words, and not always the same ones."""
    if share(values, has_words) <= MIN_SHARE:
        return False
    filled = [value for value in values if value not in (None, "")]
    return len(filled) < MIN_ROWS_TO_COMPARE or len(set(map(str, filled))) > len(filled) / 2


def has_words(value: Any) -> bool:
    if not isinstance(value, str) or NO_TEXT.fullmatch(value.strip()):
        return False
    return any(character.isalpha() for character in value)


def words_a_cell(values: Sequence[Any]) -> float:
    counts = [
        len(value.split()) + len(UNSPACED.findall(value)) / 2
        for value in values
        if isinstance(value, str) and value
    ]
    return sum(counts) / len(counts) if counts else 0.0


# ---- columns within columns --------------------------------------------------------------------
def nested_names(cells: Mapping[str, Any], prefix: str = "") -> list[str]:
    """'audio.path' and so on, of objects within a row's cells."""
    names = []
    for name, value in cells.items():
        if isinstance(value, Mapping):
            names += [f"{prefix}{name}.{inner}" for inner in value]
            names += nested_names(value, f"{prefix}{name}.")
    return list(dict.fromkeys(names))


def cell_at(cells: Mapping[str, Any], name: str) -> Any:
    """The cell of a column; of 'audio.path' what is called path within the cell of audio."""
    if name in cells or "." not in name:
        return cells.get(name)
    outer, _, inner = name.partition(".")
    value = cells.get(outer)
    return cell_at(value, inner) if isinstance(value, Mapping) else None


def top_of(name: str, found: Sequence[str]) -> str:
    """The column that 'audio.path' lies in, if it is not one itself."""
    return name if name in found else name.partition(".")[0]
