"""Neighbours of one recording: each utterance in one window, with its true times and pauses."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rows import outcomes, read_rows

from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.audio import SAMPLE_RATE_IN_HZ, log_mel
from speech_finetuning.data.items import StreamItem
from speech_finetuning.data.listed import (
    ListedClip,
    TimedText,
    WindowLimits,
    estimated_tokens,
    join_neighbours,
)
from speech_finetuning.data.packing import UtterancePacker
from speech_finetuning.data.positions import StreamPosition
from speech_finetuning.data.segments import Segment
from speech_finetuning.data.sources import load_source

LIMITS = WindowLimits(seconds=10.0, num_tokens=100)


def clip(start: float, end: float, text: str = "uno", audio: str = "a.wav", **more) -> ListedClip:
    segment = Segment(start_in_seconds=start, duration_in_seconds=end - start)
    return ListedClip(place=f"{start}", audio=audio, text=text, segment=segment, **more)


def texts_of(windows: list[ListedClip]) -> list[list[str]]:
    return [
        [one.text for one in window.window.texts] if window.window else [window.text or ""]
        for window in windows
    ]


def test_neighbours_share_windows_with_their_pauses():
    clips = [clip(3.0, 5.0, "a"), clip(5.5, 6.0, "b"), clip(8.0, 13.0, "c"), clip(13.5, 15.0, "d")]
    first, second = join_neighbours(clips, LIMITS)
    assert (first.segment, first.text) == (
        Segment(start_in_seconds=3.0, duration_in_seconds=10.0),
        "a b c",
    )
    assert first.window is not None and first.window.cut_in_seconds is None
    assert first.window.texts == (
        TimedText(start_in_seconds=0.0, end_in_seconds=2.0, text="a"),
        TimedText(start_in_seconds=2.5, end_in_seconds=3.0, text="b"),
        TimedText(start_in_seconds=5.0, end_in_seconds=10.0, text="c"),
    )
    assert (second.window, second.start()) == (None, 13.5)


def test_what_the_window_cuts_off_has_its_start_and_begins_the_next():
    clips = [clip(0.0, 4.0, "a"), clip(4.5, 9.0, "b"), clip(9.5, 12.0, "c"), clip(12.0, 13.0, "d")]
    first, second = join_neighbours(clips, LIMITS)
    assert first.segment == Segment(start_in_seconds=0.0, duration_in_seconds=10.0)
    assert first.window is not None and first.window.cut_in_seconds == 9.5
    assert texts_of([first, second]) == [["a", "b"], ["c", "d"]]
    assert second.segment == Segment(start_in_seconds=9.5, duration_in_seconds=3.5)


def test_a_single_one_that_is_followed_by_a_cut_one_says_so():
    (first, second) = join_neighbours([clip(0, 6, "a"), clip(7, 14, "b")], LIMITS)
    assert first.window is not None and first.window.cut_in_seconds == 7
    assert second.window is None and second.text == "b"


@pytest.mark.parametrize(
    "second",
    [
        clip(2.0, 3.0, audio="b.wav"),
        clip(6.0, 7.0),  # after a long pause
        clip(0.5, 2.5),  # at the same time
        clip(0.0, 1.0),  # out of order
        clip(1.5, 3.0, text=" "),
        clip(1.5, 3.0, text="<|endoftext|>"),
        clip(1.5, 3.0, text="\ufffd"),
        clip(1.5, 3.0, problem="no times"),
        clip(1.5, 30.0),  # too long for any window
        ListedClip(place="x", audio="a.wav", text="whole"),
        ListedClip(place="x", audio="a.wav", text="rest", segment=Segment(start_in_seconds=1.5)),
    ],
)
def test_others_stay_alone_and_cost_no_neighbour(second: ListedClip):
    clips = [clip(0.0, 1.5, "a"), second, clip(31.0, 32.0, "z")]
    assert list(join_neighbours(clips, LIMITS)) == clips


def test_a_window_has_no_more_text_than_the_decoder():
    text = "palabra " * 5
    clips = [clip(i, i + 1.0, text) for i in range(9)]
    windows = list(join_neighbours(clips, LIMITS))
    assert list(itertools.chain(*texts_of(windows))) == [text] * 9
    assert max(map(len, texts_of(windows))) * (estimated_tokens(text) + 2) <= 100
    assert all(window.window is None or window.window.cut_in_seconds is None for window in windows)


def test_every_utterance_is_in_one_window_whatever_the_times():
    generator = np.random.default_rng(0)
    times = np.cumsum(generator.exponential(1.5, 2_000))
    clips = [
        clip(float(start), float(end), f"t{i}")
        for i, (start, end) in enumerate(zip(times[::2], times[1::2], strict=True))
    ]
    windows = list(join_neighbours(clips, LIMITS))
    assert list(itertools.chain(*texts_of(windows))) == [one.text for one in clips]
    assert len(windows) < 0.5 * len(clips)
    for window, following in itertools.pairwise(windows):
        if window.window is not None and window.window.cut_in_seconds is not None:
            start = window.start() + window.window.cut_in_seconds
            assert following.start() == pytest.approx(start)
        else:
            assert window.end() <= following.start() + 1e-6 or following.audio != window.audio


# ---- from a table to labels ----
@pytest.fixture
def talk(tmp_path: Path) -> Path:
    """Ten seconds, with utterances at 1 to 2, 2.5 to 3, and 4.2 to 6 s, and one that is not
    there."""
    samples = np.random.default_rng(0).normal(0, 0.1, 160_000)
    soundfile.write(tmp_path / "talk.flac", samples, 16_000)
    lines = ["path,start,end,text"]
    lines += ["talk.flac,1.0,2.0,Uno.", "talk.flac,2.5,3.0,...", "talk.flac,3.0,3.5,dos"]
    lines += ["talk.flac,4.2,6.0,tres", "talk.flac,8.0,12.0,gone"]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    return tmp_path


def windows_of(talk: Path, preprocessor, probability: float, **changes) -> list[dict]:
    """Of the whole table in one micro-batch."""
    for name, value in changes.items():
        setattr(preprocessor, name, value)
    source = load_source(
        str(talk), split="train", window_limits=preprocessor.window_limits(frozenset())
    )
    examples = [preprocessor(row) for row in read_rows(source)]
    items = [
        StreamItem(
            position=StreamPosition(row=row, sources=(), last_source=0), example=dict(example)
        )
        for row, example in enumerate(examples, start=1)
        if not isinstance(example, Rejection)
    ]
    packer = UtterancePacker(
        tokenizers=[preprocessor.tokenizer],
        separators=[" "],
        window_in_frames=preprocessor.window_in_frames,
        max_label_length=preprocessor.max_label_length,
        packs_utterances=True,
        timestamp_probability=probability,
        seed=1,
    )
    return packer(items)


def test_a_table_of_segments_has_true_timestamps(talk: Path, preprocessor):
    """The model's window is of 4 s: the third utterance is cut off by its end."""
    first, second = windows_of(talk, preprocessor, 1.0)
    decode = preprocessor.tokenizer.decode
    prefix = "<|startoftranscript|><|es|><|transcribe|>"
    texts = "<|0.00|> Uno.<|1.00|><|1.50|> ...<|2.00|><|2.00|> dos<|2.50|><|3.20|>"
    assert decode(first["labels"], decode_with_timestamps=True) == f"{prefix}{texts}<|endoftext|>"
    assert decode(second["labels"], decode_with_timestamps=True) == (
        f"{prefix}<|0.00|> tres<|1.80|><|endoftext|>"
    )
    samples, _ = soundfile.read(talk / "talk.flac", dtype="float32")
    span = samples[SAMPLE_RATE_IN_HZ : round(4.98 * SAMPLE_RATE_IN_HZ)]
    expected = log_mel(span, preprocessor.mel_filters, 400)[:, :398]
    assert (first["features"] - expected).abs().max() < 1e-5  # the pauses are those of the talk


