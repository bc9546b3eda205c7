"""With this folder in PYTHONPATH a Python process sleeps at most SLEEPS_AT_MOST seconds at a time:
the back-offs of libraries, which a test would wait for in vain. Threads wait for events as ever."""

import os
import time

SECONDS = float(os.environ.get("SLEEPS_AT_MOST", "0.05"))
sleep = time.sleep


def sleep_shortly(wished_in_seconds: float) -> None:
    sleep(min(wished_in_seconds, SECONDS))


time.sleep = sleep_shortly
