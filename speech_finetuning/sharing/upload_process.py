"""The process that uploads one snapshot to a repository that already exists. HubUploads starts it.

It is a process of its own because a process can be killed: a server that never answers then blocks
neither training nor exit. It is not the `hf upload` command, which creates a missing repository
(huggingface_hub 2.4, cli/upload.py): one that its owner deletes while the model is trained would
come back, public.
"""

import argparse
import sys

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from speech_finetuning.base.children import end_with_parent
from speech_finetuning.base.errors import one_line

# Exit codes.
FAILED = 1  # another try may succeed
REFUSED = 3  # the Hub says no, and will hardly change its mind

# Unauthorised, payment required, forbidden, not found, too large, no storage left.
PERMANENT_REFUSALS = (401, 402, 403, 404, 413, 507)


class RefusedUpload(Exception):
    """Our own reason not to upload."""


def upload(repo_id: str, folder: str, must_be_private: bool) -> None:
    """Commits the folder's files to the repository.
    Raises: RefusedUpload, HfHubHTTPError, and what a network does."""
    api = huggingface_hub.HfApi()
    if must_be_private and not api.model_info(repo_id).private:
        raise RefusedUpload(f"{repo_id} is public now, and --hub_private_repo asks for private")
    api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload model")


def reason_and_code(error: Exception, repo_id: str) -> tuple[str, int]:
    """What is said about a failed upload, and this process's exit code."""
    if isinstance(error, RefusedUpload):
        return str(error), REFUSED
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} is gone, or this token may no longer see it", REFUSED
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        is_permanent = error.response.status_code in PERMANENT_REFUSALS
        return one_line(error), REFUSED if is_permanent else FAILED
    return f"{type(error).__name__}: {one_line(error)}", FAILED


def main(argv: list[str] | None = None) -> int:
    """Uploads; the reason of a failure is the last line on stderr. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repo_id")
    parser.add_argument("folder")
    parser.add_argument("--must_be_private", action="store_true")
    parser.add_argument("--parent_pid", type=int, required=True)
    args = parser.parse_args(argv)
    end_with_parent(args.parent_pid)
    try:
        upload(args.repo_id, args.folder, args.must_be_private)
    except Exception as error:  # whatever it is, the trainer must be told
        reason, code = reason_and_code(error, args.repo_id)
        sys.stderr.write(f"\n{reason}\n")
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
