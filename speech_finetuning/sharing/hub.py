"""What the Hub is asked before training."""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.hf_api import RepoFile

from speech_finetuning.base.errors import UserError, one_line
from speech_finetuning.base.files import counted, write_json
from speech_finetuning.sharing.public import is_hub_name
from speech_finetuning.sharing.upload_process import PERMANENT_REFUSALS
from speech_finetuning.sharing.uploads import HubUploads
from speech_finetuning.training.checkpoints import is_complete

logger = logging.getLogger(__name__)


class UnusableAnswer(ConnectionError):
    """An answer that is not the Hub's, like a proxy's page with status 200: waited out like any
    other fault of the network."""


@contextlib.contextmanager
def broken_answers_as_network_errors() -> Iterator[None]:
    """Turns whatever the client raises over a broken answer into an UnusableAnswer, which is waited
    out. Around calls of huggingface_hub only. Raises: UnusableAnswer; HfHubHTTPError, errors of the
    disk and of the network as they are."""
    try:
        yield
    except HFValidationError:  # a ValueError
        raise
    except OSError as error:
        is_known = isinstance(error, HfHubHTTPError | ConnectionError | TimeoutError)
        if is_known or error.errno is not None:
            raise
        # FileMetadataError, LocalEntryNotFoundError, "Consistency check failed".
        raise UnusableAnswer(one_line(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusableAnswer(f"an answer that is not the Hub's ({one_line(error)})") from error


@contextlib.contextmanager
def refusals_as_user_errors(name: str) -> Iterator[None]:
    """Raises: UserError for a name or a token that the Hub refuses; other errors stay."""
    try:
        yield
    except (HfHubHTTPError, HFValidationError) as error:
        response = getattr(error, "response", None)
        if response is not None and response.status_code not in PERMANENT_REFUSALS:
            raise
        raise UserError(
            f"--push_to_hub to {name}: {one_line(error)[:600]} The token needs write access to it "
            "(https://huggingface.co/settings/tokens); see --hub_model_id."
        ) from error


def require_token() -> None:
    """Raises: UserError without a token, or if the Hub must not be asked."""
    if HF_HUB_OFFLINE:
        raise UserError(
            "--push_to_hub with HF_HUB_OFFLINE=1. Unset it, or leave out --push_to_hub."
        )
    if not huggingface_hub.get_token():
        raise UserError(
            "--push_to_hub needs a token. Run `hf auth login`, set HF_TOKEN, or append "
            "--push_to_hub False to keep the model here."
        )


def prove_write_access(repo_id: str) -> None:
    """Asks the Hub what it would do with a file, as a token's role tells little.
    Raises: HfHubHTTPError."""
    probe = huggingface_hub.CommitOperationAdd("run_info.json", b"{}")
    huggingface_hub.HfApi().preupload_lfs_files(repo_id, [probe])


def claim_repository(name: str, private: bool | None) -> str:
    """Creates the model repository if it is missing and proves, before any GPU work, that this
    token may write to it. private: --hub_private_repo. Returns its id. Raises: UserError."""
    require_token()
    api = huggingface_hub.HfApi()
    logger.info("hub: asking for %s", name)
    with refusals_as_user_errors(name), broken_answers_as_network_errors():
        repo_id = api.create_repo(name, private=private, exist_ok=True).repo_id
        prove_write_access(repo_id)
        user = api.whoami()["name"]
        is_public = private and not api.model_info(repo_id).private
    if is_public:
        raise UserError(
            f"--hub_private_repo: {repo_id} exists and is public. Make it private in its settings, "
            "or choose another --hub_model_id."
        )
    logger.info("hub: %s may be written by %s", repo_id, user)
    return repo_id


def describe_access(name: str) -> str:
    """What a dry run, which creates nothing, can say of a repository: 'alice/x', or that it does
    not exist yet. Raises: UserError if this token may not write to it."""
    require_token()
    api = huggingface_hub.HfApi()
    with refusals_as_user_errors(name), broken_answers_as_network_errors():
        user = api.whoami()
        repo_id = name if "/" in name else f"{user['name']}/{name}"
        if api.repo_exists(repo_id):
            prove_write_access(repo_id)
            return repo_id
        role = user["auth"]["accessToken"]["role"]
    # There is nothing to ask about but the token.
    if role == "read":
        raise UserError(
            f"--push_to_hub to {repo_id}: the token may only read. Make one that may write."
        )
    return f"{repo_id} does not exist yet, by the token ({role}) it"


def base_licence(name: str) -> str | None:
    """The licence that the base model's card states; never guessed."""
    if Path(name).exists():
        return None
    try:
        return huggingface_hub.ModelCard.load(name).data.to_dict().get("license")
    except Exception:  # no card, no network: all the same
        return None


def warn_of_private_data(repo_id: str, names: set[str]) -> None:
    """For --push_predictions: says so when transcripts of private or gated data go to a public
    repository. names: of the data sets."""
    api = huggingface_hub.HfApi()
    with broken_answers_as_network_errors():
        infos = [api.dataset_info(name) for name in sorted(names) if is_hub_name(name)]
        closed = [info.id for info in infos if info.private or info.gated]
        is_public = bool(closed) and not api.model_info(repo_id).private
    if is_public:
        logger.warning(
            "--push_predictions: transcripts of %s, not public, go to %s, public.", closed, repo_id
        )


def list_checkpoint_files(repo_id: str, commit: str) -> list[RepoFile]:
    """The files of the Hub's last-checkpoint; none if it has no such folder."""
    tree = huggingface_hub.HfApi().list_repo_tree(
        repo_id, "last-checkpoint", recursive=True, revision=commit
    )
    try:
        return [entry for entry in tree if isinstance(entry, RepoFile)]
    except EntryNotFoundError:
        return []


def has_weights(repo_id: str, commit: str) -> bool:
    """Whether a repository holds a model, beside its folders."""
    tree = huggingface_hub.HfApi().list_repo_tree(repo_id, revision=commit)
    return any(entry.path.endswith((".safetensors", ".bin")) for entry in tree)


def download_checkpoint(repo_id: str, output_dir: Path) -> None:
    """Makes the Hub's last-checkpoint (--hub_strategy checkpoint) the newest of output_dir.

    A repository without any model is that of a run which begins: one command then serves for the
    first start and for all others, as a job needs that may be killed and started again elsewhere.
    Raises: UserError if there is a model, but no complete checkpoint.
    """
    with broken_answers_as_network_errors():
        commit = huggingface_hub.HfApi().model_info(repo_id).sha
        if commit is None:
            raise UnusableAnswer(f"an answer that names no commit of {repo_id}")
        files = list_checkpoint_files(repo_id, commit)
        if not files and not has_weights(repo_id, commit):
            logger.warning("hub: %s has no checkpoint yet: the run begins.", repo_id)
            return
        size_in_gb = sum(file.size for file in files) / 1e9
        logger.info(
            "hub: fetching %s/last-checkpoint: %s, %.2f GB",
            repo_id,
            counted(len(files), "file"),
            size_in_gb,
        )
        # A folder of the commit's: tried again, it goes on, and never mixes two checkpoints.
        folder = output_dir / "_hub" / commit
        for file in files:
            huggingface_hub.hf_hub_download(repo_id, file.path, revision=commit, local_dir=folder)
    if not is_complete(folder / "last-checkpoint"):
        raise UserError(
            f"--resume_from_checkpoint hub: {repo_id} has no complete last-checkpoint. Use 'auto'."
        )
    adopt_checkpoint(folder / "last-checkpoint", output_dir)
    shutil.rmtree(output_dir / "_hub", ignore_errors=True)


def adopt_checkpoint(checkpoint: Path, output_dir: Path) -> None:
    """Gives a complete checkpoint its place and name in output_dir, unless that has it."""
    record = checkpoint / "trainer_state.json"
    state = json.loads(record.read_text(encoding="utf-8"))
    final = output_dir / f"checkpoint-{state['global_step']}"
    best = output_dir / Path(state["best_model_checkpoint"] or "none").name
    if best == final or is_complete(best):
        state["best_model_checkpoint"] = str(best)
    else:  # it has stayed on the other machine
        state["best_model_checkpoint"] = None
        state["best_metric"] = None
        state["best_global_step"] = None
    write_json(record, state)
    if not is_complete(final):
        shutil.rmtree(final, ignore_errors=True)
        checkpoint.rename(final)


def make_uploads(records: list[Any], args: Any) -> HubUploads | None:
    """Proves that the Hub can be written to, and fetches its last-checkpoint if that is to be
    continued. records: the data sets; the first one has the settings of the whole run. args: the
    TrainingArguments.
    Returns None if nothing is pushed, or not by this process. Raises: UserError."""
    output_dir = Path(args.output_dir)
    repo_id = args.hub_model_id
    uploads = None
    settings = records[0]
    if args.push_to_hub and args.process_index == 0:
        repo_id = claim_repository(repo_id or output_dir.resolve().name, args.hub_private_repo)
        uploads = HubUploads(
            repo_id=repo_id,
            output_dir=output_dir,
            strategy=str(args.hub_strategy.value),
            with_transcripts=settings.push_predictions,
            must_be_private=bool(args.hub_private_repo),
            wait_in_seconds=settings.max_network_wait_in_seconds,
        )
        if settings.push_predictions:
            warn_of_private_data(repo_id, {record.dataset_name for record in records})
    if args.resume_from_checkpoint == "hub" and args.process_index == 0:
        download_checkpoint(repo_id, output_dir)
    return uploads
