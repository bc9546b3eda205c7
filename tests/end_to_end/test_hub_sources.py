"""The script against a Hub on loopback, over real HTTP with the real clients, in a process of its
own."""

import json
import subprocess
from pathlib import Path

import pytest
from hub_clients import HubClients, HubWithClients

from speech_finetuning.cli import demonstration

pytestmark = pytest.mark.slow  # a process each


def run(
    hub: HubWithClients, home: Path, token: str | None, **flags: object
) -> subprocess.CompletedProcess:
    """The script's own command line, with the Hub's address in its environment."""
    values = {
        "model_name_or_path": "alice/tiny",
        "language": "es",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "generation_max_length": 8,
        "report_to": "none",
        "report_clips": 0,
        "output_dir": home / "output",
        **flags,
    }
    words = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    code, output, log = hub.clients.run(home, ["--do_train", "--do_eval", *words], token=token)
    return subprocess.CompletedProcess(words, code, output, log)


@pytest.fixture(scope="module")
def hub(
    hub_clients: HubClients,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    speech: Path,
):
    folder = tmp_path_factory.mktemp("hub")
    files = {path.name: path.read_bytes() for path in speech.glob("*.parquet")}
    export = {
        f"spanish/{name.split('-')[0]}/{name.split('-')[1]}.parquet": data
        for name, data in files.items()
    }
    audio = {
        "train/metadata.csv": b"file_name,transcription\n",
        "validation/metadata.csv": b"file_name,transcription\n",
    }
    for i, (data, text) in enumerate(demonstration.make_rows(8, seed=9)):
        split = ("train", "validation")[i % 2]
        audio[f"{split}/{i}.flac"] = data
        audio[f"{split}/metadata.csv"] += f"{i}.flac,{text}\n".encode()
    with hub_clients.new_hub() as server:
        server.add_repo("model", "alice/tiny", tiny_model)
        server.add_repo("dataset", "alice/private", files, private=True)
        server.add_repo(
            "dataset",
            "alice/old",
            {"old.py": b"raise SystemExit"},
            revisions={script_export(): export},
        )
        server.add_repo("dataset", "alice/lost", {"lost.py": b"raise SystemExit"})
        server.add_repo("dataset", "alice/folder", audio)
        server.folder = folder
        yield server


def script_export() -> str:
    return "refs/convert/parquet"


def test_a_private_parquet_dataset_is_streamed_with_a_token(hub: HubWithClients, tmp_path: Path):
    first = len(hub.requests)
    result = run(hub, tmp_path, "hf_owner_token", dataset_name="alice/private")
    assert result.returncode == 0, result.stderr[-3000:]
    info = json.loads((tmp_path / "output" / "run_info.json").read_text())
    assert info["data"]["train"][0]["revision"] == hub.commits("dataset", "alice/private")[0].id
    assert "alice/private train (parquet, 2 files, 40 rows; audio, text)" in result.stderr
    requests = hub.requests[first:]
    assert any(request.headers.get("range") for request in requests if ".parquet" in request.path)
    assert not [r for r in requests if r.host == "storage" and "authorization" in r.headers]
    everything = b"".join(
        path.read_bytes() for path in (tmp_path / "output").rglob("*") if path.is_file()
    )
    assert (
        b"hf_owner_token" not in everything
        and "hf_owner_token" not in result.stderr + result.stdout
    )


def test_an_audio_folder_is_streamed_without_torchcodec(hub: HubWithClients, tmp_path: Path):
    result = run(hub, tmp_path, None, dataset_name="alice/folder")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "alice/folder train (audiofolder, 1 file, 4 rows; audio, transcription)" in result.stderr


def test_a_script_dataset_is_read_from_its_parquet_export(hub: HubWithClients, tmp_path: Path):
    result = run(hub, tmp_path, None, dataset_name="alice/old", dataset_config_name="spanish")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "trying its parquet export, refs/convert/parquet" in result.stderr


def test_streaming_false_downloads_first(hub: HubWithClients, tmp_path: Path):
    flags = {"dataset_name": "alice/folder", "streaming": False}
    result = run(hub, tmp_path, None, **flags, cache_dir=tmp_path / "cache")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "downloading files of alice/folder: 10" in result.stderr
    assert len(list((tmp_path / "cache").rglob("snapshots/*/train/*.flac"))) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dataset_name": "alice/private"}, "--dataset_name alice/private"),
        ({"dataset_name": "alice/nothing"}, "--dataset_name alice/nothing"),
        (
            {"dataset_name": "mozilla-foundation/common_voice_11_0"},
            "Download your language from https://mozilladatacollective.com",
        ),
        (
            {"dataset_name": "alice/lost"},
            "it has no parquet export (revision refs/convert/parquet)",
        ),
        (
            {"dataset_name": "alice/folder", "model_name_or_path": "alice/none"},
            "--model_name_or_path alice/none",
        ),
    ],
)
def test_what_is_not_there_is_one_line(
    hub: HubWithClients, tmp_path: Path, flags: dict, message: str
):
    result = run(hub, tmp_path, None, **flags)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: ") and message in result.stderr
    assert "Traceback" not in result.stderr
