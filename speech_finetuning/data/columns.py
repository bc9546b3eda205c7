"""Which columns of a data set hold the audio and its transcript."""

from dataclasses import dataclass

from speech_finetuning.base.errors import UserError

# Tried in this order when no column is named; the last ones are the file types in a webdataset.
AUDIO_COLUMNS = (
    "audio",
    "audio_filepath",
    "path",
    "file_name",
    "flac",
    "wav",
    "mp3",
    "ogg",
    "opus",
)
TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "normalized_text", "txt")


@dataclass(frozen=True, kw_only=True)
class WantedColumns:
    """The columns that the user named; None: the first usual name that is there."""

    audio: str | None = None
    text: str | None = None
    text_required: bool = True  # False: rows may lack a text, to be transcribed only


@dataclass(frozen=True, kw_only=True)
class SpeechColumns:
    """The columns that are read. text: None if there is none."""

    audio: str
    text: str | None


def find_columns(found: list[str], wanted: WantedColumns, place: str) -> SpeechColumns:
    """The audio column and the text column among those found in `place`. Raises: UserError."""
    audio = wanted.audio or first_of(AUDIO_COLUMNS, found)
    if audio not in found:
        raise missing_column("--audio_column_name", audio, found, place)
    text = wanted.text or first_of(TEXT_COLUMNS, found)
    if text is None and not wanted.text_required:
        return SpeechColumns(audio=audio, text=None)
    if text not in found:
        raise missing_column("--text_column_name", text, found, place)
    return SpeechColumns(audio=audio, text=text)


def first_of(names: tuple[str, ...], found: list[str]) -> str | None:
    return next((name for name in names if name in found), None)


def missing_column(flag: str, name: str | None, found: list[str], place: str) -> UserError:
    there = ", ".join(found) or "nothing: the split is empty"
    return UserError(f"{flag} {name or 'is missing'}: no such column in {place}. Found: {there}.")
