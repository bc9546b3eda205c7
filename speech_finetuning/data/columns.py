"""Which columns of a data set hold the audio, its transcript and its place in a recording."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.guessing import Cells, guess_audio, guess_text, top_of

logger = logging.getLogger(__name__)

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
    "m4a",
    "webm",
    "mp4",
    "aac",
    "amr",
    "wma",
    "3gp",
    "filename",
    "wav_filename",  # DeepSpeech
    "audio_path",
    "audio_file",
    "file_path",
    "filepath",
    "file",
)
# What is as written (FLEURS, VoxPopuli) comes before its normalised kin.
TEXT_COLUMNS = (
    "raw_text",
    "text",
    "sentence",
    "raw_transcription",
    "transcription",
    "transcript",
    "normalized_text",
    "txt",
)
# "offset" and "duration" are NeMo's. Without a start, "duration" is that of the file.
START_COLUMNS = ("offset", "start", "begin", "start_time", "begin_time")
END_COLUMNS = ("end", "end_time")
DURATION_COLUMNS = ("duration",)
SPEAKER_COLUMNS = (
    "speaker",
    "speaker_id",
    "client_id",  # Common Voice
    "spk",
    "spk_id",
    "speakerid",
    "speaker_name",
)
# Of --prompt_column_name, in place of a column: what the segment before says, in one recording.
PREVIOUS_SEGMENT = "previous_segment"
SAMPLING_RATE_COLUMNS = ("sampling_rate", "sample_rate", "sr")


@dataclass(frozen=True, kw_only=True)
class WantedColumns:
    """The columns that the user named; None: the first usual name that is there."""

    audio: str | None = None
    text: str | None = None
    speaker: str | None = None
    text_required: bool = True  # False: rows may lack a text, to be transcribed only
    group: str | None = None  # None: none
    prompt: str | None = None  # None: none


@dataclass(frozen=True, kw_only=True)
class SegmentColumns:
    """The columns that say where in a recording an utterance lies, in seconds. None: not there."""

    start: str
    end: str | None
    duration: str | None

    def names(self) -> list[str]:
        return [name for name in (self.start, self.end, self.duration) if name is not None]


@dataclass(frozen=True, kw_only=True)
class SpeechColumns:
    """The columns that are read.

    text, speaker: None if there is none. sampling_rate: where the audio is a list of samples, else
    None. segments: where the audio of a row is a recording with several utterances, else None.
    group: what scores are told apart by, the speaker, say; else None. prompt: what the model reads
    before a clip; has_previous_prompts: it reads the text of the segment before instead.
    """

    audio: str
    text: str | None
    sampling_rate: str | None = None
    segments: SegmentColumns | None = None
    group: str | None = None
    speaker: str | None = None  # read for a hold-out only
    prompt: str | None = None
    has_previous_prompts: bool = False

    @property
    def has_prompts(self) -> bool:
        return self.prompt is not None or self.has_previous_prompts

    def names(self) -> list[str]:
        """Those of every row that is read."""
        names = [self.audio, self.text, self.sampling_rate, self.group, self.prompt]
        of_segments = [] if self.segments is None else self.segments.names()
        # A column may be read for two reasons.
        return list(dict.fromkeys([*filter(None, names), *of_segments]))

    def top_names(self, found: list[str], *, with_speaker: bool = False) -> list[str]:
        """The columns among those found that contain these."""
        names = self.names()
        if with_speaker and self.speaker is not None:
            names.append(self.speaker)
        return list(dict.fromkeys(top_of(name, found) for name in names))


@dataclass(frozen=True, kw_only=True)
class OpenedSplit:
    """One split, opened without reading its audio. num_rows: None if it is not known."""

    dataset: datasets.IterableDataset
    columns: SpeechColumns
    num_rows: int | None
    row_groups: tuple[tuple[int, ...], ...] | None = None  # rows of those of each parquet file
    largest_row_group_in_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class ColumnSample:
    """The cells of the first rows, read if names do not tell, and how audio is told among them:
    tests that are tried in turn until one finds a column."""

    cells: Callable[[], Cells]
    audio_tests: tuple[Callable[[Any], bool], ...]


def find_columns(
    found: list[str],
    wanted: WantedColumns,
    place: str,
    advice: str = "",
    sample: ColumnSample | None = None,
) -> SpeechColumns:
    """The audio column and the text column among those found in `place`: the ones that are named,
    else those of usual names, else by their contents.

    advice: ends the message about a column that is missing.
    Raises: UserError if there is none, or several would do.
    """
    problems = []
    audio = find_name(found, wanted.audio, AUDIO_COLUMNS)
    if audio is None and wanted.audio is None:
        audio = find_nested(found, AUDIO_COLUMNS)
    if audio is None and wanted.audio is None and sample is not None:
        audio = guess_audio(sample.cells(), sample.audio_tests, place, advice)
        if audio is not None:
            logger.info("%s: the column %s is the audio, by its cells.", place, audio)
    if audio is None:
        problems.append(missing_column("--audio_column_name", wanted.audio, found, place, advice))
    text = find_name(found, wanted.text, TEXT_COLUMNS)
    if text is None and wanted.text is None:
        text = find_nested(found, TEXT_COLUMNS)
    is_guessed = text is None and wanted.text is None and wanted.text_required
    if is_guessed and sample is not None and audio is not None:
        text = guess_text(sample.cells(), audio, place, advice)
        if text is not None:
            logger.info("%s: the column %s is the text, by its cells.", place, text)
    if text is None and (wanted.text is not None or wanted.text_required):
        problems.append(missing_column("--text_column_name", wanted.text, found, place, advice))
    if problems:
        raise UserError(*problems)
    assert audio is not None
    prompt = find_prompt(found, wanted.prompt, place)
    return SpeechColumns(
        audio=audio,
        text=text,
        group=find_group(found, wanted.group, place),
        speaker=find_speaker(found, wanted.speaker, place, advice),
        prompt=prompt,
        has_previous_prompts=prompt is None and wanted.prompt == PREVIOUS_SEGMENT,
    )


def find_group(found: list[str], wanted: str | None, place: str) -> str | None:
    """The column that scores are told apart by, if one is named. Raises: UserError if it is not
    there."""
    if wanted is None:
        return None
    group = find_name(found, wanted, ())
    if group is None:
        raise UserError(missing_column("--group_column_name", wanted, found, place, ""))
    return group


def find_prompt(found: list[str], wanted: str | None, place: str) -> str | None:
    """The column of prompts, if one is named and it is not the text of the segment before. Raises:
    UserError if it is not there."""
    if wanted is None:
        return None
    prompt = find_name(found, wanted, ())
    if prompt is None and wanted != PREVIOUS_SEGMENT:
        raise UserError(missing_column("--prompt_column_name", wanted, found, place, ""))
    return prompt


def find_speaker(found: list[str], wanted: str | None, place: str, advice: str) -> str | None:
    """Raises: UserError if the one that is wanted is not there."""
    speaker = find_name(found, wanted, SPEAKER_COLUMNS)
    if speaker is None and wanted is not None:
        raise UserError(missing_column("--speaker_column_name", wanted, found, place, advice))
    return speaker


def find_name(found: list[str], wanted: str | None, usual: tuple[str, ...]) -> str | None:
    """The wanted name, or the first usual one, as it is written in `found`: also in capitals."""
    if wanted in found:
        return wanted
    lower = {}
    for name in found:
        lower.setdefault(name.strip().lower(), name)
    if wanted is not None:
        return lower.get(wanted.strip().lower())
    for name in usual:
        if name in lower:
            return lower[name]
    return None


def find_nested(found: list[str], usual: tuple[str, ...]) -> str | None:
    """The only one of a usual name within other columns, as 'meta.text'."""
    for name in usual:
        nested = [full for full in found if full.lower().endswith(f".{name}") and "/" not in full]
        if len(nested) == 1:
            return nested[0]
    return None


def group_of(value: Any) -> str | None:
    """What a cell of the group column says, as text."""
    return None if value in (None, "") else str(value)


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
    if flag == "--text_column_name" and found == ["audio"] and not advice:
        advice += (
            " These are clips alone: list them beside the clips in metadata.csv, with the columns "
            "file_name and text."
        )
    return f"{flag} {name or 'is missing'}: no such column in {place}. Found: {there}.{advice}"
