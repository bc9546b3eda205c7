"""What the libraries say and we do not."""

import importlib.util
import logging
from pathlib import Path

import pytest

from speech_finetuning.cli.silenced import FAILED_TRY, SILENCED, Silenced, WithoutSilenced


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
    assert let_pass(record("huggingface_hub", f"'a reason'{FAILED_TRY}GET address"))
    for entry in SILENCED:
        assert not let_pass(record("of.a.library", f"Note: {entry.text}{entry.rest} and so on"))
        assert let_pass(record("speech_finetuning.data", entry.text))
    assert let_pass(record("of.a.library", "The disk is on fire"))
    missing = "There were missing keys in the checkpoint model loaded: ['proj_out.weight', 'x']."
    assert let_pass(record("of.a.library", missing)), "one that is not tied is a fault"


def test_a_network_that_is_lost_is_told_once_and_in_our_words():
    """Six tries take 23 s, before base.network has a say."""
    let_pass = WithoutSilenced(is_main=True).filter
    first = record("huggingface_hub", "'no route'%sHEAD http://x/%%41".replace("%s", FAILED_TRY))
    assert let_pass(first)
    assert first.getMessage() == "no answer from the network ('no route'): asking again."
    assert not let_pass(record("huggingface_hub", f"'no route'{FAILED_TRY}HEAD http://x"))
    assert not let_pass(record("huggingface_hub", "Retrying in 2s [Retry 1/5]."))


def test_of_several_processes_one_speaks_for_the_libraries():
    let_pass = WithoutSilenced(is_main=False).filter
    assert not let_pass(record("of.a.library", "The disk is on fire"))
    assert let_pass(record("of.a.library", "The disk is on fire", logging.ERROR))
    assert let_pass(record("speech_finetuning.data", "a row is lost"))
