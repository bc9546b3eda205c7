"""How well the order of a pass mixes data that are sorted by speaker: the first order against the
second (data/positions.py), and a perfect shuffle.

    python benchmarks/shuffle_mixing.py mixing [--speakers 100] [--rows 100]
    python benchmarks/shuffle_mixing.py wer [--steps 250] [--seeds 3]

"mixing" writes so many speakers, each with so many rows, one speaker after the other, as one list,
as 10 parquet files in row groups of 100 and of 1,000 rows, as 10 tars and as one, and reads passes
of undecoded rows, in blocks of 500:

* rank correlation (Spearman) of the pass's order with that of the files, and with that of the pass
  before; means of the absolute value over 20 passes;
* distinct speakers in a batch of 16 rows, mean over the batches of those passes;
* rows/s of reading alone, and the seconds that the first row takes after a restart in the middle of
  a pass (median of 5).

"wer" trains the toy of `bash run.sh learn` from nothing on such a list of 20 speakers with 100 rows
each. A speaker has a voice (all tones times 0.8 to 1.25) and a topic: four rows of five are of
three of the ten words. It is scored on 200 rows of 20 other speakers, all words alike. Both orders
in turn, for each seed.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "tests" / "support"),
]

import numpy as np
import preprocessors

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.cli import demonstration
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.sources import load_source
from speech_finetuning.data.stream import SpeechStream

BATCH_SIZE = 16
BLOCK_SIZE = 500
NUM_PASSES = 20
NUM_FILES = 10
NUM_RESTARTS = 5
CLIP_IN_BYTES = 2_000
ORDERS = {1: "first", 2: "second"}


# ------------------------------------------------------------------------------------ mixing ----
def write_list(folder: Path, num_rows: int) -> None:
    (folder / "clips").mkdir(parents=True)
    (folder / "clips" / "0.flac").write_bytes(bytes(CLIP_IN_BYTES))
    lines = [f"clips/{number}.flac,uno\n" for number in range(num_rows)]
    (folder / "train.csv").write_text("path,text\n" + "".join(lines))


def write_parquet(folder: Path, num_rows: int, row_group_size: int) -> None:
    clip = bytes(CLIP_IN_BYTES)
    rows_per_file = num_rows // NUM_FILES
    for file in range(NUM_FILES):
        demonstration.write_parquet(
            folder / f"train-{file:05}.parquet",
            [(clip, "uno")] * rows_per_file,
            row_group_size=row_group_size,
        )


def write_tars(folder: Path, num_rows: int, num_files: int) -> None:
    folder.mkdir(parents=True)
    rows_per_file = num_rows // num_files
    for file in range(num_files):
        with tarfile.open(folder / f"train-{file:05}.tar", "w") as tar:
            for number in range(file * rows_per_file, (file + 1) * rows_per_file):
                for ending, data in (("flac", bytes(CLIP_IN_BYTES)), ("txt", b"uno")):
                    member = tarfile.TarInfo(f"{number}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_layouts(folder: Path, num_rows: int) -> dict[str, Path]:
    write_list(folder / "list", num_rows)
    write_parquet(folder / "groups-of-100", num_rows, 100)
    write_parquet(folder / "groups-of-1000", num_rows, 1_000)
    write_tars(folder / "tars", num_rows, NUM_FILES)
    write_tars(folder / "tar", num_rows, 1)
    return {
        "one list": folder / "list",
        "10 parquet files, row groups of 100": folder / "groups-of-100",
        "10 parquet files, row groups of 1,000": folder / "groups-of-1000",
        "10 tars": folder / "tars",
        "one tar": folder / "tar",
    }


def number_of(row_id: str, rows_per_file: int) -> int:
    """A row's number in the order of the files, from its id."""
    _, _, file, path = row_id.split("/", 3)
    stem = path.rpartition("/")[2].removesuffix(".flac")
    if "-" not in stem:
        return int(stem)
    return int(file) * rows_per_file + int(stem.rpartition("-")[2])


