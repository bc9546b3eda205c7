"""The worker that reads ahead fails in every way it can, and the training goes on or says why not."""

import multiprocessing
import multiprocessing.util
import os
import resource
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base import threads
from speech_finetuning.base.errors import RunEnded
from speech_finetuning.base.threads import FORK_LOCK, no_thread_reads
from speech_finetuning.cli import demonstration
from speech_finetuning.data.items import StreamItem
from speech_finetuning.training import reading_worker
from speech_finetuning.training.checkpoints import is_complete
from speech_finetuning.training.trainer import SpeechTrainer

RUN = "--do_train --max_steps 8 --data_report_samples 0 --dataloader_num_workers 1"


@pytest.fixture(scope="module")
def dropout_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights depend on torch's random numbers as well."""
    return demonstration.make_model(
        tmp_path_factory.mktemp("dropout"), d_model=16, num_layers=1, dropout=0.2
    )


@pytest.fixture(scope="module")
def undisturbed(
    dropout_model: Path, speech: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """The weights of a run whose worker lives."""
    output_dir = tmp_path_factory.mktemp("undisturbed")
    words = f"--model_name_or_path {dropout_model} --dataset_name {speech} --language es {RUN}"
    words += f" --per_device_train_batch_size 4 --report_to none --output_dir {output_dir}"
    script.main(words.split())
    return load_file(output_dir / "model.safetensors")


def same(weights: dict[str, torch.Tensor], folder: Path) -> bool:
    found = load_file(folder / "model.safetensors")
    return all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def end_worker(number: signal.Signals) -> None:
    """Returns when it is dead, so that a handler of SIGCHLD that raises has raised here."""
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, number)
    worker.join(30)


class Kill(transformers.TrainerCallback):
    """A signal to the worker after some steps, before the trainer is done with the step."""

    def __init__(self, number: signal.Signals, steps: set[int]) -> None:
        self.number = number
        self.steps = steps

    def on_step_end(self, args: object, state: transformers.TrainerState, *_: object, **__: object):
        if state.global_step in self.steps:
            end_worker(self.number)


def with_callback(monkeypatch: pytest.MonkeyPatch, callback: transformers.TrainerCallback) -> None:
    """Of the next training."""
    get_loader = SpeechTrainer.get_train_dataloader

    def get(self: SpeechTrainer) -> object:
        self.add_callback(callback)
        return get_loader(self)

    monkeypatch.setattr(SpeechTrainer, "get_train_dataloader", get)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_another_worker_goes_on_at_the_next_row(
    train: Callable,
    flags: list[str],
    dropout_model: Path,
    undisturbed: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: signal.Signals,
):
    """The same weights to the bit, and each row counted once."""
    with_callback(monkeypatch, Kill(number, {3}))
    metrics = train(f"{RUN} --model_name_or_path {dropout_model}")
    assert caplog.text.count(f"was killed by {number.name}: another one goes on") == 1
    assert metrics["train_rows"] == 32
    assert same(undisturbed, Path(flags[flags.index("--output_dir") + 1]))
    # torch's would raise, wherever the run is.
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL


def test_workers_that_die_one_after_the_other_end_the_run_with_a_checkpoint(
    train: Callable, flags: list[str], monkeypatch: pytest.MonkeyPatch
):
    with_callback(monkeypatch, Kill(signal.SIGKILL, {2, 4}))
    with pytest.raises(RunEnded, match="was killed by SIGKILL, like the one before it") as ending:
        train(RUN)
    assert ending.value.code == 75
    assert is_complete(Path(flags[flags.index("--output_dir") + 1]) / "checkpoint-4")


