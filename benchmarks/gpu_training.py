"""Training speed on one GPU: utterances a second, model-FLOP utilisation, peak memory and data
wait, in one table.

    python benchmarks/gpu_training.py [--only small large-v3] [--repetitions 3] [--folder SCRATCH]
    python benchmarks/gpu_training.py --brief           # a dozen rows, the 2022 recipe among them
    python benchmarks/gpu_training.py --device cpu      # the same in miniature, to try it out
    python benchmarks/gpu_training.py --check           # the FLOP formula against torch's counter

Nothing is downloaded. The models have Whisper's geometries and random weights (8 GB in --folder for
all of them), the data are synthetic mp3 at 48 kHz in local parquet: clips of 25 to 30 s with about
100 tokens, and of 3 to 6 s with 20.

Each row of the table is the script with its own flags in a process of its own; rows take turns.
Figures are those of the script's log (`samples_per_second`, `audio_hours_per_hour`,
`data_wait_fraction`) without its first lines; what is left out is saving. Utilisation is
`model_flops` over the rate that this card reaches in large matrix products of the same precision;
padding of labels and what checkpointing computes again do not count as work.

The recipe of 2022 is transformers' own Seq2SeqTrainer as that year's event used it: --fp16
--gradient_checkpointing, 64 rows at a time, and each row decoded, turned into features padded to
30 s and tokenised on the trainer's own thread. Reader and decoder are ours, as that year's are gone.

PYTHON_EXEC may name another interpreter for the rows' processes, such as one whose starts are forks
of a process that has done the imports (tests/support/forked_python.py).
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "tests" / "support"),
]

import numpy as np
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import WhisperConfig, WhisperForConditionalGeneration

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.cli import demonstration
from speech_finetuning.cli.exit_status import exit_code_of
from speech_finetuning.model.languages import check_language
from speech_finetuning.model.loading import load_processor
from speech_finetuning.training import stages
from speech_finetuning.training.trainer import SpeechTrainer

STEPS_PER_LINE, FIRST_LINES = 2, 3  # of the log; the first lines are warm-up
LIMIT_IN_SECONDS = 1800  # for one run
OUT_OF_MEMORY = 74  # the script's exit code
USUAL_STEPS = 6  # of the recipe of 2022, whose steps take long; the first is warm-up
WINDOW_IN_POSITIONS = 1500  # of the encoder, 30 s
ROWS_PER_CLIP = 8  # encoding takes long
PREFIX_TOKENS = 4  # of the decoder's input, before the text
AIMS = {"utilisation": 0.45, "waited": 0.02}  # at least, at most
AIMED_MODELS = ("small", "large-v3")
SECONDS_OF_LONG_CLIPS = (25.0, 29.9)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
WINDOWS = {
    "30 s": ("long", []),
    "longest": ("short", ["--train_window", "longest", "--full_window_fraction", "0"]),
    "packed": ("short", ["--pack_utterances"]),
}


@dataclass(frozen=True)
class Geometry:
    width: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    n_mels: int
    vocabulary: int


GEOMETRIES = {
    "small": Geometry(768, 12, 12, 12, 80, 51_865),
    "medium": Geometry(1024, 16, 24, 24, 80, 51_865),
    "turbo": Geometry(1280, 20, 32, 4, 128, 51_866),
    "large-v3": Geometry(1280, 20, 32, 32, 128, 51_866),
    "miniature": Geometry(128, 2, 2, 2, 80, 51_865),
}


@dataclass(frozen=True)
class Row:
    """Of the table."""

    model: str
    batch: int
    precision: str = "bf16"
    with_checkpointing: bool = False
    window: str = "30 s"
    is_compiled: bool = False
    accumulation: int = 1
    lora_rank: int = 0
    is_recipe_of_2022: bool = False

    def flags(self) -> list[str]:
        words = ["--per_device_train_batch_size", str(self.batch), *WINDOWS[self.window][1]]
        for precision in ("fp16", "bf16"):
            words += [f"--{precision}", str(precision == self.precision)]
        words += [
            "--gradient_checkpointing",
            str(self.with_checkpointing),
            "--torch_compile",
            str(self.is_compiled),
            "--gradient_accumulation_steps",
            str(self.accumulation),
        ]
        if self.lora_rank:
            words += ["--lora_rank", str(self.lora_rank)]
        return words


ROWS = [
    *(Row("small", batch) for batch in (16, 32, 64)),
    Row("small", 32, "fp16"),
    Row("small", 32, is_compiled=True),
    Row("small", 64, with_checkpointing=True),
    Row("small", 64, "fp16", with_checkpointing=True),
    Row("small", 64, "fp16", with_checkpointing=True, is_recipe_of_2022=True),
    *(Row("small", 128, window="longest", is_compiled=value) for value in (False, True)),
    Row("small", 128, window="packed"),
    *(Row("medium", 16, is_compiled=value) for value in (False, True)),
    Row("medium", 32, with_checkpointing=True),
    *(Row("turbo", 16, is_compiled=value) for value in (False, True)),
    Row("turbo", 32, with_checkpointing=True),
    *(Row("large-v3", batch) for batch in (8, 16)),
    Row("large-v3", 8, is_compiled=True),
    *(Row("large-v3", batch, with_checkpointing=True) for batch in (16, 32)),
    Row("large-v3", 32, "fp16", with_checkpointing=True),
    Row("large-v3", 32, with_checkpointing=True, is_compiled=True),
    Row("miniature", 2, "float32"),
    Row("miniature", 2),
    Row("miniature", 2, "fp16"),
    Row("miniature", 2, with_checkpointing=True),
    Row("miniature", 2, is_compiled=True),
    Row("miniature", 2, with_checkpointing=True, is_compiled=True),
    *(Row("miniature", 4, window="longest", is_compiled=value) for value in (False, True)),
    Row("miniature", 8, window="packed"),
    Row("miniature", 2, "float32", is_recipe_of_2022=True),
]
BRIEF = [
    Row("small", 64, "fp16", with_checkpointing=True, is_recipe_of_2022=True),
    Row("small", 64, "fp16", with_checkpointing=True),
    Row("small", 32),
    Row("small", 64),
    Row("small", 32, is_compiled=True),
    Row("small", 128, window="longest"),
    Row("small", 128, window="packed"),
    Row("medium", 16),
    Row("turbo", 16),
    Row("large-v3", 8),
    Row("large-v3", 32, with_checkpointing=True),
]


def model_flops(geometry: Geometry, num_positions: float, num_tokens: float) -> float:
    """Floating-point operations to train on one window: those of the matrix products and
    convolutions of the forward pass, a multiplication and an addition each, and twice as many
    backward.
    What checkpointing computes again is not the model's (PaLM, Chowdhery et al. 2022, appendix B),
    masked halves of the attention are, as there.
    num_positions: of the encoder, 50 a second; num_tokens: of the decoder."""
    d, n, t = geometry.width, num_positions, num_tokens
    convolutions = 3 * geometry.n_mels * d * 2 * n + 3 * d * d * n
    feed_forward, projections = 2 * d * 4 * d, 4 * d * d
    encoder = n * (projections + feed_forward) + 2 * n * n * d
    of_self, of_cross = projections * t + 2 * t * t * d, 2 * d * d * (t + n) + 2 * t * n * d
    decoder = of_self + of_cross + feed_forward * t
    layers = geometry.encoder_layers * encoder + geometry.decoder_layers * decoder
    return 3 * 2 * (convolutions + layers + t * d * geometry.vocabulary)


def counted_flops(geometry: Geometry, num_positions: int, num_tokens: int) -> int:
    """What torch counts in one training step on one window, by shapes alone. Attention is spelt
    out: of fused kernels torch counts the products that their backward pass computes again."""
    sizes = {
        "d_model": geometry.width,
        "vocab_size": geometry.vocabulary,
        "num_mel_bins": geometry.n_mels,
    }
    for side, layers in (
        ("encoder", geometry.encoder_layers),
        ("decoder", geometry.decoder_layers),
    ):
        sizes |= {f"{side}_layers": layers, f"{side}_attention_heads": geometry.heads}
        sizes |= {f"{side}_ffn_dim": 4 * geometry.width}
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        config = WhisperConfig(
            **sizes, max_source_positions=num_positions, attn_implementation="eager"
        )
        model = WhisperForConditionalGeneration(config).train()
        features = torch.zeros(1, geometry.n_mels, 2 * num_positions)
        ids = torch.zeros(1, num_tokens, dtype=torch.long)
        model(
            input_features=features, decoder_input_ids=ids, use_cache=False
        ).logits.sum().backward()
    return counter.get_total_flops()


def check() -> None:
    """Prints the formula beside torch's count. Raises: AssertionError if they differ by 2 % or
    more."""
    print(
        "| model | positions | tokens | formula, GFLOP | torch, GFLOP | ratio |\n|---|---|---|---|---|---|"
    )
    for (name, geometry), size in itertools.product(
        GEOMETRIES.items(), ((WINDOW_IN_POSITIONS, 100), (250, 24))
    ):
        ours, counted = model_flops(geometry, *size), counted_flops(geometry, *size)
        print(
            f"| {name} | {size[0]} | {size[1]} | {ours / 1e9:.1f} | {counted / 1e9:.1f} | {ours / counted:.4f} |"
        )
        assert abs(ours / counted - 1) < 0.02, name


def make_rows(
    num_clips: int, seconds: tuple[float, float], tokens: tuple[int, int]
) -> list[tuple[bytes, str]]:
    """(mp3 bytes, text) pairs. A byte is a token here, so that the text is cut to the length
    wanted."""
    generator, rows = np.random.default_rng(0), []
    for _ in range(num_clips):
        words = [str(word) for word in generator.choice(demonstration.WORDS, size=100)]
        length = int(generator.uniform(*seconds) * demonstration.SAMPLE_RATE_IN_HZ)
        waveform = demonstration.speak(words[: int(4 * seconds[1])], generator)[:length]
        data = demonstration.encode(
            np.repeat(waveform, 3), "MP3", 3 * demonstration.SAMPLE_RATE_IN_HZ
        )
        rows.append((data, " ".join(words)[: generator.integers(*tokens)].strip()))
    return rows


def make_data(folder: Path) -> dict[str, float]:
    """Both data sets, every clip in several rows. Returns the mean number of the decoder's tokens
    of a row in each."""
    means = {}
    for name, how in {
        "long": (48, SECONDS_OF_LONG_CLIPS, (80, 120)),
        "short": (96, (3, 6), (12, 24)),
    }.items():
        rows = make_rows(*how) * ROWS_PER_CLIP
        for shard in range(4):
            demonstration.write_parquet(
                folder / name / f"train-{shard:05}-of-00004.parquet", rows[shard::4]
            )
        means[name] = statistics.mean(len(text) + PREFIX_TOKENS for _, text in rows)
    return means


def sizes_of(name: str) -> dict[str, Any]:
    """A geometry as `demonstration.make_model` takes it."""
    geometry = GEOMETRIES[name]
    return {
        "d_model": geometry.width,
        "num_layers": geometry.encoder_layers,
        "num_decoder_layers": geometry.decoder_layers,
        "num_heads": geometry.heads,
        "window_in_seconds": 30,
        "max_target_positions": 448,
        "vocab_size": geometry.vocabulary,
        "n_mels": geometry.n_mels,
        "dtype": "float16",
    }


def make_model(folder: Path, name: str) -> None:
    demonstration.make_model(folder / name, **sizes_of(name))


def child(function: str, *words: str, **how: Any) -> subprocess.CompletedProcess:
    """A function of this file in a process of its own: the parent must hold no GPU memory."""
    python = os.environ.get("PYTHON_EXEC", sys.executable)
    command = [python, __file__, "--child", function, *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, **how)


def print_card(device: str) -> None:
    """For a process of its own: JSON with the device's name and the FLOP/s of a matrix product in
    each precision."""
    is_gpu, size, rates = device == "cuda", 8192 if device == "cuda" else 1024, {}
    name = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    if is_gpu:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        name = f"{torch.cuda.get_device_name()}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
    for precision in ("bf16", "fp16") if is_gpu else ("bf16", "float32"):
        factor, times = torch.randn(size, size, device=device, dtype=DTYPES[precision]), []
        for _ in range(60):
            began = time.perf_counter()
            torch.mm(factor, factor)
            if is_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        rates[precision] = 2 * size**3 / statistics.median(times[10:])
    print(json.dumps({"name": name, "rates": rates}))


def run_script(*words: str) -> None:
    """For a process of its own: the script, which saves nothing at the end. Prints JSON: its exit
    code and log, the peak of memory in GiB (on the CPU of this process), attention and
    optimiser."""
    trainers: list[SpeechTrainer] = []
    stages.save_final_model = trainers.append
    found: dict[str, Any] = {"code": exit_code_of(script.main, list(words))}
    found["peak"] = peak_in_gib()
    for trainer in trainers:
        found["log"] = [
            entry for entry in trainer.state.log_history if "samples_per_second" in entry
        ]
        found["how"] = f"{trainer.args.optim.value}, {trainer.model.config._attn_implementation}"
    print("\n" + json.dumps(found))


class Clock(transformers.TrainerCallback):
    """Seconds of every step, and of the wait for its rows."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.waited: list[float] = []
        self.worked: list[float] = []

    def tick(self) -> float:
        """Seconds since the last tick, of the GPU's work too."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        last = self.last
        self.last = time.perf_counter()
        return self.last - last

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.waited.append(self.tick())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.worked.append(self.tick())


def run_usual(*words: str) -> None:
    """For a process of its own: a few steps of transformers' trainer as the recipe of 2022 has it.
    Prints JSON as `run_script` does, with one line of the log for each step but the first."""
    import evaluation

    model_args, data_args, args = script.parse_arguments(list(words))
    name = str(model_args.model_name_or_path)
    processor, generation_config, config = load_processor(name, "main", None)
    language = check_language(data_args.language, generation_config, name)
    preprocessor = script.make_preprocessor(processor, config, data_args, language)
    processor.tokenizer = preprocessor.tokenizer
    records = script.data_records(data_args)
    item = script.load_speech(records, [preprocessor], args, None)["train"][0]
    usual = transformers.Seq2SeqTrainingArguments(
        output_dir=args.output_dir,
        max_steps=USUAL_STEPS,
        per_device_train_batch_size=args.per_device_train_batch_size,
        fp16=args.fp16,
        gradient_checkpointing=args.gradient_checkpointing,
        use_cpu=args.use_cpu,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    clock = Clock()
    trainer = transformers.Seq2SeqTrainer(
        model=script.load_model(model_args, data_args, generation_config, [language]),
        args=usual,
        train_dataset=evaluation.UsualStream(item, processor.feature_extractor),
        data_collator=functools.partial(evaluation.usual_collator, processor=processor),
        processing_class=processor,
        callbacks=[clock],
    )
    trainer.train()
    found: dict[str, Any] = {"code": 0, "log": []}
    for waited, worked in zip(clock.waited[1:], clock.worked[1:], strict=True):
        rate = usual.per_device_train_batch_size / (waited + worked)
        found["log"].append(
            {"samples_per_second": rate, "data_wait_fraction": waited / (waited + worked)}
        )
    found["how"] = f"{usual.optim.value}, {trainer.model.config._attn_implementation}"
    found["peak"] = peak_in_gib()
    print("\n" + json.dumps(found))


def peak_in_gib() -> float:
    """Of the GPU's memory in this process; without a GPU of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(
    row: Row, folder: Path, tokens: dict[str, float], options: argparse.Namespace
) -> dict[str, Any]:
    """One run: its figures, or `why` there are none."""
    data = WINDOWS[row.window][0]
    with tempfile.TemporaryDirectory(dir=folder) as output:
        values = {
            "model_name_or_path": folder / row.model,
            "dataset_name": folder / data,
            "language": "es",
        }
        values |= {
            "output_dir": output,
            "max_steps": options.steps,
            "logging_steps": STEPS_PER_LINE,
        }
        values |= {
            "save_strategy": "no",
            "data_report_samples": 0,
            "report_to": "none",
            "disable_tqdm": True,
        }
        words = [
            "--do_train",
            *(text for key, value in values.items() for text in (f"--{key}", str(value))),
        ]
        words += row.flags() + (["--use_cpu"] if options.device == "cpu" else [])
        environment = os.environ | {"TORCH_LOGS": "recompiles", "HF_HUB_OFFLINE": "1"}
        try:
            how = {"stderr": subprocess.PIPE, "env": environment, "timeout": LIMIT_IN_SECONDS}
            function = "run_usual" if row.is_recipe_of_2022 else "run_script"
            result = child(function, *words, **how)
        except subprocess.TimeoutExpired:
            return {"why": f"no end within {LIMIT_IN_SECONDS} s"}
    if result.returncode:
        return {"why": f"crashed: {result.stderr.strip().splitlines()[-1][:150]}"}
    found = json.loads(result.stdout.splitlines()[-1])
    if found["code"]:
        reasons = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        return {
            "why": "out of memory"
            if found["code"] == OUT_OF_MEMORY
            else reasons[-1].removeprefix("error: ")
        }
    if row.is_recipe_of_2022:
        figures = summary_of_usual(found["log"], row, tokens[data])
    else:
        figures = summary(found["log"][FIRST_LINES:], row, tokens[data])
    recompilations = result.stderr.count("Recompiling function")
    return {**figures, "peak": found["peak"], "how": found["how"], "recompilations": recompilations}


