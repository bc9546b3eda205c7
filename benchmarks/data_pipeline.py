"""The stream against the 2022 pipeline and against the bare work: speed, first batch, memory,
sources.

    python benchmarks/data_pipeline.py [--clips 640] [--repetitions 5] [--only KEY ...]
    python benchmarks/data_pipeline.py --memory [--clips 640]

Needs espeak-ng and sox (they make the clips, once, in the temp folder) and, for the 2022 pipeline
only, `pip install --no-deps torchcodec==0.13.0` and the FFmpeg libraries. The clips are sentences
of 4 to 8 s, mp3 at 48 kHz, the same bytes as 8 parquet files, one audio folder and one tar.

Every contestant runs in a process of its own that imports the same modules; they take turns,
`--repetitions` times. One pass warms up, the next one is timed. "First batch" counts from opening
the source, with the processor loaded. CPU time and memory are those of the process and its
DataLoader workers; "others" is what all other processes (for HTTP the Hub too) and the hypervisor
took of the machine's cores meanwhile: a row with much of it says little.

"bare" loops over decode, resample and log-mel on bytes in memory. "2022" is the event's way on
today's libraries: `datasets` decodes, the extractor pads to 30 s, torch formatting, then
shuffle(500). Its batches come padded to 30 s; the stream's are padded on the training device, which
is not timed here. "without worker" has no DataLoader process, so that two threads have two cores;
else the worker's own thread, its reader, its queue and this process need them too. torch uses one
thread everywhere, batches have 16 rows.
"""

import argparse
import functools
import importlib.metadata
import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "tests" / "support"),
]

import datasets
import numpy as np
import preprocessors
import psutil
import pyarrow.parquet as pq
import soundfile
import torch
from hub import Hub
from transformers import WhisperProcessor

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.cli import demonstration
from speech_finetuning.data.audio import decode_audio, log_mel
from speech_finetuning.data.items import StepInfo
from speech_finetuning.data.passes import MAX_BLOCK_IN_BYTES
from speech_finetuning.data.positions import ORDER_VERSION
from speech_finetuning.data.preprocessing import Preprocessor, SpeechDataset
from speech_finetuning.data.sources import load_source
from speech_finetuning.data.stream import SpeechStream

BATCH_SIZE = 16
SHUFFLE_ROWS = 500  # of the stream's block and of the 2022 buffer
LATENCY_IN_SECONDS = 0.03  # of every answer of the Hub; a range of a large file takes two
NUM_SHARDS = 8
ROWS_PER_GROUP = 35  # of the 30 s clips: 100 MB, as `datasets` writes them
NUM_LONG_CLIPS = 630
LIMIT_IN_SECONDS = 900  # for one turn of one contestant
WORDS = {
    "adjective": "old young quiet yellow careful distant famous gentle hungry modern narrow silver warm".split(),
    "noun": "teacher river doctor garden engine winter library captain village window market dragon".split(),
    "verb": "remembers follows paints answers carries discovers protects invites measures borrows".split(),
    "place": "behind the station|near the harbour|in the morning|without a reason|after the storm".split(
        "|"
    ),
}
VOICES = "en-us en-gb en-gb-scotland en-029 en-us+f2 en-gb+f3 en-us+m3 en-gb+m7 en-us+f5".split()


# ------------------------------------------------------------------------------------- clips ----
def make_sentence(generator: np.random.Generator) -> str:
    """Fourteen to twenty words."""
    clauses = []
    for _ in range(2):
        adjective, noun, verb, place = (str(generator.choice(words)) for words in WORDS.values())
        clauses.append(
            f"the {adjective} {noun} {verb} the {generator.choice(WORDS['noun'])} {place}"
        )
    return " and ".join(clauses)


