"""Whole recordings of any length, as one long waveform at 16 kHz."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from speech_finetuning.base.errors import UserError, one_line
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.audio import (
    MAX_PEAK,
    SAMPLE_RATE_IN_HZ,
    ForwardClip,
    audio_file,
    resample,
    to_mono,
)
from speech_finetuning.data.containers import is_mp3_frame, split_streams
from speech_finetuning.data.ffmpeg import DEMUXERS, refuse_to_open
from speech_finetuning.data.reading import MAX_FILE_IN_BYTES
from speech_finetuning.data.signatures import DECODABLE_FILES, convertible_kind, describe_bytes

BLOCK_IN_SECONDS = 30
SILENT_PEAK = 1e-3  # 60 dB below full scale: a muted microphone, not a quiet voice
BYTES_OF_SIGNATURE = 65_536  # of a file, to say what it is


def read_recording(path: str | Path) -> np.ndarray:
    """A file as (n_samples,) float32, mono, 16 kHz.

    wav, flac, ogg, opus and mp3 by libsndfile; m4a, mp4, webm, wma, amr and aac by FFmpeg. Read in
    blocks: an hour takes 230 MB of memory whatever the file's own rate and channels are.
    Raises: UserError if it cannot be read, or if there is nothing to hear in it.
    """
    try:
        waveform = read_by_libsndfile(path)
    except soundfile.LibsndfileError as error:
        waveform = read_by_ffmpeg(path, error)
    check_has_sound(waveform)
    return waveform


def check_has_sound(waveform: np.ndarray) -> None:
    """Raises: UserError for (n_samples,) without anything to hear."""
    if len(waveform) == 0 or not np.isfinite(waveform).all():
        raise UserError(
            "No sound in this file: it holds no samples, or numbers that are not finite. Choose another."
        )
    if np.abs(waveform).max() > MAX_PEAK:
        raise UserError(
            f"Samples up to {np.abs(waveform).max():.0f}, the range is -1 to 1: integers written as floats?"
        )
    if is_silent(waveform):
        raise UserError(
            "Only silence in this clip. If it was recorded here: is the right microphone chosen, unmuted?"
        )


def is_silent(waveform: np.ndarray) -> bool:
    """Whether (n_samples,) is flat: a constant offset, as cheap microphones have, is no sound."""
    return float(np.abs(waveform - waveform.mean()).max()) < SILENT_PEAK


def read_by_libsndfile(path: str | Path) -> np.ndarray:
    """(n_samples,) float32 at 16 kHz. Raises: soundfile.LibsndfileError."""
    return np.concatenate([decode_in_blocks(stream) for stream in streams_of(path)])


def streams_of(path: str | Path) -> list[Any]:
    """What libsndfile opens: the file; or each stream of an mp3 or Ogg file, of which it would
    decode the first alone, and of mp3 without a header of its length no more than it guesses."""
    place = os.fsencode(path)  # soundfile itself encodes characters only
    with contextlib.suppress(OSError, Rejection), open(place, "rb") as file:
        beginning = file.read(BYTES_OF_SIGNATURE)
        is_of_streams = beginning.startswith((b"ID3", b"OggS")) or is_mp3_frame(beginning, 0)
        if is_of_streams and os.path.getsize(place) <= MAX_FILE_IN_BYTES:
            data = beginning + file.read()
            streams = split_streams(data)
            if streams != [data]:
                return [audio_file(stream) for stream in streams]
    return [place]


def decode_in_blocks(stream: Any) -> np.ndarray:
    """As `read_by_libsndfile`, of one that `streams_of` names."""
    with ForwardClip(stream) as clip:
        rate_in_hz = clip.samplerate
        blocks = mono_blocks(clip)
        first = next(blocks, np.zeros(0, np.float32))
        second = next(blocks, None)
        if second is None:  # as rows of training are resampled
            return np.ascontiguousarray(resample(first, rate_in_hz), np.float32)
        stream = soxr.ResampleStream(rate_in_hz, SAMPLE_RATE_IN_HZ, 1, dtype="float32")
        pieces = [stream.resample_chunk(block) for block in (first, second)]
        pieces += [stream.resample_chunk(block) for block in blocks]
        pieces.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    return np.concatenate(pieces)


def mono_blocks(clip: ForwardClip) -> Iterator[np.ndarray]:
    """(n_samples,) float32 each, at the file's own rate. Files from a pipe state no length."""
    length = BLOCK_IN_SECONDS * clip.samplerate
    block = clip.read(length, dtype="float32", always_2d=True)
    while len(block):
        yield np.ascontiguousarray(to_mono(block))
        block = clip.read(length, dtype="float32", always_2d=True)


def read_by_ffmpeg(path: str | Path, error: soundfile.LibsndfileError) -> np.ndarray:
    """(n_samples,) float32 at 16 kHz, of the best audio track; kinds of files as in `ffmpeg`.

    error: why libsndfile could not. Raises: UserError.
    """
    if not Path(path).is_file():
        raise UserError("There is no such file.") from error
    with open(path, "rb") as file:
        beginning = file.read(BYTES_OF_SIGNATURE)
    kind = convertible_kind(beginning)
    if kind is None or kind.suffix not in DEMUXERS:
        reason = one_line(error.error_string)
        found = "" if beginning.startswith(DECODABLE_FILES) else f" {describe_bytes(beginning)}"
        raise UserError(f"Not readable as audio (libsndfile: {reason}){found}") from error
    import av  # here, as in `ffmpeg`: most files need it not
    from av.error import FFmpegError

    try:
        with (
            open(path, "rb") as file,
            av.open(file, format=DEMUXERS[kind.suffix], io_open=refuse_to_open) as container,
        ):
            pieces = list(decode_track(av, container))
    except (FFmpegError, ValueError, OverflowError) as failure:
        detail = one_line(getattr(failure, "strerror", None) or failure)
        raise UserError(f"Not readable as audio ({kind.name}: {detail})") from failure
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)


def decode_track(av: Any, container: Any) -> Iterator[np.ndarray]:
    """Pieces of (n_samples,) float32 at 16 kHz; none of a video without sound. av: PyAV; container:
    its open file. Raises: FFmpegError."""
    track = container.streams.best("audio")
    if track is None:
        return
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE_IN_HZ)
    for frame in container.decode(track):
        for piece in resampler.resample(frame):
            yield piece.to_ndarray()[0]
    for piece in resampler.resample(None):
        yield piece.to_ndarray()[0]
