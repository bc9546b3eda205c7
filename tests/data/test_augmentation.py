"""Noise, rooms, the telephone and gain: right in size, and the same whatever the threads."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError
from speech_finetuning.data import noise
from speech_finetuning.data.audio import SAMPLE_RATE_IN_HZ
from speech_finetuning.data.augmentation import (
    Augmenter,
    add_noise,
    convolve,
    excerpt,
    mu_law,
    power_of,
    reverberate,
    size_of_transform,
    telephone,
)
from speech_finetuning.data.noise import load_augmenter
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.sources import load_source
from speech_finetuning.data.stream import SpeechStream
from speech_finetuning.sharing.public import public_stream_state


def make_waveform(seed: int, num_samples: int = 16_000, peak: float = 0.3) -> np.ndarray:
    waveform = np.random.default_rng(seed).normal(0, 0.1, num_samples)
    return (waveform / np.abs(waveform).max() * peak).astype(np.float32)


def tone(frequency_in_hz: float, num_samples: int = 16_000) -> np.ndarray:
    times = np.arange(num_samples) / SAMPLE_RATE_IN_HZ
    return (0.3 * np.sin(2 * np.pi * frequency_in_hz * times)).astype(np.float32)


def write_noise(folder: Path, num_files: int = 3) -> Path:
    """Recordings of a quarter to three quarters of a second at 8 kHz."""
    folder.mkdir()
    for number in range(num_files):
        recording = make_waveform(number, 2_000 * (number % 3 + 1))
        soundfile.write(folder / f"noise{number}.wav", recording, 8_000)
    return folder


# --------------------------------------------------------------------------------- the sounds


@pytest.mark.parametrize("snr_in_db", [-5.0, 0.0, 12.3, 40.0])
def test_the_ratio_of_speech_to_noise_is_right(snr_in_db: float):
    speech = make_waveform(0)
    mixed = add_noise(speech, make_waveform(1, peak=0.01), snr_in_db)
    found = 10 * np.log10(power_of(speech) / power_of(mixed - speech))
    assert found == pytest.approx(snr_in_db, abs=0.1)
    assert mixed.dtype == np.float32


def test_silence_gets_no_noise_and_gives_none():
    speech = make_waveform(0)
    silence = np.zeros_like(speech)
    assert np.array_equal(add_noise(speech, silence, 0.0), speech)
    assert np.array_equal(add_noise(silence, speech, 0.0), silence)
    assert np.array_equal(reverberate(silence, make_waveform(1, 50)), silence)


@pytest.mark.parametrize("num_samples", [1, 999, 2_000, 2_001, 7_000])
def test_an_excerpt_has_the_clips_length_and_goes_on_from_the_beginning(num_samples: int):
    recording = np.arange(1, 2_001, dtype=np.int16)
    piece = np.round(excerpt(recording, num_samples, np.random.default_rng(3)) * 2**15)
    assert len(piece) == num_samples
    steps = np.diff(piece)
    assert set(steps) <= {1.0, -1_999.0}
    assert (-1_999.0 in steps) == (num_samples > 2_000)


@pytest.mark.parametrize(("num_samples", "length"), [(1, 1), (5, 7), (16_000, 4_001)])
def test_a_convolution_is_numpys(num_samples: int, length: int):
    waveform = make_waveform(0, num_samples)
    response = make_waveform(1, length)
    expected = np.convolve(np.float64(waveform), np.float64(response))
    found = convolve(waveform, response)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()


def test_a_transform_has_a_size_that_is_fast_and_hardly_larger():
    for num_samples in (1, 2, 7, 1_000, 160_001, 479_999):
        size = size_of_transform(num_samples)
        assert num_samples <= size <= 1.12 * num_samples + 1
        for factor in (2, 3, 5):
            while size % factor == 0:
                size //= factor
        assert size == 1


def test_a_room_keeps_time_and_power():
    """The direct sound is where it was, although the response begins with a pause."""
    speech = np.zeros(8_000, np.float32)
    speech[2_000] = 0.5
    response = np.zeros(3_000, np.float32)
    response[700] = 1.0
    response[1_500] = 0.5  # an echo
    heard = reverberate(speech, response)
    assert len(heard) == len(speech) and power_of(heard) == pytest.approx(power_of(speech))
    assert list(np.flatnonzero(np.abs(heard) > 1e-3)) == [2_000, 2_800]
    assert heard[2_800] / heard[2_000] == pytest.approx(0.5, abs=1e-5)


def test_a_telephone_passes_speech_and_nothing_below_or_above():
    for frequency, is_heard in ((100, False), (1_000, True), (3_000, True), (5_000, False)):
        sent = tone(frequency)
        received = telephone(sent)
        share = power_of(received) / power_of(sent)
        assert len(received) == len(sent) and received.dtype == np.float32
        assert share > 0.9 if is_heard else share < 0.01, frequency


def test_mu_law_has_as_many_levels_as_g711_and_is_fine_where_it_is_soft():
    samples = np.linspace(-1, 1, 100_001)
    sent = mu_law(samples)
    assert len(np.unique(sent)) == 255
    assert np.abs(sent - samples).max() < 0.025
    soft = np.abs(samples) < 0.01
    assert np.abs(sent - samples)[soft].max() < 0.001


# ----------------------------------------------------------------------------------- the draw


def make_augmenter(**changes: object) -> Augmenter:
    recordings = [(make_waveform(n, 5_000) * 2**15).astype(np.int16) for n in range(3)]
    response = np.exp(-np.arange(2_000) / 300).astype(np.float32) * make_waveform(5, 2_000)
    response[10] = 1.0
    full = Augmenter(
        rooms=[response],
        room_probability=0.5,
        noises=recordings,
        noise_probability=0.5,
        snr_in_db=(0.0, 10.0),
        telephone_probability=0.3,
        gain_in_db=(-10.0, 20.0),
    )
    return replace(full, **changes)


def test_a_row_sounds_the_same_each_time_and_other_rows_do_not():
    augmenter = make_augmenter()
    speech = make_waveform(9)
    heard = [augmenter(speech, (1, row)) for row in range(40)]
    assert all(np.array_equal(one, augmenter(speech, (1, row))) for row, one in enumerate(heard))
    assert len({one.tobytes() for one in heard}) == 40
    assert not np.array_equal(heard[3], augmenter(speech, (2, 3)))
    assert all(len(one) == len(speech) and np.abs(one).max() <= 1.0 for one in heard)
    assert all(one.dtype == np.float32 for one in heard)


def test_what_is_added_changes_no_other_draw():
    """The same rows have noise, the same noise, with the telephone and without."""
    speech = make_waveform(9)
    noisy = make_augmenter(rooms=[], telephone_probability=0.0, gain_in_db=None)
    louder = replace(noisy, gain_in_db=(-6.0, -6.0))
    for row in range(20):
        expected = noisy(speech, (1, row)) * np.float32(10 ** (-6 / 20))
        assert np.array_equal(louder(speech, (1, row)), expected)


def test_the_shares_are_those_that_were_asked_for():
    speech = make_waveform(9, 2_000)
    for changes in (
        {"rooms": [], "telephone_probability": 0.0},
        {"noises": [], "telephone_probability": 0.0},
    ):
        augmenter = make_augmenter(gain_in_db=None, **changes)
        changed = [not np.array_equal(augmenter(speech, (1, row)), speech) for row in range(600)]
        assert 0.43 < np.mean(changed) < 0.57


def test_who_has_noise_does_not_decide_who_has_the_telephone():
    speech = make_waveform(9, 2_000)
    noisy = make_augmenter(rooms=[], telephone_probability=0.0, gain_in_db=None)
    called = make_augmenter(rooms=[], noises=[], telephone_probability=0.5, gain_in_db=None)
    has_noise, has_telephone = (
        np.array([not np.array_equal(one(speech, (1, row)), speech) for row in range(600)])
        for one in (noisy, called)
    )
    assert 0.18 < np.mean(has_noise & has_telephone) < 0.32


def test_nothing_happens_with_probability_0():
    speech = make_waveform(9)
    idle = make_augmenter(
        room_probability=0.0, noise_probability=0.0, telephone_probability=0.0, gain_in_db=None
    )
    assert idle(speech, (1, 1)) is speech


# ---------------------------------------------------------------------------------- the stream


def test_threads_and_position_change_no_row(speech: Path, preprocessor):
    """The rows after a position are, to the bit, those of the stream without interruption."""
    source = load_source(str(speech), split="train")
    stream = SpeechStream(
        sets=(SpeechDataset(source, preprocessor),),
        seed=1,
        block_size=10,
        micro_batch_size=2,
        num_threads=1,
        augmenter=make_augmenter(),
    )
    items = list(itertools.islice(stream, 50))
    parallel = list(itertools.islice(replace(stream, num_threads=4), 50))
    rest = list(itertools.islice(replace(stream, position=items[20].position), 29))
    plain = list(itertools.islice(replace(stream, augmenter=None), 50))
    for others, ours in ((parallel, items), (rest, items[21:])):
        for other, one in zip(others, ours, strict=True):
            assert other.example["id"] == one.example["id"]
            assert other.example["features"].equal(one.example["features"])
    assert [item.example["id"] for item in plain] == [item.example["id"] for item in items]
    assert [item.example["duration"] for item in plain] == [
        item.example["duration"] for item in items
    ]
    is_same = [
        one.example["features"].equal(other.example["features"])
        for one, other in zip(items, plain, strict=True)
    ]
    assert not any(is_same)  # each has another gain
    first_time = {item.example["id"]: item.example for item in items[:40]}
    for item in items[40:]:  # of the second pass
        assert not item.example["features"].equal(first_time[item.example["id"]]["features"])


# ----------------------------------------------------------------------------- the recordings


def arguments(**changes: object) -> script.DataArguments:
    return script.DataArguments(**changes)


def test_a_folder_of_noise_is_read_and_what_cannot_be_used_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = write_noise(tmp_path / "noise")
    (folder / "broken.wav").write_bytes(b"RIFF nothing else")
    soundfile.write(folder / "silent.wav", np.zeros(8_000), 16_000)
    soundfile.write(folder / "short.wav", make_waveform(0, 100), 16_000)
    caplog.set_level("INFO", "speech_finetuning")
    augmenter = load_augmenter(arguments(noise_dataset=str(folder)), cache_dir=None)
    assert augmenter is not None and augmenter.snr_in_db == (5.0, 20.0)
    assert sorted(map(len, augmenter.noises)) == [4_000, 8_000, 12_000]
    assert all(np.abs(one).max() == 2**15 - 1 for one in augmenter.noises)
    assert "noise: 3 recordings, 0.0 minutes" in caplog.text
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "--noise_dataset: left out" in warning
    for reason in ("audio_unreadable", "audio_empty", "audio_too_short"):
        assert reason in warning


def test_of_many_or_long_recordings_a_share_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(noise, "MOST_RECORDINGS", 4)
    monkeypatch.setattr(noise, "NOISE_IN_SECONDS", 1.0)
    monkeypatch.setattr(noise, "SHORTEST_SHARE_IN_SECONDS", 0.1)
    folder = write_noise(tmp_path / "noise", num_files=9)
    augmenter = load_augmenter(arguments(noise_dataset=str(folder)), cache_dir=None)
    assert augmenter is not None
    assert [len(one) for one in augmenter.noises] == [4_000] * 3  # every third, a quarter second


def test_rooms_are_read_as_they_are(tmp_path: Path):
    (tmp_path / "rooms").mkdir()
    response = np.exp(-np.arange(4_000) / 500) * 0.5
    soundfile.write(tmp_path / "rooms" / "hall.flac", response, 16_000)
    augmenter = load_augmenter(arguments(room_dataset=str(tmp_path / "rooms")), cache_dir=None)
    assert augmenter is not None
    (room,) = augmenter.rooms
    assert room.dtype == np.float32 and np.abs(room - response).max() < 1e-4


def test_a_folder_without_usable_noise_is_an_error(tmp_path: Path):
    (tmp_path / "noise").mkdir()
    soundfile.write(tmp_path / "noise" / "silent.wav", np.zeros(8_000), 16_000)
    with pytest.raises(UserError) as error:
        load_augmenter(arguments(noise_dataset=str(tmp_path / "noise")), cache_dir=None)
    assert "no usable recording: 1 audio_empty" in str(error.value) or (
        "no usable recording: audio_empty" in str(error.value)
    )
    assert "Name a folder of audio files" in str(error.value)


def test_all_that_cannot_be_opened_is_told_by_the_flag_that_named_it(tmp_path: Path):
    names = {"noise_dataset": str(tmp_path / "nose"), "room_dataset": str(tmp_path / "romm")}
    with pytest.raises(UserError) as error:
        load_augmenter(arguments(**names), cache_dir=None)
    first, second = error.value.args
    assert first.startswith(f"--noise_dataset {tmp_path}/nose: does not exist")
    assert second.startswith(f"--room_dataset {tmp_path}/romm: does not exist")


def test_no_flag_no_augmenter():
    assert load_augmenter(arguments(), cache_dir=None) is None


# -------------------------------------------------------------------------------------- the run


def test_a_run_in_noise_continues_exactly_and_keeps_the_path_to_itself(
    tmp_path: Path, train: Callable
):
    folder = write_noise(tmp_path / "secret noise")
    more = "--do_train --max_steps 4 --save_steps 2 --telephone_probability 0.2 --gain_in_db -6 6"
    flags = [*more.split(), "--noise_dataset", str(folder), "--noise_snr_in_db", "0", "10"]
    base = train.args[0]
    whole = tmp_path / "whole"
    script.main([*base, *flags, "--output_dir", str(whole)])
    again = tmp_path / "again"
    again.mkdir()
    for name in ("checkpoint-2", "run_info.json"):
        (again / name).symlink_to(whole / name)
    script.main([*base, *flags, "--output_dir", str(again)])
    ours, theirs = (
        (path / "checkpoint-4" / "model.safetensors").read_bytes() for path in (whole, again)
    )
    assert ours == theirs
    state = json.loads((whole / "checkpoint-4" / "stream_state.json").read_text())
    assert state["settings"]["--noise_snr_in_db"] == [0.0, 10.0]
    for text in (json.dumps(public_stream_state(state, [], [])), (whole / "README.md").read_text()):
        assert "telephone_probability" in text and "secret" not in text
    plain = tmp_path / "plain"
    script.main([*base, "--do_train", "--max_steps", "4", "--output_dir", str(plain)])
    assert (plain / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()


def test_scores_are_of_the_clips_as_they_are(tmp_path: Path, train: Callable):
    folder = write_noise(tmp_path / "noise")
    flags = f"--do_train --do_eval --eval_before_training --max_steps 1 --noise_dataset {folder}"
    noisy = train(f"{flags} --output_dir {tmp_path / 'noisy'}")
    plain = train("--do_train --do_eval --eval_before_training --max_steps 1")
    assert noisy["zero_shot_loss"] == plain["zero_shot_loss"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--noise_probability 0.3", "--noise_probability: of no effect without --noise_dataset."),
        ("--noise_snr_in_db 0 5", "--noise_snr_in_db: of no effect without --noise_dataset."),
        ("--room_probability 0.3", "--room_probability: of no effect without --room_dataset."),
        (
            "--noise_dataset n --noise_probability 0",
            "--noise_dataset: of no effect with --noise_probability 0.",
        ),
        (
            "--noise_dataset n --noise_snr_in_db 20 5",
            "--noise_snr_in_db 20 5: pass two numbers, the lower one first",
        ),
        ("--gain_in_db 5", "--gain_in_db 5: pass two numbers, the lower one first"),
        ("--telephone_probability 2", "--telephone_probability 2: must lie between 0 and 1."),
    ],
)
def test_flags_without_effect_are_refused(flags: str, message: str):
    words = "--model_name_or_path m --dataset_name d --output_dir o --do_train --max_steps 1"
    with pytest.raises(UserError) as error:
        script.parse_arguments([*words.split(), *flags.split()])
    assert message in str(error.value)


def test_augmentation_without_training_is_refused():
    words = "--model_name_or_path m --dataset_name d --output_dir o --do_eval --gain_in_db 0 5"
    with pytest.raises(UserError, match="--gain_in_db: of no effect without --do_train"):
        script.parse_arguments(words.split())
