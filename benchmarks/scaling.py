"""One process against two, what reading everything on every rank costs, and a model on paper of 8
and 64 GPUs.

    python benchmarks/scaling.py [--repetitions 5]

Training: a small random Whisper on synthetic speech, every process on a core of its own (trainer,
reader and decoder share it), the same batch per device; one process has the machine's other core
idle beside it. "1 + 1" are two runs at the same time that know nothing of each other: what this
machine can do at most. Contestants take turns. The figure is the `samples_per_second` of the log,
of all processes together, after the first lines.

Reading: the 640 mp3 clips of data_pipeline.py (needs espeak-ng and sox) in 8 parquet files, read
undecoded as one rank of 8 does: once all files, every eighth row kept, and once its own file only.
CPU time of this process; and the rate of the one connection that reads, from a Hub on this machine
whose every answer waits 30 ms.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
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
    str(Path(__file__).parent),
]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import data_pipeline
import ranks
from hub import Hub

from speech_finetuning.cli import demonstration
from speech_finetuning.data.passes import RankShare
from speech_finetuning.data.stream import SpeechStream

NUM_STEPS, STEPS_PER_LINE, FIRST_LINES = 30, 5, 2  # the first lines of the log are not counted
NUM_RANKS = 8  # of the reading
ASSUMED_ROWS_PER_SECOND = {
    "small": 100,
    "large-v3": 20,
}  # that one GPU trains on; not measured here
CORES_PER_GPU = 8


def make_data(folder: Path) -> None:
    sizes = {"d_model": 128, "num_layers": 2, "window_in_seconds": 4}
    demonstration.make_model(folder / "model", **sizes)
    demonstration.make_speech(folder / "speech", {"train": 400}, num_shards=4)


def start(folder: Path, name: str, cores: list[int]) -> subprocess.Popen:
    """A run with a process on each of these cores."""
    shutil.rmtree(folder / name, ignore_errors=True)
    values = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "speech",
        "language": "es",
        "output_dir": folder / name,
        "max_steps": NUM_STEPS,
        "save_steps": NUM_STEPS,
        "logging_steps": STEPS_PER_LINE,
        "per_device_train_batch_size": 8,
        "data_report_samples": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    words = [
        "--do_train",
        *(text for key, value in values.items() for text in (f"--{key}", str(value))),
    ]
    job = {
        "words": words,
        "world_size": len(cores),
        "log": str(folder / "log"),
        "cores": [[core] for core in cores],
    }
    (folder / f"{name}.json").write_text(json.dumps({"run": job}))
    command = [sys.executable, ranks.__file__, folder / f"{name}.json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def samples_per_second(folder: Path, name: str, process: subprocess.Popen) -> float:
    """Of a run, over its processes, when it has ended. Raises: RuntimeError if it has failed."""
    output = process.communicate()[0]
    if process.returncode or set(json.loads(output)["run"]) != {0}:
        raise RuntimeError((folder / "log").read_text()[-3000:])
    state = json.loads(
        (folder / name / f"checkpoint-{NUM_STEPS}" / "trainer_state.json").read_text()
    )
    lines = [
        entry["samples_per_second"]
        for entry in state["log_history"]
        if "samples_per_second" in entry
    ]
    return statistics.mean(lines[FIRST_LINES:])


def race(repetitions: int) -> dict[str, list[float]]:
    """Rows a second of one process, of two, and of two runs of one process each, taking turns."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    contestants = {"1": [[first]], "2": [[first, second]], "1 + 1": [[first], [second]]}
    results: dict[str, list[float]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        for _, (contestant, runs) in itertools.product(range(repetitions), contestants.items()):
            started = [(f"run{i}", start(folder, f"run{i}", cores)) for i, cores in enumerate(runs)]
            results[contestant].append(sum(samples_per_second(folder, *run) for run in started))
    return results


def read(stream: SpeechStream, num_rows: int) -> tuple[float, float]:
    """(CPU, wall) seconds to read that many of a rank's rows, undecoded."""
    cpu, wall = time.process_time(), time.monotonic()
    for _ in itertools.islice(stream.rows(), num_rows):
        pass
    return time.process_time() - cpu, time.monotonic() - wall


def measure_reading(folder: Path, repetitions: int) -> dict[str, float]:
    """Medians: CPU ms to read a row, read a row and drop seven, and read and prepare a row; bytes
    of a row."""
    whole = data_pipeline.make_stream(str(folder / "parquet"), ("audio", "text"), 1, folder)
    # Small blocks: what is read ahead in the end, and not used, is one block.
    rank = replace(whole, share=RankShare(world_size=NUM_RANKS), micro_batch_size=1, block_size=20)
    sharded = replace(rank, share=replace(rank.share, is_sharded_by_rank=True))
    num_rows = whole.sets[0].source.num_rows
    found: dict[str, list[float]] = {"own": [], "all": [], "prepare": []}
    for _ in range(repetitions):
        found["own"].append(read(sharded, num_rows)[0] / num_rows)
        found["all"].append(read(rank, num_rows)[0] / num_rows)
        cpu = time.process_time()
        for _ in itertools.islice(sharded, num_rows // 4):
            pass
        found["prepare"].append((time.process_time() - cpu) / (num_rows // 4))
    size = sum(path.stat().st_size for path in (folder / "parquet").glob("*.parquet"))
    medians = {name: 1000 * statistics.median(values) for name, values in found.items()}
    return medians | {"bytes": size / num_rows}


def connection_rate(folder: Path, repetitions: int) -> float:
    """Bytes a second, the median, of the one connection that reads all files from a Hub on this
    machine."""
    files = {path.name: path.read_bytes() for path in (folder / "parquet").glob("*.parquet")}
    code = "import sys, scaling; print(scaling.read_hub(sys.argv[1], int(sys.argv[2])))"
    rates = []
    with (
        tempfile.TemporaryDirectory() as home,
        Hub(latency_in_seconds=data_pipeline.LATENCY_IN_SECONDS) as hub,
    ):
        hub.add_repo("dataset", "alice/speech", files)
        for number in range(repetitions):
            environment = hub.environment(Path(home) / str(number)) | {"HF_HUB_OFFLINE": "0"}
            command = [sys.executable, "-c", code, str(folder), str(sum(map(len, files.values())))]
            how = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
            result = subprocess.run(command, env=environment, **how)
            if result.returncode:
                raise RuntimeError(result.stderr[-2000:])
            rates.append(float(result.stdout.split()[-1]))
    return statistics.median(rates)


def read_hub(folder: str, num_bytes: int) -> float:
    """For a process of its own, whose Hub is the local one: bytes a second."""
    stream = data_pipeline.make_stream("alice/speech", ("audio", "text"), 1, Path(folder))
    return num_bytes / read(stream, stream.sets[0].source.num_rows)[1]


def print_model(cost: dict[str, float], rate: float) -> None:
    """What each rank needs, by arithmetic from the measured costs and the assumed speed of a
    GPU."""
    print(
        "\n| model | GPUs | files | cores a GPU | MB/s a GPU | MB/s in all | what is short of it |"
    )
    print("|---|---|---|---|---|---|---|")
    read_one = (cost["all"] - cost["own"]) / (NUM_RANKS - 1)  # ms to read a row and drop it
    for (model, rows), num_gpus, is_sharded_by_rank in itertools.product(
        ASSUMED_ROWS_PER_SECOND.items(), (1, 8, 64), (True, False)
    ):
        if num_gpus == 1 and not is_sharded_by_rank:
            continue
        dropped = 0 if is_sharded_by_rank else num_gpus - 1
        reading = rows * (cost["own"] + dropped * read_one) / 1000  # by one thread
        cores = rows * (cost["prepare"] + dropped * read_one) / 1000
        bandwidth = rows * cost["bytes"] * (1 + dropped)
        short = ["the connection"] * (bandwidth > rate) + ["the reading thread"] * (reading > 1)
        short += ["cores"] * (cores > CORES_PER_GPU)
        how = "dealt" if is_sharded_by_rank else "all read"
        sizes = f"{bandwidth / 1e6:.1f} | {num_gpus * bandwidth / 1e6:.0f}"
        print(
            f"| {model} | {num_gpus} | {how} | {cores:.1f} | {sizes} | {', '.join(short) or 'nothing'} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=5)
    repetitions = parser.parse_args().repetitions
    packages = {
        name: importlib.metadata.version(name)
        for name in ("torch", "transformers", "accelerate", "datasets")
    }
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}"
    )
    results = race(repetitions)
    print("\n| processes, a core each | rows/s | range |\n|---|---|---|")
    for processes, values in results.items():
        print(
            f"| {processes} | {statistics.median(values):.1f} | {min(values):.1f} to {max(values):.1f} |"
        )
    for title, other, factor in (("one process", "1", 2), ("two runs of their own", "1 + 1", 1)):
        shares = [
            both / one / factor for both, one in zip(results["2"], results[other], strict=True)
        ]
        ends = f"{min(shares):.2f} to {max(shares):.2f}"
        print(f"\nefficiency against {title}: {statistics.median(shares):.2f} ({ends})")
    folder = data_pipeline.make_data(640)
    cost, rate = measure_reading(folder, repetitions), connection_rate(folder, repetitions)
    print(
        f"\nCPU ms a row of one rank of {NUM_RANKS}: own file {cost['own']:.2f}, all files {cost['all']:.2f};"
    )
    print(f"read and prepared {cost['prepare']:.2f}. {cost['bytes'] / 1000:.0f} kB a row.")
    print(f"one connection, answers after 30 ms: {rate / 1e6:.1f} MB/s")
    print_model(cost, rate)


if __name__ == "__main__":
    main()
