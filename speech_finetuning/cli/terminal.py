"""The terminal: lines of the log above one bar, and plain lines with the time where there is none.

Everything of this process that a person reads goes through `SCREEN`. rich draws the bar and knows
how wide characters are; nothing of it is used, and no control code written, where the log goes to a
file.
"""

import logging
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from speech_finetuning.base.errors import RunEnded
from speech_finetuning.base.files import printable

if TYPE_CHECKING:  # a tenth of a second, and --help needs none of it
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

WIDEST_LINE = 100  # columns
WIDTH_OF_BAR = 24
SECONDS_BETWEEN_DRAWINGS = 0.1
STARTING = "starting ..."  # shorter than any line that may be the first
ERASE_LINE = "\r\x1b[2K"
# To be read on black and on white alike, which yellow is not, nor the grey of rich's own bar.
STYLES = {"warning": "bold magenta", "error": "bold red"}
STYLE_OF_BAR = "default"
STYLE_OF_REST = "bright_black"


class Screen:
    """Where the log of this process goes: stderr, or stdout if that alone was redirected, as by
    `bash run.sh | tee log`."""

    def __init__(self) -> None:
        self.is_terminal = False
        self.draws_bars = False  # of several processes the first one alone
        self.goes_to_stdout = False
        self.console: Console | None = None
        self.live: Live | None = None
        self.streams = (sys.stdout, sys.stderr)  # without rich's proxies
        self.drawn_at = 0.0
        os.register_at_fork(after_in_child=self.leave_to_parent)

    def open(self, draws_bars: bool) -> None:
        """Looks where the log goes to."""
        self.hide_bar()
        self.goes_to_stdout = sys.stderr.isatty() and not sys.stdout.isatty()
        is_dumb = os.environ.get("TERM", "dumb") == "dumb"
        self.is_terminal = self.stream().isatty() and not is_dumb
        self.draws_bars = draws_bars and self.is_terminal
        self.console = None
        if self.draws_bars:
            from rich.console import Console

            self.console = Console(
                file=self.stream(), markup=False, highlight=False, emoji=False, soft_wrap=True
            )

    def stream(self) -> TextIO:
        """As it is now: tests and notebooks put others in its place."""
        return sys.stdout if self.goes_to_stdout else sys.stderr

    def writable(self, text: str, instead: str) -> str:
        """The text, or what stands for it where the stream's encoding has not its characters."""
        try:
            text.encode(self.stream().encoding or "utf-8")
        except UnicodeEncodeError:
            return instead
        return text

    def leave_to_parent(self) -> None:
        """A forked process, such as the reading worker, draws nothing: its copy of the bar would
        be an old one, and its locks may be held by threads that it does not have."""
        if self.live is not None:
            sys.stdout = self.streams[0]
            sys.stderr = self.streams[1]
        self.live = None
        self.console = None
        self.draws_bars = False

    # ------------------------------------------------------------------------------------- lines

    def write(self, text: str, label: str = "", *, keeps_lines: bool = False) -> None:
        """Adds lines, above the bar if there is one. label: "", "warning" or "error".
        keeps_lines: long ones are left to the terminal to wrap, so that a command in them is copied
        as it is."""
        lines = [printable(line) for line in text.split("\n")]
        if label:
            lines[0] = f"{label}: {lines[0]}"
        try:
            if self.console is not None:
                draw_lines(lines, label, self.console, keeps_lines=keeps_lines)
            elif self.is_terminal:
                # Another process draws the bar: at one stroke, over what is left of it.
                erased = "".join(f"{ERASE_LINE}{line}\n" for line in lines)
                os.write(self.stream().fileno(), erased.encode(errors="replace"))
            else:
                clock = time.strftime("%H:%M:%S ")
                stream = self.stream()
                stream.write("".join(f"{clock}{line}\n" for line in lines))
                stream.flush()
        except OSError:
            self.go_dark()

    def go_dark(self) -> None:
        """The terminal was closed, or the pipe has ended: a lost log must not end a run."""
        self.console = None
        self.live = None
        self.is_terminal = False
        # Else Python would write the rest when it exits, and change the exit code to 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream().fileno())

    # --------------------------------------------------------------------------------------- bar

    def show_bar(self, label: str, done: int, total: int, text: str = "") -> None:
        """Draws the bar below the last line, or draws it anew, at most ten times a second."""
        if self.console is None:
            return
        now = time.monotonic()
        if self.live is not None and done < total:
            if now - self.drawn_at < SECONDS_BETWEEN_DRAWINGS:
                return
        self.drawn_at = now
        try:
            self.draw_bar(self.console, label, done, total, text)
        except OSError:
            self.go_dark()

    def draw_bar(self, console: "Console", label: str, done: int, total: int, text: str) -> None:
        from rich.live import Live
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        if self.live is None:
            self.streams = (sys.stdout, sys.stderr)
            # Not drawn by a thread: the reading worker is forked while the bar is there.
            self.live = Live(console=console, auto_refresh=False, transient=True)
            self.live.start()
            console.show_cursor(True)  # a process that is killed would leave it hidden
        row = Table.grid(padding=(0, 1))
        columns = min(WIDTH_OF_BAR, max(8, console.width - 56))
        bar = ProgressBar(
            total=total,
            completed=done,
            width=columns,
            style=STYLE_OF_REST,
            complete_style=STYLE_OF_BAR,
            finished_style=STYLE_OF_BAR,
        )
        row.add_row(label, bar, text)
        self.live.update(row, refresh=True)

    def hide_bar(self) -> None:
        """Takes the bar away; the lines stay."""
        live = self.live
        self.live = None
        if live is not None:
            try:
                live.stop()
            except OSError:
                self.go_dark()


