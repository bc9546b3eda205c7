"""benchmarks/gpu_acceptance.py in miniature: what it will ask of a GPU is answered by a CPU."""

import re
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


@pytest.fixture
def acceptance(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(PROJECT / "benchmarks"), *sys.path])
    pytest.importorskip("peft", reason="pip install -r requirements-lora.txt")
    import gpu_acceptance

    return gpu_acceptance


def states(report: Path) -> dict[str, str]:
    """{check: its result} of the table."""
    lines = report.read_text(encoding="utf-8").splitlines()
    rows = [
        line.split(" | ") for line in lines if re.match(r"\| .* \| (ok|failed|not here) \|", line)
    ]
    return {cells[0].removeprefix("| "): cells[1] for cells in rows}


@pytest.mark.slow  # some seventeen trainings, each a start of the script
def test_every_check_passes_on_a_cpu(acceptance, tmp_path: Path):
    report = tmp_path / "report.md"
    words = ["--device", "cpu", "--folder", str(tmp_path), "--report", str(report)]
    assert acceptance.main(words) == 0
    found = states(report)
    assert list(found) == list(acceptance.CHECKS)
    not_here = {name for name, state in found.items() if state == "not here"}
    of_gpus = {name for name in acceptance.CHECKS if name.startswith("memory: ")}
    assert not_here == {"compiling", *of_gpus}
    assert {found[name] for name in found.keys() - not_here} == {"ok"}


def test_a_check_that_fails_is_told_and_ends_no_other(
    acceptance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A loss that is not skipped, and a bug in a check."""
    monkeypatch.setattr(acceptance, "broken", acceptance.signalled)
    monkeypatch.setitem(acceptance.CHECKS, "SIGTERM within a step", {}.__getitem__)
    report = tmp_path / "report.md"
    only = ["a NaN under the scaler", "SIGTERM within a step", "out of memory in training"]
    words = ["--device", "cpu", "--folder", str(tmp_path), "--report", str(report), "--only", *only]
    assert acceptance.main(words) == 1
    assert list(states(report).values()) == ["failed", "failed", "ok"]
    assert "exit code 143" in report.read_text() and "KeyError" in report.read_text()
