"""Where rows come from: opens a data set without reading its audio."""

import functools
import logging
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import datasets

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import is_too_long
from speech_finetuning.data import kaldi, recordings
from speech_finetuning.data.addresses import root_of_address
from speech_finetuning.data.builders import (
    download_snapshot,
    files_of_builder,
    first_hub_file,
    lists_of,
    open_builder,
    open_split,
    warn_if_moved,
)
from speech_finetuning.data.cells import AudioCell, check_path, is_relative, path_of
from speech_finetuning.data.columns import (
    PREVIOUS_SEGMENT,
    OpenedSplit,
    SpeechColumns,
    WantedColumns,
)
from speech_finetuning.data.dataset_names import check_path_exists
from speech_finetuning.data.kaldi import find_kaldi_folders, open_kaldi_folder
from speech_finetuning.data.listed import WindowLimits, tell_of_windows
from speech_finetuning.data.manifests import manifest_files, open_manifests, open_metadata
from speech_finetuning.data.parquet_windows import FileWindows, find_windows
from speech_finetuning.data.recordings import find_recordings, open_recordings
from speech_finetuning.data.row_counts import known_num_rows
from speech_finetuning.data.tars import open_tars

logger = logging.getLogger(__name__)

# Of each role, where another split may be meant.
USUAL_SPLITS = {"train": "train", "guard": "validation", "predict": "test"}
# Common Voice's validated.tsv is what listeners approved of, with the training split in it.
EVALUATION_SPLIT = re.compile("test|val(?!idated)|dev|eval", re.IGNORECASE)
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
KINDS_OF_LISTS = (
    "manifest",
    "csv",
    "json",
    kaldi.KIND,
    recordings.KIND,
)  # kinds whose rows are lines


@dataclass(frozen=True, kw_only=True)
class SpeechSource:
    """Rows of undecoded audio and text: one streaming dataset for each part of the split."""

    record: str  # its name in a --data_mix, else ""
    name: str
    config_name: str | None
    split: str  # also several, 'train+validation'
    kind: str  # the `datasets` builder: parquet, audiofolder, webdataset, ...; or manifest
    revision: str | None  # commit on the Hub, None for local files
    root: str | None  # of a data set from the Hub: where its files are; its rows name no others
    allow_audio_urls: bool  # but these https:// addresses
    parts: tuple[datasets.IterableDataset, ...]
    data_files: tuple[str, ...]
    columns: SpeechColumns
    num_rows: int | None  # None when only reading everything would tell
    row_groups: tuple[tuple[int, ...], ...] | None = None  # rows of those of each parquet file
    largest_row_group_in_bytes: int = 0
    # Of each parquet file, where its rows are windows of neighbours; None: each is an utterance.
    windows: tuple[FileWindows, ...] | None = None

    @property
    def id_prefix(self) -> str:
        """What the ids of its rows begin with: record, split."""
        return "".join(f"{part}/" for part in (self.record, self.split) if part)

    @property
    def has_rows_of_paths(self) -> bool:
        """Whether its rows are only paths, read from lists or found in a folder, and counted."""
        is_list = self.kind in KINDS_OF_LISTS or self.kind.endswith("folder")
        return is_list and self.num_rows is not None

    @property
    def has_known_rows(self) -> bool:
        """Whether the number of each row is known before it is read."""
        return self.has_rows_of_paths or self.row_groups is not None

    @property
    def audio_column(self) -> str:
        return self.columns.audio

    @property
    def text_column(self) -> str | None:
        return self.columns.text

    @property
    def data_files_name_audio(self) -> bool:
        """Whether its files are lists, whose rows name audio in files of its own."""
        return self.kind in ("manifest", kaldi.KIND, recordings.KIND)

    @property
    def is_remote(self) -> bool:
        return "://" in self.data_files[0]

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

    def audio_beside_file(self, cell: AudioCell, place: tuple[int, int]) -> AudioCell:
        """A path in a local parquet file is relative to that file, unless it leads somewhere from
        the working directory, from which `datasets` looks."""
        path = path_of(cell)
        has_bytes = isinstance(cell, dict) and cell["bytes"] is not None
        if self.kind != "parquet" or not path or has_bytes or not is_relative(path):
            return cell
        beside = os.path.join(os.path.dirname(self.url(*place)), path)
        return beside if os.path.isfile(beside) and not os.path.exists(path) else cell

    def own_audio(self, cell: AudioCell, place: tuple[int, int]) -> AudioCell:
        """The audio of a row of this shard, which of a data set from the Hub must be its own.

        Raises: Rejection(audio_outside_dataset).
        """
        if self.root is None:
            return self.audio_beside_file(cell, place)
        folder = self.root
        if len(self.data_files) == len(self.shards()):  # each shard is a file
            folder = os.path.dirname(self.url(*place))
        return check_path(
            cell,
            root=self.root,
            folder=folder,
            allow_urls=self.allow_audio_urls,
        )


