"""Where rows come from: opening data sets, finding columns, reading files row by row."""

import logging
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import datasets
import fsspec
import huggingface_hub
import pyarrow
import pyarrow.parquet
from huggingface_hub.errors import HfHubHTTPError

from speech_finetuning.base.errors import UserError, one_line
from speech_finetuning.base.network import Backoff, as_user_error, is_network_error
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.manifests import manifest_files, read_manifest

logger = logging.getLogger(__name__)

# Tried in this order when no column is named; the last ones are the file types in a webdataset's tars.
AUDIO_COLUMNS = (
    "audio",
    "audio_filepath",
    "path",
    "file_name",
    "flac",
    "wav",
    "mp3",
    "ogg",
    "opus",
)
TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "normalized_text", "txt")


@dataclass(frozen=True)
class SpeechSource:
    """Rows of undecoded audio and text: one streaming dataset for each part of a split like 'train+validation'."""

    record: str  # its name in a --data_mix, else ""
    name: str
    config_name: str | None
    split: str
    kind: str  # the `datasets` builder: parquet, audiofolder, webdataset, ...; or manifest
    revision: str | None  # commit on the Hub, None for local files
    parts: tuple[datasets.IterableDataset, ...]
    data_files: tuple[str, ...]
    audio_column: str
    text_column: str
    num_rows: int | None  # None when only reading everything would tell

    def shards(self) -> list[tuple[int, int]]:
        """(part, shard within the part) for every file of the source, in the order of the files."""
        return [
            (part, shard) for part, ds in enumerate(self.parts) for shard in range(ds.num_shards)
        ]

    def open_shard(self, part: int, shard: int) -> datasets.IterableDataset:
        return self.parts[part].shard(num_shards=self.parts[part].num_shards, index=shard)

    def url(self, part: int, shard: int) -> str:
        """Of a parquet file, which is a shard."""
        return self.data_files[self.shards().index((part, shard))]


def load_builder(
    name: str, config_name: str | None, cache_dir: str | None
) -> datasets.DatasetBuilder:
    """The `datasets` builder; for a script dataset that of its parquet export. Raises: UserError."""
    try:
        return datasets.load_dataset_builder(name, config_name, cache_dir=cache_dir)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
    except (
        FileNotFoundError,
        ValueError,
    ) as error:  # not found, empty, private; the second: no such configuration
        if is_network_error(error):
            raise
        flag = (
            f"--dataset_config_name {config_name}"
            if "BuilderConfig" in str(error)
            else f"--dataset_name {name}"
        )
        hint = (
            ""
            if "BuilderConfig" in str(error)
            else " Pass a Hub id or a folder; set HF_TOKEN for a private one."
        )
        raise UserError(f"{flag}: {one_line(error)}{hint}") from error
    export, folder = "refs/convert/parquet", f", folder {config_name}" if config_name else ""
    logger.warning(
        "%s is a script dataset, which is never run; trying its parquet export, %s.", name, export
    )
    where = f"--dataset_name {name}: a script dataset, never run; it has no parquet export (revision {export}{folder})"
    advice = " Look for a parquet copy of it on the Hub."
    with as_user_error(FileNotFoundError, ValueError, HfHubHTTPError, where=where, advice=advice):
        return datasets.load_dataset_builder(
            name, data_dir=config_name, cache_dir=cache_dir, revision=export
        )


def download_snapshot(builder: datasets.DatasetBuilder, cache_dir: str | None) -> str | None:
    """Downloads the Hub files that the builder reads (--streaming False). Returns their folder, None if local."""
    urls = (url for files in (builder.config.data_files or {}).values() for url in files)
    on_hub = [
        match for url in urls if (match := re.match(r"hf://datasets/([^@]+)@([^/]+)/(.+)", url))
    ]
    if not on_hub:
        logger.warning(
            "--streaming False has no effect: the files of %s are already here.",
            builder.dataset_name,
        )
        return None
    repo_id, revision = on_hub[0].group(1, 2)
    patterns = [match.group(3) for match in on_hub] + ["README.md", "*metadata.*"]
    logger.info("downloading %d files of %s (--streaming False)", len(on_hub), repo_id)
    where = {"repo_type": "dataset", "revision": revision, "cache_dir": cache_dir}
    return huggingface_hub.snapshot_download(repo_id, allow_patterns=patterns, **where)


