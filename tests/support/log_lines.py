"""What the log of a run says, for tests that wait for it."""

import re
import time
from pathlib import Path

# The line of a step: clock, step, loss, ...
STEP = re.compile(r"^(?:\d\d:\d\d:\d\d )? *\d+ +(?:\d+\.\d{4}|nan|inf) ", re.M)
LONGEST_WAIT_IN_SECONDS = 120.0


def count_steps(log: Path) -> int:
    """How many steps were logged."""
    return len(STEP.findall(log.read_text(errors="replace")))


def wait_for_steps(log: Path, count: int) -> None:
    """Until so many steps were logged."""
    deadline = time.monotonic() + LONGEST_WAIT_IN_SECONDS
    while count_steps(log) < count:
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-2000:]
        time.sleep(0.02)
