"""Reading ahead and mapping in order with threads; and no fork while one of them reads."""

import contextlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

LARGE_ITEM_IN_BYTES = 128 * 2**20  # of which only one is read ahead
MAX_DEFAULT_THREADS = 8
LONGEST_STOP_IN_SECONDS = 5.0
LONGEST_WAIT_TO_FORK_IN_SECONDS = 60.0
# What a thread locks when a process is forked stays locked in the fork, which waits for it for ever.
# Held by a thread that reads beside the training, row by row, and by what is about to fork.
FORK_LOCK = threading.Lock()


@contextlib.contextmanager
def no_thread_reads() -> Iterator[None]:
    """For a fork: after the row that a thread is at, or when time is up."""
    is_held = FORK_LOCK.acquire(timeout=LONGEST_WAIT_TO_FORK_IN_SECONDS)
    try:
        yield
    finally:
        if is_held:
            FORK_LOCK.release()


def read_ahead(iterator: Iterator[Any], size_of: Callable[[Any], int]) -> Iterator[Any]:
    """The same items, fetched by a thread while earlier ones are used.

    One item ahead, or two while items are small: with only one, the short last block of a pass
    would be used up long before the first block of the next pass has come over a network.
    size_of: the memory that an item takes, in bytes. Raises: the iterator's errors.
    """
    reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
    pending = deque([reader.submit(next, iterator, None)])
    try:
        while (item := pending.popleft().result()) is not None:
            num_ahead = 2 if size_of(item) < LARGE_ITEM_IN_BYTES else 1
            while len(pending) < num_ahead:
                pending.append(reader.submit(next, iterator, None))
            yield item
    finally:
        stop(reader, pending)


def stop(pool: ThreadPoolExecutor, futures: Iterable[Future[Any]]) -> None:
    """Ends a pool's threads, and waits for what they are at, but not for a network that is gone.

    A process that is forked while a thread holds a lock, such as the one of the HTTP client's
    connections (huggingface_hub 2.4 closes them in each fork), waits for it for ever. futures: all
    that have been submitted and not yet used.
    """
    pool.shutdown(wait=False, cancel_futures=True)
    running = [future for future in futures if not future.cancelled()]
    wait(running, timeout=LONGEST_STOP_IN_SECONDS)


def map_in_order(
    function: Callable[[Any], Any], items: Iterable[tuple], num_threads: int
) -> Iterator[tuple]:
    """(tag, function(item)) for every (tag, item), in order, computed by threads.

    At most 4 items a thread are in flight, which bounds the memory. Raises: the function's errors.
    """
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        submitted = ((tag, pool.submit(function, item)) for tag, item in items)
        pending = deque(itertools.islice(submitted, 4 * num_threads))
        while pending:
            tag, future = pending.popleft()
            yield tag, future.result()
            pending.extend(itertools.islice(submitted, 1))


def num_usable_cores(world_size: int) -> int:
    """This process's share of the cores that it may run on: at least 1 and at most 8.

    world_size: of processes; those on this machine share its cores (torchrun says how many).
    """
    if hasattr(os, "sched_getaffinity"):
        num_cores = len(os.sched_getaffinity(0))
    else:
        num_cores = os.cpu_count() or 1
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return max(1, min(MAX_DEFAULT_THREADS, num_cores // num_local_processes))
