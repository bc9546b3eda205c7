"""The model card: what the Hub reads of it, and what everybody may see of the run."""

import shlex
from typing import Any

import huggingface_hub
import pytest
import yaml

from speech_finetuning.sharing.model_card import (
    SETTINGS,
    CardWriter,
    curve_table,
    describe_settings,
    describe_training,
    eval_result_files,
)

ODD = "a: \"b\" 'c' #d | - ünï नमस्ते"


def make_info(**changes: Any) -> dict[str, Any]:
    """run_info.json of a run on a data set of the Hub with an odd name."""
    source = {
        "record": "",
        "name": ODD,
        "config_name": ODD,
        "split": "validation",
        "kind": "parquet",
        "revision": "abc",
        "num_rows": 3,
    }
    return {
        "command": "python /opt/code/x.py --dataset_name x --max_steps 6",
        "started": "2026-01-01T00:00:00Z",
        "identity": {"model_name_or_path": "openai/whisper-tiny", "dataset_name": ODD},
        "arguments": dict.fromkeys(SETTINGS, 1),
        "versions": {"torch": "2"},
        "git": None,
        "data": {"train": [source | {"split": "train"}], "eval": [source]},
        "machine": {"gpus": [], "cores": 2},
        "hub_names": ["openai/whisper-tiny", ODD],
        "base_licence": None,
        **changes,
    }


def make_card(info: dict[str, Any], **changes: Any) -> huggingface_hub.ModelCard:
    names = ("wer", "cer", "wer_norm", "wer_ortho", "wer_low", "wer_high", "repetition_loops")
    metrics = {}
    for role in ("eval", "zero_shot"):
        metrics |= {f"{role}_{name}": 10.0 + i for i, name in enumerate(names)}
        for name in ("substitutions", "deletions", "insertions", "num_rows"):
            metrics[f"{role}_{name}"] = 3
    settings = {
        "run_info": info,
        "languages": ["no"],
        "model_name": ODD,
        "has_training_code": False,
        **changes,
    }
    return huggingface_hub.ModelCard(CardWriter(**settings).write(metrics, []))


def test_a_card_survives_quotes_colons_and_other_alphabets():
    card = make_card(make_info(command=shlex.join(["python", "x.py", "--task", ODD])))
    assert card.data.language == "no" and card.data.license is None
    assert card.data.datasets == [ODD] and card.data.model_name == ODD
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {"WER, normalised": 12.0, "WER, as written": 13.0, "CER": 11.0}
    places = {(r.dataset_name, r.dataset_split, r.dataset_revision) for r in card.data.eval_results}
    assert places == {(ODD, "validation", "abc")}
    assert "before training" in card.text and ODD in card.text
    assert "none by this run" in card.text and "| step |" not in card.text


def test_a_card_of_local_names_says_that_they_are_local():
    card = make_card(make_info(hub_names=[]), has_training_code=True)
    assert "A local model fine-tuned on local data." in card.text
    assert card.data.base_model is None and card.data.datasets is None
    assert {result.dataset_name for result in card.data.eval_results} == {"local data"}
    assert ODD not in card.content.replace(f"# {ODD}", "").replace(f'model="{ODD}"', "").replace(
        f"--model {ODD}", ""
    ).replace(card.data.to_yaml(), "")
    assert "python x.py --dataset_name 'local data' --max_steps 6" in card.text
    assert "`training_code/`" in card.text


def test_a_card_is_not_of_the_guards_data():
    info = make_info()
    guard = {**info["data"]["eval"][0], "name": "alice/old", "record": "old", "num_rows": 2}
    hub_names = [*info["hub_names"], "alice/old"]
    card = make_card(make_info(data=info["data"] | {"guard": [guard]}, hub_names=hub_names))
    assert card.data.datasets == [ODD] and "alice/old" not in card.text
    assert (
        "Sets that must not get worse have not been\ntrained on; their change is in p" in card.text
    )
    assert "have not been" not in make_card(info).text


@pytest.mark.parametrize(("languages", "spoken"), [(["es"], '"es"'), (["es", "fr"], "None")])
def test_the_examples_say_which_language_is_spoken(languages: list[str], spoken: str):
    card = make_card(make_info(), languages=languages)
    assert f"language={spoken}" in card.text
    assert card.data.language == (languages[0] if len(languages) == 1 else languages)


