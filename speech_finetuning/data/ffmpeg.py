"""Audio that libsndfile cannot read (m4a, webm, mp4, aac, amr, wma, 3gp), by FFmpeg through PyAV.

The kind of file is known by its first bytes and FFmpeg is told it, so that a file from a stranger
never reaches the demuxers that open others (hls, concat, dash): FFmpeg reads from the bytes, and
whatever else it asks to open is refused. PyAV is imported with the first such file, not before.
"""

import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NoReturn

import numpy as np

from speech_finetuning.base.errors import one_line
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.segments import Segment
from speech_finetuning.data.signatures import conversion, convertible_kind

# FFmpeg's demuxer for each suffix that `signatures` tells from the bytes; none that opens others.
DEMUXERS = {
    **dict.fromkeys(("m4a", "3gp", "mov"), "mov"),
    "webm": "matroska",
    "amr": "amr",
    "wma": "asf",
    "aac": "aac",
}
SEEKABLE = ("mov", "matroska", "asf")
MAX_ROUNDING_IN_SECONDS = 0.002
# Before a segment: overlapping transforms and bit reservoirs need what stands before them. AMR's
# prediction forgets slowly: a pure tone, its worst case, still differs by 4 % after 5 s.
PREROLL_IN_SECONDS = 1.0
PREROLL_OF_CODECS = {"amrnb": 5.0, "amrwb": 5.0}
MICROSECONDS = 1_000_000  # FFmpeg's unit of times in a container
UNCHECKED_SECONDS = 30.0  # no minimum duration is longer
MAX_PADDING_IN_SAMPLES = 4096  # of the last frame; more is sound beyond a wrong statement
# Less than this is missing from whole files: the last packet's length is not always stated.
NEGLIGIBLE_SECONDS = {"mov": 0.1, "matroska": 0.5}


def is_foreign(beginning: bytes) -> bool:
    """Whether a file is for FFmpeg, by its first bytes."""
    kind = convertible_kind(beginning)
    return kind is not None and kind.suffix in DEMUXERS


def decode_foreign(
    recording: bytes | str,
    check_duration: Callable[[float], None],
    segment: Segment | None = None,
) -> tuple[np.ndarray, int]:
    """((n_samples, n_channels) float32, sampling rate in Hz) of a file or of a segment of it.

    recording: an encoded file, or the path of one. check_duration: gets the seconds that have been
    decoded, as soon as they are many; may raise Rejection.
    Raises: Rejection.
    """
    import av  # 0.1 s and 60 MB that most data sets do not need
    import av.error

    kind = convertible_kind(first_bytes(recording))
    assert kind is not None, "see is_foreign"
    demuxer = DEMUXERS[kind.suffix]
    try:
        for seeks in (demuxer in SEEKABLE, False):
            with (
                open_recording(recording) as file,
                av.open(file, format=demuxer, io_open=refuse_to_open) as container,
            ):
                found = decode_container(container, demuxer, check_duration, segment, seeks)
            if found is not None:
                return found
        raise ValueError(f"second {segment} is not found")
    except (av.error.FFmpegError, ValueError, OverflowError) as error:
        detail = one_line(getattr(error, "strerror", None) or error)
        advice = f"If it plays, {conversion(kind.suffix)}"
        raise Rejection("audio_unreadable", f"{kind.name}: {detail} {advice}") from error


def open_recording(recording: bytes | str) -> BinaryIO:
    return io.BytesIO(recording) if isinstance(recording, bytes) else open(recording, "rb")


def first_bytes(recording: bytes | str) -> bytes:
    with open_recording(recording) as file:
        return file.read(64)


