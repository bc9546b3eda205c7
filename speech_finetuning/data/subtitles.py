"""Transcripts with times: SubRip, WebVTT, Whisper's JSON and TSV, Audacity's labels, plain text.

The parsers are our own. pysubs2 1.8 adds notes, style sheets and names of cues to the text of the
cue before them and takes a number that is spoken last for that of the next cue; webvtt-py and srt
end at the first line that is wrong. Here one bad cue costs no other.
"""

import html
import json
import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

TIME = r"(?:(\d{1,4}):)?(\d{1,2}):(\d{1,2})(?:[.,](\d{1,3}))?"
TIMING = re.compile(rf"\s*{TIME}\s*-->\s*{TIME}(?:\s.*)?")
LINE_BREAK = re.compile(r"\r\n|\r|\n")  # splitlines knows more, which are characters of a cue here
VTT_TAG = re.compile(r"<[^<>]*>")  # WebVTT, 3.4: of classes, voices, times
HTML_TAG = re.compile(r"</?[A-Za-z][^<>]*>")  # not "1 < 2"
OVERRIDE = re.compile(r"\{\\[^{}]*\}")  # {\an8}, of SubStation Alpha, also met in SubRip
ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|\w+);")
LABEL = re.compile(r"(-?\d+(?:[.,]\d+)?)\t(-?\d+(?:[.,]\d+)?)(?:\t(.*))?")
TIMIT = re.compile(r"0 \d{4,} (\S.*)")  # first sample, the one after the last, text
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"  # Thai to Chinese
BREAK_WITHIN_UNSPACED = re.compile(rf"(?<=[{UNSPACED}])\n(?=[{UNSPACED}])")
# Captions that roll up show each line twice, the second time above the next one.
MIN_SHARE_OF_ROLLING = 0.5
MIN_NUM_ROLLING = 3
MAX_GAP_IN_SECONDS = 0.1  # between captions that roll up


@dataclass(frozen=True, kw_only=True)
class Cue:
    """One utterance of a transcript. line: of its file, from 1; problem: why it cannot be read.

    start_in_seconds: None: the text is that of the whole recording. end_in_seconds: None: up to
    the end.
    """

    line: int
    start_in_seconds: float | None = None
    end_in_seconds: float | None = None
    lines: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def text(self) -> str:
        text = "\n".join(line.strip() for line in self.lines if line.strip())
        return " ".join(BREAK_WITHIN_UNSPACED.sub("", text).split())

    def span(self) -> tuple[float, float]:
        """(start, end) in seconds, of a cue that has both."""
        assert self.start_in_seconds is not None and self.end_in_seconds is not None
        return self.start_in_seconds, self.end_in_seconds


def parse_transcript(text: str, suffix: str) -> list[Cue]:
    """The cues in the order of the file. suffix: of its name: .srt, .vtt, .json, .tsv or .txt.

    Raises: ValueError for a file that is not such a transcript.
    """
    if suffix == ".json":
        cues = parse_json(text)
    elif suffix == ".tsv":
        cues = parse_whisper_tsv(text)
    elif suffix == ".txt":
        cues = parse_labels(text)
    else:
        cues = parse_cues(text, is_vtt=suffix == ".vtt")
    return join_simultaneous(without_rolling([checked(cue) for cue in cues]))


def checked(cue: Cue) -> Cue:
    """The cue without control characters, or with the problem of its times."""
    lines = tuple(without_controls(line) for line in cue.lines)
    start = cue.start_in_seconds
    end = cue.end_in_seconds
    if cue.problem is None and start is not None and end is not None and end <= start:
        return replace(cue, lines=lines, problem=f"ends at {end:g} s, but begins at {start:g} s")
    return replace(cue, lines=lines)


def without_controls(line: str) -> str:
    """Tabs and the like become spaces, other control characters nothing."""
    if line.isprintable():
        return line
    spaced = (" " if character.isspace() else character for character in line)
    return "".join(character for character in spaced if unicodedata.category(character) != "Cc")


# ---- SubRip and WebVTT -------------------------------------------------------------------------
@dataclass(kw_only=True)
class Block:
    """What stands below a line with times. number: of the cue after it, where it has one."""

    line: int
    times: str
    text: list[str]
    number: int | None = None


