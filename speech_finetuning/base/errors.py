"""How a run ends early: mistakes that the user can fix, and what happens outside the run."""

import enum
import errno
import pickle
from collections.abc import Callable
from typing import Any

# Each is a RuntimeError, or a kind of it (torch 2.13): of the allocator as an OutOfMemoryError; of
# CUDA itself, before the allocator has a say; of cuBLAS, whose workspace is allocated late; of NCCL
# ("Cuda failure 2 'out of memory'"), as a DistBackendError.
ON_THE_GPU = (
    "CUDA out of memory",
    "HIP out of memory",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "'out of memory'",
)
IN_RAM = ("DefaultCPUAllocator: can't allocate memory",)


# The disk, a user's share of it (as on clusters), and the size that a file may have.
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ExitCode(enum.IntEnum):
    """How the program ends, for shells and schedulers (docs/long-runs.md); 128 + n: by signal n."""

    DONE = 0
    CRASHED = 1
    REFUSED = 2
    DIVERGED = 70
    DISK_FULL = 73
    OUT_OF_MEMORY = 74
    TRY_AGAIN = 75
    NOT_UPLOADED = 76


class UserError(ValueError):
    """Something that the user can fix, told in a line, with exit code 2. Several arguments are
    several such things."""

    def __str__(self) -> str:
        return "\n".join(str(message) for message in self.args)


class Problems:
    """Mistakes that are found one after the other, to be told all at once."""

    def __init__(self) -> None:
        self.messages: dict[tuple[str, str], str] = {}

    def attempt(self, about: str, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), or None after noting its UserErrors.

        about: what is looked at. A flag that is wrong about one thing is noted once, although every
        split meets it again.
        """
        try:
            return function(*args)
        except UserError as error:
            for message in error.args:
                self.messages.setdefault((about, message.split(":")[0]), message)
        return None

    def raise_if_any(self) -> None:
        """Raises: UserError with all of them."""
        if self.messages:
            raise UserError(*self.messages.values())


class RunEnded(Exception):
    """The run ends early for a reason outside it. `code` is an ExitCode, or 128 + n after signal
    n."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class TimeIsOver(RunEnded):
    """The time that the user gave the run has passed: it ends as it was asked to."""

    def __init__(self) -> None:
        super().__init__(ExitCode.TRY_AGAIN, "the time of --max_train_time_in_hours is over")

    def __reduce__(self) -> tuple[type["TimeIsOver"], tuple[()]]:
        return TimeIsOver, ()  # RunEnded's two arguments would be handed to __init__


def one_line(error: Exception | str) -> str:
    """A library's message without its line breaks, ending in a full stop."""
    text = " ".join(str(error).split())
    return text if text.endswith(".") else f"{text}."


def portable(error: Exception) -> Exception:
    """The error itself if it survives pickling, else a RuntimeError that names its type."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever pickle raises, the error cannot cross a process border
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def memory_that_is_out(error: BaseException) -> str | None:
    """'GPU memory' or 'memory'; None for another error."""
    import torch  # here, because this module is needed before torch has been imported

    if isinstance(error, torch.OutOfMemoryError):
        return "GPU memory"
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, RuntimeError):
        text = str(error)
        if any(part in text for part in ON_THE_GPU):
            return "GPU memory"
        if any(part in text for part in IN_RAM):
            return "memory"
    return None
