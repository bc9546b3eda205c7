"""The tests' own Hub, against the real clients. Each client runs in a process of its own: see
run_client."""

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hub import Hub
from hub_clients import HubClients, HubWithClients

WRITE, READ, OTHER = "hf_owner_token", "hf_reader_token", "hf_other_token"
SIZES = {"train": 7, "test": 3}


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `speech` (parquet) and `model`."""
    from speech_finetuning.cli.demonstration import make_model, make_speech

    folder = tmp_path_factory.mktemp("synthetic")
    make_speech(folder / "speech", SIZES)
    make_model(folder / "model", d_model=16, num_layers=1)
    return folder


@pytest.fixture
def hub(hub_clients: HubClients) -> Iterator[HubWithClients]:
    with hub_clients.new_hub(part_size_in_bytes=2**20, page_size=2) as hub:
        yield hub


def run_client(
    hub: HubWithClients, folder: Path, function: str, *args: str, token: str | None = None
) -> dict:
    """The result of a function of this file, called in a process that knows no other Hub than this
    one."""
    folder.mkdir(exist_ok=True)
    program = folder / f"{function}.py"
    program.write_text(
        f"import json, sys, test_fake_hub as own; print(json.dumps(own.{function}(*sys.argv[1:])))"
    )
    code, output, log = hub.clients.run(folder, args, token=token, program=program)
    assert code == 0, log
    return json.loads(output.splitlines()[-1])


def ask(
    url: str, method: str, path: str, timeout: float = 5, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (names in lower case) and body of one plain request."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=timeout)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return (
            response.status,
            {name.lower(): value for name, value in response.getheaders()},
            response.read(),
        )
    finally:
        connection.close()


def check_storage_sees_no_token(hub: Hub) -> None:
    storage = [request for request in hub.requests if request.host == "storage"]
    assert storage
    assert not [request for request in storage if "authorization" in request.headers]


# datasets


def stream_texts(repo_id: str, split: str, **options: str) -> list[str]:
    """The texts of a streamed split, or the name and the text of the exception."""
    from datasets import Audio, load_dataset

    try:
        dataset = load_dataset(repo_id, split=split, streaming=True, **options)
        return [
            row["text"]
            for row in dataset.cast_column("audio", Audio(decode=False))
            if row["audio"]["bytes"]
        ]
    except Exception as error:
        return [type(error).__name__, str(error)]


def client_streams() -> dict:
    # A refusal must come first: what is allowed is then in the cache.
    results = {
        "private, no token": stream_texts("alice/private", "train", token=False),
        "private, other": stream_texts("alice/private", "train", token=OTHER),
        "private, reader": stream_texts("alice/private", "train", token=READ),
        "gated": stream_texts("alice/gated", "train", token=OTHER),
        "public": stream_texts("alice/public", "test", token=False),
        "script": stream_texts("alice/script", "train", token=False),
        "converted": stream_texts(
            "alice/script", "train", token=False, revision="refs/convert/parquet"
        ),
    }
    return results


@pytest.mark.slow
def test_datasets_stream(hub: Hub, synthetic: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    speech = synthetic / "speech"
    texts = {
        split: [
            text
            for path in sorted(speech.glob(f"{split}-*"))
            for text in pq.read_table(path)["text"].to_pylist()
        ]
        for split in SIZES
    }
    converted = {
        f"default/train/{i:04}.parquet": path.read_bytes()
        for i, path in enumerate(sorted(speech.glob("train*")))
    }
    hub.add_repo("dataset", "alice/private", speech, private=True)
    hub.add_repo("dataset", "alice/gated", speech, gated=True)
    hub.add_repo("dataset", "alice/public", speech)
    hub.add_repo(
        "dataset",
        "alice/script",
        {"script.py": b"1/0"},
        revisions={"refs/convert/parquet": converted},
    )
    results = run_client(hub, tmp_path, "client_streams")

    assert results["private, no token"][0] == results["private, other"][0] == "DatasetNotFoundError"
    assert results["gated"][0] == "DatasetNotFoundError" and "gated" in results["gated"][1]
    assert results["private, reader"] == results["converted"] == texts["train"]
    assert results["public"] == texts["test"]
    assert results["script"] == [
        "RuntimeError",
        "Dataset scripts are no longer supported, but found script.py",
    ]
    ranges = [
        request
        for request in hub.requests
        if "range" in request.headers and request.host == "storage"
    ]
    assert ranges and {request.status for request in ranges} == {206}
    assert any("/tree/" in request.path and "cursor=" in request.path for request in hub.requests)
    check_storage_sees_no_token(hub)


# huggingface_hub


def catch_status(function: object, *args: object, **options: object) -> int | None:
    """The status of the error that a call of huggingface_hub raises."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        function(*args, **options)
    except HfHubHTTPError as error:
        return error.response.status_code
    return None


