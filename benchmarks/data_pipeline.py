"""Clips per second that the stream delivers, against the bare work on the same bytes in memory.

    python benchmarks/data_pipeline.py [--clips 640] [--repetitions 5]

640 mp3 clips of about 6 s at 48 kHz in 8 parquet files. "bare" is a plain loop of decode, resample and log-mel in one
thread of this process; "stream" is everything: reading parquet, block shuffle, threads, label, DataLoader worker and
collator. All take turns, `--repetitions` times in one run; the table gives medians. torch uses one thread everywhere.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

import conftest
import numpy as np
import pyarrow.parquet as pq
import synthetic
import torch

import run_speech_recognition_seq2seq_streaming as script

BATCH_SIZE = 16


def make_clips(folder: Path, num_clips: int) -> None:
    """Speech-like mp3 clips of 4 to 8 s at 48 kHz in 8 parquet files."""
    generator = np.random.default_rng(0)
    rows = []
    for i in range(num_clips):
        seconds = np.arange(int(generator.uniform(4, 8) * 48_000)) / 48_000
        voice = sum(np.sin(2 * np.pi * f * seconds) / f for f in generator.uniform(100, 4_000, size=12)) * 100
        noise = generator.normal(0, 0.05, len(seconds))
        rows.append((synthetic.encode(0.2 * voice + noise, "MP3", 48_000), f"uno dos {i}"))
    for shard in range(8):
        synthetic.write_parquet(folder / f"train-{shard:05}.parquet", rows[shard::8])


def bare(clips: list[bytes], mel_filters: np.ndarray) -> float:
    """Clips per second of decode, resample and log-mel alone."""
    began = time.perf_counter()
    for data in clips:
        script.log_mel(script.decode_audio(data), mel_filters, 3000)
    return len(clips) / (time.perf_counter() - began)


def streamed(stream: script.SpeechStream, num_threads: int, num_clips: int) -> tuple[float, float]:
    """(clips per second over one pass, seconds to the first batch) through a DataLoader worker."""
    stream.num_threads = num_threads
    loader = torch.utils.data.DataLoader(
        stream, BATCH_SIZE, collate_fn=script.SpeechCollator(1, 2, 80), num_workers=1, prefetch_factor=4
    )
    began = time.perf_counter()
    batches = iter(loader)
    next(batches)
    first = time.perf_counter() - began
    began = time.perf_counter()
    count = sum(batch["ride"]["num_rows"] for batch in itertools.islice(batches, num_clips // BATCH_SIZE))
    return count / (time.perf_counter() - began), first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=640)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_clips(folder / "data", args.clips)
        preparer = conftest.make_preparer(synthetic.make_model(folder / "model", d_model=16, num_layers=1))
        preparer.window_in_frames = 3000
        source = script.load_source(str(folder / "data"), None, "train", ("audio", "text"), None, True)
        stream = script.SpeechStream(source, preparer, 1, 500, BATCH_SIZE, 1)
        files = [pq.read_table(path)["audio"].to_pylist() for path in sorted((folder / "data").glob("*.parquet"))]
        clips = [cell["bytes"] for file in files for cell in file]
        bare(clips[:20], preparer.mel_filters)  # librosa compiles on its first call
        results: dict[str, list[float]] = {"bare": [], "stream, 1 thread": [], "stream, 2 threads": []}
        firsts = []
        for _ in range(args.repetitions):
            results["bare"].append(bare(clips, preparer.mel_filters))
            for num_threads, key in ((1, "stream, 1 thread"), (2, "stream, 2 threads")):
                rate, first = streamed(stream, num_threads, args.clips)
                results[key].append(rate)
                firsts.append(first)
        print("| what | clips/s, median | range | to bare |\n|---|---|---|---|")
        base = statistics.median(results["bare"])
        for key, rates in results.items():
            middle = statistics.median(rates)
            print(f"| {key} | {middle:.0f} | {min(rates):.0f} to {max(rates):.0f} | {middle / base:.2f} |")
        print(f"\nfirst batch after {statistics.median(firsts):.2f} s (median)")


if __name__ == "__main__":
    main()
