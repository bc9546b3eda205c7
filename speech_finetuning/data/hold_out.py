"""A part of the training split to score, where a data set has no other: by the hash of the speaker.

Speakers are held out whole, in the order of their hashes, until a tenth of the rows is reached;
where no column names them, or where one of them has most rows, recordings are; else rows. So the
hold-out is the same in every pass and process and after every restart. It is saved with every
checkpoint, so that rows which are added to the data later change nothing about those that were
there.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import fsspec
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.cells import path_of
from speech_finetuning.data.footers import is_damage
from speech_finetuning.data.positions import FIRST_ORDER_VERSION
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.selection import (
    HoldOut,
    RowSelection,
    even_sample,
    hash_of,
    select_rows,
)
from speech_finetuning.data.shards import ShardReader
from speech_finetuning.data.sources import MissingSplit, SpeechSource

logger = logging.getLogger(__name__)

USUAL_EVAL_SPLIT = "validation"  # nobody need have named it
MAX_SCORED_ROWS = 500
# Where no speaker fits into the fraction, the one with the fewest rows may take so many times it.
LARGEST_EXCESS = 2.0


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


def load_or_hold_out(
    load: Callable[..., SpeechSource], role: str, split: str, record: Any
) -> tuple[SpeechSource, bool]:
    """(the split, False), which is the only one where none was named; or, where the usual split to
    score is not there, (the training split, True). load: takes the split and the column of
    speakers. Raises: UserError."""
    speaker_column = record.speaker_column_name if role == "train" else None
    try:
        source = load(split=split, speaker_column=speaker_column)
        if role == "eval" and record.speaker_column_name is not None:
            logger.warning(
                "--speaker_column_name has no effect: %s has split '%s' to score.",
                source.name,
                split,
            )
        return source, False
    except MissingSplit as error:
        only = error.only_split(role, split)
        if only is not None:
            flag = "eval_split_name" if role == "guard" else f"{role}_split_name"
            logger.info("%s It is taken. --%s names another.", error, flag)
            return load(split=only, speaker_column=speaker_column), False
        if role != "eval" or split != USUAL_EVAL_SPLIT or not record.train_split_name:
            raise
        logger.info("%s --eval_split_name names another; here rows are held out.", error)
    return load_or_hold_out(load, "train", record.train_split_name, record)[0], True


# ---- keys ----
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
    urls = [source.url(*place) for place in source.shards()]
    # By the file's name, so that a file which is added, wherever it is sorted in, changes nothing
    # about the rows of the others; their number, in train-00000-of-00002, is left out.
    names = [re.sub(r"-of-\d+", "", name_within(source, url)) for url in urls]
    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(keys_of_file, [source] * len(sizes), urls, names, sizes)


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


# ---- the choice ----
def choose_groups(keys: np.ndarray, fraction: float, max_rows: int) -> frozenset[int] | None:
    """Hashes of whole groups that have about this fraction of the rows, at most max_rows if that is
    possible; None if every group has far more.

    Groups are taken in the order of their hashes, and those that would be too many are left out.
    """
    groups, counts = np.unique(keys, return_counts=True)
    target = min(fraction * len(keys), max_rows)
    limit = LARGEST_EXCESS * fraction * len(keys)
    smallest = counts.min(initial=1)
    chosen: list[int] = []
    taken = 0
    for group, count in zip(groups, counts, strict=True):
        if taken + count <= target:
            chosen.append(int(group))
            taken += count
        if taken + smallest > target:
            break
    if taken < target / 2:
        # Few groups, of unlike size: the smallest one of the others.
        others = [i for i in np.argsort(counts, kind="stable") if int(groups[i]) not in set(chosen)]
        if others and len(groups) > 1 and taken + counts[others[0]] <= limit:
            chosen.append(int(groups[others[0]]))
    return frozenset(chosen) or None


def choose_hold_out(
    dataset: SpeechDataset, keys: RowKeys, fraction: float, kinds: tuple[str, ...]
) -> HoldOut:
    """By the first of these kinds of which there are groups that are small enough. Raises:
    UserError."""
    for by in kinds:
        of_rows = keys.of(by)
        if of_rows is None:
            continue
        groups = choose_groups(of_rows, fraction, MAX_SCORED_ROWS)
        if groups is not None:
            return HoldOut(by=by, groups=groups)
    source = dataset.source
    raise UserError(
        f"--do_eval: split '{source.split}' of {source.name} has {len(keys.rows)} rows, of which "
        f"none can be held out by {' or '.join(kinds)} without taking far more than {fraction:g} "
        "of them. Pass a larger --eval_fraction, or name a split with --eval_split_name."
    )


@dataclass(frozen=True, kw_only=True)
class Division:
    """The rows of a training split that are trained on, and those that are scored."""

    trained: RowSelection
    scored: RowSelection


def divide(
    scored: SpeechDataset, trained: SpeechDataset, fraction: float, saved: HoldOut | None
) -> Division:
    """scored, trained: one split as it is read to score it and to train on it, which with windows of
    several utterances are other rows. saved: what a checkpoint held out, which stays.
    Raises: UserError."""
    if not scored.source.has_known_rows:
        return divide_by_name(scored.source, fraction, saved)
    keys = read_keys(scored)
    keys_of_trained = keys
    if trained.source is not scored.source and trained.source.has_rows_of_paths:
        keys_of_trained = read_keys(trained)  # its rows may be windows of several utterances
    # A window may be of several speakers, and of several rows.
    kinds = ("recording",) if keys_of_trained.has_windows else ("speaker", "recording", "row")
    hold_out = saved or choose_hold_out(scored, keys, fraction, kinds)
    is_scored = mask_of(keys, hold_out, scored.source)
    describe(scored.source, hold_out, keys, is_scored)
    sample = np.zeros(len(is_scored), bool)
    sample[even_sample(np.flatnonzero(is_scored), MAX_SCORED_ROWS)] = True
    return Division(
        trained=RowSelection(
            mask=~mask_of(keys_of_trained, hold_out, trained.source), hold_out=hold_out
        ),
        scored=RowSelection(
            mask=sample,
            hold_out=hold_out,
            is_held_out=True,
            num_held_out=int(is_scored.sum()),
        ),
    )


def divide_by_name(source: SpeechSource, fraction: float, saved: HoldOut | None) -> Division:
    """Of files whose rows are known only when they are read. Raises: UserError for what was held
    out of files of another kind."""
    if saved is not None and saved.groups:
        raise changed_data(source, saved)
    if source.columns.speaker is not None:
        logger.warning(
            "rows of %s files are held out by the hash of their names, not by speaker.", source.kind
        )
    hold_out = saved or HoldOut(by="recording", fraction=fraction_of(source, fraction))
    logger.info(
        "hold-out: %.3g %% of the rows of split '%s' of %s, by the hash of their names, are scored, "
        "at most %d, and never trained on.",
        100 * hold_out.fraction,
        source.split,
        source.name,
        MAX_SCORED_ROWS,
    )
    return Division(
        trained=RowSelection(hold_out=hold_out),
        scored=RowSelection(hold_out=hold_out, is_held_out=True, max_rows=MAX_SCORED_ROWS),
    )


def mask_of(keys: RowKeys, hold_out: HoldOut, source: SpeechSource) -> np.ndarray:
    """(num_rows,) bool: the rows that are held out. Raises: UserError if there are none."""
    of_rows = keys.of(hold_out.by)
    is_held_out = np.zeros(0, bool)
    if of_rows is not None:
        is_held_out = np.isin(of_rows, np.array(sorted(hold_out.groups), np.uint64))
    if not is_held_out.any() or is_held_out.all():
        raise changed_data(source, hold_out)
    return is_held_out


def changed_data(source: SpeechSource, hold_out: HoldOut) -> UserError:
    """For a run that goes on with other data than it began with."""
    return UserError(
        f"--do_eval: of split '{source.split}' of {source.name} rows were held out before the "
        f"checkpoint, by {hold_out.by}; of the rows that are there now these are none or all. Pass "
        "the data and flags of then (--speaker_column_name), or start over in another --output_dir."
    )


def fraction_of(source: SpeechSource, fraction: float) -> float:
    """Of all hashes, where rows are judged as they are read."""
    if not source.num_rows:
        return fraction
    return min(fraction, MAX_SCORED_ROWS / source.num_rows)


def describe(
    source: SpeechSource, hold_out: HoldOut, keys: RowKeys, is_held_out: np.ndarray
) -> None:
    """The one line of the log."""
    of_rows = keys.of(hold_out.by)
    assert of_rows is not None
    num_groups = len(np.unique(of_rows))
    num_held_out = len(np.unique(of_rows[is_held_out]))
    by = f"{num_held_out:,} of {num_groups:,} {hold_out.by}s"
    if hold_out.by == "speaker":
        by += f" (column {source.columns.speaker})"
    elif source.columns.speaker is None:
        by += " (no column names speakers: --speaker_column_name)"
    else:
        by += f" (the speakers of column {source.columns.speaker} cannot be held out whole)"
    scored = ""
    if is_held_out.sum() > MAX_SCORED_ROWS:
        scored = f"; {MAX_SCORED_ROWS} of them are scored"
    logger.info(
        "hold-out: %s of %s rows of split '%s' of %s, by hash: %s. They are scored, and never "
        "trained on%s.",
        f"{int(is_held_out.sum()):,}",
        f"{len(is_held_out):,}",
        source.split,
        source.name,
        by,
        scored,
    )


# ---- all data sets of a run ----
def choose_rows(
    speech: dict[str, list[SpeechDataset]], records: Iterable[Any]
) -> dict[str, list[SpeechDataset]]:
    """What each data set of a run reads: without what is held out of it, or only that; of those an
    even sample.

    speech: by role. records: the script's; their hold_out is that of the checkpoint that the run
    continues, if it has one. Raises: UserError.
    """
    divisions = {}
    for record in records:
        held_out = [each for each in speech.get("eval", []) if is_held_out_of(each, record)]
        trained = [each for each in speech.get("train", []) if each.source.record == record.name]
        if held_out and record.is_continued and record.hold_out is None:
            raise UserError(
                f"--do_eval: the checkpoint was trained on all rows of {record.dataset_name}, so "
                "that nothing is left to hold out. Name a split with --eval_split_name, or start "
                "over in another --output_dir."
            )
        if held_out or (trained and record.hold_out is not None):
            (scored,) = held_out or trained
            (source,) = trained or held_out
            divisions[record.name] = divide(scored, source, record.eval_fraction, record.hold_out)
    return {
        role: [with_rows(dataset, role, divisions) for dataset in datasets]
        for role, datasets in speech.items()
    }


def is_held_out_of(dataset: SpeechDataset, record: Any) -> bool:
    return dataset.source.record == record.name and dataset.is_held_out


def with_rows(dataset: SpeechDataset, role: str, divisions: dict[str, Division]) -> SpeechDataset:
    if dataset.order_version == FIRST_ORDER_VERSION:
        return dataset  # its max_rows are the first ones
    division = divisions.get(dataset.source.record)
    selection = None
    if division is not None and dataset.is_held_out:
        selection = division.scored
    elif division is not None and role == "train":
        selection = division.trained
    return replace(
        dataset,
        selection=select_rows(dataset.source, max_rows=dataset.max_rows, among=selection),
    )
