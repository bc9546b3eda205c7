"""Encoded bytes to mono 16 kHz samples to log-mel frames."""

import io
import math
import os
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import soundfile
import soxr
import torch

from speech_finetuning.base.errors import one_line
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.containers import split_streams
from speech_finetuning.data.ffmpeg import decode_foreign, is_foreign
from speech_finetuning.data.signatures import DECODABLE_FILES, describe_bytes

SAMPLE_RATE_IN_HZ = 16_000  # every Whisper checkpoint was trained on 16 kHz
HOP_LENGTH_IN_SAMPLES = 160  # 10 ms between two log-mel frames
FFT_LENGTH_IN_SAMPLES = 400  # 25 ms under each frame
# The encoder's second convolution halves the frames: 20 ms a position, the step of timestamps.
FRAMES_PER_POSITION = 2
HANN_WINDOW = torch.hann_window(FFT_LENGTH_IN_SAMPLES)
# Whisper's log-mel: log10 of the power, raised to at most 8 below the loudest value, + 4, / 4.
DYNAMIC_RANGE = 8.0  # before the scaling
SCALED_DYNAMIC_RANGE = DYNAMIC_RANGE / 4.0
SILENCE = -1.5  # log-mel of digital silence: (log10(1e-10) + 4) / 4
MAX_BYTES_OF_ONE_WRITE = 2**30  # Linux writes at most 2 GiB in one call
MAX_PEAK = 8.0  # 18 dB beyond full scale; floats that are integers begin at 128
# Of the loudest channel's power. Uncorrelated channels keep 1 / n of it, one of six keeps 1 / 36.
MIN_SHARE_OF_POWER = 0.01
NEGLIGIBLE_SECONDS = 0.05  # mp3 encoders count a frame more or less
UNKNOWN_LENGTH = 2**59  # frames; FLAC from a pipe states 2**63 - 1 here
FLAC_MAGIC = b"fLaC\0\0\0\x22"  # with the header of the block that comes first in every file
FLAC_BUFFER_IN_BYTES = 16 * 2**10
UNRECOGNISED_FORMAT = 1  # libsndfile's number of this error
BLOCK_IN_SECONDS = 30  # no minimum duration is longer


def seconds_of_frames(num_frames: int) -> float:
    """How long so many log-mel frames are, such as 30 s for a window of 3,000."""
    return num_frames * HOP_LENGTH_IN_SAMPLES / SAMPLE_RATE_IN_HZ


def audio_file(data: bytes) -> int | BinaryIO:
    """The bytes as an open file; on Linux the descriptor of a file in memory.

    From a BytesIO, libsndfile would call Python some 490 times for an mp3 clip, and need the GIL
    each time (benchmarks/data_pipeline.md).
    """
    if not hasattr(os, "memfd_create") or len(data) > MAX_BYTES_OF_ONE_WRITE:
        return io.BytesIO(data)
    descriptor = os.memfd_create("audio")
    os.pwrite(descriptor, data, 0)
    return descriptor


class ForwardClip(soundfile.SoundFile):
    """A clip that is read once, front to back.

    soundfile 0.14 seeks after every read of a file that says it can. libsndfile cannot in some
    codecs of telephony (GSM 6.10, G.721, G.723, NMS ADPCM), nor at the end of FLAC of unknown
    length.
    """

    def seekable(self) -> bool:
        return False


def decode_audio(
    data: bytes, check_duration: Callable[[float], None], speed: float = 1.0
) -> tuple[np.ndarray, int]:
    """An encoded file as ((n_samples,) float32, mono, 16 kHz; its sampling rate in Hz).

    check_duration: gets the duration in seconds before anything is decoded; may raise Rejection.
    speed: of playing the clip, which changes its pitch as well (speed perturbation, Ko et al.,
    Interspeech 2015). A clip that would leave the limits keeps its own.

    soundfile reads wav, flac, ogg, opus and mp3 from memory. soxr resamples, as it does for
    librosa.resample, whose first call would import numba and scipy: a second, and 300 MB of two
    processes (benchmarks/data_pipeline.md).

    Samples lie in [-1, 1]. mp3 and float files may go beyond: up to MAX_PEAK they are what the file
    says, if loud.

    Raises: Rejection if the file is damaged, empty or no audio, if its samples are NaN or infinite
    or far out of range, and with the decoder's error, whatever that is: one clip never ends a run.
    """
    try:
        streams = [data] if is_foreign(data[:64]) else split_streams(data)
        if len(streams) == 1:
            waveform, sampling_rate = decode_stream(streams[0], check_duration, speed)
        else:
            waveform, sampling_rate = decode_joined(streams, check_duration, speed)
    except Rejection:
        raise
    except soundfile.LibsndfileError as error:
        raise unreadable(data, error) from error
    except Exception as error:
        detail = f"{type(error).__name__}: {one_line(error)}"
        raise Rejection("audio_unreadable", detail) from error
    if len(waveform) == 0:  # one sample at 48 kHz is none at 16 kHz
        raise Rejection("audio_empty", "no samples")
    peak = max(waveform.max(), -waveform.min())  # NaN if one sample is
    if not math.isfinite(peak):
        raise Rejection("audio_not_finite", "NaN or infinite samples")
    if peak > MAX_PEAK:
        detail = f"samples up to {peak:.0f}, the range is -1 to 1: integers written as floats?"
        raise Rejection("audio_out_of_range", detail)
    return np.ascontiguousarray(waveform, dtype=np.float32), sampling_rate


