"""The script's evaluation against Seq2SeqTrainer's own: speed, memory, and whether both hear the
same tokens.

    python benchmarks/evaluation.py [--model M --dataset_name D --eval_split_name test]
        [--rows 64] [--repetitions 5]
    python benchmarks/evaluation.py --geometry small --rows 256 --batch_size 32 --bf16   # on a GPU
    python benchmarks/evaluation.py --memory

Without --model it makes a random toy with a window of 4 s and speech for it; flags that it does not
know go to the script (--language es, --do_lower_case). Every contestant runs in a process of its
own and evaluates twice, "first" and "later"; they take turns, `--repetitions` times. Loading model
and libraries is not timed.

ours          run_speech_recognition_seq2seq_streaming.py, built by its own main(). "First"
              includes the preparation of the rows from an empty cache, "later" finds them there.
re-streaming  transformers' Seq2SeqTrainer as the usual streaming recipe has it: an iterable
              dataset whose rows are decoded, turned into features padded to 30 s and tokenised
              again in every evaluation.
in memory     the same trainer over rows that it keeps prepared in memory; "first" includes
              their preparation.

All read the same undecoded rows with the same reader and decoder (soundfile), have the same model,
float32, batch size and cap on new tokens, and compute a score: the recipe WER of normalised text,
ours all that its scorecard has, and files of predictions. The recipe prepares on one thread, ours
on all cores.
"Others" is what all other processes and the hypervisor took of the cores meanwhile: figures with
much of it say little, less so with OMP_NUM_THREADS=1.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "tests" / "support"),
]

import datasets
import gpu_training
import jiwer
import numpy as np
import psutil
import torch
import transformers

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.cli import demonstration
from speech_finetuning.data.audio import SAMPLE_RATE_IN_HZ, decode_audio
from speech_finetuning.data.passes import read_pass
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.data.reading import read_audio
from speech_finetuning.data.text import IGNORED_LABEL, normalize_text
from speech_finetuning.model.languages import check_language
from speech_finetuning.model.loading import load_processor
from speech_finetuning.scoring.normalization import NORM, read_text, text_normalizers
from speech_finetuning.scoring.scorecard import Scorecard

Result = dict[str, Any]  # figures of one turn; "ids": {row: token ids}
LIMIT_IN_SECONDS = 900  # for one turn
MEMORY_ROWS = (1_000, 10_000)
AIMS = {"first": 3, "later": 5}  # times as fast as the library


# ------------------------------------------------------------------------------------ memory ----
def memory_in_mb(name: str) -> float:
    """VmHWM: the largest resident size so far. RssAnon: what is resident now without the pages of
    files, which the kernel can drop and read again at any time."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"\n{name}:")[1].split()[0]) / 1024


def machine_seconds() -> float:
    """Core seconds that the machine was busy since it started, those stolen by its hypervisor
    included."""
    times = psutil.cpu_times()._asdict()
    return sum(
        times.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal")
    )


class MemoryWatch(threading.Thread):
    """Notes the largest RssAnon of each phase, looking 50 times a second; and what time it took."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.figures: dict[str, float] = {}
        self.phase = ""
        self.start()

    def run(self) -> None:
        while True:
            phase, now = self.phase, memory_in_mb("RssAnon")
            if phase:
                self.figures[f"{phase}_peak"] = max(now, self.figures.get(f"{phase}_peak", 0.0))
            time.sleep(0.02)

    @contextlib.contextmanager
    def watch(self, phase: str) -> Iterator[None]:
        """A phase: memory before, at the peak and after, seconds, and the cores that other
        processes used."""
        self.figures[f"{phase}_before"] = memory_in_mb("RssAnon")
        began, used, machine = time.perf_counter(), time.process_time(), machine_seconds()
        self.phase = phase
        try:
            yield
        finally:
            self.phase = ""
            seconds, others = (
                time.perf_counter() - began,
                machine_seconds() - machine - time.process_time() + used,
            )
            self.figures[f"{phase}_seconds"] = seconds
            self.figures[f"{phase}_others"] = max(0.0, others) / seconds
            self.figures[f"{phase}_after"] = memory_in_mb("RssAnon")


# ---------------------------------------------------------------------------------- our turn ----
class KeepingScorecard(Scorecard):
    """Remembers the ids that it was given."""

    def __call__(self, outputs: transformers.EvalPrediction) -> dict[str, float]:
        self.outputs = outputs
        return super().__call__(outputs)


def prepare_watched(
    prepare: Callable, watch: MemoryWatch, *args: Any
) -> dict[str, datasets.Dataset]:
    """The script's preparation, with an empty cache and then with a full one."""
    with watch.watch("prepare"):
        prepare(*args)
    with watch.watch("reopen"):
        return prepare(*args)


