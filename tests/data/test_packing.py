"""Utterances joined to windows, timestamps, and what a trained model makes of them."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError
from speech_finetuning.cli import demonstration
from speech_finetuning.data.audio import log_mel
from speech_finetuning.data.items import StreamItem
from speech_finetuning.data.packing import (
    MarkedText,
    Utterance,
    UtterancePacker,
    build_packer,
    join_features,
    pack_utterances,
)
from speech_finetuning.data.positions import StreamPosition
from speech_finetuning.data.preprocessing import Preprocessor, SpeechDataset
from speech_finetuning.data.sources import load_source

Train = Callable[[str], dict[str, float]]
PREFIX = ["<|startoftranscript|>", "<|es|>", "<|transcribe|>"]


def make_utterance(seconds: float, text_ids: tuple[int, ...] = (7, 8), **more: Any) -> Utterance:
    text = MarkedText(start=0, end=round(50 * seconds), text_ids=list(text_ids))
    values = {"features": torch.empty(80, 0), "labels": [], "row": 1, "texts": [text]} | more
    return Utterance(duration_in_seconds=seconds, **values)


@pytest.mark.parametrize("loudness", [(1.0, 1.0, 1.0), (1.0, 1e-3, 0.1), (1e-4, 1.0, 1e-2)])
def test_joined_features_are_those_of_the_joined_waveforms(loudness: tuple[float, ...]):
    extractor, generator = WhisperFeatureExtractor(), np.random.default_rng(0)
    lengths = [16_000, 12_345, 9_601]
    waveforms = [
        (gain * generator.normal(0, 0.1, n)).astype(np.float32)
        for gain, n in zip(loudness, lengths, strict=True)
    ]
    clips = [
        make_utterance(len(w) / 16_000, features=log_mel(w, extractor.mel_filters, 3000))
        for w in waveforms
    ]
    joined = join_features(clips)
    padded = [np.pad(waveform, (0, -len(waveform) % 320)) for waveform in waveforms]
    whole = log_mel(np.concatenate(padded), extractor.mel_filters, 3000)[:, : joined.shape[1]]
    starts = list(itertools.accumulate(len(waveform) // 160 for waveform in padded))
    assert joined.shape == whole.shape == (80, starts[-1])
    is_beside_joint = np.zeros(joined.shape[1], bool)
    for start in starts:
        is_beside_joint[max(0, start - 4) : start + 2] = True
    assert (joined - whole)[:, ~is_beside_joint].abs().max() < 1e-5
    assert is_beside_joint.sum() <= 16


def test_packs_keep_order_and_lose_nothing():
    generator = np.random.default_rng(0)
    clips = [
        make_utterance(s, (7,) * n)
        for s, n in zip(generator.uniform(0.1, 30, 300), range(300), strict=True)
    ]
    packs = pack_utterances(clips, 3000, 445)
    assert [clip for pack in packs for clip in pack] == clips
    for pack, following in itertools.pairwise(packs):
        num_frames = sum(clip.num_joined_frames() for clip in pack)
        num_labels = sum(len(clip.text_ids()) + 2 for clip in pack)
        assert num_frames <= 3000 and num_labels <= 445
        first = following[0]
        is_full = num_frames + first.num_joined_frames() > 3000
        is_full |= num_labels + len(first.text_ids()) + 2 > 445
        assert is_full  # else it would have fitted
    assert len(packs) < 0.8 * len(clips)


def sizes_of_packs(utterance: Utterance, count: int, max_tokens: int = 445) -> list[int]:
    return [len(pack) for pack in pack_utterances([utterance] * count, 3000, max_tokens)]


def test_a_pack_ends_before_the_window_or_the_decoder_does():
    assert sizes_of_packs(make_utterance(10.0), 4) == [3, 1]
    assert sizes_of_packs(make_utterance(10.01), 4) == [2, 2]
    assert sizes_of_packs(make_utterance(1.0, (7,) * 8), 4, max_tokens=29) == [2, 2]
    assert sizes_of_packs(make_utterance(30.0), 2) == [1, 1]


def make_item(row: int, source: int, example: dict) -> StreamItem:
    position = StreamPosition(row=row, sources=(), last_source=source)
    return StreamItem(position=position, example=example)


@pytest.fixture
def items(preprocessor: Preprocessor) -> list[StreamItem]:
    """Eight utterances of 1 s of two sources, as the stream delivers them."""
    cells = [
        {
            "bytes": demonstration.encode(np.random.default_rng(i).normal(0, 0.1, 15_990)),
            "path": None,
        }
        for i in range(8)
    ]
    words = "uno dos tres cinco seis diez ocho once".split()
    rows = [
        {"id": word, **preprocessor.prepare(cell, word)}
        for cell, word in zip(cells, words, strict=True)
    ]
    return [make_item(i + 1, i % 2, row) for i, row in enumerate(rows)]


def windows_of(
    preprocessor: Preprocessor, items: list[StreamItem], separator: str = " ", **changes: Any
) -> list[str]:
    """The decoded labels of every window."""
    tokenizer = preprocessor.tokenizer
    packer = UtterancePacker(
        tokenizers=[tokenizer] * 2,
        separators=[separator] * 2,
        window_in_frames=400,
        max_label_length=preprocessor.max_label_length,
        packs_utterances=changes.get("packs_utterances", True),
        timestamp_probability=changes.get("timestamp_probability", 0.0),
        seed=changes.get("seed", 1),
    )
    windows = packer(items)
    for window in windows:
        assert (
            window["features"].shape[1] <= 400
            and len(window["labels"]) - 1 <= preprocessor.max_label_length
        )
    return [tokenizer.decode(window["labels"], decode_with_timestamps=True) for window in windows]


def test_texts_of_a_pack_are_joined_within_a_source(
    preprocessor: Preprocessor, items: list[StreamItem]
):
    prefix = "".join(PREFIX) + "<|notimestamps|>"
    found = windows_of(preprocessor, items)
    assert found == [
        f"{prefix}uno tres seis ocho<|endoftext|>",
        f"{prefix}dos cinco diez once<|endoftext|>",
    ]
    found = windows_of(preprocessor, items, "")
    assert found == [
        f"{prefix}unotresseisocho<|endoftext|>",
        f"{prefix}doscincodiezonce<|endoftext|>",
    ]


@pytest.mark.parametrize(
    ("languages", "separators"), [(["es", "ja"], [" ", ""]), (["en", None], [" ", " "])]
)
def test_texts_are_separated_as_their_language_is_written(
    preprocessor: Preprocessor, speech: Path, languages: list[str | None], separators: list[str]
):
    source = load_source(str(speech), split="train")
    sets = (SpeechDataset(source=source, preprocessor=preprocessor),) * 2
    settings = {"written_languages": languages, "seed": 1}
    packer = build_packer(sets, packs_utterances=True, timestamp_probability=0.0, **settings)
    assert packer.separators == separators
    packer = build_packer(sets, packs_utterances=False, timestamp_probability=0.1, **settings)
    assert packer.separators == separators and not packer.packs_utterances
    assert build_packer(sets, packs_utterances=False, timestamp_probability=0.0, **settings) is None


@pytest.mark.parametrize(("task", "separator"), [("transcribe", ""), ("translate", " ")])
def test_a_translation_is_written_in_english(flags: list[str], task: str, separator: str):
    words = f"--do_train --max_steps 1 --language ja --pack_utterances --task {task}".split()
    collator = script.build_job([*flags, *words], None).trainer.data_collator
    assert collator.packer.separators == [separator]


def test_timestamps_stand_at_every_joint(preprocessor: Preprocessor, items: list[StreamItem]):
    first, second = windows_of(preprocessor, items, timestamp_probability=1.0)
    middle = "<|0.00|> uno<|1.00|><|1.00|> tres<|2.00|><|2.00|> seis<|3.00|><|3.00|> ocho<|4.00|>"
    assert first == "".join(PREFIX) + middle + "<|endoftext|>"
    assert second.startswith("".join(PREFIX) + "<|0.00|> dos<|1.00|>")
    rows = [make_item(number, 0, items[0].example) for number in range(1, 401)]
    packs = windows_of(preprocessor, rows, timestamp_probability=0.5)
    joints = [text.count("<|1.00|><|1.00|>") + text.count("<|3.00|><|3.00|>") for text in packs]
    assert len(packs) == 100 and set(joints) == {0, 2} and 70 < sum(joints) < 130


def test_single_utterances_have_timestamps_with_the_probability(
    preprocessor: Preprocessor, items: list[StreamItem]
):
    rows = [make_item(number, 0, items[0].example) for number in range(1, 401)]
    texts = windows_of(preprocessor, rows, packs_utterances=False, timestamp_probability=0.25)
    marked = [
        text for text in texts if text == "".join(PREFIX) + "<|0.00|> uno<|1.00|><|endoftext|>"
    ]
    plain = [text for text in texts if text == "".join(PREFIX) + "<|notimestamps|>uno<|endoftext|>"]
    assert len(marked) + len(plain) == 400 and 75 < len(marked) < 125
    again = windows_of(preprocessor, rows[200:], packs_utterances=False, timestamp_probability=0.25)
    assert again == texts[200:]  # drawn by the row, so that a continued run draws alike
    assert (
        windows_of(preprocessor, rows, packs_utterances=False, timestamp_probability=0.25, seed=2)
        != texts
    )


def test_a_text_that_fills_the_decoder_goes_without_timestamps(
    preprocessor: Preprocessor, items: list[StreamItem]
):
    longest = (
        preprocessor.max_label_length - 3
    )  # without them three tokens and the end would still fit
    example = items[0].example | {
        "text": "a" * longest,
        "labels": preprocessor.tokenizer("a" * (longest - 1)).input_ids,
    }
    (text,) = windows_of(preprocessor, [make_item(1, 0, example)], timestamp_probability=1.0)
    assert "<|notimestamps|>" in text


def test_packs_fill_windows_and_leave_rows_and_steps_as_they_are(train: Train, tmp_path: Path):
    figures = {}
    for name, more in {
        "plain": "",
        "packed": "--pack_utterances --timestamp_probability 0.5",
    }.items():
        words = f"--do_train --do_eval --max_steps 6 --per_device_train_batch_size 8 {more} --output_dir"
        assert train(f"{words} {tmp_path / name}")["eval_num_rows"] == 8  # those are not packed
        state = json.loads((tmp_path / name / "checkpoint-6" / "stream_state.json").read_text())
        history = json.loads((tmp_path / name / "checkpoint-6" / "trainer_state.json").read_text())[
            "log_history"
        ]
        figures[name] = (
            state,
            np.mean([line["padding_fraction"] for line in history if "padding_fraction" in line]),
        )
    plain, packed = figures["plain"][0], figures["packed"][0]
    assert (
        packed["position"] == plain["position"]
        and packed["position"]["row"] == packed["counts"]["num_rows"] == 48
    )
    assert packed["counts"]["audio_in_seconds"] == plain["counts"]["audio_in_seconds"]
    assert figures["packed"][1] < 0.8 * figures["plain"][1]


@pytest.mark.parametrize(("more", "is_grouped"), [("", True), ("--pack_utterances", False)])
def test_packs_are_of_the_plain_order(flags: list[str], more: str, is_grouped: bool):
    words = f"--do_train --max_steps 1 --train_window longest {more}".split()
    stream = script.build_job([*flags, *words], None).trainer.train_dataset
    assert stream.is_grouped_by_length == is_grouped


@pytest.mark.parametrize(
    "flag", ["--pack_utterances", "--timestamp_probability 0.5", "--train_window longest"]
)
def test_what_concerns_training_only_needs_training(train: Train, flag: str):
    with pytest.raises(UserError, match=f"{flag.split()[0]}: of no effect without --do_train"):
        train(f"--do_eval {flag}")


@pytest.mark.slow
def test_a_model_trained_on_packs_has_true_timestamps_and_transcribes_a_minute(
    tmp_path: Path, train: Train
):
    model = demonstration.make_model(tmp_path / "model", max_target_positions=96)
    speech = make_short_speech(tmp_path / "speech", 1500)
    minute = write_minute(tmp_path / "minute")
    common = f"--per_device_train_batch_size 16 --logging_steps 100 --model_name_or_path {model}"
    scoring = f"--do_eval --long_form --eval_split_name test --dataset_name {minute} --generation_max_length 90"
    before = train(f"{common} {scoring} --output_dir {tmp_path / 'before'}")
    output = tmp_path / "trained"
    flags = "--do_train --max_steps 380 --learning_rate 3e-3 --warmup_steps 40 --save_steps 380"
    flags += " --pack_utterances --timestamp_probability 0.5"
    train(f"{common} {flags} --dataset_name {speech} --output_dir {output}")
    after = train(
        f"{common} {scoring} --model_name_or_path {output} --output_dir {tmp_path / 'after'}"
    )
    assert after["eval_wer"] < 60 < before["eval_wer"]
    off_in_seconds = [off for seed in range(8) for off in timestamps_off(output, seed)]
    assert off_in_seconds[::3] == [0] * 8 and np.median(off_in_seconds[1::3]) < 0.1


def say(generator: np.random.Generator, max_words: int) -> tuple[np.ndarray, list[str]]:
    """An utterance with a pause at its end, so that the border of two can be heard; whole encoder
    positions long."""
    words = [
        str(word)
        for word in generator.choice(demonstration.WORDS, size=generator.integers(1, max_words + 1))
    ]
    clip = demonstration.speak(words, generator)
    return np.pad(clip, (0, 6_400 - len(clip) % 320)), words


def make_short_speech(folder: Path, num_rows: int) -> Path:
    generator = np.random.default_rng(1)
    pairs = [say(generator, 2) for _ in range(num_rows)]
    rows = [(demonstration.encode(clip), " ".join(words)) for clip, words in pairs]
    demonstration.write_parquet(folder / "train-00000-of-00001.parquet", rows)
    return folder


def write_minute(folder: Path) -> Path:
    """One file of 60 s, and its text in a manifest."""
    generator, waveforms, words = np.random.default_rng(5), [], []
    while sum(map(len, waveforms)) < 60 * 16_000:
        clip, said = say(generator, 2)
        waveforms, words = [*waveforms, clip], words + said
    folder.mkdir()
    soundfile.write(folder / "0.flac", np.concatenate(waveforms), 16_000)
    (folder / "test.csv").write_text(f"path,text\n0.flac,{' '.join(words)}\n")
    return folder


def timestamps_off(folder: Path, seed: int) -> list[float]:
    """Three utterances in one window, transcribed with timestamps: how far the first three of
    these, the start and the first joint, are from the true ones, in seconds. The rest are of a
    model that has learned for half a minute."""
    generator = np.random.default_rng(100 + seed)
    clips = [say(generator, 1)[0] for _ in range(3)]
    joint = len(clips[0]) / 16_000
    processor = WhisperProcessor.from_pretrained(folder)
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    features = processor(
        np.concatenate(clips), sampling_rate=16_000, return_tensors="pt"
    ).input_features
    ids = model.generate(
        features, language="es", task="transcribe", return_timestamps=True, max_new_tokens=60
    )[0]
    first = model.generation_config.no_timestamps_token_id + 1
    found = [0.02 * (token - first) for token in ids.tolist() if token >= first]
    assert found == sorted(found)
    return [abs(there - true) for there, true in zip(found[:3], (0, joint, joint), strict=True)]


def test_where_nobody_speaks_no_text_and_no_pair_of_timestamps_is_trained(preprocessor):
    tokenizer = preprocessor.tokenizer
    packer = UtterancePacker(
        tokenizers=[tokenizer],
        separators=[" "],
        window_in_frames=400,
        max_label_length=64,
        packs_utterances=True,
        timestamp_probability=0.0,
        seed=0,
    )
    silence = make_utterance(1.0, (), labels=tokenizer("").input_ids, features=torch.zeros(80, 100))
    speech = make_utterance(
        1.0,
        tuple(packer.text_ids("uno", 0)),
        labels=tokenizer("uno").input_ids,
        features=torch.zeros(80, 100),
    )
    assert packer.text_ids("", 0) == []
    prefix = tokenizer.convert_ids_to_tokens(tokenizer.prefix_tokens)
    end = "<|endoftext|>"

    def tokens(pack: list[Utterance]) -> list[str]:
        return tokenizer.convert_ids_to_tokens(packer.join(pack, tokenizer)["labels"])

    assert tokens([silence]) == tokens([silence, silence]) == [*prefix, end]
    assert tokens([silence, speech]) == tokens([speech, silence]) == tokens([speech])
    packer.timestamp_probability = 1.0
    assert tokens([silence, silence]) == [*prefix[:-1], "<|0.00|>", end]
    text = tokenizer.convert_ids_to_tokens(speech.text_ids())
    assert tokens([silence, speech]) == [*prefix[:-1], "<|1.00|>", *text, "<|2.00|>", end]
