"""Lines above a bar on a terminal, plain lines with the time elsewhere."""

import io
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest
from terminal import Terminal

from speech_finetuning.cli.terminal import SCREEN, ScreenHandler, fit, readable, shown, typed

SENTENCE = "a clip that cannot be used is rejected, counted and listed with its reason " * 2


@pytest.fixture(autouse=True)
def closed_screen() -> Iterator[None]:
    """The screen of this process as it was."""
    yield
    SCREEN.hide_bar()
    SCREEN.is_terminal = SCREEN.draws_bars = SCREEN.goes_to_stdout = False
    SCREEN.console = None


@pytest.fixture
def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Terminal]:
    """open_terminal(80) puts this process's stdout and stderr on a terminal of 80 columns."""

    def open_screen(num_columns: int, draws_bars: bool = True) -> Terminal:
        terminal = Terminal(num_columns)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(num_columns))
        monkeypatch.setattr(sys, "stdout", open_slave(terminal))
        monkeypatch.setattr(sys, "stderr", open_slave(terminal))
        SCREEN.open(draws_bars=draws_bars)
        return terminal

    return open_screen


def open_slave(terminal: Terminal) -> TextIO:
    return os.fdopen(os.dup(terminal.slave), "w", buffering=1, encoding="utf-8")


def drawn(terminal: Terminal) -> list[str]:
    while terminal.read():
        pass
    return terminal.lines()


@pytest.mark.parametrize("num_columns", [80, 100, 120])
def test_long_lines_are_cut_between_words(open_terminal: Callable, num_columns: int):
    terminal = open_terminal(num_columns)
    SCREEN.write(f"  {SENTENCE}", "")
    SCREEN.write(SENTENCE, "warning")
    lines = drawn(terminal)
    width = min(100, num_columns)
    assert terminal.screen.wrapped == []
    assert max(map(len, lines)) <= width and max(map(len, lines)) > width - 15
    assert lines[0].startswith("  a clip") and lines[1].startswith("    ")
    assert " ".join(" ".join(lines).split()) == " ".join(f"{SENTENCE} warning: {SENTENCE}".split())


@pytest.mark.parametrize("draws_bars", [True, False])
def test_a_long_command_is_left_to_the_terminal_to_wrap(open_terminal: Callable, draws_bars: bool):
    """Copied from there, it is one line: with a line break of ours the shell would run two."""
    terminal = open_terminal(80, draws_bars)
    command = f"  transcribe   bash /{'folder/' * 12}run.sh transcribe model FILE"
    logger = logging.getLogger("speech_finetuning.a_test")
    record = logger.makeRecord(
        logger.name, logging.INFO, "", 0, command, (), None, extra={"keeps_lines": True}
    )
    ScreenHandler().emit(record)
    lines = drawn(terminal)
    assert lines[0] == command[:80] and lines[1] == command[80:]


def test_lines_stand_above_the_one_bar(open_terminal: Callable):
    terminal = open_terminal(80)
    for step in range(5):
        SCREEN.drawn_at = 0.0
        SCREEN.show_bar("training", step, 5, f"{step}/5 steps, 4:05 min left")
        SCREEN.write(f"line {step}")
        print("of a library", file=sys.stderr)
    lines = drawn(terminal)
    assert terminal.most_bars == 1
    assert lines[:2] == ["line 0", "of a library"] and len(lines) == 11
    assert re.fullmatch(r"training [━╺╸]+ 4/5 steps, 4:05 min left", lines[-1])
    SCREEN.hide_bar()
    assert len(drawn(terminal)) == 10 and not any("━" in line for line in terminal.lines())


def test_a_bar_is_drawn_ten_times_a_second_at_most(open_terminal: Callable):
    terminal = open_terminal(80)
    for step in range(1000):
        SCREEN.show_bar("training", step, 2000, f"step {step}")
    assert "step 0" in drawn(terminal)[-1]
    SCREEN.show_bar("training", 2000, 2000, "the end")
    assert "the end" in drawn(terminal)[-1]


def test_the_cursor_is_never_hidden_for_long(open_terminal: Callable):
    """A killed process would leave the shell without one."""
    terminal = open_terminal(80)
    SCREEN.show_bar("training", 1, 2)
    drawn(terminal)
    assert not terminal.screen.cursor.hidden


