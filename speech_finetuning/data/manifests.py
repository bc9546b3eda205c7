"""Lists of clips: what each row of a CSV, TSV or JSON-lines file says about audio and text."""

import base64
import contextlib
import functools
import itertools
import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.addresses import (
    LISTED_PROTOCOLS,
    check_address,
    folder_of,
    suffix_of_address,
)
from speech_finetuning.data.annotations import table_of_label_studio
from speech_finetuning.data.cells import AudioCell, is_missing, shown, undecoded_cell
from speech_finetuning.data.columns import (
    AUDIO_COLUMNS,
    PREVIOUS_SEGMENT,
    ColumnSample,
    OpenedSplit,
    SegmentColumns,
    SpeechColumns,
    WantedColumns,
    find_columns,
    find_name,
    find_segment_columns,
    group_of,
)
from speech_finetuning.data.guessing import cell_at, nested_names
from speech_finetuning.data.listed import ListedClip, WindowLimits, open_lists
from speech_finetuning.data.places import (
    AUDIO_SUFFIXES,
    AudioPlace,
    audio_tests,
    clip_exists,
    looks_like_audio,
    place_of_clips,
)
from speech_finetuning.data.segments import are_of_recordings, segment_of
from speech_finetuning.data.tables import (
    TABLE_SUFFIXES,
    TableFormat,
    TableRow,
    detect_format,
    is_json,
    read_table,
)

logger = logging.getLogger(__name__)

