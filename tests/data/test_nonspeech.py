"""Training rows in which nobody speaks: of the right number, length and level, and the same whatever
the threads."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rows import read_rows

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.augmentation import Augmenter
from speech_finetuning.data.items import StepInfo
from speech_finetuning.data.noise import load_augmenter
from speech_finetuning.data.nonspeech import at_level, coloured_noise, make_nonspeech
from speech_finetuning.data.packing import build_packer
from speech_finetuning.data.preprocessing import Preprocessor, SpeechDataset
from speech_finetuning.data.sources import load_source
from speech_finetuning.data.stream import SpeechStream

Train = Callable[..., dict[str, float]]


def level_in_db(waveform: np.ndarray) -> float:
    return 10 * np.log10(np.mean(np.square(waveform.astype(np.float64))))


def slope_in_db_per_octave(noise: np.ndarray) -> float:
    """Of the power between 250 Hz and 4 kHz."""
    power = np.abs(np.fft.rfft(noise)) ** 2
    per_hz = len(noise) / 16_000
    low = np.mean(power[round(250 * per_hz) : round(500 * per_hz)])
    high = np.mean(power[round(4_000 * per_hz) : round(8_000 * per_hz)])
    return 10 * np.log10(high / low) / 4


@pytest.mark.parametrize(("colour", "slope"), [(0.0, 0.0), (1.0, -3.0), (2.0, -6.0)])
def test_made_noise_has_its_colour(colour: float, slope: float):
    noise = coloured_noise(160_000, colour, np.random.default_rng(0))
    assert slope_in_db_per_octave(noise) == pytest.approx(slope, abs=0.2)


def test_of_long_brown_noise_as_much_can_be_heard():
    """Nearly all of its power lies low: at 20 Hz in a clip of any length."""
    shares = []
    for num_samples in (16_000, 480_000):
        power = np.abs(np.fft.rfft(coloured_noise(num_samples, 2.0, np.random.default_rng(0)))) ** 2
        shares.append(np.sum(power[num_samples // 160 :]) / np.sum(power))  # above 100 Hz
    assert shares == pytest.approx([0.1, 0.1], abs=0.04)


def test_the_level_is_right():
    noise = coloured_noise(16_000, 1.0, np.random.default_rng(0))
    assert level_in_db(at_level(noise, -40.0)) == pytest.approx(-40.0, abs=0.01)
    assert not np.any(at_level(np.zeros(100, np.float32), -40.0))


def test_a_clip_becomes_noise_or_silence_of_its_length():
    speech = np.random.default_rng(0).normal(0, 0.1, 4_000).astype(np.float32)
    made = [make_nonspeech(speech, [], (1, row)) for row in range(400)]
    assert {len(one) for one in made} == {4_000} and {one.dtype for one in made} == {speech.dtype}
    is_silent = np.array([not np.any(one) for one in made])
    assert 0.05 < np.mean(is_silent) < 0.16
    levels = [level_in_db(one) for one in made if np.any(one)]
    assert -70.1 < min(levels) < -65 and -25 < max(levels) < -19.9
    assert all(np.max(np.abs(one)) <= 1 for one in made)
    assert np.array_equal(made[7], make_nonspeech(speech * 2, [], (1, 7)))
    assert not np.array_equal(made[7][:100], make_nonspeech(speech, [], (2, 7))[:100])
    assert len(make_nonspeech(speech[:0], [], (1, 1))) == 0


def test_recordings_of_noise_are_among_it():
    """A tone that made noise has not: two thirds of the clips have nothing else."""
    times = np.arange(16_000) / 16_000
    recording = np.int16(20_000 * np.sin(2 * np.pi * 1_000 * times))
    clip = np.zeros(8_000, np.float32)
    num_tones = 0
    for row in range(300):
        spectrum = np.abs(np.fft.rfft(make_nonspeech(clip, [recording], (1, row)))) ** 2
        num_tones += spectrum[500] > 0.9 * spectrum.sum() > 0
    assert 0.55 < num_tones / 300 < 0.71


def make_stream(speech: Path, preprocessor: Preprocessor, **options: object) -> SpeechStream:
    source = load_source(str(speech), split="train")
    return SpeechStream(
        sets=(SpeechDataset(source, preprocessor),),
        seed=1,
        block_size=10,
        micro_batch_size=2,
        num_threads=1,
        augmenter=Augmenter(**options),
    )


def test_rows_lose_their_text_and_nothing_else_changes(speech: Path, preprocessor: Preprocessor):
    plain = list(itertools.islice(make_stream(speech, preprocessor), 200))
    stream = make_stream(speech, preprocessor, nonspeech_fraction=0.25)
    items = list(itertools.islice(stream, 200))
    empty = [item.content()["text"] == "" for item in items]
    assert 0.15 < np.mean(empty) < 0.35
    assert StepInfo.of(items).num_nonspeech_rows == sum(empty)
    nothing = [preprocessor.tokenizer.prefix_tokens + [preprocessor.tokenizer.eos_token_id]]
    for item, other, is_empty in zip(items, plain, empty, strict=True):
        one, was = item.content(), other.content()
        assert (one["id"], one["duration"]) == (was["id"], was["duration"])
        assert one["features"].shape == was["features"].shape
        assert one["features"].equal(was["features"]) == (not is_empty)
        assert (one["labels"] in nothing) == is_empty
    parallel = itertools.islice(replace(stream, num_threads=4), 200)
    rest = itertools.islice(replace(stream, position=items[49].position), 150)
    for others, ours in ((parallel, items), (rest, items[50:])):
        for other, one in zip(others, ours, strict=True):
            assert other.content()["labels"] == one.content()["labels"]
            assert other.content()["features"].equal(one.content()["features"])


def test_in_a_pack_with_timestamps_nobody_speaks_there(speech: Path, preprocessor: Preprocessor):
    stream = make_stream(speech, preprocessor, nonspeech_fraction=0.5)
    packer = build_packer(
        stream.sets,
        packs_utterances=True,
        timestamp_probability=1.0,
        written_languages=["es"],
        seed=0,
    )
    assert packer is not None
    items = list(itertools.islice(stream, 12))
    texts = [item.content()["text"] for item in items]
    assert "" in texts
    written = "".join(
        preprocessor.tokenizer.decode(window["labels"], skip_special_tokens=True)
        for window in packer(items)
    )
    assert written.split() == " ".join(texts).split()


def test_neighbours_that_became_noise_have_no_times(tmp_path: Path, preprocessor: Preprocessor):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 32_000), 8_000)
    path = tmp_path / "train.csv"
    path.write_text("audio,text,start,end\na.wav,uno,0,1\na.wav,dos,1.5,2\n")
    limits = preprocessor.window_limits(frozenset())
    (row,) = read_rows(load_source(str(path), split="train", window_limits=limits))
    spoken = preprocessor(row)
    assert not isinstance(spoken, Rejection) and len(spoken["window"].texts) == 2
    silent = preprocessor(row, 1.0, np.zeros_like, is_nonspeech=True)
    assert not isinstance(silent, Rejection) and "window" not in silent
    assert silent["duration"] == spoken["duration"] == 2.0


def test_noise_of_a_data_set_is_used_for_it_alone(tmp_path: Path):
    (tmp_path / "noise").mkdir()
    soundfile.write(
        tmp_path / "noise" / "a.wav", np.random.default_rng(0).normal(0, 0.1, 8000), 8000
    )
    words = ["--noise_dataset", str(tmp_path / "noise"), "--noise_probability", "0"]
    arguments = parse([*words, "--nonspeech_fraction", "0.1"])
    augmenter = load_augmenter(arguments, cache_dir=None)
    assert augmenter is not None and len(augmenter.noises) == 1
    assert (augmenter.noise_probability, augmenter.nonspeech_fraction) == (0, 0.1)
    assert load_augmenter(parse([]), cache_dir=None) is None
    with pytest.raises(UserError, match="of no effect with --noise_probability 0"):
        parse(words)


def parse(words: list[str]) -> script.DataArguments:
    usual = "--model_name_or_path m --dataset_name d --output_dir o --do_train --max_steps 1"
    return script.parse_arguments([*usual.split(), *words])[1]


@pytest.mark.parametrize("fraction", ["-0.1", "0.6"])
def test_a_share_that_cannot_be_is_refused(fraction: str):
    with pytest.raises(UserError, match="--nonspeech_fraction .*: must lie between 0 and 0.5"):
        parse(["--nonspeech_fraction", fraction])


def test_a_run_says_how_many_rows_have_no_speech(train: Train, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    metrics = train("--do_train --max_steps 3 --nonspeech_fraction 0.4")
    assert "no speech: 40 % of the training rows become noise or silence" in caplog.text
    num_made = metrics["train_nonspeech_rows"]
    assert 0 < num_made < metrics["train_rows"]
    assert f"{num_made:.0f} of the training rows became noise or silence" in caplog.text
