"""Reading ahead and mapping in order with threads."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

MAX_BLOCK_IN_BYTES = 512 * 2**20  # bounds the shuffle block's memory, whatever the rows' size


def read_ahead(iterator: Iterator[Any], size_of: Callable[[Any], int]) -> Iterator[Any]:
    """The same items, fetched by a thread while earlier ones are used: one ahead, or two while they are small. With
    one, the short last block of a pass would be used up long before the next pass's first has come over a network."""
    reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
    pending = deque([reader.submit(next, iterator, None)])
    try:
        while (item := pending.popleft().result()) is not None:
            while len(pending) < (2 if size_of(item) < MAX_BLOCK_IN_BYTES // 4 else 1):
                pending.append(reader.submit(next, iterator, None))
            yield item
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


def map_in_order(
    function: Callable[[Any], Any], items: Iterable[tuple], num_threads: int
) -> Iterator[tuple]:
    """(tag, function(item)) for (tag, item) in order, computed by threads with a bounded number in flight."""
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        submitted = ((tag, pool.submit(function, item)) for tag, item in items)
        pending = deque(itertools.islice(submitted, 4 * num_threads))
        while pending:
            tag, future = pending.popleft()
            yield tag, future.result()
            pending.extend(itertools.islice(submitted, 1))


def num_usable_cores(world_size: int) -> int:
    """This process's share of the cores that it may run on, at least 1 and at most 8."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(
        1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    )  # those of this machine