def parse_cues(text: str, *, is_vtt: bool) -> list[Cue]:
    """SubRip has empty lines also within a text; in WebVTT they end it, and what follows up to the
    next times is a note, a style sheet or the next cue's name."""
    blocks: list[Block] = []
    is_in_text = False
    for number, line in enumerate(LINE_BREAK.split(text), start=1):
        if "-->" in line:
            if blocks:
                drop_number(blocks)
            blocks.append(Block(line=number, times=line, text=[]))
            is_in_text = True
        elif is_vtt and not line:
            is_in_text = False
        elif is_in_text:
            blocks[-1].text.append(line)
    return [cue_of(block, is_vtt=is_vtt) for block in blocks]


def drop_number(blocks: list[Block]) -> None:
    """Takes the number of the next cue, the line right above its times, from the last one's text.

    It stands below an empty line, or counts on from the number before.
    """
    block = blocks[-1]
    if not block.text or not block.text[-1].strip().isdecimal():
        return
    number = int(block.text[-1])
    before = blocks[-2].number if len(blocks) > 1 else 1
    is_below_empty_line = len(block.text) > 1 and not block.text[-2].strip()
    if is_below_empty_line or number == (before or 0) + 1:
        block.text.pop()
        block.number = number


def cue_of(block: Block, *, is_vtt: bool) -> Cue:
    match = TIMING.fullmatch(block.times)
    if match is None:
        return Cue(line=block.line, problem=f"expected times, found {block.times.strip()[:60]!r}")
    parts = match.groups()
    tag = VTT_TAG if is_vtt else HTML_TAG
    lines = []
    for line in block.text:
        plain = OVERRIDE.sub("", tag.sub("", line))
        lines.append(ENTITY.sub(unescaped, plain))
    return Cue(
        line=block.line,
        start_in_seconds=seconds_of_clock(parts[:4]),
        end_in_seconds=seconds_of_clock(parts[4:]),
        lines=tuple(lines),
    )


def unescaped(match: re.Match[str]) -> str:
    return html.unescape(match[0])


def seconds_of_clock(parts: tuple[str | None, ...]) -> float:
    """Of hours (None: none), minutes, seconds and the digits of their fraction."""
    hours, minutes, seconds, fraction = parts
    whole = 3600 * int(hours or 0) + 60 * int(minutes or 0) + int(seconds or 0)
    return round(whole + float(f"0.{fraction or 0}"), 3)


