"""What --noise_dataset gives on real speech: WER of a clean and of a noisy test split, trained with
and without noise.

    python benchmarks/noisy_speech.py --model MODEL --dataset_name DATA --record results.jsonl --seeds 1 2 3
    python benchmarks/noisy_speech.py --record results.jsonl --table

DATA: an audio folder with train, validation and test splits, each with a metadata.csv. Noise is made
of it: babble of five clips at once, and coloured noise. What is mixed into training clips is babble
of the training split and pink noise; into the noisy test split, at 0 to 10 dB, babble of the
validation split and brown noise, which no model has heard. Each run is the script itself in a
process of its own.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import soundfile
import yaml

from speech_finetuning.data.audio import SAMPLE_RATE_IN_HZ, accept_duration, decode_audio
from speech_finetuning.data.augmentation import Augmenter

SCRIPT = Path(__file__).parents[1] / "run_speech_recognition_seq2seq_streaming.py"
SECONDS_OF_NOISE = 20
VOICES_OF_BABBLE = 5
TEST_SNR_IN_DB = (0.0, 10.0)


def read_split(folder: Path) -> list[tuple[str, str, np.ndarray]]:
    """(file name, text, waveform) of each clip."""
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    clips = []
    for row in rows:
        waveform, _ = decode_audio((folder / row["file_name"]).read_bytes(), accept_duration)
        clips.append((row["file_name"], row["transcription"], waveform))
    return clips


def babble(waveforms: list[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """Several speakers at once."""
    length = SECONDS_OF_NOISE * SAMPLE_RATE_IN_HZ
    sum_of_voices = np.zeros(length, np.float32)
    for _ in range(VOICES_OF_BABBLE):
        places = generator.permutation(len(waveforms))
        voice = np.concatenate([waveforms[place] for place in places[:30]])
        sum_of_voices += np.resize(voice, length)
    return sum_of_voices / np.abs(sum_of_voices).max()


def coloured(exponent: float, generator: np.random.Generator) -> np.ndarray:
    """Noise whose power falls with a power of the frequency: 1 is pink, 2 is brown."""
    length = SECONDS_OF_NOISE * SAMPLE_RATE_IN_HZ
    spectrum = np.fft.rfft(generator.normal(size=length))
    spectrum /= np.maximum(np.arange(len(spectrum)), 20.0) ** (exponent / 2)
    noise = np.fft.irfft(spectrum, length)
    return (noise / np.abs(noise).max()).astype(np.float32)


def write_training_noise(data: Path, folder: Path) -> Path:
    generator = np.random.default_rng(1)
    waveforms = [waveform for _, _, waveform in read_split(data / "train")]
    folder.mkdir()
    for number in range(8):
        soundfile.write(
            folder / f"babble{number}.wav", babble(waveforms, generator), SAMPLE_RATE_IN_HZ
        )
        soundfile.write(folder / f"pink{number}.wav", coloured(1.0, generator), SAMPLE_RATE_IN_HZ)
    return folder


def write_noisy_test(data: Path, folder: Path, num_clips: int) -> Path:
    generator = np.random.default_rng(2)
    waveforms = [waveform for _, _, waveform in read_split(data / "validation")]
    noises = [babble(waveforms, generator) for _ in range(4)]
    noises += [coloured(2.0, generator) for _ in range(4)]
    augmenter = Augmenter(
        noises=[np.int16(noise * 32_767) for noise in noises],
        noise_probability=1.0,
        snr_in_db=TEST_SNR_IN_DB,
    )
    (folder / "test").mkdir(parents=True)
    with open(folder / "test" / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "transcription"])
        for number, (_, text, waveform) in enumerate(read_split(data / "test")[:num_clips]):
            noisy = augmenter(waveform, (2, number))
            soundfile.write(folder / "test" / f"{number}.wav", noisy, SAMPLE_RATE_IN_HZ)
            writer.writerow([f"{number}.wav", text])
    return folder


def run_once(flags: list[str], seed: int, options: argparse.Namespace, folder: Path) -> dict:
    """WER on both test splits, and seconds."""
    values = {
        "model_name_or_path": options.model,
        "data_mix": folder / "mix.yaml",
        "output_dir": folder / "output",
        "max_steps": options.steps,
        "save_steps": options.steps,
        "logging_steps": 10,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "seed": seed,
        "train_window": "longest",
        "shuffle_buffer_size": 96,
        "max_eval_samples": options.clips,
        "data_report_samples": 0,
        "report_to": "none",
        "report_clips": 0,
        "learning_rate": 3.75e-5,
        "generation_max_length": 48,
    }
    words = [
        os.environ.get("PYTHON_EXEC", sys.executable),
        str(SCRIPT),
        "--do_train",
        "--do_lower_case",
    ]
    words += [text for flag, value in values.items() for text in (f"--{flag}", str(value))]
    start = time.monotonic()
    subprocess.run([*words, *flags], check=True, stdout=subprocess.DEVNULL)
    metrics = json.loads((folder / "output" / "all_results.json").read_text())
    return {
        "clean": metrics["test_clean_wer"],
        "noisy": metrics["test_noisy_wer"],
        "seconds": time.monotonic() - start,
    }


def table(records: list[dict]) -> str:
    lines = [
        "| trained | seeds | WER clean, mean (each) | WER noisy, mean (each) |",
        "|---|---|---|---|",
    ]
    for name in dict.fromkeys(record["name"] for record in records):
        runs = [record for record in records if record["name"] == name]
        cells = [name, str(len(runs))]
        for split in ("clean", "noisy"):
            scores = [run[split] for run in runs]
            cells.append(f"{mean(scores):.1f} ({', '.join(f'{score:.1f}' for score in scores)})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--dataset_name", type=Path)
    parser.add_argument("--record", type=Path, required=True, help="JSON lines, appended to.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--clips", type=int, default=100, help="Test clips that are scored.")
    parser.add_argument("--table", action="store_true", help="Only prints what has been recorded.")
    options = parser.parse_args()
    for seed in [] if options.table else options.seeds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            noise = write_training_noise(options.dataset_name, folder / "noise")
            noisy = write_noisy_test(options.dataset_name, folder / "noisy", options.clips)
            mix = [
                {
                    "name": "clean",
                    "dataset_name": str(options.dataset_name),
                    "test_split_name": "test",
                },
                {
                    "name": "noisy",
                    "dataset_name": str(noisy),
                    "train_split_name": None,
                    "test_split_name": "test",
                },
            ]
            (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
            contestants = {
                "without": [],
                "with noise in half of the clips": ["--noise_dataset", str(noise)],
            }
            for contestant, flags in contestants.items():
                found = run_once(flags, seed, options, folder)
                with open(options.record, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"name": contestant, "seed": seed, **found}) + "\n")
                shutil.rmtree(folder / "output")
    print(table([json.loads(line) for line in options.record.read_text().splitlines()]))


if __name__ == "__main__":
    main()
