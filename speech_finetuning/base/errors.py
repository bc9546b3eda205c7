"""How a run ends early: mistakes that the user can mend, and what happens outside the run."""

import pickle


class UserError(ValueError):
    """Something that the user can mend: reported as one line with exit code 2."""


class RunEnded(Exception):
    """The run ends early for a reason outside it. `code` is its exit code, see docs/long-runs.md."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


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
