"""A terminal in a test: a real pseudo-terminal for the process, pyte for what a person sees of it.

terminal = Terminal(num_columns=80)
process = server.start(words, log=terminal.path, environment=terminal.environment)
code = terminal.watch(process)
assert terminal.lines()[-1] == ...
"""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from pathlib import Path
from typing import Protocol

import pyte

BAR = "━"
MANY_LINES = 300  # of the emulator, so that nothing scrolls away


class Process(Protocol):
    def poll(self) -> int | None: ...


class StrictScreen(pyte.Screen):
    """Notes the lines that reach the right edge and go on."""

    wrapped: list[str]

    def draw(self, data: str) -> None:
        for character in data:
            if self.cursor.x >= self.columns:
                self.wrapped.append(self.display[self.cursor.y])
            super().draw(character)


class Terminal:
    """Of so many columns. `path` is what a process opens as its stdin, stdout and stderr."""

    def __init__(self, num_columns: int) -> None:
        self.master, self.slave = pty.openpty()
        size = struct.pack("HHHH", 50, num_columns, 0, 0)
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, size)
        self.path = Path(os.ttyname(self.slave))
        self.environment = {"TERM": "xterm-256color", "COLORTERM": "", "NO_COLOR": ""}
        self.screen = StrictScreen(num_columns, MANY_LINES)
        self.screen.wrapped = []
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.rows_of_bars: set[int] = set()
        self.most_bars = 0  # that were to be seen at once
        self.bars: list[str] = []  # the line of the bar, each time that it was drawn

    def read(self) -> bool:
        """Draws what has been written since. Whether there was anything."""
        if not select.select([self.master], [], [], 0.05)[0]:
            return False
        data = os.read(self.master, 65_536)
        self.raw += data
        self.stream.feed(data)
        rows = sorted(self.rows_of_bars | self.screen.dirty)
        self.screen.dirty.clear()
        bars = {row: line for row in rows if BAR in (line := self.line(row))}
        self.rows_of_bars = set(bars)
        self.most_bars = max(self.most_bars, len(bars))
        self.bars += list(bars.values())[-1:]
        return True

    def line(self, row: int) -> str:
        buffer = self.screen.buffer[row]
        return "".join(buffer[column].data for column in range(self.screen.columns)).rstrip()

    def watch(self, process: Process, limit_in_seconds: float = 120) -> int:
        """Draws until the process has ended. Returns its exit code."""
        deadline = time.monotonic() + limit_in_seconds
        while True:
            code = process.poll()
            while self.read():
                pass
            if code is not None:
                return code
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a process in a terminal", limit_in_seconds)

    def wait_for(self, text: str, limit_in_seconds: float = 60) -> None:
        """Draws until the text is to be seen."""
        deadline = time.monotonic() + limit_in_seconds
        while text not in "\n".join(self.screen.display):
            self.read()
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"{text!r} in a terminal", limit_in_seconds)

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def lines(self) -> list[str]:
        """What is to be seen now, without the empty lines below."""
        lines = [line.rstrip() for line in self.screen.display]
        while lines and not lines[-1]:
            lines.pop()
        return lines
