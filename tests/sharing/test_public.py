"""What may leave the machine: names of the Hub, numbers and choices, whatever a local path looks
like."""

import json
from pathlib import Path
from typing import Any

import pytest

from speech_finetuning.sharing.public import (
    Scrubber,
    is_hub_name,
    local_data_folders,
    public_argument,
    public_command,
    public_config,
    public_event_file,
    public_row_id,
    public_run_info,
    public_stream_state,
    public_trainer_state,
    public_worst_rows,
)

HUB_NAMES = ["openai/whisper-small", "alice/speech"]
LOCAL_PATHS = [
    "/data/ACME Corp/speech",
    "customers/ACME/speech",
    "../clients/acme",
    "/a,b/acme",
    "file:///home/acme/list.csv",
    "~/acme",
    "acme",
    "C:\\acme\\speech",
    "/acme",
]


def make_info(path: str) -> dict[str, Any]:
    """run_info.json of a run all of whose names are local."""
    return {
        "command": f"python x.py --dataset_name '{path}' --output_dir '{path}' --max_steps 6",
        "started": "2026-01-01T00:00:00Z",
        "identity": {"model_name_or_path": path, "lora_rank": 0, "dataset_name": path},
        "arguments": {
            "output_dir": path,
            "cache_dir": path,
            "run_name": path,
            "deepspeed": {"zero": {"nvme_path": "/local/acme", "device": "nvme"}},
            "learning_rate": 1e-5,
            "task": "transcribe",
        },
        "versions": {"torch": "2"},
        "git": "abc",
        "data": {
            "train": [{"name": path, "config_name": None, "split": "train", "revision": None}]
        },
        "machine": {"cores": 2},
        "hub_names": [],
        "base_licence": None,
        "something": {"a later version": path},
    }


@pytest.mark.parametrize("path", LOCAL_PATHS)
def test_no_part_of_a_local_path_is_in_a_public_run_info(path: str):
    shown = public_run_info(make_info(path))
    text = json.dumps(shown)
    assert "acme" not in text.lower() and "customers" not in text and "clients" not in text
    assert shown["identity"]["dataset_name"] == shown["data"]["train"][0]["name"] == "local data"
    assert shown["arguments"]["learning_rate"] == 1e-5
    assert shown["arguments"]["task"] == "transcribe"
    assert shown["arguments"]["deepspeed"] == {"zero": {"nvme_path": "NVME_PATH", "device": "nvme"}}
    command = "python x.py --dataset_name 'local data' --output_dir OUTPUT_DIR --max_steps 6"
    assert shown["command"] == command


def test_names_of_the_hub_and_choices_stay():
    command = (
        "python /opt/me/run.py --model_name_or_path openai/whisper-small --dataset-name=alice/speech "
        "--hub_model_id alice/whisper-es --language es --report_to tensorboard wandb --fp16 "
        "--learning_rate 1e-5 --seed -1 --resume_from_checkpoint auto --data_mix mixes/acme.yaml"
    )
    shown = public_command(command, HUB_NAMES)
    expected = command.replace("/opt/me/run.py", "run.py").replace("mixes/acme.yaml", "DATA_MIX")
    assert shown == expected.replace("--dataset-name", "--dataset_name")


def test_a_flag_that_nobody_has_heard_of_shows_no_text():
    assert public_argument("new_option", "acme", HUB_NAMES) == "NEW_OPTION"
    assert public_argument("text_column_name", "clients/acme", HUB_NAMES) == "TEXT_COLUMN_NAME"
    assert public_argument("hub_token", "hf_abcdefghijk", HUB_NAMES) == "HUB_TOKEN"
    assert public_argument("label_names", ["labels"], HUB_NAMES) == ["labels"]


def test_a_local_folder_with_a_name_as_on_the_hub_is_local(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("customers/speech") and is_hub_name("speech")
    (tmp_path / "customers" / "speech").mkdir(parents=True)
    assert not is_hub_name("customers/speech")
    assert not is_hub_name("../x") and not is_hub_name("a/b/c") and not is_hub_name("/x")


@pytest.mark.parametrize(
    ("row_id", "expected"),
    [
        ("train/0/1/{data}/clips/a b,c.wav", "train/0/1/clips/a b,c.wav"),
        ("train/0/1/file://{data}/clips/0.wav", "train/0/1/clips/0.wav"),
        ("mix/train/0/1/{data}/clips/0.wav", "mix/train/0/1/clips/0.wav"),
        ("train/0/1/relative to/ACME/clips/0.wav", "train/0/1/clips/0.wav"),
        ("train/0/1//elsewhere/ACME/0.wav", "train/0/1/0.wav"),
        ("train/0/1/../ACME/0.wav", "train/0/1/0.wav"),
        ("train/0/1/validation-0.flac", "train/0/1/validation-0.flac"),
        ("train/0/1/hf://datasets/alice/x@abc/es/0.flac", "train/0/1/es/0.flac"),
        ("train/0/1/https://ACME.com/signed/0.wav?key=ACME", "train/0/1/0.wav"),
        ("train/0/1/C:\\ACME\\0.wav", "train/0/1/0.wav"),
        ("train/0/1/", "train/0/1/"),
        ("/home/ACME/a form of a later version", "a form of a later version"),
    ],
)
def test_a_row_is_named_within_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_id: str, expected: str
):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data of ACME"
    data.mkdir()
    names = [str(data), "relative to/ACME", "alice/speech"]
    info = {"data": {"eval": [{"name": name} for name in names]}, "hub_names": ["alice/speech"]}
    folders = local_data_folders(info)
    assert folders == [str(tmp_path / "relative to" / "ACME"), str(data)]
    assert public_row_id(row_id.replace("{data}", str(data)), folders) == expected


