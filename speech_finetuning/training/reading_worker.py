"""The worker that reads ahead, and a training that goes on when it fails.

The DataLoader and multiprocessing (torch 2.13, Python 3.13) take three failures badly:

* A batch that cannot be handed over is dropped, and the training waits for it for ever: /dev/shm is
  full (it has 64 MB in Docker), or TMPDIR so long that a socket's path is too long (on clusters).
* The death of a worker, whose process the kernel kills when memory runs out, raises out of a signal
  handler, in the middle of whatever the training does.
* Each worker leaves an empty folder in /tmp.

Here a batch goes through the pipe when /dev/shm is full, and another worker goes on at the next row.
"""

import functools
import logging
import multiprocessing
import multiprocessing.queues
import multiprocessing.util
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader

from speech_finetuning.base.errors import ExitCode, RunEnded, one_line
from speech_finetuning.base.network import limit_silence
from speech_finetuning.base.shutdown import ignore_signals
from speech_finetuning.base.threads import no_thread_reads
from speech_finetuning.data.items import StepInfo, StreamItem
from speech_finetuning.data.stream import SpeechStream
from speech_finetuning.training.compat import leave_retrying_to_us

logger = logging.getLogger(__name__)

# A path of a socket has 108 bytes on Linux and 104 on macOS, with the zero at its end, of which
# multiprocessing adds "/pymp-abcdefgh/listener-abcdefgh" to the folder for temporary files.
MAX_SOCKET_FOLDER_LENGTH = 104 - 1 - len("/pymp-abcdefgh/listener-abcdefgh")
SHORT_FOLDER = "/tmp"
# A worker that dies sooner than this after another one would die for ever.
MIN_BATCHES_BETWEEN_DEATHS = 50
SECONDS_TO_DIE = 2.0  # between the end of a process's connections and its own
COPIED_BECAUSE = "copied_because"  # in a batch: why it was copied through the pipe


# --------------------------------------------------------------------------------- in the training
class ReadAheadLoader(DataLoader):
    """The batches of a SpeechStream, prepared ahead by one worker (or by none)."""

    def __init__(
        self,
        stream: SpeechStream | list[StreamItem],
        *,
        max_network_wait_in_seconds: float,
        **arguments: Any,
    ) -> None:
        if arguments["num_workers"]:
            arguments["collate_fn"] = CollateToShare(arguments["collate_fn"])
        super().__init__(
            cast(Any, stream),
            worker_init_fn=functools.partial(start_worker, max_network_wait_in_seconds),
            **arguments,
        )

    def __iter__(self) -> Any:
        return ReadAhead(self) if self.num_workers else super().__iter__()

    def start(self) -> tuple[Iterator[dict[str, Any]], BaseProcess]:
        """The batches of a new worker, and the worker, which begins at the stream's position."""
        choose_socket_folder()
        others = set(multiprocessing.active_children())
        with no_thread_reads():
            batches = super().__iter__()
        forget_handler_of_deaths()
        (worker,) = set(multiprocessing.active_children()) - others
        return cast(Any, batches), worker


