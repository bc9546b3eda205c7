"""A transcript as text, SubRip, WebVTT or JSON."""

import html
import json
from typing import Any

from speech_finetuning.model.transcription import Segment, Transcript


def clock(seconds: float, decimal_mark: str) -> str:
    """3661.25 s as 01:01:01.250."""
    milliseconds = round(1000 * seconds)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{decimal_mark}{rest % 1000:03}"


def as_text(transcript: Transcript) -> str:
    """A line for each segment."""
    return "".join(f"{text}\n" for _, _, text in one_line_each(transcript.segments))


def as_srt(transcript: Transcript) -> str:
    """SubRip: numbered cues; players take < and > as they are."""
    cues = []
    for number, (start, end, text) in enumerate(one_line_each(transcript.segments), 1):
        cues.append(f"{number}\n{clock(start, ',')} --> {clock(end, ',')}\n{text}\n")
    return "\n".join(cues)


def as_vtt(transcript: Transcript) -> str:
    """WebVTT (w3.org/TR/webvtt1), whose text is escaped like HTML's."""
    cues = ["WEBVTT\n"]
    for start, end, text in one_line_each(transcript.segments):
        escaped = html.escape(text, quote=False)
        cues.append(f"{clock(start, '.')} --> {clock(end, '.')}\n{escaped}\n")
    return "\n".join(cues)


def as_record(name: str, duration_in_seconds: float, transcript: Transcript) -> dict[str, Any]:
    """For JSON. `times` says whose they are: the model's, or those of windows cut at pauses."""
    return {
        "file": name,
        "duration": round(duration_in_seconds, 3),
        "language": transcript.language,
        "times": "model" if transcript.has_model_times else "windows",
        "text": transcript.text,
        "segments": [
            {"start": round(start, 3), "end": round(end, 3), "text": text}
            for start, end, text in transcript.segments
        ],
    }


def as_json(name: str, duration_in_seconds: float, transcript: Transcript) -> str:
    record = as_record(name, duration_in_seconds, transcript)
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def one_line_each(segments: list[Segment]) -> list[Segment]:
    """An empty line would end a cue."""
    return [(start, end, " ".join(text.split())) for start, end, text in segments]
