"""Training on recordings with their pauses against training on the same utterances as clips.

    python benchmarks/long_recordings.py [--seeds 1 2 3] [--steps 500]

A toy learns ten synthetic words from nothing, by `--pack_utterances --timestamp_probability 0.5`:
of a table with start and end, whose neighbours share windows with their true pauses and times; and
of the same utterances cut out, which are laid end to end. A step has as many utterances in either
case. Both transcribe recordings of a minute that they have not heard (`--long_form`).
"""

import argparse
import csv
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path[:0] = [
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "tests" / "support"),
]

import numpy as np
import soundfile
from preprocessors import make_preprocessor

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.cli import demonstration
from speech_finetuning.data.sources import load_source

NUM_RECORDINGS = 40
NUM_TEST_RECORDINGS = 4
SECONDS = 60
RATE_IN_HZ = demonstration.SAMPLE_RATE_IN_HZ
WINDOWS_PER_STEP = 16  # of the toy's 4 s


def make_recording(generator: np.random.Generator) -> tuple[np.ndarray, list[tuple]]:
    """((n_samples,) float32, (start, end, text) of each utterance in seconds)."""
    parts: list[np.ndarray] = []
    utterances = []
    length = 0
    while length < SECONDS * RATE_IN_HZ:
        pause = generator.normal(0, 0.003, int(generator.uniform(0.2, 2.0) * RATE_IN_HZ))
        words = [
            str(word) for word in generator.choice(demonstration.WORDS, generator.integers(1, 5))
        ]
        clip = demonstration.speak(words, generator)
        start = length + len(pause)
        length = start + len(clip)
        utterances.append((start / RATE_IN_HZ, length / RATE_IN_HZ, " ".join(words)))
        parts += [pause.astype(np.float32), clip]
    return np.concatenate(parts), utterances


def write_table(path: Path, header: list[str], rows: list[tuple]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_speech(folder: Path) -> int:
    """recordings/train.csv, clips/train.csv and long/test.csv; the number of utterances."""
    generator = np.random.default_rng(0)
    spans: list[tuple] = []
    clips: list[tuple] = []
    for number in range(NUM_RECORDINGS):
        samples, utterances = make_recording(generator)
        path = folder / f"recording-{number}.flac"
        soundfile.write(path, samples, RATE_IN_HZ)
        for index, (start, end, text) in enumerate(utterances):
            clip = folder / f"clip-{number}-{index}.flac"
            cut = samples[round(start * RATE_IN_HZ) : round(end * RATE_IN_HZ)]
            soundfile.write(clip, cut, RATE_IN_HZ)
            spans.append((path, start, end, text))
            clips.append((clip, text))
    write_table(folder / "recordings" / "train.csv", ["path", "start", "end", "text"], spans)
    write_table(folder / "clips" / "train.csv", ["path", "text"], clips)
    tests = []
    for number in range(NUM_TEST_RECORDINGS):
        samples, utterances = make_recording(generator)
        path = folder / f"test-{number}.flac"
        soundfile.write(path, samples, RATE_IN_HZ)
        tests.append((path, " ".join(text for _, _, text in utterances)))
    write_table(folder / "long" / "test.csv", ["path", "text"], tests)
    return len(spans)


def count_windows(folder: Path, model: Path) -> int:
    """Rows of the table of recordings, when neighbours share windows."""
    preprocessor = make_preprocessor(model)
    limits = preprocessor.window_limits(frozenset())
    num_rows = load_source(str(folder), split="train", window_limits=limits).num_rows
    assert num_rows is not None
    return num_rows


def train_and_score(
    folder: Path, model: Path, name: str, batch: int, seed: int, steps: int
) -> dict:
    output = folder / f"{name}-{seed}"
    common = "--language es --report_to none --logging_steps 100 --data_report_samples 0"
    train = (
        f"{common} --model_name_or_path {model} --dataset_name {folder / name} --do_train "
        f"--max_steps {steps} --save_steps {steps} --learning_rate 2e-3 --warmup_steps 50 "
        f"--pack_utterances --timestamp_probability 0.5 --per_device_train_batch_size {batch} "
        f"--shuffle_buffer_size 2000 --seed {seed} --output_dir {output}"
    )
    begin = time.perf_counter()
    script.main(train.split())
    seconds = time.perf_counter() - begin
    score = (
        f"{common} --model_name_or_path {output} --dataset_name {folder / 'long'} --do_eval "
        f"--long_form --eval_split_name test --generation_max_length 90 --output_dir {output}-score"
    )
    return {"wer": script.main(score.split())["eval_wer"], "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = demonstration.make_model(folder / "model", max_target_positions=128)
        num_utterances = write_speech(folder)
        per_window = num_utterances / count_windows(folder / "recordings", model)
        batches = {"clips": round(WINDOWS_PER_STEP * per_window), "recordings": WINDOWS_PER_STEP}
        lines = ["| seed | trained on | rows a step | training | WER of recordings |"]
        lines.append("|---|---|---|---|---|")
        for seed in args.seeds:
            for kind, batch in batches.items():
                found = train_and_score(folder, model, kind, batch, seed, args.steps)
                lines.append(
                    f"| {seed} | {kind} | {batch} | {found['seconds']:.0f} s | {found['wer']:.1f} % |"
                )
                print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
