"""Checkpoints that are complete or not there."""

import json
import logging
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from speech_finetuning.base.errors import UserError

logger = logging.getLogger(__name__)


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
        # DeepSpeed keeps its states in the folder that `latest` names.
        return (len(states) == 2 or (checkpoint / "latest").is_file()) and any(
            checkpoint.glob("rng_state*.pth")
        )
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
        return False


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """The checkpoint to continue from, None for a fresh start.
    Raises: UserError if the named one is incomplete, or if a fresh start would mix with another run's files."""
    found = sorted(
        output_dir.glob("checkpoint-*"),
        key=lambda path: int(path.name.split("-")[-1]),
        reverse=True,
    )
    wish = str(resume_from_checkpoint or "no")
    if wish.lower() in ("no", "none", "false"):
        if found:
            reason = f"holds {found[0].name} and --resume_from_checkpoint says {wish}"
            advice = (
                "Choose another --output_dir, or leave out --resume_from_checkpoint to continue."
            )
            raise UserError(f"--output_dir {output_dir} {reason}. {advice}")
        return None
    if wish.lower() not in ("auto", "true", "hub"):
        if not is_complete(Path(wish)):
            raise UserError(
                f"--resume_from_checkpoint {wish}: not a complete checkpoint of this script."
            )
        return Path(wish)
    for checkpoint in found:
        if is_complete(checkpoint):
            return checkpoint
        logger.warning("%s is incomplete or damaged; trying the one before.", checkpoint)
    return None