def test_a_batch_that_cannot_be_shared_is_copied(
    train: Callable,
    flags: list[str],
    dropout_model: Path,
    undisturbed: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """As in a container with little shared memory: no file of it may have more than 64 kB."""
    start = reading_worker.start_worker

    def start_with_little_memory(*args: float) -> None:
        start(*args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    monkeypatch.setattr(reading_worker, "start_worker", start_with_little_memory)
    train(f"{RUN} --model_name_or_path {dropout_model}")
    assert caplog.text.count("batches cannot be shared with the process that reads them") == 1
    assert "unable to resize file" in caplog.text
    assert "another one goes on" not in caplog.text
    assert same(undisturbed, Path(flags[flags.index("--output_dir") + 1]))


class Unsendable:
    """Breaks in the thread that hands batches over."""

    def __reduce__(self) -> Any:
        raise OSError("no way to pickle this")


def test_a_batch_that_cannot_be_handed_over_is_not_waited_for(
    train: Callable, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    """multiprocessing forgets it, and torch waits without end."""
    collate = script.TrainCollator.__call__

    def break_some(self: script.TrainCollator, items: list[StreamItem]) -> dict[str, Any]:
        batch = collate(self, items)
        position = batch["step_info"].position
        return batch | ({"broken": Unsendable()} if position.row >= 12 else {})

    monkeypatch.setattr(script.TrainCollator, "__call__", break_some)
    with pytest.raises(RunEnded, match="has ended with code 1, like the one before it") as ending:
        train(RUN)
    assert ending.value.code == 75
    assert capfd.readouterr().err.count("OSError: no way to pickle this") == 2


def test_a_long_folder_for_temporary_files_has_no_sockets(
    train: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """On a cluster TMPDIR may be so long that no path of a socket has room in it."""
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    # Where this process has its folder already.
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    train(f"{RUN} --max_steps 2")
    assert "copied" not in caplog.text
    sockets = Path(multiprocessing.util.get_temp_dir())
    assert sockets.parent == Path("/tmp") and not any(folder.glob("pymp-*"))
    assert tempfile.gettempdir() == str(folder)


def test_workers_leave_no_folder_behind(train: Callable, monkeypatch: pytest.MonkeyPatch):
    """Theirs is that of this process, which removes it at its end."""
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    before = set(Path(tempfile.gettempdir()).glob("pymp-*"))
    train(f"{RUN} --max_steps 2")
    (own,) = set(Path(tempfile.gettempdir()).glob("pymp-*")) - before
    assert own == Path(multiprocessing.util.get_temp_dir())


def test_no_worker_is_forked_while_a_thread_reads(
    train: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Neither the first one nor another in its place: what the thread locks would stay locked."""
    with_callback(monkeypatch, Kill(signal.SIGKILL, {3}))
    are_held: list[bool] = []
    start = DataLoader.__iter__

    def note(self: DataLoader) -> Any:
        if self.num_workers:
            are_held.append(FORK_LOCK.locked())
        return start(self)

    monkeypatch.setattr(DataLoader, "__iter__", note)
    train(RUN)
    assert are_held == [True, True] and "another one goes on" in caplog.text
    assert not FORK_LOCK.locked()


def test_a_fork_waits_for_the_row_that_is_read_but_not_for_ever(monkeypatch: pytest.MonkeyPatch):
    with FORK_LOCK:
        monkeypatch.setattr(threads, "LONGEST_WAIT_TO_FORK_IN_SECONDS", 0.05)
        with no_thread_reads():
            assert FORK_LOCK.locked()
        assert FORK_LOCK.locked()  # it is the reader's
    read = threading.Timer(0.2, FORK_LOCK.release)
    FORK_LOCK.acquire()
    monkeypatch.setattr(threads, "LONGEST_WAIT_TO_FORK_IN_SECONDS", 60)
    read.start()
    with no_thread_reads():
        assert read.finished.is_set()


def test_shared_memory_that_was_full_is_not_asked_again(monkeypatch: pytest.MonkeyPatch):
    """torch leaves a file there each time, which would be many in some days."""
    tries: list[int] = []

    def fail(self: torch.Tensor) -> None:
        tries.append(1)
        raise RuntimeError("full")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    collate = reading_worker.CollateToShare(lambda items: {"frames": torch.ones(2), "n": 1})
    batches = [collate([]) for _ in range(3)]
    assert len(tries) == 1
    assert all(batch[reading_worker.COPIED_BECAUSE] == "full." for batch in batches)
    assert all(
        torch.equal(reading_worker.with_tensors(b)["frames"], torch.ones(2)) for b in batches
    )
