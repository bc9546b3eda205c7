"""Padding to 30 s against short windows: WER after equal utterances, equal steps and equal time, on real short speech.

    python benchmarks/short_windows.py --model MODEL --dataset_name DATA --record results.jsonl --seeds 1 2 3
    python benchmarks/short_windows.py --record results.jsonl --table

Each run is the script itself in a process of its own, scored on the test split at 30 s whatever it trained with. Its
steps are those of --steps, so that runs of the same step have seen as many utterances; speed is what the script logs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean

SCRIPT = Path(__file__).parent.parent / "run_speech_recognition_seq2seq_streaming.py"
CONTESTANTS = {
    "30 s": ["--train_window", "full"],
    "short, 0 % full": ["--train_window", "longest", "--full_window_fraction", "0"],
    "short, 10 % full": ["--train_window", "longest", "--full_window_fraction", "0.1"],
}


def run_once(name: str, seed: int, steps: int, every: int, model: str, dataset_name: str, batch_size: int) -> dict:
    """Trains and scores; returns the WER at every evaluation, seconds of training until it, and utterances/s."""
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "model_name_or_path": model,
            "dataset_name": dataset_name,
            "output_dir": folder,
            "max_steps": steps,
            "eval_steps": every,
            "save_steps": steps,
            "logging_steps": every,
            "eval_split_name": "test",
            "max_eval_samples": 100,
            "per_device_train_batch_size": batch_size,
            "generation_max_length": 48,
            "seed": seed,
            "shuffle_buffer_size": 96,
            "data_report_samples": 0,
            "report_to": "none",
            "learning_rate": 3.75e-5,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 10,
        }
        flags = [text for flag, value in values.items() for text in (f"--{flag}", str(value))]
        words = [sys.executable, str(SCRIPT), "--do_train", "--do_eval", "--do_lower_case", *flags, *CONTESTANTS[name]]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        history = json.loads((Path(folder) / f"checkpoint-{steps}" / "trainer_state.json").read_text())["log_history"]
    speeds = [entry["samples_per_second"] for entry in history if "loss" in entry]
    scores = {entry["step"]: entry["eval_wer"] for entry in history if "eval_wer" in entry}
    speed = 1 / mean(1 / value for value in speeds)
    return {"name": name, "seed": seed, "batch_size": batch_size, "utterances_per_second": speed, "wer": scores}


def table(records: list[dict]) -> str:
    """Markdown: for each contestant utterances/s and the WER (mean, range over the seeds) after each step."""
    lines = ["| padded to | seeds | utt/s | after utterances | seconds of training | WER, mean (range) |"]
    lines.append("|---|---|---|---|---|---|")
    for name in CONTESTANTS:
        runs, scores = [record for record in records if record["name"] == name], defaultdict(list)
        for run in runs:
            for step, wer in run["wer"].items():
                scores[int(step) * run["batch_size"]].append((wer, run["utterances_per_second"]))
        for count, found in sorted(scores.items()):
            wers, speed = [wer for wer, _ in found], mean(speed for _, speed in found)
            rates = f"{mean(wers):.1f} ({min(wers):.1f} to {max(wers):.1f})"
            lines.append(f"| {name} | {len(wers)} | {speed:.2f} | {count} | {count / speed:.0f} | {rates} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--dataset_name")
    parser.add_argument("--record", type=Path, required=True, help="JSON lines, appended to.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=30, help="Optimiser steps of a run.")
    parser.add_argument("--every", type=int, default=30, help="Steps between two evaluations.")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--table", action="store_true", help="Only prints what has been recorded.")
    options = parser.parse_args()
    for seed in [] if options.table else options.seeds:
        for name in options.only:  # interleaved: whatever else the machine does meets all of them
            sizes = (options.steps, options.every, options.model, options.dataset_name, options.batch_size)
            with open(options.record, "a") as file:
                file.write(json.dumps(run_once(name, seed, *sizes)) + "\n")
    print(table([json.loads(line) for line in options.record.read_text().splitlines()]))


if __name__ == "__main__":
    main()
