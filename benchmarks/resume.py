"""Time from a saved position to the next example, against reading again from the start (what
skipping batches does).

    python benchmarks/resume.py [--rows 20000] [--repetitions 5]

The data are `--rows` synthetic clips in parquet files of 500 rows; the positions are those of steps
10, 1,000 and 100,000 of 16 rows, so that the last lies 80 passes in. Both ways run in turn, five
times, in one process (reading again for step 100,000 once).
"Re-reading" passes undecoded rows only, which favours it: the library's skipping would decode them
all.

A second table is of places within one parquet file of 5,000 rows in row groups of 100, of which
only the groups that remain are read: against passing all rows before the place, as files of other
kinds need; from disk and from a Hub on loopback, whose bandwidth is that of the memory: over a real
network the megabytes decide.
"""

import argparse
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "tests" / "support"),
]

import preprocessors
from hub import Hub, Request

from speech_finetuning.cli import demonstration
from speech_finetuning.data.positions import BlockStart, SourcePosition, StreamPosition
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.shards import ShardReader
from speech_finetuning.data.sources import load_source
from speech_finetuning.data.stream import SpeechStream

BATCH_SIZE = 16
GROUP_SIZE, NUM_GROUPS = 100, 50


def position_at(stream: SpeechStream, step: int, num_rows: int) -> StreamPosition:
    """The position after `step` steps: whole passes are skipped by arithmetic, the rest is read
    undecoded."""
    passes, rest = divmod(step * BATCH_SIZE, num_rows)
    rows_used = passes * num_rows
    source = SourcePosition(
        start=BlockStart(pass_number=passes), rows_per_pass=num_rows, rows_used=rows_used
    )
    position = StreamPosition(row=rows_used, sources=(source,))
    if rest == 0:
        return position
    stream.position = position
    return next(itertools.islice(stream.rows(), rest - 1, None))[0]


def first_example(stream: SpeechStream, position: StreamPosition) -> tuple[float, str]:
    """Seconds to the first example after a position, and its id."""
    stream.position = position
    began = time.perf_counter()
    item = next(iter(stream))
    return time.perf_counter() - began, item.example["id"]


def read_again(stream: SpeechStream, num_rows: int) -> tuple[float, str]:
    """Seconds to the same example by passing num_rows undecoded rows from the very beginning, and
    its id."""
    stream.position = None
    began = time.perf_counter()
    _, drawn = next(itertools.islice(stream.rows(), num_rows, None))
    return time.perf_counter() - began, stream.prepare(drawn)["id"]


def time_within(name: str, num_rows: int, kind: str, repetitions: int) -> None:
    """In a child: prints the median of the seconds to the row after num_rows of a source's only
    file.
    kind: "parquet", or another one, whose files are read from their beginning."""
    source = load_source(name, split="train")
    source, times = replace(source, kind=kind), []
    for _ in range(repetitions):
        began = time.perf_counter()
        row = next(iter(ShardReader(source, (0, 0), num_rows=num_rows, wait_in_seconds=0.0)))
        times.append(time.perf_counter() - began)
        assert row.text == f"row {num_rows}", row.text
    print(statistics.median(times), flush=True)
    os._exit(0)  # Arrow may still be reading on: its threads abort an interpreter that ends


def megabytes(requests: list[Request]) -> float:
    """Fetched by requests for ranges of files."""
    ranges = (
        re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", "")) for request in requests
    )
    return sum(int(found[2]) + 1 - int(found[1]) for found in ranges if found) / 2**20


def print_within_a_file(folder: Path, repetitions: int) -> None:
    """The second table."""
    clips = [
        (data, f"row {i}")
        for i, (data, _) in enumerate(demonstration.make_rows(GROUP_SIZE, seed=0) * NUM_GROUPS)
    ]
    demonstration.write_parquet(folder / "train.parquet", clips, row_group_size=GROUP_SIZE)
    size = (folder / "train.parquet").stat().st_size / 2**20
    print(f"\none file of {len(clips)} rows in row groups of {GROUP_SIZE}, {size:.0f} MB\n")
    print(
        "| from | rows before the place | remaining groups, s | MB | all rows, s | MB |\n|---|---|---|---|---|---|"
    )
    with Hub() as server:
        server.add_repo("dataset", "alice/speech", folder)
        environment = server.environment(folder / "home") | {"HF_HUB_OFFLINE": "0"}
        for place, name in (("disk", str(folder)), ("the Hub", "alice/speech")):
            for num_rows in (500, 2_500, 4_550):
                cells = [place, f"{num_rows:,}"]
                for kind in ("parquet", "any"):
                    num_requests = len(server.requests)
                    command = [sys.executable, __file__, "--turn", name, str(num_rows), kind]
                    command += ["--repetitions", str(repetitions)]
                    result = subprocess.run(
                        command, env=environment, stdout=subprocess.PIPE, check=True, text=True
                    )
                    fetched = megabytes(server.requests[num_requests:]) / repetitions
                    cells += [f"{float(result.stdout):.3f}", f"{fetched:.0f}" if fetched else ""]
                print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--turn", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        time_within(args.turn[0], int(args.turn[1]), args.turn[2], args.repetitions)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clips = demonstration.make_rows(500, seed=0)
        for shard in range(args.rows // 500):
            demonstration.write_parquet(folder / "data" / f"train-{shard:05}.parquet", clips)
        preprocessor = preprocessors.make_preprocessor(
            demonstration.make_model(folder / "model", d_model=16, num_layers=1)
        )
        source = load_source(str(folder / "data"), split="train")
        stream = SpeechStream(
            sets=(SpeechDataset(source, preprocessor),),
            seed=1,
            block_size=500,
            micro_batch_size=BATCH_SIZE,
            num_threads=2,
        )
        print(f"{source.num_rows} rows in {len(source.shards())} files\n")
        print("| step | seek, s (median of each) | read again, s | ratio |\n|---|---|---|---|")
        for step in (10, 1_000, 100_000):
            position = position_at(stream, step, source.num_rows)
            seeks, rereads = [], []
            for _ in range(args.repetitions):
                seconds, found = first_example(stream, position)
                seeks.append(seconds)
                if step <= 1_000 or not rereads:  # 80 passes take a minute: once is enough
                    seconds, expected = read_again(stream, step * BATCH_SIZE)
                    rereads.append(seconds)
                    assert found == expected, f"{found} is not {expected}"
            seek = statistics.median(seeks)
            again = statistics.median(rereads)
            print(f"| {step:,} | {seek:.3f} | {again:.2f} | {again / seek:,.0f} |", flush=True)
        print_within_a_file(folder / "one", args.repetitions)


if __name__ == "__main__":
    main()
