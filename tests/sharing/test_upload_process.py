"""The process that uploads: what it says of an upload that failed, and when it ends."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fork_server import ForkedProcess
from hub import Hub
from hub_clients import HubClients, HubWithClients

from speech_finetuning.sharing.upload_process import FAILED, PERMANENT_REFUSALS, REFUSED

pytestmark = pytest.mark.slow  # a process each
PROJECT = Path(__file__).parents[2]
REPO = "alice/whisper-tiny-es"
SECRET = "hf_owner_token"
UPLOAD_PARENT = Path(__file__).parents[1] / "support" / "upload_parent.py"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        server.add_repo("model", REPO, {"README.md": b"before"})
        yield server


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """That of a process which does not wait long between two tries."""
    folders = (PROJECT, PROJECT / "tests" / "support" / "short_sleeps")
    variables = {"PYTHONPATH": os.pathsep.join(map(str, folders)), "SLEEPS_AT_MOST": "0.1"}
    return hub.environment(tmp_path / "home", token=SECRET) | variables


def upload(hub: Hub, tmp_path: Path, snapshot: Path, *flags: str) -> subprocess.CompletedProcess:
    """The uploader's end, with a pipe as its stdin, as HubUploads gives it."""
    words = [sys.executable, "-m", "speech_finetuning.sharing.upload_process", REPO, str(snapshot)]
    process = subprocess.Popen(
        [*words, "--parent_pid", str(os.getpid()), *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(hub, tmp_path),
    )
    process.wait(60)
    stderr = process.stderr.read()
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()
    return subprocess.CompletedProcess(words, process.returncode, "", stderr)


def test_files_are_committed_to_a_repository_that_exists(hub: Hub, tmp_path: Path, snapshot: Path):
    result = upload(hub, tmp_path, snapshot)
    assert result.returncode == 0, result.stderr
    assert hub.files("model", REPO) == {"README.md": b"before", "config.json": b"{}"}


@pytest.mark.parametrize("flags", [[], ["--must_be_private"]])
def test_a_repository_that_is_gone_is_not_made_anew(
    hub: Hub, tmp_path: Path, snapshot: Path, flags: list[str]
):
    hub.remove_repo("model", REPO)
    result = upload(hub, tmp_path, snapshot, *flags)
    assert result.returncode == REFUSED
    assert result.stderr.splitlines()[-1].startswith(f"{REPO} is gone")
    assert not hub.repos and not [r for r in hub.requests if "repos/create" in r.path]


def test_nothing_private_goes_to_a_repository_that_has_become_public(
    hub: Hub, tmp_path: Path, snapshot: Path
):
    result = upload(hub, tmp_path, snapshot, "--must_be_private")
    assert result.returncode == REFUSED and "is public now" in result.stderr.splitlines()[-1]
    assert len(hub.commits("model", REPO)) == 1
    hub.repos["model", REPO].private = True
    assert upload(hub, tmp_path, snapshot, "--must_be_private").returncode == 0


@pytest.mark.parametrize("status", [*PERMANENT_REFUSALS, 409, 500])
def test_refusals_are_told_from_what_may_pass(
    hub: Hub, tmp_path: Path, snapshot: Path, status: int
):
    hub.add_fault(path_contains="/commit/", status=status, message="no more room")
    result = upload(hub, tmp_path, snapshot)
    assert result.returncode == (REFUSED if status in PERMANENT_REFUSALS else FAILED)
    reason = result.stderr.splitlines()[-1]
    assert str(status) in reason and "no more room" in reason and "Traceback" not in result.stderr


@pytest.mark.parametrize("path", ["/preupload/", "/commit/"])
def test_nonsense_is_a_failure_that_may_pass(hub: Hub, tmp_path: Path, snapshot: Path, path: str):
    hub.add_fault(path_contains=path, action="page")
    result = upload(hub, tmp_path, snapshot)
    assert result.returncode == FAILED and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1]
    assert upload(hub, tmp_path, snapshot).returncode == 0


@pytest.fixture
def trainers_hub(hub_clients: HubClients) -> Iterator[HubWithClients]:
    """A hub for trainers, which are forked."""
    with hub_clients.new_hub() as server:
        server.add_repo("model", REPO, {"README.md": b"before"})
        yield server


def start_parent(
    hub: HubWithClients, tmp_path: Path, snapshot: Path, then: str
) -> tuple[ForkedProcess, Path]:
    """A process that submits an upload, as a trainer does, and then does what `then` says. Returns
    it and the file that it writes to."""
    (tmp_path / "out").mkdir()
    output = tmp_path / "parent.log"
    process = hub.clients.forks.start(
        [REPO, snapshot, then],
        log=output,
        program=UPLOAD_PARENT,
        cwd=tmp_path,
        environment={"HF_TOKEN": SECRET},
    )
    return process, output