# ---- Whisper's own output, and Audacity's ------------------------------------------------------
def parse_json(text: str) -> list[Cue]:
    """The segments of openai-whisper, faster-whisper and WhisperX, the chunks of transformers'
    pipeline, the transcription of whisper.cpp."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    found: dict[str, Any] = value if isinstance(value, dict) else {}
    for name in ("segments", "chunks", "transcription"):
        if isinstance(found.get(name), list):
            cues = [
                json_cue(segment, f"{name}[{index}]", index)
                for index, segment in enumerate(found[name])
            ]
            return with_ends(cues, name)
    raise ValueError("expected Whisper's JSON, an object with segments")


def json_cue(segment: Any, place: str, index: int) -> Cue:
    """One of the segments."""
    line = index + 1
    if not isinstance(segment, dict) or not isinstance(segment.get("text"), str):
        return Cue(line=line, problem=f"{place}: expected an object with a text")
    times = [segment.get("start"), segment.get("end")]
    unit_in_seconds = 1.0
    if isinstance(segment.get("timestamp"), list):
        times = segment["timestamp"]
    if isinstance(segment.get("offsets"), dict):
        times = [segment["offsets"].get("from"), segment["offsets"].get("to")]
        unit_in_seconds = 0.001
    if len(times) != 2 or not is_number(times[0]) or not (times[1] is None or is_number(times[1])):
        return Cue(line=line, problem=f"{place}: expected times, found {str(times)[:60]}")
    start: Any = times[0]
    end: Any = times[1]
    if end is None and is_number(segment.get("duration")):
        end = start + segment["duration"]
    return Cue(
        line=line,
        start_in_seconds=round(start * unit_in_seconds, 3),
        end_in_seconds=None if end is None else round(end * unit_in_seconds, 3),
        lines=tuple(LINE_BREAK.split(segment["text"])),
    )


def with_ends(cues: list[Cue], name: str) -> list[Cue]:
    """Only the last segment goes on to the end of the recording where no end is given; another one
    to the start of the next. One that would have to end before it starts has none."""
    ended = list(cues)
    next_start: float | None = None
    for index in reversed(range(len(cues))):
        cue = cues[index]
        start = cue.start_in_seconds
        if cue.problem is not None or start is None:
            continue
        if cue.end_in_seconds is None and next_start is not None:
            ended[index] = replace(cue, end_in_seconds=next_start)
            if next_start <= start:
                problem = f"{name}[{index}]: has no end, and the next one starts before it"
                ended[index] = Cue(line=cue.line, problem=problem)
        next_start = start
    return ended


def is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def parse_whisper_tsv(text: str) -> list[Cue]:
    """Its times are in milliseconds."""
    header, *lines = LINE_BREAK.split(text)
    if header.split("\t") != ["start", "end", "text"]:
        raise ValueError("expected Whisper's TSV, whose header is start, end, text")
    return list(rows_with_times(lines, first_line=2, unit_in_seconds=0.001))


def parse_labels(text: str) -> list[Cue]:
    """Audacity's label track: start, end and label, separated by tabs; any other text is that of
    the whole recording, in TIMIT with its samples."""
    lines = LINE_BREAK.split(text)
    filled = [line for line in lines if line.strip()]
    first = next(iter(filled), "")
    of_timit = TIMIT.fullmatch(first)
    if of_timit is not None and len(filled) == 1:
        return [Cue(line=1, lines=(of_timit[1],))]
    if LABEL.fullmatch(first) is None:
        return [Cue(line=1, lines=tuple(lines))]
    return list(rows_with_times(lines, first_line=1, unit_in_seconds=1.0))


def rows_with_times(lines: list[str], *, first_line: int, unit_in_seconds: float) -> Iterator[Cue]:
    for number, line in enumerate(lines, start=first_line):
        # A line with a backslash has the frequencies of the label above it.
        if not line.strip() or line.startswith("\\"):
            continue
        match = LABEL.fullmatch(line)
        if match is None:
            problem = f"expected start, end and text, separated by tabs, found {line[:60]!r}"
            yield Cue(line=number, problem=problem)
            continue
        start, end, label = match.groups()
        yield Cue(
            line=number,
            start_in_seconds=round(unit_in_seconds * float(start.replace(",", ".")), 6),
            end_in_seconds=round(unit_in_seconds * float(end.replace(",", ".")), 6),
            lines=(label or "",),
        )


# ---- cues that belong together -----------------------------------------------------------------
def without_rolling(cues: list[Cue]) -> list[Cue]:
    """Of captions that roll up, as YouTube's automatic ones do, each line once, when it is said."""
    num_rolling = sum(rolls(before, cue) for before, cue in zip(cues, cues[1:], strict=False))
    if num_rolling < max(MIN_NUM_ROLLING, MIN_SHARE_OF_ROLLING * len(cues)):
        return cues
    left = []
    for index, cue in enumerate(cues):
        lines = shown_lines(cue)
        if index > 0 and rolls(cues[index - 1], cue):
            lines = lines[1:]
        if lines or cue.problem is not None:
            left.append(replace(cue, lines=tuple(lines)))
    return left


def rolls(before: Cue, cue: Cue) -> bool:
    """Whether a caption begins with the line that the one before ended with, and follows at once."""
    if not has_both_times(before) or not has_both_times(cue):
        return False
    lines = shown_lines(cue)
    lines_before = shown_lines(before)
    follows = abs(cue.span()[0] - before.span()[1]) <= MAX_GAP_IN_SECONDS
    return follows and bool(lines) and lines_before[-1:] == lines[:1]


def shown_lines(cue: Cue) -> list[str]:
    return [line.strip() for line in cue.lines if line.strip()]


def has_both_times(cue: Cue) -> bool:
    return None not in (cue.start_in_seconds, cue.end_in_seconds) and cue.problem is None


def join_simultaneous(cues: list[Cue]) -> list[Cue]:
    """Cues with the same times, as of two places on the screen, are one utterance."""
    joined: list[Cue] = []
    for cue in cues:
        is_same = (
            joined
            and has_both_times(cue)
            and has_both_times(joined[-1])
            and cue.span() == joined[-1].span()
        )
        if is_same:
            joined[-1] = replace(joined[-1], lines=(*joined[-1].lines, *cue.lines))
        else:
            joined.append(cue)
    return joined
