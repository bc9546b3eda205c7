"""Sources and the order of the stream: what is opened, what a bad one gets, which row is next."""

import csv
import itertools
import json
import os
import pickle
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError
from speech_finetuning.base.threads import LARGE_ITEM_IN_BYTES, num_usable_cores, read_ahead
from speech_finetuning.cli import demonstration
from speech_finetuning.data.items import StreamItem
from speech_finetuning.data.positions import StreamPosition, position_after_resharding
from speech_finetuning.data.preprocessing import Preprocessor, SpeechDataset
from speech_finetuning.data.shards import SourceRow
from speech_finetuning.data.sources import SpeechSource, load_source
from speech_finetuning.data.stream import (
    RankShare,
    SpeechStream,
    can_shard_by_rank,
    read_pass,
    shard_order,
)
from speech_finetuning.training.trainer import start_worker


def load(folder: Path, split: str = "train", record: str = "") -> SpeechSource:
    return load_source(str(folder), split=split, record=record)


def make_folder(folder: Path, num_rows: int) -> Path:
    """An audiofolder with metadata.csv."""
    (folder / "train").mkdir(parents=True)
    with open(folder / "train" / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "transcription"])
        for i, (data, text) in enumerate(demonstration.make_rows(num_rows, seed=5)):
            (folder / "train" / f"{i}.flac").write_bytes(data)
            writer.writerow([f"{i}.flac", text])
    return folder


def damage(file: Path) -> None:
    """Of a parquet file only the footer stays whole."""
    data = file.read_bytes()
    file.write_bytes(data[:200] + bytes(len(data) - 2_200) + data[-2_000:])


def make_stream(
    source: SpeechSource, preprocessor: Preprocessor, max_rows: int | None = None, **changes: object
) -> SpeechStream:
    settings = {"seed": 1, "block_size": 7, "micro_batch_size": 2, "num_threads": 2}
    dataset = SpeechDataset(source, preprocessor, max_rows=max_rows)
    return SpeechStream(sets=(dataset,), **{**settings, **changes})


def ids_of(items: Iterable[StreamItem]) -> list[str]:
    """The ids of rows, rejected ones included."""
    return [item.rejection.row if item.rejection else item.example["id"] for item in items]


def take(stream: SpeechStream, count: int) -> list[str]:
    """The ids of the next rows."""
    return ids_of(itertools.islice(stream, count))


def test_every_row_once_per_pass_and_passes_differ(speech: Path, preprocessor):
    ids = take(make_stream(load(speech), preprocessor), 120)
    first, second, third = ids[:40], ids[40:80], ids[80:]
    assert len(set(first)) == 40 and set(first) == set(second) == set(third)
    assert first != second != third != first
    assert first != sorted(first)


def test_train_and_validation_are_one_source_with_every_row_of_both(speech: Path, preprocessor):
    source = load(speech, "train+validation")
    assert source.num_rows == 48
    ids = take(make_stream(source, preprocessor), 48)
    assert len(set(ids)) == 48
    assert sum("validation" in row_id.split("/")[-1] for row_id in ids) == 8


