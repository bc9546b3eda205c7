"""A folder that run.sh takes for its finished .venv, so that tests install nothing."""

import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]
THIS_PYTHON = f'#!/bin/sh\nexec {sys.executable} "$@"\n'


def make_venv(folder: Path, python: str = THIS_PYTHON) -> None:
    """python: the text of an executable file in place of the interpreter."""
    executable = folder / "bin" / "python"
    executable.parent.mkdir(exist_ok=True)
    executable.write_text(python)
    executable.chmod(0o755)
    requirements = (PROJECT / "requirements.txt").read_bytes()
    stamp = subprocess.run(["cksum"], input=requirements, capture_output=True).stdout
    (folder / ".requirements-1").write_bytes(stamp)
