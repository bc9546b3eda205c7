"""Padding to 30 s against short windows and packing: WER after equal utterances, equal steps and
equal time, on real short speech; and what long-form transcription makes of a minute of it before
and after.

    python benchmarks/short_windows.py --model MODEL --dataset_name DATA --record results.jsonl \\
        --seeds 1 2 3
    python benchmarks/short_windows.py --model MODEL --dataset_name DATA --record speed.jsonl --speed
    python benchmarks/short_windows.py --record results.jsonl speed.jsonl --table

Each run is the script itself in a process of its own, scored on the test split at 30 s whatever it
trained with. A step takes --batch_size utterances, packed or not, so that equal steps have seen as
many of them. --speed measures the rates alone, in short runs that take turns; without it the table
takes those of the training runs. The minute-long files of --long_form are test clips end to end.
--at_once trains several at the same time, where only scores are wanted. Flags that it does not know
go to the script (--per_device_eval_batch_size 100).
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean

import numpy as np
import soundfile

PYTHON = os.environ.get("PYTHON_EXEC", sys.executable)
SCRIPT = Path(__file__).parent.parent / "run_speech_recognition_seq2seq_streaming.py"
CONTESTANTS = {
    "30 s": ["--train_window", "full"],
    "short, 0 % full": ["--train_window", "longest", "--full_window_fraction", "0"],
    "short, 10 % full": ["--train_window", "longest", "--full_window_fraction", "0.1"],
    "packed": ["--pack_utterances"],
    "packed, timestamps": ["--pack_utterances", "--timestamp_probability", "0.5"],
}
LONG_CLIP_IN_SECONDS = 60
MAX_NEW_TOKENS = 48


def flags_of(values: dict) -> list[str]:
    return [text for flag, value in values.items() for text in (f"--{flag}", str(value))]


def run_once(
    name: str, seed: int, steps: int, options: argparse.Namespace, minutes: Path | None
) -> dict:
    """Trains, and scores unless only speed is wanted; returns the WER at every evaluation and
    utterances/s."""
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "model_name_or_path": options.model,
            "dataset_name": options.dataset_name,
            "output_dir": folder,
            "max_steps": steps,
            "save_steps": steps,
            "logging_steps": 1 if options.speed else options.every,
            "per_device_train_batch_size": options.batch_size,
            "seed": seed,
            "shuffle_buffer_size": 96,
            "data_report_samples": 0,
            "report_to": "none",
            "report_clips": 0,
            "learning_rate": 3.75e-5,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 10,
        }
        scored = {
            "eval_steps": options.every,
            "eval_split_name": "test",
            "max_eval_samples": options.clips,
            "generation_max_length": MAX_NEW_TOKENS,
        }
        words = [
            PYTHON,
            str(SCRIPT),
            "--do_train",
            "--do_lower_case",
            *flags_of(values),
            *CONTESTANTS[name],
            *options.flags,
        ]
        words += [] if options.speed else ["--do_eval", *flags_of(scored)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        history = json.loads(
            (Path(folder) / f"checkpoint-{steps}" / "trainer_state.json").read_text()
        )["log_history"]
        long_form = {"long_form": score_long_form(folder, minutes)} if minutes else {}
    speeds = [entry["samples_per_second"] for entry in history if "loss" in entry][
        options.speed :
    ]  # first: warm-up
    scores = {entry["step"]: entry["eval_wer"] for entry in history if "eval_wer" in entry}
    speed = {
        "utterances_per_second": 1 / mean(1 / value for value in speeds),
        "is_speed": options.speed,
    }
    return {
        "name": name,
        "seed": seed,
        "batch_size": options.batch_size,
        "wer": scores,
        **long_form,
        **speed,
    }


def write_minutes(folder: Path, dataset_name: str) -> None:
    """An audio folder of files of at least a minute: the clips of the test split end to end, what
    is left over out."""
    clips = csv.DictReader((Path(dataset_name) / "test" / "metadata.csv").open(encoding="utf-8"))
    waveforms, texts, rows = [], [], []
    for clip in clips:
        waveform, sampling_rate = soundfile.read(Path(dataset_name) / "test" / clip["file_name"])
        waveforms.append(waveform)
        texts.append(clip["transcription"])
        if sum(map(len, waveforms)) >= LONG_CLIP_IN_SECONDS * sampling_rate:
            rows.append({"file_name": f"{len(rows)}.flac", "transcription": " ".join(texts)})
            soundfile.write(
                folder / rows[-1]["file_name"], np.concatenate(waveforms), sampling_rate
            )
            waveforms, texts = [], []
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "transcription"])
        writer.writeheader()
        writer.writerows(rows)


def score_long_form(model: str, minutes: Path) -> dict:
    """WER and share of loops of a model on the minute-long files, with timestamps, as users
    transcribe them."""
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "model_name_or_path": model,
            "dataset_name": minutes,
            "eval_split_name": "train",
            "output_dir": folder,
            "generation_max_length": 3 * MAX_NEW_TOKENS,
            "report_to": "none",
            "report_clips": 0,
        }
        words = [
            PYTHON,
            str(SCRIPT),
            "--do_eval",
            "--long_form",
            "--do_lower_case",
            *flags_of(values),
        ]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        metrics = json.loads((Path(folder) / "all_results.json").read_text())
    return {name: metrics[f"eval_{name}"] for name in ("wer", "repetition_loops", "num_rows")}


def table(records: list[dict]) -> str:
    """Markdown: for each contestant utterances/s and the WER (mean, range over the seeds) after
    each step; and of the minute-long files."""
    lines = [
        "| padded to | seeds | utt/s (range) | after utterances | seconds of training | WER, mean (range) |"
    ]
    lines.append("|---|---|---|---|---|---|")
    minutes = ["| minute-long files | seeds | WER, mean (range) | loops % |", "|---|---|---|---|"]
    for name in ["untouched", *CONTESTANTS]:
        runs, scores = [record for record in records if record["name"] == name], defaultdict(list)
        if not runs:
            continue
        for run in runs:
            for step, wer in run["wer"].items():
                scores[int(step) * run["batch_size"]].append(wer)
        timed = [run for run in runs if run.get("is_speed")] or runs
        speeds = [run["utterances_per_second"] for run in timed]
        for count, wers in sorted(scores.items()):
            rate = f"{mean(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f})"
            found = f"{mean(wers):.1f} ({min(wers):.1f} to {max(wers):.1f})"
            lines.append(
                f"| {name} | {len(wers)} | {rate} | {count} | {count / mean(speeds):.0f} | {found} |"
            )
        if long_form := [run["long_form"] for run in runs if run.get("long_form")]:
            wers, loops = (
                [figures[key] for figures in long_form] for key in ("wer", "repetition_loops")
            )
            found = f"{mean(wers):.1f} ({min(wers):.1f} to {max(wers):.1f})"
            minutes.append(f"| {name} | {len(wers)} | {found} | {mean(loops):.0f} |")
    return "\n".join([*lines, "", *minutes])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--dataset_name")
    parser.add_argument(
        "--record",
        type=Path,
        nargs="+",
        required=True,
        help="JSON lines; the first is appended to.",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--steps", type=int, default=30, help="Optimiser steps of the runs that pad to 30 s."
    )
    parser.add_argument(
        "--times", type=int, default=3, help="How many times as many steps the others make."
    )
    parser.add_argument("--every", type=int, default=30, help="Steps between two evaluations.")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--clips", type=int, default=100, help="Clips of the test split that are scored."
    )
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument(
        "--long_form",
        action="store_true",
        help="Also scores minute-long files, which takes its time.",
    )
    parser.add_argument(
        "--speed", action="store_true", help="Measures speed only, in five rounds of four steps."
    )
    parser.add_argument("--at_once", type=int, default=1, help="Runs at the same time.")
    parser.add_argument("--table", action="store_true", help="Only prints what has been recorded.")
    options, options.flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        minutes = Path(folder) if options.long_form and not options.table else None
        if minutes:
            write_minutes(minutes, options.dataset_name)
            untouched = {
                "name": "untouched",
                "wer": {},
                "long_form": score_long_form(options.model, minutes),
            }
            write_line(options.record[0], untouched | {"utterances_per_second": 0.0})
        if not options.table:
            run_all(options, minutes)
    print(
        table(
            [json.loads(line) for path in options.record for line in path.read_text().splitlines()]
        )
    )


def run_all(options: argparse.Namespace, minutes: Path | None) -> None:
    """Interleaved: whatever else the machine does meets all contestants."""
    with ThreadPoolExecutor(options.at_once) as pool:
        runs = []
        for seed in range(5) if options.speed else options.seeds:
            for name in options.only:
                times = 1 if name == "30 s" else options.times
                steps = 5 if options.speed else options.steps * times
                runs.append(pool.submit(run_once, name, seed, steps, options, minutes))
        for run in as_completed(runs):
            write_line(options.record[0], run.result())


def write_line(path: Path, record: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