def evaluate_ours(watch: MemoryWatch, result: Result, job: script.Job) -> dict[str, float]:
    """In place of the script's run_job: two evaluations."""
    trainer = job.trainer
    for phase in ("first", "later"):
        with watch.watch(phase):
            metrics = trainer.evaluate()
    card, pad = trainer.compute_metrics, trainer.processing_class.tokenizer.pad_token_id
    pairs = zip(card.outputs.label_ids, card.outputs.predictions[0], strict=True)
    result["ids"] = {card.rows[int(index)].id: strip(ids, pad) for index, ids in pairs}
    result |= {"wer": metrics["eval_wer"], "loss": metrics["eval_loss"]}
    return metrics


def our_turn(flags: list[str]) -> Result:
    """Everything is built by the script's main(); only its last stage is exchanged."""
    watch, result = MemoryWatch(), {}
    script.Scorecard = KeepingScorecard
    script.prepare_eval_sets = functools.partial(prepare_watched, script.prepare_eval_sets, watch)
    script.run_job = functools.partial(evaluate_ours, watch, result)
    script.main(flags)
    watch.figures["first_seconds"] += watch.figures["prepare_seconds"]
    return result | watch.figures


def strip(ids: np.ndarray, pad: int) -> list[int]:
    """Without the padding at the end, which depends on the batch (the end token is the pad
    token)."""
    kept = [int(i) for i in ids]
    while kept and kept[-1] in (pad, IGNORED_LABEL):
        kept.pop()
    return kept


# ---------------------------------------------------------------------------- library's turn ----
def usual_rows(
    item: SpeechDataset, extractor: transformers.WhisperFeatureExtractor
) -> Iterator[dict[str, Any]]:
    """id, input_features (n_mels, frames of the whole window), labels: what the usual
    `prepare_dataset` makes."""
    preprocessor = item.preprocessor
    for block in read_pass(item, block_size=100):
        for row in block.rows:
            waveform, rate = decode_audio(read_audio(row.audio), preprocessor.check_duration)
            features = extractor(waveform, sampling_rate=SAMPLE_RATE_IN_HZ).input_features[0]
            text = normalize_text(
                row.text, preprocessor.do_lower_case, preprocessor.do_remove_punctuation
            )
            yield {
                "id": row.id,
                "input_features": features,
                "labels": preprocessor.tokenizer(text).input_ids,
            }


class UsualStream(torch.utils.data.IterableDataset):
    """The same rows, prepared again in every evaluation."""

    def __init__(self, *how: Any) -> None:
        self.how = how

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return usual_rows(*self.how)


def usual_collator(
    rows: list[dict[str, Any]], processor: transformers.WhisperProcessor
) -> dict[str, torch.Tensor]:
    """input_features (batch, n_mels, window) and labels padded with -100, without the start
    token."""
    features = [{"input_features": row["input_features"]} for row in rows]
    batch = processor.feature_extractor.pad(features, return_tensors="pt")
    labels = processor.tokenizer.pad(
        [{"input_ids": row["labels"]} for row in rows], return_tensors="pt"
    )
    batch["labels"] = labels["input_ids"].masked_fill(labels.attention_mask.ne(1), IGNORED_LABEL)[
        :, 1:
    ]
    return batch


class UsualScore:
    """WER of text normalised as ours is; remembers the ids."""

    def __init__(self, tokenizer: transformers.WhisperTokenizer, language: str | None) -> None:
        self.tokenizer, self.ids = tokenizer, np.empty(0)
        self.normalize = text_normalizers(language or "en", tokenizer)[NORM]

    def __call__(self, outputs: transformers.EvalPrediction) -> dict[str, float]:
        self.ids = outputs.predictions
        pairs = []
        for ids in (outputs.label_ids, outputs.predictions):
            ids = np.where(ids == IGNORED_LABEL, self.tokenizer.pad_token_id, ids)
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            pairs.append([read_text(text, self.normalize) for text in texts])
        kept = [(said, heard) for said, heard in zip(*pairs, strict=True) if said]
        return {"wer": 100 * jiwer.wer(*(list(texts) for texts in zip(*kept, strict=True)))}


