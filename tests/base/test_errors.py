"""Mistakes that are told all at once."""

import pickle
import re
from pathlib import Path

import pytest

from speech_finetuning.base.errors import (
    ExitCode,
    Problems,
    RunEnded,
    TimeIsOver,
    UserError,
    portable,
)

PROJECT = Path(__file__).parents[2]


def fail(*messages: str) -> None:
    raise UserError(*messages)


def test_a_user_error_of_several_problems_has_a_line_for_each():
    error = pickle.loads(pickle.dumps(UserError("--a: wrong.", "--b: wrong.")))
    assert str(error) == "--a: wrong.\n--b: wrong."


def test_a_flag_that_is_wrong_about_one_thing_is_told_once():
    problems = Problems()
    assert problems.attempt("", sum, [1, 2]) == 3
    assert problems.attempt("", fail, "--a x: not in train.", "--b y: not in train.") is None
    problems.attempt("", fail, "--a x: not in test.")
    problems.attempt("other", fail, "--a x: not in other.")
    with pytest.raises(UserError) as error:
        problems.raise_if_any()
    assert error.value.args == (
        "--a x: not in train.",
        "--b y: not in train.",
        "--a x: not in other.",
    )


def test_without_problems_nothing_is_raised():
    Problems().raise_if_any()


def test_an_exit_code_has_one_name_and_a_line_in_the_documentation():
    for module in PROJECT.glob("speech_finetuning/*/*.py"):
        assert not re.search(r"RunEnded\(\s*\d+,", module.read_text("utf-8")), module
    told = re.findall(r"^\| (\d+) \|", (PROJECT / "docs/long-runs.md").read_text("utf-8"), re.M)
    assert sorted(map(int, told)) == sorted(ExitCode)


def test_an_ending_crosses_a_process_border():
    ending = pickle.loads(pickle.dumps(RunEnded(ExitCode.DISK_FULL, "full")))
    assert (ending.code, ending.reason) == (73, "full")


def test_the_end_of_the_time_is_the_same_on_every_rank():
    """It goes there by pickle."""
    ending = pickle.loads(pickle.dumps(portable(TimeIsOver())))
    assert isinstance(ending, TimeIsOver) and ending.code == ExitCode.TRY_AGAIN