def client_uploads(folder: str, download: str) -> dict:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.repocard import ModelCard

    api, reader = HfApi(), HfApi(token=READ)
    results = {"name": api.whoami()["name"], "role": reader.whoami()["auth"]["accessToken"]["role"]}
    results["url"] = api.create_repo("alice/new", private=True)
    results["created twice"] = [
        catch_status(api.create_repo, "alice/new"),
        api.create_repo("alice/new", exist_ok=True),
    ]
    results["created elsewhere"] = catch_status(api.create_repo, "bob/new")
    results["created by a reader"] = catch_status(reader.create_repo, "alice/newer")
    results["commit"] = api.upload_folder(repo_id="alice/new", folder_path=folder).oid
    results["unchanged"] = api.upload_folder(repo_id="alice/new", folder_path=folder).oid
    results["reader"] = catch_status(
        reader.upload_file, path_or_fileobj=b"1", path_in_repo="a", repo_id="alice/new"
    )
    ModelCard("---\nlicense: mit\n---\ncard").push_to_hub("alice/new")
    snapshot_download("alice/new", local_dir=download, token=READ)
    return results


def test_upload_and_download(hub: Hub, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "empty.txt": b"", "folder/basic.safetensors": b"b" * 2**19}
    files["folder/deep/parts.bin"] = bytes(range(256)) * 10240  # 2.5 parts
    for path, content in files.items():
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(content)
    args = [str(tmp_path / "folder"), str(tmp_path / "download")]
    results = run_client(hub, tmp_path / "home", "client_uploads", *args, token=WRITE)

    url = f"{hub.url}/alice/new"
    assert (results["name"], results["role"], results["url"]) == ("alice", "read", url)
    assert results["created twice"] == [409, url]
    assert (
        results["created elsewhere"] == results["created by a reader"] == results["reader"] == 403
    )
    uploaded = hub.files("model", "alice/new")
    card = uploaded.pop("README.md")
    assert b"license: mit" in card
    assert uploaded == {".gitattributes": uploaded[".gitattributes"], **files}
    commits = hub.commits("model", "alice/new")
    assert len(commits) == 3 and commits[1].id == results["commit"] == results["unchanged"]
    assert hub.repos["model", "alice/new"].private
    for path, content in {**files, "README.md": card}.items():
        assert (tmp_path / "download" / path).read_bytes() == content
    puts = [
        urlsplit(request.path).path.split("/")[3:]
        for request in hub.requests
        if request.method == "PUT"
    ]
    assert sorted(puts) == [[], ["parts", "1"], ["parts", "2"], ["parts", "3"]]
    check_storage_sees_no_token(hub)
    read_only = [
        request
        for request in hub.requests
        if request.headers.get("authorization") == f"Bearer {READ}"
    ]
    assert ("POST", 403) in {
        (request.method, request.status) for request in read_only if "preupload" in request.path
    }


