"""Prints the rows of a data set as a run gets them: python print_rows.py NAME [FIELD=VALUE ...]

A process of its own, as the Hub's clients read HF_ENDPOINT when they are imported. Ends like a run:
with 2 and one line for a UserError, with its code for a RunEnded.
"""

import functools
import hashlib
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from speech_finetuning.base import network
from speech_finetuning.base.errors import RunEnded, UserError
from speech_finetuning.base.network import limit_silence, retry_on_network_error
from speech_finetuning.base.rejections import Rejection
from speech_finetuning.data.listed import WindowLimits
from speech_finetuning.data.reading import read_patiently
from speech_finetuning.data.shards import ShardReader, SourceRow
from speech_finetuning.data.sources import load_source
from speech_finetuning.training.compat import leave_retrying_to_us


def describe(row: SourceRow, limit_in_seconds: float) -> dict[str, str | None]:
    rejection = row.rejection
    content = None
    if rejection is None:
        try:
            data = read_patiently(row.audio, limit_in_seconds)
            content = hashlib.sha256(data).hexdigest()
        except Rejection as error:
            rejection = error
    reason = None if rejection is None else rejection.reason
    detail = None if rejection is None else rejection.detail
    return {"id": row.id, "text": row.text, "audio": content, "reason": reason, "detail": detail}


def main(name: str, *settings: str) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = {
        field: json.loads(value) for field, value in (word.split("=", 1) for word in settings)
    }
    limit_in_seconds = options.pop("limit_in_seconds", 60)
    if "window_limits" in options:
        options["window_limits"] = WindowLimits(**options["window_limits"])
    options.setdefault("split", "train")
    network.SHORTEST_SILENCE_IN_SECONDS = 0.1  # of two, for tests of silence
    limit_silence(limit_in_seconds)
    leave_retrying_to_us()
    try:
        source = retry_on_network_error(
            functools.partial(load_source, name, **options),
            limit_in_seconds=limit_in_seconds,
            task=f"opening {name}",
        )
        print(json.dumps({"revision": source.revision, "kind": source.kind}))
        for place in source.shards():
            for row in ShardReader(source, place, num_rows=0, wait_in_seconds=limit_in_seconds):
                print(json.dumps(describe(row, limit_in_seconds)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunEnded as ending:
        print(f"error: {ending.reason}", file=sys.stderr)
        return ending.code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
