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
FRAMES_PER_POSITION = (
    2  # the encoder's second convolution halves the frames; 20 ms, a timestamp's step
)
HANN_WINDOW = torch.hann_window(FFT_LENGTH_IN_SAMPLES)
SILENCE = -1.5  # log-mel of digital silence: (log10(1e-10) + 4) / 4


def read_audio(value: str | dict[str, Any] | None) -> bytes:
    """The bytes of an undecoded audio cell: itself, or the file at its path (local, hf:// or any fsspec address).
    Raises: Rejection if the file is missing or empty."""
    cell = {"path": value, "bytes": None} if isinstance(value, str) else (value or {})
    data, path = cell.get("bytes"), cell.get("path")
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
    """The bytes as an open file; on Linux a descriptor in memory. From a BytesIO libsndfile would call Python some 490
    times for an mp3 clip, each time needing the GIL (benchmarks/data_pipeline.md)."""
    if not hasattr(os, "memfd_create") or len(data) > 2**30:  # one write takes 2 GiB at most
        return io.BytesIO(data)
    descriptor = os.memfd_create("audio")
    os.pwrite(descriptor, data, 0)
    return descriptor


def decode_audio(
    data: bytes, check_duration: Callable[[float], None], speed: float = 1.0
) -> tuple[np.ndarray, int]:
    """An encoded file as (n_samples,) float32 in [-1, 1], mono, 16 kHz; and the sampling rate in Hz that it had.
    check_duration gets the seconds that the header states, before anything is decoded. speed: of playing it, which
    changes its pitch as well (speed perturbation, Ko et al., Interspeech 2015).
    soundfile reads wav, flac, ogg, opus and mp3 from memory; soxr resamples, as it does for librosa.resample, whose
    first call would import numba and scipy: a second, and 300 MB of two processes (benchmarks/data_pipeline.md).
    Raises: Rejection if the file is damaged, empty or holds numbers that are not finite."""
    try:
        with soundfile.SoundFile(
            audio_file(data)
        ) as clip:  # closes the file, also one that it cannot open
            sampling_rate = rate = clip.samplerate
            check_duration(clip.frames / sampling_rate)
            with contextlib.suppress(
                Rejection
            ):  # a clip that would leave the limits keeps its speed
                check_duration(clip.frames / sampling_rate / speed)
                rate = sampling_rate * speed
            waveform = clip.read(dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        kind = "m4a" if data[4:8] == b"ftyp" else "webm" if data[:4] == b"\x1aE\xdf\xa3" else None
        advice = (
            f"{kind} is not supported: convert with ffmpeg -i IN.{kind} -ar 16000 -ac 1 OUT.flac"
        )
        raise Rejection(
            "audio_unreadable", advice if kind else one_line(error.error_string)
        ) from error
    mono = waveform.mean(axis=1) if waveform.shape[1] > 1 else waveform[:, 0]
    if rate != SAMPLE_RATE_IN_HZ:
        mono = soxr.resample(mono, rate, SAMPLE_RATE_IN_HZ)
    if not np.isfinite(mono).all():
        raise Rejection("audio_not_finite", "NaN or infinite samples")
    if len(mono) == 0:  # one sample at 48 kHz is none at 16
        raise Rejection("audio_empty", "no samples")
    return np.ascontiguousarray(mono, dtype=np.float32), sampling_rate


def log_mel(waveform: np.ndarray, mel_filters: np.ndarray, max_frames: int) -> torch.Tensor:
    """Log-mel spectrogram of the real frames only, (n_mels, n_frames) float32: WhisperFeatureExtractor's first
    n_frames (largest difference 1.2e-7); the frames after them are one constant, see `pad_features`.
    waveform: (n_samples,) float32 at 16 kHz; mel_filters: (201, n_mels); max_frames: the model's window.
    Source: openai/whisper, audio.py, log_mel_spectrogram; transformers, feature_extraction_whisper.py."""
    window_in_samples = max_frames * HOP_LENGTH_IN_SAMPLES
    num_samples, half = min(len(waveform), window_in_samples), FFT_LENGTH_IN_SAMPLES // 2
    num_frames = min(max_frames, math.ceil((num_samples + half) / HOP_LENGTH_IN_SAMPLES))
    # Zeros as the library pads, as many as the last frames can see, then its reflection at both ends. In numpy, which
    # keeps the GIL for such short work: each small operation of torch would give it away.
    audio = np.zeros(
        min(num_samples + 2 * FFT_LENGTH_IN_SAMPLES, window_in_samples) + 2 * half, np.float32
    )
    audio[half : half + num_samples] = waveform[:num_samples]
    audio[:half], audio[-half:] = audio[2 * half : half : -1], audio[-half - 2 : -2 * half - 2 : -1]
    how = {"window": HANN_WINDOW, "center": False, "return_complex": True}
    stft = torch.stft(torch.from_numpy(audio), FFT_LENGTH_IN_SAMPLES, HOP_LENGTH_IN_SAMPLES, **how)[
        :, :num_frames
    ]
    power = (
        stft.real.square() + stft.imag.square()
    )  # five times as fast as a sum over the last dimension
    log_spectrogram = (
        (torch.from_numpy(mel_filters).to(torch.float32).T @ power).clamp_(min=1e-10).log10_()
    )
    return log_spectrogram.clamp_(min=float(log_spectrogram.max()) - 8.0).add_(4.0).div_(4.0)


def pad_features(frames: torch.Tensor, frame_counts: list[int], window: int) -> torch.Tensor:
    """Clips laid end to end, (n_mels, sum of frame_counts), as (batch, n_mels, window) on the same device.
    The padding is what the library computes for digital silence: 8 (that is 2 after scaling) below the clip's loudest
    value, but never below silence itself."""
    clips = frames.split(frame_counts, dim=1)
    batch = frames.new_empty((len(clips), frames.shape[0], window))
    for row, clip in zip(batch, clips, strict=True):
        row[:, : clip.shape[1]] = clip
        row[:, clip.shape[1] :] = (clip.max() - 2.0).clamp(min=SILENCE)
    return batch
