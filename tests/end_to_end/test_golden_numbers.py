"""Golden numbers of commit 81b91a7, the last version in a single file: rewriting must not change
them.

Frozen are the losses, gradient norms and row ids of 6 steps, whole stream_state.json files, a table
of scores, and a checkpoint written by that commit, which must continue exactly. Floats may differ
by a relative 1e-5, because other processors round the last bits differently (found with another
instruction set, ATEN_CPU_CAPABILITY=default: 2e-6 at most); with GOLDEN_EXACT=1 not at all. Ids,
positions and counts must always be equal.

Those are of the first order of rows (data/positions.py), in which runs that began then go on; here
it is asked for. Runs that begin now have another order, and so other losses: it has a set of its
own, golden/order_2. All else must be as it was, which the first set shows. When numbers of the
second are meant to change, commit the program, record them again and say why:

    GOLDEN_RECORD=1 python -m pytest tests/end_to_end/test_golden_numbers.py
"""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.cli import demonstration

IS_EXACT = os.environ.get("GOLDEN_EXACT") == "1"
IS_RECORDING = os.environ.get("GOLDEN_RECORD") == "1"
RELATIVE_TOLERANCE = 1e-5
GOLDEN = Path(__file__).parent.parent / "golden"
CHECKPOINT = GOLDEN / "checkpoint_81b91a7"
CHECKPOINT_STEP = 3
SECOND_ORDER = "order_2"  # folder of its numbers

# 6 steps of 20 rows: three passes over a source of 40 rows, whose blocks hold 16, 16 and 8.
COMMON = """
    --do_train --max_steps 6 --per_device_train_batch_size 20 --shuffle_buffer_size 16
    --logging_steps 1 --dataloader_num_workers 0 --report_to none --report_clips 0 --language es
"""
RUNS = {
    "plain": """
        --dataset_name {speech} --per_device_train_batch_size 10 --gradient_accumulation_steps 2
    """,
    "mixed": "--data_mix {mix}",
    "packed_with_timestamps": """
        --dataset_name {speech} --pack_utterances --timestamp_probability 0.5
    """,
    "speed_perturbation": "--dataset_name {speech} --speed_perturbation",
    "longest_window": """
        --dataset_name {speech} --train_window longest
        --per_device_train_batch_size 4 --gradient_accumulation_steps 5
    """,
}
# Long enough to learn the one sentence of its training rows: some words are hit and some are not.
SCORED_RUN = """
    --data_mix {scored_mix} --model_name_or_path {steady_model} --do_eval --eval_before_training
    --max_steps 36 --learning_rate 0.01 --lr_scheduler_type constant_with_warmup
    --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --generation_max_length 24
"""
CONTINUED_RUN = """
    --data_mix {mix} --model_name_or_path {small_model} --speed_perturbation --save_steps 3
    --per_device_train_batch_size 10 --gradient_accumulation_steps 2
"""
# The second source has two rows that are rejected in every pass, and a language of its own.
MIX = """
- {{name: clean, dataset_name: {speech}, weight: 2}}
- {{name: flawed, dataset_name: {flawed_speech}, weight: 1, language: fr}}
"""
SCORED_MIX = """
- {{name: clean, dataset_name: {one_sentence}}}
- {{name: flawed, dataset_name: {flawed_speech}, train_split_name: null,
    test_split_name: validation, language: fr, do_normalize_eval: false}}
"""
LOGGED = "step loss grad_norm learning_rate padding_fraction rows rejected pass share".split()
CLOCKS = "runtime|per_second|preparation_time|hours"


# ---- what depends on the program's inner names: to be re-aimed when they change ----------------
def ids_of_batch(batch: dict[str, Any]) -> list[str]:
    """The ids of a training batch's accepted rows, as the trainer passes it to the library's."""
    return batch["step_info"].ids


def records_in_order(
    data_records: Callable[..., list[Any]], order_version: int, data_args: Any
) -> list[Any]:
    """The records of a run whose rows come in this version of the order."""
    records = data_records(data_args)
    for record in records:
        record.order_version = order_version
    return records


def read_stream_state(checkpoint: Path) -> dict[str, Any]:
    """The stream_state.json except the clock and what was added later, in the form of 81b91a7."""
    state = read_json(checkpoint / "stream_state.json")
    assert state["counts"]["time_in_seconds"] > 0
    names = ("num_rows", "num_skipped_steps", "audio_in_seconds")
    return {
        "position": position_of_81b91a7(state["position"]),
        "dealt": [position_of_81b91a7(position) for position in state["rank_positions"]],
        "counts": {name: state["counts"][name] for name in names},
        "rejected": state["rejected"],
        "rejected_bytes": state["rejected_bytes"],
    }


