"""trainer_log.jsonl: every figure that is logged, of every step once."""

import json
from pathlib import Path
from typing import Any

import transformers

from speech_finetuning.training.callbacks import TrainerLog


def state_at(step: int) -> Any:
    return transformers.TrainerState(global_step=step, max_steps=9, is_world_process_zero=True)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "trainer_log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=None) for line in text.splitlines()]


def test_every_figure_is_a_line_of_strict_json(tmp_path: Path):
    log = TrainerLog(tmp_path)
    log.on_log(None, state_at(1), None, logs={"loss": 2.5, "pass": 0.1, "note": "uno\x1b[2J"})
    log.on_log(None, state_at(2), None, logs={"loss": float("nan"), "grad_norm": float("inf")})
    first, second = lines_of(tmp_path)
    assert {**first, "time": ""} == {
        "time": "",
        "step": 1,
        "max_steps": 9,
        "loss": 2.5,
        "pass": 0.1,
        "note": "uno\x1b[2J",
    }
    assert (second["loss"], second["grad_norm"]) == (None, None)
    text = (tmp_path / "trainer_log.jsonl").read_text()
    assert text.replace("\n", "").isprintable()


def test_a_run_that_goes_on_drops_the_lines_of_steps_that_it_repeats(tmp_path: Path):
    log = TrainerLog(tmp_path)
    for step in range(1, 6):
        log.on_log(None, state_at(step), None, logs={"loss": 1.0})
    with open(tmp_path / "trainer_log.jsonl", "a") as file:
        file.write('{"time": "2026-11-26T0')  # torn by a kill
    log.on_train_begin(None, state_at(3), None)
    log.on_log(None, state_at(4), None, logs={"loss": 2.0})
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4]


def test_only_the_first_process_writes(tmp_path: Path):
    state = state_at(1)
    state.is_world_process_zero = False
    log = TrainerLog(tmp_path)
    log.on_train_begin(None, state, None)
    log.on_log(None, state, None, logs={"loss": 1.0})
    assert list(tmp_path.iterdir()) == []