SCREEN = Screen()


def draw_lines(lines: list[str], label: str, console: "Console", *, keeps_lines: bool) -> None:
    """Above the bar, wrapped unless lines are kept; the label of the first line in its colour."""
    for line in lines:
        for piece in [line] if keeps_lines else wrap(line, console):
            console.print(styled(piece, label))
            label = ""


def wrap(line: str, console: "Console") -> list[str]:
    """The line in pieces of at most 100 columns, cut between words; what follows is indented."""
    from rich.cells import cell_len
    from rich.text import Text

    width = min(WIDEST_LINE, console.width)
    if cell_len(line) <= width:
        return [line]
    depth = len(line) - len(line.lstrip()) + 2
    first, *others = Text(line).wrap(console, width - depth)
    rest = [piece.plain.strip() for piece in others]
    return [first.plain.rstrip(), *(" " * depth + piece for piece in rest)]


def say_starting() -> None:
    """A word for the seconds that importing torch takes; the first line of the log replaces it."""
    is_dumb = os.environ.get("TERM", "dumb") == "dumb"
    if sys.stderr.isatty() and not is_dumb and os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"{STARTING}\r")
        sys.stderr.flush()


def fitted(line: str) -> list[str]:
    """A line for stderr outside the log, which may be before rich is imported: cut between words
    where that is a terminal, else whole."""
    if not sys.stderr.isatty():
        return [line]
    return textwrap.wrap(
        line,
        width=min(WIDEST_LINE, shutil.get_terminal_size().columns),
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )


def styled(line: str, label: str) -> "Text":
    """The label in its colour, the rest as it is."""
    from rich.text import Text

    text = Text(line)
    if label:
        text.stylize(STYLES[label], 0, len(label) + 1)
    return text


def fit(text: str, num_columns: int) -> str:
    """Foreign text on one line of so many columns, which its characters may be two of."""
    from rich.text import Text

    shown = Text(printable(text))
    shown.truncate(num_columns, overflow="ellipsis")
    return shown.plain


def current_folder() -> Path:
    """Where relative paths begin; a path that is nowhere if that is the root, or is gone."""
    try:
        folder = Path.cwd()
    except FileNotFoundError:
        return Path("/nowhere")
    return Path("/nowhere") if folder == Path(folder.root) else folder


def shown(path: str | Path) -> str:
    """A path as short as it can be typed here; what is no absolute path, such as a Hub id, as it
    is."""
    text = str(path)
    if not os.path.isabs(text):
        return text
    for folder, name in ((current_folder(), ""), (Path.home(), "~")):
        if Path(text) == folder:
            return name or "."
        if Path(text).is_relative_to(folder):
            return os.path.join(name, Path(text).relative_to(folder))
    return text


def typed(path: str | Path) -> str:
    """A path as `shown`, within a command: with the quotation marks that the shell needs. A leading
    ~ has none, as the shell would then not replace it, and none is an option."""
    text = shown(path)
    if os.path.isabs(str(path)) and text.split("/")[0] == "~":
        _, slash, rest = text.partition("/")
        return f"~/{shlex.quote(rest)}" if slash else "~"
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


class ScreenHandler(logging.Handler):
    """Sends what is logged to the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            label = ""
            if record.levelno >= logging.WARNING:
                label = "warning" if record.levelno < logging.ERROR else "error"
            keeps_lines = getattr(record, "keeps_lines", False)
            text = readable(self.format(record), record.name)
            SCREEN.write(text, label, keeps_lines=keeps_lines)
        except RunEnded:  # by a signal, which may come at any time
            raise
        except Exception:
            self.handleError(record)


def readable(message: str, logger_name: str) -> str:
    """Paths from here on; Python's own warnings without file, line and source text, which only their
    authors need."""
    if logger_name != "py.warnings":
        return message.replace(f"{current_folder()}{os.sep}", "")
    found = re.match(r".*?:\d+: (\w+: .*?)(\n  .*)?\n?$", message, re.S)
    return found[1] if found else message
