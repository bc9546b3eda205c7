"""Which files the rows of a data set from the Hub may name, and the forms in which audio comes."""

import numpy as np
import pytest

from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.audio import decode_audio
from speech_finetuning.data.cells import check_path, encode_samples

ROOT = "hf://datasets/alice/speech@0123abc"


def checked(path: str, allow_urls: bool = False) -> str:
    return check_path(path, root=ROOT, folder=f"{ROOT}/train", allow_urls=allow_urls)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("0.wav", f"{ROOT}/train/0.wav"),
        ("clips/0.wav", f"{ROOT}/train/clips/0.wav"),
        ("~/0.wav", f"{ROOT}/train/~/0.wav"),
        (f"{ROOT}/test/0.wav", f"{ROOT}/test/0.wav"),
        (f"zip://0.wav::{ROOT}/data.zip", f"zip://0.wav::{ROOT}/data.zip"),
    ],
)
def test_files_of_the_own_repository(path: str, place: str):
    assert checked(path) == place


@pytest.mark.parametrize(
    "path",
    [
        "/home/alice/0.wav",
        "C:\\0.wav",
        "\\\\server\\share\\0.wav",
        "../0.wav",
        "clips/../../0.wav",
        "clips\\..\\..\\0.wav",
        "%2e%2e/0.wav",
        "file:///home/alice/0.wav",
        "local:///home/alice/0.wav",
        "memory://0.wav",
        "hf://datasets/bob/private/0.wav",
        "hf://datasets/alice/speech@main/0.wav",
        f"{ROOT}4/0.wav",
        f"{ROOT}/../../bob/private/0.wav",
        f"{ROOT}/0.wav::file:///home/alice/0.wav",
        f"simplecache::{ROOT}/0.wav",
        "zip://0.wav::file:///home/alice/0.zip",
        "https://example.org/0.wav",
        "/dev/zero",
    ],
)
def test_nothing_else(path: str):
    with pytest.raises(Rejection) as rejection:
        checked(path)
    assert rejection.value.reason == "audio_outside_dataset" and path in rejection.value.detail


def test_addresses_only_if_the_user_allows_them():
    assert checked("https://example.org/0.wav", allow_urls=True) == "https://example.org/0.wav"
    with pytest.raises(Rejection):
        checked("https://example.org/0.wav::file:///etc/passwd", allow_urls=True)
    with pytest.raises(Rejection):
        checked("/etc/passwd", allow_urls=True)


def test_a_cell_with_bytes_may_be_named_as_it_likes():
    cell = {"bytes": b"RIFF", "path": "/home/alice/0.wav"}
    assert check_path(cell, root=ROOT, folder=ROOT, allow_urls=False) is cell


@pytest.mark.parametrize("shape", [(1600,), (2, 1600), (1600, 2)])
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int16])
def test_samples_are_decoded_as_they_are(shape: tuple[int, ...], kind: type):
    samples = np.full(shape, 0.25 if kind != np.int16 else 8192).astype(kind)
    waveform, rate = decode_audio(encode_samples(samples.tolist(), 16_000), lambda seconds: None)
    assert rate == 16_000 and waveform.shape == (1600,) and np.allclose(waveform, 0.25)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([2**30, -(2**30)] * 8, "more than 16 bits"),
        ([2**22, -(2**22)] * 8, "more than 16 bits"),
        ([128, 140, 116, 128] * 8, "unsigned 8 bits"),
    ],
)
def test_integers_of_another_width_are_not_guessed(samples: list[int], message: str):
    """They would be cut to 16 bits, which is noise."""
    with pytest.raises(Rejection) as rejection:
        encode_samples(samples, 16_000)
    assert message in rejection.value.detail
    assert encode_samples([-32_768, 32_767] * 8, 16_000)
    assert encode_samples([0, 3, 1, 200] * 8, 16_000)  # soft, and by chance above 0


@pytest.mark.parametrize(("samples", "rate"), [([0.1], None), (["a"], 16_000), ([[[0.1]]], 16_000)])
def test_samples_that_are_none_are_rejected(samples: list, rate: int | None):
    with pytest.raises(Rejection) as rejection:
        encode_samples(samples, rate)
    assert rejection.value.reason == "row_unreadable"
