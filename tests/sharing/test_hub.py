"""What the Hub is asked before training: a server that is silent or says nonsense, repositories
that are public, and the checkpoint that another machine continues from."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_clients import HubClients, HubWithClients

pytestmark = pytest.mark.slow  # a process each
REPO = "alice/whisper-tiny-es"
ASK_HUB = Path(__file__).parents[1] / "support" / "ask_hub.py"


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubClients]:
    """Of files: 10 seconds for each of six tries."""
    time_outs = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    with HubClients(tmp_path_factory.mktemp("home"), **time_outs) as clients:
        yield clients


@pytest.fixture
def hub(clients: HubClients) -> Iterator[HubWithClients]:
    with clients.new_hub() as server:
        yield server


def ask(hub: HubWithClients, tmp_path: Path, limit_in_seconds: float, *words: object) -> list[str]:
    """The lines of a process that calls a function of sharing.hub as the script does."""
    arguments = [str(word) for word in (limit_in_seconds, *words)]
    code, output, log = hub.clients.run(tmp_path, arguments, program=ASK_HUB)
    assert code == 0 and "Traceback" not in log, log
    return (log + output).splitlines()


def checkpoint_files(step: int, best: str | None = None) -> dict[str, bytes]:
    """A checkpoint that looks complete, on the Hub."""
    import io
    import zipfile

    import torch
    from safetensors.torch import save

    archive = io.BytesIO()
    zipfile.ZipFile(archive, "w").close()
    state = {"global_step": step, "best_model_checkpoint": best, "best_metric": 1.0}
    files = {
        "model.safetensors": save({"weight": torch.zeros(step)}),
        "trainer_state.json": json.dumps(state | {"best_global_step": 4}).encode(),
        "stream_state.json": b"{}",
        "optimizer.pt": archive.getvalue(),
        "scheduler.pt": archive.getvalue(),
        "rng_state.pth": b"random",
    }
    return {f"last-checkpoint/{name}": data for name, data in files.items()}


# What is asked, and for how long its silence is waited out: not at all where huggingface_hub itself
# tries six times.
SILENT = {
    "repos/create": (0.5, ["claim_repository", REPO, None]),
    "/preupload/": (0, ["claim_repository", REPO, None]),
    "/whoami": (0.5, ["claim_repository", REPO, None]),
    f"/api/models/{REPO}": (0.5, ["download_checkpoint", REPO, "out"]),
    "/tree/": (0, ["download_checkpoint", REPO, "out"]),
    "/resolve/": (0, ["download_checkpoint", REPO, "out"]),
}


@pytest.mark.parametrize("path", SILENT)
def test_a_server_that_says_nothing_is_given_up(hub: HubWithClients, tmp_path: Path, path: str):
    hub.add_repo("model", REPO, checkpoint_files(6), private=True)
    hub.add_fault(path_contains=path, action="hang", seconds=600, times=None)
    began = time.monotonic()
    limit_in_seconds, words = SILENT[path]
    lines = ask(hub, tmp_path, limit_in_seconds, *words)
    assert lines[-1].startswith("75 asking the Hub: no network for"), lines
    assert [line for line in lines[:-1] if "Trying again in" in line or "Retrying in" in line]
    assert time.monotonic() - began < 80


@pytest.mark.parametrize("page", ["page", "truncate"])
def test_nonsense_is_waited_out(hub: HubWithClients, tmp_path: Path, page: str):
    for path in ("repos/create", "/preupload/", "/whoami", f"/api/models/{REPO}"):
        hub.add_fault(path_contains=path, action=page)
    lines = ask(hub, tmp_path, 30, "claim_repository", REPO, True)
    assert lines[-1] == f"result: {REPO}", lines
    assert not [fault for fault in hub.faults if fault.times]
    assert hub.repos["model", REPO].private


def test_nonsense_for_ever_is_given_up(hub: HubWithClients, tmp_path: Path):
    hub.add_fault(path_contains="/whoami", action="page", times=None)
    lines = ask(hub, tmp_path, 2, "claim_repository", REPO, None)
    assert lines[-1].startswith("75 asking the Hub: no network") and "a web page" in lines[-1]


def test_a_public_repository_is_refused_when_a_private_one_is_asked_for(
    hub: HubWithClients, tmp_path: Path
):
    hub.add_repo("model", REPO, {"README.md": b"mine"})
    lines = ask(hub, tmp_path, 2, "claim_repository", REPO, True)
    assert lines[-1].startswith(f"2 --hub_private_repo: {REPO} exists and is public.")
    assert ask(hub, tmp_path, 2, "claim_repository", REPO, None)[-1] == f"result: {REPO}"


@pytest.mark.parametrize("status", [402, 403, 413, 507])
def test_a_refusal_is_not_waited_out(hub: HubWithClients, tmp_path: Path, status: int):
    hub.add_fault(path_contains="/preupload/", status=status, times=None, message="storage is full")
    lines = ask(hub, tmp_path, 60, "claim_repository", REPO, None)
    assert lines[-1].startswith(f"2 --push_to_hub to {REPO}: ") and "storage is full" in lines[-1]
    tries = [line for line in lines if "Trying again" in line]
    assert len(tries) == (1 if status == 403 else 0)  # an address may have expired: asked anew once


def test_a_checkpoint_is_fetched_through_faults(hub: HubWithClients, tmp_path: Path):
    hub.add_repo("model", REPO, checkpoint_files(6, best="checkpoint-6"))
    hub.add_fault(path_contains=f"/api/models/{REPO}", action="page")
    hub.add_fault(path_contains="/tree/", action="page")
    hub.add_fault(method="HEAD", path_contains="optimizer.pt", action="page")
    hub.add_fault(method="GET", path_contains="rng_state.pth", action="short")
    lines = ask(hub, tmp_path, 60, "download_checkpoint", REPO, "out")
    assert lines[-1] == "result: None", lines
    assert "hub: fetching alice/whisper-tiny-es/last-checkpoint: 6 files, 0.00 GB" in lines
    assert not [fault for fault in hub.faults if fault.times]
    folder = tmp_path / "out" / "checkpoint-6"
    expected = checkpoint_files(6)
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth"):
        assert (folder / name).read_bytes() == expected[f"last-checkpoint/{name}"]
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == "out/checkpoint-6" and state["best_metric"] == 1.0
    assert os.listdir(tmp_path / "out") == ["checkpoint-6"]


def test_the_best_checkpoint_that_stayed_elsewhere_is_forgotten(
    hub: HubWithClients, tmp_path: Path
):
    hub.add_repo("model", REPO, checkpoint_files(6, best="checkpoint-4"))
    assert ask(hub, tmp_path, 9, "download_checkpoint", REPO, "out")[-1] == "result: None"
    state = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    assert [state[f"best_{name}"] for name in ("model_checkpoint", "metric", "global_step")] == (
        [None] * 3
    )


def test_a_repository_without_a_model_is_where_a_run_begins(hub: HubWithClients, tmp_path: Path):
    hub.add_repo("model", REPO, {"README.md": b"mine", "runs/events": b"curves"})
    lines = ask(hub, tmp_path, 9, "download_checkpoint", REPO, "out")
    assert lines[-1] == "result: None", lines
    assert f"hub: {REPO} has no checkpoint yet: the run begins." in "".join(lines)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "files", [{"model.safetensors": b"a"}, {"last-checkpoint/model.safetensors": b"half"}]
)
def test_a_checkpoint_that_is_not_there_is_one_line(
    hub: HubWithClients, tmp_path: Path, files: dict
):
    hub.add_repo("model", REPO, {"README.md": b"mine", **files})
    lines = ask(hub, tmp_path, 9, "download_checkpoint", REPO, "out")
    assert lines[-1].startswith(f"2 --resume_from_checkpoint hub: {REPO} has no complete last-")


def test_a_silent_hub_ends_the_script_with_75(
    hub: HubWithClients, tmp_path: Path, tiny_model: Path, speech: Path
):
    """That every request has a time-out is the script's own first step."""
    hub.add_fault(path_contains="repos/create", action="hang", seconds=600, times=None)
    values = {
        "model_name_or_path": tiny_model,
        "dataset_name": speech,
        "language": "es",
        "max_steps": 1,
        "output_dir": "out",
        "hub_model_id": REPO,
        "max_network_wait_in_minutes": 0.02,
    }
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    code, _, log = hub.clients.run(tmp_path, ["--do_train", "--push_to_hub", *flags])
    assert code == 75, log[-2000:]
    assert f"hub: asking for {REPO}" in log and "Trying again in" in log
    assert log.splitlines()[-1].startswith("error: asking the Hub: no network")
