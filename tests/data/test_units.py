"""Row groups that are read before it is their turn, where an answer takes its time."""

import itertools
import threading
import time
from collections.abc import Container, Iterator
from dataclasses import replace

import pytest

from speech_finetuning.cli import demonstration
from speech_finetuning.data.preprocessing import Preprocessor, SpeechDataset
from speech_finetuning.data.selection import select_rows
from speech_finetuning.data.shards import ShardReader, SourceRow
from speech_finetuning.data.sources import SpeechSource, load_source
from speech_finetuning.data.stream import SpeechStream
from speech_finetuning.data.units import RowGroupsAhead, Unit, num_groups_ahead, units_of

PASS = 60  # rows


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> SpeechSource:
    """Two parquet files of ten row groups each."""
    folder = tmp_path_factory.mktemp("groups")
    rows = demonstration.make_rows(PASS, seed=3, max_words=1)
    for shard in range(2):
        file = folder / f"train-{shard:05}-of-00002.parquet"
        demonstration.write_parquet(file, rows[shard::2], row_group_size=3)
    return load_source(str(folder), split="train")


def as_if_remote(source: SpeechSource) -> SpeechSource:
    """The same files by addresses, which are read ahead."""
    return replace(source, data_files=tuple(f"file://{file}" for file in source.data_files))


def dataset_of(source: SpeechSource, preprocessor: Preprocessor) -> SpeechDataset:
    return SpeechDataset(source, preprocessor, selection=select_rows(source, max_rows=None))


def stream_of(source: SpeechSource, preprocessor: Preprocessor) -> SpeechStream:
    return SpeechStream(
        sets=(dataset_of(source, preprocessor),),
        seed=1,
        block_size=7,
        micro_batch_size=2,
        num_threads=1,
    )


def ids_of(stream: SpeechStream, count: int) -> list[str]:
    return [item.example["id"] for item in itertools.islice(stream, count)]


def watch(monkeypatch: pytest.MonkeyPatch, failing: Container[int] = ()) -> list[int]:
    """The indices of the row groups that are read ahead from now on; some of them in vain."""
    seen = []
    read_once = ShardReader.read_once

    def watched(reader: ShardReader) -> list[SourceRow]:
        seen.append(reader.row_group)
        if reader.row_group in failing:
            raise ConnectionError("reset by peer")
        return read_once(reader)

    monkeypatch.setattr(ShardReader, "read_once", watched)
    return seen


@pytest.mark.parametrize("failing", [set(), {0, 4}, set(range(10))])
def test_the_order_is_that_of_local_files_whatever_is_read_ahead(
    local: SpeechSource, preprocessor, monkeypatch: pytest.MonkeyPatch, failing: set[int]
):
    expected = ids_of(stream_of(local, preprocessor), 150)
    seen_groups = watch(monkeypatch, failing)
    stream = stream_of(as_if_remote(local), preprocessor)
    items = list(itertools.islice(stream, 150))
    assert [item.example["id"] for item in items] == expected
    assert len(seen_groups) >= 2 * 20
    for seen in (1, 8, 21, 59):
        position = items[seen - 1].position
        assert ids_of(replace(stream, position=position), 20) == expected[seen : seen + 20]


def test_local_files_are_not_read_ahead(
    local: SpeechSource, preprocessor, monkeypatch: pytest.MonkeyPatch
):
    seen_groups = watch(monkeypatch)
    assert len(ids_of(stream_of(local, preprocessor), PASS)) == PASS
    assert seen_groups == []


@pytest.mark.parametrize(
    ("megabytes", "ahead"), [(0, 8), (1, 8), (20, 6), (64, 2), (65, 1), (5_000, 1)]
)
def test_as_many_row_groups_are_read_ahead_as_memory_allows(
    local: SpeechSource, preprocessor, megabytes: int, ahead: int
):
    source = replace(as_if_remote(local), largest_row_group_in_bytes=megabytes * 2**20)
    assert num_groups_ahead(dataset_of(source, preprocessor)) == ahead
    source = replace(local, largest_row_group_in_bytes=megabytes * 2**20)
    assert num_groups_ahead(dataset_of(source, preprocessor)) == 1


def test_the_size_of_the_largest_row_group_is_known_from_the_footers(local: SpeechSource):
    rows = demonstration.make_rows(PASS, seed=3, max_words=1)
    mean_size = sum(len(audio) for audio, _ in rows) / 20
    assert mean_size < local.largest_row_group_in_bytes < 3 * mean_size


def test_row_groups_are_read_at_the_same_time(
    local: SpeechSource, preprocessor, monkeypatch: pytest.MonkeyPatch
):
    """Each reading waits until as many others have begun: one after the other would break it."""
    together = threading.Barrier(4)
    have_met = threading.Event()
    read_once = ShardReader.read_once

    def meet(reader: ShardReader) -> list[SourceRow]:
        if not have_met.is_set():
            together.wait(30)
            have_met.set()
        return read_once(reader)

    monkeypatch.setattr(ShardReader, "read_once", meet)
    source = replace(as_if_remote(local), largest_row_group_in_bytes=32 * 2**20)
    assert len(ids_of(stream_of(source, preprocessor), 24)) == 24
    assert have_met.is_set()


@pytest.mark.parametrize("is_remote", [True, False])
def test_a_closed_stream_reads_nothing_any_more(
    local: SpeechSource, preprocessor, monkeypatch: pytest.MonkeyPatch, is_remote: bool
):
    """A worker that is forked while a thread asks the network would wait for its locks for ever."""
    rows_left = ShardReader.rows_left

    def slowly(reader: ShardReader) -> Iterator[dict]:
        time.sleep(0.2)
        yield from rows_left(reader)

    monkeypatch.setattr(ShardReader, "rows_left", slowly)
    items = iter(stream_of(as_if_remote(local) if is_remote else local, preprocessor))
    next(items)
    items.close()
    names = ("row-groups", "reader")
    threads = [thread for thread in threading.enumerate() if thread.name.startswith(names)]
    for thread in threads:  # they have nothing to do any more, and leave
        thread.join(0.1)
    assert not any(thread.is_alive() for thread in threads)


def test_a_file_without_row_groups_is_left_to_its_reader(local: SpeechSource, preprocessor):
    """A damaged one stands among the others' row groups."""
    dataset = dataset_of(as_if_remote(local), preprocessor)
    units = [Unit(place=(0, 0)), *units_of(dataset, is_shuffled=True)[:2]]
    begun = []

    def reader(unit_number: int, first_row: int) -> ShardReader:
        begun.append((unit_number, first_row))
        unit = units[unit_number]
        return ShardReader(
            dataset.source,
            unit.place,
            num_rows=first_row,
            wait_in_seconds=1,
            row_group=unit.row_group,
        )

    ahead = RowGroupsAhead(units, reader, num_ahead=8)
    assert ahead.take(0, 0) is None
    assert [number for number, _ in ahead.take(1, 2) or []] == [2]
    assert begun == [(1, 0), (2, 0)]
    ahead.close()
