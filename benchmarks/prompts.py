"""Whether a model learns to read prompts: words that sound alike, which only the prompt tells apart.

    python benchmarks/prompts.py --seeds 1 2 3

A tiny model and synthetic speech, as `bash run.sh learn` has them. Each utterance contains one of
two words with the same sound, "seis" or "zeis"; its prompt contains that word. What is told is the
share of these words that are written as they were spoken, with the prompts and without, once for
each seed and for the two ways of training: with prompts in half of the rows, and without any.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from speech_finetuning.cli.demonstration import encode, make_model, speak

SCRIPT = Path(__file__).parents[1] / "run_speech_recognition_seq2seq_streaming.py"
OTHERS = ["uno", "dos", "tres", "ocho"]
SOUND = "seis"
SPELLINGS = ["seis", "zeis"]


def write_split(folder: Path, split: str, num_rows: int, seed: int) -> None:
    """Clips, and a metadata.csv that names each one's text and prompt."""
    generator = np.random.default_rng([seed, num_rows])
    (folder / split).mkdir(parents=True)
    with open(folder / split / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "prompt"])
        for number in range(num_rows):
            words = [str(word) for word in generator.choice(OTHERS, size=generator.integers(1, 3))]
            place = int(generator.integers(len(words) + 1))
            spelling = SPELLINGS[int(generator.integers(2))]
            spoken = [*words[:place], SOUND, *words[place:]]
            written = [*words[:place], spelling, *words[place:]]
            name = f"{number}.flac"
            (folder / split / name).write_bytes(encode(speak(spoken, generator)))
            writer.writerow([name, " ".join(written), spelling])


def run_toy(folder: Path, flags: list[str], seed: int, steps: int) -> dict[str, float]:
    """The metrics of one run of the script, of folder/model on folder/speech."""
    values = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "speech",
        "output_dir": folder / "output",
        "language": "es",
        "max_steps": steps,
        "save_steps": steps,
        "eval_steps": steps,
        "learning_rate": 2e-3,
        "warmup_steps": 50,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 50,
        "generation_max_length": 40,
        "seed": seed,
        "data_report_samples": 0,
        "report_to": "none",
        "report_clips": 0,
    }
    words = [os.environ.get("PYTHON_EXEC", sys.executable), str(SCRIPT), "--do_train", "--do_eval"]
    for name, value in values.items():
        words += [f"--{name}", str(value)]
    subprocess.run([*words, *flags], check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "output" / "all_results.json").read_text(encoding="utf-8"))


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=800)
    options = parser.parse_args()
    print("| prompts in | seed | WER without | WER with | words without | words with |")
    print("|---|---|---|---|---|---|")
    for seed in options.seeds:
        for probability in (0.5, 0.0):
            with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
                folder = Path(place)
                make_model(folder / "model", seed=seed)
                write_split(folder / "speech", "train", 2000, seed)
                write_split(folder / "speech", "validation", 200, seed + 1000)
                flags = ["--prompt_column_name", "prompt"]
                flags += ["--prompt_probability", str(probability)]
                found = run_toy(folder, flags, seed, options.steps)
            print(
                f"| {100 * probability:.0f} % of rows | {seed} | {found['eval_wer']:.1f} | "
                f"{found['prompted_wer']:.1f} | {found['eval_prompt_words_recall']:.1f} % | "
                f"{found['prompted_prompt_words_recall']:.1f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
