"""Whether this project does on the GPU of this machine what its tests prove on CPUs: one table.

    python benchmarks/gpu_acceptance.py [--folder SCRATCH] [--report FILE.md]
    python benchmarks/gpu_acceptance.py --device cpu    # in miniature, as the test suite runs it

Takes under eight minutes on a GPU and needs no network: models with random weights and synthetic
speech are made on the spot (8 GB in --folder for the rows of memory). Every check is a training or
a scoring by the script itself in this process, but for those of memory, which need one of their
own. A check that fails does not end the others. The table goes to the terminal and to a dated file;
the exit code is 1 if a check failed.

On a CPU the model is a toy, float16 is torch's for CPUs (tests/support/fp16_on_cpu.py), memory runs
out because we say so, nothing is compiled, and times decide nothing.
"""

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import io
import logging
import math
import os
import platform
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tests" / "support")]

import torch
import transformers
from fp16_on_cpu import fp16_on_cpu
from waits import fetched_in

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.shutdown import StopSignals
from speech_finetuning.cli import demonstration
from speech_finetuning.cli.exit_status import exit_code_of
from speech_finetuning.model.generation import generate_ids
from speech_finetuning.training.checkpoints import is_complete
from speech_finetuning.training.trainer import SpeechTrainer

STEP_OF_SIGNAL = 2
MEASURED_STEPS = 4  # by check_waits
ROWS_PER_STEP = 4
SCORED_ROWS = 8
MAX_NEW_TOKENS = 12
# Largest relative difference of a loss, by what may round otherwise.
SAME_ON_A_CPU = 1e-6
SAME_ON_A_GPU = 1e-3
SAME_IN_HALF_PRECISION = 0.05
# Of the forecast of a dry run, which takes the row with most tokens for all of them.
FORECAST_FACTOR = 3.0
MEMORY_NAMES = {"turbo": "large-v3-turbo"}  # in benchmarks/memory.py
MAX_MEMORY_ERROR = 0.15
TOKENS_OF_MEMORY_ROWS = 124  # of the longest text in gpu_training.py's data


class NotHere(Exception):
    """A check that this device cannot be asked."""


def expect(is_true: bool, what: str) -> None:
    """Raises: AssertionError."""
    if not is_true:
        raise AssertionError(what)


class Messages(logging.Handler):
    """The log of a run as a list."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@dataclass(kw_only=True)
class Run:
    """A start of the script, and what became of it."""

    output_dir: Path
    code: int = 0
    seconds: float = 0.0
    trainer: SpeechTrainer | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def log(self, name: str) -> list[float]:
        """A figure of every step."""
        assert self.trainer is not None
        return [entry[name] for entry in self.trainer.state.log_history if name in entry]

    def losses(self) -> list[float]:
        return self.log("loss")


def build_and_run(
    run: Run, prepare: Callable[[SpeechTrainer], None] | None, argv: list[str], stop: StopSignals
) -> None:
    """The script's main(), which keeps the trainer and lets a check prepare it."""
    job = script.build_job(argv, stop)
    run.trainer = job.trainer
    if prepare is not None:
        prepare(job.trainer)
    run.metrics = script.run_job(job)


