"""Data sets that have left the Hub are answered with where they are now."""

from pathlib import Path

import pytest

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.builders import load_builder
from speech_finetuning.data.dataset_names import (
    check_path_exists,
    configuration_problem,
    where_it_is_now,
)

TWO_CONFIGURATIONS = """\
---
configs:
- config_name: spanish
  data_files: es.csv
- config_name: german
  data_files: de.csv
---
"""
ONE_OF_THEM = "Pass one of: spanish, german."
THERE = "Found: spanish, german."


@pytest.mark.parametrize(
    "name",
    [
        "mozilla-foundation/common_voice_11_0",
        "mozilla-foundation/common_voice_17_0",
        "common_voice",
        "legacy-datasets/common_voice",
        "facebook/covost2",
    ],
)
def test_common_voice_and_its_kin_are_answered_with_the_download(name: str):
    answer = where_it_is_now(name)
    assert "mozilladatacollective.com" in answer
    assert "--dataset_name FOLDER --dataset_config_name es" in answer


@pytest.mark.parametrize(
    "name", ["google/fleurs", "alice/my_common_voice_11_0", "speech/common_voice/es"]
)
def test_others_are_not(name: str):
    assert where_it_is_now(name) is None


@pytest.mark.parametrize(
    ("config_name", "problem"),
    [
        (None, f"--dataset_config_name is missing: FOLDER has several. {ONE_OF_THEM}"),
        (
            "spansh",
            "--dataset_config_name spansh: FOLDER has no such configuration. "
            f"{THERE} Did you mean spanish?",
        ),
        ("x", f"--dataset_config_name x: FOLDER has no such configuration. {THERE}"),
    ],
)
def test_configurations_are_named(tmp_path: Path, config_name: str | None, problem: str):
    (tmp_path / "README.md").write_text(TWO_CONFIGURATIONS)
    for name in ("es.csv", "de.csv"):
        (tmp_path / name).write_text("a,b\n1,2\n")
    with pytest.raises(UserError) as caught:
        load_builder(str(tmp_path), config_name, cache_dir=str(tmp_path / "cache"))
    assert str(caught.value) == problem.replace("FOLDER", str(tmp_path))


def test_a_configuration_where_there_are_none_is_left_out(tmp_path: Path):
    (tmp_path / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"Found: default\. Leave the flag out\.$"):
        load_builder(str(tmp_path), "es", cache_dir=str(tmp_path / "cache"))


def test_of_a_hundred_configurations_forty_are_named():
    there = [f"language_{i}" for i in range(102)]
    problem = configuration_problem(
        "google/fleurs", None, f"... available configs: {there} Example"
    )
    assert "language_39 and 62 more (https://huggingface.co/datasets/google/fleurs)." in str(
        problem
    )


def test_a_file_of_a_folder_that_is_here_is_never_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alice").mkdir()
    with pytest.raises(UserError, match="alice/train.pq: does not exist"):
        check_path_exists("alice/train.pq")
    for name in ("alice/speech", "alice/speech-v1.0", "bob/speech.pq"):
        check_path_exists(name)  # may be on the Hub