def test_the_folder_of_a_list_is_its_data(tmp_path: Path):
    (tmp_path / "list.csv").write_text("path,text\n")
    info = {"data": {"eval": [{"name": str(tmp_path / "list.csv")}]}, "hub_names": []}
    folders = local_data_folders(info)
    assert public_row_id(f"list/0/0/{tmp_path}/clips/0.wav", folders) == "list/0/0/clips/0.wav"


def test_worst_rows_keep_their_scores_and_alignments():
    text = "1: test/0/0//home/ACME/a, b.wav, WER 50 %\n2: test/0/1/x, WER 5 %\n\nREF: a/b\nHYP: a\n"
    expected = "1: test/0/0/a, b.wav, WER 50 %\n2: test/0/1/x, WER 5 %\n\nREF: a/b\nHYP: a\n"
    assert public_worst_rows(text, []) == expected
    assert "ACME" not in public_worst_rows("a line of /home/ACME in another form\n\n", [])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "runs/Jul10_12-33-11_gpu.acme.com/events.out.tfevents.1720.gpu.acme.com.4711.0",
            "runs/Jul10_12-33-11/events.out.tfevents.1720.4711.0",
        ),
        ("runs/data/events.out.tfevents.1720.acme.47.1", "runs/data/events.out.tfevents.1720.47.1"),
        (
            "runs/Acme/events.out.tfevents.1720.10.0.0.7.47.1",
            "runs/run/events.out.tfevents.1720.47.1",
        ),
        ("runs/Acme/events.out.tfevents.acme", "runs/run/events.out.tfevents"),
    ],
)
def test_no_host_is_named_by_its_curves(name: str, expected: str):
    assert public_event_file(Path("out", name)).as_posix() == expected


def test_a_configuration_names_no_code_and_no_folder():
    config = {
        "model_type": "whisper",
        "auto_map": {"AutoModel": "modeling.Evil"},
        "_name_or_path": "/home/acme/model",
        "encoder": {"name_or_path": "acme", "layers": [{"auto_map": "x", "size": 1}]},
    }
    shown = {"model_type": "whisper", "encoder": {"layers": [{"size": 1}]}}
    assert public_config(config) == shown


def test_the_best_checkpoint_is_known_by_its_name():
    state = {"best_model_checkpoint": "clients/acme/checkpoint-4", "global_step": 6}
    assert public_trainer_state(state)["best_model_checkpoint"] == "checkpoint-4"
    assert public_trainer_state({"best_model_checkpoint": None})["best_model_checkpoint"] is None


@pytest.mark.parametrize("path", LOCAL_PATHS)
def test_the_place_in_the_stream_names_no_file_of_this_machine(path: str):
    """Settings whose text may be a path are left out: they are then not compared elsewhere."""
    kept = {
        "--learning_rate": 1e-3,
        "--optim": "adamw_torch_fused",
        "--lr_scheduler_kwargs": {"num_cycles": 2},
        "--exclude_rows": "a list of 3 (0123456789ab)",
        "--data_mix, two: exclude_rows": None,
        "--data_mix, two: speaker_column_name": "speaker",
    }
    private = {
        "--optim_args": f"proj={path}",
        "--data_mix, one: exclude_rows": path,  # of a version that saved it
        "--flag_of_a_later_version": path,
    }
    state = {
        "version": 4,
        "settings": kept | private,
        "phases": [{"from_step": 0, "command": f"python x --config '{path}'", "settings": private}],
        "damaged_files": {f"train/0/0/{path}/two.parquet": 3},
        "revisions": {"": None},
    }
    shown = public_stream_state(state, [], [])
    assert shown["settings"] == kept and shown["version"] == 4 and shown["revisions"] == {"": None}
    assert shown["phases"] == [
        {"from_step": 0, "command": "python x --config CONFIG", "settings": {}}
    ]
    assert shown["damaged_files"] == {"train/0/0/two.parquet": 3}


@pytest.mark.parametrize("path", [path for path in LOCAL_PATHS if "/" in path])
def test_the_net_finds_the_paths_of_the_run_in_any_text(path: str):
    scrubber = Scrubber.of(make_info(path))
    for text in (f"read {path}/clips/0.wav", f'"{path}"', f"{path}, twice: {path}."):
        assert "acme" not in scrubber.text(text).lower(), text
    value = {f"{path}/x": [path, 1, None, {"a": f"in {path}"}]}
    assert "acme" not in json.dumps(scrubber.json(value)).lower()


def test_the_net_leaves_addresses_and_longer_names():
    scrubber = Scrubber.of(make_info("/data"))
    text = "https://hub.co/data/x see /database and a/data"
    assert scrubber.text(text) == text
    assert scrubber.text("/data") == "local data"
