"""The command line and YAML files to dataclasses."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import transformers

from speech_finetuning.base.errors import Problems, UserError, one_line
from speech_finetuning.base.network import as_user_error
from speech_finetuning.cli.checks import check_words
from speech_finetuning.cli.flags import OneLineErrors, as_flags, read_yaml
from speech_finetuning.cli.guards import OF_OTHERS_ONLY


class FlagParser(transformers.HfArgumentParser, OneLineErrors):
    """HfArgumentParser whose errors are UserErrors, which knows no abbreviations and demands
    nothing: what is missing is one problem among others."""

    def __init__(self, kinds: Sequence[type]) -> None:
        # Cast, as the library declares a type of its own for dataclasses.
        super().__init__(cast(Any, kinds), add_help=False, allow_abbrev=False)
        for action in self._actions:  # argparse has no public name for it (Python 3.11)
            action.required = False


def parse_flags(words: list[str], kinds: Sequence[type]) -> Any:
    """A command line to one instance of each dataclass.

    Raises: UserError with a line for each problem of `check_words`, or for what the dataclasses
    themselves refuse.
    """
    parser = FlagParser(kinds)
    check_words(words, parser)
    try:
        return parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except (ValueError, ImportError) as error:
        raise UserError(one_line(error)) from error


def read_records(path: str, defaults: Any, kind: type, own_flags: type) -> list[Any]:
    """The entries of a --data_mix file as dataclasses of one kind, completed by the command line.

    defaults: the command line's dataclass; own_flags: the dataclass of what an entry may set for
    itself, beside its name, its weight and whether it is a guard; null takes a setting away.
    Guards come last.
    Raises: UserError for what an entry cannot say, for weights that are not above 0, and for names
    that are taken.
    """
    keys = ["name", "weight", "guard", *(field.name for field in fields(own_flags))]
    entries = read_yaml("--data_mix", path, list, "- dataset_name: path/to/data")
    records: list[Any] = []
    problems = Problems()
    for number, entry in enumerate(entries, start=1):
        where = f"--data_mix {path}, entry {number}"
        problems.attempt(where, check_keys, where, entry, keys)
    problems.raise_if_any()
    for number, entry in enumerate(entries, start=1):
        where = f"--data_mix {path}, entry {number}"
        record = read_record(where, entry, defaults, kind)
        if record.weight <= 0:
            raise UserError(f"{where}: needs a weight above 0.")
        if record.name in [earlier.name for earlier in records]:
            raise UserError(f"{where}: needs its own 'name: ...' ({record.name!r} is taken).")
        records.append(record)
    return sorted(records, key=attrgetter("guard"))  # the first one's language is the model's


def check_keys(where: str, entry: Any, known: list[str]) -> None:
    """Raises: UserError for an entry that names no data, or says what an entry cannot."""
    expected = f"expected dataset_name and any of: {', '.join(known)}"
    if not isinstance(entry, dict) or "dataset_name" not in entry:
        raise UserError(f"{where}: {expected}. Found: {entry}.")
    problems = []
    for key in set(entry) - set(known):
        nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.75)
        meant = f". Did you mean {nearest[0]}?" if nearest else f": {expected}."
        problems.append(f"{where}: unknown key {key}{meant}")
    if problems:
        raise UserError("\n".join(sorted(problems)))


def read_record(where: str, entry: dict[str, Any], defaults: Any, kind: type) -> Any:
    """One entry as a dataclass. Raises: UserError for an impossible value."""
    settings = {**asdict(defaults), "name": name_of(entry), **entry}
    with as_user_error(ValueError, where=where):
        (record,) = FlagParser([kind]).parse_args_into_dataclasses(as_flags(settings))
    taken_away = {key: None for key, value in entry.items() if value is None}
    if record.guard:
        taken_away |= dict.fromkeys(OF_OTHERS_ONLY)
    return replace(record, **{**taken_away, "name": re.sub(r"\W", "_", record.name)})


def name_of(entry: dict[str, Any]) -> str:
    """What an entry is called if it does not say: its data set's and its configuration's name."""
    name = Path(str(entry["dataset_name"])).stem
    config_name = entry.get("dataset_config_name")
    return f"{name}_{config_name}" if config_name else name
