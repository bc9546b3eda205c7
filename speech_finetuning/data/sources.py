"""Where rows come from: opens a data set without reading its audio."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import datasets

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.builders import (
    count_rows,
    files_of_builder,
    hub_file,
    open_builder,
    open_split,
)
from speech_finetuning.data.columns import SpeechColumns, WantedColumns
from speech_finetuning.data.manifests import count_manifest, manifest_files, open_manifest


@dataclass(frozen=True, kw_only=True)
class SpeechSource:
    """Rows of undecoded audio and text: one streaming dataset for each part of the split."""

    record: str  # its name in a --data_mix, else ""
    name: str
    config_name: str | None
    split: str  # also several, 'train+validation'
    kind: str  # the `datasets` builder: parquet, audiofolder, webdataset, ...; or manifest
    revision: str | None  # commit on the Hub, None for local files
    parts: tuple[datasets.IterableDataset, ...]
    data_files: tuple[str, ...]
    audio_column: str
    text_column: str | None
    num_rows: int | None  # None when only reading everything would tell

    def shards(self) -> list[tuple[int, int]]:
        """(part, shard within the part) for every file of the source, in the order of the files."""
        return [
            (part, shard)
            for part, dataset in enumerate(self.parts)
            for shard in range(dataset.num_shards)
        ]

    def open_shard(self, part: int, shard: int) -> datasets.IterableDataset:
        dataset = self.parts[part]
        return dataset.shard(num_shards=dataset.num_shards, index=shard)

    def url(self, part: int, shard: int) -> str:
        """The address of a parquet file, which is a shard."""
        return self.data_files[self.shards().index((part, shard))]


def load_source(
    name: str,
    *,
    split: str,
    config_name: str | None = None,
    audio_column: str | None = None,
    text_column: str | None = None,
    text_required: bool = True,
    cache_dir: str | None = None,
    streaming: bool = True,
    record: str = "",
) -> SpeechSource:
    """Opens a dataset without reading its audio; 'train+validation' is one source of both splits.

    name: a Hub id, a folder, or a list (CSV, TSV, JSON lines).
    audio_column, text_column: None for the usual names.
    text_required: False if the text column may be missing.
    record: the source's name in a --data_mix.
    Raises: UserError for a missing dataset, configuration, split or column, or no rows.
    """
    builder = None
    files = manifest_files(name, config_name)
    if not files:
        builder = open_builder(name, config_name, cache_dir=cache_dir, streaming=streaming)
        files = files_of_builder(builder)
    parts = parts_of_split(name, split, files)
    urls = tuple(url for part in parts for url in files[part])
    wanted = WantedColumns(audio=audio_column, text=text_column, text_required=text_required)
    opened, columns = open_parts(builder, {part: files[part] for part in parts}, wanted)
    num_rows = count_manifest(urls) if builder is None else count_rows(builder, parts, opened, urls)
    if num_rows == 0:
        raise UserError(
            f"split '{split}' of {name} is empty, or none of its {len(urls)} files is readable."
        )
    on_hub = hub_file(urls[0])
    return SpeechSource(
        record=record,
        name=name,
        config_name=config_name,
        split=split,
        kind="manifest" if builder is None else builder.name,
        revision=None if on_hub is None else on_hub.revision,
        parts=tuple(opened),
        data_files=urls,
        audio_column=columns.audio,
        text_column=columns.text,
        num_rows=num_rows,
    )


def open_parts(
    builder: datasets.DatasetBuilder | None,
    files: dict[str, list[str]],
    wanted: WantedColumns,
) -> tuple[list[datasets.IterableDataset], SpeechColumns]:
    """A dataset for each part of a split, and the columns, which have the same names in all.

    builder: None for lists. Raises: UserError for a wrong column.
    """
    opened = []
    for part, names in files.items():
        if builder is None:
            dataset, columns = open_manifest(names, wanted)
        else:
            dataset, columns = open_split(builder, part, wanted)
        opened.append(dataset)
        wanted = replace(wanted, audio=columns.audio, text=columns.text)
    return opened, columns


def parts_of_split(name: str, split: str, found: Iterable[str]) -> list[str]:
    """The splits that 'train+validation' names. Raises: UserError for one that is not there."""
    parts = [part.strip() for part in split.split("+")]
    for part in parts:
        if part not in found:
            raise UserError(f"split '{part}': {name} has no such split. Found: {', '.join(found)}.")
    return parts
