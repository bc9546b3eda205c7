"""Neighbours of one recording in parquet files: the windows that a list of the same rows has, in an
exact order, and never across two row groups."""

import functools
import itertools
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from rows import outcomes, read_rows

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.data.hold_out import choose_rows, load_or_hold_out
from speech_finetuning.data.listed import WindowLimits
from speech_finetuning.data.passes import RankShare
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.selection import select_rows
from speech_finetuning.data.shards import ShardReader
from speech_finetuning.data.sources import SpeechSource, load_source
from speech_finetuning.data.stream import SpeechStream

LIMITS = WindowLimits(seconds=3.5, num_tokens=60)
Row = dict[str, Any]


def write_recording(path: Path, seconds: float) -> bytes:
    samples = np.random.default_rng(0).normal(0, 0.1, round(16_000 * seconds))
    soundfile.write(path, samples, 16_000)
    return path.read_bytes()


def rows_of(name: str, seconds: int) -> list[Row]:
    """An utterance of 0.8 s in each second."""
    return [
        {"audio": name, "text": f"{name[0]}{second}", "start": float(second), "end": second + 0.8}
        for second in range(seconds)
    ]


def write_parquet(path: Path, rows: list[Row], row_group_size: int = 100) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """Two files of the utterances of four recordings, in row groups of ten; some share none."""
    folder = tmp_path / "talks"
    folder.mkdir()
    rows = []
    for name, seconds in {"a.wav": 12, "b.wav": 7, "c.wav": 3, "d.wav": 15}.items():
        write_recording(folder / name, seconds)
        rows += rows_of(name, seconds)
    rows[3]["text"] = None
    rows[8]["start"] = -1.0
    write_parquet(folder / "train-00000-of-00002.parquet", rows[:25], row_group_size=10)
    write_parquet(folder / "train-00001-of-00002.parquet", rows[25:], row_group_size=10)
    return folder


def load(folder: Path, limits: WindowLimits | None = LIMITS) -> SpeechSource:
    return load_source(str(folder), split="train", window_limits=limits)


def names_of(rows: list) -> list[str]:
    return [row.id.rpartition("/")[2] for row in rows]


def make_stream(source: SpeechSource, preprocessor, **changes: object) -> SpeechStream:
    settings = {"seed": 1, "block_size": 5, "micro_batch_size": 2, "num_threads": 2}
    return SpeechStream(sets=(SpeechDataset(source, preprocessor),), **{**settings, **changes})


# ---- which rows share a window ----
def test_windows_are_those_of_a_list_of_the_same_rows(tmp_path: Path):
    write_recording(tmp_path / "a.wav", 20)
    write_recording(tmp_path / "b.wav", 4)
    rows = [*rows_of("a.wav", 9), *rows_of("b.wav", 4), *rows_of("a.wav", 20)[14:]]
    lists = tmp_path / "lists"
    lists.mkdir()
    lines = [json.dumps(row | {"audio": f"../{row['audio']}"}) for row in rows]
    (lists / "train.jsonl").write_text("\n".join(lines))
    write_parquet(tmp_path / "train.parquet", rows)
    found = load(tmp_path)
    listed = load(lists)
    assert found.num_rows == listed.num_rows < len(rows)
    expected = [(row.text, row.segment, row.window) for row in read_rows(listed)]
    assert [(row.text, row.segment, row.window) for row in read_rows(found)] == expected
    assert any(window is not None and window.cut_in_seconds for *_, window in expected)


def test_no_window_goes_on_from_one_row_group_into_the_next(talks: Path, preprocessor):
    """A row without a text, and one with times that cannot be, stay alone and cost no neighbour."""
    source = load(talks)
    rows = read_rows(source)
    assert source.row_groups == ((6, 5, 2), (4, 1))
    assert source.num_rows == len(rows) == 18
    groups = ["a0 a1 a2", None, "a4 a5 a6", "a7", "a8", "a9"]
    groups += ["a10 a11", "b0 b1 b2", "b3 b4 b5", "b6", "c0"]
    groups += ["c1 c2", "d0 d1 d2"]
    groups += ["d3 d4 d5", "d6 d7 d8", "d9 d10 d11", "d12"]
    groups += ["d13 d14"]
    assert [row.text for row in rows] == groups
    expected = ["text_empty" if text is None else text for text in groups]
    expected[4] = "segment_outside_audio"
    assert outcomes(source, preprocessor) == expected


