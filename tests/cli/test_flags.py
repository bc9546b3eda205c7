"""The command line: our flags, retired flags, rules, configuration files, help."""

import argparse
import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
import torch
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import UserError
from speech_finetuning.cli.checks import TRACKERS
from speech_finetuning.cli.exit_status import exit_code_of
from speech_finetuning.cli.flags import option_names
from speech_finetuning.cli.help import IMPORTANT_FLAGS
from speech_finetuning.cli.parsing import FlagParser
from speech_finetuning.cli.retired import (
    MEANT,
    REFUSED,
    RETIRED_RENAMED,
    RETIRED_WITHOUT_EFFECT,
)
from speech_finetuning.cli.source_flags import read_parser
from speech_finetuning.cli.translation import translate

REQUIRED = "--model_name_or_path m --dataset_name d --output_dir o --language es".split()
OUR_FLAGS = """
allow_audio_urls apply_spec_augment audio_column_name average_checkpoints base_weight_shares
gain_in_db noise_dataset noise_probability noise_snr_in_db room_dataset room_probability telephone_probability
cache_dir check_data config data_mix nonspeech_fraction
data_report_samples dataset_config_name dataset_name do_lower_case do_normalize_eval
do_remove_punctuation dry_run early_stopping_patience eval_before_training eval_fraction
eval_split_name exclude_rows freeze_encoder full_window_fraction group_column_name
keep_empty_text language
long_form lora_rank max_duration_in_seconds
max_eval_samples max_guard_loss_in_points max_network_wait_in_minutes max_rejected_fraction max_train_samples
max_train_time_in_hours min_duration_in_seconds model_index_name model_name_or_path
model_revision num_decoding_threads pack_utterances predict_split_name push_predictions
report_clips shuffle_buffer_size speaker_column_name speed_perturbation streaming task
prompt_column_name prompt_probability test_split_name text_column_name
timestamp_probability train_split_name train_window
""".split()


def check(more: str) -> tuple:
    arguments = script.parse_arguments([*REQUIRED, *more.split()])
    script.check_arguments(*arguments[1:])
    return arguments


def test_a_new_flag_is_a_decision():
    names = [
        f.name
        for group in (script.ModelArguments, script.DataArguments)
        for f in dataclasses.fields(group)
    ]
    assert sorted(names) == sorted(OUR_FLAGS)


def test_defaults_that_differ_from_the_library():
    _, data, args = check("--do_train --do_eval --max_steps 1")
    assert args.optim == "adamw_torch_fused"  # the library's own default: relied upon
    assert (args.predict_with_generate, args.report_to, args.dataloader_num_workers) == (
        True,
        ["tensorboard"],
        1,
    )
    assert args.eval_steps == args.save_steps == 500
    assert args.logging_steps == 25
    assert (args.eval_strategy, args.save_strategy, args.resume_from_checkpoint) == (
        "steps",
        "steps",
        "auto",
    )
    assert (data.max_duration_in_seconds, data.do_normalize_eval, data.streaming) == (
        30.0,
        True,
        True,
    )
    assert args.get_warmup_steps(2000) == 200


@pytest.mark.parametrize(
    "metric", ["wer", "eval_wer", "cer", "wer_norm_marks", "eval_dutch_cer", "loss"]
)
def test_the_best_error_rate_is_the_lowest(metric: str):
    args = check(
        f"--do_train --do_eval --max_steps 1 --load_best_model_at_end --metric_for_best_model {metric}"
    )[2]
    assert args.greater_is_better is False


def test_a_test_split_loads_the_best_model():
    args = check("--do_train --do_eval --max_steps 1 --test_split_name test")[2]
    assert args.load_best_model_at_end and args.metric_for_best_model == "wer"


@pytest.fixture(scope="session")
def library_parser() -> FlagParser:
    return FlagParser((script.TrainingArguments, script.ModelArguments, script.DataArguments))


