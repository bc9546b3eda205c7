"""Uploads that cannot hurt a run."""

import atexit
import contextlib
import enum
import logging
import os
import re
import shlex
import shutil
import subprocess
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

from speech_finetuning.base.children import end_child, start_child
from speech_finetuning.base.errors import ExitCode, RunEnded, one_line
from speech_finetuning.base.files import printable, redacted
from speech_finetuning.sharing.snapshot import write_snapshot
from speech_finetuning.sharing.upload_process import REFUSED

logger = logging.getLogger(__name__)

SLOWEST_UPLOAD_IN_BYTES_PER_SECOND = 500_000  # what is slower counts as hung
MAX_REFUSALS = 3  # in a row at the end of the run, before it is given up
LONGEST_PAUSE_IN_SECONDS = 60.0
ANSI_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # colours, cursor movements


def move_over(source: Path, target: Path) -> None:
    """Moves a folder's files into another one, over those of the same names. Raises: OSError."""
    if not target.exists():
        source.rename(target)
        return
    shutil.copytree(source, target, copy_function=os.replace, dirs_exist_ok=True)
    shutil.rmtree(source)


class UploadState(enum.Enum):
    IDLE = "everything is uploaded"
    READY = "a snapshot waits to be uploaded"
    UPLOADING = "a process is uploading a snapshot"
    FAILED = "the last upload failed; its files go up with the next snapshot"


