"""Folders of recordings with a transcript beside each: talk.mp3 and talk.srt."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import counted
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.columns import (
    PREVIOUS_SEGMENT,
    OpenedSplit,
    SpeechColumns,
    WantedColumns,
)
from speech_finetuning.data.encodings import (
    BYTES_OF_A_LOOK,
    encoding_of,
    encoding_without_mark,
)
from speech_finetuning.data.listed import ListedClip, WindowLimits, open_lists
from speech_finetuning.data.places import AUDIO_SUFFIXES
from speech_finetuning.data.reading import read_local_file
from speech_finetuning.data.segments import Segment
from speech_finetuning.data.subtitles import Cue, has_both_times, parse_transcript

logger = logging.getLogger(__name__)

KIND = "recordings"
# If there are several, the first of these that can be read; openai-whisper writes all of them at
# once. Others leave files of these names that are no transcripts: yt-dlp, JSON about the video.
TRANSCRIPT_SUFFIXES = (".json", ".vtt", ".srt", ".tsv", ".txt")
# What `datasets` takes for the name of a split (data_files.py, SPLIT_KEYWORDS).
SPLITS_OF_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
OTHER_KINDS = (".parquet", ".arrow", ".tar")  # folders with such files are read in another way
LANGUAGE = re.compile(r"\.[A-Za-z]{2,3}(-[A-Za-z0-9]+)*")
MAX_OVERLAP_IN_SECONDS = 0.5  # of cues, before it is said
MAX_NAMES = 3  # of files, in a message


def find_recordings(name: str, config_name: str | None) -> dict[str, list[str]]:
    """{split: [transcript]} of a folder with recordings and their transcripts, or {}.

    Subfolders that are named as splits (train, dev, ...) are splits; all else is `train`.
    Raises: UserError for a recording with transcripts in several languages.
    """
    folder = Path(name)
    if config_name and (folder / config_name).is_dir():
        folder /= config_name
    if not folder.is_dir():
        return {}
    found: dict[str, list[str]] = {}
    without_transcript = []
    passed_over: list[str] = []
    for place, folders, names in os.walk(folder):
        folders.sort()
        for file in names:
            if file.endswith(OTHER_KINDS) or file.startswith("metadata."):
                return {}
        parts = Path(place).relative_to(folder).parts
        split = SPLITS_OF_FOLDERS.get(parts[0].lower(), "train") if parts else "train"
        pairs = pair_up(place, names, passed_over)
        without_transcript += [file for file in names if is_audio_name(file) and file not in pairs]
        transcripts = dict.fromkeys(pairs[file] for file in sorted(pairs))
        if transcripts:
            paths = [os.path.join(place, transcript) for transcript in transcripts]
            found.setdefault(split, []).extend(paths)
    if found and without_transcript:
        logger.warning(
            "%s: without a transcript, and not read: %s (%s).",
            name,
            counted(len(without_transcript), "recording"),
            shortened(sorted(without_transcript)),
        )
    if found and passed_over:
        logger.warning(
            "%s: called as transcripts, but none: %s (%s). What lies beside them is read.",
            name,
            counted(len(passed_over), "file"),
            shortened(sorted(passed_over)),
        )
    return found


def is_audio_name(file: str) -> bool:
    return file.lower().endswith(AUDIO_SUFFIXES) and not file.startswith(".")


def pair_up(folder: str, names: list[str], passed_over: list[str] | None = None) -> dict[str, str]:
    """{recording: its transcript} of the names in a folder: talk.srt, talk.wav.srt (whisper.cpp),
    or talk.en.srt (yt-dlp). passed_over: is added what is called as a transcript and is none.
    Raises: UserError for several languages."""
    transcripts: dict[str, list[str]] = {}  # by what stands before their suffix
    languages: dict[str, dict[str, list[str]]] = {}  # by what stands before the language, too
    for name in names:
        base, suffix = os.path.splitext(name)
        if suffix.lower() not in TRANSCRIPT_SUFFIXES:
            continue
        transcripts.setdefault(base, []).append(name)
        stem, language = os.path.splitext(base)
        if LANGUAGE.fullmatch(language):
            languages.setdefault(stem, {}).setdefault(language[1:], []).append(name)
    pairs = {}
    for name in filter(is_audio_name, names):
        stem = os.path.splitext(name)[0]
        found = transcripts.get(stem, []) + transcripts.get(name, [])
        in_languages = languages.get(stem, {})
        if not found and len(in_languages) > 1:
            raise UserError(
                f"{name}: has transcripts in several languages, {', '.join(sorted(in_languages))}. "
                f"Leave one of them, or rename it to {stem}.srt, with its own suffix."
            )
        found = found or [file for files in in_languages.values() for file in files]
        if found:
            ranked = sorted(found, key=rank_of_transcript)
            pairs[name] = first_readable(folder, ranked)
            if passed_over is not None:
                passed_over += ranked[: ranked.index(pairs[name])]
    return pairs


def first_readable(folder: str, ranked: list[str]) -> str:
    """Of several files the first that says something; if none does, the first, whose row will say
    why. A single one is not opened."""
    if len(ranked) > 1:
        for name in ranked:
            cues = read_cues(os.path.join(folder, name))
            if any(cue.problem is None for cue in cues):
                return name
    return ranked[0]


def rank_of_transcript(name: str) -> tuple[int, str]:
    suffix = os.path.splitext(name)[1].lower()
    return TRANSCRIPT_SUFFIXES.index(suffix), name


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """A transcript, and the recording beside it. Pickles."""

    path: str
    recording: str

    def clips(self) -> Iterator[ListedClip]:
        for cue in read_cues(self.path):
            yield clip_of_cue(self.path, self.recording, cue)


def with_recordings(paths: list[str]) -> list[Transcript]:
    """Of two recordings with the same transcript the first, as talk.mp3 and talk.wav."""
    recordings: dict[str, dict[str, str]] = {}  # of each folder by transcript
    found = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in recordings:
            pairs = pair_up(folder, os.listdir(folder or os.curdir))
            recordings[folder] = {pairs[file]: file for file in sorted(pairs, reverse=True)}
        recording = os.path.join(folder, recordings[folder][name])
        found.append(Transcript(path=path, recording=recording))
    return found


def open_recordings(
    name: str, transcripts: list[str], wanted: WantedColumns, limits: WindowLimits | None = None
) -> OpenedSplit:
    """The utterances of one split, a shard for each transcript.

    name: of the split, in the log. limits: see `open_lists`.
    """
    suffixes = Counter(os.path.splitext(path)[1].lower() for path in transcripts)
    num_rows = 0
    overlapping = 0
    for transcript in transcripts:
        cues = read_cues(transcript)
        num_rows += len(cues)
        overlapping += count_overlaps(cues)
    if overlapping:
        logger.warning(
            "%s: utterances that overlap the one before by more than %g s: %d of %d. Each is "
            "trained with its own text only.",
            name,
            MAX_OVERLAP_IN_SECONDS,
            overlapping,
            num_rows,
        )
    columns = SpeechColumns(
        audio="recording",
        text=", ".join(sorted(suffixes)),
        has_previous_prompts=wanted.prompt == PREVIOUS_SEGMENT,
    )
    return open_lists(with_recordings(transcripts), columns, num_rows, limits)


def read_cues(transcript: str) -> list[Cue]:
    """Of one that cannot be read, a single cue that says why."""
    try:
        data = read_local_file(transcript)
        encoding = encoding_of(data)
        unmarked = encoding_without_mark(data[:BYTES_OF_A_LOOK]) if encoding == "utf-8" else None
        if unmarked is not None:
            raise ValueError(
                f"is {unmarked} without a byte order mark. Convert it with iconv -f {unmarked} -t UTF-8"
            )
        text = data.decode(encoding)
        return parse_transcript(text, os.path.splitext(transcript)[1].lower())
    except UnicodeDecodeError:
        problem = "is not UTF-8. Convert it with iconv -f CP1252 -t UTF-8, or from what it is"
    except Rejection as rejection:
        problem = rejection.detail
    except ValueError as error:
        problem = str(error)
    return [Cue(line=1, problem=problem)]


def clip_of_cue(transcript: str, recording: str, cue: Cue) -> ListedClip:
    place = f"{os.path.basename(transcript)}, line {cue.line}"
    if cue.problem is not None:
        return ListedClip(place=place, problem=f"{transcript}, line {cue.line}: {cue.problem}.")
    segment = None
    if cue.start_in_seconds is not None:
        duration = None
        if cue.end_in_seconds is not None:
            duration = cue.end_in_seconds - cue.start_in_seconds
        segment = Segment(start_in_seconds=cue.start_in_seconds, duration_in_seconds=duration)
    return ListedClip(place=place, audio=recording, text=cue.text, segment=segment)


def count_overlaps(cues: list[Cue]) -> int:
    """Cues that begin while an earlier one goes on."""
    timed = sorted(cue.span() for cue in cues if has_both_times(cue))
    count = 0
    latest = float("-inf")
    for start, end in timed:
        count += start < latest - MAX_OVERLAP_IN_SECONDS
        latest = max(latest, end)
    return count


def shortened(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