def speak(number: int) -> tuple[bytes, str]:
    """(mp3 at 48 kHz, text) of the clip with this number, 4 to 8 s long, always the same."""
    generator = np.random.default_rng(number)
    while True:
        text, voice, words_per_minute = (
            make_sentence(generator),
            generator.choice(VOICES),
            generator.integers(140, 200),
        )
        command = ["espeak-ng", "-v", voice, "-s", str(words_per_minute), "--stdout", text]
        wav = subprocess.run(command, capture_output=True, check=True).stdout
        if 4 * 44_100 < len(wav) < 8 * 44_100:  # 16 bits at 22.05 kHz
            command = ["sox", "-t", "wav", "--ignore-length", "-", "-r", "48000", "-t", "mp3", "-"]
            return subprocess.run(command, input=wav, capture_output=True, check=True).stdout, text


def write_audio_folder(folder: Path, rows: list[tuple[bytes, str]]) -> None:
    """One file for each clip, and metadata.csv."""
    folder.mkdir(parents=True)
    lines = [f"{number:05}.mp3,{text}\n" for number, (_, text) in enumerate(rows)]
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(lines))
    for number, (data, _) in enumerate(rows):
        (folder / f"{number:05}.mp3").write_bytes(data)


def write_tar(path: Path, rows: list[tuple[bytes, str]]) -> None:
    """A WebDataset: N.mp3 and N.txt for each clip."""
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for number, (data, text) in enumerate(rows):
            for suffix, content in (("mp3", data), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{number:05}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def make_data(num_clips: int) -> Path:
    """The folder with the clips in three layouts and a tiny Whisper, made on the first call
    only."""
    folder = Path(tempfile.gettempdir()) / f"whisper-data-pipeline-{num_clips}"
    if folder.exists():
        return folder
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(speak, range(num_clips)))
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        unfinished = Path(name) / "data"
        for shard in range(NUM_SHARDS):
            path = unfinished / "parquet" / f"train-{shard:05}-of-{NUM_SHARDS:05}.parquet"
            demonstration.write_parquet(path, rows[shard::NUM_SHARDS])
        write_audio_folder(unfinished / "audiofolder" / "train", rows)
        write_tar(unfinished / "tar" / "train-00000.tar", rows)
        sizes = {
            "d_model": 16,
            "num_layers": 1,
            "window_in_seconds": 30,
            "max_target_positions": 448,
        }
        demonstration.make_model(unfinished / "model", **sizes)
        unfinished.rename(folder)
    return folder


def read_clips(folder: Path) -> list[bytes]:
    """The mp3 files of the parquet layout, in memory."""
    tables = [
        pq.read_table(path, columns=["audio"])
        for path in sorted((folder / "parquet").glob("*.parquet"))
    ]
    return [cell["bytes"] for table in tables for cell in table["audio"].to_pylist()]


# ------------------------------------------------------------------------------- contestants ----
@functools.cache
def load_preparer(folder: Path) -> Preprocessor:
    return preprocessors.make_preprocessor(folder / "model")


@functools.cache
def load_processor(folder: Path) -> WhisperProcessor:
    return WhisperProcessor.from_pretrained(folder / "model")


# What the script's own types look like is known in the next two functions only.
def make_stream(
    place: str,
    columns: tuple[str, str],
    num_threads: int,
    folder: Path,
    order_version: int = ORDER_VERSION,
) -> SpeechStream:
    """The script's stream over a Hub id or a folder. columns: (audio, text)."""
    source = load_source(place, split="train", audio_column=columns[0], text_column=columns[1])
    item = SpeechDataset(source, load_preparer(folder), order_version=order_version)
    return SpeechStream(
        sets=(item,),
        seed=1,
        block_size=SHUFFLE_ROWS,
        micro_batch_size=BATCH_SIZE,
        num_threads=num_threads,
    )


def block_start(info: StepInfo) -> int:
    """Rows of the first pass before the block that a batch ended in."""
    return info.position.sources[0].start.rows_before


def make_loader(
    stream: SpeechStream, folder: Path, num_workers: int = 1
) -> torch.utils.data.DataLoader:
    """As SpeechTrainer makes it."""
    preprocessor = load_preparer(folder)
    tokenizer = preprocessor.tokenizer
    collator = script.TrainCollator(
        decoder_start_token_id=tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
        pad_token_id=tokenizer.pad_token_id,
        n_mels=preprocessor.mel_filters.shape[1],
    )
    how = {"num_workers": num_workers, "prefetch_factor": 4 if num_workers else None}
    return torch.utils.data.DataLoader(stream, BATCH_SIZE, collate_fn=collator, **how)


