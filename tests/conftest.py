"""Fixtures: a tiny Whisper and a small parquet dataset, made once per session; `train` runs main()
in this process."""

import functools
import gc
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

# Whatever imports torch is imported by the fixture that needs it: the process that starts the
# workers reads this file as well, and they would wait for its six seconds of imports.
if TYPE_CHECKING:
    from fork_server import ForkServer
    from hub_clients import HubClients

    from speech_finetuning.data.preprocessing import Preprocessor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# Timestamps of the 4 s window: the 1,300 others of 30 s take a sixth of the time of a small run, in
# which the library copies, reads and writes the tokens a dozen times.
SIZES = {"d_model": 16, "num_layers": 1, "num_timestamps": 201}


def pytest_collection_finish() -> None:
    """What has been imported stays. Each training collects garbage once, which takes a third of a
    second of walking through the libraries' own objects, and hundreds of tests train."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, those of several processes before all: they share fixtures that take a
    minute, and at the end one worker would wait for the other."""
    items.sort(key=place_in_order)


def place_in_order(item: pytest.Item) -> int:
    if item.path.name == "test_processes.py":
        return 0
    return 1 if item.get_closest_marker("slow") else 2


@pytest.fixture(scope="session", autouse=True)
def garbage_is_left_to_python() -> Iterator[None]:
    """accelerate 1.15 collects all garbage at the beginning and the end of each training: a ninth of
    the time of the tests that train (py-spy, 4,010 samples of tests/training and test_train.py)."""
    import accelerate.utils.memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate.utils.memory, "gc", SimpleNamespace(collect=int))
        yield


@pytest.fixture(autouse=True)
def no_log_of_an_earlier_test() -> Iterator[None]:
    """Each test sets up the log of its own runs."""
    from speech_finetuning.cli.terminal import ScreenHandler

    yield
    root = logging.getLogger()
    root.handlers = [entry for entry in root.handlers if not isinstance(entry, ScreenHandler)]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Multilingual, width 16, one layer, a 4 s window, 64 target positions."""
    from speech_finetuning.cli import demonstration

    folder = tmp_path_factory.mktemp("model")
    return demonstration.make_model(folder, **SIZES)


@pytest.fixture(scope="session")
def full_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with timestamps to 30 s, which a random model puts anywhere."""
    from speech_finetuning.cli import demonstration

    folder = tmp_path_factory.mktemp("model.full")
    return demonstration.make_model(folder, d_model=16, num_layers=1)


@pytest.fixture(scope="session")
def english_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from speech_finetuning.cli import demonstration

    folder = tmp_path_factory.mktemp("model.en")
    return demonstration.make_model(folder, **SIZES, multilingual=False)


@pytest.fixture(scope="session")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet: 40 training, 8 validation and 8 test rows, each split in two files."""
    from speech_finetuning.cli import demonstration

    return demonstration.make_speech(
        tmp_path_factory.mktemp("speech"), {"train": 40, "validation": 8, "test": 8}
    )


@pytest.fixture(scope="session")
def hub_clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator["HubClients"]:
    """For all files whose clients wait as long as users' do: a server imports for five seconds."""
    from hub_clients import HubClients

    with HubClients(tmp_path_factory.mktemp("home")) as clients:
        yield clients


@pytest.fixture(scope="session")
def forks() -> Iterator["ForkServer"]:
    """Processes whose imports are done."""
    from fork_server import ForkServer

    with ForkServer() as server:
        yield server


@pytest.fixture(scope="session")
def forked_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An interpreter whose imports are done, for launchers, recipes and notebooks."""
    from forked_python import ForkedPython

    with ForkedPython(tmp_path_factory.mktemp("python")) as executable:
        yield str(executable)


@pytest.fixture
def flags(tiny_model: Path, speech: Path, tmp_path: Path) -> list[str]:
    """What every small run needs."""
    values = {
        "model_name_or_path": tiny_model,
        "dataset_name": speech,
        "language": "es",
        "output_dir": tmp_path / "output",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "generation_max_length": 12,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "report_to": "none",
        "report_clips": 0,  # matplotlib and librosa take seconds
    }
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


@pytest.fixture
def train(flags: list[str]) -> Callable[..., dict[str, float]]:
    """train("--max_steps 2") runs main() with the flags above and these, which override them."""

    return functools.partial(run_main, flags)


def run_main(flags: list[str], more: str) -> dict[str, float]:
    import run_speech_recognition_seq2seq_streaming as script

    return script.main([*flags, *more.split()])


@pytest.fixture(scope="session")
def untouched_preprocessor(tiny_model: Path) -> "Preprocessor":
    from preprocessors import make_preprocessor

    return make_preprocessor(tiny_model)


@pytest.fixture
def preprocessor(untouched_preprocessor: "Preprocessor") -> "Preprocessor":
    """A test may change its limits. The tokenizer, which none changes, takes 24 ms to load: 11 s of
    463 tests."""
    return replace(untouched_preprocessor)