def find_columns(
    wanted: tuple[str | None, str | None], found: list[str], where: str
) -> tuple[str, ...]:
    """The (audio, text) columns: those that are wanted, by default the first usual names; no text if "" is wanted and
    there is none. Raises: UserError."""
    columns = []
    for flag, name, usual in zip(
        ("audio", "text"), wanted, (AUDIO_COLUMNS, TEXT_COLUMNS), strict=True
    ):
        names = [known for known in ([name] if name else usual) if known in found] + [""] * (
            name == ""
        )
        if not names:
            there = ", ".join(found) or "nothing: the split is empty"
            raise UserError(
                f"--{flag}_column_name {name or 'is missing'}: no such column in {where}. Found: {there}."
            )
        columns.append(names[0])
    return tuple(columns)


def open_part(
    builder: datasets.DatasetBuilder, part: str, columns: tuple
) -> tuple[datasets.IterableDataset, tuple]:
    """One split with its audio as bytes or path, never decoded, and its text; and the names of these two columns.
    Folder and tar builders import torchcodec even for Audio(decode=False) (datasets 5.2, features/audio.py:106), so
    that their column becomes the file's path, or bytes and path. Raises: UserError for a wrong column."""
    dataset = builder.as_streaming_dataset(part)
    if dataset.features is None:
        dataset = (
            dataset._resolve_features()
        )  # reads the first rows; datasets 5.2 has no public name for it
    features = dataset.features or {}
    columns = find_columns(columns, list(features), f"split '{part}' of {builder.dataset_name}")
    audio, text = (features.get(column) for column in columns)
    dtype = getattr(text, "dtype", type(text).__name__)
    if columns[1] and dtype not in ("string", "large_string"):
        raise UserError(
            f"--text_column_name {columns[1]}: holds {dtype}, not text. Found: {', '.join(features)}."
        )
    if isinstance(audio, datasets.Audio):  # else it holds bytes, a path, or both already
        path = datasets.Value("string")
        undecoded = {
            "audiofolder": path,
            "webdataset": {"bytes": datasets.Value("binary"), "path": path},
        }
        dataset = dataset.cast_column(
            columns[0], undecoded.get(builder.name, datasets.Audio(decode=False))
        )
    return dataset.select_columns([column for column in columns if column]), columns


def load_source(
    name: str,
    config_name: str | None,
    split: str,
    columns: tuple,
    cache_dir: str | None,
    streaming: bool,
    record: str,
) -> SpeechSource:
    """Opens a dataset without reading its audio; 'train+validation' becomes one source with the files of both.
    columns: (audio, text), None for the usual names, text "" if it may be missing.
    Raises: UserError for a missing dataset, configuration, split or column, or no rows."""
    builder, files = None, manifest_files(name, config_name)
    if not files:
        builder = load_builder(name, config_name, cache_dir)
        if not streaming and (folder := download_snapshot(builder, cache_dir)):
            builder = load_builder(
                folder, config_name if builder.config.name == config_name else None, cache_dir
            )
        if hasattr(builder.config, "decode_num_threads"):
            builder.config.decode_num_threads = (
                0  # else Hub folders are decoded whatever we cast (builder.py:1186)
            )
        files = {str(part): list(urls) for part, urls in (builder.config.data_files or {}).items()}
    parts = [part.strip() for part in split.split("+")]
    for part in parts:
        if part not in files:
            raise UserError(f"split '{part}': {name} has no such split. Found: {', '.join(files)}.")
    data_files = tuple(url for part in parts for url in files[part])
    opened = []
    for part in parts:
        if builder is not None:
            dataset, columns = open_part(builder, part, columns)
        else:
            columns = find_columns(
                columns, list(next(read_manifest(files[part]), {})), files[part][0]
            )
            arguments = {"files": files[part], "columns": columns}
            dataset = datasets.IterableDataset.from_generator(read_manifest, gen_kwargs=arguments)
        opened.append(dataset)
    num_rows = count_rows(builder, parts, opened, data_files)
    if num_rows == 0:
        raise UserError(
            f"split '{split}' of {name} is empty, or none of its {len(data_files)} files is readable."
        )
    commit = re.match(r"hf://datasets/[^@]+@([^/]+)/", data_files[0])
    kind, revision = builder.name if builder else "manifest", commit.group(1) if commit else None
    where = (record, name, config_name, split, kind, revision)
    return SpeechSource(*where, tuple(opened), data_files, *columns, num_rows)