def stream_batches(
    folder: Path,
    *,
    place: str,
    columns: tuple[str, str],
    num_threads: int,
    num_workers: int = 1,
    order_version: int = ORDER_VERSION,
) -> Iterator[int]:
    """Rows of each batch, endlessly. Raises: RuntimeError for a rejected row, which would make the
    race unfair."""
    place = place.format(folder=folder)
    stream = make_stream(place, columns, num_threads, folder, order_version)
    for batch in make_loader(stream, folder, num_workers):
        info = batch["step_info"]
        if info.error or info.rejections:
            raise RuntimeError(f"{info.error or info.rejections[0]}")
        yield info.num_rows


def work(data: bytes, mel_filters: np.ndarray) -> None:
    log_mel(decode_audio(data, lambda seconds: None)[0], mel_filters, 3000)


def bare_batches(folder: Path, num_threads: int) -> Iterator[int]:
    """One for each clip, endlessly: decode, resample and log-mel of bytes in memory, without and
    with a pool."""
    mel_filters = load_preparer(folder).mel_filters
    clips = itertools.cycle(read_clips(folder))
    if num_threads == 1:
        for data in clips:
            work(data, mel_filters)
            yield 1
    with ThreadPoolExecutor(num_threads) as pool:
        pending = [
            pool.submit(work, data, mel_filters)
            for data in itertools.islice(clips, 4 * num_threads)
        ]
        for data in clips:
            pending.pop(0).result()
            pending.append(pool.submit(work, data, mel_filters))
            yield 1


def prepare_2022(row: dict[str, Any], processor: WhisperProcessor) -> dict[str, Any]:
    """One decoded row to log-mel padded to 30 s, its length in samples and label ids."""
    audio = row["audio"]
    waveform = audio["array"]
    inputs = processor.feature_extractor(waveform, sampling_rate=audio["sampling_rate"])
    labels = processor.tokenizer(row["text"]).input_ids
    return {
        "input_features": inputs.input_features[0],
        "input_length": len(waveform),
        "labels": labels,
    }


def is_in_length_range(num_samples: int) -> bool:
    return 0 < num_samples < 30 * 16_000


def collate_2022(
    rows: list[dict[str, Any]], processor: WhisperProcessor
) -> dict[str, torch.Tensor]:
    """input_features (batch, n_mels, 3000) and labels padded with -100."""
    features = [{"input_features": row["input_features"]} for row in rows]
    batch = processor.feature_extractor.pad(features, return_tensors="pt")
    labels = processor.tokenizer.pad(
        [{"input_ids": row["labels"]} for row in rows], return_tensors="pt"
    )
    batch["labels"] = labels["input_ids"].masked_fill(labels.attention_mask.ne(1), -100)[:, 1:]
    return batch


def batches_2022(folder: Path, num_workers: int) -> Iterator[int]:
    """Rows of each batch, pass after pass. Raises: ImportError or OSError when torchcodec cannot be
    loaded."""
    import torchcodec.decoders  # noqa: F401  (datasets would only say that it is missing)

    processor = load_processor(folder)
    dataset = datasets.load_dataset(str(folder / "parquet"), split="train", streaming=True)
    dataset = dataset.cast_column("audio", datasets.Audio(sampling_rate=16_000))
    dataset = dataset.map(
        functools.partial(prepare_2022, processor=processor), remove_columns=["audio", "text"]
    )
    dataset = dataset.with_format("torch").shuffle(buffer_size=SHUFFLE_ROWS, seed=1)
    dataset = dataset.filter(is_in_length_range, input_columns=["input_length"])
    collate = functools.partial(collate_2022, processor=processor)
    options = {"num_workers": num_workers, "persistent_workers": True}
    loader = torch.utils.data.DataLoader(dataset, BATCH_SIZE, collate_fn=collate, **options)
    for number in itertools.count():
        dataset.set_epoch(number)
        for batch in loader:
            yield len(batch["labels"])


