"""Sources and the order of the stream: what is opened, what a bad one gets, which row is next."""

import csv
import io
import itertools
import json
import os
import pickle
import tarfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow.parquet as pq
import pytest
import torch
from rows import make_clip, read_rows

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError
from speech_finetuning.base.threads import LARGE_ITEM_IN_BYTES, num_usable_cores, read_ahead
from speech_finetuning.cli import demonstration
from speech_finetuning.data.items import StreamItem
from speech_finetuning.data.passes import (
    RankShare,
    permuted,
    read_pass,
)
from speech_finetuning.data.positions import (
    ORDER_VERSION,
    StreamPosition,
    position_after_resharding,
)
from speech_finetuning.data.preprocessing import Preprocessor, SpeechDataset
from speech_finetuning.data.selection import select_rows
from speech_finetuning.data.shards import SourceRow
from speech_finetuning.data.sources import SpeechSource, load_source
from speech_finetuning.data.stream import SpeechStream, can_shard_by_rank
from speech_finetuning.data.units import units_of
from speech_finetuning.training.reading_worker import start_worker


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


def make_dataset(
    source: SpeechSource,
    preprocessor: Preprocessor,
    max_rows: int | None = None,
    order_version: int = ORDER_VERSION,
) -> SpeechDataset:
    selection = None
    if order_version > 1:
        selection = select_rows(source, max_rows=max_rows)
    return SpeechDataset(
        source, preprocessor, max_rows=max_rows, order_version=order_version, selection=selection
    )


def make_stream(
    source: SpeechSource,
    preprocessor: Preprocessor,
    max_rows: int | None = None,
    order_version: int = ORDER_VERSION,
    **changes: object,
) -> SpeechStream:
    settings = {"seed": 1, "block_size": 7, "micro_batch_size": 2, "num_threads": 2}
    dataset = make_dataset(source, preprocessor, max_rows, order_version)
    return SpeechStream(sets=(dataset,), **{**settings, **changes})


def make_tars(folder: Path, sizes: list[int], suffix: str = ".tar") -> Path:
    """Webdatasets of so many rows each; the n-th row of all says its number."""
    folder.mkdir(parents=True)
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"train-{shard:05}{suffix}", "w") as tar:
            for _ in range(size):
                for ending, data in (("wav", make_clip(0.3)), ("txt", b"uno")):
                    member = tarfile.TarInfo(f"{number:04}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                number += 1
    return folder


def make_row_groups(folder: Path, num_rows: int = 40, row_group_size: int = 2) -> Path:
    """Two parquet files of many row groups."""
    rows = demonstration.make_rows(num_rows, seed=3, max_words=1)
    for shard in range(2):
        demonstration.write_parquet(
            folder / f"train-{shard:05}-of-00002.parquet",
            rows[shard::2],
            row_group_size=row_group_size,
        )
    return folder


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
    units = units_of(make_dataset(source, preprocessor), is_shuffled=True)
    ranks = []
    for rank in range(3):
        opened = watch_opened_files(monkeypatch)
        ranks.append(rows_by_pass(deal(source, preprocessor, rank), 65))
        order = [unit.place for n in range(20) for unit in permuted(units, 1, n)[rank::3]]
        assert opened == order[: len(opened)]
        monkeypatch.undo()
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


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SpeechSource]:
    """Of every form that has an order of its own; 40 rows of each, 12 of the folder."""
    folder = tmp_path_factory.mktemp("sources")
    return {
        "parquet": load(make_row_groups(folder / "parquet")),
        "audiofolder": load(make_folder(folder / "folder", 12)),
        "tar": load(make_tars(folder / "tar", [11, 2, 9, 1, 12, 5])),
    }


@pytest.mark.parametrize("order_version", [1, 2])
@pytest.mark.parametrize("kind", ["parquet", "audiofolder", "tar"])
def test_a_position_continues_at_the_next_row(
    sources: dict[str, SpeechSource], preprocessor, kind: str, order_version: int
):
    """From every row of two passes and a half, with every row once in each."""
    stream = make_stream(sources[kind], preprocessor, order_version=order_version)
    rows = list(itertools.islice(stream.rows(), 100))
    ids = [drawn.row.id for _, drawn in rows]
    size = len(set(ids))
    assert size == (12 if kind == "audiofolder" else 40)
    assert set(ids[:size]) == set(ids[size : 2 * size]) and ids[:size] != ids[size : 2 * size]
    for seen in [1, 2, 6, 7, 8, 11, 12, 13, 16, 17, 20, 24, 32, 39, 40, 41, 56, 79, 80, 81, 97]:
        value = json.loads(json.dumps(rows[seen - 1][0].to_json()))
        rest = replace(stream, position=StreamPosition.from_json(value), num_threads=1)
        found = [drawn.row.id for _, drawn in itertools.islice(rest.rows(), 3)]
        assert found == ids[seen : seen + 3], seen


