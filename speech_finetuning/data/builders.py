"""What `datasets` opens: Hub repositories, folders of audio, parquet files, tars."""

import contextlib
import functools
import glob
import itertools
import logging
import os
import re
import tempfile
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import datasets
import huggingface_hub
import pyarrow
from datasets.data_files import DataFilesList
from datasets.exceptions import DataFilesNotFoundError
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError

from speech_finetuning.base.errors import UserError, one_line
from speech_finetuning.base.network import as_user_error, is_network_error
from speech_finetuning.data.annotations import advice_on
from speech_finetuning.data.columns import (
    AUDIO_COLUMNS,
    ColumnSample,
    OpenedSplit,
    WantedColumns,
    find_columns,
    find_name,
    find_segment_columns,
)
from speech_finetuning.data.dataset_names import not_opened, what_folder_lacks, where_it_is_now
from speech_finetuning.data.features import (
    check_is_text,
    feature_at,
    is_text,
    is_typed,
    names_of_features,
    sampling_rate_column,
    undecoded_feature,
    without_decoding,
)
from speech_finetuning.data.footers import read_footer
from speech_finetuning.data.guessing import cell_at, only_one, top_of
from speech_finetuning.data.manifests import NUM_ROWS_TO_INSPECT
from speech_finetuning.data.places import has_audio_suffix
from speech_finetuning.data.row_counts import opened_split
from speech_finetuning.data.saved import find_saved, load_saved
from speech_finetuning.data.segments import times_are_of_recordings

logger = logging.getLogger(__name__)

PARQUET_EXPORT = "refs/convert/parquet"  # the revision in which the Hub keeps its own conversion


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """Where a file of a data set lies on the Hub."""

    repo_id: str
    revision: str
    path: str
    root: str  # the address of the repository's files at this revision


def hub_file(url: str) -> HubFile | None:
    """The parts of an address as `datasets` writes it, hf://datasets/ID@REVISION/PATH; else None.

    huggingface_hub.parse_hf_uri (2.4) refuses ids without a namespace, such as `squad`.
    """
    match = re.fullmatch(r"(hf://datasets/([^@]+)@([^/]+))/(.+)", url.split("::")[-1])
    if match is None:
        return None
    root, repo_id, revision, path = match.groups()
    return HubFile(
        repo_id=repo_id,
        revision=urllib.parse.unquote(revision),
        path=path,
        root=root,
    )


def load_builder(
    name: str,
    config_name: str | None,
    *,
    cache_dir: str | None,
    revision: str | None = None,
) -> datasets.DatasetBuilder:
    """The `datasets` builder; of a script dataset that of its parquet export.

    revision: of a data set on the Hub; None: the newest. Raises: UserError.
    """
    try:
        return datasets.load_dataset_builder(
            name, config_name, cache_dir=cache_dir, revision=revision
        )
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
    except ConnectionError as error:
        advice = where_it_is_now(name) if HF_HUB_OFFLINE else None
        if advice is None:
            raise
        raise UserError(f"--dataset_name {name}: {advice}") from error
    except (FileNotFoundError, ValueError) as error:  # not found, empty, private; no such config
        if is_network_error(error):
            raise
        raise not_opened(name, config_name, revision, error) from error
    return load_parquet_export(name, config_name, cache_dir=cache_dir)


def load_parquet_export(
    name: str,
    config_name: str | None,
    *,
    cache_dir: str | None,
) -> datasets.DatasetBuilder:
    """The builder of the Hub's own conversion of a script dataset.

    Raises: UserError if there is none.
    """
    logger.warning(
        "%s is a script dataset, which is never run; trying its parquet export, %s.",
        name,
        PARQUET_EXPORT,
    )
    place = f"revision {PARQUET_EXPORT}"
    if config_name:
        place += f", folder {config_name}"
    with as_user_error(
        FileNotFoundError,
        ValueError,
        HfHubHTTPError,
        where=(
            f"--dataset_name {name}: a script dataset, never run; "
            f"it has no parquet export ({place})"
        ),
        advice=f" {where_it_is_now(name) or 'Look for a parquet copy of it on the Hub.'}",
    ):
        return datasets.load_dataset_builder(
            name,
            data_dir=config_name,
            cache_dir=cache_dir,
            revision=PARQUET_EXPORT,
        )


def open_builder(
    name: str,
    config_name: str | None,
    *,
    cache_dir: str | None,
    revision: str | None = None,
) -> datasets.DatasetBuilder:
    """The builder of a data set, set to decode no audio. Raises: UserError."""
    folder = Path(name).resolve()
    if saved := find_saved(name):
        builder = load_saved(saved, cache_dir)
    elif folder.is_dir() and glob.has_magic(str(folder)):
        builder = load_folder_with_wildcards(folder, config_name, cache_dir=cache_dir)
    else:
        if folder.is_dir() and os.sep not in name:
            name = os.path.join(os.curdir, name)  # `datasets` has builders called csv, parquet ...
        builder = load_builder(name, config_name, cache_dir=cache_dir, revision=revision)
    config: Any = builder.config  # its fields depend on the builder
    if hasattr(config, "decode_num_threads"):
        # Else audio folders on the Hub are decoded despite casts (datasets 5.2, builder.py:1186).
        config.decode_num_threads = 0
    return builder