def test_a_forked_worker_and_another_process_write_over_the_bar(open_terminal: Callable):
    terminal = open_terminal(80)
    SCREEN.show_bar("training", 1, 2, "half")
    child = os.fork()
    if child == 0:
        SCREEN.write("no network: trying again in 5 s", "warning")
        os._exit(0 if SCREEN.live is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    SCREEN.drawn_at = 0.0
    SCREEN.show_bar("training", 1, 2, "half")
    lines = drawn(terminal)
    assert lines[0] == "warning: no network: trying again in 5 s"
    assert len(lines) == 2 and "━" in lines[1] and terminal.most_bars == 1


def test_control_characters_are_shown_not_obeyed(open_terminal: Callable):
    terminal = open_terminal(80)
    hostile = "\x1b]0;owned\x07 \x08\x08\x9b31m \u202eabc \x1b[2J"
    SCREEN.write(f"heard {hostile}")
    SCREEN.show_bar("training", 1, 2, "half")
    SCREEN.write(f"heard {hostile}")
    lines = drawn(terminal)
    shown_text = r"heard \x1b]0;owned\x07 \x08\x08\x9b31m \u202eabc \x1b[2J"
    assert lines[:2] == [shown_text] * 2
    assert b"\x07" not in terminal.raw and b"owned\x1b" not in terminal.raw


def test_a_file_gets_plain_lines_with_the_time(monkeypatch: pytest.MonkeyPatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    SCREEN.open(draws_bars=True)
    SCREEN.show_bar("training", 1, 2)
    SCREEN.write(f"{SENTENCE}\nheard \x1b[31m", "warning")
    lines = stream.getvalue().splitlines()
    assert re.fullmatch(rf"\d\d:\d\d:\d\d warning: {SENTENCE}", lines[0])
    assert re.fullmatch(r"\d\d:\d\d:\d\d heard \\x1b\[31m", lines[1])
    assert len(lines) == 2 and stream.getvalue().replace("\n", "").isprintable()


PIPED = """
import logging, sys
from speech_finetuning.cli.terminal import SCREEN
SCREEN.open(draws_bars=True)
SCREEN.show_bar("training", 1, 2)
for number in range(3):
    SCREEN.write(f"line {number}")
"""


@pytest.mark.parametrize("reader", ["cat", "true"])
def test_tee_gets_the_log_and_may_end(tmp_path: Path, reader: str):
    """`bash run.sh | tee log` on a terminal: stderr is the terminal, stdout the pipe. A reader that
    has ended costs the log, not the run."""
    terminal = Terminal(80)
    command = (
        f"({sys.executable} -c '{PIPED}'; echo $? >{tmp_path}/code) | {reader} >{tmp_path}/log"
    )
    environment = {**os.environ, **terminal.environment, "PYTHONPATH": str(Path.cwd())}
    subprocess.run(
        ["bash", "-c", command], stdout=terminal.slave, stderr=terminal.slave, env=environment
    )
    assert (tmp_path / "code").read_text() == "0\n"
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line[9:] for line in lines] == (["line 0", "line 1", "line 2"] * (reader == "cat"))
    assert drawn(terminal) == []


def test_a_terminal_that_is_closed_costs_no_run(open_terminal: Callable):
    terminal = open_terminal(80)
    SCREEN.show_bar("training", 1, 10)
    os.close(terminal.master)
    SCREEN.write("nobody reads this")
    SCREEN.show_bar("training", 10, 10)
    SCREEN.hide_bar()
    SCREEN.write("nor this")


def test_what_is_logged_has_its_label(open_terminal: Callable):
    terminal = open_terminal(80)
    logger = logging.getLogger("of.a.test")
    logger.addHandler(ScreenHandler())
    logger.setLevel(logging.INFO)
    logger.info("%d rows", 3)
    logger.warning("%d rows are lost", 3)
    logger.error("nothing is left")
    assert drawn(terminal) == ["3 rows", "warning: 3 rows are lost", "error: nothing is left"]


def test_a_warning_of_python_is_one_line():
    warning = warnings.formatwarning("it is old", FutureWarning, "/a/b.py", 7, "    old()")
    assert readable(warning, "py.warnings") == "FutureWarning: it is old"
    assert readable(warning, "speech_finetuning.cli") == warning


def test_transcripts_are_cut_by_columns_not_by_characters():
    assert fit("uno dos tres", 12) == "uno dos tres"
    assert fit("uno dos tres", 8) == "uno dos…"
    assert fit("日本語日本語", 8) == "日本語 …"
    assert fit("uno\x1b[2J\ndos", 40) == r"uno\x1b[2J\ndos"


def test_paths_are_as_short_as_they_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert shown(tmp_path / "here" / "out" / "runs") == "out/runs"
    assert shown(tmp_path / "there") == "~/there"
    assert shown("/elsewhere/x") == "/elsewhere/x"
    assert shown("alice/speech") == "alice/speech"


def test_paths_within_commands_are_quoted_for_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert typed(tmp_path / "here" / "a b") == "'a b'"
    assert typed(tmp_path / "a b" / "c") == "~/'a b/c'"
    assert typed(tmp_path) == "~"
    assert typed("~") == "'~'"  # a folder of this name
    assert typed("-x") == "./-x"
    assert typed("alice/speech") == "alice/speech"