def usual_trainer(flags: list[str]) -> tuple[transformers.Seq2SeqTrainer, SpeechDataset]:
    """transformers' own trainer with the model as the script loads it, and the rows of these
    flags."""
    model_args, data_args, args = script.parse_arguments(flags)
    name = model_args.model_name_or_path
    processor, generation_config, config = load_processor(name, "main", None)
    language = check_language(data_args.language, generation_config, name)
    preprocessor = script.make_preprocessor(processor, config, data_args, language)
    processor.tokenizer = preprocessor.tokenizer
    item = script.load_speech(script.data_records(data_args), [preprocessor], args, None)["eval"][0]
    names = "output_dir per_device_eval_batch_size generation_max_length bf16 use_cpu".split()
    settings = {name: getattr(args, name) for name in names}
    usual = transformers.Seq2SeqTrainingArguments(
        **settings,
        predict_with_generate=True,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = transformers.Seq2SeqTrainer(
        model=script.load_model(model_args, data_args, generation_config, [language]),
        args=usual,
        data_collator=functools.partial(usual_collator, processor=processor),
        compute_metrics=UsualScore(processor.tokenizer, language),
        processing_class=processor,
    )
    return trainer, item


def library_turn(flags: list[str], is_streamed: bool) -> Result:
    """Two evaluations of transformers' trainer."""
    watch = MemoryWatch()
    trainer, item = usual_trainer(flags)
    extractor = trainer.processing_class.feature_extractor
    rows: Any = UsualStream(item, extractor) if is_streamed else None
    for phase in ("first", "later"):
        with watch.watch(phase):
            rows = list(usual_rows(item, extractor)) if rows is None else rows
            metrics = trainer.evaluate(rows)
    pad = trainer.processing_class.tokenizer.pad_token_id
    names = [row.id for block in read_pass(item, block_size=100) for row in block.rows]
    ids = {
        name: strip(row, pad) for name, row in zip(names, trainer.compute_metrics.ids, strict=True)
    }
    return watch.figures | {"ids": ids, "wer": metrics["eval_wer"], "loss": metrics["eval_loss"]}


CONTESTANTS: dict[str, tuple[str, Callable[[list[str]], Result]]] = {
    "ours": ("ours", our_turn),
    "stream": ("library, re-streaming", functools.partial(library_turn, is_streamed=True)),
    "memory": ("library, in memory", functools.partial(library_turn, is_streamed=False)),
}
HALF_PRECISION = {"ours-bf16": "ours", "memory-bf16": "memory"}  # once, for their token ids


def turn(key: str, flags: list[str], result_path: Path) -> None:
    """What a child process does: one contestant, its figures to a file."""
    if key in HALF_PRECISION:
        flags = [*flags, "--bf16", *([] if torch.cuda.is_available() else ["--use_cpu"])]
    result = CONTESTANTS[HALF_PRECISION.get(key, key)][1](flags)
    result_path.write_text(json.dumps(result | {"resident": memory_in_mb("VmHWM")}))


# ---------------------------------------------------------------------------------- the race ----
def take_turn(key: str, flags: list[str]) -> Result:
    """The figures of a fresh process with an empty output folder. Raises: CalledProcessError with
    its stderr shown."""
    with tempfile.TemporaryDirectory() as name:
        python = os.environ.get("PYTHON_EXEC", sys.executable)
        command = [python, __file__, "--turn", key, "--result", f"{name}/result.json"]
        command += ["--flags", json.dumps([*flags, "--output_dir", f"{name}/output"])]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT_IN_SECONDS
        )
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
        done.check_returncode()
        return json.loads(Path(name, "result.json").read_text())


def race(flags: list[str], repetitions: int) -> dict[str, list[Result]]:
    """The figures of every turn. Each repetition starts with another contestant."""
    keys = list(CONTESTANTS)
    results: dict[str, list[Result]] = defaultdict(list)
    for number in range(repetitions):
        turns = keys[number % len(keys) :] + keys[: number % len(keys)]
        more = HALF_PRECISION if number == 0 and "--bf16" not in flags else {}
        for key in [*turns, *more]:
            result = take_turn(key, flags)
            results[key].append(result)
            pairs = (
                (phase, result[f"{phase}_seconds"], result[f"{phase}_others"]) for phase in AIMS
            )
            told = ", ".join(
                f"{phase} {seconds:.1f} s (others {cores:.2f} cores)"
                for phase, seconds, cores in pairs
            )
            print(f"{number + 1}/{repetitions} {key}: {told}", file=sys.stderr, flush=True)
    return results


