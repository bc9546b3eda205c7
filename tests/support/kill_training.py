"""Kills a training run with SIGKILL at random instants, starts it again each time, and compares its
weights with those of an undisturbed run.

    python tests/support/kill_training.py FOLDER --kills 100

Every attempt is a process of its own, forked from this one, which has done the imports: a start
costs a second.
One checkpoint is kept (save_total_limit 1), dropout is on, evaluation and saving are frequent, so
that kills meet them.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.cli import demonstration
from speech_finetuning.cli.exit_status import exit_code_of


def flags(folder: Path, output_dir: Path, max_steps: int) -> list[str]:
    """A run whose steps, evaluations and saves take about equal time."""
    values = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "speech",
        "language": "es",
        "output_dir": output_dir,
        "max_steps": max_steps,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "shuffle_buffer_size": 7,
        "save_steps": 4,
        "eval_steps": 8,
        "save_total_limit": 1,
        "logging_steps": 1,
        "generation_max_length": 8,
        "report_to": "none",
        "report_clips": 0,
        "disable_tqdm": True,
    }
    return [
        "--do_train",
        "--do_eval",
        *(text for name, value in values.items() for text in (f"--{name}", str(value))),
    ]


def start(words: list[str], log: Path) -> int:
    """The process id of a new training process; its output goes to a file."""
    process = os.fork()
    if process == 0:
        os.setsid()
        descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = 1
        try:
            code = exit_code_of(script.main, words)
        finally:
            os._exit(code)
    return process


def kill_after(process: int, seconds: float) -> int | None:
    """Sends SIGKILL after a while. Returns the exit code if the process was faster, else None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def run_with_kills(folder: Path, num_kills: int, max_steps: int, seed: int) -> dict[str, int]:
    """Trains twice, undisturbed and killed. Returns counts; raises AssertionError if the weights
    differ."""
    for name in ("whole", "killed"):
        shutil.rmtree(folder / name, ignore_errors=True)
    began = time.monotonic()
    code = kill_after(start(flags(folder, folder / "whole", max_steps), folder / "whole.log"), 3600)
    seconds = time.monotonic() - began
    assert code == 0, (folder / "whole.log").read_text()[-2000:]
    generator, kills, finished = random.Random(seed), 0, 0
    counts = {"kills": 0, "while saving": 0, "before the first checkpoint": 0}
    while kills < num_kills or finished == 0:
        # Long enough to get on by some steps, short enough to be killed: up to half of the
        # undisturbed run.
        limit = generator.uniform(0.3, 0.5 * seconds) if kills < num_kills else 3600
        code = kill_after(
            start(flags(folder, folder / "killed", max_steps), folder / "killed.log"), limit
        )
        if code is None:
            kills += 1
            counts["while saving"] += (folder / "killed" / "_unfinished").exists()
            counts["before the first checkpoint"] += not list(
                (folder / "killed").glob("checkpoint-*")
            )
        else:
            assert code == 0, (folder / "killed.log").read_text()[-2000:]
            compare(folder / "whole", folder / "killed")
            finished += 1
            if kills < num_kills:
                shutil.rmtree(folder / "killed")
    return {**counts, "kills": kills, "finished runs, all with equal weights": finished}


def compare(whole: Path, killed: Path) -> None:
    """Raises AssertionError unless weights, optimiser and losses are equal to the last bit."""
    expected, found = (load_file(path / "model.safetensors") for path in (whole, killed))
    assert all(torch.equal(expected[name], found[name]) for name in expected), "weights differ"
    names = [
        max(path.glob("checkpoint-*"), key=lambda p: int(p.name[11:])) for path in (whole, killed)
    ]
    first, second = (
        torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in names
    )
    assert all(torch.equal(first[i]["exp_avg"], second[i]["exp_avg"]) for i in first), (
        "the optimiser differs"
    )
    logs = [json.loads((path / "trainer_state.json").read_text())["log_history"] for path in names]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert losses[0] == losses[1], "losses differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    demonstration.make_speech(args.folder / "speech", {"train": 40, "validation": 6})
    demonstration.make_model(args.folder / "model", d_model=16, num_layers=1, dropout=0.2)
    print(json.dumps(run_with_kills(args.folder, args.kills, args.steps, args.seed)))


if __name__ == "__main__":
    main()
