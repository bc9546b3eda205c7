"""Parts of a recording, as the lists of long recordings name them."""

import io
from dataclasses import dataclass

import soundfile

from speech_finetuning.base.errors import one_line
from speech_finetuning.base.rejections import Rejection

# Lists round their times; a segment may end this much after its recording does.
TOLERANCE_IN_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Where an utterance lies in its recording. duration_in_seconds: None: up to the end."""

    start_in_seconds: float
    duration_in_seconds: float | None = None

    def __str__(self) -> str:
        """As in ids of rows: '12.5-14.25', or '12.5-end'."""
        end = "end"
        if self.duration_in_seconds is not None:
            end = str(round(self.start_in_seconds + self.duration_in_seconds, 6))
        return f"{round(self.start_in_seconds, 6)}-{end}"

    def frames(self, num_frames: int, sampling_rate_in_hz: int) -> tuple[int, int]:
        """(first frame, frame after the last) in a recording of num_frames.

        Raises: Rejection(segment_outside_audio).
        """
        start = round(self.start_in_seconds * sampling_rate_in_hz)
        stop = num_frames
        if self.duration_in_seconds is not None:
            end_in_seconds = self.start_in_seconds + self.duration_in_seconds
            stop = round(end_in_seconds * sampling_rate_in_hz)
        tolerance = round(TOLERANCE_IN_SECONDS * sampling_rate_in_hz)
        if start < 0 or start >= num_frames or stop <= start or stop > num_frames + tolerance:
            seconds = num_frames / sampling_rate_in_hz
            raise Rejection(
                "segment_outside_audio",
                f"second {self} of a file of {seconds:.2f} s. If every file is one utterance, "
                "leave the columns with these times out of the list.",
            )
        return start, min(stop, num_frames)


def cut_out(recording: bytes | str, segment: Segment) -> bytes:
    """The segment as a WAV file of its own; nothing else of the recording is decoded.

    recording: an encoded file, or the path of one, which may be hours long.
    Raises: Rejection if the recording cannot be read or does not contain the segment.
    """
    file = io.BytesIO(recording) if isinstance(recording, bytes) else recording
    try:
        with soundfile.SoundFile(file) as clip:
            start, stop = segment.frames(clip.frames, clip.samplerate)
            if clip.seekable():
                clip.seek(start)
            else:  # codecs of telephony
                clip.read(start)
            samples = clip.read(stop - start, dtype="float32", always_2d=True)
            sampling_rate_in_hz = clip.samplerate
        if len(samples) < stop - start:
            raise Rejection("audio_damaged", f"the file ends before second {segment} does")
        cut = io.BytesIO()
        soundfile.write(cut, samples, sampling_rate_in_hz, format="WAV", subtype="FLOAT")
    except Rejection:
        raise
    except Exception as error:  # whatever a decoder raises for one row must not end the run
        detail = f"{type(error).__name__}: {one_line(error)}"
        raise Rejection("audio_unreadable", detail) from error
    return cut.getvalue()