def refuse_to_open(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    """In place of FFmpeg's own way to open what a file names."""
    raise PermissionError("a clip may not open other files")


def decode_container(
    container: Any,
    demuxer: str,
    check_duration: Callable[[float], None],
    segment: Segment | None,
    seeks: bool,
) -> tuple[np.ndarray, int] | None:
    """As `decode_foreign`; None if seeking has led behind the beginning of the segment.

    container: PyAV's.
    """
    stream = container.streams.best("audio")
    if stream is None:
        if container.streams.video:
            raise Rejection("audio_empty", "a video without sound")
        raise Rejection("audio_unreadable", f"no sound is found in this {demuxer} file")
    if segment is not None and not segment.is_possible():
        raise Rejection("segment_outside_audio", f"second {segment}")
    stream.codec_context.thread_count = 1  # rows are decoded in threads of our own
    clip = DecodedClip(segment=segment, check_duration=check_duration)
    start_in_seconds = 0.0
    if segment is not None and seeks:
        preroll = PREROLL_OF_CODECS.get(stream.codec_context.name, PREROLL_IN_SECONDS)
        start_in_seconds = segment.start_in_seconds - preroll
    for position, frame in frames_from(container, stream, start_in_seconds):
        if position is not None and position > round(segment_start(segment) * frame.sample_rate):
            return None
        clip.add(frame, position)
        if clip.is_complete():
            break
    else:
        clip.end(stated_seconds(container, stream, demuxer), NEGLIGIBLE_SECONDS.get(demuxer))
    return np.concatenate(clip.blocks), clip.rate_in_hz


def segment_start(segment: Segment | None) -> float:
    return 0.0 if segment is None else segment.start_in_seconds


def frames_from(
    container: Any, stream: Any, start_in_seconds: float
) -> Iterator[tuple[int | None, Any]]:
    """(number of its first sample, frame) from `start_in_seconds` or somewhat earlier on. The
    number is None where it follows from the frame before.

    Containers round times, webm to milliseconds. But frames have one length, so that the first of
    them tell the exact place of each.
    """
    frames = container.decode(stream)
    beginning = list(itertools.islice(frames, 2))
    has_times = len(beginning) == 2 and beginning[0].time is not None
    if start_in_seconds <= PREROLL_IN_SECONDS or not has_times:
        for frame in itertools.chain(beginning, frames):
            yield None, frame
        return
    first, second = beginning
    container.seek(round(start_in_seconds * MICROSECONDS))
    frames = container.decode(stream)
    next(frames, None)  # perhaps only a part of a frame, or made of nothing before it
    position = None
    for frame in frames:
        if position is None and frame.time is not None:
            position = round((frame.time - first.time) * frame.sample_rate)
            if frame.samples == second.samples:
                number = round((position - first.samples) / second.samples)
                exact = first.samples + number * second.samples
                if abs(exact - position) <= MAX_ROUNDING_IN_SECONDS * frame.sample_rate:
                    position = exact
            yield position, frame
        elif position is not None:
            yield None, frame


@dataclass(kw_only=True)
class DecodedClip:
    """The samples of a file, or of a segment of it, as they come. position: of the next sample,
    from the first of the recording."""

    segment: Segment | None
    check_duration: Callable[[float], None]
    rate_in_hz: int = 0  # None yet
    position: int = 0
    num_samples: int = 0
    blocks: list[np.ndarray] = field(default_factory=list)  # (n_samples, n_channels) float32

    def add(self, frame: Any, position: int | None) -> None:
        """position: of its first sample; None: it follows the frame before.

        Raises: Rejection, also check_duration's as soon as the clip has become too long.
        """
        samples = samples_of(frame)
        if position is not None:
            self.position = position
        if self.rate_in_hz == 0:
            self.rate_in_hz = frame.sample_rate
        is_changed = self.blocks and samples.shape[1] != self.blocks[-1].shape[1]
        if frame.sample_rate != self.rate_in_hz or is_changed:
            raise Rejection("audio_damaged", "changes its sampling rate or channels on the way")
        start, stop = self.wanted_samples()
        wanted = samples[max(0, start - self.position) :]
        if stop is not None:
            wanted = wanted[: max(0, stop - max(start, self.position))]
        self.position += len(samples)
        if len(wanted) > 0:
            self.blocks.append(wanted)
            self.num_samples += len(wanted)
        seconds = self.num_samples / self.rate_in_hz
        if seconds > UNCHECKED_SECONDS:
            self.check_duration(seconds)

    def wanted_samples(self) -> tuple[int, int | None]:
        """(the first, the one after the last; None: all up to the end)."""
        if self.segment is None:
            return 0, None
        start = round(self.segment.start_in_seconds * self.rate_in_hz)
        if self.segment.duration_in_seconds is None:
            return start, None
        end_in_seconds = self.segment.start_in_seconds + self.segment.duration_in_seconds
        return start, round(end_in_seconds * self.rate_in_hz)

    def is_complete(self) -> bool:
        _, stop = self.wanted_samples()
        return stop is not None and self.position >= stop

    def end(self, stated_seconds: float | None, negligible_seconds: float | None) -> None:
        """Judges a file that has come to its end, and cuts what encoders put there.

        stated_seconds: what the file says of its length; None: nothing, or nothing true.
        Raises: Rejection if it is empty, damaged, or does not contain the segment.
        """
        seconds = stated_seconds or 0.0
        if self.rate_in_hz > 0:
            num_samples = round(seconds * self.rate_in_hz)
            missing_seconds = seconds - self.position / self.rate_in_hz
            if negligible_seconds is not None and missing_seconds > negligible_seconds:
                detail = f"the last {missing_seconds:.2f} s of {seconds:.2f} s are missing"
                raise Rejection("audio_damaged", detail)
            surplus = self.position - num_samples
            if num_samples > 0 and surplus <= MAX_PADDING_IN_SAMPLES:
                self.drop_last(surplus)
        if self.segment is not None:
            rate = self.rate_in_hz or 1000
            num_samples = max(self.position, round(seconds * rate))
            self.segment.frames(num_samples, rate)
        if not self.blocks:
            raise Rejection("audio_empty", "no samples")

    def drop_last(self, num_samples: int) -> None:
        """Of the last block, which is longer than any padding or is all of the clip."""
        if num_samples > 0 and self.blocks:
            self.blocks[-1] = self.blocks[-1][:-num_samples]
            self.position -= num_samples


def stated_seconds(container: Any, stream: Any, demuxer: str) -> float | None:
    """Of the sound, as the file says; FFmpeg guesses that of files which do not."""
    if demuxer == "mov" and stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if demuxer == "matroska" and container.duration and len(container.streams) == 1:
        return container.duration / MICROSECONDS
    return None


def samples_of(frame: Any) -> np.ndarray:
    """(n_samples, n_channels) float32 in [-1, 1] of PyAV's frame."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128) / 128
    elif np.issubdtype(samples.dtype, np.integer):
        samples = samples / -float(np.iinfo(samples.dtype).min)
    return samples.T.astype(np.float32)
