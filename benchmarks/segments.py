"""What a segment of an hour's recording costs, against a clip of its own of the same length.

    python benchmarks/segments.py [--minutes 60] [--repetitions 7]

A synthetic recording in each format, read from a local file up to the samples at 16 kHz that
log-mels are made of. The clip, and segments at the beginning, the middle and the end, are decoded
in turn; the median of the repetitions is shown, and the largest difference between the samples of a
segment and the same part of the recording decoded whole.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import av
import numpy as np
import soundfile

from speech_finetuning.data.audio import decode_audio
from speech_finetuning.data.cuts import cut_out
from speech_finetuning.data.ffmpeg import decode_foreign
from speech_finetuning.data.segments import Segment

SECONDS = 6.0
RATE_IN_HZ = 16_000
BLOCK_IN_SECONDS = 60
# suffix: soundfile's subtype; or PyAV's container and encoder
FORMATS = {
    "wav": "PCM_16",
    "flac": "PCM_16",
    "ogg": "VORBIS",
    "opus": "OPUS",
    "mp3": "MPEG_LAYER_III",
    "m4a": ("ipod", "aac"),
    "webm": ("webm", "libopus"),
    "amr": ("amr", "libopencore_amrnb"),
}


def speech_like(seconds: float, rate_in_hz: int, start_in_seconds: float = 0.0) -> np.ndarray:
    """A gliding tone in noise, (n_samples,) float32."""
    times = start_in_seconds + np.arange(round(seconds * rate_in_hz)) / rate_in_hz
    generator = np.random.default_rng(round(start_in_seconds))
    tone = np.sin(2 * np.pi * (300 * times + 200 * np.sin(times / 3)))
    return np.float32(0.2 * tone + generator.normal(0, 0.03, len(times)))


def rate_of(suffix: str) -> int:
    return {"amr": 8_000, "webm": 48_000}.get(suffix, RATE_IN_HZ)


def write(path: Path, seconds: float) -> None:
    """In blocks, so that an hour takes little memory."""
    suffix = path.suffix[1:]
    rate = rate_of(suffix)
    starts = np.arange(0, seconds, BLOCK_IN_SECONDS)
    how = FORMATS[suffix]
    if isinstance(how, str):
        kind = "OGG" if suffix == "opus" else suffix.upper()
        with soundfile.SoundFile(path, "w", rate, 1, subtype=how, format=kind) as file:
            for start in starts:
                file.write(speech_like(min(BLOCK_IN_SECONDS, seconds - start), rate, start))
        return
    container, encoder = how
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(encoder, rate=rate, layout="mono")
        stream.bit_rate = 12_200 if "amr" in encoder else 64_000
        for start in starts:
            samples = speech_like(min(BLOCK_IN_SECONDS, seconds - start), rate, start)
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.sample_rate = rate
            frame.pts = round(start * rate)
            for packet in stream.encode(frame):
                output.mux(packet)
        for packet in stream.encode(None):
            output.mux(packet)


def accept(seconds: float) -> None:
    """In place of check_duration."""


def time_of(path: Path, segment: Segment | None) -> float:
    """Seconds up to the samples."""
    begin = time.perf_counter()
    data = path.read_bytes() if segment is None else cut_out(str(path), segment, accept)
    decode_audio(data, accept)
    return time.perf_counter() - begin


def whole(path: Path) -> np.ndarray:
    """(n_samples, n_channels) float32."""
    if isinstance(FORMATS[path.suffix[1:]], str):
        return soundfile.read(path, dtype="float32", always_2d=True)[0]
    return decode_foreign(str(path), accept)[0]


def largest_difference(path: Path, segments: list[Segment]) -> float:
    samples = whole(path)
    rate = rate_of(path.suffix[1:])
    largest = 0.0
    for segment in segments:
        cut_path = path.with_name("cut.wav")
        cut_path.write_bytes(cut_out(str(path), segment, accept))
        cut = soundfile.read(cut_path, dtype="float32", always_2d=True)[0]
        start = round(segment.start_in_seconds * rate)
        largest = max(largest, float(np.abs(cut - samples[start : start + len(cut)]).max()))
    return largest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()
    seconds = 60 * args.minutes
    starts = [0.0, round(seconds / 2, 2), seconds - SECONDS - 1]
    segments = [Segment(start_in_seconds=s, duration_in_seconds=SECONDS) for s in starts]
    print("| format | clip | beginning | middle | end | end / clip | largest difference |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for suffix in FORMATS:
            clip = Path(folder) / f"clip.{suffix}"
            recording = Path(folder) / f"recording.{suffix}"
            write(clip, SECONDS)
            write(recording, seconds)
            times: list[list[float]] = []
            for _ in range(args.repetitions):
                row = [time_of(clip, None)]
                row += [time_of(recording, segment) for segment in segments]
                times.append(row)
            medians = [1000 * statistics.median(column) for column in zip(*times, strict=True)]
            difference = largest_difference(recording, segments)
            cells = " | ".join(f"{ms:.1f} ms" for ms in medians)
            ratio = medians[-1] / medians[0]
            print(f"| {suffix} | {cells} | {ratio:.1f} | {difference:.0e} |", flush=True)
            recording.unlink()


if __name__ == "__main__":
    main()