def test_a_window_is_read_from_anywhere_in_its_group(talks: Path):
    source = load(talks)
    whole = read_rows(source)
    for number in range(12):
        reader = ShardReader(source, (0, 0), num_rows=number, wait_in_seconds=1)
        assert list(reader) == whole[number:13]
    for number in range(5):
        reader = ShardReader(source, (0, 0), num_rows=number, wait_in_seconds=1, row_group=1)
        assert list(reader) == whole[6 + number : 11]


def test_recordings_within_rows_are_known_by_their_names(tmp_path: Path, preprocessor):
    data = {name: write_recording(tmp_path / name, 5) for name in ("a.wav", "b.wav")}
    rows = [*rows_of("a.wav", 3), *rows_of("b.wav", 3)]
    for row in rows:
        row["audio"] = {"bytes": data[row["audio"]], "path": row["audio"]}
    rows += [row | {"audio": {"bytes": data["b.wav"], "path": None}} for row in rows_of("c", 2)]
    write_parquet(tmp_path / "train.parquet", rows)
    source = load(tmp_path)
    assert outcomes(source, preprocessor) == ["a0 a1 a2", "b0 b1 b2", "c0", "c1"]
    unjoined = names_of(read_rows(load(tmp_path, None)))
    assert names_of(read_rows(source))[2:] == unjoined[6:] == ["row-6#0.0-0.8", "row-7#1.0-1.8"]


def test_different_recordings_of_one_name_are_not_trained_as_one(tmp_path: Path, preprocessor):
    data = [write_recording(tmp_path / "a.wav", seconds) for seconds in (4, 5)]
    rows = rows_of("audio.wav", 2)
    for row, audio in zip(rows, data, strict=True):
        row["audio"] = {"bytes": audio, "path": "audio.wav"}
    write_parquet(tmp_path / "train.parquet", rows)
    assert outcomes(load(tmp_path), preprocessor) == ["row_unreadable"]


def test_no_window_goes_on_across_a_row_that_is_excluded(talks: Path):
    (excluded,) = [row.id for row in read_rows(load(talks, None)) if row.text == "d4"]
    limits = replace(LIMITS, excluded_clips=frozenset([excluded.split("/", 3)[-1]]))
    rows = read_rows(load(talks, limits))
    texts = [row.text for row in rows]
    assert texts[13:16] == ["d3", "d4", "d5 d6 d7"] and rows[14].id == excluded


def test_clips_without_times_and_older_orders_stay_rows(talks: Path, tmp_path: Path, preprocessor):
    assert preprocessor.window_limits(frozenset()).joins_parquet
    older = preprocessor.window_limits(frozenset(), 2)
    assert not older.joins_parquet
    assert load(talks, older).row_groups == ((10, 10, 5), (10, 2))
    clips = [{"audio": str(talks / "c.wav"), "text": "c"}] * 3
    (tmp_path / "clips").mkdir()
    write_parquet(tmp_path / "clips" / "train.parquet", clips)
    assert load(tmp_path / "clips").row_groups == ((3,),)


def test_of_a_damaged_row_group_no_window_is_guessed(talks: Path):
    file = talks / "train-00000-of-00002.parquet"
    data = file.read_bytes()
    start = pq.ParquetFile(file).metadata.row_group(1).column(0).dictionary_page_offset
    file.write_bytes(data[:start] + bytes(600) + data[start + 600 :])
    source = load(talks)
    assert source.row_groups is not None and source.row_groups[0][:2] == (6, 10)
    reasons = [row.rejection and row.rejection.reason for row in read_rows(source)]
    assert reasons[:6] == [None] * 6 and "file_damaged" in reasons