def test_the_flags_read_from_source_are_the_library_s(library_parser: FlagParser):
    """So that what is answered early is what the script itself would say."""
    early = read_parser(Path(script.__file__))
    # Their choices or kinds are no constants in the source.
    checked_later = (
        "debug log_level log_level_replica liger_kernel_config parallelism_config".split()
    )
    assert option_names(early) == option_names(library_parser)
    for name in option_names(library_parser):
        of_source = early._option_string_actions[f"--{name}"]
        of_library = library_parser._option_string_actions[f"--{name}"]
        for attribute in ("nargs", "const", "dest"):
            assert getattr(of_source, attribute) == getattr(of_library, attribute), name
        choices = list(of_library.choices or [])
        if name not in checked_later:
            assert list(of_source.choices or []) == choices, name
            for word in ("3", "0.5", "yes", "text"):
                assert accepts(early, name, word) == accepts(library_parser, name, word), name


def accepts(parser: argparse.ArgumentParser, name: str, word: str) -> bool:
    try:
        return parser.parse_known_args([f"--{name}", word])[1] == []
    except UserError:
        return False


@pytest.mark.parametrize("form", ["--{} {}", "--{}={}"])
@pytest.mark.parametrize(
    ("name", "value", "today", "means"),
    [
        ("evaluation_strategy", "steps", "eval_strategy", "steps"),
        ("warmup_ratio", "0.25", "warmup_steps", 0.25),
        ("per_gpu_train_batch_size", "3", "per_device_train_batch_size", 3),
        ("no_cuda", "True", "use_cpu", True),
        ("push_to_hub_model_id", "alice/x", "hub_model_id", "alice/x"),
    ],
)
def test_flags_of_2022_mean_what_they_meant(
    name: str, value: str, today: str, means: object, form: str
):
    arguments = check(f"--do_train --do_eval --max_steps 1 {form.format(name, value)}")
    assert getattr(arguments[2], today) == means


def test_today_s_flag_wins_over_that_of_2022():
    args = check("--do_train --max_steps 1 --warmup_steps 7 --warmup_ratio 0.5")[2]
    assert args.warmup_steps == 7


def test_normalisation_of_2022():
    assert check("--do_eval --do_normalize_eval_only False")[1].do_normalize_eval is False
    assert check("--do_eval --do_normalize_eval_only")[1].do_normalize_eval is True


@pytest.mark.parametrize("name", sorted(RETIRED_WITHOUT_EFFECT))
@pytest.mark.parametrize("form", ["--{} 1 2", "--{}=1", "--{}"])
def test_flags_without_effect_are_taken_out_with_their_values(name: str, form: str):
    words = [*REQUIRED, *form.format(name).split(), "--do_eval"]
    translation = translate(words)
    assert translation.words == [*REQUIRED, "--do_eval"]
    (note,) = translation.notes
    assert note.startswith(f"--{name} has no effect (")


@pytest.mark.parametrize(
    "flags", ["--hub_token x", "--push_to_hub_token=hf_abc", "--use_auth_token hf_abcdefgh"]
)
def test_only_a_token_is_refused(flags: str):
    with pytest.raises(UserError, match="a token does not belong on a command line"):
        check(f"--do_eval {flags}")
    assert check("--do_eval --use_auth_token True --use_auth_token")


