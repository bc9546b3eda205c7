"""Folders of recordings with a transcript beside each: talk.mp3 and talk.srt."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.columns import OpenedSplit, SpeechColumns
from speech_finetuning.data.listed import ListedClip, WindowLimits, open_lists
from speech_finetuning.data.manifests import AUDIO_SUFFIXES
from speech_finetuning.data.reading import read_local_file
from speech_finetuning.data.segments import Segment
from speech_finetuning.data.subtitles import Cue, has_both_times, parse_transcript
from speech_finetuning.data.tables import encoding_of

logger = logging.getLogger(__name__)

KIND = "recordings"
# If there are several, the first that has times; openai-whisper writes all of them at once.
TRANSCRIPT_SUFFIXES = (".json", ".vtt", ".srt", ".tsv", ".txt")
# What `datasets` takes for the name of a split (data_files.py, SPLIT_KEYWORDS).
SPLITS_OF_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
OTHER_KINDS = (".parquet", ".arrow", ".tar")  # folders with such files are read in another way
MAX_OVERLAP_IN_SECONDS = 0.5  # of cues, before it is said
MAX_NAMES = 3  # of files, in a message


def find_recordings(name: str, config_name: str | None) -> dict[str, list[str]]:
    """{split: [transcript]} of a folder with recordings and their transcripts, or {}.

    Subfolders that are named as splits (train, dev, ...) are splits; all else is `train`.
    """
    folder = Path(name)
    if config_name and (folder / config_name).is_dir():
        folder /= config_name
    if not folder.is_dir():
        return {}
    found: dict[str, list[str]] = {}
    without_transcript = []
    for place, folders, names in os.walk(folder):
        folders.sort()
        for file in names:
            if file.endswith(OTHER_KINDS) or file.startswith("metadata."):
                return {}
        parts = Path(place).relative_to(folder).parts
        split = SPLITS_OF_FOLDERS.get(parts[0].lower(), "train") if parts else "train"
        there = set(names)
        for file in sorted(names):
            if not is_audio_name(file):
                continue
            transcript = transcript_beside(there, file)
            if transcript is not None:
                found.setdefault(split, []).append(os.path.join(place, transcript))
            else:
                without_transcript.append(file)
    if found and without_transcript:
        logger.warning(
            "%s: %d recordings have no transcript beside them and are not read: %s.",
            name,
            len(without_transcript),
            shortened(without_transcript),
        )
    return found


def is_audio_name(file: str) -> bool:
    return file.lower().endswith(AUDIO_SUFFIXES) and not file.startswith(".")


def transcript_beside(there: set[str], recording: str) -> str | None:
    """talk.srt or talk.wav.srt (whisper.cpp) among the names that are there."""
    stem = os.path.splitext(recording)[0]
    for suffix in TRANSCRIPT_SUFFIXES:
        for candidate in (stem + suffix, recording + suffix):
            if candidate in there:
                return candidate
    return None


def recording_beside(transcript: str, there: set[str]) -> str | None:
    """The path of the recording that the transcript belongs to. there: names in its folder."""
    folder, file = os.path.split(transcript)
    stem = os.path.splitext(file)[0]
    if is_audio_name(stem) and stem in there:
        return os.path.join(folder, stem)
    for name in sorted(there):
        if is_audio_name(name) and os.path.splitext(name)[0] == stem:
            return os.path.join(folder, name)
    return None


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """A transcript beside a recording. Pickles."""

    path: str

    def clips(self) -> Iterator[ListedClip]:
        there = set(os.listdir(os.path.dirname(self.path) or "."))
        recording = recording_beside(self.path, there)
        for cue in read_cues(self.path):
            yield clip_of_cue(self.path, recording, cue)


def open_recordings(
    name: str, transcripts: list[str], limits: WindowLimits | None = None
) -> OpenedSplit:
    """The utterances of one split, a shard for each transcript.

    name: of the split, in the log. limits: see `open_lists`.
    """
    suffixes = Counter(os.path.splitext(path)[1] for path in transcripts)
    num_rows = 0
    overlapping = 0
    for transcript in transcripts:
        cues = read_cues(transcript)
        num_rows += len(cues)
        overlapping += count_overlaps(cues)
    if overlapping:
        logger.warning(
            "%s: %d of %d utterances overlap the one before by more than %g s. Each is trained "
            "with its own text only.",
            name,
            overlapping,
            num_rows,
            MAX_OVERLAP_IN_SECONDS,
        )
    columns = SpeechColumns(audio="recording", text=", ".join(sorted(suffixes)))
    lists = [Transcript(path=path) for path in transcripts]
    return open_lists(lists, columns, num_rows, limits)


def read_cues(transcript: str) -> list[Cue]:
    """Of one that cannot be read, a single cue that says why."""
    try:
        data = read_local_file(transcript)
        text = data.decode(encoding_of(data))
        return parse_transcript(text, os.path.splitext(transcript)[1].lower())
    except UnicodeDecodeError:
        problem = "is not UTF-8. Convert it with iconv -f LATIN1 -t UTF-8, or from what it is"
    except Rejection as rejection:
        problem = rejection.detail
    except ValueError as error:
        problem = str(error)
    return [Cue(line=1, problem=problem)]


def clip_of_cue(transcript: str, recording: str | None, cue: Cue) -> ListedClip:
    place = f"{os.path.basename(transcript)}, line {cue.line}"
    problem = cue.problem
    if problem is None and recording is None:
        problem = "there is no recording of this name any more"
    if problem is not None:
        return ListedClip(place=place, problem=f"{transcript}, line {cue.line}: {problem}.")
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
