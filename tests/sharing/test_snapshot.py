"""Snapshots for the Hub: whole or not there, and what was not uploaded goes along."""

import json
import logging
from pathlib import Path

import pytest

from speech_finetuning.sharing import uploads as module
from speech_finetuning.sharing.snapshot import write_snapshot
from speech_finetuning.sharing.uploads import HubUploads, UploadState


def make_uploads(tmp_path: Path) -> HubUploads:
    return HubUploads(
        repo_id="alice/x",
        output_dir=tmp_path,
        strategy="checkpoint",
        with_transcripts=False,
        must_be_private=False,
        wait_in_seconds=60,
    )


def make_checkpoint(tmp_path: Path, step: int) -> Path:
    folder = tmp_path / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"step": step}))
    (folder / "model.safetensors").write_bytes(b"weights of %d" % step)
    (folder / "optimizer.pt").write_bytes(b"optimizer of %d" % step)
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return folder


def test_a_snapshot_that_fills_the_disk_is_not_uploaded_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The next one starts from nothing, and an upload that runs does not go on to the half."""
    uploads = make_uploads(tmp_path)
    monkeypatch.setattr(uploads, "poll", lambda: None)
    first, second = (make_checkpoint(tmp_path, step) for step in (2, 4))
    uploads.submit(first, "card of 2", first)
    real = module.write_snapshot

    def fill_disk(folder: Path, **arguments: object) -> None:
        real(folder, **arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_snapshot", fill_disk)
    with pytest.raises(OSError, match="No space left"):
        uploads.submit(second, "card of 4", second)
    last = uploads.next / "last-checkpoint"
    assert (uploads.next / "README.md").read_text() == "card of 2"
    assert (last / "optimizer.pt").read_bytes() == b"optimizer of 2"
    monkeypatch.setattr(module, "write_snapshot", real)
    uploads.submit(second, "card of 4", second)
    assert (last / "optimizer.pt").read_bytes() == b"optimizer of 4"
    assert (uploads.next / "model.safetensors").read_bytes() == b"weights of 4"
    assert not (last / "training_args.bin").exists() and not uploads.unfinished.exists()


def test_what_failed_goes_along_under_what_is_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    uploads = make_uploads(tmp_path)
    first = make_checkpoint(tmp_path, 2)
    (first / "vocab.json").write_text("{}")
    uploads.submit(first, "card of 2", first)
    assert uploads.state is UploadState.UPLOADING
    second = make_checkpoint(tmp_path, 4)
    uploads.submit(second, "card of 4", second)
    assert uploads.figures() == {"hub_pushed": 0, "hub_pending": 2}
    uploads.child.kill()
    uploads.child.wait()
    uploads.check_on_upload()
    assert uploads.state is UploadState.READY and "an upload failed" in caplog.text
    assert (uploads.next / "vocab.json").is_file()  # of the first, which failed
    assert json.loads((uploads.next / "config.json").read_text()) == {"step": 4}
    assert (uploads.next / "README.md").read_text() == "card of 4"
    uploads.cancel()


def test_a_copy_of_the_code_has_no_files_of_other_people(tmp_path: Path):
    """Allowed are names, not folders."""
    model = make_checkpoint(tmp_path, 2)
    for name in ("notes.md", ".env", "secret.json", "adapter_notes.txt"):
        (model / name).write_text("mine")
    write_snapshot(
        tmp_path / "snapshot",
        model_folder=model,
        output_dir=tmp_path,
        card="card",
        checkpoint=None,
        checkpoint_name=None,
        with_transcripts=False,
    )
    paths = [p for p in (tmp_path / "snapshot").rglob("*") if p.is_file()]
    names = {path.relative_to(tmp_path / "snapshot").as_posix() for path in paths}
    outside = {name for name in names if not name.startswith("training_code/")}
    assert outside == {"README.md", "config.json", "model.safetensors"}
    suffixes = {Path(name).suffix for name in names - outside}
    assert suffixes <= {".py", ".md", ".txt", "", ".html", ".css", ".js"}
    assert "training_code/speech_finetuning/sharing/model_card_template.md" in names
