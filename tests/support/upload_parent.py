"""What a trainer does with an upload, without its model: python upload_parent.py REPO FOLDER THEN

THEN is "finish": waits for the upload and prints how it ended; "wait": does nothing for ten minutes;
"fork and wait": the same, and so does a worker that it forks.
"""

import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from speech_finetuning.base.errors import RunEnded
from speech_finetuning.sharing.uploads import HubUploads

TEN_MINUTES_IN_SECONDS = 600.0


def main(repo_id: str, folder: str, then: str) -> None:
    uploads = HubUploads(
        repo_id=repo_id,
        output_dir=Path("out"),
        strategy="end",
        with_transcripts=False,
        must_be_private=False,
        wait_in_seconds=TEN_MINUTES_IN_SECONDS,
    )
    uploads.submit(Path(folder), "card")
    if then == "fork and wait":
        os.fork()
    if then != "finish":
        threading.Event().wait(TEN_MINUTES_IN_SECONDS)
    try:
        uploads.finish()
        print("done")
    except RunEnded as ending:
        print(ending.code, ending.reason)


if __name__ == "__main__":
    main(*sys.argv[1:])