@dataclass(kw_only=True)
class HubUploads:
    """Uploads snapshots of the model, each by a process of its own with a deadline, so that a hung
    server blocks neither training nor exit. A snapshot taken during an upload follows it; what
    could not be uploaded goes up with the next snapshot."""

    repo_id: str
    output_dir: Path
    strategy: str  # --hub_strategy: every_save, checkpoint, all_checkpoints or end
    with_transcripts: bool
    must_be_private: bool
    wait_in_seconds: float  # for a hung upload, and for a Hub that fails at the end of the run
    state: UploadState = UploadState.IDLE
    num_uploads: int = 0
    error: str = ""  # of the last upload
    was_refused: bool = False
    child: subprocess.Popen | None = field(default=None, repr=False)
    deadline: float = 0.0

    def __post_init__(self) -> None:
        self.folder = self.output_dir / "_upload"
        self.current = self.folder / "current"  # the snapshot that is being uploaded
        self.next = self.folder / "next"  # the one that follows
        self.unfinished = self.folder / "unfinished"  # one that is being taken
        self.log = self.folder / "log"
        shutil.rmtree(self.folder, ignore_errors=True)
        atexit.register(self.cancel)

    def submit(self, model_folder: Path, card: str, checkpoint: Path | None = None) -> None:
        """Takes a snapshot of a model, and of a checkpoint if that is wanted, and uploads it.
        card: the text of README.md. checkpoint: None at the end of the run. Raises: OSError."""
        if checkpoint is not None and self.strategy == "end":
            return
        if self.strategy not in ("checkpoint", "all_checkpoints"):
            checkpoint = None
        shutil.rmtree(self.unfinished, ignore_errors=True)  # a full disk has left it
        write_snapshot(
            self.unfinished,
            model_folder=model_folder,
            output_dir=self.output_dir,
            card=card,
            checkpoint=checkpoint,
            checkpoint_name="last-checkpoint" if self.strategy == "checkpoint" else None,
            with_transcripts=self.with_transcripts,
        )
        move_over(self.unfinished, self.next)
        if self.state is not UploadState.UPLOADING:
            self.state = UploadState.READY
        self.poll()

    def poll(self) -> None:
        """Notes how the running upload has ended, ends it if it takes too long, and starts the next
        one if it is due."""
        try:
            if self.state is UploadState.UPLOADING:
                self.check_on_upload()
            if self.state is UploadState.READY:
                self.start()
        except OSError as error:  # a full disk
            self.error = one_line(error)
            self.was_refused = False
            self.state = UploadState.FAILED
            logger.warning("hub: an upload could not start: %s", self.error)

    def start(self) -> None:
        """Starts a process that uploads the next snapshot. Raises: OSError."""
        if self.current.exists():  # a full disk has kept it there
            self.keep_for_next()
        self.next.rename(self.current)
        num_bytes = sum(path.stat().st_size for path in self.current.rglob("*"))
        transfer_in_seconds = num_bytes / SLOWEST_UPLOAD_IN_BYTES_PER_SECOND
        words = [self.repo_id, str(self.current)]
        if self.must_be_private:
            words.append("--must_be_private")
        self.child = start_child(
            "speech_finetuning.sharing.upload_process",
            words,
            self.log,
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            NO_COLOR="1",
        )
        self.deadline = time.monotonic() + self.wait_in_seconds + transfer_in_seconds
        self.state = UploadState.UPLOADING

    def check_on_upload(self) -> None:
        """Notes how the upload has ended, if it has or if its time is over. Raises: OSError."""
        assert self.child is not None  # in this state
        code = self.child.poll()
        if code is None and time.monotonic() < self.deadline:
            return
        self.cancel()
        if code == 0:
            self.num_uploads += 1
            self.error = ""
            self.state = UploadState.READY if self.next.exists() else UploadState.IDLE
            shutil.rmtree(self.current)
            self.tidy()
            return
        self.error = "it did not end in time" if code is None else self.last_words(code)
        self.was_refused = code == REFUSED
        logger.warning(
            "hub: an upload failed (%s); it is tried again with the next save.", self.error
        )
        self.state = UploadState.READY if self.next.exists() else UploadState.FAILED
        self.keep_for_next()

    def keep_for_next(self) -> None:
        """Puts what could not be uploaded under what was saved since."""
        if not self.current.exists():  # somebody has deleted it
            return
        if self.next.exists():
            move_over(self.next, self.current)
        self.current.rename(self.next)

    def last_words(self, code: int) -> str:
        """Why the upload failed: the last line that its process wrote, as clean text."""
        text = ""
        with contextlib.suppress(OSError):
            text = ANSI_SEQUENCE.sub("", self.log.read_text(encoding="utf-8", errors="replace"))
        lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
        last = lines[-1] if lines else f"its process ended with code {code}"
        return textwrap.shorten(printable(redacted(last)), 300, placeholder=" ...")

    def tidy(self) -> None:
        """Removes the log of an upload that worked, and the folder if nothing waits in it."""
        self.log.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a snapshot waits
            self.folder.rmdir()

    def cancel(self) -> None:
        """Ends the running upload, if there is one."""
        if self.child is not None:
            end_child(self.child)

    def figures(self) -> dict[str, int]:
        """For the log: snapshots uploaded, and those that wait or are being uploaded."""
        num_pending = int(self.state is UploadState.UPLOADING) + int(self.next.exists())
        return {"hub_pushed": self.num_uploads, "hub_pending": num_pending}

    def finish(self) -> None:
        """Waits until everything is uploaded, with new tries.
        Raises: RunEnded(76) with the command that finishes it."""
        give_up_at = time.monotonic() + self.wait_in_seconds
        num_refusals = 0
        pause_in_seconds = 1.0
        while self.state is not UploadState.IDLE:
            self.poll()
            if self.state is UploadState.UPLOADING:
                time.sleep(0.2)
            if self.state is UploadState.FAILED:
                num_refusals = num_refusals + 1 if self.was_refused else 0
                if num_refusals >= MAX_REFUSALS or time.monotonic() > give_up_at:
                    raise RunEnded(ExitCode.NOT_UPLOADED, self.ending())
                time.sleep(pause_in_seconds)
                pause_in_seconds = min(2 * pause_in_seconds, LONGEST_PAUSE_IN_SECONDS)
                self.state = UploadState.READY

    def ending(self) -> str:
        """What a run says that could not upload everything."""
        folder = self.next if self.next.exists() else self.current
        # `hf upload` creates a repository that is missing: never a public one.
        command = shlex.join(["hf", "upload", self.repo_id, str(folder), ".", "--private"])
        return f"trained and saved, but not uploaded ({self.error}). Finish with: {command}"