class ReadAhead:
    """An iterator over the batches of one worker after the other."""

    def __init__(self, loader: ReadAheadLoader) -> None:
        self.loader = loader
        self.num_batches = 0  # of the present worker
        self.num_deaths = 0
        self.has_warned = False  # of copies
        self.batches: Iterator[dict[str, Any]] | None
        self.batches, self.worker = loader.start()

    def __iter__(self) -> "ReadAhead":
        return self

    def __next__(self) -> dict[str, Any]:
        """Raises: RunEnded(75) if workers die again and again."""
        batch = self.next_unless_dead()
        while batch is None:
            self.replace_worker()
            batch = self.next_unless_dead()
        self.num_batches += 1
        reason = batch.pop(COPIED_BECAUSE, None)
        if reason is not None:
            self.warn_of_copies(reason)
            batch = with_tensors(batch)
        self.note_position(batch["step_info"])
        return batch

    def note_position(self, info: StepInfo) -> None:
        """Where another worker would go on. A dry run's rows are a list, which has no place."""
        stream = self.loader.dataset
        if isinstance(stream, SpeechStream) and info.position is not None:
            stream.position = info.position

    def next_unless_dead(self) -> dict[str, Any] | None:
        """The next batch; None if the worker has died. What it had ready is lost with it: a batch is
        fetched from the process that has made it."""
        assert self.batches is not None
        try:
            return next(self.batches)
        except (RuntimeError, OSError, EOFError):
            self.worker.join(SECONDS_TO_DIE)
            if self.worker.exitcode is None:
                raise
            return None

    def replace_worker(self) -> None:
        """Another worker goes on after the last batch that was taken."""
        how = describe_exit(self.worker.exitcode)
        if self.num_deaths > 0 and self.num_batches < MIN_BATCHES_BETWEEN_DEATHS:
            raise RunEnded(
                ExitCode.TRY_AGAIN,
                f"the process that reads the data {how}, like the one before it{self.advice()}. To go "
                "on, start the same command again.",
            )
        logger.warning(
            "the process that reads the data %s: another one goes on at the next row%s.",
            how,
            self.advice(),
        )
        self.num_deaths += 1
        self.num_batches = 0
        self.batches = None  # ends its threads
        random_state = torch.get_rng_state()  # of which a loader draws a seed
        self.batches, self.worker = self.loader.start()
        torch.set_rng_state(random_state)

    def advice(self) -> str:
        """What to do about a kill that was the kernel's, most likely."""
        if self.worker.exitcode != -getattr(signal, "SIGKILL", 0):
            return ""
        return (
            "; if the machine is short of memory, lower --shuffle_buffer_size, "
            "--num_decoding_threads or --dataloader_prefetch_factor"
        )

    def warn_of_copies(self, reason: str) -> None:
        """Once."""
        if not self.has_warned:
            logger.warning(
                "batches cannot be shared with the process that reads them, and are copied, which "
                "takes longer: %s In Docker, start the container with --shm-size 2g.",
                reason,
            )
        self.has_warned = True


def with_tensors(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with tensors where `CollateToShare` had to leave arrays."""
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in batch.items()
    }


def describe_exit(code: int | None) -> str:
    """'was killed by SIGKILL' or 'has ended with code 1'."""
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"has ended with code {code}"


def choose_socket_folder() -> None:
    """Makes the folder for multiprocessing's sockets, which workers inherit and this process removes
    when it ends: with a short path, whatever TMPDIR is (as multiprocessing itself does from Python
    3.14 on, for some of its sockets)."""
    usual = tempfile.tempdir
    is_too_long = len(os.fsencode(tempfile.gettempdir())) > MAX_SOCKET_FOLDER_LENGTH
    if is_too_long and os.access(
        SHORT_FOLDER, os.W_OK
    ):  # there is none on Windows, nor are sockets
        tempfile.tempdir = SHORT_FOLDER
    try:
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = usual


def forget_handler_of_deaths() -> None:
    """torch sets a handler of SIGCHLD, once in a process, that raises wherever this process is, be it
    half-way through a step or a save. Without it a death is met where a batch is missing."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    if hasattr(signal, "SIGCHLD") and is_main_thread:  # elsewhere torch sets none
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


# ----------------------------------------------------------------------------------- in the worker
def start_worker(max_network_wait_in_seconds: float, worker_id: int) -> None:
    """First thing in the worker, which is spawned on macOS and Windows: such a process has inherited
    no setting of this one."""
    ignore_signals(worker_id)
    limit_silence(max_network_wait_in_seconds)
    leave_retrying_to_us()
    queue = cast(Any, multiprocessing.queues.Queue)
    queue._on_queue_feeder_error = end_worker


class CollateToShare:
    """Batches with their tensors in shared memory, as the queue would put them there, or once that
    is full as arrays, which go through the pipe. It is not tried again: torch (2.13) leaves an empty
    file in /dev/shm each time."""

    def __init__(self, collate: Callable[[list[StreamItem]], dict[str, Any]]) -> None:
        self.collate = collate
        self.reason: str | None = None  # for copies

    def __call__(self, items: list[StreamItem]) -> dict[str, Any]:
        batch = self.collate(items)
        if self.reason is None:
            self.try_to_share(batch)
        if self.reason is None:
            return batch
        values = {name: as_array(value) for name, value in batch.items()}
        return values | {COPIED_BECAUSE: self.reason}

    def try_to_share(self, batch: dict[str, Any]) -> None:
        try:
            for value in batch.values():
                if isinstance(value, torch.Tensor):
                    value.share_memory_()
        except (OSError, RuntimeError) as error:
            self.reason = one_line(error)


def as_array(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else value


def end_worker(queue: Any, error: Exception, item: Any) -> None:
    """Called by a thread of the queue when an item could not be handed over, instead of its own
    method, which prints the error and forgets the item: of a death the training learns, but for an
    item that is lost it would wait."""
    traceback.print_exception(error)
    os._exit(1)