def load_folder_with_wildcards(
    folder: Path, config_name: str | None, *, cache_dir: str | None
) -> datasets.DatasetBuilder:
    """The builder of a folder whose path contains [, * or ?, which `datasets` (5.2) takes for
    wildcards: it is shown links to the files in a folder of another name. Raises: UserError."""
    with tempfile.TemporaryDirectory() as name:
        links = Path(name).resolve()
        for file in folder.rglob("*"):
            link = links / file.relative_to(folder)
            if file.is_file():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file)
        builder = load_builder(str(links), config_name, cache_dir=cache_dir)
    files = cast(dict[Any, DataFilesList], builder.config.data_files or {})
    for split, urls in files.items():
        own = [str(folder / Path(url).relative_to(links)) for url in urls]
        files[split] = DataFilesList(own, urls.origin_metadata)
    builder.base_path = str(folder)
    return builder


def files_of_builder(builder: datasets.DatasetBuilder) -> dict[str, list[str]]:
    """{split: [path or address]}."""
    files = builder.config.data_files or {}
    return {str(split): list(urls) for split, urls in files.items()}


def lists_of(builder: datasets.DatasetBuilder) -> dict[str, list[str]] | None:
    """{split: [file]} of the tables that hold a data set's rows: its files, or an audio folder's
    metadata. None if other files hold them, or the data set has its own rules to read a table."""
    files = files_of_builder(builder)
    suffixes = (".csv", ".tsv", ".jsonl", ".json")
    if builder.name in ("csv", "json"):
        rules = [getattr(builder.config, name, None) for name in ("names", "column_names", "field")]
        is_plain = all(url.endswith(suffixes) for urls in files.values() for url in urls)
        return files if is_plain and not any(rules) else None
    if builder.name != "audiofolder":
        return None
    metadata = {split: [url for url in urls if is_metadata(url)] for split, urls in files.items()}
    is_complete = all(
        urls and all(url.endswith(suffixes) for url in urls) for urls in metadata.values()
    )
    has_archives = any(url.endswith(".zip") for urls in files.values() for url in urls)
    return metadata if is_complete and not has_archives else None


def is_metadata(url: str) -> bool:
    return url.rpartition("/")[2] in ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def first_hub_file(builder: datasets.DatasetBuilder) -> HubFile | None:
    """None if the files are here."""
    urls = [url for urls in files_of_builder(builder).values() for url in urls]
    return hub_file(urls[0]) if urls else None


def warn_if_moved(file: HubFile) -> None:
    """Says that a data set has changed since a run began, which goes on with the old revision."""
    refs = huggingface_hub.HfApi().list_repo_refs(file.repo_id, repo_type="dataset")
    newest = {ref.target_commit for ref in [*refs.branches, *refs.converts, *refs.tags]}
    if file.revision not in newest:
        logger.warning(
            "%s has changed on the Hub since this run began. The run goes on with the data that it "
            "began with, revision %s; another --output_dir begins with the new data.",
            file.repo_id,
            file.revision,
        )


def download_snapshot(builder: datasets.DatasetBuilder, cache_dir: str | None) -> str:
    """Downloads the Hub files that the builder reads (--streaming False). Returns their folder."""
    urls = [url for files in files_of_builder(builder).values() for url in files]
    on_hub = [file for file in map(hub_file, urls) if file is not None]
    assert on_hub, "local files need no download"
    logger.info("downloading files of %s: %d (--streaming False)", on_hub[0].repo_id, len(on_hub))
    try:
        return huggingface_hub.snapshot_download(
            on_hub[0].repo_id,
            repo_type="dataset",
            revision=on_hub[0].revision,
            allow_patterns=[*(file.path for file in on_hub), "README.md", "*metadata.*"],
            cache_dir=cache_dir,
        )
    except OSError as error:
        if "Consistency check failed" in str(error):  # huggingface_hub 2.4, of a body's length
            raise ConnectionError(one_line(error)) from error
        raise


def stream_of(builder: datasets.DatasetBuilder, split: str) -> datasets.IterableDataset:
    try:
        return cast(datasets.IterableDataset, builder.as_streaming_dataset(split))  # of one split
    except DataFilesNotFoundError as error:  # `datasets` guessed a kind that needs other files
        place = str(builder.config.data_dir or builder.base_path).removeprefix("./")
        raise UserError(f"--dataset_name {place}: {what_folder_lacks(Path(place))}") from error