def take_turns_at(batch_size: int, flags: list[str]) -> dict[str, list[Result]]:
    """One turn each of ours and re-streaming with another batch size (the later flag counts)."""
    flags = [*flags, "--per_device_eval_batch_size", str(batch_size)]
    results = {}
    for key in ("ours", "stream"):
        results[key] = [take_turn(key, flags)]
        print(f"batches of {batch_size}, {key}", file=sys.stderr, flush=True)
    return results


def print_table(results: dict[str, list[Result]], num_rows: int) -> None:
    """Medians, with the lowest and highest rate."""
    print(
        "| what | first, samples/s | later, samples/s | anonymous memory, peak, MB | resident, peak, MB |"
    )
    print("|---|---|---|---|---|")
    for key, turns in results.items():
        title = CONTESTANTS[HALF_PRECISION.get(key, key)][0] + (
            ", bfloat16" if key in HALF_PRECISION else ""
        )
        cells = [title]
        for phase in AIMS:
            rates = [num_rows / result[f"{phase}_seconds"] for result in turns]
            cells.append(f"{statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})")
        peaks = (
            max(value for name, value in result.items() if name.endswith("_peak"))
            for result in turns
        )
        cells += [
            f"{statistics.median(peaks):.0f}",
            f"{statistics.median(r['resident'] for r in turns):.0f}",
        ]
        print(f"| {' | '.join(cells)} |")


def print_aims(results: dict[str, list[Result]]) -> None:
    """Ratios of median seconds."""
    print("\n| aim | against | ratio | met |\n|---|---|---|---|")
    for phase, limit in AIMS.items():
        name = f"{phase}_seconds"
        ours = statistics.median(result[name] for result in results["ours"])
        for key in ("stream", "memory"):
            ratio = statistics.median(result[name] for result in results[key]) / ours
            title = CONTESTANTS[key][0]
            met = "yes" if ratio >= limit else "NO"
            print(f"| {phase} evaluation {limit} times as fast | {title} | {ratio:.2f} | {met} |")


def print_differences(results: dict[str, list[Result]]) -> None:
    """Rows whose token ids differ, of the first turns."""
    pairs = [("ours", "stream"), ("ours", "memory"), ("ours-bf16", "memory-bf16")]
    pairs += [("ours-bf16", "ours"), ("memory-bf16", "memory")]
    pairs = [pair for pair in pairs if all(key in results for key in pair)]
    print("\n| ids of | against | rows | differ |\n|---|---|---|---|")
    for one, other in pairs:
        ours, theirs = results[one][0]["ids"], results[other][0]["ids"]
        different = [name for name in theirs if ours[name] != theirs[name]]
        print(
            f"| {one} | {other} | {len(theirs)} | {len(different)} ({100 * len(different) / len(theirs):.1f} %) |"
        )
    for key, turns in results.items():
        print(f"\n{key}: WER {turns[0]['wer']:.3f}, loss {turns[0]['loss']:.5f}", end="")
    print()