def test_without_timestamps_a_window_ends_with_its_last_whole_text(talk: Path, preprocessor):
    first, second = windows_of(talk, preprocessor, 0.0)
    text = preprocessor.tokenizer.decode(first["labels"], skip_special_tokens=True)
    assert text == "Uno. ... dos" and first["features"].shape[1] == 250
    assert 180 <= second["features"].shape[1] <= 182


def test_texts_of_a_window_are_normalised_one_by_one(talk: Path, preprocessor):
    first, _ = windows_of(talk, preprocessor, 1.0, do_lower_case=True, do_remove_punctuation=True)
    text = preprocessor.tokenizer.decode(first["labels"], decode_with_timestamps=True)
    assert "<|0.00|> uno<|1.00|><|2.00|> dos<|2.50|><|3.20|>" in text


def test_a_segment_outside_its_recording_costs_no_neighbour(talk: Path, preprocessor):
    source = load_source(
        str(talk), split="train", window_limits=preprocessor.window_limits(frozenset())
    )
    assert source.num_rows == 3
    assert outcomes(source, preprocessor) == ["Uno. ... dos", "tres", "segment_outside_audio"]
    (row, *_) = read_rows(source)
    assert row.id.endswith("talk.flac#1.0-4.98")


def test_no_window_goes_on_across_a_row_that_is_excluded(talk: Path, preprocessor):
    """As bash run.sh check names it: by the utterance."""
    utterances = read_rows(load_source(str(talk), split="train"))
    (excluded,) = [row.id for row in utterances if row.id.endswith("talk.flac#2.5-3.0")]
    limits = preprocessor.window_limits(frozenset([excluded]))
    rows = read_rows(load_source(str(talk), split="train", window_limits=limits))
    texts = [row.text for row in rows if row.rejection is None]
    assert texts[:3] == ["Uno.", "...", "dos tres"] and rows[1].id == excluded


def test_an_end_beyond_the_recording_costs_no_neighbour(talk: Path, preprocessor):
    lines = ["path,start,end,text", "talk.flac,8.0,9.5,uno", "talk.flac,9.6,10.5,dos"]
    (talk / "train.csv").write_text("\n".join(lines))
    source = load_source(
        str(talk), split="train", window_limits=preprocessor.window_limits(frozenset())
    )
    assert outcomes(source, preprocessor) == ["uno", "segment_outside_audio"]


def test_times_follow_the_speed(talk: Path, preprocessor):
    source = load_source(
        str(talk), split="train", window_limits=preprocessor.window_limits(frozenset())
    )
    row = read_rows(source)[0]
    window = preprocessor(row, 1.1)["window"]
    assert window.cut_in_seconds == pytest.approx(3.2 / 1.1, abs=1e-3)
    assert window.texts[1].start_in_seconds == pytest.approx(1.5 / 1.1, abs=1e-3)
