"""Rows of a Hub that misbehaves, or that holds what a stranger wrote: real HTTP, real clients."""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import Hub
from hub_clients import HubClients
from rows import make_clip

from speech_finetuning.cli import demonstration

pytestmark = pytest.mark.slow  # a process each
PRINT_ROWS = Path(__file__).parents[1] / "support" / "print_rows.py"
CLIP = make_clip(0.5)
Read = Callable[..., "Answer"]


@dataclass
class Answer:
    code: int
    rows: list[dict]
    revision: str | None
    log: str

    def reasons(self) -> list[str | None]:
        return [row["reason"] for row in self.rows]


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubClients]:
    home = tmp_path_factory.mktemp("home")
    with HubClients(home, HF_HUB_DOWNLOAD_TIMEOUT="2") as clients:
        yield clients


@pytest.fixture
def hub(clients: HubClients) -> Iterator[Hub]:
    with clients.new_hub() as server:
        yield server


@pytest.fixture
def read(clients: HubClients, tmp_path: Path) -> Callable[..., Answer]:
    """read(name, **options): what a process reads of a data set on the hub."""
    return functools.partial(read_rows, clients, tmp_path)


def read_rows(clients: HubClients, folder: Path, name: str, **options: object) -> Answer:
    words = [f"{field}={json.dumps(value)}" for field, value in options.items()]
    code, output, log = clients.run(folder, [name, *words], program=PRINT_ROWS)
    assert "Traceback" not in log, log[-3000:]
    first, *rows = [json.loads(line) for line in output.splitlines()] or [{"revision": None}]
    return Answer(code, rows, first["revision"], log)


def parquet(cells: list, **more: list) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"audio": cells, "text": ["uno"] * len(cells), **more}), sink)
    return sink.getvalue().to_pybytes()


def speech_files(folder: Path) -> dict[str, bytes]:
    demonstration.make_speech(folder, {"train": 40})
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def audio_folder() -> dict[str, bytes]:
    files = {f"train/{i}.flac": make_clip(0.3 + i / 10, "FLAC") for i in range(4)}
    lines = [f"{i}.flac,uno" for i in range(4)]
    files["train/metadata.csv"] = "\n".join(["file_name,text", *lines]).encode()
    return files


# ---- a Hub that misbehaves ----
@pytest.mark.parametrize("action", ["page", "short", "truncate"])
@pytest.mark.parametrize("kind", ["parquet", "audiofolder"])
def test_an_answer_that_is_not_what_was_asked_for_costs_no_row(
    hub: Hub, tmp_path: Path, read: Read, action: str, kind: str
):
    files = speech_files(tmp_path / "made") if kind == "parquet" else audio_folder()
    hub.add_repo("dataset", "alice/speech", files)
    whole = read("alice/speech")
    assert whole.code == 0 and not any(whole.reasons())
    contains = "?name=train-00001" if kind == "parquet" else "?name=train"
    hub.add_fault(method="GET", path_contains=contains, action=action, times=3)
    hub.add_fault(method="GET", path_contains="/api/", action="page", times=1)
    disturbed = read("alice/speech")
    assert disturbed.rows == whole.rows, disturbed.log[-2000:]


@pytest.mark.parametrize("action", ["page", "short", "truncate"])
@pytest.mark.parametrize("kind", ["parquet", "audiofolder"])
def test_nor_does_it_when_all_is_downloaded_first(
    hub: Hub, tmp_path: Path, read: Read, action: str, kind: str
):
    """--streaming False."""
    files = speech_files(tmp_path / "made") if kind == "parquet" else audio_folder()
    hub.add_repo("dataset", "alice/speech", files)
    hub.add_fault(method="GET", path_contains="?name=train", action=action, times=3)
    answer = read("alice/speech", streaming=False)
    assert answer.code == 0 and not any(answer.reasons()), answer.log[-2000:]
    assert len(answer.rows) == (40 if kind == "parquet" else 4)
    assert not [fault for fault in hub.faults if fault.times]  # all of them came


@pytest.mark.parametrize("streaming", [True, False])
def test_pages_for_ever_end_with_75_and_a_line_while_waiting(
    hub: Hub, tmp_path: Path, read: Read, streaming: bool
):
    hub.add_repo("dataset", "alice/speech", speech_files(tmp_path / "made"))
    hub.add_fault(method="GET", path_contains="?name=train", action="page", times=None)
    answer = read("alice/speech", limit_in_seconds=0.5, streaming=streaming)
    assert answer.code == 75 and "answered with a web page" in answer.log
    assert "Trying again in" in answer.log


