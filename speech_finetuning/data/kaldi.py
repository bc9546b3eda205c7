"""Kaldi's data folders: wav.scp, text, and segments where recordings hold several utterances.

Source: kaldi-asr.org/doc/data_prep.html.
"""

import contextlib
import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import printable
from speech_finetuning.data.columns import (
    PREVIOUS_SEGMENT,
    OpenedSplit,
    SpeechColumns,
    WantedColumns,
)
from speech_finetuning.data.listed import ListedClip, WindowLimits, open_lists
from speech_finetuning.data.segments import Segment
from speech_finetuning.data.tables import numbered_lines

logger = logging.getLogger(__name__)

KIND = "kaldi"
SPEAKERS = "utt2spk"
BETWEEN = re.compile(r"[ \t]+")
IN_ARCHIVE = re.compile(r".*\.ark:\d+(\[.*\])?")
RUN_ONCE = (
    'mkdir -p wav; while read -r id command; do sh -c "${command%|}" > "wav/$id.wav"; '
    'echo "$id $PWD/wav/$id.wav"; done < wav.scp > files.scp; mv files.scp wav.scp'
)
MAX_FOLDERS_ABOVE = 3  # data/train/wav.scp names files from the folder in which data lies


@dataclass(frozen=True, kw_only=True)
class Span:
    """A line of segments. channel: given only where a file holds a speaker on each."""

    recording: str
    segment: Segment | None
    channel: str | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class KaldiFolder:
    """A folder, its paths from `root`. Pickles."""

    path: str
    root: str
    has_text: bool
    has_speakers: bool

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def clips(self) -> Iterator[ListedClip]:
        """In the order of segments, else of wav.scp."""
        paths = read_unique(self.file("wav.scp"))
        texts = read_unique(self.file("text")) if self.has_text else {}
        speakers = read_unique(self.file(SPEAKERS)) if self.has_speakers else {}
        if not os.path.isfile(self.file("segments")):
            for utterance, path in paths.items():
                clip = self.clip(utterance, path, None, texts)
                yield replace(clip, speaker=speakers.get(utterance))
            return
        for utterance, line in read_unique(self.file("segments")).items():
            span = parse_span(line)
            problem = span.problem
            if problem is None and span.recording not in paths:
                problem = f"its recording {span.recording} is not in wav.scp"
            if problem is None and span.channel is not None:
                problem = (
                    f"it is channel {span.channel} of its recording. Write each channel to a file "
                    "of its own, with sox IN.wav OUT.wav remix 1"
                )
            if problem is not None:
                text = f"{self.file('segments')}: utterance {utterance}: {problem}."
                yield ListedClip(place=utterance, problem=text)
                continue
            clip = self.clip(utterance, paths[span.recording], span.segment, texts)
            yield replace(clip, speaker=speakers.get(utterance))

    def clip(
        self, utterance: str, path: str, segment: Segment | None, texts: dict[str, str]
    ) -> ListedClip:
        return ListedClip(
            place=utterance,
            audio=os.path.join(self.root, path),
            text=texts.get(utterance),
            segment=segment,
        )


def find_kaldi_folders(name: str, config_name: str | None) -> dict[str, list[str]]:
    """{split: its files}: of the folder itself, or of those in it or in its `data`; or {}."""
    folder = Path(name)
    if config_name and (folder / config_name).is_dir():
        folder /= config_name
    if (folder / "wav.scp").is_file():
        return {"train": files_of_folder(folder)}
    for parent in (folder, folder / "data"):
        found = sorted(file.parent for file in parent.glob("*/wav.scp"))
        if found:
            return {path.name: files_of_folder(path) for path in found}
    return {}


def files_of_folder(folder: Path) -> list[str]:
    """wav.scp first."""
    files = [folder / name for name in ("wav.scp", "text", "segments", SPEAKERS)]
    return [str(file) for file in files if file.is_file()]