def test_a_run_that_goes_on_keeps_its_rows(talks: Path, flags: list[str], preprocessor):
    """As its checkpoint says: windows would be other rows, in another order."""
    words = "--do_train --max_steps 1 --pack_utterances --timestamp_probability 0.5 --dataset_name"
    _, data_args, training_args = script.parse_arguments([*flags, *words.split(), str(talks)])
    counts = []
    for changes in ({}, {"order_version": 2}):
        (record,) = script.data_records(data_args)
        records = [replace(record, **changes)]
        speech = script.load_speech(records, [preprocessor], training_args, None)
        counts.append(speech["train"][0].rows_per_pass())
    assert counts == [15, 37]


# ---- their order ----
def test_the_order_is_exact_and_continues_anywhere(talks: Path, preprocessor):
    source = pickle.loads(pickle.dumps(load(talks)))  # as a worker gets it
    stream = make_stream(source, preprocessor)
    positions = [item.position for item in itertools.islice(stream, 40)]
    ids = list(map(id_of, itertools.islice(stream, 45)))
    passes = [ids[:18], ids[18:36]]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(row.id for row in read_rows(source))
    assert passes[0] != passes[1]
    for seen in range(1, 40, 3):
        rest = itertools.islice(replace(stream, position=positions[seen - 1]), 5)
        assert list(map(id_of, rest)) == ids[seen : seen + 5]


def id_of(item: Any) -> str:
    return item.rejection.row if item.example is None else item.example["id"]


@pytest.mark.parametrize("is_sharded_by_rank", [False, True])
def test_processes_share_the_windows(talks: Path, preprocessor, is_sharded_by_rank: bool):
    source = load(talks)
    found = []
    for rank in range(2):
        share = RankShare(rank=rank, world_size=2, is_sharded_by_rank=is_sharded_by_rank)
        units = list(itertools.islice(make_stream(source, preprocessor, share=share), 18))
        found += [id_of(item) for item in units if item.place().last_pass().pass_number == 0]
    assert sorted(found) == sorted(row.id for row in read_rows(source))


def test_an_even_sample_is_one_of_windows(talks: Path, preprocessor):
    source = load(talks)
    dataset = SpeechDataset(source, preprocessor, selection=select_rows(source, max_rows=6))
    stream = replace(make_stream(source, preprocessor), sets=(dataset,))
    ids = list(map(id_of, itertools.islice(stream, 12)))
    assert len(set(ids)) == 6 and set(ids[:6]) == set(ids[6:])
    assert set(ids) <= {row.id for row in read_rows(source)}


def test_whole_recordings_are_held_out(tmp_path: Path, preprocessor):
    """Windows are other rows than the utterances that are scored."""
    rows = []
    for number in range(20):
        write_recording(tmp_path / f"{number:02}.wav", 5)
        rows += rows_of(f"{number:02}.wav", 5)
    write_parquet(tmp_path / "train.parquet", rows, row_group_size=13)
    speech = {}
    for role, split in (("train", "train"), ("eval", "validation")):
        opener = functools.partial(
            load_source, str(tmp_path), window_limits=LIMITS if role == "train" else None
        )
        source, is_held_out = load_or_hold_out(opener, role, split, Record())
        speech[role] = [SpeechDataset(source, preprocessor, is_held_out=is_held_out)]
    speech = choose_rows(speech, [Record()])
    (trained,) = speech["train"]
    (scored,) = speech["eval"]
    recordings = []
    for dataset in (trained, scored):
        taken = zip(read_rows(dataset.source), dataset.selection.mask, strict=True)
        recordings.append({row.audio for row, is_taken in taken if is_taken})
    assert len(recordings[0]) == 18 and len(recordings[1]) == 2
    assert not recordings[0] & recordings[1]


class Record:
    """What `choose_rows` asks of the script's."""

    train_split_name = "train"
    speaker_column_name = None
    eval_fraction = 0.1
    name = ""
    is_continued = False
    hold_out = None
