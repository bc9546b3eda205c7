"""What each row of a source belongs to, as hashes: the speaker, the recording, the row itself.

Lists are read once for that, of parquet files the one column.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import fsspec
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from speech_finetuning.data.cells import path_of
from speech_finetuning.data.footers import is_damage
from speech_finetuning.data.parquet_windows import FileWindows
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.selection import hash_of
from speech_finetuning.data.shards import ShardReader
from speech_finetuning.data.sources import SpeechSource


@dataclass(frozen=True, kw_only=True)
class RowKeys:
    """Hashes of what each row of a source belongs to, (num_rows,) uint64 each.

    speakers: None if no row names one; recordings: of the audio's path, else of the row's place;
    rows: of what names a row, which two rows may have in common. has_windows: whether there are
    rows of several utterances, whose speakers are not known.
    """

    speakers: np.ndarray | None
    recordings: np.ndarray
    rows: np.ndarray
    has_windows: bool = False

    def of(self, by: str) -> np.ndarray | None:
        return {"speaker": self.speakers, "recording": self.recordings, "row": self.rows}[by]


def read_keys(dataset: SpeechDataset) -> RowKeys:
    """Of lists by reading them, of parquet files by reading the one column.
    Raises: errors of the network that lasted too long."""
    if dataset.source.row_groups is not None:
        files = keys_of_parquet(dataset.source)
    else:
        files = keys_of_list(dataset)
    found = list(files)
    recordings = [keys.recordings for keys in found]
    speakers = [keys.recordings if keys.speakers is None else keys.speakers for keys in found]
    return RowKeys(
        speakers=joined(speakers) if any(keys.speakers is not None for keys in found) else None,
        recordings=joined(recordings),
        rows=joined([keys.rows for keys in found]),
        has_windows=any(keys.has_windows for keys in found),
    )


def joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def keys_of_list(dataset: SpeechDataset) -> Iterator[RowKeys]:
    """Of each file of a source whose rows are only paths."""
    source = dataset.source
    for place in source.shards():
        reader = ShardReader(
            source,
            place,
            num_rows=0,
            wait_in_seconds=dataset.preprocessor.max_network_wait_in_seconds,
        )
        speakers = []
        recordings = []
        rows = []
        is_named = False
        has_windows = False
        for row in reader:
            path = name_within(source, path_of(row.audio))
            key = f"{path}#{row.segment}" if path else f"{place[0]}/{place[1]}/{reader.num_rows}"
            rows.append(hash_of(key))
            recordings.append(hash_of(path or key))
            speakers.append(recordings[-1] if row.speaker is None else hash_of(row.speaker))
            is_named = is_named or row.speaker is not None
            has_windows = has_windows or row.window is not None
        yield RowKeys(
            speakers=np.array(speakers, np.uint64) if is_named else None,
            recordings=np.array(recordings, np.uint64),
            rows=np.array(rows, np.uint64),
            has_windows=has_windows,
        )


def name_within(source: SpeechSource, path: str) -> str:
    """A path without the folder of the data set, so that data which have been moved, or to which
    folders were added, keep their hold-out."""
    folders = [source.root]
    if source.root is None:
        name = os.path.normpath(source.name)
        folder = name if os.path.isdir(name) else os.path.dirname(name)
        folders = [folder, os.path.abspath(folder)]
    for folder in filter(None, folders):
        if path.startswith(f"{folder}/"):
            return path[len(folder) + 1 :]
    return path


def keys_of_parquet(source: SpeechSource) -> Iterator[RowKeys]:
    """Of each file. Files are read side by side, each its two columns only."""
    assert source.row_groups is not None
    sizes = [sum(groups) for groups in source.row_groups]
    if source.windows is not None:
        sizes = [sum(group.num_rows for group in file) for file in source.windows]
    urls = [source.url(*place) for place in source.shards()]
    # By the file's name, so that a file which is added, wherever it is sorted in, changes nothing
    # about the rows of the others; their number, in train-00000-of-00002, is left out.
    names = [re.sub(r"-of-\d+", "", name_within(source, url)) for url in urls]
    with ThreadPoolExecutor(16) as pool:
        files = pool.map(keys_of_file, [source] * len(sizes), urls, names, sizes)
        if source.windows is None:
            yield from files
        else:
            yield from map(keys_of_windows, files, source.windows)


def keys_of_windows(keys: RowKeys, windows: FileWindows) -> RowKeys:
    """Of the windows of a file: each has those of its first row."""
    starts = [np.zeros(0, np.int64)]
    row_of_file = 0
    for group in windows:
        starts.append(row_of_file + group.first_rows[:-1])
        row_of_file += group.num_rows
    first_rows = np.concatenate(starts)
    return RowKeys(
        speakers=None if keys.speakers is None else keys.speakers[first_rows],
        recordings=keys.recordings[first_rows],
        rows=keys.rows[first_rows],
        has_windows=len(first_rows) < row_of_file,
    )


def keys_of_file(source: SpeechSource, url: str, name: str, num_rows: int) -> RowKeys:
    """Of a parquet file. name: of the file, in the keys of rows that have none of their own."""
    rows = np.array([hash_of(f"{name}/{row}") for row in range(num_rows)], np.uint64)
    keys = RowKeys(speakers=None, recordings=rows, rows=rows)
    if num_rows == 0:
        return keys
    try:
        with fsspec.open(url, "rb") as file:
            parquet = pyarrow.parquet.ParquetFile(file)
            paths = read_paths(parquet, source.columns.audio)
            if paths is not None:
                keys = replace(keys, recordings=hashes_of(paths, rows))
            speakers = read_column(parquet, source.columns.speaker)
            if speakers is not None:
                keys = replace(keys, speakers=hashes_of(speakers, keys.recordings))
    except (pyarrow.ArrowInvalid, OSError) as error:
        if not is_damage(error):
            raise
    return keys  # of a damaged file what could be read: a rejection will say so


def read_column(parquet: pyarrow.parquet.ParquetFile, name: str | None) -> Any:
    """A column, or a field of one as 'meta.speaker'; None if the file has none of this name."""
    names = parquet.schema_arrow.names
    if name is None or name in names:
        return None if name is None else parquet.read(columns=[name]).column(0)
    top, _, fields = name.partition(".")
    if top not in names or not fields:
        return None
    table = parquet.read(columns=[name])
    if table.num_columns == 0:
        return None
    return cast(Any, pyarrow.compute).struct_field(table.column(0), fields.split("."))


def count_speakers(source: SpeechSource) -> Counter[str]:
    """Rows of each speaker of parquet files, by the one column; of damaged files what can be read.
    Raises: errors of the network."""
    counts: Counter[str] = Counter()
    for url in source.data_files:
        try:
            with fsspec.open(url, "rb") as file:
                column = read_column(pyarrow.parquet.ParquetFile(file), source.columns.speaker)
        except (pyarrow.ArrowInvalid, OSError) as error:
            if not is_damage(error):
                raise
            continue
        names = [] if column is None else column.to_pylist()
        counts.update(str(name) for name in names if name not in (None, ""))
    return counts


def read_paths(parquet: pyarrow.parquet.ParquetFile, column: str) -> Any:
    """The paths of the audio, without the audio; None if it has none."""
    if column not in parquet.schema_arrow.names:  # within another column
        return None
    kind = parquet.schema_arrow.field(column).type
    if pyarrow.types.is_struct(kind):
        if kind.get_field_index("path") < 0:
            return None
        table = parquet.read(columns=[f"{column}.path"])
        return cast(Any, pyarrow.compute).struct_field(table.column(0), "path")
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        return parquet.read(columns=[column]).column(0)
    return None


def hashes_of(values: Any, missing: np.ndarray) -> np.ndarray:
    """(num_rows,) uint64 of an Arrow column. missing: what stands for empty cells."""
    encoded = values.combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    hashes = np.array([hash_of(str(name)) for name in names] or [0], np.uint64)
    is_empty = np.array([name in (None, "") for name in names] or [True])
    indices = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    is_missing = (indices < 0) | is_empty[indices]
    return np.where(is_missing, missing, hashes[indices])