def open_kaldi_folder(
    files: list[str], wanted: WantedColumns, limits: WindowLimits | None = None
) -> OpenedSplit:
    """The utterances of one folder. files: as `find_kaldi_folders` finds. limits: see `open_lists`.

    Raises: UserError if wav.scp names what is no file, or texts are needed and missing.
    """
    path = os.path.dirname(files[0])
    has_text = os.path.isfile(os.path.join(path, "text"))
    if wanted.text_required and not has_text:
        raise UserError(f"{path}: has wav.scp, but no file text, with lines 'utterance words ...'.")
    check_names_files(os.path.join(path, "wav.scp"))
    has_speakers = os.path.isfile(os.path.join(path, SPEAKERS))
    folder = KaldiFolder(
        path=path, root=root_of_paths(path), has_text=has_text, has_speakers=has_speakers
    )
    clips = list(folder.clips())
    if has_text:
        warn_of_unused_texts(folder, {clip.place for clip in clips})
    columns = SpeechColumns(
        audio="wav.scp",
        text="text" if has_text else None,
        speaker=SPEAKERS if has_speakers else None,
        has_previous_prompts=wanted.prompt == PREVIOUS_SEGMENT,
    )
    return open_lists([folder], columns, len(clips), limits)


def read_pairs(path: str) -> Iterator[tuple[str, str]]:
    """(first word, the rest) of each line. Raises: UserError if the file is not UTF-8."""
    for _, line in numbered_lines(path):
        key, rest = split_key(line)
        if key:
            yield key, rest


def split_key(line: str) -> tuple[str, str]:
    """The first word and the rest, as Kaldi takes a line apart: at spaces and tabs."""
    key, *rest = BETWEEN.split(line.strip(), maxsplit=1)
    return key, "".join(rest)


def read_unique(path: str) -> dict[str, str]:
    """{first word: the rest}. Raises: UserError where two lines say different things of one."""
    found: dict[str, str] = {}
    for key, rest in read_pairs(path):
        if found.setdefault(key, rest) != rest:
            raise UserError(
                f"{path}: {printable(key[:80])} is there twice, with different contents. Each "
                "utterance has one line: utils/validate_data_dir.sh of Kaldi names the others."
            )
    return found


def parse_span(line: str) -> Span:
    """recording, start, end (-1: that of the recording), perhaps a channel."""
    parts = line.split()
    start = math.nan
    end = math.nan
    with contextlib.suppress(ValueError, IndexError):
        start = float(parts[1])
        end = float(parts[2])
    if not math.isfinite(start + end):
        problem = f"expected a recording and two times, found '{printable(line[:60])}'"
        return Span(recording="", segment=None, problem=problem)
    duration = None if end < 0 else end - start
    return Span(
        recording=parts[0],
        segment=Segment(start_in_seconds=start, duration_in_seconds=duration),
        channel=parts[3] if len(parts) > 3 else None,
    )


def check_names_files(path: str) -> None:
    """A pipe is a command of whoever wrote the file, and is never run. Raises: UserError."""
    for number, line in numbered_lines(path):
        _, target = split_key(line)
        is_archive = IN_ARCHIVE.fullmatch(target) is not None
        if target.endswith("|") or target.startswith("|") or target == "-":
            shown = printable(target[:80])
            raise UserError(
                f"{path}, line {number}: '{shown}' is a command, and commands in data are never "
                f"run. If you trust them all, run them once in {os.path.dirname(path) or '.'}, "
                f"and the files that they write will be read: {RUN_ONCE}"
            )
        if is_archive:
            raise UserError(
                f"{path}, line {number}: {printable(target[:80])} is a place in an archive. Write "
                "its recordings to files, with: wav-copy scp:wav.scp scp:files.scp"
            )


def root_of_paths(folder: str) -> str:
    """Where the paths of wav.scp start: the folder, one above it, or the working directory; that
    in which the first file exists."""
    first = next((path for _, path in read_pairs(os.path.join(folder, "wav.scp"))), "")
    here = Path(folder).resolve()
    for root in (here, *here.parents[:MAX_FOLDERS_ABOVE], Path.cwd()):
        if os.path.isfile(root / first):  # Path's raises of a name that is too long
            return str(root)
    return str(here)


def warn_of_unused_texts(folder: KaldiFolder, utterances: set[str]) -> None:
    unused = [key for key, _ in read_pairs(folder.file("text")) if key not in utterances]
    if unused:
        logger.warning(
            "%s: utterances of text without audio, which are not read: %d, the first is %s.",
            folder.path,
            len(unused),
            unused[0],
        )
