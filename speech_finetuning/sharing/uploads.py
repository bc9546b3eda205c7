"""Uploads that cannot hurt a run."""

import atexit
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from speech_finetuning.base.errors import RunEnded, one_line
from speech_finetuning.base.files import redacted, without_folders

logger = logging.getLogger(__name__)

SLOWEST_UPLOAD_IN_BYTES_PER_SECOND = 500_000  # what is slower counts as hung
# By name, never by folder: output_dir may be "./" with .git, .env and .venv in it.
MODEL_FILES = """*.safetensors *.safetensors.index.json config.json generation_config.json processor_config.json
preprocessor_config.json tokenizer*.json vocab.json merges.txt normalizer.json *_tokens*.json adapter_*""".split()
REPORT_FILES = """run_info.json all_results.json scorecard.json runs/[A-Z]*/events* runs/data/events*""".split()
TRANSCRIPT_FILES = (
    "predictions_*.jsonl worst_*.txt".split()
)  # with --push_predictions only: data may be private


def link_files(source: Path, patterns: list[str], target: Path) -> None:
    """Copies the files that are named; weights and optimiser states as hard links, which rotation cannot touch. Texts
    lose tokens and local paths."""
    for path in [path for pattern in patterns for path in source.glob(pattern) if path.is_file()]:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        if path.suffix in (".json", ".jsonl", ".txt") and not path.name.startswith(
            ("tokenizer", "merges")
        ):
            place.write_text(without_folders(path.read_text(encoding="utf-8")), encoding="utf-8")
            continue
        try:
            (os.link if path.suffix in (".safetensors", ".pt") else shutil.copy2)(path, place)
        except OSError:  # a file system without hard links
            shutil.copy2(path, place)


class HubUploads:
    """Uploads snapshots by the `hf` command, a child process with a deadline, so that a hung server can block neither
    training nor exit. What is saved during an upload follows it; what failed is tried again with the next save."""

    def __init__(
        self, repo_id: str, output_dir: Path, strategy: str, has_texts: bool, wait_in_seconds: float
    ) -> None:
        self.repo_id, self.output_dir, self.strategy = repo_id, output_dir, strategy
        self.patterns, self.wait_in_seconds = (
            REPORT_FILES + TRANSCRIPT_FILES * has_texts,
            wait_in_seconds,
        )
        self.current, self.next = (
            output_dir / "_upload" / "current",
            output_dir / "_upload" / "next",
        )
        self.child: subprocess.Popen | None = None
        self.is_due, self.num_pushed, self.error, self.deadline = False, 0, "", 0.0
        self.write_card: Callable[[list[dict]], str] = lambda history: ""
        shutil.rmtree(self.next.parent, ignore_errors=True)
        atexit.register(self.cancel)

    def submit(self, model: Path, history: list[dict], checkpoint: Path | None = None) -> None:
        """Takes a snapshot of a model folder, and of a whole checkpoint if the strategy wants it, and uploads it."""
        if checkpoint is not None and self.strategy == "end":
            return
        link_files(model, MODEL_FILES, self.next)
        link_files(self.output_dir, self.patterns, self.next)
        shutil.copy2(
            Path(__file__).parents[2] / "run_speech_recognition_seq2seq_streaming.py", self.next
        )
        (self.next / "README.md").write_text(
            without_folders(self.write_card(history)), encoding="utf-8"
        )
        if checkpoint is not None and self.strategy != "every_save":
            name = "last-checkpoint" if self.strategy == "checkpoint" else checkpoint.name
            files = [
                path
                for path in checkpoint.rglob("*")
                if path.is_file() and path.name != "training_args.bin"
            ]
            link_files(
                checkpoint, [str(path.relative_to(checkpoint)) for path in files], self.next / name
            )
        self.is_due = True
        self.poll()

    def poll(self) -> None:
        """Notes how the running upload ended, ends it if it takes too long, and starts the next one if it is due."""
        try:
            if self.child is not None:
                code = self.child.poll()
                if code is None and time.monotonic() < self.deadline:
                    return
                self.cancel()
                self.note(code)
            self.start()
        except OSError as error:  # a full disk; `finish` tries again as long as there is an error
            self.error = one_line(error)
            logger.warning("hub: an upload could not start: %s", self.error)
            if self.current.exists() and not self.next.exists():
                self.current.rename(self.next)

    def start(self) -> None:
        """Starts the next upload if it is due. Raises: OSError."""
        if self.is_due and self.next.exists() and self.child is None:
            self.is_due = False
            self.next.rename(self.current)
            size = sum(path.stat().st_size for path in self.current.rglob("*"))
            self.deadline = (
                time.monotonic() + self.wait_in_seconds + size / SLOWEST_UPLOAD_IN_BYTES_PER_SECOND
            )
            words = [
                sys.executable,
                "-m",
                "huggingface_hub.cli.hf",
                "upload",
                self.repo_id,
                str(self.current),
                ".",
            ]
            how = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
            with open(self.current.parent / "log", "w", encoding="utf-8") as log:
                # In a session of its own: the terminal's Ctrl-C is for the trainer, which decides.
                self.child = subprocess.Popen(words, stdout=log, start_new_session=True, **how)

    def note(self, code: int | None) -> None:
        """Counts an upload that has ended; what failed stays for the next one, under what was saved since."""
        self.child, self.error = None, ""
        if code == 0:
            self.num_pushed += 1
        else:
            log = self.current.parent / "log"
            text = (
                log.read_text(encoding="utf-8", errors="replace")
                if log.exists()
                else "its snapshot has vanished"
            )
            self.error = (
                "no end in time" if code is None else redacted(" ".join(text.split()))[-300:]
            )
            logger.warning(
                "hub: an upload failed (%s); it is tried again with the next save.", self.error
            )
            if self.next.exists() and self.current.exists():
                shutil.copytree(
                    self.next, self.current, copy_function=os.replace, dirs_exist_ok=True
                )
                shutil.rmtree(self.next)
            if self.current.exists():
                self.current.rename(self.next)
        shutil.rmtree(self.current, ignore_errors=True)

    def cancel(self) -> None:
        """Ends the running upload."""
        if self.child is not None:
            self.child.kill()
            self.child.wait()

    def figures(self) -> dict[str, int]:
        return {
            "hub_pushed": self.num_pushed,
            "hub_pending": int(self.child is not None) + int(self.next.exists()),
        }

    def finish(self) -> None:
        """Waits until all is uploaded, with new tries. Raises: RunEnded(76) with the command that finishes it."""
        give_up, pause = time.monotonic() + self.wait_in_seconds, 1.0
        while self.child is not None or self.next.exists():
            self.poll()
            time.sleep(0.2)
            if self.child is None and self.error:
                if time.monotonic() > give_up:
                    words = shlex.join(["hf", "upload", self.repo_id, str(self.next), "."])
                    raise RunEnded(
                        76,
                        f"trained and saved, but not uploaded ({self.error}). Finish with: {words}",
                    )
                time.sleep(pause)
                pause, self.is_due = min(2 * pause, 60.0), True
