"""What the libraries say and we do not."""

import importlib.util
import logging
from pathlib import Path

import pytest

from speech_finetuning.cli.silenced import SILENCED, Silenced, WithoutSilenced


@pytest.mark.parametrize("entry", SILENCED, ids=lambda entry: entry.text[:40])
def test_the_libraries_still_say_what_is_silenced(entry: Silenced):
    """An entry that fails here is no longer needed, or silences nothing."""
    library, _, rest = entry.source.partition("/")
    specification = importlib.util.find_spec(library)
    assert specification is not None and specification.origin is not None
    source = (Path(specification.origin).parent / rest).read_text(encoding="utf-8")
    assert entry.text in source, entry
    assert entry.reason and entry.seen_in.split()[0] == library


def record(name: str, message: str, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord(name, level, "", 0, message, None, None)


def test_what_is_silenced_is_left_out_of_the_libraries_only():
    let_pass = WithoutSilenced(is_main=True).filter
    for entry in SILENCED:
        assert not let_pass(record("of.a.library", f"Note: {entry.text}{entry.rest} and so on"))
        assert let_pass(record("speech_finetuning.data", entry.text))
    assert let_pass(record("of.a.library", "The disk is on fire"))
    missing = "There were missing keys in the checkpoint model loaded: ['proj_out.weight', 'x']."
    assert let_pass(record("of.a.library", missing)), "one that is not tied is a fault"


def test_of_several_processes_one_speaks_for_the_libraries():
    let_pass = WithoutSilenced(is_main=False).filter
    assert not let_pass(record("of.a.library", "The disk is on fire"))
    assert let_pass(record("of.a.library", "The disk is on fire", logging.ERROR))
    assert let_pass(record("speech_finetuning.data", "a row is lost"))
