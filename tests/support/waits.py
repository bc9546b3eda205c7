"""How often a program fetches a value of a tensor: on a GPU it would wait for it each time."""

import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class FetchedValues(TorchDispatchMode):
    """Within, counts the calls of .item(), bool() and the like on tensors, by who calls.

    Only those of this thread: audio is decoded by others, which never see the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.callers: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            frames = [
                frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename
            ]
            caller = frames[-2]  # the last one is this function
            self.callers[f"{caller.filename.rpartition('/')[2]}:{caller.name}"] += 1
        return function(*args, **(kwargs or {}))


def fetched_in(function: Callable[..., Any], *args: Any) -> Counter[str]:
    """{file and function: how often} while function(*args) runs."""
    with FetchedValues() as fetched:
        function(*args)
    return fetched.callers
