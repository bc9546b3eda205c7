"""How a run ends early: the user's mistakes and what happens outside it."""

import pickle


class UserError(ValueError):
    """Something that the user can mend: reported as one line with exit code 2."""


class RunEnded(Exception):
    """The run ends early for a reason outside it; `code` is its exit code (docs/long-runs.md has the table)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason


def one_line(error: Exception | str) -> str:
    """A library's message without its line breaks, ending in a full stop."""
    text = " ".join(str(error).split())
    return text if text.endswith(".") else f"{text}."


def portable(error: Exception) -> Exception:
    """The error itself if it survives pickling, else a RuntimeError that names its type."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # any failure to pickle means the same
        return RuntimeError(f"{type(error).__name__}: {error}")