EXAMPLE_OF_JSON = """Write an object on each line: {"path": "clips/1.wav", "text": "..."}"""
NUM_ROWS_TO_INSPECT = 20  # of a list, to find its columns
REGIONS = re.compile(r"""\[\{['"](start|end)['"]: ?\d""")  # a list of them, in Python or JSON
PRODIGY = "_task_hash"  # of each of its rows, whose text is a file's name
DATA_ADDRESS = re.compile(r"data:[\w/.+-]+;base64,")  # RFC 2397, as Prodigy keeps audio
HEADER_ADVICE = " If the first line is not a header, write one: path,sentence."


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A list: how it is written, and where its columns and clips are. Pickles."""

    path: str
    form: TableFormat
    columns: SpeechColumns
    segments: SegmentColumns | None
    place: AudioPlace

    def num_rows(self) -> int:
        """Counted by reading the list, so that text which cannot be decoded is found at once."""
        return sum(1 for _ in read_table(self.path, self.form))

    def clips(self) -> Iterator[ListedClip]:
        for row in read_table(self.path, self.form):
            yield self.clip(row)

    def clip(self, row: TableRow) -> ListedClip:
        """What the row says. Anything unexpected becomes its `problem`, never a label."""
        problem = row.problem or refusal(row.cells)
        place = f"{'entry' if self.form.is_array else 'line'} {row.line}"
        text = self.columns.text
        group = self.columns.group
        prompt = self.columns.prompt
        try:
            if problem is None:
                clip = ListedClip(
                    place=place,
                    audio=audio_of(cell_at(row.cells, self.columns.audio), self.place),
                    text=text_of(None if text is None else cell_at(row.cells, text)),
                    segment=segment_of(row.cells, self.segments),
                    group=None if group is None else group_of(cell_at(row.cells, group)),
                    speaker=speaker_of(row.cells, self.columns),
                    prompt=text_of(None if prompt is None else cell_at(row.cells, prompt)),
                )
                if clip.audio is not None or clip.text is not None or text is None:
                    return clip
                problem = "neither audio nor text"  # as spreadsheets end in empty rows
        except Rejection as error:
            problem = error.detail
        except ValueError as error:
            problem = str(error)
        return ListedClip(place=place, problem=f"{self.path}, {place}: {problem}.")


def manifest_files(name: str, config_name: str | None) -> dict[str, list[str]]:
    """{split: [file]} of a CSV, TSV or JSON-lines file, or of a folder with such files.

    A Common Voice download as it unpacks is such a folder (its language folder, or config_name
    inside it). Empty if `datasets` has to look at the place.
    """
    if "://" in name:
        return lists_at_address(name)
    path = Path(name)
    if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
        return {"train": [str(path)]}
    if config_name and (path / config_name).is_dir():
        path /= config_name
    if not path.is_dir():
        return {}
    names = {file.name for file in path.iterdir() if not file.name.startswith(".")}
    if names & {"dataset_dict.json", "state.json"}:  # written by save_to_disk
        return {}
    files = [path / name for name in sorted(names - transcripts_among(names))]
    for file in files:
        if file.suffix in (".parquet", ".tar") or file.stem == "metadata":
            return {}
    lists = [file for file in files if file.suffix.lower() in TABLE_SUFFIXES and file.is_file()]
    return {file.stem: [str(file)] for file in lists}


def lists_at_address(address: str) -> dict[str, list[str]]:
    """Raises: UserError for an address that is no list, or cannot be read."""
    if suffix_of_address(address) not in TABLE_SUFFIXES:
        raise UserError(
            f"--dataset_name {address}: of an address ({LISTED_PROTOCOLS}) only a list of clips is "
            f"read, a file {', '.join(TABLE_SUFFIXES)}. Download anything else, and pass its folder."
        )
    check_address(address)
    return {"train": [address]}


def open_manifests(
    files: list[str], wanted: WantedColumns, limits: WindowLimits | None = None
) -> OpenedSplit:
    """The rows of one split, a shard for each file. limits: see `open_lists`.

    Raises: UserError for a wrong column, and for a file whose text cannot be read.
    """
    manifests = [inspect_manifest(path, wanted) for path in files]
    num_rows = sum(manifest.num_rows() for manifest in manifests)
    return open_lists(manifests, manifests[0].columns, num_rows, limits)


def open_metadata(
    files: list[str], wanted: WantedColumns, limits: WindowLimits | None = None
) -> OpenedSplit:
    """As `open_manifests`, of an audio folder, whose file_name `datasets` calls audio."""
    if wanted.audio == "audio":
        wanted = replace(wanted, audio="file_name")
    opened = open_manifests(files, wanted, limits)
    if opened.columns.audio != "file_name":
        return opened
    return replace(opened, columns=replace(opened.columns, audio="audio"))


def inspect_manifest(path: str, wanted: WantedColumns) -> Manifest:
    """Judges the list by its first rows. Raises: UserError."""
    folder = folder_of(path)
    form = detect_format(
        path,
        is_header=functools.partial(names_speech, wanted=wanted),
        names_without_header=functools.partial(names_of_cells, folder=folder, wanted=wanted),
    )
    rows = list(itertools.islice(read_table(path, form), NUM_ROWS_TO_INSPECT))
    names = list(form.names) or names_of_json(rows)
    if not names and rows:
        raise UserError(f"{path}, line {rows[0].line}: {rows[0].problem}. {EXAMPLE_OF_JSON}")
    check_is_no_export(path, names, rows)
    if PRODIGY in names and wanted.text is None:
        wanted = replace(wanted, text=find_name(names, "transcript", ()))
    names = choose_existing_audio(path, names, rows, wanted)
    columns = find_columns(
        names,
        wanted,
        path,
        "" if is_json(path) else HEADER_ADVICE,
        ColumnSample(
            cells=functools.partial(cells_by_column, names, rows),
            audio_tests=audio_tests(folder),
        ),
    )
    check_named_once(path, names, columns)
    place = place_of_clips(folder, [cell_at(row.cells, columns.audio) for row in rows])
    if place.has_folders:
        logger.info("%s: its clips lie in folders below it, and are found by their names.", path)
    segments = segment_columns(path, names, rows, columns, place)
    if columns.has_previous_prompts and segments is None:
        raise UserError(
            f"--prompt_column_name {PREVIOUS_SEGMENT}: the rows of {path} are whole files. It takes "
            "a list with the times of segments (docs/data.md), or the name of a column."
        )
    return Manifest(path=path, form=form, columns=columns, segments=segments, place=place)


def check_is_no_export(path: str, names: list[str], rows: list[TableRow]) -> None:
    """Raises: UserError for Label Studio's full JSON, whose texts lie in lists of results, and for
    other exports of regions of recordings, in which nothing says whose times are a text's."""
    if {"annotator", "lead_time"} <= set(names):
        cells = [cell for row in rows for cell in row.cells.values()]
        if any(REGIONS.match(str(cell)) for cell in cells):
            raise UserError(
                f"{path}: regions of recordings, of Label Studio. Export them as JSON, the first kind "
                "that it offers, and pass that: the answer is a command that makes a table of it."
            )
    if not {"annotations", "data"} <= set(names):
        return
    data = [name.removeprefix("data.") for name in names if name.startswith("data.")]
    audio = next(iter(data), "audio")
    raise UserError(
        f"{path}: the full JSON of Label Studio, which is not read. Make a table of it: "
        f"{table_of_label_studio(path, audio)}"
    )


def check_named_once(path: str, names: list[str], columns: SpeechColumns) -> None:
    """Raises: UserError if a column that is read stands in the header twice."""
    twice = [name for name in columns.names() if names.count(name) > 1]
    if twice:
        raise UserError(
            f"{path}: the header names {', '.join(twice)} more than once. Rename the column that is "
            "not to be read."
        )


def segment_columns(
    path: str,
    names: list[str],
    rows: list[TableRow],
    columns: SpeechColumns,
    place: AudioPlace,
) -> SegmentColumns | None:
    """None if the rows are whole files: without times, or with those that clips were cut out at."""
    found = find_segment_columns(names)
    if found is None:
        return None
    clips = []
    for row in rows:
        with contextlib.suppress(ValueError, Rejection):  # said of the row when it is read
            audio = audio_of(cell_at(row.cells, columns.audio), place)
            clips.append((audio, segment_of(row.cells, found)))
    if are_of_recordings(clips) is False:
        logger.info(
            "%s: each row is a whole file, as long as its times are apart: they are not read.", path
        )
        return None
    logger.info("%s: each row is a segment, from its column %s.", path, found.start)
    return found


