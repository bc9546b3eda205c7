"""A part of the training split to score, where a data set has no other: by the hash of the speaker.

Speakers are held out whole, in the order of their hashes, until a tenth of the rows is reached;
where no column names them, or where one of them has most rows, recordings are; else rows. So the
hold-out is the same in every pass and process and after every restart. It is saved with every
checkpoint, so that rows which are added to the data later change nothing about those that were
there.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import counted
from speech_finetuning.data.positions import FIRST_ORDER_VERSION
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.row_keys import RowKeys, read_keys
from speech_finetuning.data.selection import (
    HoldOut,
    RowSelection,
    even_sample,
    select_rows,
)
from speech_finetuning.data.sources import MissingSplit, SpeechSource

logger = logging.getLogger(__name__)

USUAL_EVAL_SPLIT = "validation"  # nobody need have named it
MAX_SCORED_ROWS = 500
# Where no speaker fits into the fraction, the one with the fewest rows may take so many times it.
LARGEST_EXCESS = 2.0


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
            there = str(error).removesuffix(".")
            logger.info("%s, which is taken. --%s names another.", there, flag)
            return load(split=only, speaker_column=speaker_column), False
        if role != "eval" or split != USUAL_EVAL_SPLIT or not record.train_split_name:
            raise
        logger.info("%s --eval_split_name names another; here rows are held out.", error)
    return load_or_hold_out(load, "train", record.train_split_name, record)[0], True


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
        f"--do_eval: split '{source.split}' of {source.name} has {counted(len(keys.rows), 'row')}, of which "
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
    may_have_windows = trained.source.has_rows_of_paths or trained.source.windows is not None
    if trained.source is not scored.source and may_have_windows:
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
    by = f"{num_held_out:,} of {counted(num_groups, hold_out.by)}"
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
        "hold-out: %s of %s of split '%s' of %s, by hash: %s. They are scored, and never "
        "trained on%s.",
        f"{int(is_held_out.sum()):,}",
        counted(len(is_held_out), "row"),
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