def summary(lines: list[dict[str, float]], row: Row, tokens: float) -> dict[str, float]:
    """Of the log's lines, each of as many rows. tokens: of the decoder for a row, the mean."""
    seconds = sum(1 / line["samples_per_second"] for line in lines)
    speed = len(lines) / seconds  # utterances a second
    audio = (
        sum(line["audio_hours_per_hour"] / line["samples_per_second"] for line in lines) / seconds
    )
    waited = (
        sum(line["data_wait_fraction"] / line["samples_per_second"] for line in lines) / seconds
    )
    # With the padding, which is trained on too. A window of "longest" is taken for the mean one.
    padded = [line["audio_hours_per_hour"] / (1 - line["padding_fraction"]) for line in lines]
    positions = (
        50
        * sum(rate / line["samples_per_second"] for rate, line in zip(padded, lines, strict=True))
        / seconds
    )
    windows = speed if row.window == "longest" else positions / WINDOW_IN_POSITIONS
    flops = windows * model_flops(
        GEOMETRIES[row.model], positions / windows, tokens * speed / windows
    )
    return {"speed": speed, "audio": audio, "waited": waited, "flops": flops}


def summary_of_usual(lines: list[dict[str, float]], row: Row, tokens: float) -> dict[str, float]:
    """The same of a run whose windows all have 30 s, and a row each."""
    seconds = sum(1 / line["samples_per_second"] for line in lines)
    speed = len(lines) / seconds
    waited = (
        sum(line["data_wait_fraction"] / line["samples_per_second"] for line in lines) / seconds
    )
    flops = speed * model_flops(GEOMETRIES[row.model], WINDOW_IN_POSITIONS, tokens)
    audio = speed * statistics.mean(SECONDS_OF_LONG_CLIPS)
    return {"speed": speed, "audio": audio, "waited": waited, "flops": flops}