def test_flags_that_texts_name_exist(library_parser: FlagParser):
    known = {*option_names(library_parser), "help_all"}
    named = {*IMPORTANT_FLAGS, *RETIRED_RENAMED.values()}
    named |= {meant.split()[0] for meant in MEANT.values()}
    for text in [*RETIRED_WITHOUT_EFFECT.values(), *REFUSED.values()]:
        named |= set(re.findall(r"--(\w+)", text))
    assert named <= known
    assert not set(MEANT) & known, "an alias of a flag that exists"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_harmful_flags_are_refused(name: str):
    values = {
        "eval_accumulation_steps": "2",
        "label_names": "x",
        "train_sampling_strategy": "group_by_length",
    }
    values |= {"bf16_full_eval": "True --use_cpu", "eval_do_concat_batches": "False"}
    with pytest.raises(UserError, match=f"--{name} is refused"):
        check(f"--do_train --max_steps 1 --{name} {values.get(name, 'True')}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--max_steps 1", "nothing to do"),
        ("--do_train --max_steps 1 --num_train_epochs 2", "not both"),
        ("--do_train --max_steps 1 --fp16 --bf16", "--fp16 and --bf16: pass one, not both"),
        ("--do_train --max_steps 1 --dataloader_num_workers 4", "--num_decoding_threads 4"),
        ("--do_train --max_steps 1 --early_stopping_patience 2", "needs --do_train and --do_eval"),
        ("--do_train --max_steps 1 --eval_before_training", "needs --do_train and --do_eval"),
        ("--do_train --save_strategy epoch", "no epochs. Use --save_strategy steps."),
        ("--do_eval --generation_max_length 0", "--generation_max_length 0: must be above 0"),
        ("--do_eval --generation_num_beams 0", "--generation_num_beams 0: must be above 0"),
        ("--do_train --seed -1", "--seed -1: must not be below 0"),
        ("--do_train --data_seed -2", "--data_seed -2: must not be below 0"),
        (
            "--do_train --do_eval --load_best_model_at_end --eval_steps 3 --save_steps 4",
            "--save_steps 4: --load_best_model_at_end needs a multiple of --eval_steps 3. Pass "
            "--save_steps 6.",
        ),
        ("--do_train --seed 4294967296", "--seed 4294967296: must not be above 4294967295"),
        ("--do_train --max_steps 1 --eval_strategy epoch", "invalid choice: 'epoch'"),
        ("--do_train --max_steps 1 --task dictate", "invalid choice: 'dictate'"),
        ("--do_train --max_steps 1 --min_duration_in_seconds 40", "is not below"),
        ("--do_train --max_steps 1 --shuffle_buffer_size 0", "at least 1"),
        ("--do_train --max_steps 1 --max_rejected_fraction 2", "between 0 and 1"),
        ("--do_eval --eval_fraction 1.5", "--eval_fraction 1.5: must lie between 0 and 1"),
        ("--do_train --max_steps 1 --eval_fraction 0.2", "of no effect without --do_eval"),
        ("--do_eval --exclude_rows no/such/file", "no/such/file: there is no such file. Pass one"),
        ("--do_train --max_steps 1 --timestamp_probability 2", "between 0 and 1"),
        ("--do_train --max_steps 1 --predict_with_generate False", "real generation"),
        ("--do_train --max_steps 1 --push_predictions", "needs --push_to_hub"),
        ("--do_train --max_steps 1 --push_to_hub --hub_always_push", "always follows"),
        ("--do_train --max_steps 1 --resume_from_checkpoint hub", "needs --hub_model_id"),
        (
            "--do_train --max_steps 1 --data_mix mix.yaml",
            "--dataset_name and --data_mix: pass one, not both",
        ),
        ("--do_train --max_steps 1 --fsdp", "needs several GPUs"),
        (
            '--do_train --max_steps 1 --fsdp --fsdp_config {"state_dict_type":"SHARDED_STATE_DICT"}',
            "FULL_STATE_DICT",
        ),
        ('--do_train --max_steps 1 --fsdp --fsdp_config {"version":1}', "use version 2"),
        ("--do_train --do_eval --max_steps 1 --fsdp --long_form", "leave out --fsdp"),
        ("--do_train --max_steps abc", "--max_steps: expected a whole number, found 'abc'"),
        ("--do_train --max_step 1", "unknown flag --max_step. Did you mean --max_steps?"),
        ("--do_train --max_steps 1 --text_colum_name x", "Did you mean --text_column_name?"),
        ("--do_train --max_steps 1 surplus", "--max_steps: surplus is one value too many"),
        ("--do_train --max_steps 1 --output_dir", "--output_dir: expected a value, found none"),
        ("--do_train --max_steps -5", "--max_steps -5: must be above 0"),
        ("--do_train --learning_rate -1", "--learning_rate -1: must not be below 0"),
        ("--do_train --logging_steps 0", "--logging_steps 0: must be above 0"),
        (
            "--do_train --per_device_train_batch_size 0",
            "--per_device_train_batch_size 0: must be above 0",
        ),
    ],
)
def test_every_bad_flag_is_one_line(flags: str, message: str, capsys: pytest.CaptureFixture):
    assert exit_code_of(script.main, [*REQUIRED, *flags.split()]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert [message in line for line in lines].count(True) == 1


@pytest.mark.parametrize(
    "flag", ["model_name_or_path", "dataset_name", "output_dir", "exclude_rows", "noise_dataset"]
)
def test_a_name_that_is_too_long_is_one_line(flag: str, capsys: pytest.CaptureFixture):
    words = [*REQUIRED, "--do_train", f"--{flag}", "a" * 300]
    assert exit_code_of(script.main, words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: --{flag} {'a' * 40}...: too long for the name of a file."


def test_what_is_missing_is_told_at_once(capsys: pytest.CaptureFixture):
    assert exit_code_of(script.main, "--language es --do_train --max_steps 1".split()) == 2
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == [
        "--model_name_or_path",
        "--output_dir",
        "--dataset_name",
    ]


def test_all_bad_flags_are_told_at_once(capsys: pytest.CaptureFixture):
    words = "--do_train --save_strategy epoch --shuffle_buffer_size 0 --push_predictions".split()
    assert exit_code_of(script.main, [*REQUIRED, *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.split()[1] for line in lines] == [
        "--save_strategy",
        "--shuffle_buffer_size",
        "--push_predictions",
    ]


def test_no_output_goes_into_the_folder_of_the_data(tmp_path: Path):
    data = tmp_path / "data"
    (data / "x").mkdir(parents=True)
    table = data / "train.csv"
    table.write_text("path,text\n")
    inside = [(data, data), (data / "x" / "..", data), (data, data / "x" / "out"), (table, data)]
    for name, output_dir in inside:
        with pytest.raises(UserError, match="lies in the folder of the data"):
            check(f"--do_eval --dataset_name {name} --output_dir {output_dir}")
    for name, output_dir in [(data, tmp_path), (data, tmp_path / "data2"), (table, data / "x")]:
        check(f"--do_eval --dataset_name {name} --output_dir {output_dir}")


@pytest.mark.parametrize(("name", "package"), [("clearml", "clearml"), ("comet_ml", "comet_ml")])
def test_a_tracker_that_is_not_installed_is_one_line(name: str, package: str):
    with pytest.raises(UserError) as error:
        check(f"--do_eval --report_to {name}")
    assert str(error.value) == (
        f"--report_to {name}: the package {package} is not installed. Run pip install {package}, "
        "or leave out --report_to for TensorBoard."
    )


def test_local_entries_of_a_mix_that_is_pushed_have_names_of_their_own(
    tmp_path: Path,
):
    """The folder's name would else be in the names of scores and rows on the Hub."""
    (tmp_path / "Acme").mkdir()
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"- dataset_name: alice/speech\n- dataset_name: {tmp_path}/Acme\n")
    words = f"--model_name_or_path m --output_dir o --do_train --max_steps 1 --data_mix {mix}"
    script.parse_arguments(words.split())
    with pytest.raises(UserError, match="entry 2: with --push_to_hub, local data need a 'name:"):
        script.parse_arguments([*words.split(), "--push_to_hub"])
    mix.write_text(f"{mix.read_text()}  name: own\n")
    script.parse_arguments([*words.split(), "--push_to_hub"])


def test_a_tracker_that_nobody_knows(capsys: pytest.CaptureFixture):
    message = "--report_to wand: unknown. Known: azure_ml, clearml.*, none. Did you mean wandb?"
    with pytest.raises(UserError, match=re.escape(message).replace(r"\.\*", ".*")):
        check("--do_eval --report_to wand")


def test_every_tracker_of_the_library_is_known():
    assert set(TRACKERS) == set(INTEGRATION_TO_CALLBACK)


def test_the_best_model_needs_scores():
    with pytest.raises(UserError) as error:
        check("--do_train --max_steps 1 --load_best_model_at_end")
    assert str(error.value) == "--load_best_model_at_end needs --do_train and --do_eval."


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ('{"stage":2}', "--deepspeed needs GPUs"),
        ('{"stage":3,"stage3_gather_16bit_weights_on_model_save":true}', "--deepspeed needs GPUs"),
        ('{"stage":3}', "ZeRO-3 needs"),
        ('{"stage":3} --do_eval --long_form', "leave out --fsdp or ZeRO-3"),
    ],
)
def test_deepspeed_that_cannot_work(zero: str, message: str, capsys: pytest.CaptureFixture):
    pytest.importorskip(
        "deepspeed", reason="DeepSpeed is not among the requirements: pip install deepspeed"
    )
    zero, *more = zero.split()
    words = [
        "--do_train",
        "--max_steps",
        "1",
        "--deepspeed",
        f'{{"zero_optimization":{zero}}}',
        *more,
    ]
    assert exit_code_of(script.main, [*REQUIRED, *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_an_optimiser_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", bool)
    assert (
        exit_code_of(
            script.main, [*REQUIRED, *"--do_train --max_steps 1 --optim adamw_bnb_8bit".split()]
        )
        == 2
    )
    error = capsys.readouterr().err.strip()
    assert (
        error.startswith("error: --optim adamw_bnb_8bit: ")
        and "pip install" in error
        and "\n" not in error
    )


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adafactor", "sgd"])
def test_torch_has_its_own_optimisers(name: str):
    assert check(f"--do_train --max_steps 1 --optim {name}")[2].optim == name


def test_a_driver_that_is_too_old_names_the_fix(monkeypatch: pytest.MonkeyPatch):
    def old_driver() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040). Please update ..."
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", old_driver)
    with pytest.raises(
        UserError, match=r"found version 11040\)\. Update the NVIDIA driver, or install"
    ):
        check("--do_train --max_steps 1")


def test_config_file_supplies_defaults_that_the_command_line_overrides(tmp_path: Path):
    config = tmp_path / "recipe.yaml"
    config.write_text(
        "learning_rate: 1e-5\nmax_steps: 7\ndo_train: true\nlanguage: de\nwarmup_steps: 0.1\n"
    )
    _, data, args = check(f"--config {config} --max_steps 9")
    assert (args.learning_rate, args.max_steps, args.do_train, args.warmup_steps) == (
        1e-5,
        9,
        True,
        0.1,
    )
    assert data.language == "es"
    for text, message in (
        ("max_stps: 3", "Did you mean --max_steps"),
        ("- a", "expected lines"),
        (
            "max_steps: 1\na: [",
            "recipe.yaml, line 2: no YAML: .* Write lines like 'max_steps: 1000'",
        ),
    ):
        config.write_text(text)
        with pytest.raises(UserError, match=message):
            check(f"--config {config}")


ALIASES_OF_FAULTS = """lr learning_rate, model model_name_or_path, dataset dataset_name,
batch_size per_device_train_batch_size, train_batch_size per_device_train_batch_size,
train_file dataset_name, validation_split eval_split_name, epochs num_train_epochs,
text_colum_name text_column_name, shuffle_buffer shuffle_buffer_size, num_workers num_decoding_threads,
train_split_nam train_split_name, eval_splits eval_split_name"""


def test_all_unknown_flags_are_told_at_once_with_what_was_meant(capsys: pytest.CaptureFixture):
    pairs = [pair.split() for pair in ALIASES_OF_FAULTS.split(",")]
    words = [word for typed, _ in pairs for word in (f"--{typed}", "1")]
    assert exit_code_of(script.main, [*REQUIRED, *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"error: unknown flag --{typed}. Did you mean --{meant}?" for typed, meant in pairs
    ]


def test_header_equals_requirements():
    lines = Path(script.__file__).read_text().splitlines()
    start, end = lines.index("# /// script"), lines.index("# ///")
    header = tomllib.loads(
        "\n".join(line.removeprefix("#").strip() for line in lines[start + 1 : end])
    )
    requirements = (Path(script.__file__).parent / "requirements.txt").read_text().splitlines()
    listed = [line.split("#")[0].strip() for line in requirements if line.split("#")[0].strip()]
    assert header["dependencies"] == listed
    package = Path(script.__file__).parent / "speech_finetuning"
    files = [Path(script.__file__), *package.glob("*/[a-z]*.py")]
    source = "\n".join(path.read_text().split('"""', 2)[2] for path in files)
    # Used by libraries, and by tests.
    not_imported = ("accelerate", "tensorboard", "jinja2", "librosa")
    for requirement in listed:
        name = re.match(r"\w+", requirement).group()
        is_imported = re.search(rf"\b(import|from) {name}\b", source) is not None
        assert is_imported or name in not_imported, f"{name} is never used"