@dataclass(frozen=True)
class Contestant:
    """A row of the table. batches(folder) yields the rows of each batch."""

    title: str
    batches: Callable[[Path], Iterator[int]]
    is_online: bool = False


COLUMNS = ("audio", "text")
PARQUET = {"place": "{folder}/parquet", "columns": COLUMNS}
AUDIO_FOLDER = {"place": "{folder}/audiofolder", "columns": COLUMNS}
TAR = {"place": "{folder}/tar", "columns": ("mp3", "txt")}
HUB = {"place": "alice/speech", "columns": COLUMNS}
HTTP = f"HTTP, {1000 * LATENCY_IN_SECONDS:.0f} ms"
CONTESTANTS = {
    "bare": Contestant("bare loop, 1 thread", functools.partial(bare_batches, num_threads=1)),
    "bare-2": Contestant("bare loop, 2 threads", functools.partial(bare_batches, num_threads=2)),
    "stream": Contestant(
        "stream, 1 thread", functools.partial(stream_batches, num_threads=1, **PARQUET)
    ),
    "stream-2": Contestant(
        "stream, 2 threads", functools.partial(stream_batches, num_threads=2, **PARQUET)
    ),
    "alone": Contestant(
        "stream without worker, 1 thread",
        functools.partial(stream_batches, num_threads=1, num_workers=0, **PARQUET),
    ),
    "alone-2": Contestant(
        "stream without worker, 2 threads",
        functools.partial(stream_batches, num_threads=2, num_workers=0, **PARQUET),
    ),
    "2022": Contestant("2022, 1 worker", functools.partial(batches_2022, num_workers=1)),
    "2022-2": Contestant("2022, 2 workers", functools.partial(batches_2022, num_workers=2)),
    "folder": Contestant(
        "stream, audio folder, 1 thread",
        functools.partial(stream_batches, num_threads=1, **AUDIO_FOLDER),
    ),
    "tar": Contestant(
        "stream, one tar, 1 thread", functools.partial(stream_batches, num_threads=1, **TAR)
    ),
    "http": Contestant(
        f"stream, {HTTP}, 1 thread",
        functools.partial(stream_batches, num_threads=1, **HUB),
        is_online=True,
    ),
    "http-2": Contestant(
        f"stream, {HTTP}, 2 threads",
        functools.partial(stream_batches, num_threads=2, **HUB),
        is_online=True,
    ),
}
# The same with the order of rows of runs that began before the second one (data/positions.py).
for _key in ("stream", "folder", "tar", "http"):
    CONTESTANTS[f"{_key}-first"] = Contestant(
        f"{CONTESTANTS[_key].title}, first order",
        functools.partial(CONTESTANTS[_key].batches, order_version=1),
        is_online=CONTESTANTS[_key].is_online,
    )