def decode_stream(
    data: bytes, check_duration: Callable[[float], None], speed: float
) -> tuple[np.ndarray, int]:
    """As `decode_audio`, of a file that is not joined of others, without checks of the samples.

    Raises: Rejection, the decoder's errors.
    """
    if is_foreign(data[:64]):
        channels, sampling_rate = decode_foreign(data, check_duration)
        seconds = len(channels) / sampling_rate
        check_duration(seconds)
    else:
        channels, sampling_rate, seconds = decode_own(data, check_duration)
    speed = allowed_speed(seconds, speed, check_duration)
    return resample(to_mono(channels), sampling_rate * speed), sampling_rate


def decode_own(
    data: bytes, check_duration: Callable[[float], None]
) -> tuple[np.ndarray, int, float]:
    """((n_samples, n_channels) float32, sampling rate in Hz, seconds), by libsndfile."""
    # Closes the file, also one that it cannot open.
    with ForwardClip(audio_file(data)) as clip:
        sampling_rate = clip.samplerate
        if clip.frames < UNKNOWN_LENGTH:
            seconds = clip.frames / sampling_rate
            check_duration(seconds)
            return read_samples(clip), sampling_rate, seconds
        channels = read_unknown_length(clip, check_duration)
    seconds = len(channels) / sampling_rate
    check_duration(seconds)
    return channels, sampling_rate, seconds


def decode_joined(
    streams: list[bytes], check_duration: Callable[[float], None], speed: float
) -> tuple[np.ndarray, int]:
    """As `decode_stream`, of files that are joined in one: one clip, with the first one's rate."""
    sampling_rate = 0
    seconds = 0.0
    for stream in streams:
        with ForwardClip(audio_file(stream)) as clip:
            sampling_rate = sampling_rate or clip.samplerate
            seconds += clip.frames / clip.samplerate
    check_duration(seconds)
    speed = allowed_speed(seconds, speed, check_duration)
    parts = [decode_stream(stream, accept_duration, speed)[0] for stream in streams]
    return np.concatenate(parts), sampling_rate


def accept_duration(seconds: float) -> None:
    """In place of check_duration, when the whole has been checked."""


def read_samples(clip: ForwardClip) -> np.ndarray:
    """(n_samples, n_channels) float32. Raises: Rejection(audio_damaged) if the file ends early."""
    samples = clip.read(clip.frames, dtype="float32", always_2d=True)
    missing_seconds = (clip.frames - len(samples)) / clip.samplerate
    if missing_seconds > NEGLIGIBLE_SECONDS:
        stated_seconds = clip.frames / clip.samplerate
        detail = f"the last {missing_seconds:.2f} s of {stated_seconds:.2f} s are missing"
        raise Rejection("audio_damaged", detail)
    if clip.format == "FLAC":
        check_single_flac(clip)
    return samples


def read_unknown_length(clip: ForwardClip, check_duration: Callable[[float], None]) -> np.ndarray:
    """(n_samples, n_channels) float32, of FLAC that was written into a pipe.

    Raises: check_duration's Rejection, as soon as the clip has become too long.
    """
    block_length = BLOCK_IN_SECONDS * clip.samplerate
    blocks = []
    while not blocks or len(blocks[-1]) == block_length:
        blocks.append(clip.read(block_length, dtype="float32", always_2d=True))
        if len(blocks) > 1:
            check_duration(BLOCK_IN_SECONDS * (len(blocks) - 1))
    return np.concatenate(blocks)


def check_single_flac(clip: ForwardClip) -> None:
    """Raises: Rejection(audio_damaged) if another FLAC file follows the samples that were read.

    The decoder has read to their end and at most its buffer of 8 KiB beyond. To look through all of
    the file before it is decoded would cost some 3 % of the decoder's time.
    """
    file = clip.name
    if isinstance(file, int):
        size = os.fstat(file).st_size
        position = os.lseek(file, 0, os.SEEK_CUR)
        start = max(position - FLAC_BUFFER_IN_BYTES, len(FLAC_MAGIC))
        rest = os.pread(file, size - start, start)
    else:
        file.seek(max(file.tell() - FLAC_BUFFER_IN_BYTES, len(FLAC_MAGIC)))
        rest = file.read()
    if FLAC_MAGIC in rest:
        detail = "several FLAC files joined in one: join them with sox or ffmpeg, not as bytes"
        raise Rejection("audio_damaged", detail)


