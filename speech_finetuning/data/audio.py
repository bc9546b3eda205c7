"""Encoded bytes to mono 16 kHz samples to log-mel frames."""

import contextlib
import io
import math
import os
from collections.abc import Callable
from typing import Any, BinaryIO

import fsspec
import numpy as np
import soundfile
import soxr
import torch

from speech_finetuning.base.errors import one_line
from speech_finetuning.base.rejections import Rejection

SAMPLE_RATE_IN_HZ = 16_000  # every Whisper checkpoint was trained on 16 kHz
HOP_LENGTH_IN_SAMPLES = 160  # 10 ms between two log-mel frames
FFT_LENGTH_IN_SAMPLES = 400  # 25 ms under each frame
# The encoder's second convolution halves the frames: 20 ms a position, the step of timestamps.
FRAMES_PER_POSITION = 2
HANN_WINDOW = torch.hann_window(FFT_LENGTH_IN_SAMPLES)
SILENCE = -1.5  # log-mel of digital silence: (log10(1e-10) + 4) / 4
MAX_BYTES_OF_ONE_WRITE = 2**30  # Linux writes at most 2 GiB in one call


def read_audio(value: str | dict[str, Any] | None) -> bytes:
    """The encoded bytes of an undecoded audio cell.

    value: a path (local, hf:// or any fsspec address), or {"bytes": ..., "path": ...}.
    Raises: Rejection if there are no bytes or no such file; errors of the network.
    """
    cell = {"path": value} if isinstance(value, str) else (value or {})
    data = cell.get("bytes")
    path = cell.get("path")
    if data is None and path:
        try:
            with fsspec.open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError as error:
            raise Rejection("audio_missing", str(path)) from error
    if not data:
        raise Rejection("audio_empty", "no bytes")
    return data


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


def decode_audio(
    data: bytes, check_duration: Callable[[float], None], speed: float = 1.0
) -> tuple[np.ndarray, int]:
    """An encoded file as ((n_samples,) float32 in [-1, 1], mono, 16 kHz; its sampling rate in Hz).

    check_duration: gets the duration in seconds before anything is decoded; may raise Rejection.
    speed: of playing the clip, which changes its pitch as well (speed perturbation, Ko et al.,
    Interspeech 2015). A clip that would leave the limits keeps its own.

    soundfile reads wav, flac, ogg, opus and mp3 from memory. soxr resamples, as it does for
    librosa.resample, whose first call would import numba and scipy: a second, and 300 MB of two
    processes (benchmarks/data_pipeline.md).

    Raises: Rejection if the file is damaged or empty, or contains NaN or infinite samples.
    """
    try:
        # Closes the file, also one that it cannot open.
        with soundfile.SoundFile(audio_file(data)) as clip:
            sampling_rate = clip.samplerate
            rate_as_played = sampling_rate
            check_duration(clip.frames / sampling_rate)
            with contextlib.suppress(Rejection):
                check_duration(clip.frames / sampling_rate / speed)
                rate_as_played = sampling_rate * speed
            channels = clip.read(dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise unreadable(data, error) from error
    waveform = resample(to_mono(channels), rate_as_played)
    if not np.isfinite(waveform).all():
        raise Rejection("audio_not_finite", "NaN or infinite samples")
    if len(waveform) == 0:  # one sample at 48 kHz is none at 16 kHz
        raise Rejection("audio_empty", "no samples")
    return np.ascontiguousarray(waveform, dtype=np.float32), sampling_rate


def unreadable(data: bytes, error: soundfile.LibsndfileError) -> Rejection:
    """What to do about bytes that libsndfile cannot read."""
    container = None
    if data[4:8] == b"ftyp":
        container = "m4a"
    elif data[:4] == b"\x1aE\xdf\xa3":
        container = "webm"
    if container is None:
        return Rejection("audio_unreadable", one_line(error.error_string))
    command = f"ffmpeg -i IN.{container} -ar 16000 -ac 1 OUT.flac"
    return Rejection("audio_unreadable", f"{container} is not supported: convert with {command}")


def to_mono(channels: np.ndarray) -> np.ndarray:
    """(n_samples,) the mean of (n_samples, n_channels)."""
    if channels.shape[1] == 1:
        return channels[:, 0]
    return channels.mean(axis=1)


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
    floor = float(log_spectrogram.max()) - 8.0
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

    On the device of the frames. The padding is what the library computes for digital silence: 8
    (2 after scaling) below the clip's loudest value, but never below silence itself.
    """
    clips = frames.split(frame_counts, dim=1)
    batch = frames.new_empty((len(clips), frames.shape[0], window))
    for row, clip in zip(batch, clips, strict=True):
        num_frames = clip.shape[1]
        row[:, :num_frames] = clip
        row[:, num_frames:] = (clip.max() - 2.0).clamp(min=SILENCE)
    return batch
