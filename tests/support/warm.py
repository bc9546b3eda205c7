"""What all forks of a server have in common, done once before the first fork."""

import gc
import importlib
from pathlib import Path
from types import SimpleNamespace

PROJECT = Path(__file__).parents[2]
# What a run imports when it comes to it: half of a fork's time went into these.
IMPORTED_LATER = (
    "aiohttp",
    "datasets.io.generator",
    "fsspec.implementations.http",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "multiprocessing.popen_fork",
    "multiprocessing.queues",
    "rich.progress",
    "scipy.io",
    "torch.utils.serialization.config",
)


def warm_up() -> None:
    """Imports the script and what it imports later, and reads the flags of the command line. Garbage
    is left alone, as in conftest.py: walking through the libraries' own objects would also copy
    them into each fork."""
    for name in ("run_speech_recognition_seq2seq_streaming", *IMPORTED_LATER):
        importlib.import_module(name)
    import accelerate.utils.memory

    from speech_finetuning.cli.source_flags import read_parser

    read_parser(PROJECT / "run_speech_recognition_seq2seq_streaming.py")
    accelerate.utils.memory.gc = SimpleNamespace(collect=int)
    gc.collect()
    gc.freeze()
