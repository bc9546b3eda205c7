"""Checkpoints that are complete or not there."""

import contextlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open

from speech_finetuning.base.errors import UserError, one_line, portable
from speech_finetuning.data.positions import in_this_version, saved_order_version
from speech_finetuning.data.selection import HoldOut

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------- writing


def try_to_save(name: str, save: Callable[..., None], *args: Any) -> Exception | None:
    """save(*args). Returns the error that it ended with, logged: what was saved before is kept, and
    the next save tries again."""
    try:
        save(*args)
    except Exception as error:  # OSError, RuntimeError, SafetensorError, tokenizers' bare Exception
        kind = type(error).__name__
        logger.error("%s could not be saved (%s: %s)", name, kind, one_line(error))
        return error
    return None


@dataclass(kw_only=True)
class UnfinishedCheckpoint:
    """A checkpoint while it is being written."""

    parent: Path  # output_dir/_unfinished
    final: Path  # output_dir/checkpoint-N
    error: Exception | None = None  # of this rank; after `share_outcome`, of any

    @property
    def folder(self) -> Path:
        """Where its files are until it is complete."""
        return self.parent / self.final.name

    def attempt(self, save: Callable[..., None], *args: Any) -> None:
        """save(*args), unless something has failed before; an error is noted, not raised."""
        if self.error is None:
            self.error = try_to_save(self.final.name, save, *args)

    def share_outcome(self, from_this_rank: Any) -> list[Any]:
        """What every rank brings, in order. All wait for all here; an error of one is one of
        all."""
        outcome = (from_this_rank, self.error and portable(self.error))
        outcomes = gather_object([outcome])
        self.error = next((error for _, error in outcomes if error is not None), None)
        return [brought for brought, _ in outcomes]

    def publish(self) -> None:
        """Makes every file durable and gives the checkpoint its name, in one step."""
        for path in self.folder.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(self.final, ignore_errors=True)  # a damaged one that the run had stepped over
        self.folder.rename(self.final)
        self.parent.rmdir()


@contextlib.contextmanager
def written_aside(
    output_dir: Path, step: int, *, is_writer: bool, wait_for_everyone: Callable[[], None]
) -> Iterator[UnfinishedCheckpoint]:
    """Has a checkpoint written beside its place; it gets there only when it is complete.

    After an error the unfinished one is removed, and the older checkpoints stay. Every rank enters;
    the writer is the one that writes what is not a rank's own.
    """
    unfinished = UnfinishedCheckpoint(
        parent=output_dir / "_unfinished",
        final=output_dir / f"checkpoint-{step}",
    )
    if is_writer:
        shutil.rmtree(unfinished.parent, ignore_errors=True)
    wait_for_everyone()
    yield unfinished
    if is_writer:
        unfinished.attempt(unfinished.publish)
    if unfinished.error is not None:
        shutil.rmtree(unfinished.parent, ignore_errors=True)
    wait_for_everyone()


# ---------------------------------------------------------------------------------------- finding


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has everything that an exact continuation needs, and can be read."""
    try:
        with safe_open(checkpoint / "model.safetensors", framework="pt"):
            pass  # opening checks the header against the file's length
        for name in ("trainer_state.json", "stream_state.json"):
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
        names = ("optimizer.pt", "optimizer.bin", "scheduler.pt")  # FSDP writes the second
        states = [checkpoint / name for name in names if (checkpoint / name).is_file()]
        for path in states:
            zipfile.ZipFile(path).close()  # torch writes its index last
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
        return False
    # DeepSpeed keeps its states in the folder that `latest` names.
    has_states = len(states) == 2 or (checkpoint / "latest").is_file()
    return has_states and any(checkpoint.glob("rng_state*.pth"))


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.name.split("-")[-1])


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint to continue from, None for a fresh start.

    Raises: UserError if the named one is incomplete, or if a fresh start would mix with another
    run's files.
    """
    found = sorted(output_dir.glob("checkpoint-*"), key=step_of, reverse=True)
    wanted = str(resume_from_checkpoint or "no")
    if wanted.lower() in ("no", "none", "false"):
        if found:
            raise UserError(
                f"--output_dir {output_dir} holds {found[0].name} and --resume_from_checkpoint says "
                f"{wanted}. Choose another --output_dir, or leave out --resume_from_checkpoint to "
                "continue."
            )
        return None
    if wanted.lower() not in ("auto", "true", "hub"):
        if not is_complete(Path(wanted)):
            raise UserError(
                f"--resume_from_checkpoint {wanted}: not a complete checkpoint of this script. Leave "
                "the flag out to continue from the newest in --output_dir."
            )
        return Path(wanted)
    for checkpoint in found:
        if is_complete(checkpoint):
            return checkpoint
        logger.warning("%s is incomplete or damaged; trying the one before.", checkpoint)
    return None


def pin_to_checkpoint(records: list[Any], checkpoint: Path) -> None:
    """Has a run that goes on read the rows that it began with: the revision of a data set, wherever
    a branch on the Hub points by now, the version of their order, and what was held out.

    records: the script's, whose fields of these names are set.
    """
    text = (checkpoint / "stream_state.json").read_text(encoding="utf-8")
    state = in_this_version(json.loads(text))
    for record in records:
        record.is_continued = True
        record.revision = state["revisions"].get(record.name)
        record.order_version = saved_order_version(state)
        saved = state["hold_outs"].get(record.name)
        record.hold_out = None if saved is None else HoldOut.from_json(saved)
