"""What parquet files say about themselves in their footers: columns and rows, without any row."""

import tarfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import fsspec
import pyarrow
import pyarrow.parquet

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.columns import SpeechColumns
from speech_finetuning.data.guessing import top_of


def check_has_columns(
    url: str,
    footer: pyarrow.parquet.FileMetaData,
    columns: SpeechColumns,
    features: datasets.Features,
) -> None:
    """features: of the first file. Raises: UserError."""
    schema = footer.schema.to_arrow_schema()
    found = schema.names
    missing = [name for name in columns.top_names(list(features)) if name not in found]
    if missing:
        raise UserError(
            f"{url}: has no column {', '.join(missing)}, as other files of its split have. Found: "
            f"{', '.join(found)}. Give its columns the names of the others, or leave the file out."
        )
    top = top_of(columns.audio, list(features))
    here = schema.field(top).type
    audio = features[top]
    first = audio.pa_type if isinstance(audio, datasets.Audio) else features_type(audio)
    if pyarrow.types.is_nested(here) != pyarrow.types.is_nested(first):
        raise UserError(
            f"{url}: its column {columns.audio} holds {here}, but that of other files of its split "
            f"holds {first}. Write all files in one way, or leave this one out."
        )


def features_type(feature: Any) -> pyarrow.DataType:
    return datasets.Features({"column": feature}).arrow_schema.field("column").type


def read_footers(
    urls: list[str], columns: SpeechColumns, features: datasets.Features
) -> list[pyarrow.parquet.FileMetaData | None]:
    """Of each parquet file; None of a damaged one. features: of the first file.

    Raises: UserError for a file without one of the columns.
    """
    with ThreadPoolExecutor(16) as pool:
        footers = list(pool.map(read_footer, urls))
    for url, footer in zip(urls, footers, strict=True):
        if footer is not None:
            check_has_columns(url, footer, columns, features)
    return footers


def read_footer(url: str) -> pyarrow.parquet.FileMetaData | None:
    """A parquet file's own description; None if it is damaged (a rejection says so when it is
    read)."""
    try:
        with fsspec.open(url, "rb") as file:
            return pyarrow.parquet.ParquetFile(file).metadata
    except (pyarrow.ArrowInvalid, OSError) as error:
        if is_damage(error):
            return None
        raise


def is_damage(error: Exception) -> bool:
    """Whether an error of reading means that the file itself is damaged.

    pyarrow's "Corrupt snappy compressed data" is a bare OSError; the disk's have a number."""
    kinds = (pyarrow.ArrowException, UnicodeDecodeError, tarfile.ReadError)
    is_of_the_content = isinstance(error, kinds) or type(error) is OSError
    return is_of_the_content and getattr(error, "errno", None) is None


def rows_of_groups(url: str) -> tuple[int, ...]:
    """Rows of each row group of a parquet file; none if it is damaged."""
    return sizes_of_groups(read_footer(url))


def sizes_of_groups(footer: pyarrow.parquet.FileMetaData | None) -> tuple[int, ...]:
    if footer is None:
        return ()
    return tuple(footer.row_group(number).num_rows for number in range(footer.num_row_groups))


def largest_group_in_bytes(footer: pyarrow.parquet.FileMetaData | None) -> int:
    """Of the file's row groups, uncompressed; 0 of a damaged or an empty file."""
    if footer is None:
        return 0
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    return max((group.total_byte_size for group in groups), default=0)
