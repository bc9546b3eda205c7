"""The part of a recording that holds an utterance, as a clip of its own."""

import io
from collections.abc import Callable

import numpy as np
import soundfile

from speech_finetuning.base.errors import one_line
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.ffmpeg import decode_foreign, first_bytes, is_foreign
from speech_finetuning.data.segments import Segment


def cut_out(
    recording: bytes | str, segment: Segment, check_duration: Callable[[float], None]
) -> bytes:
    """The segment as a WAV file of its own; nothing else of the recording is decoded.

    What that costs for each kind of file: benchmarks/segments.md.
    recording: an encoded file, or the path of one, which may be hours long.
    check_duration: gets the segment's seconds before it is decoded; may raise Rejection.
    Raises: Rejection if the recording cannot be read or does not contain the segment.
    """
    try:
        if is_foreign(first_bytes(recording)):
            samples, rate_in_hz = decode_foreign(recording, check_duration, segment)
        else:
            samples, rate_in_hz = decode_segment(recording, segment, check_duration)
        cut = io.BytesIO()
        soundfile.write(cut, samples, rate_in_hz, format="WAV", subtype="FLOAT")
    except Rejection:
        raise
    except Exception as error:  # whatever a decoder raises for one row must not end the run
        detail = f"{type(error).__name__}: {one_line(error)}"
        raise Rejection("audio_unreadable", detail) from error
    return cut.getvalue()


def decode_segment(
    recording: bytes | str, segment: Segment, check_duration: Callable[[float], None]
) -> tuple[np.ndarray, int]:
    """((n_samples, n_channels) float32, sampling rate in Hz), by libsndfile.

    Raises: Rejection, the decoder's errors.
    """
    file = io.BytesIO(recording) if isinstance(recording, bytes) else recording
    with soundfile.SoundFile(file) as clip:
        start, stop = segment.frames(clip.frames, clip.samplerate)
        check_duration((stop - start) / clip.samplerate)
        if clip.seekable():
            clip.seek(start)
        else:  # codecs of telephony
            clip.read(start)
        samples = clip.read(stop - start, dtype="float32", always_2d=True)
        rate_in_hz = clip.samplerate
    if len(samples) < stop - start:
        raise Rejection("audio_damaged", f"the file ends before second {segment} does")
    return samples, rate_in_hz