def client_edits() -> dict:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import (
        EntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi()
    where = {"repo_id": "alice/data", "repo_type": "dataset"}
    first = api.dataset_info("alice/data").sha
    api.create_tag(tag="v1", **where)
    api.delete_file("a.txt", **where)
    api.delete_folder("folder", **where)
    api.create_branch(branch="odd/name", revision="v1", **where)
    on_branch = api.upload_file(
        path_or_fileobj=b"4", path_in_repo="d.txt", revision="odd/name", **where
    ).oid
    stale = [CommitOperationAdd("late.txt", b"")]
    refs = api.list_repo_refs(**where)
    return {
        "shas": [first, on_branch],
        "stale": catch_status(
            api.create_commit, operations=stale, commit_message="m", parent_commit=first, **where
        ),
        "refs": {
            ref.ref: ref.target_commit for ref in [*refs.branches, *refs.tags, *refs.converts]
        },
        "titles": [commit.title for commit in api.list_repo_commits(**where)],
        "tree": [
            [entry.path, getattr(entry, "size", None)]
            for entry in api.list_repo_tree(revision="v1", **where)
        ],
        "files": api.list_repo_files(revision="odd/name", **where),
        "info": [
            info.blob_id
            for info in api.get_paths_info(paths=["b.txt", "none"], expand=True, **where)
        ],
        "errors": [
            catch_type(RevisionNotFoundError, api.dataset_info, "alice/data", revision="none"),
            catch_type(EntryNotFoundError, api.hf_hub_download, filename="none", **where),
            catch_type(EntryNotFoundError, list, api.list_repo_tree(path_in_repo="none", **where)),
            catch_type(RepositoryNotFoundError, api.dataset_info, "alice/none"),
            catch_type(RepositoryNotFoundError, api.dataset_info, "alice/none", token=False),
        ],
    }


def catch_type(
    expected: type[Exception], function: object, *args: object, **options: object
) -> bool:
    try:
        function(*args, **options)
    except expected:
        return True
    return False


def test_branches_tags_and_deletions(hub: Hub, tmp_path: Path) -> None:
    files = {"a.txt": b"1", "b.txt": b"2", "folder/c.txt": b"3", "folder/deep/c.txt": b"3"}
    hub.add_repo("dataset", "alice/data", files)
    results = run_client(hub, tmp_path, "client_edits", token=WRITE)

    first, on_branch = results["shas"]
    head = hub.commits("dataset", "alice/data")[0]
    assert results["refs"] == {
        "refs/heads/main": head.id,
        "refs/tags/v1": first,
        "refs/heads/odd/name": on_branch,
    }
    assert results["titles"] == [commit.title for commit in hub.commits("dataset", "alice/data")]
    assert len(results["titles"]) == 3
    assert hub.files("dataset", "alice/data") == {"b.txt": b"2"}
    assert hub.files("dataset", "alice/data", "v1") == files
    assert hub.files("dataset", "alice/data", "odd/name") == {**files, "d.txt": b"4"}
    assert results["stale"] == 412
    assert results["tree"] == [["a.txt", 1], ["b.txt", 1], ["folder", None]]
    assert results["files"] == sorted([*files, "d.txt"])
    assert results["info"] == [
        "d8263ee9860594d2806b0dfd1bfd17528b0ba2a4"
    ]  # printf 2 | git hash-object --stdin
    assert results["errors"] == [True] * 5


# transformers


def client_loads_model(token: str) -> dict:
    import torch
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    refused = catch_type(OSError, WhisperProcessor.from_pretrained, "alice/tiny", token=False)
    model = WhisperForConditionalGeneration.from_pretrained("alice/tiny", token=token)
    processor = WhisperProcessor.from_pretrained("alice/tiny", token=token)
    weights = {name: float(weight.double().sum()) for name, weight in model.state_dict().items()}
    return {
        "refused": refused,
        "weights": weights,
        "ids": processor.tokenizer("uno dos").input_ids,
        "t": torch.__version__,
    }


@pytest.mark.slow
def test_transformers_load(hub: Hub, synthetic: Path, tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    hub.add_repo("model", "alice/tiny", synthetic / "model", private=True)
    results = run_client(hub, tmp_path, "client_loads_model", READ)

    model = WhisperForConditionalGeneration.from_pretrained(synthetic / "model")
    assert results["refused"]
    assert results["weights"] == {
        name: float(weight.double().sum()) for name, weight in model.state_dict().items()
    }
    assert (
        results["ids"]
        == WhisperProcessor.from_pretrained(synthetic / "model").tokenizer("uno dos").input_ids
    )
    check_storage_sees_no_token(hub)


# The server alone


def test_access(hub: Hub) -> None:
    hub.add_repo("model", "alice/private", {"a.txt": b"abcdef"}, private=True)
    hub.add_repo("model", "alice/gated", {"a.txt": b"abcdef"}, gated=True)
    answers = {}
    for token in (None, "hf_wrong", OTHER, READ, WRITE):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        for name in ("private", "gated", "missing"):
            status, answer, _ = ask(hub.url, "GET", f"/alice/{name}/resolve/main/a.txt", **headers)
            answers[token, name] = (status, answer.get("x-error-code"))
    assert answers[None, "private"] == answers[None, "missing"] == (401, "RepoNotFound")
    assert answers[OTHER, "private"] == answers[OTHER, "missing"] == (404, "RepoNotFound")
    assert answers[None, "gated"] == (401, "GatedRepo") and answers[OTHER, "gated"] == (
        403,
        "GatedRepo",
    )
    assert answers["hf_wrong", "gated"] == answers["hf_wrong", "private"] == (401, None)
    assert {answers[token, name] for token in (READ, WRITE) for name in ("private", "gated")} == {
        (200, None)
    }


def test_ranges(hub: Hub) -> None:
    hub.add_repo("model", "alice/open", {"a.txt": b"abcdef"})
    path = "/alice/open/resolve/main/a.txt"
    status, headers, body = ask(hub.url, "GET", path, Range="bytes=1-3")
    assert (status, headers["content-range"], body) == (206, "bytes 1-3/6", b"bcd")
    assert ask(hub.url, "GET", path, Range="bytes=4-")[::2] == (206, b"ef")
    assert ask(hub.url, "GET", path, Range="bytes=4-100")[::2] == (206, b"ef")
    assert ask(hub.url, "GET", path, Range="bytes=6-")[0] == 416
    status, headers, body = ask(hub.url, "HEAD", path)
    assert (status, headers["content-length"], body) == (200, "6", b"")
    assert headers["x-repo-commit"] == hub.commits("model", "alice/open")[0].id


def test_large_files_are_elsewhere(hub: Hub) -> None:
    hub.add_repo("model", "alice/open", {"a.bin": b"abcdef"})
    status, headers, _ = ask(hub.url, "HEAD", "/alice/open/resolve/main/a.bin")
    sha256 = "bef57ec7f53a6d40beb640a780a639c83bc29ac8a9816f1fc6c5c6dcd93c4721"  # printf abcdef | sha256sum
    assert (status, headers["x-linked-etag"], headers["x-linked-size"]) == (302, f'"{sha256}"', "6")
    assert headers["location"] == f"{hub.storage_url}/objects/{sha256}?name=a.bin"


def test_faults(hub: Hub) -> None:
    path = "/alice/open/resolve/main/a.txt"
    hub.add_repo("model", "alice/open", {"a.txt": b"abcdef", "b.txt": b"1"})
    hub.add_fault(
        method="GET", path_contains="a.txt", status=429, times=2, headers={"Retry-After": "7"}
    )
    assert ask(hub.url, "HEAD", path)[0] == 200
    hub.add_fault(path_contains="a.txt", action="drop")
    hub.add_fault(path_contains="a.txt", action="truncate")
    hub.add_fault(path_contains="a.txt", action="trickle", seconds=0.4)
    assert ask(hub.url, "GET", path.replace("a.txt", "b.txt"))[::2] == (200, b"1")
    for _ in range(2):
        status, headers, _ = ask(hub.url, "GET", path)
        assert (status, headers["retry-after"]) == (429, "7")
    with pytest.raises(http.client.RemoteDisconnected):
        ask(hub.url, "HEAD", path)
    with pytest.raises(http.client.IncompleteRead) as truncated:
        ask(hub.url, "GET", path)
    assert truncated.value.partial == b"abc"
    start = time.monotonic()
    assert ask(hub.url, "GET", path)[::2] == (200, b"abcdef")
    assert time.monotonic() - start >= 0.1
    assert ask(hub.url, "GET", path)[::2] == (200, b"abcdef")
    faults = [request.fault for request in hub.requests]
    assert faults == [None, None, "status", "status", "drop", "truncate", "trickle", None]
    hub.add_fault(times=None)
    assert [ask(hub.url, "GET", path)[0] for _ in range(3)] == [503] * 3
    hub.remove_faults()
    assert ask(hub.url, "GET", path)[0] == 200
    with pytest.raises(ValueError, match="action"):
        hub.add_fault(action="explode")


def test_answers_that_are_not_what_was_asked_for(hub: Hub) -> None:
    path = "/alice/open/resolve/main/a.txt"
    hub.add_repo("model", "alice/open", {"a.txt": b"abcdef"})
    hub.add_fault(path_contains="a.txt", action="page")
    hub.add_fault(path_contains="a.txt", action="short", times=2)
    status, headers, body = ask(hub.url, "GET", path)
    assert (status, headers["content-type"]) == (200, "text/html") and b"<html>" in body
    assert ask(hub.url, "GET", path)[::2] == (200, b"abc")
    status, headers, body = ask(hub.url, "GET", path, Range="bytes=2-5")
    assert (status, headers["content-range"], body) == (206, "bytes 2-5/6", b"cd")
    assert headers["content-length"] == "2"
    assert ask(hub.url, "GET", path)[::2] == (200, b"abcdef")
    hub.remove_repo("model", "alice/open")
    assert ask(hub.url, "GET", path)[0] == 401


def test_hang_and_latency() -> None:
    path = "/alice/open/resolve/main/a.txt"
    with Hub(latency_in_seconds=0.2) as hub:
        hub.add_repo("model", "alice/open", {"a.txt": b"abcdef"})
        start = time.monotonic()
        assert ask(hub.url, "GET", path)[0] == 200
        assert time.monotonic() - start >= 0.2
        hub.add_fault(action="hang", seconds=0.3)
        assert ask(hub.url, "GET", path)[0] == 200
        assert time.monotonic() - start >= 0.7
        hub.add_fault(action="hang", seconds=0.3)
        with pytest.raises(TimeoutError):
            ask(hub.url, "GET", path, timeout=0.1)
        time.sleep(0.6)
        # Not even late: the client has hung up.
        assert [request.status for request in hub.requests] == [200, 200, None]
        hub.add_fault(action="hang", seconds=60)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(ask, hub.url, "GET", path, timeout=30)
            while len(hub.requests) < 4:
                time.sleep(0.01)
            start = time.monotonic()
            hub.close()
            with pytest.raises(http.client.RemoteDisconnected):
                waiting.result()
        while any("process_request" in thread.name for thread in threading.enumerate()):
            time.sleep(0.01)
    assert time.monotonic() - start < 2
    with pytest.raises(ConnectionRefusedError):
        ask(hub.url, "GET", path)


def test_crash_is_reported() -> None:
    with pytest.raises(RuntimeError, match="JSONDecodeError"), Hub() as hub:
        assert ask(hub.url, "POST", "/api/repos/create")[0] == 500


def test_serve_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdef")
    command = [
        sys.executable,
        Path(__file__).with_name("hub.py"),
        "--serve",
        f"dataset:alice/open={tmp_path}",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().split()[0].removeprefix("HF_ENDPOINT=")
        try:
            assert ask(url, "GET", "/datasets/alice/open/resolve/main/a.txt")[::2] == (
                200,
                b"abcdef",
            )
        finally:
            process.terminate()
