"""Mistakes that are told all at once."""

import pickle

import pytest

from speech_finetuning.base.errors import Problems, UserError


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
