"""What parquet files say about themselves in their footers: columns and rows, without any row."""

import tarfile
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