# ---------------------------------------------------------------------- one turn, in a child ----
def processes() -> list[psutil.Process]:
    """This one and its DataLoader workers."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def cpu_seconds() -> float:
    return sum(
        times.user + times.system for times in (process.cpu_times() for process in processes())
    )


def memory_in_mb(file: str, field: str) -> list[float]:
    """Of each process. ("status", "VmHWM"): its largest resident size so far, ("status", "VmRSS"):
    its size now, ("smaps_rollup", "Pss"): its share now, where pages that processes share are
    divided among them."""
    texts = [Path(f"/proc/{process.pid}/{file}").read_text() for process in processes()]
    return [int(text.split(f"\n{field}:")[1].split()[0]) / 1024 for text in texts]


def machine_seconds() -> float:
    """Core seconds that the machine was busy since it started, those stolen by its hypervisor
    included."""
    times = psutil.cpu_times()._asdict()
    return sum(
        times.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal")
    )


def time_pass(batches: Iterator[int], num_clips: int) -> dict[str, float]:
    """Clips/s, CPU time for a clip and the cores that others used, over the next num_clips."""
    cpu, machine, began, count = cpu_seconds(), machine_seconds(), time.perf_counter(), 0
    while count < num_clips:
        count += next(batches)
    seconds = time.perf_counter() - began
    used, machine = cpu_seconds() - cpu, machine_seconds() - machine
    others = max(0.0, machine - used) / seconds
    return {
        "clips_per_second": count / seconds,
        "cpu_ms_per_clip": 1000 * used / count,
        "others": others,
    }


def compete(contestant: Contestant, folder: Path, num_clips: int) -> dict[str, float]:
    """Figures of one turn: seconds to the first batch, speed of the second pass, MB of memory."""
    torch.set_num_threads(1)
    load_preparer(folder)
    load_processor(folder)
    imported = sum(memory_in_mb("status", "VmHWM"))
    began = time.perf_counter()
    batches = contestant.batches(folder)
    count = next(batches)
    first, memory = time.perf_counter() - began, sum(memory_in_mb("smaps_rollup", "Pss"))
    while count < num_clips:
        count += next(batches)
    figures = time_pass(batches, num_clips) | {"first": first, "imported": imported}
    figures["resident"] = sum(memory_in_mb("status", "VmHWM"))
    return figures | {"unshared": max(memory, sum(memory_in_mb("smaps_rollup", "Pss")))}


# ------------------------------------------------------------------------------------ memory ----
def write_long_clips(folder: Path, num_rows: int) -> None:
    """30 s of noise as wav at 48 kHz (2.9 MB each), in files of one row group each."""
    generator = np.random.default_rng(0)
    for shard in range(num_rows // ROWS_PER_GROUP):
        clips = [generator.normal(0, 0.1, 30 * 48_000) for _ in range(ROWS_PER_GROUP)]
        rows = [(demonstration.encode(clip, "WAV", 48_000), "uno dos") for clip in clips]
        demonstration.write_parquet(
            folder / f"train-{shard:05}.parquet", rows, row_group_size=ROWS_PER_GROUP
        )


def print_passes(folder: Path, num_clips: int) -> None:
    """Resident memory after each of 20 passes, 2 threads."""
    torch.set_num_threads(1)
    batches = CONTESTANTS["stream-2"].batches(folder)
    print("| pass | main, MB | worker, MB |\n|---|---|---|")
    sizes = []
    for number in range(1, 21):
        count = 0
        while count < num_clips:
            count += next(batches)
        sizes.append(memory_in_mb("status", "VmRSS"))
        print(f"| {number} | {sizes[-1][0]:.0f} | {sizes[-1][1]:.0f} |", flush=True)
    growth = sum(map(sum, sizes[15:])) / 5 - sum(map(sum, sizes[5:10])) / 5
    print(
        f"\nFrom the mean of passes 6 to 10 to that of passes 16 to 20: {growth:+.1f} MB.\n",
        flush=True,
    )


def print_long_clips(folder: Path, num_rows: int) -> None:
    """Peak of each process while num_rows clips of 30 s pass, and the blocks that they made; 2
    threads."""
    torch.set_num_threads(1)
    imported, starts, count = memory_in_mb("status", "VmHWM"), [], 0
    batches = iter(make_loader(make_stream(str(folder / "long"), COLUMNS, 2, folder), folder))
    while count < num_rows:
        info = next(batches)["step_info"]
        count += info.num_rows
        starts += [block_start(info)] if count < num_rows else []
    peaks = memory_in_mb("status", "VmHWM")
    sizes = np.diff([*sorted(set(starts)), num_rows])
    blocks = ", ".join(map(str, sizes))
    print(
        f"30 s wav rows of 2.9 MB in row groups of {ROWS_PER_GROUP}: blocks of {blocks} rows ",
        end="",
    )
    print(f"(limits: {SHUFFLE_ROWS} rows, {MAX_BLOCK_IN_BYTES / 2**20:.0f} MB).")
    print(
        f"Largest resident size: main {peaks[0]:.0f} MB, worker {peaks[1]:.0f} MB; imports alone {imported[0]:.0f}."
    )


def measure_memory(num_clips: int) -> None:
    """Both memory tests, a process each."""
    folder = make_data(num_clips)
    subprocess.run(
        [sys.executable, __file__, "--turn", "passes", "--clips", str(num_clips)], check=True
    )
    with tempfile.TemporaryDirectory() as name:
        long = Path(name)
        write_long_clips(long / "long", NUM_LONG_CLIPS)
        (long / "model").symlink_to(folder / "model")
        subprocess.run([sys.executable, __file__, "--turn", "long", "--folder", name], check=True)


# ---------------------------------------------------------------------------------- the race ----
def take_turn(key: str, num_clips: int, environment: dict[str, str]) -> dict[str, float] | str:
    """The figures of a fresh process, or why there are none."""
    command = [sys.executable, __file__, "--turn", key, "--clips", str(num_clips)]
    environment = environment | {"HF_HUB_OFFLINE": "0" if CONTESTANTS[key].is_online else "1"}
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT_IN_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"not done after {LIMIT_IN_SECONDS} s"
    lines = result.stdout.splitlines()
    if result.returncode == 0 and lines:
        return json.loads(lines[-1])
    return (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1][:150]


def race(
    keys: list[str], num_clips: int, repetitions: int
) -> dict[str, list[dict[str, float] | str]]:
    """The figures of every turn. Each repetition starts with another contestant; one that failed is
    out."""
    folder = make_data(num_clips)
    results: dict[str, list] = {key: [] for key in keys}
    with (
        tempfile.TemporaryDirectory() as home,
        Hub(latency_in_seconds=LATENCY_IN_SECONDS) as server,
    ):
        server.add_repo("dataset", "alice/speech", folder / "parquet")
        environment = server.environment(home)
        for number in range(repetitions):
            for key in keys[number % len(keys) :] + keys[: number % len(keys)]:
                if any(isinstance(figures, str) for figures in results[key]):
                    continue
                results[key].append(take_turn(key, num_clips, environment))
                print(
                    f"{number + 1}/{repetitions} {key}: {results[key][-1]}",
                    file=sys.stderr,
                    flush=True,
                )
    return results


def medians(results: dict[str, list]) -> dict[str, dict[str, float]]:
    """Of each contestant that never failed; with the lowest and highest rate."""
    table = {}
    for key, turns in results.items():
        if all(isinstance(figures, dict) for figures in turns):
            table[key] = {
                name: statistics.median(figures[name] for figures in turns) for name in turns[0]
            }
            rates = [figures["clips_per_second"] for figures in turns]
            table[key] |= {"lowest": min(rates), "highest": max(rates)}
    return table


def print_table(results: dict[str, list], table: dict[str, dict[str, float]]) -> None:
    """One row for each contestant, medians; of "others" the largest."""
    bare = table.get("bare", {}).get("clips_per_second", float("nan"))
    names = "what|clips/s|range|to bare|CPU ms a clip|first batch, s|resident, MB|shared once, MB|others, cores".split(
        "|"
    )
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for key, turns in results.items():
        cells = [CONTESTANTS[key].title]
        if key in table:
            row = table[key]
            rate, most = row["clips_per_second"], max(figures["others"] for figures in turns)
            cells += [
                f"{rate:.0f}",
                f"{row['lowest']:.0f} to {row['highest']:.0f}",
                f"{rate / bare:.2f}",
            ]
            cells += [f"{row['cpu_ms_per_clip']:.1f}", f"{row['first']:.2f}"]
            cells += [f"{row['resident']:.0f}", f"{row['unshared']:.0f}", f"{most:.2f}"]
        else:
            reason = next(figures for figures in turns if isinstance(figures, str))
            cells += [f"failed: {reason}"] + [""] * (len(names) - 2)
        print(f"| {' | '.join(cells)} |")
    if table:
        imported = statistics.median(row["imported"] for row in table.values())
        print(f"\nThe imports alone take {imported:.0f} MB in each process.")


# (aim, figure, contestant, divided by contestant, "at least" or "at most", limit)
AIMS = [
    ("clips/s, one core each", "clips_per_second", "stream", "2022", "at least", 5),
    ("clips/s, two cores", "clips_per_second", "stream-2", "2022-2", "at least", 5),
    ("clips for a second of CPU time", "clips_per_cpu_second", "stream-2", "2022-2", "at least", 5),
    ("two threads against one", "clips_per_second", "stream-2", "stream", "at least", 1.7),
    ("two threads against one, no worker", "clips_per_second", "alone-2", "alone", "at least", 1.7),
    ("time to the first batch", "first", "stream", "2022", "at most", 0.1),
    ("time to the first batch, two cores", "first", "stream-2", "2022-2", "at most", 0.1),
    ("resident memory", "resident", "stream", "2022", "at most", 1 / 3),
    ("resident memory, two cores", "resident", "stream-2", "2022-2", "at most", 1 / 3),
    ("memory, shared pages counted once", "unshared", "stream", "2022", "at most", 1 / 3),
    ("parquet against the bare loop", "clips_per_second", "stream", "bare", "at least", 0.85),
    ("audio folder against the bare loop", "clips_per_second", "folder", "bare", "at least", 0.85),
    ("tar against the bare loop", "clips_per_second", "tar", "bare", "at least", 0.85),
    ("HTTP against the bare loop", "clips_per_second", "http", "bare", "at least", 0.85),
]


def print_aims(table: dict[str, dict[str, float]]) -> None:
    """Whether each aim is met, by ratios of medians."""
    for row in table.values():
        row["clips_per_cpu_second"] = 1000 / row["cpu_ms_per_clip"]
    print("\n| aim | ratio | limit | met |\n|---|---|---|---|")
    for aim, figure, ours, theirs, direction, limit in AIMS:
        if ours not in table or theirs not in table:
            print(f"| {aim} | | {direction} {limit:.2g} | not measured |")
            continue
        ratio = table[ours][figure] / table[theirs][figure]
        met = ratio >= limit if direction == "at least" else ratio <= limit
        print(f"| {aim} | {ratio:.3g} | {direction} {limit:.2g} | {'yes' if met else 'NO'} |")


def describe(num_clips: int) -> str:
    """Machine, versions and clips in one paragraph."""
    clips = read_clips(make_data(num_clips))
    seconds = [soundfile.info(io.BytesIO(data)).duration for data in clips]
    packages = ("torch", "datasets", "transformers", "soundfile", "soxr", "torchcodec")
    installed = {
        found.metadata["Name"]: found.version for found in importlib.metadata.distributions()
    }
    versions = ", ".join(f"{name} {installed.get(name, 'missing')}" for name in packages)
    lengths = f"{min(seconds):.1f} to {max(seconds):.1f} s, mean {statistics.mean(seconds):.1f} s"
    size = sum(map(len, clips)) / len(clips) / 1000
    machine = (
        f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, {versions}"
    )
    return f"{time.strftime('%Y-%m-%d')}, {machine}.\n{num_clips} clips of {lengths}, {size:.0f} kB each on average.\n"


def turn(key: str, num_clips: int, folder: Path | None) -> None:
    """What a child process does. Prints JSON, or the memory tests' lines."""
    if key == "passes":
        print_passes(make_data(num_clips), num_clips)
    elif key == "long":
        print_long_clips(folder, NUM_LONG_CLIPS)
    else:
        print(json.dumps(compete(CONTESTANTS[key], make_data(num_clips), num_clips)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=640)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", choices=CONTESTANTS, metavar="KEY", default=list(CONTESTANTS)
    )
    parser.add_argument(
        "--memory", action="store_true", help="20 passes, and 30 s wav rows, instead of the race"
    )
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        turn(args.turn, args.clips, args.folder)
        return
    if args.memory:
        measure_memory(args.clips)
        return
    print(describe(args.clips))
    results = race(args.only, args.clips, args.repetitions)
    table = medians(results)
    print_table(results, table)
    print_aims(table)


if __name__ == "__main__":
    main()
