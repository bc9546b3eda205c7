"""Averaged checkpoints and shares of the untouched model: what they give on real speech, and what
they cost.

    python benchmarks/better_models.py --model MODEL --dataset_name DATA --record results.jsonl \\
        --seeds 1 2 3
    python benchmarks/better_models.py --record results.jsonl --table

Each run is the script itself in a process of its own. It trains and scores; then the same command
is started again with --average_checkpoints and --base_weight_shares, which trains nothing. Weights
are chosen on the validation split; the test split is scored before and after. Flags that it does not
know go to the script.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

PYTHON = os.environ.get("PYTHON_EXEC", sys.executable)
SCRIPT = Path(__file__).parent.parent / "run_speech_recognition_seq2seq_streaming.py"
CANDIDATES = ["--average_checkpoints", "5", "--base_weight_shares", "0.1", "0.3", "0.5"]


def flags_of(values: dict) -> list[str]:
    return [text for flag, value in values.items() for text in (f"--{flag}", str(value))]


def command(options: argparse.Namespace, folder: str, seed: int) -> list[str]:
    """Training and scoring, of 16 utterances a step."""
    values = {
        "model_name_or_path": options.model,
        "dataset_name": options.dataset_name,
        "output_dir": folder,
        "max_steps": options.steps,
        "save_steps": options.steps // 10,
        "eval_steps": options.steps,
        "logging_steps": 10,
        "save_total_limit": 5,
        "per_device_train_batch_size": 16,
        "seed": seed,
        "train_window": "longest",
        "shuffle_buffer_size": 96,
        "data_report_samples": 0,
        "report_to": "none",
        "report_clips": 0,
        "learning_rate": options.learning_rate,
        "test_split_name": "test",
        "generation_max_length": 48,
    }
    words = [PYTHON, str(SCRIPT), "--do_train", "--do_eval", "--do_lower_case"]
    return [*words, *flags_of(values), "--load_best_model_at_end", "False", *options.flags]


def run_once(seed: int, options: argparse.Namespace) -> dict:
    """Scores of all weights on the validation split, and of the trained and the saved ones on the
    test split; seconds of both starts."""
    with tempfile.TemporaryDirectory() as folder:
        words = command(options, folder, seed)
        start = time.monotonic()
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        trained_after = time.monotonic() - start
        trained = json.loads((Path(folder) / "all_results.json").read_text())
        start = time.monotonic()
        subprocess.run([*words, *CANDIDATES], check=True, stdout=subprocess.DEVNULL)
        chosen_after = time.monotonic() - start
        saved = json.loads((Path(folder) / "all_results.json").read_text())
        weights = json.loads((Path(folder) / "weights.json").read_text())
    return {
        "seed": seed,
        "learning_rate": options.learning_rate,
        "steps": options.steps,
        "weights": weights,
        "test_wer_of_trained": trained["test_wer"],
        "test_wer_of_saved": saved["test_wer"],
        "seconds_of_training": trained_after,
        "seconds_of_choosing": chosen_after,
    }


def table(records: list[dict]) -> str:
    """Markdown: a line for each kind of weights on the validation split, and the test split's."""
    lines = ["| weights | seeds | validation WER, mean | each seed |", "|---|---|---|---|"]
    for number, first in enumerate(records[0]["weights"]):
        wers = [record["weights"][number]["scores"]["eval_wer"] for record in records]
        each = ", ".join(f"{wer:.2f}" for wer in wers)
        lines.append(f"| {first['weights']} | {len(wers)} | {mean(wers):.2f} | {each} |")
    lines += ["", "| seed | saved | test WER trained | test WER saved | s training | s choosing |"]
    lines.append("|---|---|---|---|---|---|")
    for record in records:
        kept = next(entry["weights"] for entry in record["weights"] if entry["is_kept"])
        lines.append(
            f"| {record['seed']} | {kept} | {record['test_wer_of_trained']:.2f} "
            f"| {record['test_wer_of_saved']:.2f} | {record['seconds_of_training']:.0f} "
            f"| {record['seconds_of_choosing']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--dataset_name")
    parser.add_argument("--record", type=Path, required=True, help="JSON lines; appended to.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--learning_rate", type=float, default=3.75e-5)
    parser.add_argument("--at_once", type=int, default=1, help="Seeds at the same time.")
    parser.add_argument("--table", action="store_true")
    options, options.flags = parser.parse_known_args()
    if options.table:
        print(table([json.loads(line) for line in options.record.read_text().splitlines()]))
        return
    with ThreadPoolExecutor(options.at_once) as pool:
        for record in pool.map(functools.partial(run_once, options=options), options.seeds):
            with options.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(
                f"seed {record['seed']}: {record['test_wer_of_trained']} -> "
                f"{record['test_wer_of_saved']}"
            )


if __name__ == "__main__":
    main()
