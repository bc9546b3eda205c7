"""Whether --nonspeech_fraction stops a model from writing words where nobody speaks.

    python benchmarks/nonspeech.py --seeds 1 2 3

A tiny model and synthetic speech, as `bash run.sh learn` has them, trained without and with a tenth
of its rows as noise or silence. Scored are 100 clips of speech, and 100 in which nobody speaks:
hum and its overtones, crackle, gusts of wind, and silence, none of which is what the training makes.
"""

import argparse
import contextlib
import csv
import io
import tempfile
from pathlib import Path

import numpy as np
from prompts import run_toy

from speech_finetuning.cli.demonstration import encode, make_model, make_rows

RATE_IN_HZ = 16_000


def hum(num_samples: int, generator: np.random.Generator) -> np.ndarray:
    """The mains and its overtones."""
    times = np.arange(num_samples) / RATE_IN_HZ
    base_in_hz = float(generator.choice([50, 60]))
    sound = np.zeros(num_samples)
    for overtone in range(1, 8):
        sound += np.sin(2 * np.pi * base_in_hz * overtone * times) / overtone
    return sound


def crackle(num_samples: int, generator: np.random.Generator) -> np.ndarray:
    """Single clicks over a soft hiss."""
    clicks = generator.random(num_samples) < 0.001
    return clicks * generator.normal(size=num_samples) * 5 + generator.normal(0, 0.05, num_samples)


def gusts(num_samples: int, generator: np.random.Generator) -> np.ndarray:
    """Soft noise that rises and falls a few times a second."""
    noise = np.convolve(generator.normal(size=num_samples), np.ones(40) / 40, mode="same")
    times = np.arange(num_samples) / RATE_IN_HZ
    return noise * (1 + np.sin(2 * np.pi * generator.uniform(0.5, 3) * times))


def nobody_speaks(generator: np.random.Generator) -> np.ndarray:
    """(n_samples,) of one to two seconds, of one of the kinds, at -60 to -20 dB."""
    num_samples = int(generator.uniform(1, 2) * RATE_IN_HZ)
    kind = int(generator.integers(4))
    if kind == 3:
        return np.zeros(num_samples)
    sound = (hum, crackle, gusts)[kind](num_samples, generator)
    level = 10 ** (generator.uniform(-60, -20) / 20)
    return np.clip(sound / np.sqrt(np.mean(sound**2)) * level, -1, 1)


def write_split(folder: Path, split: str, num_rows: int, num_silent: int, seed: int) -> None:
    """Clips of speech, then of none, and a metadata.csv."""
    generator = np.random.default_rng(seed)
    rows = make_rows(num_rows, seed)
    rows += [(encode(nobody_speaks(generator)), "") for _ in range(num_silent)]
    (folder / split).mkdir(parents=True)
    with open(folder / split / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        for number, (data, text) in enumerate(rows):
            (folder / split / f"{number}.flac").write_bytes(data)
            writer.writerow([f"{number}.flac", text])


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    print("| rows without speech | seed | WER of speech | words invented a minute |")
    print("|---|---|---|---|")
    for seed in options.seeds:
        for fraction in (0.0, 0.1):
            with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
                folder = Path(place)
                make_model(folder / "model", seed=seed)
                write_split(folder / "speech", "train", 2000, 0, seed)
                write_split(folder / "speech", "validation", 100, 100, seed + 1000)
                flags = ["--keep_empty_text", "--nonspeech_fraction", str(fraction)]
                found = run_toy(folder, flags, seed, options.steps)
            print(
                f"| {100 * fraction:.0f} % | {seed} | {found['eval_wer']:.2f} | "
                f"{found['eval_invented_words_per_minute']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
