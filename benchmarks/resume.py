"""Time from a saved position to the next example, against reading again from the start (what skipping batches does).

    python benchmarks/resume.py [--rows 20000] [--repetitions 5]

The data are `--rows` synthetic clips in parquet files of 500 rows; the positions are those of steps 10, 1,000 and
100,000 of 16 rows, so that the last lies 80 passes in. Both ways run in turn, five times, in one process (reading
again for step 100,000 once).
"Re-reading" passes undecoded rows only, which favours it: the library's skipping would decode them all.
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
import synthetic

import run_speech_recognition_seq2seq_streaming as script

BATCH_SIZE = 16


def position_at(stream: script.SpeechStream, step: int, num_rows: int) -> dict:
    """The position after `step` steps: whole passes are skipped by arithmetic, the rest is read undecoded."""
    passes, rest = divmod(step * BATCH_SIZE, num_rows)
    start = {"pass": passes, "block": 0, "shard": 0, "shard_state": None, "rows": 0}
    place = {"start": start, "offset": 0, "rows_per_pass": num_rows, "used": passes * num_rows}
    position = {"row": passes * num_rows, "skip": 0, "sources": [place]}
    if rest == 0:
        return position
    stream.position = position
    return next(itertools.islice(stream.rows(), rest - 1, None))[0] | {"skip": 0}


def first_example(stream: script.SpeechStream, position: dict) -> tuple[float, str]:
    """Seconds to the first example after a position, and its id."""
    stream.position = position
    began = time.perf_counter()
    _, example = next(iter(stream))
    return time.perf_counter() - began, example["id"]


def read_again(stream: script.SpeechStream, num_rows: int) -> tuple[float, str]:
    """Seconds to the same example by passing num_rows undecoded rows from the very beginning, and its id."""
    stream.position = None
    began = time.perf_counter()
    _, item = next(itertools.islice(stream.rows(), num_rows, None))
    return time.perf_counter() - began, stream.prepare(item)["id"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clips = synthetic.make_rows(500, seed=0)
        for shard in range(args.rows // 500):
            synthetic.write_parquet(folder / "data" / f"train-{shard:05}.parquet", clips)
        preparer = conftest.make_preparer(synthetic.make_model(folder / "model", d_model=16, num_layers=1))
        source = script.load_source(str(folder / "data"), None, "train", ("audio", "text"), None, True, "")
        stream = script.SpeechStream((script.SpeechSet(source, preparer),), 1, 500, BATCH_SIZE, 2)
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


if __name__ == "__main__":
    main()
