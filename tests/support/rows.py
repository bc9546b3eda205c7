"""The rows of a source as a run gets them, and clips to make lists of."""

import io
from pathlib import Path

import numpy as np
import soundfile

from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.preprocessing import Preprocessor
from speech_finetuning.data.shards import ShardReader, SourceRow
from speech_finetuning.data.sources import SpeechSource


def make_clip(seconds: float = 1.0, format: str = "WAV", pitch_in_hz: float = 440) -> bytes:
    """A tone of 16 kHz."""
    times = np.arange(round(16_000 * seconds)) / 16_000
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(2 * np.pi * pitch_in_hz * times), 16_000, format=format)
    return file.getvalue()


def write_clips(folder: Path, count: int = 4, suffix: str = ".wav") -> list[str]:
    """clips/0.wav ... in the folder; their names as a list there would have them."""
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    names = [f"clips/{number}{suffix}" for number in range(count)]
    for name in names:
        (folder / name).write_bytes(make_clip(format=suffix[1:].upper()))
    return names


def read_rows(source: SpeechSource) -> list[SourceRow]:
    """Every row of one pass, in the order of the files."""
    rows = []
    for place in source.shards():
        rows += ShardReader(source, place, num_rows=0, wait_in_seconds=1)
    return rows


def outcomes(source: SpeechSource, preprocessor: Preprocessor) -> list[str]:
    """The text of each row that is trained, the reason of each that is not."""
    prepared = [preprocessor(row) for row in read_rows(source)]
    return [row.reason if isinstance(row, Rejection) else row["text"] for row in prepared]