def uploaders(folder: Path) -> list[int]:
    """Processes that upload out of the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
            is_here = Path(os.path.realpath(path.parent / "cwd")) == folder.resolve()
        except OSError:
            continue
        if is_here and "speech_finetuning.sharing.upload_process" in words:
            found.append(int(path.parent.name))
    return found


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def is_committing(hub: Hub) -> bool:
    return any("/commit/" in request.path for request in hub.requests)


@pytest.mark.parametrize("then", ["wait", "fork and wait"])
def test_the_upload_ends_with_a_trainer_that_is_killed(
    trainers_hub: HubWithClients, tmp_path: Path, snapshot: Path, then: str
):
    """Also if a worker, which is forked while the upload runs, holds the pipe open."""
    hub = trainers_hub
    hub.add_fault(path_contains="/commit/", action="hang", seconds=600, times=None)
    parent, _ = start_parent(hub, tmp_path, snapshot, then)
    wait_for(lambda: is_committing(hub))
    assert len(uploaders(tmp_path)) == 1
    parent.send_signal(signal.SIGKILL)
    assert parent.wait(10) == -signal.SIGKILL
    wait_for(lambda: not uploaders(tmp_path), seconds=3)


def test_without_the_kernels_help_the_pipe_ends_the_upload(
    hub: Hub, tmp_path: Path, snapshot: Path
):
    """As on macOS: the uploader believes that it runs there."""
    hub.add_fault(path_contains="/commit/", action="hang", seconds=600, times=None)
    code = (
        "import sys; from speech_finetuning.sharing import upload_process; sys.platform = 'darwin'; "
        "sys.exit(upload_process.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, REPO, str(snapshot), "--parent_pid", str(os.getpid())],
        stdin=subprocess.PIPE,
        env=environment(hub, tmp_path),
    )
    wait_for(lambda: is_committing(hub))
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(5) == FAILED


def test_a_terminals_interrupt_does_not_reach_the_upload(
    trainers_hub: HubWithClients, tmp_path: Path, snapshot: Path
):
    hub = trainers_hub
    hub.add_fault(path_contains="/commit/", action="hang", seconds=600)
    parent, _ = start_parent(hub, tmp_path, snapshot, "wait")
    wait_for(lambda: is_committing(hub))
    (uploader,) = uploaders(tmp_path)
    assert os.getsid(uploader) != os.getsid(parent.pid)
    assert interrupt(parent) != 0
    wait_for(lambda: not uploaders(tmp_path), seconds=3)


def interrupt(parent: ForkedProcess) -> int:
    """Ctrl-C, again if it came at a moment in which Python drops it, such as within a callback.
    Returns the exit code."""
    for _ in range(2):
        parent.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return parent.wait(20)
    parent.send_signal(signal.SIGINT)
    return parent.wait(20)


def finish(hub: HubWithClients, tmp_path: Path, snapshot: Path) -> str:
    """What a trainer says that waits for its upload."""
    parent, output = start_parent(hub, tmp_path, snapshot, "finish")
    assert parent.wait(120) == 0, output.read_text()
    return output.read_text()


@pytest.mark.parametrize("status", PERMANENT_REFUSALS)
def test_a_lasting_refusal_is_given_up_after_three_tries(
    trainers_hub: HubWithClients, tmp_path: Path, snapshot: Path, status: int
):
    """Although a lost network would be waited for ten minutes."""
    hub = trainers_hub
    hub.add_fault(path_contains="/commit/", status=status, times=None)
    output = finish(hub, tmp_path, snapshot)
    assert output.splitlines()[-1].startswith("76 trained and saved, but not uploaded (")
    assert len([r for r in hub.requests if "/commit/" in r.path]) == 3
    assert f"Finish with: hf upload {REPO} out/_upload/next . --private" in output


def test_refusals_that_pass_are_not_given_up(
    trainers_hub: HubWithClients, tmp_path: Path, snapshot: Path
):
    hub = trainers_hub
    for status in (403, 403, 500, 403, 403):
        hub.add_fault(path_contains="/commit/", status=status)
    output = finish(hub, tmp_path, snapshot)
    assert output.splitlines()[-1] == "done", output
    assert not (tmp_path / "out" / "_upload").exists()  # nor its log
    assert json.loads(hub.files("model", REPO)["config.json"]) == {}


def test_the_reason_of_a_failure_is_one_clean_line(
    trainers_hub: HubWithClients, tmp_path: Path, snapshot: Path
):
    words = "disk \x1b[31mquota\x1b[0m exceeded,\n\rplease\x07 " + "remove something, " * 40
    trainers_hub.add_fault(path_contains="/commit/", status=507, message=words, times=None)
    output = finish(trainers_hub, tmp_path, snapshot)
    last = output.splitlines()[-1]
    reason = last.removeprefix("76 trained and saved, but not uploaded (").partition(" Finish")[0]
    assert "disk quota exceeded, please" in reason and reason.endswith("something, ...).")
    assert reason.isprintable() and len(reason) < 310 and not reason.startswith((" ", "."))
    assert "Traceback" not in output and "it/s" not in output
