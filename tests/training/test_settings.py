"""A finished run that is started again with other flags."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError
from speech_finetuning.training.settings import (
    OF_A_SOURCE,
    OF_THE_RUN,
    check_finished_run,
    is_finished,
    saved_settings,
    training_settings,
)

WORDS = "--model_name_or_path m --dataset_name d --output_dir o --do_train --max_steps 6"
# Our flags that do not shape the weights, or that make the run another one (run_identity).
WITHOUT_EFFECT_ON_WEIGHTS = """
    model_name_or_path model_revision cache_dir lora_rank model_index_name config
    average_checkpoints base_weight_shares report_clips group_column_name
    guard max_guard_loss_in_points check_data order_version is_continued hold_out
    dataset_name dataset_config_name train_split_name eval_split_name test_split_name
    predict_split_name audio_column_name text_column_name max_eval_samples do_normalize_eval
    language data_mix max_rejected_fraction task data_report_samples streaming allow_audio_urls
    num_decoding_threads max_network_wait_in_minutes max_train_time_in_hours eval_before_training
    long_form push_predictions early_stopping_patience dry_run name revision
""".split()


def settings_of(flags: str) -> dict[str, Any]:
    arguments = script.parse_arguments([*WORDS.split(), *flags.split()])
    return training_settings(script.all_flags(*arguments), script.data_records(arguments[1]))


def finished(folder: Path, settings: dict[str, Any], steps: int = 6, stopped: int = 0) -> Path:
    """A checkpoint as far as this is about."""
    checkpoint = folder / f"checkpoint-{steps}"
    checkpoint.mkdir()
    callbacks = {
        "EarlyStoppingCallback": {"attributes": {"early_stopping_patience_counter": stopped}}
    }
    state = {"global_step": steps, "stateful_callbacks": callbacks}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / "stream_state.json").write_text(json.dumps({"settings": settings}))
    return checkpoint


def test_whether_a_flag_shapes_the_weights_is_a_decision():
    groups = (script.ModelArguments, script.DataRecord)
    own = {field.name for group in groups for field in fields(group)}
    assert own == (set(OF_THE_RUN) | set(OF_A_SOURCE) | set(WITHOUT_EFFECT_ON_WEIGHTS)) & own
    assert not (set(OF_THE_RUN) | set(OF_A_SOURCE)) & set(WITHOUT_EFFECT_ON_WEIGHTS)


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        (
            "--learning_rate 1e-3",
            "--learning_rate 5e-4",
            "--learning_rate was 0.001, is now 0.0005",
        ),
        ("", "--max_steps 5", "--max_steps was 6, is now 5"),
        ("", "--lr_scheduler_type constant", "--lr_scheduler_type was linear, is now constant"),
        ("--do_lower_case", "", "--do_lower_case was True, is now False"),
        ("--max_train_samples 9", "", "--max_train_samples was 9, is now None"),
        ("", "--seed 7 --weight_decay 0.1", "--weight_decay was 0.0, is now 0.1; --seed was 42"),
        (
            "--train_window full",
            "--train_window longest",
            "--train_window was full, is now longest",
        ),
        ("", "--freeze_encoder True", "--freeze_encoder was False, is now True"),
        ("", "--per_device_train_batch_size 2", "--per_device_train_batch_size was 8, is now 2"),
    ],
)
def test_both_values_are_named(tmp_path: Path, then: str, now: str, message: str):
    checkpoint = finished(tmp_path, settings_of(then))
    with pytest.raises(UserError) as error:
        check_finished_run(checkpoint, settings_of(now), None)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "--output_dir" in str(error.value)


@pytest.mark.parametrize(
    "now",
    [
        "",
        "--do_eval --eval_steps 3 --max_eval_samples 9 --logging_steps 1 --save_steps 2",
        "--num_decoding_threads 3 --report_to none --test_split_name test --do_predict",
        "--max_steps 7 --learning_rate 5e-4",  # there are steps left to train with it
    ],
)
def test_what_does_not_change_the_weights_is_allowed(tmp_path: Path, now: str):
    checkpoint = finished(tmp_path, settings_of("--learning_rate 1e-3"))
    check_finished_run(checkpoint, settings_of(f"--learning_rate 1e-3 {now}"), None)


def test_an_entry_of_a_mix_is_named(tmp_path: Path):
    mix = tmp_path / "mix.yaml"
    words = f"--model_name_or_path m --output_dir o --do_train --max_steps 6 --data_mix {mix}"
    both = []
    for weight in (1, 2):
        mix.write_text(f"- dataset_name: a\n- dataset_name: b\n  name: two\n  weight: {weight}\n")
        arguments = script.parse_arguments(words.split())
        records = script.data_records(arguments[1])
        both.append(training_settings(script.all_flags(*arguments), records))
    checkpoint = finished(tmp_path, both[0])
    with pytest.raises(UserError, match="--data_mix, two: weight was 1.0, is now 2.0"):
        check_finished_run(checkpoint, both[1], None)


def test_a_guard_shapes_no_weights(tmp_path: Path):
    mix = tmp_path / "mix.yaml"
    words = f"--model_name_or_path m --output_dir o --do_eval --data_mix {mix}"
    mix.write_text("- dataset_name: a\n- {dataset_name: b, name: two, guard: true}\n")
    arguments = script.parse_arguments(words.split())
    settings = training_settings(script.all_flags(*arguments), script.data_records(arguments[1]))
    assert "--data_mix, a: weight" in settings and not [name for name in settings if "two" in name]


def test_rows_that_are_left_out_count_wherever_their_list_lies(tmp_path: Path):
    """The path would be uploaded with the checkpoint, and be another one where that goes on."""
    lists = [tmp_path / name for name in ("Acme.txt", "moved.txt", "other.txt")]
    for path, text in zip(lists, ("b\na\n", '{"row": "a"}\nb\n', "a\n"), strict=True):
        path.write_text(text)
    then, moved, other = (settings_of(f"--exclude_rows {path}") for path in lists)
    assert str(tmp_path) not in json.dumps(then) and "Acme" not in json.dumps(then)
    checkpoint = finished(tmp_path, then)
    check_finished_run(checkpoint, moved, None)
    with pytest.raises(UserError, match=r"--exclude_rows was a list of 2 \(\w{12}\), is now a lis"):
        check_finished_run(checkpoint, other, None)
    with pytest.raises(UserError, match="is now None"):
        check_finished_run(checkpoint, settings_of(""), None)


def test_a_checkpoint_that_still_names_the_list_says_nothing_of_its_rows(tmp_path: Path):
    rows = tmp_path / "Acme.txt"
    rows.write_text("a\n")
    now = settings_of(f"--exclude_rows {rows}")
    old = {**now, "--exclude_rows": str(rows), "--data_mix, two: exclude_rows": "Acme.txt"}
    checkpoint = finished(tmp_path, old)
    check_finished_run(checkpoint, now, None)
    assert "Acme" not in json.dumps(saved_settings(checkpoint))


def test_an_older_checkpoint_has_its_flags_in_run_info(tmp_path: Path):
    checkpoint = finished(tmp_path, {})
    now = settings_of("--learning_rate 5e-4")
    check_finished_run(checkpoint, now, None)  # nothing is known
    arguments = {"learning_rate": 1e-3, "output_dir": "o"}
    (tmp_path / "run_info.json").write_text(json.dumps({"arguments": arguments}))
    with pytest.raises(UserError, match="--learning_rate was 0.001, is now 0.0005"):
        check_finished_run(checkpoint, now, None)


def test_a_run_that_stopped_early_is_finished_unless_its_patience_grows(tmp_path: Path):
    checkpoint = finished(tmp_path, settings_of("--max_steps 9"), steps=3, stopped=2)
    changed = settings_of("--max_steps 12")
    with pytest.raises(UserError, match="--max_steps was 9, is now 12"):
        check_finished_run(checkpoint, changed, 2)
    check_finished_run(checkpoint, changed, 3)
    check_finished_run(checkpoint, changed, None)
    state = {"global_step": 3, "stateful_callbacks": {}}
    assert not is_finished(state, 4, 1) and is_finished(state, 3, 1)