def position_of_81b91a7(position: dict[str, Any]) -> dict[str, Any]:
    sources = []
    for source in position["sources"]:
        start = {
            "pass": source["start"]["pass_number"],
            "block": source["start"]["block"],
            "rows": source["start"]["rows_before"],
            "shard": source["start"]["shard"],
            "shard_row": source["start"]["shard_row"],
        }
        sources.append(
            {
                "start": start,
                "offset": source["offset"],
                "rows_per_pass": source["rows_per_pass"],
                "used": source["rows_used"],
                "group": source["group_size"],
            }
        )
    return {
        "row": position["row"],
        "sources": sources,
        "last": position["last_source"],
        "skip": position["rows_to_skip"],
    }


# ---- comparing ---------------------------------------------------------------------------------
def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def differences(found: Any, frozen: Any, place: str = "") -> list[str]:
    """One line for every value, at any depth, that is missing, new or changed."""
    if isinstance(found, dict) and isinstance(frozen, dict):
        lines = [f"{place}/{name} is missing" for name in frozen if name not in found]
        lines += [f"{place}/{name} is new" for name in found if name not in frozen]
        for name in frozen:
            if name in found:
                lines += differences(found[name], frozen[name], f"{place}/{name}")
        return lines
    if isinstance(found, list) and isinstance(frozen, list) and len(found) == len(frozen):
        pairs = enumerate(zip(found, frozen, strict=True))
        return [line for i, pair in pairs for line in differences(*pair, f"{place}/{i}")]
    return [] if is_same(found, frozen, place) else [f"{place}: {found!r}, was {frozen!r}"]


def is_same(found: Any, frozen: Any, place: str) -> bool:
    if IS_EXACT or found == frozen:
        return found == frozen
    if isinstance(found, float) and isinstance(frozen, float):
        return math.isclose(found, frozen, rel_tol=RELATIVE_TOLERANCE)
    return place.endswith("/sha256")


def environment() -> dict[str, str]:
    """What may change numbers, besides the program."""
    names = ("torch", "transformers", "accelerate", "datasets", "numpy", "soundfile", "soxr")
    versions = {name: importlib.metadata.version(name) for name in names}
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"python": platform.python_version(), **versions, "machine": machine}


def check(name: str, found: dict[str, Any]) -> None:
    """Compares what was found with what is frozen under these names, or freezes it."""
    path = GOLDEN / f"{name}.json"
    if IS_RECORDING and name.startswith(SECOND_ORDER):
        write_json(path, found)
        return
    frozen = read_json(path)
    lines = differences({key: found[key] for key in found if key in frozen}, frozen)
    if lines:
        recorded = read_json(path.parent / "environment.json")
        changed = differences({"commit": recorded["commit"], **environment()}, recorded)
        shown = "\n".join(lines[:20])
        message = f"{len(lines)} numbers are not those of {path.name}:\n{shown}"
        pytest.fail(f"{message}\nchanged in the environment: {', '.join(changed) or 'nothing'}")


