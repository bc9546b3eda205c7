"""Webdatasets that hold more than clips and texts: code, texts without end, other encodings."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from rows import make_clip, outcomes, read_rows

from speech_finetuning.base.errors import UserError
from speech_finetuning.data.sources import load_source
from speech_finetuning.data.tars import MAX_TEXT_IN_BYTES


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    mode = "w:gz" if path.suffix == ".gz" else "w"
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path.parent)


def test_only_audio_and_text_are_read_whatever_else_a_row_has(tmp_path: Path, preprocessor):
    members = {}
    for name in ("a", "b"):
        members |= {
            f"{name}.wav": make_clip(),
            f"{name}.txt": f"uno {name}".encode(),
            f"{name}.pth": pickle.dumps(Code(tmp_path / "unpickled")),
            f"{name}.npy": b"\x93NUMPY no array",
            f"{name}.json": b"{ no json",
        }
    source = load_source(write_tar(tmp_path / "train-0.tar", members), split="train")
    assert (source.kind, source.audio_column, source.text_column) == ("webdataset", "wav", "txt")
    assert outcomes(source, preprocessor) == ["uno a", "uno b"]
    assert [row.id for row in read_rows(source)] == ["train/0/0/a.wav", "train/0/0/b.wav"]
    assert not (tmp_path / "unpickled").exists()


def test_a_member_beyond_its_bound_costs_its_row(tmp_path: Path, preprocessor):
    long = b"a" * (MAX_TEXT_IN_BYTES + 1)
    members = {"a.wav": make_clip(), "a.txt": long, "b.wav": make_clip(), "b.txt": b"dos"}
    source = load_source(write_tar(tmp_path / "train-0.tar", members), split="train")
    assert outcomes(source, preprocessor) == ["row_unreadable", "dos"]
    assert "a.txt: 1,048,577 bytes, the limit is" in read_rows(source)[0].rejection.detail


def test_a_text_that_is_not_utf_8_costs_its_row(tmp_path: Path, preprocessor):
    texts = {"a.txt": "señal".encode("latin-1"), "b.txt": b"dos"}
    members = {"a.wav": make_clip(), "b.wav": make_clip(), **texts}
    ordered = {name: members[name] for name in sorted(members)}
    source = load_source(write_tar(tmp_path / "train-0.tar", ordered), split="train")
    assert outcomes(source, preprocessor) == ["row_unreadable", "dos"]


def test_a_row_without_a_text_or_audio_is_rejected(tmp_path: Path, preprocessor):
    members = {"a.wav": make_clip(), "a.txt": b"uno", "b.wav": make_clip(), "c.txt": b"tres"}
    source = load_source(write_tar(tmp_path / "train-0.tar", members), split="train")
    assert outcomes(source, preprocessor) == ["uno", "text_empty", "audio_empty"]


def test_texts_within_json_members(tmp_path: Path, preprocessor):
    texts = [b'{"text": "uno", "n": 1}', b"{ no json", b"[1]", b'{"text": [1]}', b'{"n": 1}']
    members = {}
    for number, text in enumerate(texts):
        members |= {f"{number}.wav": make_clip(), f"{number}.json": text}
    source = load_source(write_tar(tmp_path / "train-0.tar", members), split="train")
    assert source.text_column == "json.text"
    assert outcomes(source, preprocessor) == ["uno", *["row_unreadable"] * 3, "text_empty"]


def test_a_column_within_json_members_can_be_named(tmp_path: Path, preprocessor):
    text = b'{"said": {"raw": "Uno.", "norm": "uno"}}'
    folder = write_tar(tmp_path / "train-0.tar", {"a.wav": make_clip(), "a.json": text})
    with pytest.raises(UserError, match=r"Found: wav, json, json.said, json.said.raw"):
        load_source(folder, split="train")
    with pytest.raises(UserError, match="--text_column_name json: is not a plain text"):
        load_source(folder, split="train", text_column="json")
    source = load_source(folder, split="train", text_column="json.said.raw")
    assert outcomes(source, preprocessor) == ["Uno."]


@pytest.mark.parametrize("content", [b"", b"no tar" * 200])
def test_a_tar_without_a_row_says_that_it_is_damaged(tmp_path: Path, content: bytes):
    (tmp_path / "train-0.tar").write_bytes(content)
    with pytest.raises(UserError, match="train-0.tar: damaged, or not a tar"):
        load_source(str(tmp_path), split="train")


def test_a_tar_that_is_cut_off_is_damaged(tmp_path: Path, preprocessor):
    members = {"a.wav": make_clip(), "a.txt": b"uno", "b.wav": make_clip(), "b.txt": b"dos"}
    folder = write_tar(tmp_path / "train-0.tar", members)
    path = tmp_path / "train-0.tar"
    path.write_bytes(path.read_bytes()[:50_000])
    assert outcomes(load_source(folder, split="train"), preprocessor) == ["uno", "file_damaged"]


def many(num_rows: int) -> dict[str, bytes]:
    members = {}
    for number in range(num_rows):
        members |= {f"{number}.wav": make_clip(), f"{number}.txt": b"uno"}
    return members


def test_a_damaged_header_does_not_end_a_tar_in_silence(tmp_path: Path, preprocessor):
    """tarfile takes it for the end: all that follows would be missing, and nobody told."""
    folder = write_tar(tmp_path / "train-0.tar", many(6))
    path = tmp_path / "train-0.tar"
    data = bytearray(path.read_bytes())
    data[data.find(b"3.wav\0") + 100] ^= 1  # of its mode, which the checksum counts
    path.write_bytes(data)
    assert outcomes(load_source(folder, split="train"), preprocessor) == [
        *["uno"] * 2,  # of the third it is not known whether more was to come
        "file_damaged",
    ]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_the_size_of_a_header_is_bounded(tmp_path: Path, preprocessor, kind: bytes):
    """A few bytes of gzip could have it read for minutes, into memory."""
    folder = write_tar(tmp_path / "train-0.tar", many(2))
    path = tmp_path / "train-0.tar"
    header = tarfile.TarInfo("names")
    header.type = kind
    header.size = 2**40
    end = path.read_bytes().rstrip(b"\0")
    whole = end + bytes(-len(end) % 512)
    path.write_bytes(whole + header.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    source = load_source(folder, split="train")
    assert outcomes(source, preprocessor) == ["uno", "file_damaged"]
    assert "a header of 1,099,511,627,776 bytes" in read_rows(source)[1].rejection.detail


def test_a_link_in_a_tar_says_that_it_is_one(tmp_path: Path, preprocessor):
    """As tar writes the second of two names of a file."""
    write_tar(tmp_path / "train-0.tar", many(1))
    with tarfile.open(tmp_path / "train-0.tar", "a") as tar:
        for number, kind in ((1, tarfile.LNKTYPE), (2, tarfile.SYMTYPE)):
            link = tarfile.TarInfo(f"{number}.wav")
            link.type = kind
            link.linkname = "0.wav"
            tar.addfile(link)
            text = tarfile.TarInfo(f"{number}.txt")
            text.size = 3
            tar.addfile(text, io.BytesIO(b"dos"))
    source = load_source(str(tmp_path), split="train")
    assert outcomes(source, preprocessor) == ["uno", "row_unreadable", "row_unreadable"]
    assert "1.wav: a link, not a file" in read_rows(source)[1].rejection.detail


@pytest.mark.parametrize("text", ["uno".encode("utf-16-le"), b"uno\0dos"])
def test_nul_bytes_of_a_text_are_not_trained(tmp_path: Path, preprocessor, text: bytes):
    members = many(1) | {"b.wav": make_clip(), "b.txt": text}
    source = load_source(write_tar(tmp_path / "train-0.tar", members), split="train")
    assert outcomes(source, preprocessor) == ["uno", "row_unreadable"]
