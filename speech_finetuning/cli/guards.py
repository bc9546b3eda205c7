"""Entries of --data_mix that are guards: what must not get worse, and is only scored."""

import argparse
from collections.abc import Iterator
from typing import Any

from speech_finetuning.base.errors import UserError
from speech_finetuning.cli.flags import read_yaml

# Settings of the command line that guards do not take over.
OF_OTHERS_ONLY = ("train_split_name", "test_split_name", "predict_split_name", "group_column_name")
# What an entry that is only scored has no use for.
NOT_OF_A_GUARD = (
    *OF_OTHERS_ONLY,
    "weight",
    "max_train_samples",
    "eval_fraction",
    "speaker_column_name",
)


def guard_problems(flags: argparse.Namespace) -> Iterator[str]:
    """What is wrong with guards and with the flag that is about them."""
    entries = read_entries(flags.data_mix)
    if entries is None:  # told when the data are opened
        return
    guards = {number: entry for number, entry in entries.items() if entry.get("guard")}
    if flags.max_guard_loss_in_points is not None and not guards:
        yield (
            f"--max_guard_loss_in_points {flags.max_guard_loss_in_points:g}: no entry of --data_mix "
            "has guard: true. Add one to be bounded by, or leave the flag out."
        )
    for number, entry in guards.items():
        where = f"--data_mix {flags.data_mix}, entry {number}"
        for problem in entry_problems(entry):
            yield f"{where}: {problem}"
    if not guards or flags.check_data:
        return
    if not flags.do_eval:
        (first, *_) = guards
        yield (
            f"--data_mix {flags.data_mix}, entry {first}: guard: true needs --do_eval. Add it, or "
            "leave the entry out."
        )
    elif not any(is_scored(entry, flags) for entry in entries.values()):
        yield (
            f"--data_mix {flags.data_mix}: nothing but guards is scored. --do_eval needs an entry "
            "without guard: true that has an eval_split_name."
        )


def read_entries(path: str | None) -> dict[int, dict[str, Any]] | None:
    """Those of a --data_mix by their number, from 1 on; none without one. None if the file is not
    one of entries."""
    if path is None:
        return {}
    try:
        found = read_yaml("--data_mix", path, list, "")
    except UserError:
        return None
    if not all(isinstance(entry, dict) for entry in found):
        return None
    return dict(enumerate(found, start=1))


def entry_problems(guard: dict[str, Any]) -> Iterator[str]:
    """What a guard says that cannot be."""
    if guard["guard"] is not True:
        yield f"guard: {guard['guard']}: must be true or false."
        return
    useless = [key for key in NOT_OF_A_GUARD if guard.get(key) is not None]
    if useless:
        yield (
            f"guard: true is only scored, by its eval_split_name. Leave out {' and '.join(useless)}."
        )
    if guard.get("eval_split_name", "") is None:
        yield "guard: true needs an eval_split_name. Name the split that is scored."


def is_scored(entry: dict[str, Any], flags: argparse.Namespace) -> bool:
    """Whether an entry counts in the total of an evaluation."""
    return not entry.get("guard") and bool(entry.get("eval_split_name", flags.eval_split_name))
