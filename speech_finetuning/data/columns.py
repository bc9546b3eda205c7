"""Which columns of a data set hold the audio, its transcript and its place in a recording."""

from dataclasses import dataclass

import datasets

from speech_finetuning.base.errors import UserError

# Tried in this order when no column is named; the file types are those of a webdataset.
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
    "filename",
    "wav_filename",  # DeepSpeech
    "audio_path",
    "audio_file",
    "file_path",
    "filepath",
    "file",
)
TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "normalized_text", "txt")
# "offset" and "duration" are NeMo's. Without a start, "duration" is that of the file.
START_COLUMNS = ("offset", "start", "begin", "start_time", "begin_time")
END_COLUMNS = ("end", "end_time")
DURATION_COLUMNS = ("duration",)
SAMPLING_RATE_COLUMNS = ("sampling_rate", "sample_rate", "sr")


@dataclass(frozen=True, kw_only=True)
class WantedColumns:
    """The columns that the user named; None: the first usual name that is there."""

    audio: str | None = None
    text: str | None = None
    text_required: bool = True  # False: rows may lack a text, to be transcribed only


@dataclass(frozen=True, kw_only=True)
class SpeechColumns:
    """The columns that are read.

    text: None if there is none. sampling_rate: where the audio is a list of samples, else None.
    """

    audio: str
    text: str | None
    sampling_rate: str | None = None

    def names(self) -> list[str]:
        names = [self.audio, self.text, self.sampling_rate]
        return [name for name in names if name is not None]


@dataclass(frozen=True, kw_only=True)
class OpenedSplit:
    """One split, opened without reading its audio. num_rows: None if it is not known."""

    dataset: datasets.IterableDataset
    columns: SpeechColumns
    num_rows: int | None


@dataclass(frozen=True, kw_only=True)
class SegmentColumns:
    """The columns that say where in a recording an utterance lies, in seconds. None: not there."""

    start: str
    end: str | None
    duration: str | None


def find_columns(
    found: list[str], wanted: WantedColumns, place: str, advice: str = ""
) -> SpeechColumns:
    """The audio column and the text column among those found in `place`.

    advice: ends the message about a column that is missing. Raises: UserError.
    """
    problems = []
    audio = find_name(found, wanted.audio, AUDIO_COLUMNS)
    if audio is None:
        problems.append(missing_column("--audio_column_name", wanted.audio, found, place, advice))
    text = find_name(found, wanted.text, TEXT_COLUMNS)
    if text is None and (wanted.text is not None or wanted.text_required):
        problems.append(missing_column("--text_column_name", wanted.text, found, place, advice))
    if problems:
        raise UserError(*problems)
    assert audio is not None
    return SpeechColumns(audio=audio, text=text)


def find_name(found: list[str], wanted: str | None, usual: tuple[str, ...]) -> str | None:
    """The wanted name, or the first usual one, as it is written in `found`: also in capitals."""
    if wanted in found:
        return wanted
    lower = {}
    for name in found:
        lower.setdefault(name.strip().lower(), name)
    if wanted is not None:
        return lower.get(wanted.strip().lower())
    return next((lower[name] for name in usual if name in lower), None)


def find_segment_columns(found: list[str]) -> SegmentColumns | None:
    """None if the rows of a list are whole files."""
    start = find_name(found, None, START_COLUMNS)
    if start is None:
        return None
    return SegmentColumns(
        start=start,
        end=find_name(found, None, END_COLUMNS),
        duration=find_name(found, None, DURATION_COLUMNS),
    )


def missing_column(flag: str, name: str | None, found: list[str], place: str, advice: str) -> str:
    """The problem of a column that is not there."""
    there = ", ".join(found) or "nothing: the split is empty"
    return f"{flag} {name or 'is missing'}: no such column in {place}. Found: {there}.{advice}"