def test_a_card_says_with_which_flags_a_continued_run_was_trained():
    """The last command alone would repeat half of it."""
    settings = {"--learning_rate": 0.001, "--max_steps": 600, "--seed": 42, "--optim_args": "/acme"}
    phases = [
        {
            "from_step": 0,
            "started": "2026-01-01T00:00:00Z",
            "command": "python x.py --dataset_name /acme --max_steps 600",
            "settings": settings,
        },
        {
            "from_step": 600,
            "started": "2026-01-02T00:00:00Z",
            "command": "python x.py --max_steps 900",
            "settings": {**settings, "--learning_rate": 0.0005, "--max_steps": 900},
        },
    ]
    text = make_card(make_info(phases=phases)).text
    assert (
        "\n* from step 0 on: --learning_rate 0.001, --max_steps 600"
        "\n* from step 600 on: --learning_rate 0.0005, --max_steps 900\n"
    ) in text
    commands = text.rstrip().removesuffix("```").rpartition("```\n")[2].splitlines()
    assert commands == [
        "python x.py --dataset_name 'local data' --max_steps 600",
        "python x.py --dataset_name 'local data' --max_steps 6",
    ]
    assert "acme" not in text
    plain = make_card(make_info(phases=phases[:1])).text
    assert "from step" not in plain and plain.count("python x.py") == 1


def test_a_card_says_what_was_trained_in_units_that_fit():
    metrics = {"train_rows": 1600, "train_rejected": 3, "train_audio_hours": 0.6}
    assert describe_training(metrics | {"train_hours": 2.04}) == (
        "1,600 rows, repeats counted (3 of them rejected), with 36 min of speech, in 2.0 h"
    )
    assert describe_training(metrics | {"train_nonspeech_rows": 1_040}).startswith(
        "1,600 rows, repeats counted (3 of them rejected, 1,040 made into noise or silence), with"
    )
    arguments = dict.fromkeys(SETTINGS) | {"fp16": False, "bf16": True, "seed": 0}
    assert describe_settings(arguments) == "bf16 True, seed 0"


def test_the_curve_has_a_line_for_every_evaluation():
    history = [
        {"step": 0, "eval_loss": 3.0, "eval_wer": 90.0, "eval_cer": 80.0},
        {"step": 1, "loss": 2.0},
        {"step": 2, "eval_loss": 1.5, "eval_wer": 50.0, "eval_cer": 20.123456},
        {"step": 3, "loss": 1.0},
        {"step": 4, "eval_loss": 1.25, "eval_wer": 40.0, "eval_cer": 10.0},
    ]
    lines = curve_table(history).splitlines()
    assert lines[0].startswith("| step | training loss | evaluation loss | WER % | CER % |")
    assert "nan" not in lines[2]
    rows = [line.replace(" ", "") for line in lines[2:]]
    assert rows == ["|0||3|90|80|", "|2|2|1.5|50|20.12|", "|4|1|1.25|40|10|"]


def test_scores_that_were_measured_anew_are_in_their_place_in_the_curve():
    """As of a finished run, whose best step is not its last."""
    history = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval_loss": 1.5, "eval_wer": 50.0, "eval_cer": 20.0},
        {"step": 1, "eval_loss": 1.25, "eval_wer": 40.0, "eval_cer": 10.0},
    ]
    rows = [line.replace(" ", "") for line in curve_table(history).splitlines()[2:]]
    assert rows == ["|1|2|1.25|40|10|", "|2|1|1.5|50|20|"]


def test_scores_of_several_sets_are_told_apart():
    source = make_info()["data"]["eval"][0]
    data = {"eval": [source | {"record": name} for name in ("one", "two")]}
    writer = CardWriter(
        run_info=make_info(data=data), languages=["es"], model_name="x", has_training_code=False
    )
    metrics = {"eval_one_cer": 1.234, "eval_two_cer": 2.0, "eval_cer": 3.0}
    values = [result.metric_value for result in writer.metadata(metrics).eval_results]
    assert values == [1.23, 2.0]


def test_scores_on_data_sets_of_the_hub_are_read_back_by_the_hub_s_own_reader():
    name = "facebook/multilingual_librispeech"
    source = make_info()["data"]["eval"][0] | {"name": name, "config_name": "spanish"}
    data = {"eval": [source], "test": [source | {"split": "test"}]}
    card = make_card(make_info(data=data, hub_names=[name, "openai/whisper-tiny"]))
    files = eval_result_files(card.content)
    assert list(files) == [".eval_results/facebook--multilingual_librispeech.yaml"]
    (text,) = files.values()
    (entry,) = huggingface_hub.parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id) == (name, "spanish_validation")
    assert (entry.value, entry.dataset_revision) == (12.0, "abc")
    assert eval_result_files(make_card(make_info(hub_names=[])).content) == {}, "local data"
    assert eval_result_files(make_card(make_info()).content) == {}, "no name of the Hub's"