def load_source(
    name: str,
    *,
    split: str,
    config_name: str | None = None,
    audio_column: str | None = None,
    text_column: str | None = None,
    speaker_column: str | None = None,
    text_required: bool = True,
    cache_dir: str | None = None,
    streaming: bool = True,
    record: str = "",
    revision: str | None = None,
    allow_audio_urls: bool = False,
    window_limits: WindowLimits | None = None,
    group_column: str | None = None,
    prompt_column: str | None = None,
) -> SpeechSource:
    """Opens a dataset without reading its audio; 'train+validation' is one source of both splits.

    name: a Hub id, a folder, or a list. ..._column: None for the usual names, or for no groups and
    prompts; prompt_column: also PREVIOUS_SEGMENT. record: its name in a --data_mix. revision: of a
    run that goes on. allow_audio_urls: whether rows of the Hub may name https:// addresses.
    Raises: UserError for a missing dataset, configuration, split or column, or no rows.
    """
    found = find_files(
        name, config_name, cache_dir=cache_dir, streaming=streaming, revision=revision
    )
    parts = parts_of_split(name, split, found.files)
    wanted = WantedColumns(audio=audio_column, text=text_column, speaker=speaker_column)
    wanted = replace(wanted, text_required=text_required, group=group_column, prompt=prompt_column)
    opened = open_parts(found, parts, wanted, window_limits)
    source = SpeechSource(
        record=record,
        name=name,
        config_name=config_name,
        split=split,
        kind=found.kind,
        revision=found.revision,
        root=found.root,
        allow_audio_urls=allow_audio_urls,
        parts=tuple(part.dataset for part in opened),
        data_files=tuple(url for part in parts for url in found.files[part]),
        columns=opened[0].columns,
        num_rows=total_rows(opened),
        row_groups=all_row_groups(opened),
        largest_row_group_in_bytes=max(part.largest_row_group_in_bytes for part in opened),
    )
    check_not_empty(source.num_rows, f"split '{split}' of {name}", len(source.data_files))
    return with_windows(source, window_limits)


def with_windows(source: SpeechSource, limits: WindowLimits | None) -> SpeechSource:
    """Of parquet files with the times of segments: its rows are windows of neighbours. Lists have
    been opened with theirs. Raises: errors of the network."""
    if limits is None or not limits.joins_parquet:
        return source
    if source.row_groups is None or source.columns.segments is None:
        return source
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(
            functools.partial(find_windows_of_file, source, limits),
            source.shards(),
            source.row_groups,
        )
        windows = tuple(found)
    row_groups = tuple(tuple(map(len, file)) for file in windows)
    num_rows = sum(map(sum, row_groups))
    tell_of_windows(source.num_rows or 0, num_rows)
    return replace(source, windows=windows, row_groups=row_groups, num_rows=num_rows)