def transcripts_among(names: set[str]) -> set[str]:
    """Those that are no tables but belong to a recording beside them: Whisper's output for it, also
    in a language (talk.json, talk.wav.tsv, talk.en.json: `recordings`), and what yt-dlp knows of it
    (talk.info.json)."""
    recordings = {name for name in names if name.lower().endswith(AUDIO_SUFFIXES)}
    stems = {os.path.splitext(name)[0] for name in recordings}
    return {
        name
        for name in names
        if name.lower().endswith((".json", ".tsv")) and not stems.isdisjoint(beginnings(name))
    }


def beginnings(name: str) -> list[str]:
    """a and a.b of a.b.c."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


# ---- columns ----
def names_of_json(rows: list[TableRow]) -> list[str]:
    """Of the objects, and of objects within them."""
    names = dict.fromkeys(name for row in rows for name in row.cells)
    nested = dict.fromkeys(name for row in rows for name in nested_names(row.cells))
    return [*names, *nested]


def cells_by_column(names: list[str], rows: list[TableRow]) -> dict[str, list[Any]]:
    return {name: [cell_at(row.cells, name) for row in rows] for name in names}


def names_speech(names: list[str], wanted: WantedColumns) -> bool:
    """Whether these are a header's names: the columns to read are among them."""
    audio = find_name(names, wanted.audio, AUDIO_COLUMNS)
    return audio is not None and (len(names) > 1 or not wanted.text_required)


def names_of_cells(cells: list[str], folder: str, wanted: WantedColumns) -> tuple[str, ...]:
    """Names for the cells of a first row without a header above it: audio and text; if it is not
    clear which is which, column1 and so on; empty if none is audio."""
    is_audio = [looks_like_audio(cell, folder) for cell in cells]
    numbered = tuple(f"column{number}" for number in range(1, len(cells) + 1))
    named = {wanted.audio, wanted.text} - {None}
    if named:
        return numbered if any(is_audio) and named <= set(numbered) else ()
    if is_audio == [True, False]:
        return ("audio", "text")
    if is_audio == [False, True]:
        return ("text", "audio")
    if is_audio == [True, False, False] and place_of_clips(folder, [cells[0]]).suffix:
        return ("audio", "text", "normalized_text")  # LJSpeech
    return numbered if any(is_audio) and len(cells) > 2 else ()


def choose_existing_audio(
    path: str, names: list[str], rows: list[TableRow], wanted: WantedColumns
) -> list[str]:
    """The names without usual audio columns before the first whose files exist."""
    lower = {name.strip().lower(): name for name in reversed(names)}
    candidates = [lower[name] for name in AUDIO_COLUMNS if name in lower]
    if wanted.audio is not None or len(candidates) < 2:
        return names
    if "://" in path:
        rows = rows[:1]  # each look is a request
    folder = folder_of(path)
    for candidate in candidates:
        if any(clip_exists(folder, row.cells.get(candidate)) for row in rows):
            stale = candidates[: candidates.index(candidate)]
            if stale:
                logger.warning(
                    "%s: audio is read from the column %s; no file that %s names exists.",
                    path,
                    candidate,
                    " or ".join(stale),
                )
            return [name for name in names if name not in stale]
    return names


# ---- cells ----
def refusal(cells: dict[str, Any]) -> str | None:
    """What an annotator has answered to a row of Prodigy, unless it is to be used."""
    answer = cells.get("answer") if PRODIGY in cells else None
    return f"was answered with {answer} in Prodigy" if answer in ("reject", "ignore") else None


def text_of(value: Any) -> str | None:
    """Raises: ValueError for what is no text; a number stands for itself."""
    if is_missing(value):
        return None
    is_number = isinstance(value, int | float) and math.isfinite(value)
    if isinstance(value, bool) or not (isinstance(value, str) or is_number):
        raise ValueError(f"expected a text, found {shown(value)}")
    text = str(value)
    if "\N{REPLACEMENT CHARACTER}" in text:
        raise ValueError(
            "the text contains U+FFFD, which stands for characters that a conversion has lost"
        )
    return text


def speaker_of(cells: dict[str, Any], columns: SpeechColumns) -> str | None:
    value = None if columns.speaker is None else cell_at(cells, columns.speaker)
    return None if is_missing(value) else str(value)


def audio_of(value: Any, place: AudioPlace) -> AudioCell:
    """An absolute path or an address; of samples their file. Raises: ValueError, Rejection."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):  # as `datasets` writes audio to JSON
        if value.get("array") is not None:
            return undecoded_cell(value)
        if is_missing(value.get("path")) or not is_missing(value.get("bytes")):
            raise ValueError(f"expected the path of an audio file, found {shown(value)}")
        value = value["path"]
    if is_missing(value):
        return None
    if not isinstance(value, str):
        raise ValueError(f"expected the path of an audio file, found {shown(value)}")
    if DATA_ADDRESS.match(value) is not None:
        data = base64.b64decode(value.partition(",")[2])  # binascii.Error is a ValueError
        return {"bytes": data, "path": None}
    return place.path_of(value.strip())
