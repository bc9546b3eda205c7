"""What `datasets` opens: Hub repositories, folders of audio, parquet files, tars."""

import logging
import re
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import datasets
import fsspec
import huggingface_hub
import pyarrow
import pyarrow.parquet
from huggingface_hub.errors import HfHubHTTPError

from speech_finetuning.base.errors import UserError, one_line
from speech_finetuning.base.network import as_user_error, is_network_error
from speech_finetuning.data.columns import SpeechColumns, WantedColumns, find_columns

logger = logging.getLogger(__name__)

PARQUET_EXPORT = "refs/convert/parquet"  # the revision in which the Hub keeps its own conversion


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """Where a file of a data set lies on the Hub."""

    repo_id: str
    revision: str
    path: str


def hub_file(url: str) -> HubFile | None:
    """The parts of an address as `datasets` writes it, hf://datasets/ID@REVISION/PATH; else None.

    huggingface_hub.parse_hf_uri (2.4) refuses ids without a namespace, such as `squad`.
    """
    match = re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", url)
    if match is None:
        return None
    repo_id, revision, path = match.groups()
    return HubFile(repo_id=repo_id, revision=urllib.parse.unquote(revision), path=path)


def load_builder(
    name: str,
    *,
    config_name: str | None,
    cache_dir: str | None,
) -> datasets.DatasetBuilder:
    """The `datasets` builder; of a script dataset that of its parquet export.

    Raises: UserError.
    """
    try:
        return datasets.load_dataset_builder(name, config_name, cache_dir=cache_dir)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
    except (FileNotFoundError, ValueError) as error:  # not found, empty, private; no such config
        if is_network_error(error):
            raise
        if "BuilderConfig" in str(error):
            raise UserError(f"--dataset_config_name {config_name}: {one_line(error)}") from error
        raise UserError(
            f"--dataset_name {name}: {one_line(error)} "
            "Pass a Hub id or a folder; set HF_TOKEN for a private one."
        ) from error
    return load_parquet_export(name, config_name=config_name, cache_dir=cache_dir)


def load_parquet_export(
    name: str,
    *,
    config_name: str | None,
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
        advice=" Look for a parquet copy of it on the Hub.",
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
    streaming: bool,
) -> datasets.DatasetBuilder:
    """The builder, of a downloaded snapshot if not streaming. Raises: UserError."""
    builder = load_builder(name, config_name=config_name, cache_dir=cache_dir)
    folder = None if streaming else download_snapshot(builder, cache_dir)
    if folder is not None:
        is_named = builder.config.name == config_name
        builder = load_builder(
            folder,
            config_name=config_name if is_named else None,
            cache_dir=cache_dir,
        )
    if hasattr(builder.config, "decode_num_threads"):
        # Else audio folders on the Hub are decoded despite all casts (datasets 5.2,
        # builder.py:1186).
        builder.config.decode_num_threads = 0
    return builder


def files_of_builder(builder: datasets.DatasetBuilder) -> dict[str, list[str]]:
    """{split: [path or address]}."""
    files = builder.config.data_files or {}
    return {str(split): list(urls) for split, urls in files.items()}


def download_snapshot(builder: datasets.DatasetBuilder, cache_dir: str | None) -> str | None:
    """Downloads the Hub files that the builder reads (--streaming False).

    Returns their folder, None if they are local.
    """
    urls = [url for files in files_of_builder(builder).values() for url in files]
    on_hub = [file for file in map(hub_file, urls) if file is not None]
    if not on_hub:
        logger.warning(
            "--streaming False has no effect: the files of %s are already here.",
            builder.dataset_name,
        )
        return None
    logger.info("downloading %d files of %s (--streaming False)", len(on_hub), on_hub[0].repo_id)
    return huggingface_hub.snapshot_download(
        on_hub[0].repo_id,
        repo_type="dataset",
        revision=on_hub[0].revision,
        allow_patterns=[*(file.path for file in on_hub), "README.md", "*metadata.*"],
        cache_dir=cache_dir,
    )


def open_split(
    builder: datasets.DatasetBuilder,
    split: str,
    wanted: WantedColumns,
) -> tuple[datasets.IterableDataset, SpeechColumns]:
    """One split with its audio as bytes or path, never decoded, and its text; and the columns.

    Folder and tar builders import torchcodec even for Audio(decode=False) (datasets 5.2,
    features/audio.py:106), so their column becomes the file's path, or bytes and path.
    Raises: UserError for a wrong column.
    """
    dataset = builder.as_streaming_dataset(split)
    if dataset.features is None:
        # Reads the first rows; datasets 5.2 has no public name for it.
        dataset = dataset._resolve_features()
    features = dataset.features or {}
    columns = find_columns(list(features), wanted, f"split '{split}' of {builder.dataset_name}")
    if columns.text is not None:
        check_is_text(features, columns.text)
    if isinstance(features[columns.audio], datasets.Audio):  # else it holds bytes, a path, or both
        dataset = dataset.cast_column(columns.audio, undecoded_feature(builder.name))
    names = [columns.audio] if columns.text is None else [columns.audio, columns.text]
    return dataset.select_columns(names), columns


def undecoded_feature(builder_name: str) -> datasets.Audio | datasets.Value | dict:
    path = datasets.Value("string")
    if builder_name == "audiofolder":
        return path
    if builder_name == "webdataset":
        return {"bytes": datasets.Value("binary"), "path": path}
    return datasets.Audio(decode=False)


def check_is_text(features: datasets.Features, column: str) -> None:
    """Raises: UserError."""
    feature = features[column]
    dtype = getattr(feature, "dtype", type(feature).__name__)
    if dtype not in ("string", "large_string"):
        raise UserError(
            f"--text_column_name {column}: holds {dtype}, not text. Found: {', '.join(features)}."
        )


def count_rows(
    builder: datasets.DatasetBuilder,
    splits: list[str],
    opened: Sequence[datasets.IterableDataset],
    urls: Sequence[str],
) -> int | None:
    """Rows of these splits without reading their audio: from parquet footers, metadata files or
    split info, else None."""
    if builder.name.endswith("folder"):
        return sum(1 for dataset in opened for _ in dataset)  # paths and metadata only
    if builder.name == "parquet":
        with ThreadPoolExecutor(16) as pool:
            return sum(sum(sizes) for sizes in pool.map(rows_of_groups, urls))
    known = builder.info.splits or {}
    counts = [known[split].num_examples for split in splits if split in known]
    if len(counts) < len(splits) or not all(counts):
        return None
    return sum(counts)


def rows_of_groups(url: str) -> list[int]:
    """Rows of each row group, according to a parquet file's footer; none if the file is damaged
    (its rejection is counted while reading)."""
    try:
        with fsspec.open(url, "rb") as file:
            footer = pyarrow.parquet.ParquetFile(file).metadata
            return [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    except pyarrow.ArrowInvalid:
        return []