@pytest.mark.parametrize("path", ["/revision/", "/tree/", "README.md"])
def test_a_silent_server_ends_with_75_and_a_line_while_waiting(
    hub: Hub, tmp_path: Path, read: Read, path: str
):
    hub.add_repo("dataset", "alice/speech", speech_files(tmp_path / "made"))
    hub.add_fault(path_contains=path, action="hang", times=None, seconds=600)
    answer = read("alice/speech", limit_in_seconds=0.1)
    assert answer.code == 75, answer.log[-2000:]
    assert "Trying again in" in answer.log


def test_a_file_that_is_damaged_on_the_hub_is_read_twice(hub: Hub, tmp_path: Path, read: Read):
    files = speech_files(tmp_path / "made")
    name = sorted(files)[1]
    files[name] = files[name][:200] + bytes(len(files[name]) // 2) + files[name][-8:]
    hub.add_repo("dataset", "alice/speech", files)
    answer = read("alice/speech")
    assert answer.code == 0
    assert answer.reasons().count("file_damaged") == 1
    assert answer.reasons().count(None) == 20
    assert "Reading it once more" in answer.log


def test_neighbours_in_parquet_share_windows_on_the_hub(hub: Hub, tmp_path: Path, read: Read):
    """Their recordings lie beside the file, or in its rows."""
    seconds = [float(second) for second in range(6)]
    times = {"start": seconds, "end": [second + 0.9 for second in seconds]}
    clip = make_clip(6.0)
    limits = {"seconds": 3.5, "num_tokens": 60}
    for name, cells in {
        "paths": ["talk.wav"] * 6,
        "bytes": [{"bytes": clip, "path": "/home/alice/talk.wav"}] * 6,
    }.items():
        files = {"talk.wav": clip, "train.parquet": parquet(cells, **times)}
        hub.add_repo("dataset", f"alice/{name}", files)
        hub.add_fault(method="GET", path_contains="train.parquet", action="short", times=1)
        answer = read(f"alice/{name}", window_limits=limits)
        assert answer.reasons() == [None] * 2, answer.log[-3000:]
        assert [row["text"] for row in answer.rows] == ["uno uno uno"] * 2
        assert "6 utterances in 2 rows" in answer.log


# ---- what a stranger wrote ----
@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A clip of the user that is nobody else's business."""
    path = tmp_path / "secret.wav"
    path.write_bytes(CLIP)
    return path


def paths_outside(secret: Path) -> list[str]:
    other = "hf://datasets/bob/private/a.wav"
    return [
        str(secret),
        f"file://{secret}",
        f"file:{secret}",
        f"local://{secret}",
        f"../../../../../../../../..{secret}",
        f"..%2f..{secret}",
        "/dev/zero",
        "/",
        other,
        f"simplecache::file://{secret}",
        f"zip://a.wav::file://{secret}.zip",
        "hf://datasets/alice/speech@ROOT/../../../../bob/private/a.wav",
        "https://example.org/a.wav",
        "C:\\Users\\alice\\a.wav",
        "memory://a.wav",
    ]


@pytest.mark.parametrize("kind", ["parquet", "struct", "csv", "json", "jsonl"])
def test_a_data_set_from_the_hub_reads_only_itself(
    hub: Hub, tmp_path: Path, read: Read, secret: Path, kind: str
):
    paths = ["clips/own.wav", *paths_outside(secret)]
    files = {"clips/own.wav": CLIP}
    if kind == "csv":
        lines = ["path,text", *(f"{path},uno" for path in paths)]
        files["train.csv"] = "\n".join(lines).encode()
    elif kind in ("json", "jsonl"):
        rows = [{"path": path, "text": "uno"} for path in paths]
        as_lines = "\n".join(map(json.dumps, rows))
        files[f"train.{kind}"] = (as_lines if kind == "jsonl" else json.dumps(rows)).encode()
    elif kind == "struct":
        files["train.parquet"] = parquet([{"bytes": None, "path": path} for path in paths])
    else:
        files["train.parquet"] = parquet(paths)
    hub.add_repo("dataset", "alice/speech", files)
    hub.add_repo("dataset", "bob/private", {"a.wav": CLIP}, private=True)
    answer = read("alice/speech")
    assert answer.code == 0, answer.log[-3000:]
    own, *others = answer.rows
    assert own["reason"] is None and own["audio"] is not None
    assert {row["reason"] for row in others} <= {"audio_outside_dataset", "audio_missing"}
    outside = [row["detail"] for row in others if row["reason"] == "audio_outside_dataset"]
    assert len(outside) >= len(others) - 2  # file:PATH and C:\\PATH may be relative, and missing
    assert any(str(secret) in detail for detail in outside)
    assert any("--allow_audio_urls" in detail for detail in outside)


def test_addresses_are_read_if_the_user_allows_it(hub: Hub, tmp_path: Path, read: Read):
    hub.add_repo("dataset", "bob/public", {"a.wav": CLIP})
    address = f"{hub.url}/datasets/bob/public/resolve/main/a.wav"
    hub.add_repo("dataset", "alice/speech", {"train.parquet": parquet([address, "/etc/passwd"])})
    answer = read("alice/speech", allow_audio_urls=True)
    assert answer.reasons() == [None, "audio_outside_dataset"]


def test_a_downloaded_data_set_reads_only_itself(
    hub: Hub, tmp_path: Path, read: Read, secret: Path
):
    files = audio_folder()
    hub.add_repo("dataset", "alice/speech", files)
    hub.add_repo("dataset", "alice/paths", {"train.parquet": parquet([str(secret), "/dev/zero"])})
    assert read("alice/speech", streaming=False).reasons() == [None] * 4
    answer = read("alice/paths", streaming=False)
    assert answer.reasons() == ["audio_outside_dataset"] * 2


def test_an_audio_folder_with_a_way_out_is_one_line(
    hub: Hub, tmp_path: Path, read: Read, secret: Path
):
    files = {"train/0.wav": CLIP}
    files["train/metadata.csv"] = f"file_name,text\n../../..{secret},uno\n0.wav,dos\n".encode()
    hub.add_repo("dataset", "alice/speech", files)
    answer = read("alice/speech")
    assert answer.reasons() == ["audio_outside_dataset", None]


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        (
            '{"path": "a.wav", "text": ["uno"]}\n{"path": "a.wav", "text": "dos"}',
            ["row_unreadable", None],
        ),
        ('[{"path": "a.wav", "text": true}, {"path": 3, "text": "dos"}]', ["row_unreadable"] * 2),
        ('{"path": "a.wav", "text": "uno"}\n{"path": "a.w', [None, "row_unreadable"]),
        ('{"path": "a.wav", "text": "se\xf1al"}', "line 1: is not UTF-8"),
        ('[{"path": "a.wav", "te', "no JSON"),
        ("", "the split is empty"),
    ],
)
def test_json_on_the_hub_is_read_by_our_own_rules(
    hub: Hub, read: Read, text: str, outcome: list[str | None] | str
):
    hub.add_repo("dataset", "alice/speech", {"a.wav": CLIP, "train.json": text.encode("latin-1")})
    answer = read("alice/speech")
    if isinstance(outcome, str):
        assert answer.code == 2 and outcome in answer.log, answer.log[-2000:]
    else:
        assert answer.reasons() == outcome, answer.log[-2000:]


# ---- revisions ----
def test_a_run_goes_on_with_the_revision_that_it_began_with(hub: Hub, tmp_path: Path, read: Read):
    files = speech_files(tmp_path / "made")
    hub.add_repo("dataset", "alice/speech", files)
    first = read("alice/speech")
    again = read("alice/speech", revision=first.revision)
    assert again.rows == first.rows and "has changed on the Hub" not in again.log
    hub.add_commit(
        "dataset",
        "alice/speech",
        {"train-00000-of-00002.parquet": parquet([{"bytes": CLIP, "path": "new.wav"}])},
    )
    moved = read("alice/speech", revision=first.revision)
    assert moved.rows == first.rows and moved.revision == first.revision
    assert "has changed on the Hub since this run began" in moved.log
    assert read("alice/speech").rows != first.rows


def test_a_revision_that_is_gone_says_what_to_do(hub: Hub, tmp_path: Path, read: Read):
    hub.add_repo("dataset", "alice/speech", speech_files(tmp_path / "made"))
    answer = read("alice/speech", revision="0" * 40)
    assert answer.code == 2 and "--output_dir of its own" in answer.log