def describe(flags: list[str]) -> str:
    """Date, machine, versions and what was scored."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "transformers", "datasets")
    )
    machine = (
        f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, {versions}"
    )
    shown = " ".join(Path(flag).name if "/" in flag else flag for flag in flags)
    return f"{time.strftime('%Y-%m-%d')}, {machine}.\nFlags: {shown}\n"


# ------------------------------------------------------------------------------------ set-up ----
def make_toy(folder: Path, num_rows: int, **sizes: Any) -> Path:
    """A random English-only model whose timestamps are suppressed: they would send the library's
    generate() through the window again, and ours bans them."""
    demonstration.make_model(folder / "model", multilingual=False, **sizes)
    path = folder / "model" / "generation_config.json"
    settings = json.loads(path.read_text())
    size = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
    settings["suppress_tokens"] = list(range(settings["no_timestamps_token_id"] + 1, size))
    path.write_text(json.dumps(settings))
    return demonstration.make_speech(folder / "speech", {"validation": num_rows})


def write_short_clips(folder: Path, num_rows: int) -> None:
    """Parquet files of 500 rows of 0.3 to 0.5 s each (the same 500 clips)."""
    generator, rows = np.random.default_rng(0), []
    for number in range(500):
        clip = generator.normal(0, 0.1, int(generator.uniform(0.3, 0.5) * SAMPLE_RATE_IN_HZ))
        rows.append((demonstration.encode(clip, "WAV"), demonstration.WORDS[number % 10]))
    for shard in range(num_rows // len(rows)):
        demonstration.write_parquet(folder / f"validation-{shard:05}.parquet", rows)


def measure_memory(folder: Path) -> None:
    """What preparation and evaluation add to the anonymous memory, for a small and a large set."""
    make_toy(folder, 2, d_model=16, num_layers=1)
    print(
        "| rows | prepare: before, peak, after, MB | s | evaluate: before, peak, after, MB | s | resident, peak, MB |"
    )
    print("|---|---|---|---|---|---|")
    added: dict[str, list[float]] = {"prepare": [], "first": []}
    for num_rows in MEMORY_ROWS:
        write_short_clips(folder / str(num_rows), num_rows)
        flags = script_flags(
            folder / "model", folder / str(num_rows), num_rows, batch_size=64, new_tokens=8
        )
        result = take_turn("ours", flags)
        cells = [f"{num_rows:,}"]
        for phase in added:
            cells.append(
                ", ".join(
                    f"{result[f'{phase}_{when}']:.0f}" for when in ("before", "peak", "after")
                )
            )
            cells.append(f"{result[f'{phase}_seconds']:.1f}")
            added[phase].append(result[f"{phase}_peak"] - result[f"{phase}_before"])
        print(f"| {' | '.join(cells)} | {result['resident']:.0f} |", flush=True)
    more = MEMORY_ROWS[1] - MEMORY_ROWS[0]
    for phase, (small, large) in added.items():
        print(
            f"\n{phase}: {1024 * (large - small) / more:.2f} kB more at the peak for each further row",
            end="",
        )
    print()


def script_flags(
    model: Path, data: Path, num_rows: int, batch_size: int, new_tokens: int
) -> list[str]:
    """The script's command line, without --output_dir."""
    values = {
        "model_name_or_path": model,
        "dataset_name": data,
        "max_eval_samples": num_rows,
        "per_device_eval_batch_size": batch_size,
        "generation_max_length": new_tokens,
        "report_to": "none",
    }
    return [
        "--do_eval",
        *(word for name, value in values.items() for word in (f"--{name}", str(value))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, help="Whisper checkpoint, a folder; default: a toy")
    parser.add_argument(
        "--dataset_name", type=Path, help="speech with a validation split, or see --eval_split_name"
    )
    parser.add_argument(
        "--geometry",
        choices=list(gpu_training.GEOMETRIES),
        help="instead of --model: random weights of this size, with a window of 30 s",
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=32, help="cap, for every contestant")
    parser.add_argument(
        "--other_batch_sizes", type=int, nargs="+", default=[], help="ours and re-streaming, once"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--memory", action="store_true", help="1,000 and 10,000 short rows instead of the race"
    )
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--flags", type=json.loads, help=argparse.SUPPRESS)
    args, others = parser.parse_known_args()
    if args.turn:
        turn(args.turn, args.flags, args.result)
        return
    with tempfile.TemporaryDirectory() as name:
        if args.memory:
            measure_memory(Path(name))
            return
        model, data = args.model, args.dataset_name
        if model is None:
            sizes = gpu_training.sizes_of(args.geometry) if args.geometry else {}
            data = make_toy(Path(name), args.rows, **sizes)
            model = Path(name) / "model"
        flags = [*script_flags(model, data, args.rows, args.batch_size, args.new_tokens), *others]
        print(describe(flags))
        results = race(flags, args.repetitions)
        others_at = {size: take_turns_at(size, flags) for size in args.other_batch_sizes}
    print_table(results, len(results["ours"][0]["ids"]))
    print_aims(results)
    print_differences(results)
    for size, turns in others_at.items():
        print(f"\nIn batches of {size}:\n")
        print_table(turns, args.rows)


if __name__ == "__main__":
    main()