def table(results: dict[Row, list[dict[str, Any]]], rates: dict[str, float]) -> str:
    """Markdown, medians of the repetitions."""
    lines = [
        "| model | batch | precision | checkpointing | window | compiled | utterances/s (range) | audio h/h |"
    ]
    lines[0] += " utilisation % | peak GiB | data wait % |"
    lines.append("|" + "---|" * 11)
    for row, runs in results.items():
        cells = [
            row.model,
            str(row.batch),
            row.precision,
            "yes" if row.with_checkpointing else "no",
            row.window,
        ]
        if row.is_recipe_of_2022:
            cells[0] += ", recipe of 2022"
        good = [run for run in runs if "why" not in run]
        cells.append(
            f"yes, {good[0]['recompilations']} again" if row.is_compiled and good else "no"
        )
        if row.is_compiled and not good:
            cells[-1] = "yes"
        if good:
            speeds, middle = [run["speed"] for run in good], medians(good)
            cells.append(f"{middle['speed']:.2f} ({min(speeds):.2f} to {max(speeds):.2f})")
            share = middle["flops"] / rates[row.precision]
            cells += [f"{middle['audio']:.0f}", f"{100 * share:.1f}", f"{middle['peak']:.1f}"]
            cells.append(f"{100 * middle['waited']:.1f}")
        else:
            cells += [runs[0]["why"].replace("|", "/"), *[""] * 4]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    names = ("speed", "audio", "waited", "flops", "peak")
    return {name: statistics.median(run[name] for run in runs) for name in names}