@pytest.fixture(scope="module")
def one_shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demonstration.make_speech(tmp_path_factory.mktemp("one"), {"train": 23}, num_shards=1)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_order_is_independent_of_threads_workers_and_ranks(
    one_shard: Path, preprocessor, num_threads: int, workers: int, world_size: int
):
    """Two passes and a half of one file; the ranks' micro-batches, in turn, are the global
    order."""
    expected = take(make_stream(load(one_shard), preprocessor, num_threads=1), 56)
    ranks = []
    for rank in range(world_size):
        share = RankShare(rank=rank, world_size=world_size)
        stream = make_stream(load(one_shard), preprocessor, num_threads=num_threads, share=share)
        loader = torch.utils.data.DataLoader(
            stream, batch_size=2, num_workers=workers, collate_fn=list
        )
        batches = itertools.islice(loader, 28 // world_size)
        ranks.append([ids_of(batch) for batch in batches])
    assert [
        name for batches in zip(*ranks, strict=True) for batch in batches for name in batch
    ] == expected
    assert len(set(expected)) == 23


def start_and_check(worker_id: int) -> None:
    """A spawned worker has inherited nothing: no server is waited for without end, nor twice."""
    start_worker(5.0, worker_id)
    client = huggingface_hub.get_session()
    request = client.build_request("GET", "https://huggingface.co", timeout=None)
    client.event_hooks["request"][-1](request)  # the library's own refuses to work offline
    assert set(request.extensions["timeout"].values()) == {5.0}
    assert datasets.config.STREAMING_READ_MAX_RETRIES == 1


@pytest.mark.slow
def test_the_stream_runs_under_spawn(speech: Path, preprocessor):
    stream = make_stream(load(speech), preprocessor)
    assert take(pickle.loads(pickle.dumps(stream)), 5) == take(stream, 5)
    collator = script.TrainCollator(decoder_start_token_id=1, pad_token_id=2, n_mels=80)
    loader = torch.utils.data.DataLoader(
        stream,
        batch_size=2,
        collate_fn=collator,
        num_workers=1,
        multiprocessing_context="spawn",
        worker_init_fn=start_and_check,
    )
    info = next(iter(loader))["step_info"]
    assert info.num_rows == 2 and info.error is None and info.position.row == 2


def test_two_ranks_take_alternate_micro_batches_of_one_order(speech: Path, preprocessor):
    whole = take(make_stream(load(speech), preprocessor), 48)
    shares = [RankShare(rank=rank, world_size=2) for rank in (0, 1)]
    ranks = [take(make_stream(load(speech), preprocessor, share=share), 24) for share in shares]
    dealt = [ranks[turn % 2][turn // 2 * 2 : turn // 2 * 2 + 2] for turn in range(24)]
    assert list(itertools.chain(*dealt)) == whole


def deal(source: SpeechSource, preprocessor, rank: int, **changes: object) -> SpeechStream:
    share = RankShare(rank=rank, world_size=3, is_sharded_by_rank=True)
    return make_stream(source, preprocessor, share=share, **changes)


def rows_by_pass(stream: SpeechStream, count: int) -> dict[int, list[str]]:
    passes: dict[int, list[str]] = {}
    for item in itertools.islice(stream, count):
        (source,) = item.position.sources
        passes.setdefault(source.start.pass_number, []).append(item.example["id"])
    return passes


def test_dealt_ranks_share_each_pass_and_open_their_own_files_only(
    tmp_path: Path, preprocessor, monkeypatch: pytest.MonkeyPatch
):
    source = load(
        demonstration.make_speech(tmp_path, {"train": 50}, num_shards=5)
    )  # uneven: 2, 2 and 1 files
    opened: list[list[tuple[int, int]]] = []
    open_shard = SpeechSource.open_shard
    monkeypatch.setattr(
        SpeechSource,
        "open_shard",
        lambda self, *place: opened[-1].append(place) or open_shard(self, *place),
    )
    ranks = []
    for rank in range(3):
        opened.append([])
        ranks.append(rows_by_pass(deal(source, preprocessor, rank), 65))
        order = [place for number in range(9) for place in shard_order(source, 1, number)[rank::3]]
        assert opened[rank] == order[: len(opened[rank])]
    for number in range(3):
        rows = [row for rank in ranks for row in rank[number]]
        assert len(rows) == len(set(rows)) == 50
    assert [len(rank[0]) for rank in ranks] == [20, 20, 10]


def test_dealt_ranks_draw_sources_and_speeds_each_for_itself(speech: Path, preprocessor):
    """Else a step of many ranks would be of one source, and at one speed."""
    item = SpeechDataset(load(speech), preprocessor)
    draws = []
    for rank in (0, 1, 1):
        stream = SpeechStream(
            sets=(item, item),
            seed=1,
            block_size=10,
            micro_batch_size=2,
            num_threads=1,
            share=RankShare(rank=rank, world_size=2, is_sharded_by_rank=True),
            speed_perturbation=True,
        )
        rows = itertools.islice(stream.rows(), 60)
        draws.append([(drawn.source, drawn.speed) for _, drawn in rows])
    numbers, speeds = zip(*(zip(*draw, strict=True) for draw in draws[:2]), strict=True)
    assert numbers[0] != numbers[1] and not set(speeds[0]) & set(speeds[1]) and draws[1] == draws[2]
    assert 20 < sum(one == other for one, other in zip(*numbers, strict=True)) < 40


@pytest.mark.parametrize("seen", [1, 7, 19, 20, 21, 44])
def test_a_dealt_position_continues_at_the_next_row(tmp_path: Path, preprocessor, seen: int):
    source = load(demonstration.make_speech(tmp_path, {"train": 50}, num_shards=5))
    for rank in (0, 2):
        items = list(itertools.islice(deal(source, preprocessor, rank), 60))
        rest = deal(source, preprocessor, rank, position=items[seen - 1].position)
        assert take(rest, 12) == ids_of(items[seen : seen + 12])


def test_another_number_of_dealt_ranks_begins_the_pass_that_none_has_begun(
    tmp_path: Path, preprocessor
):
    source = load(demonstration.make_speech(tmp_path, {"train": 50}, num_shards=5))
    streams = [deal(source, preprocessor, rank) for rank in range(3)]
    ends = [list(itertools.islice(stream, 25))[-1].position for stream in streams]
    assert [end.sources[0].start.pass_number for end in ends] == [1, 1, 2]
    position = position_after_resharding(ends)
    assert position.row == position.sources[0].rows_used == 75
    whole = make_stream(source, preprocessor, position=position)
    assert take(whole, 50) == list(
        itertools.islice(rows_by_pass(make_stream(source, preprocessor), 200)[3], 50)
    )


def test_files_are_dealt_where_each_rank_gets_one_and_all_rows_count(speech: Path, preprocessor):
    item = SpeechDataset(load(speech), preprocessor)
    assert [can_shard_by_rank([item], ranks) for ranks in (1, 2, 3)] == [False, True, False]
    assert not can_shard_by_rank([item, SpeechDataset(load(speech), preprocessor, max_rows=9)], 2)


def test_a_rank_whose_only_file_is_damaged_goes_on_with_the_next_pass(tmp_path: Path, preprocessor):
    folder = demonstration.make_speech(tmp_path, {"train": 30}, num_shards=3)
    for file in folder.glob("train-00001*.parquet"):
        damage(file)
    for rank in range(3):
        items = list(itertools.islice(deal(load(folder), preprocessor, rank), 40))
        assert len(items) == 40 and sum(item.example is not None for item in items) >= 35


@pytest.mark.parametrize("seen", [1, 6, 7, 8, 20, 39, 40, 41, 97])
@pytest.mark.parametrize("kind", ["parquet", "audiofolder"])
def test_a_position_continues_at_the_next_row(
    speech: Path, preprocessor, tmp_path: Path, seen: int, kind: str
):
    source = load(speech) if kind == "parquet" else load(make_folder(tmp_path, 12))
    items = list(itertools.islice(make_stream(source, preprocessor), 130))
    position = pickle.loads(pickle.dumps(items[seen - 1].position))
    rest = make_stream(source, preprocessor, position=position, num_threads=1)
    assert take(rest, 20) == ids_of(items[seen : seen + 20])


def test_a_position_opens_no_earlier_file(
    speech: Path, preprocessor, monkeypatch: pytest.MonkeyPatch
):
    source = load(speech)
    items = list(itertools.islice(make_stream(source, preprocessor), 33))
    opened = []
    open_shard = SpeechSource.open_shard
    monkeypatch.setattr(
        SpeechSource,
        "open_shard",
        lambda self, *place: opened.append(place) or open_shard(self, *place),
    )
    take(make_stream(source, preprocessor, position=items[-1].position), 1)
    second_of_first_pass = shard_order(source, 1, 0)[1]
    assert opened[0] == second_of_first_pass


@pytest.mark.parametrize("seen", [13, 14, 15, 27])
def test_a_position_reads_only_the_row_groups_that_remain(tmp_path: Path, preprocessor, seen: int):
    file = tmp_path / "data" / "train.parquet"
    demonstration.write_parquet(file, demonstration.make_rows(30, seed=0), row_group_size=6)
    items = list(itertools.islice(make_stream(load(file.parent), preprocessor), 60))
    position = items[seen - 1].position
    group = position.sources[0].start.shard_row // 6  # where the position's block begins
    assert group > 0
    column, data = pq.read_metadata(file).row_group(group).column(0), file.read_bytes()
    end = column.dictionary_page_offset or column.data_page_offset
    file.write_bytes(
        data[:4] + bytes(end - 4) + data[end:]
    )  # who reads an earlier group now finds damage
    rest = make_stream(load(file.parent), preprocessor, position=position)
    assert take(rest, 30 - seen) == ids_of(items[seen:30])
    first = next(iter(make_stream(load(file.parent), preprocessor)))
    assert first.rejection.reason == "file_damaged"


def test_blocks_end_at_rows_or_bytes(speech: Path, preprocessor, monkeypatch: pytest.MonkeyPatch):
    item = SpeechDataset(load(speech), preprocessor)
    sizes = [len(block.rows) for block in read_pass(item, block_size=15, seed=0)]
    assert sizes == [15, 15, 10]
    monkeypatch.setattr("speech_finetuning.data.stream.MAX_BLOCK_IN_BYTES", 100_000)
    blocks = list(read_pass(item, block_size=1000, seed=0))
    assert len(blocks) > 3 and all(block.size_in_bytes < 200_000 for block in blocks)


def test_max_train_samples_are_the_same_rows_in_every_pass(speech: Path, preprocessor):
    ids = take(make_stream(load(speech), preprocessor, max_rows=10), 30)
    assert set(ids[:10]) == set(ids[10:20]) == set(ids[20:]) and len(set(ids)) == 10
    assert ids[:10] != ids[10:20]


def test_nothing_is_decoded_by_datasets_and_torchcodec_is_never_imported(
    speech: Path, tmp_path: Path, preprocessor
):
    import sys

    take(make_stream(load(speech), preprocessor), 3)
    take(make_stream(load(make_folder(tmp_path, 3)), preprocessor), 3)
    assert "torchcodec" not in sys.modules


def test_rows_are_counted_without_reading_audio(speech: Path, tmp_path: Path):
    assert load(speech).num_rows == 40
    assert load(make_folder(tmp_path, 9)).num_rows == 9


def test_a_damaged_file_is_a_rejection_and_nothing_else_is_lost(tmp_path: Path, preprocessor):
    folder = demonstration.make_speech(tmp_path, {"train": 30}, num_shards=3)
    damage(sorted(folder.glob("*.parquet"))[1])
    items = list(itertools.islice(make_stream(load(folder), preprocessor), 21))
    rejections = [item.rejection for item in items if item.rejection is not None]
    assert [(one.reason, one.num_rows) for one in rejections] == [("file_damaged", 10)]
    assert rejections[0].row.endswith("/train-00001-of-00003.parquet")
    assert len({item.example["id"] for item in items if item.example is not None}) == 20


@pytest.mark.parametrize("block_size", [1, 5, 6, 11, 30])
def test_a_position_beside_a_damaged_file_continues_at_the_next_row(
    tmp_path: Path, preprocessor, block_size: int
):
    folder = demonstration.make_speech(tmp_path, {"train": 15}, num_shards=3)
    damage(sorted(folder.glob("*.parquet"))[1])
    stream = make_stream(load(folder), preprocessor, block_size=block_size)
    whole = take(stream, 33)
    for seen, item in enumerate(itertools.islice(stream, 22), start=1):
        rest = make_stream(
            load(folder), preprocessor, block_size=block_size, position=item.position
        )
        assert take(rest, 11) == whole[seen : seen + 11], seen


def test_a_missing_clip_is_a_rejection(tmp_path: Path, preprocessor):
    row = SourceRow(id="r", audio=str(tmp_path / "gone.flac"), text="uno")
    assert preprocessor(row).reason == "audio_missing"


def test_errors_of_the_reader_keep_their_type_and_message(
    speech: Path, preprocessor, monkeypatch: pytest.MonkeyPatch
):
    class Unpicklable(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__("no words")

    for raised, expected in (
        (PermissionError(13, "keep out"), PermissionError),
        (Unpicklable(1, 2), RuntimeError),
    ):
        source = load(speech)
        monkeypatch.setattr(
            "speech_finetuning.data.stream.shard_order",
            lambda *a, error=raised: (_ for _ in ()).throw(error),
        )
        loader = torch.utils.data.DataLoader(
            make_stream(source, preprocessor), batch_size=None, num_workers=1
        )
        item = next(iter(loader))
        assert item.position is None and type(item.error) is expected
    assert "Unpicklable: no words" in str(item.error)


def test_a_pass_without_a_usable_row_ends_with_the_reasons(speech: Path, preprocessor):
    preprocessor.max_duration_in_seconds = 0.01
    items = list(make_stream(load(speech), preprocessor))
    assert len(items) == 41
    error = items[-1].error
    assert isinstance(error, UserError) and "40 audio_too_long" in str(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("/no/such/folder", None, "train", "audio", "text"), "--dataset_name /no/such/folder"),
        (("SPEECH", "klingon", "train", "audio", "text"), "--dataset_config_name klingon"),
        (("SPEECH", None, "dev", "audio", "text"), "split 'dev'.*Found: train, validation, test"),
        (
            ("SPEECH", None, "train", "sound", "text"),
            "--audio_column_name sound.*Found: audio, text",
        ),
        (
            ("SPEECH", None, "train", "audio", "sentence"),
            "--text_column_name sentence.*Found: audio, text",
        ),
        (
            ("SPEECH", None, "train", "audio", "audio"),
            "--text_column_name audio: holds .* not text",
        ),
    ],
)
def test_bad_sources_say_what_was_found(speech: Path, arguments: tuple, message: str):
    with pytest.raises(UserError, match=message):
        name, config_name, split, audio_column, text_column = arguments
        load_source(
            str(speech) if name == "SPEECH" else name,
            config_name=config_name,
            split=split,
            audio_column=audio_column,
            text_column=text_column,
        )


def test_an_empty_dataset_says_so(tmp_path: Path):
    demonstration.write_parquet(tmp_path / "train-00000-of-00001.parquet", [])
    with pytest.raises(UserError, match="split 'train' of .* is empty"):
        load(tmp_path)


def test_a_rank_whose_share_of_a_pass_is_unusable_goes_on(tmp_path: Path, preprocessor):
    """Of a pass of 8 rows each of two ranks has 4; what the other one's are it does not know."""
    rows = [(b"junk", "uno")] * 4 + demonstration.make_rows(4, seed=1)
    demonstration.write_parquet(tmp_path / "train-00000-of-00001.parquet", rows)
    stream = make_stream(load(tmp_path), preprocessor, block_size=1, micro_batch_size=4)
    good, bad = (
        list(itertools.islice(replace(stream, share=RankShare(rank=rank, world_size=2)), 20))
        for rank in (1, 0)
    )
    assert all(item.rejection for item in bad) and all(item.example for item in good)


def test_a_rank_that_has_only_empty_files_ends(
    tmp_path: Path, preprocessor, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("speech_finetuning.data.stream.MAX_EMPTY_PASSES", 3)
    demonstration.write_parquet(
        tmp_path / "train-00000-of-00002.parquet", demonstration.make_rows(4, seed=1)
    )
    demonstration.write_parquet(tmp_path / "train-00001-of-00002.parquet", [])
    share = RankShare(rank=1, world_size=2, is_sharded_by_rank=True)
    (item,) = make_stream(load(tmp_path), preprocessor, block_size=1, share=share)
    assert isinstance(item.error, UserError) and "is empty" in str(item.error)
    shuffled = make_stream(
        load(tmp_path), preprocessor, share=share
    )  # sometimes it has the other one
    assert len(take(shuffled, 12)) == 12


def test_empty_files_and_row_groups_are_not_damaged(tmp_path: Path, preprocessor):
    rows = demonstration.make_rows(4, seed=1)
    demonstration.write_parquet(tmp_path / "train-00000-of-00003.parquet", rows[:2])
    demonstration.write_parquet(tmp_path / "train-00001-of-00003.parquet", [])
    schema = pq.read_schema(tmp_path / "train-00000-of-00003.parquet")
    others = pq.read_table(tmp_path / "train-00000-of-00003.parquet")
    with pq.ParquetWriter(tmp_path / "train-00002-of-00003.parquet", schema) as writer:
        writer.write_table(others.slice(0, 0))
        writer.write_table(others)
    items = list(itertools.islice(make_stream(load(tmp_path), preprocessor), 8))
    assert all(item.example for item in items) and len(set(ids_of(items[:4]))) == 4
    for seen in range(1, 7):
        rest = make_stream(load(tmp_path), preprocessor, position=items[seen - 1].position)
        assert take(rest, 2) == ids_of(items[seen : seen + 2])


@pytest.mark.parametrize(
    "changes",
    [{"seed": 2}, {"block_size": 8}, {"is_grouped_by_length": True}, {"max_rows": 30}],
    ids=lambda changes: next(iter(changes)),
)
def test_another_order_within_a_pass_is_a_warning(
    speech: Path, preprocessor, changes: dict, caplog: pytest.LogCaptureFixture
):
    source = load(speech)
    position = list(itertools.islice(make_stream(source, preprocessor), 5))[-1].position
    value = json.loads(json.dumps(position.to_json()))
    make_stream(source, preprocessor, position=StreamPosition.from_json(value), num_threads=1)
    assert caplog.text == ""
    make_stream(source, preprocessor, position=StreamPosition.from_json(value), **changes)
    assert "in the rest of this pass some rows come twice" in caplog.text


def test_a_position_is_plain_json(speech: Path, preprocessor):
    position = list(itertools.islice(make_stream(load(speech), preprocessor), 33))[-1].position
    value = position.to_json()
    assert json.loads(json.dumps(value)) == value
    assert StreamPosition.from_json(value) == position


def test_worker_cores_are_shared_by_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(32), raising=False)
    assert [num_usable_cores(n) for n in (1, 8, 64)] == [8, 4, 1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # as launchers set it: 64 on eight machines
    assert num_usable_cores(64) == 4


def test_shard_order_is_pure(speech: Path):
    orders = [shard_order(load(speech, "train+validation"), 3, n) for n in range(20)]
    assert all(sorted(order) == [(0, 0), (0, 1), (1, 0), (1, 1)] for order in orders)
    assert len({tuple(order) for order in orders}) > 5
    assert np.array_equal(orders[4], shard_order(load(speech, "train+validation"), 3, 4))


@pytest.mark.parametrize(("size", "ahead"), [(0, 2), (LARGE_ITEM_IN_BYTES, 1)])
def test_small_blocks_are_read_two_ahead_and_large_ones_one(size: int, ahead: int):
    fetched: list[int] = []
    numbers = (fetched.append(number) or number for number in range(6))
    items = read_ahead(numbers, lambda item: size)
    for used in range(6):
        assert next(items) == used
        deadline = time.monotonic() + 20
        while len(fetched) < min(6, used + 1 + ahead) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(fetched) == min(6, used + 1 + ahead)
    assert list(items) == []
