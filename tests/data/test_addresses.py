"""Lists at an address that the user typed, read over HTTP, and what their rows may name."""

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from rows import outcomes, read_rows, write_clips

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.addresses import folder_of, root_of_address
from speech_finetuning.data.sources import load_source


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; /private is refused, and /page.csv is a web page."""

    def do_GET(self) -> None:
        if self.path.startswith("/private"):
            self.send_error(403)
        elif self.path.startswith("/page.csv"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<!doctype html><html>log in</html>")
        else:
            super().do_GET()

    def log_message(self, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a server with tmp_path/served, in which there are four clips."""
    write_clips(tmp_path / "served")
    handler = functools.partial(Handler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.csv", "path,sentence\nclips/0.wav,uno\n/clips/1.wav,dos\n"),
        ("train.tsv", "path\tsentence\nclips/0.wav\tuno\nclips/gone.wav\tdos\n"),
        ("train.jsonl", '{"audio": "clips/0.wav", "text": "uno"}\n{"audio": "", "text": "dos"}\n'),
        ("train.json", '[{"audio": "clips/0.wav", "text": "uno"},\n {"audio": 3, "text": "dos"}]'),
    ],
)
def test_lists_over_http(tmp_path: Path, preprocessor, address: str, name: str, text: str):
    (tmp_path / "served" / name).write_text(text)
    for query in ("", "?signature=abc"):
        source = load_source(f"{address}/{name}{query}", split="train")
        assert (source.kind, source.num_rows, source.root) == ("manifest", 2, address)
        assert outcomes(source, preprocessor)[0] == "uno"
        assert read_rows(source)[0].audio == f"{address}/clips/0.wav"


def test_rows_of_a_list_at_an_address_name_files_of_its_server_only(
    tmp_path: Path, preprocessor, address: str
):
    names = ["/etc/passwd", "file:///etc/passwd", "../x/../clips/0.wav", "http://localhost:9/a.wav"]
    names += ["s3://bucket/a.wav", f"{address}/clips/0.wav"]
    lines = ["path,sentence", *(f"{name},uno" for name in names)]
    (tmp_path / "served" / "train.csv").write_text("\n".join(lines))
    source = load_source(f"{address}/train.csv", split="train")
    assert outcomes(source, preprocessor) == [*["audio_outside_dataset"] * 5, "uno"]
    detail = read_rows(source)[0].rejection.detail
    assert f"a list at an address may name only files of {address}" in detail


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("/gone.csv", "gone.csv: the server answers 404"),
        ("/private/train.csv?token=secret", r"private/train.csv: the server answers 403"),
        ("/page.csv", "answered with a web page, not a list"),
        ("/train.parquet", "only a list of clips is read, a file .csv"),
        ("/", "only a list of clips is read"),
    ],
)
def test_wrong_addresses_are_one_line(address: str, place: str, message: str):
    with pytest.raises(UserError, match=message) as error:
        load_source(address + place, split="train")
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_a_protocol_without_its_package_names_the_package():
    with pytest.raises(
        UserError, match=r"ImportError: Install s3fs|ValueError: Protocol not known"
    ):
        load_source("nowhere://bucket/train.csv", split="train")


def test_any_file_system_of_fsspec_is_read(preprocessor, tmp_path: Path):
    (name,) = write_clips(tmp_path, 1)
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a/clips/0.wav", (tmp_path / name).read_bytes())
    memory.pipe("/bucket/a/train.csv", b"path,sentence\nclips/0.wav,uno\n/etc/passwd,dos\n")
    source = load_source("memory://bucket/a/train.csv", split="train")
    assert outcomes(source, preprocessor) == ["uno", "audio_outside_dataset"]


def test_what_a_list_may_name():
    assert root_of_address("s3://bucket/a/train.csv") == "s3://bucket"
    assert root_of_address("hf://buckets/anna/speech/a/train.csv") == "hf://buckets/anna/speech"
    assert folder_of("https://example.org/a/train.csv?b=/c") == "https://example.org/a"
    assert folder_of("/data/train.csv") == "/data"