def judge(results: dict[Row, list[dict[str, Any]]], rates: dict[str, float]) -> str:
    """Each aim against the row of 30 s with the best utilisation, a line for each model that has
    one."""
    lines = [
        f"Aims at 30 s: utilisation of {AIMS['utilisation']:.0%} or more, data wait below {AIMS['waited']:.0%}."
    ]
    for model in AIMED_MODELS:
        aimed = {
            row: runs
            for row, runs in results.items()
            if (row.model, row.window) == (model, "30 s") and not row.is_recipe_of_2022
        }
        rows = {
            row: medians(good)
            for row, runs in aimed.items()
            if (good := [r for r in runs if "why" not in r])
        }
        if not rows:
            lines.append(f"* {model}: not measured")
            continue
        best = max(rows, key=lambda row: rows[row]["flops"] / rates[row.precision])
        share, waited = rows[best]["flops"] / rates[best.precision], rows[best]["waited"]
        are_met = (share >= AIMS["utilisation"], waited < AIMS["waited"])
        verdicts = ["met" if is_met else "missed" for is_met in are_met]
        found = f"{share:.1%} ({verdicts[0]}), data wait {waited:.1%} ({verdicts[1]})"
        lines.append(f"* {model}: {found}, batch {best.batch}, {best.precision}")
    return "\n".join(lines)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--only", nargs="+", choices=list(GEOMETRIES), help="Default: all; miniature on the CPU."
    )
    parser.add_argument("--brief", action="store_true", help="Only the rows that matter most.")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="Of each run.")
    parser.add_argument(
        "--folder", help="Where models and data are made; default: the system's temporary folder."
    )
    parser.add_argument("--check", action="store_true", help="Only checks the FLOP formula.")
    options = parser.parse_args()
    options.only = options.only or (
        ["miniature"] if options.device == "cpu" else list(GEOMETRIES)[:-1]
    )
    if options.device == "cuda" and not options.check and not torch.cuda.is_available():
        parser.error("no GPU. --device cpu tries this out in miniature")
    if options.steps <= STEPS_PER_LINE * FIRST_LINES:
        parser.error(f"--steps must exceed {STEPS_PER_LINE * FIRST_LINES}, the warm-up")
    return options


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        globals()[sys.argv[2]](*sys.argv[3:])
        return
    options = parse_options()
    if options.check:
        check()
        return
    cards: list[dict[str, Any]] = []
    results: dict[Row, list[dict[str, Any]]] = {
        row: [] for row in (BRIEF if options.brief else ROWS) if row.model in options.only
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        tokens = make_data(folder)
        for model in options.only:
            make_model(folder, model)
        for number in range(options.repetitions):
            cards.append(json.loads(child("print_card", options.device, check=True).stdout))
            print(f"{number + 1}: {cards[-1]}", file=sys.stderr, flush=True)
            for row, runs in results.items():
                if number and "why" in runs[0]:
                    continue  # it would only fail again
                runs.append(measure(row, folder, tokens, options))
                print(f"{number + 1}: {row} {runs[-1]}", file=sys.stderr, flush=True)
    rates = {p: statistics.median(card["rates"][p] for card in cards) for p in cards[0]["rates"]}
    packages = {
        name: importlib.metadata.version(name)
        for name in ("torch", "transformers", "accelerate", "datasets")
    }
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}"
    )
    found = ", ".join(f"{precision} {rate / 1e12:.4g}" for precision, rate in rates.items())
    print(f"{cards[0]['name']}; large matrix products, TFLOP/s: {found}")
    how = {run["how"] for runs in results.values() for run in runs if "how" in run}
    print(f"optimiser, attention: {'; '.join(sorted(how))}")
    print(f"\n{table(results, rates)}\n\n{judge(results, rates)}")


if __name__ == "__main__":
    main()