@pytest.mark.parametrize("order_version", [1, 2])
def test_a_position_opens_no_earlier_file(
    speech: Path, preprocessor, monkeypatch: pytest.MonkeyPatch, order_version: int
):
    monkeypatch.setattr("speech_finetuning.data.passes.ROW_GROUPS_PER_BLOCK", 1)
    stream = make_stream(load(speech), preprocessor, order_version=order_version)
    items = list(itertools.islice(stream, 33))
    opened = watch_opened_files(monkeypatch)
    take(replace(stream, position=items[-1].position), 1)
    units = units_of(stream.sets[0], is_shuffled=True)
    assert opened[0] == permuted(units, 1, 0)[1].place


def watch_opened_files(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    opened: list[tuple[int, int]] = []
    open_shard = SpeechSource.open_shard
    monkeypatch.setattr(
        SpeechSource,
        "open_shard",
        lambda self, *place: opened.append(place) or open_shard(self, *place),
    )
    return opened


@pytest.mark.parametrize("seen", [13, 14, 15, 27])
def test_a_position_reads_only_the_row_groups_that_remain(tmp_path: Path, preprocessor, seen: int):
    file = tmp_path / "data" / "train.parquet"
    demonstration.write_parquet(file, demonstration.make_rows(30, seed=0), row_group_size=6)
    stream = make_stream(load(file.parent), preprocessor, order_version=1)
    items = list(itertools.islice(stream, 60))
    position = items[seen - 1].position
    group = position.sources[0].start.shard_row // 6  # where the position's block begins
    assert group > 0
    column, data = pq.read_metadata(file).row_group(group).column(0), file.read_bytes()
    end = column.dictionary_page_offset or column.data_page_offset
    file.write_bytes(
        data[:4] + bytes(end - 4) + data[end:]
    )  # who reads an earlier group now finds damage
    assert take(replace(stream, position=position), 30 - seen) == ids_of(items[seen:30])
    first = next(iter(stream))
    assert first.rejection.reason == "file_damaged"


def test_blocks_end_at_rows_or_bytes(speech: Path, preprocessor, monkeypatch: pytest.MonkeyPatch):
    item = make_dataset(load(speech), preprocessor, order_version=1)
    sizes = [len(block.rows) for block in read_pass(item, block_size=15, seed=0)]
    assert sizes == [15, 15, 10]
    monkeypatch.setattr("speech_finetuning.data.passes.MAX_BLOCK_IN_BYTES", 100_000)
    for version in (1, 2):
        item = make_dataset(load(speech), preprocessor, order_version=version)
        blocks = list(read_pass(item, block_size=1000, seed=0))
        assert len(blocks) > 3 and all(block.size_in_bytes < 200_000 for block in blocks)


def test_a_block_is_made_of_whole_row_groups_of_all_files(tmp_path: Path, preprocessor):
    item = make_dataset(load(make_row_groups(tmp_path)), preprocessor)
    blocks = list(read_pass(item, block_size=5, seed=0))
    assert [len(block.rows) for block in blocks] == [16, 16, 8]  # eight groups of two
    assert [block.start.shard for block in blocks] == [0, 8, 16]
    for block in blocks[:2]:
        assert {row.id.split("/")[2] for row in block.rows} == {"0", "1"}
        groups = [int(row.id.split("-")[-1].removesuffix(".flac")) // 2 for row in block.rows]
        assert groups != sorted(groups) and groups[0::2] == groups[1::2]


@pytest.mark.parametrize(
    ("limit", "value"), [("MAX_MIXED_BYTES", 1), ("MAX_MIXED_ROWS", 2), ("ROW_GROUPS_PER_BLOCK", 1)]
)
def test_huge_row_groups_do_not_make_huge_blocks(
    tmp_path: Path, preprocessor, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
):
    monkeypatch.setattr(f"speech_finetuning.data.passes.{limit}", value)
    item = make_dataset(load(make_row_groups(tmp_path)), preprocessor)
    sizes = [len(block.rows) for block in read_pass(item, block_size=6, seed=0)]
    assert sizes == [6] * 6 + [4]


def test_tars_are_read_in_turn(tmp_path: Path, preprocessor):
    """A block of eight takes two rows of each of four; a fifth takes the place of the one that
    ends."""
    item = make_dataset(load(make_tars(tmp_path / "tar", [3, 3, 3, 3, 3])), preprocessor)
    blocks = [block.rows for block in read_pass(item, block_size=8, seed=0)]
    tars = [[int(row.id.split("/")[2]) for row in rows] for rows in blocks]
    assert [len(rows) for rows in blocks] == [8, 7]
    assert tars[0][:4] == tars[0][4:] and len(set(tars[0])) == 4
    assert set(tars[1]) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("order_version", [1, 2])
@pytest.mark.parametrize("kind", ["parquet", "audiofolder", "tar"])
def test_max_train_samples_are_the_same_rows_in_every_pass(
    sources: dict[str, SpeechSource], preprocessor, kind: str, order_version: int
):
    stream = make_stream(sources[kind], preprocessor, max_rows=10, order_version=order_version)
    ids = take(stream, 30)
    assert set(ids[:10]) == set(ids[10:20]) == set(ids[20:]) and len(set(ids)) == 10
    assert ids[:10] != ids[10:20]
    first_rows = [row.id for row in read_rows(sources[kind])[:10]]
    assert (set(ids) == set(first_rows)) == (order_version == 1)
    items = list(itertools.islice(stream, 13))
    assert take(replace(stream, position=items[-1].position), 17) == ids[13:]


@pytest.mark.parametrize("kind", ["parquet", "audiofolder", "tar"])
def test_excluded_rows_leave_the_order_of_all_others(
    sources: dict[str, SpeechSource], preprocessor, kind: str
):
    stream = make_stream(sources[kind], preprocessor)
    whole = take(stream, 60)
    excluded = frozenset([whole[0], whole[3], whole[4], whole[11]])
    others = (replace(stream.sets[0], excluded_ids=excluded),)
    rest = replace(stream, sets=others)
    expected = [row_id for row_id in whole if row_id not in excluded]
    items = list(itertools.islice(rest, len(expected)))
    assert ids_of(items) == expected
    for seen in range(1, len(expected) - 2, 3):
        resumed = replace(rest, position=items[seen - 1].position)
        found = [drawn.row.id for _, drawn in itertools.islice(resumed.rows(), 2)]
        assert found == expected[seen : seen + 2], seen


def test_rows_that_are_excluded_in_the_middle_of_a_pass_cost_no_other(
    sources: dict[str, SpeechSource], preprocessor
):
    stream = make_stream(sources["parquet"], preprocessor)
    items = list(itertools.islice(stream, 40))
    ids = ids_of(items)
    excluded = frozenset(ids[1:30:3])
    changed = replace(stream, sets=(replace(stream.sets[0], excluded_ids=excluded),))
    rest = replace(changed, position=items[9].position)
    expected = [row_id for row_id in ids[10:] if row_id not in excluded]
    assert take(rest, len(expected)) == expected


def test_excluded_rows_are_left_out_of_batches_of_like_length(
    sources: dict[str, SpeechSource], preprocessor
):
    stream = make_stream(sources["parquet"], preprocessor, is_grouped_by_length=True)
    whole = take(stream, 40)
    excluded = frozenset(whole[:10])
    rest = replace(stream, sets=(replace(stream.sets[0], excluded_ids=excluded),))
    items = list(itertools.islice(rest, 60))
    assert sorted(ids_of(items)[:30]) == sorted(whole[10:])
    for seen in (1, 5, 12, 13, 29, 30, 31):
        resumed = replace(rest, position=items[seen - 1].position)
        assert take(resumed, 8) == ids_of(items)[seen : seen + 8], seen


@pytest.mark.parametrize("seen", [0, 25])
def test_excluded_ids_of_no_row_are_told_after_the_first_whole_pass(
    sources: dict[str, SpeechSource],
    preprocessor,
    caplog: pytest.LogCaptureFixture,
    seen: int,
):
    """Of another split's ids it knows nothing; nor of what was read before it went on."""
    stream = make_stream(sources["parquet"], preprocessor)
    items = list(itertools.islice(stream, 30))
    there = ids_of(items)[0]
    ids = frozenset([there, "train/0/0/gone.wav", "train/9/9/5", "validation/0/0/1"])
    position = items[seen - 1].position if seen else None
    changed = replace(stream, sets=(replace(stream.sets[0], excluded_ids=ids),), position=position)
    take(changed, 110)
    warnings = [r.getMessage() for r in caplog.records if "--exclude_rows" in r.getMessage()]
    begun = "--exclude_rows: ids of no row in split 'train' of "
    if seen:
        assert warnings == []
    else:
        (warning,) = warnings
        assert warning.startswith(begun)
        assert ": 2 of 3, such as train/0/0/gone.wav, train/9/9/5" in warning


def test_a_split_whose_rows_are_all_excluded_says_so(
    sources: dict[str, SpeechSource], preprocessor
):
    stream = make_stream(sources["audiofolder"], preprocessor)
    excluded = frozenset(take(stream, 12))
    item = next(iter(replace(stream, sets=(replace(stream.sets[0], excluded_ids=excluded),))))
    assert "--exclude_rows names all of it" in str(item.error)


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


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_file_that_vanishes_is_a_rejection(tmp_path: Path, preprocessor, kind: str):
    """Between two passes, as when a folder is tidied up."""
    folder = tmp_path / "speech"
    if kind == "parquet":
        demonstration.make_speech(folder, {"train": 15}, num_shards=3)
    else:
        make_tars(folder, [5, 5, 5])
    source = load(folder)
    assert len(read_rows(source)) == 15
    sorted(folder.glob(f"*.{kind}"))[1].unlink()
    rows = read_rows(source)
    (gone,) = [row.rejection for row in rows if row.rejection is not None]
    assert gone.reason == "file_damaged" and "No such file" in gone.detail
    assert len(rows) == 11
    items = itertools.islice(make_stream(source, preprocessor), 11)
    assert sum(item.example is not None for item in items) == 10


@pytest.mark.parametrize("block_size", [1, 5, 6, 11, 30])
def test_a_position_beside_a_damaged_file_continues_at_the_next_row(
    tmp_path: Path, preprocessor, block_size: int
):
    folder = demonstration.make_speech(tmp_path, {"train": 15}, num_shards=3)
    damage(sorted(folder.glob("*.parquet"))[1])
    stream = make_stream(load(folder), preprocessor, block_size=block_size)
    whole = take(stream, 33)
    for seen, item in enumerate(itertools.islice(stream, 22), start=1):
        rest = replace(stream, position=item.position)
        assert row_ids(rest, 11) == whole[seen : seen + 11], seen


def row_ids(stream: SpeechStream, count: int) -> list[str]:
    """As `take`, but the rows are only read, not prepared: a third of the time."""
    rows = [drawn.row for _, drawn in itertools.islice(stream.rows(), count)]
    return [row.rejection.row if row.rejection else row.id for row in rows]


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
            "speech_finetuning.data.passes.permuted",
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
    monkeypatch.setattr("speech_finetuning.data.passes.MAX_EMPTY_PASSES", 3)
    demonstration.write_parquet(
        tmp_path / "train-00000-of-00002.parquet", demonstration.make_rows(4, seed=1)
    )
    demonstration.write_parquet(tmp_path / "train-00001-of-00002.parquet", [])
    share = RankShare(rank=1, world_size=2, is_sharded_by_rank=True)
    (item,) = make_stream(load(tmp_path), preprocessor, block_size=1, share=share)
    assert isinstance(item.error, UserError) and "is empty" in str(item.error)
    datasets = [make_dataset(load(tmp_path), preprocessor, order_version=n) for n in (1, 2)]
    assert [can_shard_by_rank([each], 2) for each in datasets] == [True, False]
    shuffled = make_stream(
        load(tmp_path), preprocessor, share=share, order_version=1
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


def test_the_order_of_files_is_pure(speech: Path):
    shards = load(speech, "train+validation").shards()
    orders = [permuted(shards, 3, number) for number in range(20)]
    assert all(sorted(order) == [(0, 0), (0, 1), (1, 0), (1, 1)] for order in orders)
    assert len({tuple(order) for order in orders}) > 5
    assert orders[4] == permuted(shards, 3, 4)


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
