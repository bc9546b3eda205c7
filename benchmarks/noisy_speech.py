"""What augmentation gives on real speech: WER of clean, noisy and reverberant test clips after
training without, with noise, and with noise and rooms.

    python benchmarks/noisy_speech.py --model MODEL --dataset_name DATA --record results.jsonl \\
        --seeds 1 2 3 [--steps 180] [--at_once 3]
    python benchmarks/noisy_speech.py --record results.jsonl --table

DATA is an audio folder with the splits train, validation and test. Noises are babble (several
voices at the same time) and noise between white and brown that swells and fades; rooms are decaying
noise after a direct sound (Moorer 1979), with reverberation times of 0.2 to 0.8 s. What is trained
with and what is scored with are made from other voices (train, validation) and other draws. The
noisy test clips have 0 to 15 dB of speech over noise.

Each run is the script itself in a process of its own. Flags that it does not know go to the script.
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
from scipy.signal import fftconvolve

PYTHON = os.environ.get("PYTHON_EXEC", sys.executable)
SCRIPT = Path(__file__).parent.parent / "run_speech_recognition_seq2seq_streaming.py"
RATE_IN_HZ = 16_000
NUM_NOISES = 40
NUM_ROOMS = 40
NOISE_IN_SECONDS = 20
SNR_IN_DB = (0.0, 15.0)  # of the noisy test clips
REVERBERATION_IN_SECONDS = (0.2, 0.8)  # until the sound has fallen by 60 dB
CONTESTANTS = {
    "none": [],
    "noise": ["--noise_dataset", "noises"],
    "noise and rooms": ["--noise_dataset", "noises", "--room_dataset", "rooms"],
}
SETS = ("clean", "noisy", "rooms")


# ------------------------------------------------------------------------------------- the sounds
def read_split(dataset: Path, split: str) -> list[tuple[str, np.ndarray, str]]:
    """(file name, (n_samples,), transcript) of every clip."""
    rows = []
    with open(dataset / split / "metadata.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            waveform, rate_in_hz = soundfile.read(
                dataset / split / row["file_name"], dtype="float32"
            )
            assert rate_in_hz == RATE_IN_HZ
            rows.append((row["file_name"], waveform, row["transcription"]))
    return rows


def babble(waveforms: list[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """Four to eight voices at the same time, of the same power."""
    num_samples = NOISE_IN_SECONDS * RATE_IN_HZ
    total = np.zeros(num_samples)
    for _ in range(int(generator.integers(4, 9))):
        order = generator.permutation(len(waveforms))
        voice = np.concatenate([waveforms[number] for number in order[:20]])
        voice = np.resize(voice, num_samples)
        total += voice / np.sqrt(np.mean(voice**2))
    return total


def coloured_noise(generator: np.random.Generator) -> np.ndarray:
    """Between white and brown, ten to forty dB softer and louder several times a minute."""
    num_samples = NOISE_IN_SECONDS * RATE_IN_HZ
    spectrum = np.fft.rfft(generator.normal(size=num_samples))
    frequencies = np.maximum(np.fft.rfftfreq(num_samples, 1 / RATE_IN_HZ), 20.0)
    noise = np.fft.irfft(spectrum * frequencies ** -generator.uniform(0, 1), num_samples)
    levels_in_db = generator.uniform(-10, 10, NOISE_IN_SECONDS // 2 + 1)
    times = np.linspace(0, len(levels_in_db) - 1, num_samples)
    return noise * 10 ** (np.interp(times, np.arange(len(levels_in_db)), levels_in_db) / 20)


def make_noise(waveforms: list[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """(n_samples,) with a peak of 0.5."""
    is_babble = generator.random() < 0.5
    noise = babble(waveforms, generator) if is_babble else coloured_noise(generator)
    return 0.5 * noise / np.abs(noise).max()


def make_room(generator: np.random.Generator) -> np.ndarray:
    """An impulse response: the direct sound, then noise that decays."""
    reverberation = generator.uniform(*REVERBERATION_IN_SECONDS)
    num_samples = int(reverberation * RATE_IN_HZ)
    decay = 10 ** (-3 * np.arange(num_samples) / num_samples)
    room = generator.normal(size=num_samples) * decay * generator.uniform(0.02, 0.08)
    room[: int(generator.uniform(0.001, 0.01) * RATE_IN_HZ)] = 0
    room[0] = 1.0
    return room / np.abs(room).max()


def write_sounds(folder: Path, waveforms: list[np.ndarray], generator: np.random.Generator) -> None:
    """The folders `noises` and `rooms`, for the training."""
    for name in ("noises", "rooms"):
        (folder / name).mkdir()
    for number in range(NUM_NOISES):
        noise = make_noise(waveforms, generator)
        soundfile.write(folder / "noises" / f"{number}.flac", noise, RATE_IN_HZ)
    for number in range(NUM_ROOMS):
        soundfile.write(folder / "rooms" / f"{number}.wav", make_room(generator), RATE_IN_HZ)


def with_noise(speech: np.ndarray, noise: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(n_samples,) of speech with a piece of the noise at one of SNR_IN_DB."""
    start = int(generator.integers(len(noise) - len(speech))) if len(speech) < len(noise) else 0
    piece = np.resize(noise[start:], len(speech))
    snr_in_db = generator.uniform(*SNR_IN_DB)
    factor = np.sqrt(np.mean(speech**2) / np.mean(piece**2)) * 10 ** (-snr_in_db / 20)
    return speech + factor * piece


