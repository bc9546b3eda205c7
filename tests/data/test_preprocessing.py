"""Preprocessor: which rows are rejected, and why."""

from pathlib import Path

import numpy as np
import pytest

from speech_finetuning.base.rejections import Rejection
from speech_finetuning.cli import demonstration
from speech_finetuning.data.shards import SourceRow


@pytest.mark.parametrize(
    ("seconds", "limits", "reason"),
    [
        (4.0, {}, None),
        (4.1, {}, "audio_too_long"),  # the window of the tiny model
        (2.1, {"max_duration_in_seconds": 2.0}, "audio_too_long"),
        (0.4, {"min_duration_in_seconds": 0.5}, "audio_too_short"),
        (0.5, {"min_duration_in_seconds": 0.5}, None),
        (0.05, {}, None),
    ],
)
def test_duration_filters_and_never_cuts(
    preprocessor, seconds: float, limits: dict, reason: str | None
):
    for name, value in limits.items():
        setattr(preprocessor, name, value)
    clip = np.random.default_rng(0).normal(0, 0.1, round(16_000 * seconds))
    result = preprocessor(
        SourceRow(id="r", audio={"bytes": demonstration.encode(clip), "path": None}, text="uno")
    )
    assert (result.reason if isinstance(result, Rejection) else None) == reason
    if reason is None:
        assert result["duration"] == pytest.approx(seconds)


def test_text_is_checked_before_audio_is_decoded(preprocessor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("speech_finetuning.data.preprocessing.decode_audio", pytest.fail)
    for text, reason in (
        (None, "text_empty"),
        ("  \n", "text_empty"),
        ("uno " * 40, "label_too_long"),
    ):
        assert (
            preprocessor(SourceRow(id="r", audio={"bytes": b"x", "path": None}, text=text)).reason
            == reason
        )


def test_an_empty_text_is_trained_where_it_says_that_nobody_speaks(preprocessor):
    clip = {"bytes": demonstration.encode(np.full(16_000, 0.001)), "path": None}
    preprocessor.keeps_empty_text = True
    preprocessor.do_remove_punctuation = True
    for text in (None, "", " \n\u200b"):
        row = preprocessor(SourceRow(id="r", audio=clip, text=text))
        assert row["text"] == ""
        tokens = preprocessor.tokenizer.convert_ids_to_tokens(row["labels"])
        assert tokens[-2:] == ["<|notimestamps|>", "<|endoftext|>"] and len(tokens) == 5
    # Of this nothing is left, but it is not known to be silence.
    assert preprocessor(SourceRow(id="r", audio=clip, text="...")).reason == "text_empty"
    assert preprocessor(SourceRow(id="r")).reason == "row_unreadable"


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"", "audio_empty", ""),
        (demonstration.encode(np.ones(1), "WAV", 48_000), "audio_empty", "no samples"),
        (b"this is not audio" * 20, "audio_unreadable", "text, not audio"),
        (b"\x81\x82" * 20, "audio_unreadable", "Format not recognised"),
        (demonstration.encode(np.zeros(0), "WAV"), "audio_empty", "no samples"),
        (
            demonstration.encode(np.random.default_rng(0).normal(0, 0.1, 16_000))[:4_000],
            "audio_unreadable",
            "",
        ),
        (b"\0\0\0\x20ftypM4A " + bytes(64), "audio_unreadable", "ffmpeg -i IN.m4a"),
        (b"\x1aE\xdf\xa3" + bytes(64), "audio_unreadable", "ffmpeg -i IN.webm"),
    ],
)
def test_bad_audio_is_rejected_with_a_reason(preprocessor, data: bytes, reason: str, detail: str):
    row = SourceRow(id="a row", audio={"bytes": data, "path": None}, text="uno")
    descriptors = Path("/proc/self/fd")  # of Linux, where a clip has one
    before = len(list(descriptors.glob("*")))
    rejection = preprocessor(row)
    assert isinstance(rejection, Rejection)
    assert (rejection.reason, rejection.row) == (reason, "a row") and detail in rejection.detail
    assert len(list(descriptors.glob("*"))) == before
