"""The words of a command line: split by flag, completed by --config, checked one by one.

Nothing here imports torch or transformers, so that mistakes are answered at once.
"""

import argparse
import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from speech_finetuning.base.errors import UserError, one_line
from speech_finetuning.cli.help import IMPORTANT_FLAGS
from speech_finetuning.cli.retired import LOGIN, MEANT, REFUSED, TOKEN_FLAGS

FALSE_WORDS = ("no", "false", "f", "n", "0")


class OneLineErrors(argparse.ArgumentParser):
    """To inherit from: a parser whose errors are UserErrors, and that demands nothing.

    What is missing is a problem like others, and `word_problems` tells all problems at once.
    """

    def error(self, message: str) -> None:
        _, is_missing, names = message.partition("the following arguments are required: ")
        _, is_unknown, words = message.partition("unrecognized arguments: ")
        if is_missing:
            raise UserError(f"missing: {names}. {self.prog} --help has an example.")
        if is_unknown and words.startswith("--"):
            raise UserError(unknown_flag(words.split()[0], option_names(self), "--help"))
        raise UserError(in_our_words(message))


def flag_name(word: str) -> str:
    """'max_steps' of '--max-steps=3'."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_")


def flag_groups(words: list[str]) -> list[list[str]]:
    """The words of a command line, each flag with its values: [['--max_steps', '3'], ['--fp16']].

    Words before the first flag are a group of their own.
    """
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups


def values_of(group: list[str]) -> list[str]:
    """The values of a flag, whether they follow it or an equals sign."""
    _, is_joined, value = group[0].partition("=")
    return [value, *group[1:]] if is_joined else group[1:]


def find_group(words: list[str], name: str) -> list[str] | None:
    """--name with its values, the last one if there are several, which is the one that counts."""
    groups = [group for group in flag_groups(words) if flag_name(group[0]) == name]
    return groups[-1] if groups else None


def find_value(words: list[str], name: str) -> str | None:
    """The value of --name; None without any."""
    values = values_of(find_group(words, name) or [f"--{name}"])
    return values[0] if values else None


def is_on(words: list[str], name: str) -> bool:
    """Whether --name, a flag that is on or off, is on; the last one counts."""
    group = find_group(words, name)
    if group is None:
        return False
    return not any(value.lower() in FALSE_WORDS for value in values_of(group))


def with_config_file(words: list[str]) -> list[str]:
    """The settings of the YAML file that --config names, if any, and then the command line, which
    overrides them. Raises: UserError if the file cannot be read."""
    config = find_value(words, "config")
    if config is None:
        return words
    return as_flags(read_yaml("--config", config, dict, "max_steps: 1000")) + words


def read_yaml(flag: str, path: str, kind: type, example: str) -> Any:
    """The list or mapping that a YAML file holds. Raises: UserError if it cannot be read or holds
    something else."""
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}. Pass a YAML file.") from error
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        found = one_line(error.problem or error)
        raise UserError(
            f"{flag} {path}{line}: no YAML: {found} Write lines like '{example}'."
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{flag} {path}: no YAML: {one_line(error)}") from error
    if not isinstance(value, kind):
        found = type(value).__name__
        raise UserError(f"{flag} {path}: expected lines like '{example}', found {found}.")
    return value


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Names and values of a YAML file as a command line, so that argparse converts 1e-5 to a
    number. null, and a list of nothing, leave a setting as it is."""
    words: list[str] = []
    for name, value in settings.items():
        if value is None or value == []:
            continue
        is_norwegian = name == "language" and value is False  # as YAML reads `no`
        values = value if isinstance(value, list) else ["no" if is_norwegian else value]
        words.append(f"--{name}")
        words += [json.dumps(item) if isinstance(item, dict) else str(item) for item in values]
    return words


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """Every flag that the parser knows, as 'max_steps'; the last ones are those added last."""
    options = parser._option_string_actions  # argparse has no public name for it (Python 3.11)
    return list(dict.fromkeys(flag_name(option) for option in options if option.startswith("--")))


def gives_token_away(group: list[str]) -> bool:
    """Whether a flag and its values hold a token. 2022's --use_auth_token, alone or with a truth
    value, is harmless."""
    if flag_name(group[0]) == "use_auth_token":
        return any(value.startswith("hf_") for value in values_of(group))
    return flag_name(group[0]) in TOKEN_FLAGS


def word_problems(words: list[str], parser: argparse.ArgumentParser) -> Iterator[str]:
    """One line for each flag that is unknown, refused, or has an impossible value."""
    known = option_names(parser)
    for group in flag_groups(words):
        name = flag_name(group[0])
        if gives_token_away(group):
            yield f"--{name} is refused: a token does not belong on a command line. {LOGIN}."
        elif name not in known or not group[0].startswith("--"):
            yield unknown_flag(group[0], known)
        else:
            yield from value_problems(group, parser)


def value_problems(group: list[str], parser: argparse.ArgumentParser) -> Iterator[str]:
    """One line if the values of a known flag cannot be read, or are refused."""
    try:
        parsed, surplus = parser.parse_known_args(group)
    except UserError as error:
        yield str(error)
        return
    for word in surplus:
        yield (
            f"{group[0]}: {word} is one value too many. What has spaces needs quotation marks, and "
            "a flag begins with --."
        )
    name = flag_name(group[0])
    if name in REFUSED and getattr(parsed, name) != parser.get_default(name):
        yield f"--{name} is refused: {REFUSED[name]}."


def in_our_words(error: str) -> str:
    """argparse's message about one flag, as "argument --max_steps/--max-steps: ...", in a line."""
    text = re.sub(r"^argument (--\w+)\S*:", r"\1:", error)
    text = re.sub(r"expected (at least )?one argument$", "expected a value, found none", text)
    text = re.sub(r"invalid int value: ", "expected a whole number, found ", text)
    text = re.sub(r"invalid float value: ", "expected a number, found ", text)
    choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", text)
    if choice is None:
        return f"{text}."
    nearest = difflib.get_close_matches(
        choice[1], re.findall(r"'(.*?)'", choice[2]), n=1, cutoff=0.75
    )
    return f"{text}. Did you mean {nearest[0]}?" if nearest else f"{text}."


def unknown_flag(word: str, known: list[str], list_of_all: str = "--help_all") -> str:
    """The problem of an unknown flag, with the flag that was probably meant."""
    name = flag_name(word)
    if not word.startswith("--"):
        return f"{word}: stands before all flags. Write --flag {word}."
    meant = MEANT.get(name)
    if meant is not None and meant.split()[0] not in known:  # of the training, not of this tool
        meant = None
    for candidates, cutoff in ((IMPORTANT_FLAGS, 0.75), (known, 0.6)):
        if meant is None:
            there = [candidate for candidate in candidates if candidate in known]
            nearest = difflib.get_close_matches(name, there, n=1, cutoff=cutoff)
            meant = nearest[0] if nearest else None
    word = word.partition("=")[0]
    if meant is None:
        return f"unknown flag {word}. {list_of_all} lists all flags."
    return f"unknown flag {word}. Did you mean --{meant}?"