def make_stream(place: Path, order_version: int, model: Path) -> SpeechStream:
    dataset = SpeechDataset(
        load_source(str(place), split="train"),
        preprocessors.make_preprocessor(model),
        order_version=order_version,
    )
    return SpeechStream(
        sets=(dataset,), seed=1, block_size=BLOCK_SIZE, micro_batch_size=BATCH_SIZE, num_threads=1
    )


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, of two orders of the same rows: that of their ranks."""
    return abs(float(np.corrcoef(np.argsort(one), np.argsort(other))[0, 1]))


def restart_in_seconds(stream: SpeechStream, num_rows: int) -> float:
    """To the first row after a position in the middle of a pass, as a new process would."""
    position, _ = next(itertools.islice(stream.rows(), num_rows // 2, None))
    times = []
    for _ in range(NUM_RESTARTS):
        resumed = replace(stream, position=position)
        began = time.perf_counter()
        rows = resumed.rows()
        next(rows)
        times.append(time.perf_counter() - began)
        rows.close()
    return statistics.median(times)


def measure(stream: SpeechStream, num_rows: int, rows_per_speaker: int) -> list[float]:
    """The figures of a line of the table."""
    rows_per_file = num_rows // NUM_FILES
    began = time.perf_counter()
    ids = [drawn.row.id for _, drawn in itertools.islice(stream.rows(), NUM_PASSES * num_rows)]
    seconds = time.perf_counter() - began
    numbers = np.array([number_of(row_id, rows_per_file) for row_id in ids])
    passes = numbers.reshape(NUM_PASSES, num_rows)
    with_files = [correlation(order, np.arange(num_rows)) for order in passes]
    with_last = [correlation(*pair) for pair in itertools.pairwise(passes)]
    batches = (numbers // rows_per_speaker)[: len(numbers) // BATCH_SIZE * BATCH_SIZE]
    speakers = [len(set(batch)) for batch in batches.reshape(-1, BATCH_SIZE).tolist()]
    return [
        statistics.mean(with_files),
        statistics.mean(with_last),
        statistics.mean(speakers),
        len(ids) / seconds,
        restart_in_seconds(stream, num_rows),
    ]


def perfect(num_rows: int, rows_per_speaker: int) -> list[float]:
    """The first three figures of a permutation of all rows."""
    generator = np.random.default_rng(0)
    passes = [generator.permutation(num_rows) for _ in range(NUM_PASSES)]
    numbers = np.concatenate(passes) // rows_per_speaker
    batches = numbers[: len(numbers) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)
    return [
        statistics.mean(correlation(order, np.arange(num_rows)) for order in passes),
        statistics.mean(correlation(*pair) for pair in itertools.pairwise(passes)),
        statistics.mean(len(set(batch)) for batch in batches.tolist()),
    ]


def print_mixing(num_speakers: int, rows_per_speaker: int) -> None:
    num_rows = num_speakers * rows_per_speaker
    print(
        "| data | order | correlation with the files | with the pass before | speakers in a batch "
        "of 16 | rows/s | restart, s |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as name:
        model = demonstration.make_model(Path(name) / "model", d_model=16, num_layers=1)
        for layout, place in write_layouts(Path(name), num_rows).items():
            for version, title in ORDERS.items():
                stream = make_stream(place, version, model)
                figures = measure(stream, num_rows, rows_per_speaker)
                print(
                    f"| {layout} | {title} | {figures[0]:.3f} | {figures[1]:.3f} | "
                    f"{figures[2]:.1f} | {figures[3]:,.0f} | {figures[4]:.3f} |",
                    flush=True,
                )
    figures = perfect(num_rows, rows_per_speaker)
    print(f"| any | perfect | {figures[0]:.3f} | {figures[1]:.3f} | {figures[2]:.1f} | | |")


# --------------------------------------------------------------------------------------- WER ----
def make_voice(
    generator: np.random.Generator, num_rows: int, *, has_topic: bool
) -> Iterator[tuple[bytes, str]]:
    """(FLAC, text) of the rows of one speaker."""
    words = demonstration.WORDS
    pitch = generator.uniform(0.8, 1.25)
    topic = [str(word) for word in generator.choice(words, 3, replace=False)]
    for _ in range(num_rows):
        vocabulary = topic if has_topic and generator.random() < 0.8 else words
        text = [str(word) for word in generator.choice(vocabulary, generator.integers(1, 6))]
        waveform = demonstration.speak(text, generator)
        # A voice: the same tones, faster or slower by the clock.
        rate = round(pitch * demonstration.SAMPLE_RATE_IN_HZ)
        yield demonstration.encode(waveform, sampling_rate=rate), " ".join(text)


def write_voices(folder: Path, split: str, num_speakers: int, num_rows: int, seed: int) -> None:
    """A list, sorted by speaker."""
    generator = np.random.default_rng(seed)
    (folder / split).mkdir(parents=True)
    lines = ["path,text,speaker\n"]
    for speaker in range(num_speakers):
        voice = make_voice(generator, num_rows, has_topic=split == "train")
        for number, (data, text) in enumerate(voice):
            path = f"{split}/{speaker:03}-{number:03}.flac"
            (folder / path).write_bytes(data)
            lines.append(f"{path},{text},{speaker}\n")
    (folder / f"{split}.csv").write_text("".join(lines))


def records_in_order(
    data_records: Callable[..., list[Any]], order_version: int, data_args: Any
) -> list[Any]:
    records = data_records(data_args)
    for record in records:
        record.order_version = order_version
    return records


def train_once(order_version: int, seed: int, num_steps: int, folder: Path) -> None:
    """In a child: prints the WER after training."""
    script.data_records = functools.partial(records_in_order, script.data_records, order_version)
    with tempfile.TemporaryDirectory() as output_dir, contextlib.redirect_stdout(sys.stderr):
        metrics = script.main(
            [
                *f"--model_name_or_path {folder}/model --dataset_name {folder}/speech".split(),
                *f"--output_dir {output_dir} --seed {seed} --max_steps {num_steps}".split(),
                *"--language es --do_train --do_eval --learning_rate 2e-3".split(),
                *"--warmup_steps 50 --per_device_train_batch_size 16".split(),
                *f"--per_device_eval_batch_size 50 --save_strategy no --eval_steps {num_steps}".split(),
                *"--report_to none --data_report_samples 0 --generation_max_length 24".split(),
            ]
        )
    print(json.dumps({"wer": metrics["eval_wer"], "loss": metrics["train_loss"]}))


def print_wer(num_steps: int, num_seeds: int) -> None:
    print("| seed | WER, first order | WER, second order |\n|---|---|---|")
    wers: dict[int, list[float]] = {version: [] for version in ORDERS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demonstration.make_model(folder / "model")
        write_voices(folder / "speech", "train", 20, 100, seed=1)
        write_voices(folder / "speech", "validation", 20, 10, seed=2)
        for seed in range(num_seeds):
            for version in ORDERS:
                command = [sys.executable, __file__, "turn", "--folder", name]
                command += ["--order", str(version), "--seed", str(seed), "--steps", str(num_steps)]
                result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                wers[version].append(json.loads(result.stdout.splitlines()[-1])["wer"])
            print(f"| {seed} | {wers[1][-1]:.2f} | {wers[2][-1]:.2f} |", flush=True)
    means = [statistics.mean(wers[version]) for version in ORDERS]
    print(f"| mean | {means[0]:.2f} | {means[1]:.2f} |")


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["mixing", "wer", "turn"])
    parser.add_argument("--speakers", type=int, default=100)
    parser.add_argument("--rows", type=int, default=100, help="of each speaker")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--order", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "mixing":
        print_mixing(args.speakers, args.rows)
    elif args.what == "wer":
        print_wer(args.steps, args.seeds)
    else:
        train_once(args.order, args.seed, args.steps, args.folder)


if __name__ == "__main__":
    main()