def count_rows(builder: Any, parts: list[str], opened: list, urls: tuple[str, ...]) -> int | None:
    """Rows of a source without reading its audio: from parquet footers, metadata files or split info, else None."""
    if builder is None:
        return sum(1 for _ in read_manifest(list(urls)))
    if builder.name.endswith("folder"):
        return sum(1 for dataset in opened for _ in dataset)  # paths and metadata only
    if builder.name == "parquet":
        with ThreadPoolExecutor(16) as pool:
            return sum(map(sum, pool.map(rows_of_groups, urls)))
    counts = [
        splits[part].num_examples if part in (splits := builder.info.splits or {}) else None
        for part in parts
    ]
    return sum(counts) if all(counts) else None


def rows_of_groups(url: str) -> list[int]:
    """Rows of each row group, according to a parquet file's footer; none if the file is damaged (its rejection is
    counted while reading)."""
    try:
        with fsspec.open(url, "rb") as file:
            footer = pyarrow.parquet.ParquetFile(file).metadata
            return [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    except pyarrow.ArrowInvalid:
        return []


@dataclass(frozen=True)
class SourceRow:
    """One undecoded row. `rejection` is set when the file could not be read from here on."""

    id: str
    audio: str | dict[str, Any] | None
    text: str | None
    rejection: Rejection | None = None

    def size_in_bytes(self) -> int:
        """Of the encoded audio; 0 if it lies on another machine."""
        cell = self.audio if isinstance(self.audio, dict) else {"path": self.audio}
        data, path = cell.get("bytes"), cell.get("path") or ""
        return (
            len(data) if data is not None else os.path.getsize(path) if os.path.exists(path) else 0
        )


class ShardReader:
    """The rows of one file, without its first num_rows. Network errors are waited out and reading goes on at the same
    row; a damaged file ends in one rejected row that says so."""

    def __init__(
        self, source: SpeechSource, place: tuple[int, int], num_rows: int, wait_in_seconds: float
    ) -> None:
        self.source, self.place, self.patience = source, place, Backoff(wait_in_seconds)
        self.num_rows = num_rows  # before the one that was yielded last
        self.id = "/".join(filter(None, [source.record, source.split, *map(str, place)]))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Of a parquet file only the row groups that remain are read, of others everything."""
        shard, first, before = self.source.open_shard(*self.place), self.num_rows, 0
        if first == 0 or self.source.kind != "parquet":
            yield from shard.skip(first)
            return
        groups, sizes = shard.reshard(), rows_of_groups(self.source.url(*self.place))
        for number, size in enumerate(sizes):
            if before + size > first:
                yield from groups.shard(num_shards=len(sizes), index=number).skip(
                    max(0, first - before)
                )
            before += size

    def __iter__(self) -> Iterator[SourceRow]:
        while True:
            try:
                for row in self.rows():
                    audio, text = row[self.source.audio_column], row.get(self.source.text_column)
                    path = audio.get("path") if isinstance(audio, dict) else audio
                    self.patience.reset()
                    yield SourceRow(f"{self.id}/{path or ''}", audio, text)
                    self.num_rows += 1
                return
            except Exception as error:
                # pyarrow's "Corrupt snappy compressed data" is a bare OSError; the disk's have a number.
                is_bare = type(error) in (pyarrow.ArrowInvalid, OSError, tarfile.ReadError)
                if is_bare and getattr(error, "errno", None) is None:
                    yield SourceRow(
                        self.id,
                        None,
                        None,
                        Rejection("file_damaged", one_line(error)[:200], self.id),
                    )
                    return
                self.patience.wait(error, f"reading {self.source.name} {self.id}")