class Bench:
    """The models, the data and the reference of all checks."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device = device
        self.folder = folder
        self.num_steps = 4 if device == "cpu" else 20
        self.model = folder / "model"
        self.speech = folder / "speech"
        if device == "cpu":
            demonstration.make_model(self.model, d_model=16, num_layers=1)
        else:
            demonstration.make_model(
                self.model,
                d_model=128,
                window_in_seconds=30,
                max_target_positions=448,
                vocab_size=51_865,
            )
        num_rows = ROWS_PER_STEP * self.num_steps
        demonstration.make_speech(
            self.speech, {"train": num_rows, "validation": SCORED_ROWS}, num_shards=1
        )

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def tolerance(self) -> float:
        """Of losses that should be equal but for the order of sums."""
        return SAME_ON_A_GPU if self.is_gpu else SAME_ON_A_CPU

    def words(self, output_dir: Path, changes: dict[str, Any]) -> list[str]:
        """A command line of a short training, with other flags where `changes` says so."""
        settings: dict[str, Any] = {
            "model_name_or_path": self.model,
            "dataset_name": self.speech,
            "language": "es",
            "output_dir": output_dir,
            "do_train": True,
            "max_steps": self.num_steps,
            "per_device_train_batch_size": ROWS_PER_STEP,
            "per_device_eval_batch_size": ROWS_PER_STEP,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "lr_scheduler_type": "constant",
            "fp16": False,
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "logging_steps": 1,
            "generation_max_length": MAX_NEW_TOKENS,
            "dataloader_num_workers": 1 if self.is_gpu else 0,
            "data_report_samples": 0,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not self.is_gpu,
        }
        settings |= changes
        if settings["do_train"]:
            settings.setdefault("train_window", "full")  # clips as short as these get shorter ones
        return [text for name, value in settings.items() for text in (f"--{name}", str(value))]

    def start(
        self,
        name: str,
        prepare: Callable[[SpeechTrainer], None] | None = None,
        **changes: Any,
    ) -> Run:
        """One start of the script in this process. prepare: gets the trainer before its first
        step."""
        run = Run(output_dir=self.folder / name)
        messages = Messages()
        logger = logging.getLogger("speech_finetuning")
        logger.addHandler(messages)
        began = time.monotonic()
        main = script.main
        if not changes.get("dry_run"):
            main = functools.partial(build_and_run, run, prepare)
        try:
            with (
                contextlib.nullcontext() if self.is_gpu else fp16_on_cpu(),
                contextlib.redirect_stdout(io.StringIO()),  # the library prints every figure
            ):
                run.code = exit_code_of(main, self.words(run.output_dir, changes))
        finally:
            logger.removeHandler(messages)
        run.seconds = time.monotonic() - began
        run.messages = messages.lines
        return run

    @functools.cached_property
    def reference(self) -> Run:
        """The training in float32 that others are compared with, scored before and after."""
        return self.start(
            "reference",
            do_eval=True,
            eval_strategy="no",
            eval_before_training=True,
            save_strategy="steps",
            save_steps=self.num_steps // 2,
        )

    def train(self, name: str, **changes: Any) -> Run:
        """A training that must end well, with finite losses."""
        run = self.start(name, **changes)
        expect(run.code == 0, f"exit code {run.code}")
        expect(len(run.losses()) == self.num_steps, f"{len(run.losses())} steps")
        expect(all(map(math.isfinite, run.losses())), f"losses {run.losses()}")
        return run


def difference(losses: list[float], others: list[float]) -> float:
    """The largest relative difference of two runs' losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True))


def out_of_memory(device: torch.device) -> None:
    """Raises: torch.OutOfMemoryError, on a GPU by the allocator itself."""
    if device.type == "cuda":
        torch.empty(2**50, dtype=torch.uint8, device=device)  # a petabyte
    raise torch.OutOfMemoryError("out of memory, for a check")


@dataclass(kw_only=True)
class Interrupted:
    """In place of a trainer's loss function: something happens in one of its calls."""

    loss_function: Callable[..., torch.Tensor]
    call: int  # counted from 1
    happens: Callable[[torch.Tensor], torch.Tensor]
    num_calls: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = self.loss_function(*args, **kwargs)
        self.num_calls += 1
        return self.happens(loss) if self.num_calls == self.call else loss


