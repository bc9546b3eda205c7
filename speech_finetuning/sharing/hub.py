"""What the Hub is asked before and after training."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from speech_finetuning.base.errors import UserError
from speech_finetuning.base.files import write_json
from speech_finetuning.base.network import as_user_error
from speech_finetuning.sharing.uploads import HubUploads
from speech_finetuning.training.checkpoints import is_complete

logger = logging.getLogger(__name__)


def check_hub(name: str, private: bool | None, may_create: bool = True) -> str:
    """Creates the model repo if it is missing and proves, before any GPU work, that this token may write to it: roles
    tell little, so the Hub is asked what it would do with a file. Returns the repo's id. Raises: UserError."""
    if HF_HUB_OFFLINE:
        raise UserError(
            "--push_to_hub with HF_HUB_OFFLINE=1. Unset it, or leave out --push_to_hub."
        )
    if not huggingface_hub.get_token():
        raise UserError("--push_to_hub needs a token. Run `hf auth login`, or set HF_TOKEN.")
    api, probe = huggingface_hub.HfApi(), huggingface_hub.CommitOperationAdd("run_info.json", b"{}")
    fix = " The token needs write access to it (https://huggingface.co/settings/tokens); see --hub_model_id."
    with as_user_error(
        HfHubHTTPError, HFValidationError, where=f"--push_to_hub to {name}", advice=fix
    ):
        if not may_create:
            user = api.whoami()
            name = name if "/" in name else f"{user['name']}/{name}"
            if not api.repo_exists(name):  # so that there is nothing to ask about but the token
                if (role := user["auth"]["accessToken"]["role"]) == "read":
                    raise UserError(
                        f"--push_to_hub to {name}: the token may only read. Make one that may write."
                    )
                return f"{name} does not exist yet, by the token ({role}) it"
        repo_id = api.create_repo(name, private=private, exist_ok=True).repo_id
        api.preupload_lfs_files(repo_id, [probe])
    logger.info("hub: %s may be written by %s", repo_id, api.whoami()["name"])
    return repo_id


def base_licence(name: str) -> str | None:
    """The licence that the base model's card states; never guessed. Asked for once, before training."""
    try:
        return None if Path(name).exists() else huggingface_hub.ModelCard.load(name).data.license
    except Exception:  # no card, no network: all the same
        return None


def warn_of_private_data(repo_id: str, names: set[str]) -> None:
    """For --push_predictions: says so when transcripts of private or gated data go to a public repository."""
    api = huggingface_hub.HfApi()
    infos = [api.dataset_info(name) for name in names if not Path(name).exists()]
    closed = [info.id for info in infos if info.private or info.gated]
    if closed and not api.model_info(repo_id).private:
        logger.warning(
            "--push_predictions: transcripts of %s, not public, go to %s, public.", closed, repo_id
        )


def download_checkpoint(repo_id: str, output_dir: Path) -> None:
    """Makes the Hub's last-checkpoint (--hub_strategy checkpoint) the newest of output_dir. Raises: UserError."""
    folder = output_dir / "_hub"
    huggingface_hub.snapshot_download(repo_id, allow_patterns="last-checkpoint/*", local_dir=folder)
    if not is_complete(folder / "last-checkpoint"):
        raise UserError(
            f"--resume_from_checkpoint hub: {repo_id} has no complete last-checkpoint. Use 'auto'."
        )
    record = folder / "last-checkpoint" / "trainer_state.json"
    state = json.loads(record.read_text(encoding="utf-8"))
    if not Path(state["best_model_checkpoint"] or "/").exists():  # it stayed on the other machine
        write_json(
            record,
            state | dict.fromkeys(("best_model_checkpoint", "best_metric", "best_global_step")),
        )
    final = output_dir / f"checkpoint-{state['global_step']}"
    if not is_complete(final):
        shutil.rmtree(final, ignore_errors=True)
        record.parent.rename(final)
    shutil.rmtree(folder, ignore_errors=True)


def make_uploads(
    records: list[Any], args: transformers.Seq2SeqTrainingArguments
) -> HubUploads | None:
    """Proves that the Hub can be written to, and fetches its last-checkpoint if that is to be continued."""
    output_dir, uploads, repo_id = Path(args.output_dir), None, args.hub_model_id
    if args.push_to_hub and args.process_index == 0:
        repo_id = check_hub(repo_id or output_dir.resolve().name, args.hub_private_repo)
        wait, with_transcripts = (
            60 * records[0].max_network_wait_in_minutes,
            records[0].push_predictions,
        )
        uploads = HubUploads(
            repo_id, output_dir, str(args.hub_strategy.value), with_transcripts, wait
        )
        if with_transcripts:
            warn_of_private_data(repo_id, {record.dataset_name for record in records})
    if args.resume_from_checkpoint == "hub" and args.process_index == 0:
        download_checkpoint(repo_id, output_dir)
    return uploads