def open_split(builder: datasets.DatasetBuilder, split: str, wanted: WantedColumns) -> OpenedSplit:
    """One split with its audio as bytes or path, never decoded, and its text.

    Raises: UserError for a wrong column, or a file that the builder cannot read.
    """
    urls = files_of_builder(builder)[split]
    with errors_of_builder(builder):
        dataset = stream_of(builder, split)
        if dataset.features is None:
            # Reads the first rows; datasets 5.2 has no public name for it.
            dataset = dataset._resolve_features()
        features = dataset.features or datasets.Features()
        place = f"split '{split}' of {builder.dataset_name}"
        columns = find_columns(
            names_of_features(features),
            with_audio_by_type(wanted, features, place),
            place,
            advice_on_metadata(builder),
            ColumnSample(
                cells=functools.partial(cells_of_first_rows, dataset, features),
                audio_tests=(has_audio_suffix,),
            ),
        )
        columns = replace(
            columns,
            sampling_rate=sampling_rate_column(features, columns.audio),
            segments=find_segment_columns(list(features)),
        )
        if columns.text is not None:
            check_is_text(features, columns.text)
        if builder.name == "parquet":
            # Files may differ in their other columns, which would be cast to those of the first.
            cast(Any, builder.config).columns = columns.top_names(list(features))
            dataset = stream_of(builder, split)
        dataset = with_undecoded_audio(dataset, builder.name, features, columns.audio)
        if columns.segments is not None and not times_are_of_recordings(
            dataset, columns, f"split '{split}'"
        ):
            columns = replace(columns, segments=None)
        # The column of speakers is read by itself from parquet files, and with the rows from others.
        names = columns.top_names(list(features), with_speaker=builder.name != "parquet")
        dataset = dataset.select_columns(names)
        return opened_split(builder, split, dataset, columns, urls)


def with_undecoded_audio(
    dataset: datasets.IterableDataset, kind: str, features: datasets.Features, column: str
) -> datasets.IterableDataset:
    """A column of audio, or a field of one, as bytes or path."""
    undecoded = undecoded_feature(kind, feature_at(features, column))
    if undecoded is None:
        return dataset
    top = top_of(column, list(features))
    inner = column[len(top) + 1 :]
    return dataset.cast_column(top, without_decoding(features[top], inner, undecoded))


@contextlib.contextmanager
def errors_of_builder(builder: datasets.DatasetBuilder) -> Iterator[None]:
    """Turns what a builder says about files that it cannot read into a UserError.

    ValueError stands for UnicodeDecodeError and pandas' ParserError too.
    """
    try:
        yield
    except UserError:
        raise
    except StopIteration as error:  # datasets 5.2, json.py: of an empty file
        place = builder.config.data_dir or builder.base_path
        raise UserError(f"{place}: a file of its data is empty.") from error
    except (ValueError, pyarrow.ArrowException, KeyError, NotImplementedError) as error:
        if is_network_error(error):
            raise
        place = builder.config.data_dir or builder.base_path
        raise UserError(
            f"{place}: {builder.name} cannot read its files: {one_line(error)[:600]}"
            f"{damaged_files(builder)}"
        ) from error


def damaged_files(builder: datasets.DatasetBuilder) -> str:
    """Parquet files of a folder that cannot be read, in words to end an error; none elsewhere."""
    if builder.name != "parquet":
        return ""
    urls = [url for urls in files_of_builder(builder).values() for url in urls]
    damaged = [url for url in urls if "://" not in url and read_footer(url) is None]
    if not damaged:
        return ""
    more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    return f" Damaged: {damaged[0]}{more}. Fetch it again, or take it out of the folder."


# ---- columns ----
def advice_on_metadata(builder: datasets.DatasetBuilder) -> str:
    """What to do about metadata of an audio folder that lie too high, or are another program's."""
    urls = [url for urls in files_of_builder(builder).values() for url in urls]
    folder = Path(builder.base_path or "")
    unread = [file.name for file in folder.glob("metadata.*") if str(file) not in urls]
    if builder.name not in ("audiofolder", "text") or not urls or "://" in urls[0]:
        return ""
    if not unread:
        return advice_on(str(folder))
    return (
        f" {folder / unread[0]} was not read: put it beside the audio, into "
        f"{os.path.dirname(urls[0])}, with file_name relative to there."
    )


def with_audio_by_type(
    wanted: WantedColumns, features: datasets.Features, place: str
) -> WantedColumns:
    """Names the one column of audio, if names do not tell it. Raises: UserError for several."""
    if wanted.audio is not None or find_name(list(features), None, AUDIO_COLUMNS) is not None:
        return wanted
    found = [name for name in names_of_features(features) if is_typed(feature_at(features, name))]
    return replace(wanted, audio=only_one(found, "--audio_column_name", "hold audio", place, ""))


def cells_of_first_rows(
    dataset: datasets.IterableDataset, features: datasets.Features
) -> dict[str, list[Any]]:
    """Of the columns of text."""
    names = [name for name in names_of_features(features) if is_text(feature_at(features, name))]
    if not names:
        return {}
    tops = list(dict.fromkeys(top_of(name, list(features)) for name in names))
    rows = list(itertools.islice(dataset.select_columns(tops), NUM_ROWS_TO_INSPECT))
    return {name: [cell_at(row, name) for row in rows] for name in names}