def interrupt(
    trainer: SpeechTrainer, call: int, happens: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    trainer.compute_loss_func = Interrupted(
        loss_function=trainer.compute_loss_func, call=call, happens=happens
    )


def broken(loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


def too_large(loss: torch.Tensor) -> torch.Tensor:
    out_of_memory(loss.device)
    return loss


def signalled(loss: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGTERM)
    return loss


# ---- the checks: each returns its figures, or raises AssertionError with what is wrong


def check_float32(bench: Bench) -> str:
    run = bench.reference
    expect(run.code == 0, f"exit code {run.code}")
    losses = run.losses()
    half = len(losses) // 2
    expect(all(map(math.isfinite, losses)), f"losses {losses}")
    expect(statistics.mean(losses[half:]) < losses[0], f"the loss does not fall: {losses}")
    rate = statistics.median(run.log("samples_per_second")[1:])
    return f"loss {losses[0]:.3f} to {losses[-1]:.3f}, {rate:.1f} rows/s"


def check_precision(bench: Bench, precision: str) -> str:
    run = bench.train(precision, **{precision: True})
    found = difference(run.losses(), bench.reference.losses())
    expect(found < SAME_IN_HALF_PRECISION, f"losses differ from float32 by {found:.2%}")
    assert run.trainer is not None
    scaler = run.trainer.accelerator.scaler
    expect((scaler is not None) == (precision == "fp16"), f"scaler {scaler}")
    scale = f", loss scale {scaler.get_scale():g}" if scaler is not None else ""
    return f"losses within {found:.2%} of float32{scale}"


def check_resume(bench: Bench) -> str:
    """Losses after a checkpoint, of the run itself and of one that continues from there."""
    half = bench.num_steps // 2
    folder = bench.folder / "resumed"
    folder.mkdir()
    reference = bench.reference
    shutil.copy(reference.output_dir / "run_info.json", folder)
    shutil.copytree(reference.output_dir / f"checkpoint-{half}", folder / f"checkpoint-{half}")
    run = bench.start("resumed")
    expect(run.code == 0, f"exit code {run.code}")
    ours = run.losses()[half:]
    theirs = reference.losses()[half:]
    found = difference(ours, theirs)
    expect(found <= bench.tolerance, f"losses differ by {found:.1e}: {ours}, {theirs}")
    return f"{len(ours)} losses, " + ("equal to the bit" if ours == theirs else f"{found:.1e}")


def check_accumulation(bench: Bench) -> str:
    run = bench.train(
        "accumulated",
        per_device_train_batch_size=ROWS_PER_STEP // 2,
        gradient_accumulation_steps=2,
    )
    found = difference(run.losses(), bench.reference.losses())
    expect(found < 10 * bench.tolerance, f"losses differ by {found:.1e}")
    return f"2 x {ROWS_PER_STEP // 2} rows against 1 x {ROWS_PER_STEP}: losses within {found:.1e}"


def check_checkpointing(bench: Bench, name: str, changes: dict[str, Any]) -> str:
    """Activations that are recomputed give the same losses."""
    kept = bench.train(f"{name}-kept", **changes)
    again = bench.train(f"{name}-again", gradient_checkpointing=True, **changes)
    found = difference(again.losses(), kept.losses())
    expect(found < bench.tolerance, f"losses differ by {found:.1e}")
    assert again.trainer is not None
    num_trained = again.trainer.model.num_parameters(only_trainable=True)
    num_all = again.trainer.model.num_parameters()
    expect(num_trained < num_all, "all weights are trained")
    return f"losses within {found:.1e}, {num_trained:,} of {num_all:,} weights trained"


def check_window(bench: Bench, name: str, changes: dict[str, Any]) -> str:
    """Less padding than with a window of 30 s for each row."""
    run = bench.train(name, **changes)
    ours = statistics.mean(run.log("padding_fraction"))
    theirs = statistics.mean(bench.reference.log("padding_fraction"))
    expect(ours < theirs, f"padding {ours:.1%}, without {theirs:.1%}")
    return f"padding {ours:.1%}, without {theirs:.1%}"


def check_compile(bench: Bench) -> str:
    if not bench.is_gpu:
        raise NotHere("on a CPU compiling takes longer than all other checks")
    run = bench.train("compiled", torch_compile=True)
    found = difference(run.losses(), bench.reference.losses())
    expect(found < 10 * bench.tolerance, f"losses differ by {found:.1e}")
    return f"losses within {found:.1e}, {run.seconds:.0f} s with compilation"


def check_broken_step(bench: Bench, changes: dict[str, Any]) -> str:
    """A NaN in the loss scaler's path: the step is skipped, the weights stay finite."""
    prepare = functools.partial(interrupt, call=2, happens=broken)
    run = bench.start("broken", prepare, fp16=True, **changes)
    expect(run.code == 0, f"exit code {run.code}")
    assert run.trainer is not None
    skipped = run.trainer.progress.num_skipped_steps
    expect(skipped == 1, f"{skipped} steps skipped")
    are_finite = all(bool(p.isfinite().all()) for p in run.trainer.model.parameters())
    expect(are_finite, "weights are not finite")
    expect(math.isfinite(run.losses()[-1]), f"losses {run.losses()}")
    scale = run.trainer.accelerator.scaler.get_scale()
    return f"1 of {bench.num_steps} steps skipped, loss scale {scale:g} at the end"


def check_out_of_memory_in_training(bench: Bench) -> str:
    run = bench.start("full", functools.partial(interrupt, call=2, happens=too_large))
    expect(run.code == 74, f"exit code {run.code}")
    return "exit code 74"


def transcribe_small_batches(
    trainer: SpeechTrainer, inputs: dict[str, Any], generation: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """In place of trainer.transcribe: more than two rows are too many."""
    if len(inputs["frame_counts"]) > 2:
        out_of_memory(trainer.args.device)
    return SpeechTrainer.transcribe(trainer, inputs, generation)


def limit_scoring(trainer: SpeechTrainer) -> None:
    trainer.transcribe = functools.partial(transcribe_small_batches, trainer)


def check_out_of_memory_in_scoring(bench: Bench) -> str:
    run = bench.start("halved", limit_scoring, do_train=False, do_eval=True)
    expect(run.code == 0, f"exit code {run.code}")
    assert run.trainer is not None
    size = run.trainer.args.per_device_eval_batch_size
    expect(size == 2, f"{size} rows at a time")
    ours = run.metrics["eval_wer"]
    theirs = bench.reference.metrics["zero_shot_wer"]
    expect(ours == theirs, f"WER {ours}, at once {theirs}")
    return f"{ROWS_PER_STEP} rows at a time became {size}, the same WER of {ours:.2f}"


def check_signal(bench: Bench) -> str:
    """SIGTERM amid a step: the step is finished, saved, and the run ends with 143."""
    prepare = functools.partial(interrupt, call=STEP_OF_SIGNAL, happens=signalled)
    run = bench.start("signalled", prepare, save_strategy="steps", save_steps=1000)
    expect(run.code == 128 + signal.SIGTERM, f"exit code {run.code}")
    checkpoint = run.output_dir / f"checkpoint-{STEP_OF_SIGNAL}"
    expect(is_complete(checkpoint), f"{checkpoint.name} is not complete")
    return f"exit code {run.code}, {checkpoint.name} is complete"


@torch.no_grad()
def check_ids(bench: Bench) -> str:
    """Token ids of scoring, which runs the encoder once, against the library's generate()."""
    trainer = bench.reference.trainer
    assert trainer is not None and trainer.eval_dataset is not None
    assert trainer.eval_collator is not None
    rows = trainer.eval_dataset.select(range(len(trainer.eval_dataset)))
    features = trainer.pad_to_window(trainer.eval_collator(list(rows)))
    model = trainer.model.eval()
    limits = {"max_new_tokens": MAX_NEW_TOKENS, "max_length": None}
    ours = generate_ids(model, model.get_encoder()(features), **limits)
    timestamps = range(model.generation_config.no_timestamps_token_id + 1, model.config.vocab_size)
    suppressed = transformers.SuppressTokensLogitsProcessor(
        list(timestamps), device=features.device
    )
    theirs = model.generate(input_features=features, logits_processor=[suppressed], **limits)
    num_equal = sum(a.tolist() == b.tolist() for a, b in zip(ours, theirs, strict=True))
    expect(num_equal == len(rows), f"{num_equal} of {len(rows)} rows are equal")
    return f"{num_equal} rows of {ours.shape[1]} ids are equal"


def check_reload(bench: Bench) -> str:
    found = [line for line in bench.reference.messages if "loaded afresh" in line]
    expect(len(found) == 1, "the saved model was not compared")
    return found[0].partition("loaded afresh, ")[2]


def waits_on_gpu(function: Callable[[], Run]) -> Counter[str]:
    """{file and line: how often} of what makes the CPU wait for the GPU, by torch's own count."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{Path(warning.filename).name}:{warning.lineno}"
        for warning in caught
        if "synchronizing" in str(warning.message)
    )


def check_waits(bench: Bench) -> str:
    """What more steps ask of the GPU: one question for each, whatever the accumulation."""
    counts = []
    for num_steps in (2, 2 + MEASURED_STEPS):
        changes = {"max_steps": num_steps, "logging_steps": 1000, "gradient_accumulation_steps": 3}
        function = functools.partial(bench.start, f"quiet-{num_steps}", fp16=True, **changes)
        counts.append(waits_on_gpu(function) if bench.is_gpu else fetched_in(function))
    few, many = counts
    found = many - few
    places = ", ".join(f"{place} {count}" for place, count in found.most_common(5))
    expect(0 < found.total() <= MEASURED_STEPS, f"in {MEASURED_STEPS} steps: {places}")
    return f"{found.total()} in {MEASURED_STEPS} steps of 3 micro-batches: {places}"


def check_forecast(bench: Bench) -> str:
    """The hours that a dry run foretells for a long training, against the rate of the
    reference."""
    num_steps = 10_000_000 if bench.is_gpu else 1_000_000
    run = bench.start("rehearsed", dry_run=True, max_steps=num_steps)
    expect(run.code == 0, f"exit code {run.code}")
    (line,) = [line for line in run.messages if " h of training" in line]
    match = re.search(r"about (\d+):(\d\d) h of training", line)
    assert match is not None
    hours, minutes = map(int, match.groups())
    foretold = hours + minutes / 60
    rate = statistics.median(bench.reference.log("samples_per_second")[1:])
    measured = num_steps * ROWS_PER_STEP / rate / 3600
    ratio = foretold / measured
    if bench.is_gpu:  # times of a shared CPU say nothing
        expect(1 / FORECAST_FACTOR < ratio < FORECAST_FACTOR, f"{ratio:.2f} of the true time")
    return f"{ratio:.2f} of the measured time a step"


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """A training step whose peak is measured and calculated."""

    model: str
    batch: int
    with_checkpointing: bool = True
    accumulation: int = 1
    lora_rank: int = 0

    @property
    def name(self) -> str:
        words = [f"memory: {self.model}, {self.batch} rows"]
        if not self.with_checkpointing:
            words.append("all activations kept")
        if self.accumulation > 1:
            words.append(f"accumulated over {self.accumulation}")
        if self.lora_rank:
            words.append(f"adapters of rank {self.lora_rank}")
        return ", ".join(words)


MEMORY_ROWS = (
    MemoryRow(model="small", batch=16),
    MemoryRow(model="small", batch=16, accumulation=2),
    MemoryRow(model="small", batch=16, with_checkpointing=False),
    MemoryRow(model="medium", batch=8),
    MemoryRow(model="turbo", batch=8),
    MemoryRow(model="large-v3", batch=2, accumulation=2, lora_rank=32),
)


def check_memory(bench: Bench, row: MemoryRow) -> str:
    """The peak of a training step with a real geometry against the calculated one."""
    if not bench.is_gpu:
        raise NotHere("a CPU's memory is not counted")
    import gpu_training
    import memory

    measured_row = gpu_training.Row(
        row.model,
        row.batch,
        with_checkpointing=row.with_checkpointing,
        accumulation=row.accumulation,
        lora_rank=row.lora_rank,
    )
    options = argparse.Namespace(device="cuda", steps=8)
    folder = bench.folder / "memory"
    if not folder.exists():
        gpu_training.make_data(folder)
    if not (folder / row.model).exists():
        gpu_training.make_model(folder, row.model)
    tokens = {"long": float(TOKENS_OF_MEMORY_ROWS)}
    found = gpu_training.measure(measured_row, folder, tokens, options)
    expect("why" not in found, str(found.get("why")))
    measured = found["peak"] * 2**30 / 1e9  # of tensors, without CUDA itself
    peak = memory.peak_in_gb(
        MEMORY_NAMES.get(row.model, row.model),
        row.batch,
        TOKENS_OF_MEMORY_ROWS,
        with_checkpointing=row.with_checkpointing,
        optimiser="lora" if row.lora_rank else "adamw",
        is_accumulated=row.accumulation > 1,
    )
    calculated = peak - memory.CUDA_IN_GB
    error = calculated / measured - 1
    expect(abs(error) < MAX_MEMORY_ERROR, f"{measured:.1f} GB, calculated {calculated:.1f}")
    return f"{measured:.1f} GB, calculated {calculated:.1f} ({error:+.0%})"


CHECKS: dict[str, Callable[[Bench], str]] = {
    "float32 trains": check_float32,
    "bf16 trains": functools.partial(check_precision, precision="bf16"),
    "fp16 trains": functools.partial(check_precision, precision="fp16"),
    "a run continues": check_resume,
    "accumulation": check_accumulation,
    "checkpointing, frozen encoder": functools.partial(
        check_checkpointing, name="frozen", changes={"freeze_encoder": True}
    ),
    "checkpointing, adapters": functools.partial(
        check_checkpointing, name="adapters", changes={"lora_rank": 4}
    ),
    "the window of the longest clip": functools.partial(
        check_window,
        name="longest",
        changes={"train_window": "longest", "full_window_fraction": 0},
    ),
    "packed utterances": functools.partial(
        check_window,
        name="packed",
        changes={"pack_utterances": True, "per_device_train_batch_size": 2 * ROWS_PER_STEP},
    ),
    "compiling": check_compile,
    "a NaN under the scaler": functools.partial(check_broken_step, changes={}),
    "a NaN without clipping": functools.partial(check_broken_step, changes={"max_grad_norm": 0}),
    "out of memory in training": check_out_of_memory_in_training,
    "out of memory in scoring": check_out_of_memory_in_scoring,
    "SIGTERM within a step": check_signal,
    "ids of scoring": check_ids,
    "the saved model": check_reload,
    "waits for the GPU": check_waits,
    "the forecast of a dry run": check_forecast,
    **{row.name: functools.partial(check_memory, row=row) for row in MEMORY_ROWS},
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One line of the table. state: ok, failed or not here."""

    name: str
    state: str
    found: str
    seconds: float


def ask(bench: Bench, name: str) -> Outcome:
    """One check, whatever happens in it."""
    began = time.monotonic()
    try:
        state = "ok"
        found = CHECKS[name](bench)
    except NotHere as reason:
        state = "not here"
        found = str(reason)
    except AssertionError as error:
        state = "failed"
        found = str(error)
    except Exception as error:  # a bug of the project or of the check: the others go on
        state = "failed"
        found = f"{type(error).__name__}: {error}"
    if bench.is_gpu:  # the next one must not find this one's memory taken
        gc.collect()
        torch.cuda.empty_cache()
    found = " ".join(found.split())[:200].replace("|", "/")
    return Outcome(name=name, state=state, found=found, seconds=time.monotonic() - began)


def describe_machine(device: str) -> str:
    name = f"CPU ({platform.machine()})"
    if device == "cuda":
        size_in_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        name = f"{torch.cuda.get_device_name()}, {size_in_gib:.0f} GiB, CUDA {torch.version.cuda}"
    packages = ("torch", "transformers", "accelerate", "datasets")
    versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    python = f"Python {platform.python_version()}"
    return ", ".join([name, f"{os.cpu_count()} cores", python, *versions])


def report(outcomes: list[Outcome], device: str) -> str:
    """Markdown: date, machine and table."""
    seconds = sum(outcome.seconds for outcome in outcomes)
    counts = [
        f"{sum(outcome.state == state for outcome in outcomes)} {state}"
        for state in ("ok", "failed", "not here")
    ]
    lines = [
        "# Acceptance on one device",
        "",
        f"{time.strftime('%Y-%m-%d')}, {describe_machine(device)}.",
        f"`python benchmarks/gpu_acceptance.py --device {device}`: {', '.join(counts)}, {seconds:.0f} s.",
        "",
        "| check | result | figures | seconds |",
        "|---|---|---|---|",
    ]
    for outcome in outcomes:
        cells = (outcome.name, outcome.state, outcome.found, f"{outcome.seconds:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--folder", help="Where models and data are made; default: /tmp.")
    parser.add_argument("--report", help="Default: gpu_acceptance_DATE.md beside this file.")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), metavar="CHECK")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU. --device cpu tries this out in miniature")
    if options.report is None:
        options.report = str(HERE / f"gpu_acceptance_{time.strftime('%Y-%m-%d')}.md")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    outcomes = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(options.device, Path(folder))
        for name in options.only or CHECKS:
            outcomes.append(ask(bench, name))
            print(f"{outcomes[-1].state:9s}{name}: {outcomes[-1].found}", flush=True)
    Path(options.report).write_text(report(outcomes, options.device), encoding="utf-8")
    print(f"the table: {options.report}")
    return int(any(outcome.state == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