def allowed_speed(seconds: float, speed: float, check_duration: Callable[[float], None]) -> float:
    """The speed, or 1 if it would take the clip beyond the limits."""
    try:
        check_duration(seconds / speed)
    except Rejection:
        return 1.0
    return speed


def unreadable(data: bytes, error: soundfile.LibsndfileError) -> Rejection:
    """What to do about bytes that libsndfile cannot read."""
    if error.code != UNRECOGNISED_FORMAT and data.startswith(DECODABLE_FILES):
        return Rejection("audio_unreadable", one_line(error.error_string))
    return Rejection("audio_unreadable", describe_bytes(data))


def to_mono(channels: np.ndarray) -> np.ndarray:
    """(n_samples,) the mean of (n_samples, n_channels), or the loudest channel if that is silent.

    Channels of opposite phase cancel out: a microphone with a swapped wire is digital silence then.
    """
    if channels.shape[1] == 1:
        return channels[:, 0]
    mean = channels.mean(axis=1)
    power_of_mean = np.dot(mean, mean)
    power_of_all = np.dot(channels.ravel(), channels.ravel())
    if power_of_mean < MIN_SHARE_OF_POWER * power_of_all:  # quick, and seldom true
        powers = np.square(channels).sum(axis=0)
        if power_of_mean < MIN_SHARE_OF_POWER * powers.max():
            return channels[:, powers.argmax()]
    return mean


def resample(waveform: np.ndarray, rate_in_hz: float) -> np.ndarray:
    """(n_samples,) at 16 kHz."""
    if rate_in_hz == SAMPLE_RATE_IN_HZ:
        return waveform
    return soxr.resample(waveform, rate_in_hz, SAMPLE_RATE_IN_HZ)


def log_mel(waveform: np.ndarray, mel_filters: np.ndarray, max_frames: int) -> torch.Tensor:
    """Log-mel spectrogram of the real frames only, (n_mels, n_frames) float32.

    These are WhisperFeatureExtractor's first n_frames (largest difference 1.2e-7); its other frames
    are one constant, see `pad_features`.
    waveform: (n_samples,) float32 at 16 kHz; mel_filters: (201, n_mels); max_frames: of the window.
    Source: openai/whisper, audio.py, log_mel_spectrogram; transformers,
    feature_extraction_whisper.py.
    """
    audio, num_frames = padded_samples(waveform, max_frames)
    stft = torch.stft(
        torch.from_numpy(audio),
        n_fft=FFT_LENGTH_IN_SAMPLES,
        hop_length=HOP_LENGTH_IN_SAMPLES,
        window=HANN_WINDOW,
        center=False,
        return_complex=True,
    )
    stft = stft[:, :num_frames]
    # Five times as fast as a sum over the last dimension.
    power = stft.real.square() + stft.imag.square()
    mel = torch.from_numpy(mel_filters).to(torch.float32).T @ power
    log_spectrogram = mel.clamp_(min=1e-10).log10_()
    floor = float(log_spectrogram.max()) - DYNAMIC_RANGE
    return log_spectrogram.clamp_(min=floor).add_(4.0).div_(4.0)


def padded_samples(waveform: np.ndarray, max_frames: int) -> tuple[np.ndarray, int]:
    """(samples for an STFT without padding of its own, number of frames that see the clip).

    Zeros follow as the library pads, but only as many as the last frames can see, and both ends are
    reflected. In numpy, which keeps the GIL for such short work; torch would release it in each
    small operation, and then wait for it.
    """
    window_in_samples = max_frames * HOP_LENGTH_IN_SAMPLES
    half = FFT_LENGTH_IN_SAMPLES // 2
    num_samples = min(len(waveform), window_in_samples)
    num_frames = min(max_frames, math.ceil((num_samples + half) / HOP_LENGTH_IN_SAMPLES))
    length = min(num_samples + 2 * FFT_LENGTH_IN_SAMPLES, window_in_samples)
    audio = np.zeros(length + 2 * half, np.float32)
    audio[half : half + num_samples] = waveform[:num_samples]
    audio[:half] = audio[2 * half : half : -1]
    audio[-half:] = audio[-half - 2 : -2 * half - 2 : -1]
    return audio, num_frames


def pad_features(frames: torch.Tensor, frame_counts: list[int], window: int) -> torch.Tensor:
    """Clips laid end to end, (n_mels, sum of frame_counts), as (batch, n_mels, window).

    On the device of the frames. The padding is what the library computes for digital silence: as
    far below the clip's loudest value as Whisper's range goes, but never below silence itself.
    """
    clips = frames.split(frame_counts, dim=1)
    batch = frames.new_empty((len(clips), frames.shape[0], window))
    for row, clip in zip(batch, clips, strict=True):
        num_frames = clip.shape[1]
        row[:, :num_frames] = clip
        row[:, num_frames:] = (clip.max() - SCALED_DYNAMIC_RANGE).clamp(min=SILENCE)
    return batch
