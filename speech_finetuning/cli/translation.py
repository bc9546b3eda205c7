"""Command lines of 2022 in today's words."""

import logging
import os
from dataclasses import dataclass, field

from speech_finetuning.cli.flags import (
    flag_groups,
    flag_name,
    gives_token_away,
    values_of,
    with_config_file,
)
from speech_finetuning.cli.retired import RETIRED_RENAMED, RETIRED_WITHOUT_EFFECT

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Translation:
    """A command line in today's words, and what became of its retired flags."""

    words: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # one for each retired flag


def translate(words: list[str]) -> Translation:
    """Retired flags to today's; today's own flag wins where both are given."""
    given = {flag_name(group[0]) for group in flag_groups(words)}
    translation = Translation()
    for group in flag_groups(words):
        name = flag_name(group[0])
        if gives_token_away(group):
            translation.words += group  # for `word_problems`, which refuses it
        elif name in RETIRED_WITHOUT_EFFECT:
            reason = RETIRED_WITHOUT_EFFECT[name]
            translation.notes.append(f"--{name} has no effect ({reason})")
        elif name not in RETIRED_RENAMED:
            translation.words += group
        elif RETIRED_RENAMED[name] in given:
            translation.notes.append(f"--{name} gives way to --{RETIRED_RENAMED[name]}")
        else:
            translation.words += [f"--{RETIRED_RENAMED[name]}", *values_of(group)]
            translation.notes.append(f"--{name} is --{RETIRED_RENAMED[name]} today")
    return translation


def warn_of_retired_flags(argv: list[str]) -> None:
    """One warning for all retired flags of a command line, from one process."""
    notes = translate(with_config_file(argv)).notes
    if notes and os.environ.get("RANK", "0") == "0":
        logger.warning("flags of 2022: %s.", "; ".join(notes))
