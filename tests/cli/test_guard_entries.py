"""Guards of a --data_mix on the command line: what is refused, and what an entry becomes."""

from pathlib import Path

import pytest

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError

WORDS = "--model_name_or_path m --output_dir o --max_steps 2 --data_mix"
SPEECH = "- {dataset_name: new}\n"


def records_of(tmp_path: Path, mix: str, more: str) -> list[script.DataRecord]:
    (tmp_path / "mix.yaml").write_text(mix)
    words = f"{WORDS} {tmp_path / 'mix.yaml'} {more}".split()
    return script.data_records(script.parse_arguments(words)[1])


@pytest.mark.parametrize(
    ("guard", "more", "message"),
    [
        ("", "--do_train --do_eval --max_guard_loss_in_points 2", "points 2: no entry of --data"),
        ("guard: true", "--do_train", "entry 2: guard: true needs --do_eval."),
        ("guard: true, train_split_name: x", "--do_eval", "Leave out train_split_name."),
        (
            "guard: true, weight: 2, test_split_name: x",
            "--do_eval",
            "Leave out test_split_name and weight.",
        ),
        ("guard: true, eval_split_name: null", "--do_eval", "2: guard: true needs an eval_split_"),
        ("guard: maybe", "--do_eval", "entry 2: guard: maybe: must be true or false."),
        ("gaurd: true", "--do_eval", "entry 2: unknown key gaurd. Did you mean guard?"),
        (
            "guard: true",
            "--do_train --do_eval --max_guard_loss_in_points -1",
            "--max_guard_loss_in_points -1: must not be below 0.",
        ),
        (
            "guard: true",
            "--do_eval --max_guard_loss_in_points 1",
            "--max_guard_loss_in_points needs --do_train and --do_eval.",
        ),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, guard: str, more: str, message: str):
    with pytest.raises(UserError) as error:
        records_of(tmp_path, f"{SPEECH}- {{dataset_name: old, {guard}}}\n", more)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_something_else_must_be_scored(tmp_path: Path):
    mix = "- {dataset_name: new, eval_split_name: null}\n- {dataset_name: old, guard: true}\n"
    with pytest.raises(UserError, match="nothing but guards is scored. --do_eval needs an entry"):
        records_of(tmp_path, mix, "--do_train --do_eval")


def test_a_guard_is_only_scored_and_comes_last(tmp_path: Path):
    """Whatever splits the command line names for the other entries; so that the model's language
    is that of an entry which is trained on."""
    mix = f"- {{dataset_name: old, guard: true, language: en}}\n{SPEECH}"
    more = "--do_train --do_eval --test_split_name test --eval_split_name dev"
    more += " --group_column_name speaker"
    new, old = records_of(tmp_path, mix, more)
    assert (new.name, new.guard, new.test_split_name) == ("new", False, "test")
    splits = (old.train_split_name, old.eval_split_name, old.test_split_name)
    assert (old.guard, *splits, old.predict_split_name) == (True, None, "dev", None, None)
    assert (new.group_column_name, old.group_column_name) == ("speaker", None)


def test_a_bound_has_the_best_model_kept(tmp_path: Path):
    (tmp_path / "mix.yaml").write_text(f"{SPEECH}- {{dataset_name: old, guard: true}}\n")
    words = f"{WORDS} {tmp_path / 'mix.yaml'} --do_train --do_eval --max_guard_loss_in_points 2"
    args = script.parse_arguments(words.split())[2]
    assert args.load_best_model_at_end and args.metric_for_best_model == "wer"


def test_data_are_checked_without_scores(tmp_path: Path):
    (tmp_path / "mix.yaml").write_text(f"{SPEECH}- {{dataset_name: old, guard: true}}\n")
    script.parse_arguments(f"--check_data --output_dir o --data_mix {tmp_path}/mix.yaml".split())
