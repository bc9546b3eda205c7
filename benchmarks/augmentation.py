"""What augmentation costs: clips a second of the stream, with and without.

    python benchmarks/augmentation.py [--clips 200] [--repetitions 7] [--threads 2]

Synthetic clips of 3 to 12 s (flac), noise of a minute and a room of half a second, made on the spot.
Contestants take turns in one process; each turn takes so many clips from the beginning of the same
stream, features included.
"""

import argparse
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "tests" / "support"),
]

import numpy as np
import soundfile
import torch
from preprocessors import make_preprocessor

from speech_finetuning.cli import demonstration
from speech_finetuning.data.augmentation import Augmenter
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.sources import load_source
from speech_finetuning.data.stream import SpeechStream

RATE_IN_HZ = demonstration.SAMPLE_RATE_IN_HZ


def make_clips(folder: Path, num_clips: int) -> Path:
    generator = np.random.default_rng(0)
    folder.mkdir()
    lines = ["file_name,text"]
    for number in range(num_clips):
        words = [str(word) for word in generator.choice(demonstration.WORDS, size=60)]
        length = int(generator.uniform(3, 12) * RATE_IN_HZ)
        soundfile.write(
            folder / f"{number}.flac", demonstration.speak(words, generator)[:length], RATE_IN_HZ
        )
        lines.append(f"{number}.flac,{' '.join(words[:8])}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def contestants() -> dict[str, Augmenter | None]:
    generator = np.random.default_rng(1)
    noise = [(generator.normal(0, 0.1, 60 * RATE_IN_HZ) * 2**15).astype(np.int16)]
    room = np.exp(-np.arange(RATE_IN_HZ // 2) / 1500) * generator.normal(0, 0.1, RATE_IN_HZ // 2)
    room[100] = 1.0
    rooms = [room.astype(np.float32)]
    return {
        "none": None,
        "noise in all": Augmenter(noises=noise, noise_probability=1.0),
        "rooms in all": Augmenter(rooms=rooms, room_probability=1.0),
        "telephone in all": Augmenter(telephone_probability=1.0),
        "gain in all": Augmenter(gain_in_db=(-10.0, 5.0)),
        "noise and rooms in half": Augmenter(
            noises=noise, noise_probability=0.5, rooms=rooms, room_probability=0.5
        ),
    }


def rate_of(stream: SpeechStream, num_clips: int) -> float:
    """Clips a second."""
    began = time.perf_counter()
    taken = sum(item.example is not None for item in itertools.islice(stream, num_clips))
    assert taken == num_clips
    return num_clips / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {name: [] for name in contestants()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demonstration.make_model(folder / "model", d_model=16, num_layers=1, window_in_seconds=30)
        source = load_source(str(make_clips(folder / "clips", options.clips)), split="train")
        common: dict[str, Any] = {
            "sets": (SpeechDataset(source, make_preprocessor(folder / "model")),),
            "seed": 1,
            "block_size": 100,
            "micro_batch_size": 8,
            "num_threads": options.threads,
        }
        streams = {
            name: SpeechStream(**common, augmenter=augmenter)
            for name, augmenter in contestants().items()
        }
        for _ in range(options.repetitions):
            for name, stream in streams.items():
                rates[name].append(rate_of(stream, options.clips))
    cores = len(os.sched_getaffinity(0))
    print(
        f"{time.strftime('%Y-%m-%d')}, {cores} cores, {options.threads} threads, Python {platform.python_version()}"
    )
    print(f"{options.repetitions} turns of {options.clips} clips; medians (lowest to highest)\n")
    print("| augmentation | clips/s | of the rate without |\n|---|---|---|")
    for name, found in rates.items():
        ratios = [one / other for one, other in zip(found, rates["none"], strict=True)]
        span = f"{statistics.median(found):.1f} ({min(found):.1f} to {max(found):.1f})"
        print(f"| {name} | {span} | {statistics.median(ratios):.2f} |")


if __name__ == "__main__":
    main()