def find_windows_of_file(
    source: SpeechSource, limits: WindowLimits, place: tuple[int, int], sizes: tuple[int, ...]
) -> FileWindows:
    own_audio = functools.partial(source.own_audio, place=place)
    return find_windows(source.url(*place), sizes, source.columns, limits, own_audio)


class MissingSplit(UserError):
    """A data set without the split that was named. found: the names of those that it has."""

    def __init__(self, message: str, found: Iterable[str]) -> None:
        super().__init__(message)
        self.found = tuple(found)

    def only_split(self, role: str, split: str) -> str | None:
        """The one that must be meant, as there is no other and none was named: a folder of clips,
        or of one table, is 'train' to `datasets`, or called as the table. What is meant for scores
        is never trained on."""
        if len(self.found) != 1 or split != USUAL_SPLITS.get(role):
            return None
        (only,) = self.found
        return None if role == "train" and EVALUATION_SPLIT.match(only) else only


@dataclass(frozen=True, kw_only=True)
class FoundFiles:
    """The files of a data set, not yet opened; the other fields are those of SpeechSource."""

    files: dict[str, list[str]]  # of each split
    lists: dict[str, list[str]] | None = None  # those among them that are tables of all rows
    kind: str = "manifest"
    builder: datasets.DatasetBuilder | None = None  # None: lists
    revision: str | None = None
    root: str | None = None


def find_files(
    name: str,
    config_name: str | None,
    *,
    cache_dir: str | None,
    streaming: bool,
    revision: str | None,
) -> FoundFiles:
    """Raises: UserError for a data set or a configuration that is not there."""
    if is_too_long(name):
        raise UserError(f"--dataset_name {name[:40]}...: too long for the name of a file.")
    if files := manifest_files(name, config_name):
        root = root_of_address(name) if "://" in name else None
        return FoundFiles(files=files, lists=files, root=root)
    if files := find_kaldi_folders(name, config_name):
        return FoundFiles(files=files, kind=kaldi.KIND)
    if files := find_recordings(name, config_name):
        return FoundFiles(files=files, kind=recordings.KIND)
    check_path_exists(name)
    builder = open_builder(name, config_name, cache_dir=cache_dir, revision=revision)
    on_hub = first_hub_file(builder)
    if on_hub is None:
        check_not_packed(builder)
        if not streaming:
            logger.warning(
                "--streaming False has no effect: the files of %s are already here.", name
            )
        return found_by(builder)
    if revision is not None:
        warn_if_moved(on_hub)
    root = on_hub.root
    if not streaming:
        root = download_snapshot(builder, cache_dir)
        is_named = builder.config.name == config_name
        builder = open_builder(root, config_name if is_named else None, cache_dir=cache_dir)
    return replace(found_by(builder), revision=on_hub.revision, root=root)


def check_not_packed(builder: datasets.DatasetBuilder) -> None:
    """Raises: UserError for a list in an archive here, which `datasets` would read by rules of its
    own, and whose paths it would look for in the working directory."""
    urls = [url for urls in files_of_builder(builder).values() for url in urls]
    packed = [url for url in urls if url.lower().endswith(PACKED_SUFFIXES)]
    if builder.name in ("csv", "json") and packed:
        raise UserError(f"{packed[0]}: a packed list is not read. Unpack it, beside its clips.")


def found_by(builder: datasets.DatasetBuilder) -> FoundFiles:
    """Lists are read by our own reader, wherever they lie; all else by `datasets`.

    It reads CSV with pandas, which takes one cell too many for an index and an open quotation mark
    for a long text.
    """
    return FoundFiles(
        files=files_of_builder(builder),
        lists=lists_of(builder),
        kind=builder.name,
        builder=builder,
    )