def write_set(folder: Path, rows: list[tuple[str, np.ndarray, str]]) -> None:
    """An audio folder with a split `test`."""
    (folder / "test").mkdir(parents=True)
    with open(folder / "test" / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "transcription"])
        for name, waveform, text in rows:
            path = Path(name).with_suffix(".wav").name
            loudest = max(1.0, float(np.abs(waveform).max()))
            soundfile.write(folder / "test" / path, waveform / loudest, RATE_IN_HZ, "PCM_16")
            writer.writerow([path, text])


def write_test_sets(folder: Path, dataset: Path, generator: np.random.Generator) -> None:
    """The noisy and the reverberant copy of the test split."""
    others = [waveform for _, waveform, _ in read_split(dataset, "validation")]
    noisy = []
    reverberant = []
    for name, waveform, text in read_split(dataset, "test"):
        noisy.append((name, with_noise(waveform, make_noise(others, generator), generator), text))
        room = make_room(generator)
        heard = fftconvolve(waveform, room)[: len(waveform)]
        reverberant.append((name, heard, text))
    write_set(folder / "noisy", noisy)
    write_set(folder / "rooms", reverberant)


def prepare(folder: Path, dataset: Path) -> None:
    """Sounds for the training in `sounds`, test sets beside it, and the mix of all of them."""
    (folder / "sounds").mkdir()
    waveforms = [waveform for _, waveform, _ in read_split(dataset, "train")]
    write_sounds(folder / "sounds", waveforms, np.random.default_rng(1))
    write_test_sets(folder, dataset, np.random.default_rng(2))
    entries = [{"dataset_name": str(dataset), "name": "clean", "eval_split_name": "test"}]
    for name in SETS[1:]:
        entry = {"dataset_name": str(folder / name), "name": name, "eval_split_name": "test"}
        entries.append(entry | {"train_split_name": None})
    (folder / "mix.yaml").write_text(json.dumps(entries))  # JSON is YAML


# --------------------------------------------------------------------------------------- the runs
def command(name: str, seed: int, options: argparse.Namespace, folder: Path) -> list[str]:
    """Trains on 16 utterances a step, and scores the three sets at the end."""
    values = {
        "model_name_or_path": options.model,
        "data_mix": folder / "mix.yaml",
        "output_dir": folder / f"{name.replace(' ', '-')}-{seed}",
        "max_steps": options.steps,
        "save_steps": options.steps,
        "eval_steps": options.steps,
        "logging_steps": 10,
        "per_device_train_batch_size": 16,
        "seed": seed,
        "train_window": "longest",
        "shuffle_buffer_size": 96,
        "data_report_samples": 0,
        "report_to": "none",
        "report_clips": 0,
        "learning_rate": 3.75e-5,
        "generation_max_length": 48,
    }
    words = [PYTHON, str(SCRIPT), "--do_train", "--do_eval", "--do_lower_case"]
    for flag, value in values.items():
        words += [f"--{flag}", str(value)]
    for word in CONTESTANTS[name]:
        words.append(word if word.startswith("--") else str(folder / "sounds" / word))
    return words + options.flags


def run_once(name: str, seed: int, options: argparse.Namespace, folder: Path) -> dict:
    """WER and its interval of each set."""
    words = command(name, seed, options, folder)
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    output = Path(words[words.index("--output_dir") + 1])
    metrics = json.loads((output / "all_results.json").read_text())
    wers = {name: metrics[f"eval_{name}_wer"] for name in SETS}
    return {"name": name, "seed": seed, "steps": options.steps, "wer": wers}


def run_all(options: argparse.Namespace) -> None:
    """Interleaved: whatever else the machine does meets all contestants."""
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(options.at_once) as pool:
        folder = Path(place)
        prepare(folder, Path(options.dataset_name).resolve())
        runs = [
            pool.submit(run_once, name, seed, options, folder)
            for seed in options.seeds
            for name in options.only
        ]
        for run in as_completed(runs):
            with options.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run.result()) + "\n")


def table(records: list[dict]) -> str:
    """Markdown: mean WER of each set, and that of each seed."""
    lines = [
        "| trained with | steps | seeds | clean | noisy | rooms |",
        "|---|---|---|---|---|---|",
    ]
    groups = defaultdict(list)
    for record in records:
        groups[record["name"], record["steps"]].append(record["wer"])
    for (name, steps), scores in groups.items():
        cells = [name, str(steps), str(len(scores))]
        for set_name in SETS:
            wers = [score[set_name] for score in scores]
            cells.append(f"{mean(wers):.1f} ({', '.join(f'{wer:.1f}' for wer in wers)})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--dataset_name")
    parser.add_argument("--record", type=Path, required=True, help="JSON lines; appended to.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--at_once", type=int, default=1, help="Runs at the same time.")
    parser.add_argument("--table", action="store_true", help="Only prints what has been recorded.")
    options, options.flags = parser.parse_known_args()
    if not options.table:
        run_all(options)
    print(table([json.loads(line) for line in options.record.read_text().splitlines()]))


if __name__ == "__main__":
    main()