# ---- running -----------------------------------------------------------------------------------
@dataclass
class Run:
    """Runs `main` in this process and shows what it left."""

    paths: dict[str, Path]  # what the names in braces in the flags stand for
    output_dir: Path
    ids: list[list[str]] = field(default_factory=list)  # of the rows of each step

    def main(self, flags: str, order_version: int) -> dict[str, float]:
        words = f"--model_name_or_path {{model}} {COMMON} {flags}".format(**self.paths).split()
        with pytest.MonkeyPatch.context() as patch:
            in_order = functools.partial(records_in_order, script.data_records, order_version)
            patch.setattr(script, "data_records", in_order)
            return script.main([*words, "--output_dir", str(self.output_dir)])

    def checkpoint(self, step: int = 6) -> Path:
        return self.output_dir / f"checkpoint-{step}"

    def log(self) -> list[dict[str, float]]:
        """What was logged after each step, speeds excepted."""
        history = read_json(self.checkpoint() / "trainer_state.json")["log_history"]
        steps = [entry for entry in history if "loss" in entry]
        prefixes = tuple(LOGGED)
        return [
            {name: entry[name] for name in entry if name.startswith(prefixes)} for entry in steps
        ]

    def weights(self) -> dict[str, Any]:
        """The sum of magnitudes and the norm of each saved tensor, and one hash of all."""
        sums = {}
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(self.output_dir / "model.safetensors").items()):
            values = tensor.double()
            sums[name] = [values.abs().sum().item(), values.square().sum().sqrt().item()]
            digest.update(tensor.numpy().tobytes())
        return {"sums": sums, "sha256": digest.hexdigest()}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with dropout, without, and without timestamp tokens (for a small checkpoint);
    speech."""
    folder = tmp_path_factory.mktemp("golden")
    tokenizer = demonstration.make_tokenizer()
    num_tokens = tokenizer.convert_tokens_to_ids("<|0.00|>")  # the timestamps are the last ones
    size = {"d_model": 16, "num_layers": 1}
    random = {"dropout": 0.2, "apply_spec_augment": True}
    paths = {
        "model": demonstration.make_model(folder / "model", **size, dropout=0.2),
        "steady_model": demonstration.make_model(folder / "steady", **size),
        "small_model": demonstration.make_model(
            folder / "small", **size, **random, vocab_size=num_tokens
        ),
        "speech": demonstration.make_speech(folder / "speech", {"train": 40}),
        "flawed_speech": make_flawed_speech(folder / "flawed_speech"),
        "one_sentence": make_one_sentence(folder / "one_sentence"),
    }
    for name, mix in (("mix", MIX), ("scored_mix", SCORED_MIX)):
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(mix.format(**paths), encoding="utf-8")
    return paths


def make_flawed_speech(folder: Path) -> Path:
    """14 good rows and 2 bad ones to train on; 6 and 2, with capitals and full stops, to score."""
    rows = demonstration.make_rows(22, seed=7)
    bad = [(rows[20][0], " "), (None, rows[21][1])]
    scored = [(audio, f"{text.capitalize()}.") for audio, text in rows[14:20]]
    demonstration.write_parquet(folder / "train-00000-of-00002.parquet", rows[:9])
    demonstration.write_parquet(folder / "train-00001-of-00002.parquet", rows[9:14] + bad)
    demonstration.write_parquet(folder / "validation-00000-of-00001.parquet", scored + bad)
    return folder


def make_one_sentence(folder: Path) -> Path:
    """24 rows to train on, all with the same text; 8 ordinary ones to score."""
    rows = [(audio, "Uno, dos tres.") for audio, _ in demonstration.make_rows(24, seed=8)]
    scored = demonstration.make_rows(8, seed=9)
    demonstration.write_parquet(folder / "train-00000-of-00001.parquet", rows)
    demonstration.write_parquet(folder / "validation-00000-of-00001.parquet", scored)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """How torch divides a sum among threads changes its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def recording() -> None:
    """Names the commit that is recorded; refuses to record a program that no commit contains."""
    if not IS_RECORDING:
        return
    root = Path(script.__file__).parent
    this_file = Path(__file__).relative_to(root)
    status = ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=all", "--"]
    changed = subprocess.check_output([*status, "*.py", f":!{this_file}"], text=True)
    assert not changed, f"commit these first:\n{changed}"
    commit = subprocess.check_output(["git", "-C", str(root), "rev-parse", "HEAD"], text=True)
    write_json(
        GOLDEN / SECOND_ORDER / "environment.json", {"commit": commit.strip(), **environment()}
    )


@pytest.fixture
def run(paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Ids are read where the library receives a step's batches: only rows that are trained on."""
    run = Run(paths, tmp_path / "output")
    get_batch_samples = transformers.Trainer.get_batch_samples

    def remember(trainer: Any, iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        batches = list(itertools.islice(iterator, num_batches))
        run.ids.append([row for batch in batches for row in ids_of_batch(batch)])
        return get_batch_samples(trainer, iter(batches), num_batches, device)

    monkeypatch.setattr(transformers.Trainer, "get_batch_samples", remember)
    return run


# ---- tests -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RUNS)
def test_losses_rows_and_position(run: Run, name: str):
    run.main(RUNS[name], order_version=1)
    state = read_stream_state(run.checkpoint())
    check(name, {"log": run.log(), "ids": run.ids, "stream_state": state})


@pytest.mark.parametrize("name", ["mixed", "longest_window"])
def test_losses_rows_and_position_of_runs_that_begin_now(run: Run, name: str):
    run.main(RUNS[name], order_version=2)
    state = read_stream_state(run.checkpoint())
    check(f"{SECOND_ORDER}/{name}", {"log": run.log(), "ids": run.ids, "stream_state": state})


def test_scores(run: Run):
    metrics = run.main(SCORED_RUN, order_version=1)
    assert read_json(run.output_dir / "all_results.json") == metrics
    check("scores", {name: metrics[name] for name in metrics if not re.search(CLOCKS, name)})


def test_a_run_without_interruption(run: Run):
    run.main(CONTINUED_RUN, order_version=1)
    check("continued", {"log": run.log(), "ids": run.ids, "weights": run.weights()})


def test_a_checkpoint_of_81b91a7_continues_exactly(run: Run):
    """The user's way: the checkpoint lies in output_dir and the same command is started again. That
    its order is the first one, the checkpoint itself says."""
    shutil.copytree(CHECKPOINT, run.checkpoint(CHECKPOINT_STEP))
    text = (CHECKPOINT / "run_info.json").read_text(encoding="utf-8")
    for name, path in run.paths.items():
        text = text.replace(f"{{{name}}}", str(path))
    (run.output_dir / "run_info.json").write_text(text, encoding="utf-8")
    run.main(CONTINUED_RUN, order_version=2)
    earlier_ids = read_json(GOLDEN / "continued.json")["ids"][:CHECKPOINT_STEP]
    ids = earlier_ids + run.ids  # 9 steps if it had started from the beginning
    check("continued", {"log": run.log(), "ids": ids, "weights": run.weights()})
