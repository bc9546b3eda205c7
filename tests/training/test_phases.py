"""With which flags a run was trained, from which step on."""

import json
from pathlib import Path
from typing import Any

from speech_finetuning.training.phases import changed_settings, changes_of_start, training_phases

FIRST = {"--learning_rate": 1e-3, "--max_steps": 6, "--seed": 42}
SECOND = {**FIRST, "--learning_rate": 5e-4, "--max_steps": 10}


def make_checkpoint(folder: Path, step: int, **state: Any) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (checkpoint / "stream_state.json").write_text(json.dumps(state))
    return checkpoint


def summary(phases: list[dict[str, Any]]) -> list[tuple[int, str | None, Any]]:
    return [
        (phase["from_step"], phase["command"], phase["settings"]["--learning_rate"])
        for phase in phases
    ]


def test_a_run_that_goes_on_with_other_flags_has_a_history(tmp_path: Path):
    phases = training_phases(None, FIRST, "python x.py --max_steps 6")
    assert summary(phases) == [(0, "python x.py --max_steps 6", 1e-3)]
    checkpoint = make_checkpoint(tmp_path, 6, phases=phases)
    again = training_phases(checkpoint, FIRST, "python x.py --resume_from_checkpoint auto")
    assert again == phases  # the same flags: not another phase
    changed = training_phases(checkpoint, SECOND, "python x.py --max_steps 10")
    assert summary(changed) == [
        (0, "python x.py --max_steps 6", 1e-3),
        (6, "python x.py --max_steps 10", 5e-4),
    ]
    assert changed_settings(changed) == ["--learning_rate", "--max_steps"]
    assert changed_settings(phases) == []
    changes = ["--learning_rate 0.0005 (was 0.001)", "--max_steps 10 (was 6)"]
    assert changes_of_start(checkpoint, changed) == changes
    assert changes_of_start(make_checkpoint(tmp_path, 8), changed) == []  # told by an earlier start
    assert changes_of_start(checkpoint, again) == []


def test_a_checkpoint_of_before_has_one_phase_of_unknown_command(tmp_path: Path):
    checkpoint = make_checkpoint(tmp_path, 6, settings=FIRST)
    assert summary(training_phases(checkpoint, SECOND, "now")) == [
        (0, None, 1e-3),
        (6, "now", 5e-4),
    ]
    (same,) = training_phases(checkpoint, FIRST, "now")
    assert (same["from_step"], same["command"]) == (0, "now")
    nothing = make_checkpoint(tmp_path / "older", 4)
    assert summary(training_phases(nothing, FIRST, "now")) == [(4, "now", 1e-3)]


def test_settings_that_were_not_uploaded_are_not_compared(tmp_path: Path):
    phases = training_phases(None, {**FIRST, "--optim_args": "a=b"}, "then")
    del phases[0]["settings"]["--optim_args"]
    checkpoint = make_checkpoint(tmp_path, 6, phases=phases)
    (same,) = training_phases(checkpoint, {**FIRST, "--optim_args": "a=b"}, "now")
    assert same["command"] == "then" and same["settings"]["--optim_args"] == "a=b"
