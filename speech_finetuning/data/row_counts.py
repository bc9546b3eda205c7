"""How many rows a split has, without reading their audio."""

from typing import cast

import datasets

from speech_finetuning.data.columns import OpenedSplit, SpeechColumns
from speech_finetuning.data.footers import largest_group_in_bytes, read_footers, sizes_of_groups
from speech_finetuning.data.saved import count_rows_of_arrow


def opened_split(
    builder: datasets.DatasetBuilder,
    split: str,
    dataset: datasets.IterableDataset,
    columns: SpeechColumns,
    urls: list[str],
) -> OpenedSplit:
    """With what the footers of parquet files tell of their rows.

    urls: of the split. Raises: UserError for a file without one of the columns.
    """
    row_groups = None
    largest = 0
    if builder.name == "parquet":
        features = cast(datasets.Features, dataset.features)  # known since the split was opened
        footers = read_footers(urls, columns, features)
        row_groups = tuple(sizes_of_groups(footer) for footer in footers)
        largest = max(map(largest_group_in_bytes, footers), default=0)
    return OpenedSplit(
        dataset=dataset,
        columns=columns,
        num_rows=count_rows(builder, split, dataset, urls, row_groups),
        row_groups=row_groups,
        largest_row_group_in_bytes=largest,
    )


def count_rows(
    builder: datasets.DatasetBuilder,
    split: str,
    dataset: datasets.IterableDataset,
    urls: list[str],
    row_groups: tuple[tuple[int, ...], ...] | None,
) -> int | None:
    """Rows of a split without reading their audio; None if that would be needed.

    They are in parquet footers, metadata files, the messages of Arrow files or the split's info.
    """
    if row_groups is not None:
        return sum(map(sum, row_groups))
    if builder.name.endswith("folder"):
        return sum(1 for _ in dataset)  # paths and metadata only
    if builder.name == "arrow":
        return count_rows_of_arrow(urls)
    return known_num_rows(builder, split)


def known_num_rows(builder: datasets.DatasetBuilder, split: str) -> int | None:
    """As the data set's card says; None if it does not."""
    known = builder.info.splits or {}
    return known[split].num_examples or None if split in known else None
