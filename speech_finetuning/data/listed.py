"""Rows that lists name: clips of their own, or segments of recordings, alone or with neighbours."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import datasets

from speech_finetuning.base.files import counted
from speech_finetuning.data.cells import AudioCell, path_of
from speech_finetuning.data.columns import OpenedSplit, SpeechColumns
from speech_finetuning.data.oddities import as_it_was
from speech_finetuning.data.segments import TOLERANCE_IN_SECONDS, Segment, length_in_seconds
from speech_finetuning.data.text import LOST_CHARACTERS, SPECIAL_TOKEN

logger = logging.getLogger(__name__)

CLIP = "clip"  # the one column of a list's dataset
# Between neighbours. In a longer pause something may be said that the list leaves out.
MAX_GAP_IN_SECONDS = 3.0
# Between a segment and what is its prompt: a window. Later the talk may be of something else.
MAX_PROMPT_GAP_IN_SECONDS = 30.0
# By which neighbours may overlap: people who write subtitles are not so exact.
MAX_OVERLAP_IN_SECONDS = 0.1
TIMESTAMP_IN_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class TimedText:
    """What is said in a part of a window, in seconds from the window's beginning."""

    start_in_seconds: float
    end_in_seconds: float
    text: str


@dataclass(frozen=True, kw_only=True)
class SpeechWindow:
    """Neighbours of one recording, with the pauses between them as they are.

    cut_in_seconds: where one begins that the end of the window cuts off. It has its start only, and
    is the first of the next window. None: the window ends with the last of its texts.
    """

    texts: tuple[TimedText, ...]
    cut_in_seconds: float | None = None

    def played_in(self, seconds: float, original_seconds: float) -> "SpeechWindow":
        """The window when its clip is played faster or slower."""
        factor = seconds / original_seconds
        cut = self.cut_in_seconds
        texts = [
            replace(
                one,
                start_in_seconds=one.start_in_seconds * factor,
                end_in_seconds=one.end_in_seconds * factor,
            )
            for one in self.texts
        ]
        return SpeechWindow(
            texts=tuple(texts), cut_in_seconds=None if cut is None else cut * factor
        )


@dataclass(frozen=True, kw_only=True)
class ListedClip:
    """One row of a list. place: in its file, "line 7"; problem: why it cannot be read.

    window: the texts of several neighbours, where they are trained together.
    """

    place: str
    audio: AudioCell = None
    text: str | None = None
    segment: Segment | None = None
    window: SpeechWindow | None = None
    speaker: str | None = None
    problem: str | None = None
    group: str | None = None  # of --group_column_name
    prompt: str | None = None  # of --prompt_column_name

    def start(self) -> float:
        """In seconds, of a clip with a segment."""
        assert self.segment is not None
        return self.segment.start_in_seconds

    def end(self) -> float:
        """In seconds, of a clip whose segment has an end."""
        assert self.segment is not None and self.segment.duration_in_seconds is not None
        return self.segment.start_in_seconds + self.segment.duration_in_seconds


class ClipList(Protocol):
    """What is read from its beginning: a table, a transcript, a folder of Kaldi's. Pickles."""

    def clips(self) -> Iterator[ListedClip]: ...


@dataclass(frozen=True, kw_only=True)
class WindowLimits:
    """Of neighbours that are trained together. num_tokens: labels, timestamps included.

    excluded_clips: names of rows that are passed over, which no window goes on across, see
    `clips_of_rows`. joins_parquet: False: rows of parquet files stay single.
    """

    seconds: float
    num_tokens: int
    excluded_clips: frozenset[str] = frozenset()
    joins_parquet: bool = True


def clips_of_rows(row_ids: frozenset[str]) -> frozenset[str]:
    """What may be the clips of rows: a list does not know what stands before them in an id, which
    is the split, the numbers of part and file, and perhaps the record's name."""
    return frozenset(row_id.split("/", slashes)[-1] for row_id in row_ids for slashes in (3, 4, 5))


def open_lists(
    lists: list[Any], columns: SpeechColumns, num_rows: int, limits: WindowLimits | None
) -> OpenedSplit:
    """The rows of one split as {CLIP: ListedClip}, a shard for each list.

    num_rows: without limits. limits: None: every segment is a row of its own.
    """
    if limits is not None:
        num_utterances = num_rows
        num_rows = sum(1 for _ in read_lists(lists, limits))
        tell_of_windows(num_utterances, num_rows)
    dataset = datasets.IterableDataset.from_generator(
        read_lists,
        gen_kwargs={
            "lists": lists,
            "limits": limits,
            "has_previous_prompts": columns.has_previous_prompts,
        },
    )
    return OpenedSplit(dataset=dataset, columns=columns, num_rows=num_rows)


def tell_of_windows(num_utterances: int, num_rows: int) -> None:
    if num_rows < num_utterances:
        logger.info(
            "%s in %s: neighbours of one recording share a window "
            "(--pack_utterances, --timestamp_probability).",
            counted(num_utterances, "utterance"),
            counted(num_rows, "row"),
        )


def read_lists(
    lists: list[ClipList], limits: WindowLimits | None, has_previous_prompts: bool = False
) -> Iterator[dict[str, ListedClip]]:
    for one in lists:
        clips = one.clips()
        if limits is not None:
            clips = join_neighbours(clips, limits)
        if has_previous_prompts:
            clips = with_previous_texts(clips)
        for clip in clips:
            yield {CLIP: clip}


