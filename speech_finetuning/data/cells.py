"""Audio cells: the forms in which data sets hold a clip, and the files that a cell may name."""

import io
import math
import os
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Any

import numpy as np
import soundfile

from speech_finetuning.base.rejections import Rejection

ARCHIVE = re.compile(r"(zip|tar|gzip|bz2|xz|lz4|zstd)://")  # before "::", as fsspec chains them
MAX_CHANNELS = 8
UNSIGNED_ZERO = 128  # silence, where samples of 8 bits have no sign

AudioCell = str | dict[str, Any] | None  # a path, or {"bytes", "path"}


def undecoded_cell(value: Any, sampling_rate: Any = None) -> AudioCell:
    """A data set's audio as a path or {"bytes", "path"}.

    value: that; bytes; {"array", "sampling_rate"}; or a list of one of these.
    sampling_rate: in Hz, where the value is a list of samples.
    Raises: Rejection(row_unreadable) for anything else.
    """
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, Mapping):
        return cell_of_struct(value)
    if isinstance(value, list | np.ndarray):
        if sampling_rate is not None:
            return {"bytes": encode_samples(value, sampling_rate), "path": None}
        if len(value) == 1:
            return undecoded_cell(value[0])
        raise Rejection("row_unreadable", f"expected one audio, found a list of {len(value)}")
    if value is None or isinstance(value, str):
        return value
    raise Rejection("row_unreadable", f"expected audio, found {type(value).__name__}")


def cell_of_struct(struct: Mapping[str, Any]) -> AudioCell:
    """Of {"bytes", "path"}, or of samples, as `datasets` before 4.0 decoded audio to."""
    if struct.get("bytes") is None and struct.get("array") is not None:
        data = encode_samples(struct["array"], struct.get("sampling_rate"))
        return {"bytes": data, "path": struct.get("path")}
    return {"bytes": struct.get("bytes"), "path": struct.get("path")}


def encode_samples(samples: Any, sampling_rate: Any) -> bytes:
    """A WAV file of (n_samples,), (n_channels, n_samples) or (n_samples, n_channels).

    Raises: Rejection(row_unreadable).
    """
    try:
        waveform = np.asarray(samples)
        rate_in_hz = int(sampling_rate)
        if waveform.ndim == 2 and waveform.shape[0] <= MAX_CHANNELS < waveform.shape[1]:
            waveform = waveform.T
        is_integer = np.issubdtype(waveform.dtype, np.integer)
        if is_integer:
            check_are_16_bits(waveform)
        waveform = waveform.astype(np.int16 if is_integer else np.float32)
        file = io.BytesIO()
        subtype = "PCM_16" if is_integer else "FLOAT"
        soundfile.write(file, waveform, rate_in_hz, format="WAV", subtype=subtype)
    except (TypeError, ValueError, soundfile.LibsndfileError) as error:
        detail = f"samples with the sampling rate {sampling_rate}: {error}"
        raise Rejection("row_unreadable", detail) from error
    return file.getvalue()


def check_are_16_bits(samples: np.ndarray) -> None:
    """Raises: ValueError for integers of another width, which is not known: noise if it is
    guessed."""
    if samples.size == 0:
        return
    low, high = int(samples.min()), int(samples.max())
    if max(-low - 1, high) > np.iinfo(np.int16).max:
        raise ValueError(
            f"integers from {low} to {high} are more than 16 bits. Write floats from -1 to 1"
        )
    if low >= 0 and high > UNSIGNED_ZERO and high <= np.iinfo(np.uint8).max:
        if abs(float(samples.mean()) - UNSIGNED_ZERO) < UNSIGNED_ZERO / 4:
            raise ValueError(
                f"integers from {low} to {high} look like unsigned 8 bits. Write floats from -1 to 1"
            )


def path_of(cell: AudioCell) -> str:
    """Empty if the cell names no file."""
    path = cell.get("path") if isinstance(cell, dict) else cell
    return path or ""


def check_path(cell: AudioCell, *, root: str, folder: str, allow_urls: bool) -> AudioCell:
    """The cell of a data set from the Hub, if what it names is the data set's own file.

    A data set is written by strangers. It could name any file that its user can read, whose
    transcript would then be trained on and perhaps published.
    root: where the data set's files are, at its revision (hf://datasets/ID@COMMIT, or a downloaded
    snapshot). folder: in it, what relative paths start from.
    allow_urls: whether the user lets it name https:// addresses.
    Raises: Rejection(audio_outside_dataset).
    """
    path = path_of(cell)
    if not path or (isinstance(cell, dict) and cell["bytes"] is not None):
        return cell
    if allow_urls and path.startswith(("https://", "http://")) and "::" not in path:
        return path
    *archives, place = path.split("::")
    if is_relative(place):
        place = f"{folder}/{place}"
    is_inside = place.startswith(f"{root}/") and all(map(ARCHIVE.match, archives))
    if not is_inside or ".." in re.split(r"[/\\]", urllib.parse.unquote(place)):
        detail = f"{path}: a data set from the Hub may name only files of its own repository"
        if not root.startswith("hf://") and "://" in root:
            detail = f"{path}: a list at an address may name only files of {root}"
        if path.startswith(("https://", "http://")):
            detail += ". --allow_audio_urls permits addresses"
        raise Rejection("audio_outside_dataset", detail)
    return "::".join([*archives, place])


def is_relative(path: str) -> bool:
    has_drive_or_root = os.path.isabs(path) or PureWindowsPath(path).anchor != ""
    return "://" not in path and not has_drive_or_root


def is_missing(value: Any) -> bool:
    """None, an empty cell, or the NaN that pandas writes for one."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def shown(value: Any) -> str:
    """A value of another type in a message, not too long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
