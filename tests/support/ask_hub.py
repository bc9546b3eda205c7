"""Calls a function of sharing.hub as the script does, and prints what comes of it.

    python ask_hub.py LIMIT_IN_SECONDS FUNCTION ARGUMENT ...

The script's own start, without its model and data.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from speech_finetuning.base import network
from speech_finetuning.base.errors import RunEnded, UserError
from speech_finetuning.base.network import limit_silence, retry_on_network_error
from speech_finetuning.sharing import hub

ARGUMENTS = {"None": None, "True": True}


def main(limit: str, name: str, *words: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    limit_in_seconds = float(limit)
    network.SHORTEST_SILENCE_IN_SECONDS = 0.3  # of two, for tests of silence
    limit_silence(limit_in_seconds)
    function = getattr(hub, name)
    arguments = [ARGUMENTS.get(word, word) for word in words]
    if function is hub.download_checkpoint:
        arguments[1] = Path(words[1])
    try:
        result = retry_on_network_error(
            function, *arguments, limit_in_seconds=limit_in_seconds, task="asking the Hub"
        )
        print("result:", result)
    except RunEnded as ending:
        print(ending.code, ending.reason)
    except UserError as error:
        print(2, error)


if __name__ == "__main__":
    main(*sys.argv[1:])