# ---- neighbours --------------------------------------------------------------------------------
def join_neighbours(clips: Iterable[ListedClip], limits: WindowLimits) -> Iterator[ListedClip]:
    """Segments that follow each other in a recording as windows, each segment in one of them.

    A segment that does not end within the window is left to the next one, which it begins; the
    window goes on into it all the same (Radford et al. 2022, section 2.3: "When a final transcript
    segment is only partially included in the current 30-second audio chunk, we predict only its
    start time token").
    """
    window: list[ListedClip] = []
    ends = RecordingEnds()
    for clip in clips:
        if not can_share(clip, limits, ends):
            yield from joined(window, None, limits)
            yield clip
            window = []
            continue
        if window and not is_neighbour(window[-1], clip):
            yield from joined(window, None, limits)
            window = []
        if window and not fits(window, clip, limits):
            yield from joined(window, cut_by_window(window, clip, limits), limits)
            window = []
        window.append(clip)
    yield from joined(window, None, limits)


class RecordingEnds:
    """Where recordings end, of the last one that was asked for."""

    def __init__(self) -> None:
        self.path = ""
        self.seconds: float | None = None

    def of(self, clip: ListedClip) -> float | None:
        """In seconds; None if it cannot be told without decoding, or over the network."""
        if path_of(clip.audio) != self.path:
            self.path = path_of(clip.audio)
            self.seconds = length_in_seconds(clip.audio)
        return self.seconds


def can_share(clip: ListedClip, limits: WindowLimits, ends: RecordingEnds) -> bool:
    """Whether nothing is wrong with the clip that would cost its neighbours too."""
    if clip.problem is not None or not isinstance(clip.audio, str) or not (clip.text or "").strip():
        return False
    if f"{path_of(clip.audio)}#{clip.segment}" in limits.excluded_clips:
        return False
    if clip.segment is None or clip.segment.duration_in_seconds is None:
        return False
    text = clip.text or ""
    if LOST_CHARACTERS.search(text) or SPECIAL_TOKEN.search(text) or as_it_was(text):
        return False
    if not 0 <= clip.start() < clip.end() <= clip.start() + limits.seconds:
        return False
    end = ends.of(clip)
    return end is None or clip.end() <= end + TOLERANCE_IN_SECONDS


def with_previous_texts(clips: Iterable[ListedClip]) -> Iterator[ListedClip]:
    """Each clip with the text of the segment before it, or of the window of several, as its prompt:
    if that is of the same recording, and not long before."""
    before: ListedClip | None = None
    for clip in clips:
        if before is not None and follows(before, clip):
            yield replace(clip, prompt=before.text)
        else:
            yield clip
        before = clip


def follows(before: ListedClip, clip: ListedClip) -> bool:
    """Whether a clip goes on with what another says, whose text can be read."""
    for one in (before, clip):
        if one.problem is not None or one.segment is None or one.audio is None:
            return False
    if before.segment is None or before.segment.duration_in_seconds is None:
        return False
    text = before.text or ""
    if LOST_CHARACTERS.search(text) or SPECIAL_TOKEN.search(text) or as_it_was(text):
        return False
    is_later = clip.start() > before.start()
    is_soon = clip.start() - before.end() <= MAX_PROMPT_GAP_IN_SECONDS
    return before.audio == clip.audio and is_later and is_soon


def is_neighbour(before: ListedClip, clip: ListedClip) -> bool:
    gap = clip.start() - before.end()
    is_next = -MAX_OVERLAP_IN_SECONDS <= gap <= MAX_GAP_IN_SECONDS and clip.end() > before.end()
    return clip.audio == before.audio and is_next


def fits(window: list[ListedClip], clip: ListedClip, limits: WindowLimits) -> bool:
    """Whether the window has room for the whole clip, with a start of one that it cuts off."""
    num_tokens = 1 + sum(2 + estimated_tokens(one.text or "") for one in [*window, clip])
    is_short_enough = clip.end() - window[0].start() <= limits.seconds
    return is_short_enough and num_tokens <= limits.num_tokens


def cut_by_window(window: list[ListedClip], clip: ListedClip, limits: WindowLimits) -> float | None:
    """Where a clip that does not fit begins in the window, if the window's end cuts it off."""
    start = max(clip.start(), window[-1].end()) - window[0].start()
    is_cut = clip.end() - window[0].start() > limits.seconds
    return start if is_cut and start <= limits.seconds - TIMESTAMP_IN_SECONDS else None


def joined(
    clips: list[ListedClip], cut_in_seconds: float | None, limits: WindowLimits
) -> Iterator[ListedClip]:
    """One clip of several, or of the only one; nothing of none."""
    if not clips:
        return
    first = clips[0]
    if len(clips) == 1 and cut_in_seconds is None:
        yield first
        return
    begin = first.start()
    texts = []
    end = 0.0
    for clip in clips:
        start = max(clip.start() - begin, end)
        end = clip.end() - begin
        texts.append(TimedText(start_in_seconds=start, end_in_seconds=end, text=clip.text or ""))
    if cut_in_seconds is not None:
        end = limits.seconds
    yield replace(
        first,
        text=" ".join(clip.text or "" for clip in clips),
        segment=Segment(start_in_seconds=begin, duration_in_seconds=end),
        window=SpeechWindow(texts=tuple(texts), cut_in_seconds=cut_in_seconds),
    )


def estimated_tokens(text: str) -> int:
    """Rather more than Whisper's tokenizer makes of it: 2.5 letters a token where an alphabet's
    letters are single bytes, 1.5 where they are two; up to 1.5 tokens a letter elsewhere."""
    size = 0.0
    for character in text:
        code = ord(character)
        size += 0.4 if code < 0x80 else 0.7 if code < 0x800 else 1.5
    return round(size) + 1
