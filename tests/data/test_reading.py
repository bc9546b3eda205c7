"""read_audio, read_patiently: bounded, of regular files only, and not waiting for the dead."""

import http.server
import os
import socket
import threading
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from speech_finetuning.base import network
from speech_finetuning.base.errors import RunEnded
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.cli import demonstration
from speech_finetuning.data import reading
from speech_finetuning.data.preprocessing import Preprocessor
from speech_finetuning.data.reading import KnownHosts, read_audio, read_patiently
from speech_finetuning.data.shards import SourceRow

CLIP = b"fLaC" + bytes(1000)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CLIP under any path but those that name something else: /403, /short, /page ..."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.strip("/")
        requests: list[str] = self.server.requests  # type: ignore[attr-defined]
        requests.append(name)
        if name.isdigit():
            self.answer(int(name), b"")
        elif name.startswith("once-") and requests.count(name) <= 2:  # HEAD, and fsspec's GET
            self.answer(int(name.removeprefix("once-")), b"")
        elif name == "page":
            self.answer(200, b"<!doctype html><title>Log in</title>")
        elif name == "short":
            self.answer(200, CLIP[:500], announced=len(CLIP))
        else:
            self.answer(200, CLIP)

    def answer(self, status: int, body: bytes, announced: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        self.close_connection = True


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(server: http.server.ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Online, with no host known and the Hub out of reach; seconds in place of sleeping."""
    seconds: list[float] = []
    monkeypatch.setattr(network, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network.time, "sleep", seconds.append)
    monkeypatch.setattr(reading, "KNOWN_HOSTS", KnownHosts())
    monkeypatch.setattr(reading, "is_hub_reachable", lambda: False)
    return seconds


def dead_address() -> str:
    """Of a port where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/a.wav"


def rejection_of(path: str, limit_in_seconds: float = 600) -> Rejection:
    with pytest.raises(Rejection) as caught:
        read_patiently(path, limit_in_seconds)
    return caught.value


# ---- local files -------------------------------------------------------------------------------


def test_a_local_file_is_read_by_any_of_its_names(tmp_path: Path):
    path = tmp_path / "a clip::%20#?.flac"
    path.write_bytes(CLIP)
    for name in (str(path), f"file://{path}", f"local://{path}"):
        assert read_audio(name) == read_audio({"path": name, "bytes": None}) == CLIP
    assert read_audio({"path": "elsewhere.wav", "bytes": CLIP}) == CLIP
    (tmp_path / "link.flac").symlink_to(path)
    assert read_audio(str(tmp_path / "link.flac")) == CLIP


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_is_found_in_either_spelling_of_its_letters(tmp_path: Path, form: str):
    """A zip from a Mac has decomposed names, its list composed ones."""
    name = "canción/año.flac"
    place = tmp_path / unicodedata.normalize(form, name)
    place.parent.mkdir()
    place.write_bytes(CLIP)
    for other in ("NFC", "NFD"):
        assert read_audio(str(tmp_path / unicodedata.normalize(other, name))) == CLIP
    with pytest.raises(Rejection, match="audio_missing"):
        read_audio(str(tmp_path / "canción/otro año.flac"))


def test_nothing_but_regular_files_is_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "link.wav").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        cases = {
            "/dev/zero": "a device",
            "file:///dev/zero": "a device",
            str(tmp_path / "link.wav"): "a device",
            str(tmp_path): "a folder",
            str(tmp_path / "pipe.wav"): "a pipe",
            str(tmp_path / "s"): "a socket",
        }
        began = time.monotonic()
        for path, kind in cases.items():
            rejection = rejection_of(path)
            assert rejection.reason == "audio_unreadable"
            assert f"{kind}, not a file" in rejection.detail
        assert time.monotonic() - began < 5


def test_what_a_file_system_says_of_a_row_is_a_rejection(tmp_path: Path):
    (tmp_path / "a.wav").write_bytes(CLIP)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    cases = {
        str(tmp_path / "b.wav"): ("audio_missing", "b.wav"),
        str(tmp_path / "a.wav" / "b.wav"): ("audio_missing", "b.wav"),
        "x" * 300: ("audio_unreadable", "File name too long"),
        "a\0b.wav": ("audio_unreadable", "ValueError: embedded null byte"),
        str(tmp_path / "loop"): ("audio_unreadable", "Too many levels of symbolic links"),
        "": ("audio_empty", "no bytes"),
    }
    for path, (reason, detail) in cases.items():
        rejection = rejection_of(path)
        assert rejection.reason == reason
        assert detail in rejection.detail
    (tmp_path / "empty.wav").touch()
    assert rejection_of(str(tmp_path / "empty.wav")).reason == "audio_empty"


def test_a_file_that_may_not_be_read_is_a_rejection(tmp_path: Path, monkeypatch):
    def refuse(*arguments: object, **settings: object) -> None:
        raise PermissionError(13, "Permission denied", "a.wav")

    (tmp_path / "a.wav").write_bytes(CLIP)
    monkeypatch.setattr("builtins.open", refuse)
    rejection = rejection_of(str(tmp_path / "a.wav"))
    monkeypatch.undo()
    assert rejection.detail == "PermissionError: [Errno 13] Permission denied: 'a.wav'."


def test_files_are_read_up_to_a_size(tmp_path: Path):
    path = tmp_path / "sparse.wav"
    with open(path, "wb") as file:
        file.truncate(reading.MAX_FILE_IN_BYTES + 1)
    rejection = rejection_of(str(path))
    assert rejection.reason == "audio_too_large"
    assert str(reading.MAX_FILE_IN_BYTES) in rejection.detail


def test_unknown_protocols_are_rejections():
    for path in ("foo://x", "nothing://a/b.wav", "gopher://x/y"):
        assert rejection_of(path).reason == "audio_unreadable"
        assert "Protocol not known" in rejection_of(path).detail
    assert rejection_of("memory://nothing.wav").reason == "audio_missing"


def test_one_odd_row_never_ends_the_preprocessor(preprocessor: Preprocessor, tmp_path: Path):
    for path in (str(tmp_path), "foo://x", "/dev/zero", "\0", "http://[", "http://x:port/"):
        row = SourceRow(id=f"row {path}", audio=path, text="uno")
        rejection = preprocessor(row)
        assert isinstance(rejection, Rejection)
        assert rejection.row == f"row {path}"


# ---- addresses ---------------------------------------------------------------------------------


def test_addresses_are_read_whole(url: str, pauses: list[float]):
    assert read_patiently(f"{url}/a.flac", 600) == CLIP
    assert pauses == []


def test_addresses_are_read_up_to_a_size(url: str, pauses: list, monkeypatch):
    monkeypatch.setattr(reading, "MAX_FILE_IN_BYTES", len(CLIP) - 1)
    assert rejection_of(f"{url}/a.flac").reason == "audio_too_large"


class Endless:
    """A file of unknown size."""

    def read(self, size: int) -> bytes:
        return bytes(size)


def test_a_file_of_unknown_size_is_read_up_to_a_bound(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "MAX_FILE_IN_BYTES", 5 * 2**20)
    with pytest.raises(Rejection, match="audio_too_large"):
        reading.read_to_the_end(Endless(), "https://x")


@pytest.mark.parametrize("status", [400, 401, 404, 410, 451])
def test_a_refused_address_is_a_rejection_at_once(url: str, pauses: list, status: int):
    rejection = rejection_of(f"{url}/{status}")
    assert rejection.reason == "audio_missing"
    assert f"{url}/{status}" in rejection.detail
    assert pauses == []


def test_a_403_is_asked_for_anew_once(url: str, pauses: list[float]):
    assert rejection_of(f"{url}/403").reason == "audio_missing"
    assert pauses == [1.0]
    assert read_patiently(f"{url}/once-403", 600) == CLIP


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_server_in_trouble_is_waited_for(url: str, pauses: list[float], status: int):
    assert read_patiently(f"{url}/once-{status}", 600) == CLIP
    assert pauses == [1.0]


def test_a_web_page_is_asked_for_anew_and_then_rejected(url: str, pauses: list[float]):
    rejection = rejection_of(f"{url}/page")
    assert rejection.reason == "audio_unreadable"
    assert "a web page" in rejection.detail
    assert pauses == [1.0]


@pytest.mark.parametrize("name", ["short", "500"])
def test_an_address_that_never_works_is_rejected_once_others_do(
    url: str, pauses: list[float], name: str
):
    assert read_patiently(f"{url}/a.flac", 600) == CLIP
    rejection = rejection_of(f"{url}/{name}")
    assert rejection.reason == "audio_missing"
    assert pauses == [1.0, 2.0, 4.0, 8.0]


def test_a_dead_host_is_waited_for_until_another_answers(url: str, pauses: list[float]):
    """Without any proof that the network works, it is waited for and the run ends with 75."""
    dead = dead_address()
    with pytest.raises(RunEnded) as caught:
        read_patiently(dead, limit_in_seconds=0.0)
    assert caught.value.code == 75
    assert read_patiently(f"{url}/a.flac", 600) == CLIP
    assert rejection_of(dead).reason == "audio_missing"
    assert pauses == [1.0, 2.0, 4.0, 8.0]
    del pauses[:]
    assert rejection_of(dead.replace("a.wav", "b.wav")).reason == "audio_missing"
    assert pauses == [], "the next rows of a dead host cost no time"


def test_the_hub_proves_that_the_network_works(pauses: list[float], monkeypatch):
    monkeypatch.setattr(reading, "is_hub_reachable", lambda: True)
    assert rejection_of(dead_address()).reason == "audio_missing"


def test_a_host_that_has_answered_and_is_gone_is_waited_for(
    server: http.server.ThreadingHTTPServer, url: str, pauses: list[float], monkeypatch
):
    """A server that restarts must not cost rows, though other servers answer."""
    monkeypatch.setattr(reading, "is_hub_reachable", lambda: True)
    assert read_patiently(f"{url}/a.flac", 600) == CLIP
    server.shutdown()
    server.server_close()
    with pytest.raises(RunEnded):
        read_patiently(f"{url}/b.flac", limit_in_seconds=0.0)


def test_a_host_that_comes_back_is_alive(pauses: list[float], url: str):
    reading.KNOWN_HOSTS.silent.add(url)
    assert read_patiently(f"{url}/a.flac", 600) == CLIP
    assert reading.KNOWN_HOSTS.silent == set()


def test_offline_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(network, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(network.time, "sleep", pytest.fail)
    assert rejection_of(dead_address()).reason == "audio_missing"


def test_a_silent_server_is_given_up(pauses: list[float], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "LONGEST_SILENCE_IN_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/a.wav"
        began = time.monotonic()
        with pytest.raises(RunEnded):
            read_patiently(address, limit_in_seconds=0.0)
        assert time.monotonic() - began < 10


def test_a_list_with_one_dead_address_is_read(
    url: str, preprocessor: Preprocessor, pauses: list[float], monkeypatch: pytest.MonkeyPatch
):
    clip = demonstration.encode(np.full(8_000, 0.1))
    monkeypatch.setitem(globals(), "CLIP", clip)
    preprocessor.max_network_wait_in_seconds = 600
    addresses = [f"{url}/1.flac", dead_address(), f"{url}/2.flac", f"{url}/403"]
    rows = [SourceRow(id=name, audio=name, text="uno") for name in addresses]
    results = [preprocessor(row) for row in rows]
    outcomes = [r.reason if isinstance(r, Rejection) else r["text"] for r in results]
    assert outcomes == ["uno", "audio_missing", "uno", "audio_missing"]


def test_the_size_of_a_clip_that_is_gone_is_none(monkeypatch: pytest.MonkeyPatch):
    """It may go while its size is asked for."""
    monkeypatch.setattr("os.path.exists", lambda path: True)
    for name in ("/nowhere/a.wav", "a\0.wav", "a" * 300):
        assert SourceRow(id="a", audio=name).size_in_bytes() == 0