def open_parts(
    found: FoundFiles, parts: list[str], wanted: WantedColumns, limits: WindowLimits | None
) -> list[OpenedSplit]:
    """Every part of a split; their columns have the same names. Raises: UserError."""
    opened = []
    has_no_columns = found.kind in (kaldi.KIND, recordings.KIND)
    if has_no_columns and (wanted.audio or wanted.text or wanted.speaker):
        logger.warning(
            "--audio_column_name, --text_column_name and --speaker_column_name have no effect: the "
            "files of %s have no columns to choose from.",
            "Kaldi" if found.kind == kaldi.KIND else "recordings with transcripts",
        )
    for part in parts:
        if found.lists is not None and found.kind == "audiofolder":
            one = open_metadata(found.lists[part], wanted, limits)
        elif found.lists is not None:
            one = open_manifests(found.lists[part], wanted, limits)
        elif found.kind == kaldi.KIND:
            one = open_kaldi_folder(found.files[part], wanted, limits)
        elif found.kind == recordings.KIND:
            one = open_recordings(part, found.files[part], wanted, limits)
        elif found.kind == "webdataset":
            assert found.builder is not None
            one = open_tars(found.files[part], wanted, known_num_rows(found.builder, part))
        else:
            assert found.builder is not None
            one = open_split(found.builder, part, wanted)
        if wanted.group is not None and one.columns.group is None:
            raise UserError(f"--group_column_name {wanted.group}: no columns in {found.kind}.")
        check_prompts(wanted, one.columns, found.kind)
        opened.append(one)
        if not has_no_columns:
            wanted = replace(wanted, audio=one.columns.audio, text=one.columns.text)
    return opened


def check_prompts(wanted: WantedColumns, columns: SpeechColumns, kind: str) -> None:
    """Raises: UserError if prompts are wanted and this kind of data has none."""
    if wanted.prompt is None or columns.prompt is not None:
        return
    if wanted.prompt != PREVIOUS_SEGMENT:
        raise UserError(
            f"--prompt_column_name {wanted.prompt}: no columns in {kind}. {PREVIOUS_SEGMENT} takes "
            "what the segment before says."
        )
    if kind not in KINDS_OF_LISTS and kind != "audiofolder":
        raise UserError(
            f"--prompt_column_name {PREVIOUS_SEGMENT}: not with {kind}, only with lists of segments, "
            "recordings with transcripts, and Kaldi's folders. Pass the name of a column."
        )


def check_not_empty(num_rows: int | None, place: str, num_files: int) -> None:
    """Raises: UserError if there are no rows."""
    if num_rows == 0:
        unreadable = "its file is not readable"
        if num_files != 1:
            unreadable = f"none of its {num_files} files is readable"
        raise UserError(
            f"{place} is empty, or {unreadable}. A list needs a line for each clip, below the names "
            "of its columns."
        )


def all_row_groups(opened: list[OpenedSplit]) -> tuple[tuple[int, ...], ...] | None:
    """Of every file of all parts; None if they are not parquet files."""
    groups: tuple[tuple[int, ...], ...] = ()
    for part in opened:
        if part.row_groups is None or len(part.row_groups) != part.dataset.num_shards:
            return None
        groups += part.row_groups
    return groups


def total_rows(opened: list[OpenedSplit]) -> int | None:
    counts = [part.num_rows for part in opened if part.num_rows is not None]
    return None if len(counts) < len(opened) else sum(counts)


def parts_of_split(name: str, split: str, found: Iterable[str]) -> list[str]:
    """The splits that 'train+validation' names. Raises: UserError for one that is not there."""
    parts = [part.strip() for part in split.split("+")]
    for part in parts:
        if "[" in part:
            raise UserError(
                f"split '{part}': a stream is not sliced. Name the split alone, "
                f"'{part.partition('[')[0]}'. --do_eval holds out a tenth of it (--eval_fraction) "
                "by speaker if there is no split to score; --max_train_samples N and "
                "--max_eval_samples N take an even sample."
            )
        if part not in found:
            raise MissingSplit(
                f"split '{part}': {name} has no such split. Found: {', '.join(found)}.", found
            )
    return parts
