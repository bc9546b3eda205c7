"""Several processes: the same training as one, one decision for all, nothing lost by signals and
kills.

Most runs are forks of one process, see ranks.py; torchrun and run.sh are real where they matter."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
import transformers
from fake_venv import make_venv
from log_lines import count_steps, wait_for_steps
from preprocessors import make_preprocessor
from rows import make_clip, read_rows, write_clips
from safetensors.torch import load_file

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.cli import demonstration
from speech_finetuning.data.passes import read_pass
from speech_finetuning.data.preprocessing import SpeechDataset
from speech_finetuning.training.checkpoints import is_complete

PROJECT = Path(script.__file__).parent
COMMON = {
    "language": "es",
    "per_device_eval_batch_size": 4,
    "generation_max_length": 12,
    "dataloader_num_workers": 0,
    "logging_steps": 1,
    "report_to": "none",
    "report_clips": 0,
    "disable_tqdm": True,
    "use_cpu": True,
    "data_report_samples": 0,
}
TWO = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}  # with two processes: 8 rows a step
# Long enough to be met by signals. The flags of run.sh's recipe that count here are the same.
LONG = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "max_steps": 40,
    "save_steps": 5,
}
LONG |= {
    "eval_steps": 5,
    "warmup_steps": 0,
    "save_total_limit": 3,
    "test_split_name": "test",
    "learning_rate": 1e-3,
}
ONE = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def words(**values: object) -> list[str]:
    """Flags of a training, True standing for a flag without a value."""
    return [
        "--do_train",
        *(text for n, v in (COMMON | values).items() for text in (f"--{n}", str(v))),
    ]


def history(checkpoint: Path, name: str) -> list[float]:
    entries = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in entries if name in entry]


def status(folder: Path) -> dict:
    return json.loads((folder / "exit_status.json").read_text())


def stream_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "stream_state.json").read_text())


def same_weights(first: Path, second: Path) -> bool:
    one, other = (load_file(path / "model.safetensors") for path in (first, second))
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set in one file per split, which cannot be dealt; every fifth row is junk."""
    folder = tmp_path_factory.mktemp("one_file")
    for split, count in (("train", 40), ("validation", 5)):
        rows = demonstration.make_rows(count, seed=count)
        rows = [
            (b"junk", "uno") if split == "train" and i % 5 == 0 else row
            for i, row in enumerate(rows)
        ]
        demonstration.write_parquet(folder / f"{split}-00000-of-00001.parquet", rows)
    return folder


@pytest.fixture(scope="module")
def dropout_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demonstration.make_model(
        tmp_path_factory.mktemp("dropout"), d_model=16, num_layers=1, dropout=0.2
    )


@pytest.fixture(scope="module")
def uneven_model(full_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it hears depends on the clip, and so does where the text ends."""
    folder = shutil.copytree(full_model, tmp_path_factory.mktemp("uneven") / "model")
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    encoder, decoder = model.model.encoder, model.model.decoder
    attention = decoder.layers[0].encoder_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    factors = {
        encoder.conv1: 10,
        encoder.conv2: 10,
        decoder.embed_positions: 20,
        **dict.fromkeys(projections, 50),
    }
    with torch.no_grad():
        for module, factor in factors.items():
            module.weight.mul_(factor)
        end = decoder.embed_tokens.weight[model.config.eos_token_id]
        end.normal_(0, 0.16, generator=torch.Generator().manual_seed(2))
    model.save_pretrained(folder)
    return folder


def run_forks(python: str, root: Path, jobs: dict[str, dict]) -> dict:
    """Runs the jobs of ranks.py one after the other: {"folder": where, name: exit codes of its
    ranks}."""
    for name, job in jobs.items():
        job["words"] += ["--output_dir", str(root / name)]
        job["log"] = str(root / f"{name}.log")
        if "copy" in job:  # a run that goes on from the middle of another one
            source = root / job["copy"]
            names = ["checkpoint-6", "run_info.json"] + ["rejected.jsonl"] * (
                "then" in name and "dealt" not in name
            )
            job["copy"] = [[str(source / file), str(root / name / file)] for file in names]
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [python, ranks.__file__, root / "jobs.json"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    return {"folder": root, **json.loads(result.stdout.splitlines()[-1])}


@pytest.fixture(scope="module")
def runs(
    forked_python: str,
    one_file: Path,
    speech: Path,
    tiny_model: Path,
    dropout_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict:
    """All forked runs, made once: {"folder": where, name: exit codes of its ranks}."""
    root = tmp_path_factory.mktemp("runs")
    whole = {
        "model_name_or_path": tiny_model,
        "dataset_name": one_file,
        "max_steps": 12,
        "save_steps": 6,
    }
    dealt = {
        "model_name_or_path": dropout_model,
        "dataset_name": speech,
        "max_steps": 12,
        "save_steps": 6,
    } | TWO
    longer = {"max_steps": 5000, "save_steps": 5000}
    scored = {"eval_steps": 1, "per_device_eval_batch_size": 1, "generation_max_length": 60}
    slow_eval = ["--do_eval", *words(**dealt | longer | scored)[1:]]
    jobs = {
        "one": {"words": ["--do_eval", *words(**whole, **ONE)], "world_size": 1},
        "one_then_two": {"words": words(**whole, **TWO), "copy": "one"},
        "two_then_one": {"words": words(**whole, **ONE), "copy": "two", "world_size": 1},
        "dealt": {"words": words(**dealt)},
        "long": {"words": ["--do_eval", *words(**dealt | LONG)]},
        "dealt_again": {"words": words(**dealt), "copy": "dealt"},
        "dealt_then_one": {"words": words(**dealt), "copy": "dealt", "world_size": 1},
        "time": {"words": words(**dealt | longer, max_train_time_in_hours=1.0 / 3600)},
        "rejected": {"words": words(**whole | longer, **TWO, max_rejected_fraction=0.1)},
        "broken": {"words": words(**whole | longer, **TWO), "bad_rank": 1},
        "signal": {"words": words(**dealt | longer), "signal": [1, signal.SIGTERM, "clips/s"]},
        "scoring": {"words": ["--do_train", *slow_eval], "signal": [0, signal.SIGUSR1, "clips/s"]},
        "killed": {"words": words(**dealt | longer), "signal": [1, signal.SIGKILL, "clips/s"]},
        "full": {
            "words": ["--do_eval", "--load_best_model_at_end", *words(**dealt)],
            "full_rank": 0,
        },
        "frozen": {
            "words": [
                "--freeze_encoder",
                "--gradient_checkpointing",
                *words(**dealt | {"max_steps": 2}),
            ]
        },
        "thawed": {"words": ["--gradient_checkpointing", *words(**dealt | {"max_steps": 2})]},
        "lora": {
            "words": [
                "--gradient_checkpointing",
                *words(**dealt | {"max_steps": 2, "lora_rank": 2}),
            ]
        },
    }
    # Scored first, it must be trained alike: the library leaves a model that was scored unwrapped.
    two = [
        "--do_eval",
        "--eval_before_training",
        *words(**whole, **TWO),
        "--output_dir",
        str(root / "two"),
    ]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    result = subprocess.run(
        [*torchrun, script.__file__, *two],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return run_forks(forked_python, root, jobs)


def log(runs: dict, name: str) -> str:
    return (runs["folder"] / f"{name}.log").read_text(errors="replace")


def errors(text: str) -> list[str]:
    """How the runs of a log said that they ended early, by an error or by a signal."""
    return re.findall("^(?:error|stopped): .*", text, re.M)


@pytest.mark.slow
def test_two_processes_equal_one(runs: dict):
    one, two = (runs["folder"] / name / "checkpoint-12" for name in ("one", "two"))
    assert runs["one"] == [0] and status(two.parent)["code"] == 0
    assert len(history(one, "loss")) == 12
    assert history(two, "loss") == pytest.approx(history(one, "loss"), abs=1e-5)
    assert history(two, "grad_norm") == pytest.approx(history(one, "grad_norm"), rel=1e-4)
    first, second = (
        json.loads((folder.parent / "all_results.json").read_text()) for folder in (one, two)
    )
    same = ("eval_num_rows", "eval_hits", "eval_wer", "eval_cer", "train_rows", "train_rejected")
    assert {name: first[name] for name in same} == {name: second[name] for name in same}
    assert first["eval_num_rows"] == 5 and first["train_rows"] == 96


ACCELERATE = [
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
MACHINE = [
    "torch.distributed.run",
    "--nnodes",
    "2",
    "--nproc_per_node",
    "1",
    "--rdzv_backend",
    "c10d",
]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "two machines"])
def test_other_launchers_train_alike(
    runs: dict,
    one_file: Path,
    tiny_model: Path,
    forked_python: str,
    tmp_path: Path,
    launcher: str,
):
    """As docs/multi-gpu.md has them, both machines on this one, any free port: weights equal to the
    bit."""
    whole = {
        "model_name_or_path": tiny_model,
        "dataset_name": one_file,
        "max_steps": 12,
        "save_steps": 6,
    } | TWO
    flags = [script.__file__, *words(**whole), "--output_dir", str(tmp_path / "out")]
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        place = ["--rdzv_endpoint", f"127.0.0.1:{server.getsockname()[1]}"]
    starts = (
        [ACCELERATE]
        if launcher == "accelerate"
        else [[*MACHINE, "--node_rank", n, *place] for n in "01"]
    )
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    how |= {"env": ENVIRONMENT | {"PYTHON_EXEC": forked_python}}
    launched = [subprocess.Popen([sys.executable, "-m", *start, *flags], **how) for start in starts]
    texts = [process.communicate(timeout=200)[0] for process in launched]
    assert [process.returncode for process in launched] == [0] * len(starts), texts[-1][-3000:]
    assert same_weights(tmp_path / "out", runs["folder"] / "two")


@pytest.mark.slow
def test_two_processes_hold_out_the_same_speakers(
    tiny_model: Path, forked_python: str, tmp_path: Path
):
    """Started by torchrun; all but one of the clips to train on are too long, so that rejected.jsonl
    tells which rows the processes have read."""
    folder = tmp_path / "speech"
    names = write_clips(folder, 40)
    speakers = [f"s{number // 2}" for number in range(40)]
    lines = [f"{name},uno,{who}" for name, who in zip(names, speakers, strict=True)]
    (folder / "train.csv").write_text("\n".join(["path,sentence,speaker", *lines]))
    values = {
        "model_name_or_path": tiny_model,
        "dataset_name": folder,
        "max_steps": 20,
        "max_rejected_fraction": 1.0,
        "data_report_samples": 0,
        "per_device_train_batch_size": 2,
        "output_dir": tmp_path / "out",
    }
    flags = ["--do_eval", *words(**values)]
    _, data_args, training_args = script.parse_arguments(flags)
    records = script.data_records(data_args)
    speech = script.load_speech(records, [make_preprocessor(tiny_model)], training_args, None)
    held_out = ids_read(speech["eval"][0])
    others = [row for row in read_rows(speech["train"][0].source) if row.id not in held_out]
    for row in others[1:]:
        Path(str(row.audio)).write_bytes(make_clip(5.0))  # the window has 4 s

    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    result = subprocess.run(
        [sys.executable, *launcher, script.__file__, *flags],
        env=ENVIRONMENT | {"PYTHON_EXEC": forked_python},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    rejected = lines_of_training(tmp_path / "out" / "rejected.jsonl")
    trained = {json.loads(line)["row"] for line in rejected}
    assert len(held_out) == 4 and trained == {row.id for row in others[1:]}
    # With the one that is usable, these are all rows of a pass.
    position = stream_state(tmp_path / "out" / "checkpoint-20")["position"]
    assert position["sources"][0]["rows_per_pass"] == 36
    lines = (tmp_path / "out" / "predictions_eval.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in lines} == held_out


def ids_read(dataset: SpeechDataset) -> set[str]:
    """Of all rows of a pass."""
    return {row.id for block in read_pass(dataset, block_size=10) for row in block.rows}


def lines_of_training(listing: Path) -> list[str]:
    """Without what the data report met before."""
    lines = listing.read_text().splitlines()
    return sorted(line for line in lines if json.loads(line)["split"] == "train")


@pytest.mark.slow
def test_rejections_of_all_processes_are_counted_and_listed_once(runs: dict):
    folders = [runs["folder"] / name for name in ("one", "two", "one_then_two", "two_then_one")]
    listed = [lines_of_training(folder / "rejected.jsonl") for folder in folders]
    # Rejected rows come again in every pass; of 96 rows the first two passes of 40 have 8 each.
    assert listed[0] == listed[1] == listed[2] == listed[3] and 16 <= len(listed[0]) <= 24
    states = [stream_state(folder / "checkpoint-12") for folder in folders]
    assert {(s["rejected"]["audio_unreadable"], s["counts"]["num_rows"]) for s in states} == {
        (len(listed[0]), 96)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_then_two", "two_then_one"])
def test_another_number_of_processes_goes_on_at_the_same_row(runs: dict, name: str):
    """Each step's loss is that of the undisturbed run: so are its rows."""
    folder = runs["folder"] / name / "checkpoint-12"
    assert set(runs[name]) == {0}
    assert history(folder, "loss") == pytest.approx(
        history(runs["folder"] / "one" / "checkpoint-12", "loss"), abs=1e-5
    )
    assert all(
        tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values()
    )


@pytest.mark.slow
def test_dealt_files_resume_exactly_with_the_same_number_of_processes(runs: dict):
    whole, again = (runs["folder"] / name for name in ("dealt", "dealt_again"))
    assert runs["dealt"] == runs["dealt_again"] == [0, 0]
    assert "every process reads files of its own" in log(runs, "dealt")
    assert same_weights(whole, again)
    assert history(whole / "checkpoint-12", "loss") == history(again / "checkpoint-12", "loss")
    first, second = stream_state(whole / "checkpoint-12")["rank_positions"]
    assert first["row"] == second["row"] == 48
    states = [
        torch.load(whole / "checkpoint-12" / f"rng_state_{rank}.pth", weights_only=False)
        for rank in (0, 1)
    ]
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"])


@pytest.mark.slow
def test_dealt_files_with_another_number_of_processes_begin_the_next_pass(runs: dict):
    assert runs["dealt_then_one"] == [0] and "the next pass begins" in log(runs, "dealt_then_one")
    state = stream_state(runs["folder"] / "dealt_then_one" / "checkpoint-12")
    assert state["rank_positions"] == [] and state["position"]["row"] == 6 * 8 + 6 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "message", "is_saved"),
    [
        ("time", 75, "--max_train_time_in_hours is over", True),
        ("signal", 143, "ended by SIGTERM", True),
        ("scoring", 138, "ended by SIGUSR1", True),
        ("broken", 2, "this rank's data is broken", True),
        ("rejected", 2, "rejected: 8 of the first 40 rows", False),
    ],
)
def test_what_ends_one_process_ends_all_at_the_same_step(
    runs: dict, name: str, code: int, message: str, is_saved: bool
):
    folder = runs["folder"] / name
    assert runs[name] == [code, code]
    assert status(folder)["code"] == code and message in status(folder)["reason"]
    assert len(errors(log(runs, name))) == 1 and "Traceback" not in log(runs, name)
    saved = list(folder.glob("checkpoint-*"))
    assert len(saved) == is_saved and all(is_complete(checkpoint) for checkpoint in saved)
    assert all(len(list(checkpoint.glob("rng_state_*.pth"))) == 2 for checkpoint in saved)


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_costs_a_checkpoint_only(runs: dict):
    """That of the best step so far, too."""
    assert runs["full"] == [0, 0] and "checkpoint-6 could not be saved" in log(runs, "full"), log(
        runs, "full"
    )[-2000:]
    (checkpoint,) = (runs["folder"] / "full").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-12" and is_complete(checkpoint)


@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_one_message(runs: dict):
    assert runs["killed"] == [75, -signal.SIGKILL]
    (message,) = errors(log(runs, "killed"))
    assert "another process of this run has ended" in message and "Traceback" not in log(
        runs, "killed"
    )
    assert status(runs["folder"] / "killed")["code"] == 75


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frozen", "thawed", "lora"])
def test_gradient_checkpointing_on_two_processes(runs: dict, name: str, dropout_model: Path):
    assert runs[name] == [0, 0], log(runs, name)[-2000:]
    before, after = (
        load_file(path / "model.safetensors") for path in (dropout_model, runs["folder"] / name)
    )
    moved = {key.split(".")[1] for key in before if not torch.equal(before[key], after[key])}
    assert moved == ({"decoder"} if name == "frozen" else {"encoder", "decoder"})


@pytest.fixture(scope="module")
def sharded(
    forked_python: str,
    one_file: Path,
    uneven_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict:
    """The same training plain, sharded as docs/multi-gpu.md says, and sharded and continued from
    its middle."""
    root = tmp_path_factory.mktemp("sharded")
    page = (PROJECT / "docs" / "multi-gpu.md").read_text()
    (config,) = re.findall(r"^FSDP: .*?```json\n(.*?)```", page, re.S | re.M)
    (root / "fsdp.json").write_text(config)
    values = {
        "model_name_or_path": uneven_model,
        "dataset_name": one_file,
        "max_steps": 12,
        "save_steps": 6,
    } | TWO
    values |= {"per_device_eval_batch_size": 1, "generation_max_length": 40, "learning_rate": 1e-4}
    plain = ["--do_eval", "--eval_before_training", "--load_best_model_at_end", *words(**values)]
    flags = [*plain, "--fsdp", "--fsdp_config", str(root / "fsdp.json")]
    jobs = {"plain": {"words": plain}, "fsdp": {"words": flags, "is_sharded": True}}
    jobs["again"] = {"words": [*flags], "is_sharded": True, "copy": "fsdp"}
    jobs["unlike"] = {"words": [*plain], "copy": "fsdp"}
    jobs["lora"] = {"words": [*flags, "--lora_rank", "2"], "is_sharded": True}
    return run_forks(forked_python, root, jobs)


@pytest.mark.slow
def test_a_sharded_training_equals_a_plain_one(sharded: dict):
    """FSDP2, as accelerate does it, on two CPU processes: losses, weights, scores and what is
    heard."""
    plain, fsdp = (sharded["folder"] / name for name in ("plain", "fsdp"))
    assert sharded["plain"] == sharded["fsdp"] == [0, 0], log(sharded, "fsdp")[-3000:]
    held = re.findall(r"^rank (\d) holds (\d+) of (\d+) weights", log(sharded, "fsdp"), re.M)
    assert sorted(rank for rank, _, _ in held) == ["0", "1"]
    assert all(int(part) == pytest.approx(int(whole) / 2, rel=0.02) for _, part, whole in held)
    for name in ("loss", "eval_loss"):
        first, second = (history(folder / "checkpoint-12", name) for folder in (plain, fsdp))
        assert len(first) >= 2 and second == pytest.approx(first, abs=1e-5)
    assert "Could not locate the best model" not in log(sharded, "plain")  # which all ranks load
    texts = [
        [(path / f"predictions_{role}.jsonl").read_text() for role in ("zero_shot", "eval")]
        for path in (plain, fsdp)
    ]
    assert texts[0] == texts[1]
    heard = [json.loads(line)["prediction"] for line in texts[1][1].splitlines()]
    assert (
        len({len(text) for text in heard}) > 2
    )  # ranks end at different tokens, and wait for each other
    results = [json.loads((folder / "all_results.json").read_text()) for folder in (plain, fsdp)]
    assert results[1]["eval_cut_outputs"] == 0
    same = ("eval_num_rows", "eval_hits", "eval_wer", "eval_cer", "zero_shot_wer", "train_rows")
    assert {name: results[0][name] for name in same} == {name: results[1][name] for name in same}


@pytest.mark.slow
def test_a_sharded_model_is_saved_whole(sharded: dict):
    plain, fsdp = (sharded["folder"] / name for name in ("plain", "fsdp"))
    for name in ("", "checkpoint-6", "checkpoint-12"):
        one, other = (load_file(folder / name / "model.safetensors") for folder in (plain, fsdp))
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[key], other[key], rtol=0, atol=1e-5) for key in one)
    model, saved = (
        transformers.WhisperForConditionalGeneration.from_pretrained(fsdp),
        load_file(fsdp / "model.safetensors"),
    )
    assert all(torch.equal(model.state_dict()[key], saved[key]) for key in saved)
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight


@pytest.mark.slow
def test_a_sharded_training_resumes_exactly(sharded: dict):
    whole, again = (sharded["folder"] / name for name in ("fsdp", "again"))
    assert sharded["again"] == [0, 0] and "continues from" in log(sharded, "again"), log(
        sharded, "again"
    )[-3000:]
    assert same_weights(whole / "checkpoint-12", again / "checkpoint-12") and same_weights(
        whole, again
    )
    assert not same_weights(whole / "checkpoint-6", whole / "checkpoint-12")
    assert history(whole / "checkpoint-12", "loss") == history(again / "checkpoint-12", "loss")
    first, second = (stream_state(folder / "checkpoint-12") for folder in (whole, again))
    assert first["position"] == second["position"] and first["counts"]["num_rows"] == 96


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"), [("unlike", "if it was saved with it"), ("lora", "Leave out --fsdp")]
)
def test_what_a_sharded_training_cannot_do_is_refused(sharded: dict, name: str, message: str):
    assert sharded[name] == [2, 2] and "Traceback" not in log(sharded, name), log(sharded, name)[
        -3000:
    ]
    assert message in "".join(errors(log(sharded, name)))


@pytest.fixture
def run_sh(tmp_path: Path, forked_python: str) -> dict[str, str]:
    """The environment of a run.sh that finds this interpreter instead of making .venv."""
    make_venv(tmp_path)
    return os.environ | {
        "VENV": str(tmp_path),
        "NUM_PROCESSES": "2",
        "RESTART_DELAY": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHON_EXEC": forked_python,
    }


def wait_for(file: Path, text: str, count: int = 1) -> None:
    deadline = time.monotonic() + 120
    while file.read_text(errors="replace").count(text) < count:
        assert time.monotonic() < deadline, file.read_text(errors="replace")[-3000:]
        time.sleep(0.05)


def ranks_of(launcher: int) -> list[int]:
    """The process ids of the trainers under run.sh and torchrun, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            parents = [int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])]
            parents.append(
                int(Path(f"/proc/{parents[0]}/stat").read_text().rsplit(")", 1)[1].split()[1])
            )
        except (OSError, IndexError):
            continue
        rank = [int(word[5:]) for word in environment if word.startswith(b"RANK=")]
        if rank and parents[1] == launcher:
            found[rank[0]] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
def test_run_sh_hands_on_a_user_error_of_several_processes(run_sh: dict[str, str], tmp_path: Path):
    command = ["bash", PROJECT / "run.sh", "--train_window", "wide", "--output_dir", "new"]
    result = subprocess.run(
        command, env=run_sh, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert result.returncode == 2
    (error,) = errors(result.stderr)
    assert error.startswith("error: --train_window: invalid choice: 'wide' (choose from ")
    # A refused start is no run: run.sh has the code from a file of its own.
    assert not (tmp_path / "new" / "exit_status.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by /proc")
def test_run_sh_restarts_after_a_kill_saves_at_sigterm_and_loses_nothing(
    run_sh: dict[str, str], runs: dict, dropout_model: Path, speech: Path, tmp_path: Path
):
    """The 40 steps of `long`, but rank 1 meets a SIGKILL and run.sh, later, a SIGTERM."""
    recipe = "--dataset_config_name default --text_column_name text --eval_split_name validation --push_to_hub False"
    recipe += " --fp16 False --eval_before_training False --gradient_checkpointing False"
    flags = {
        "model_name_or_path": dropout_model,
        "dataset_name": speech,
        "dataloader_num_workers": 1,
    } | LONG
    out, text = tmp_path / "out", tmp_path / "log"
    command = [
        "bash",
        PROJECT / "run.sh",
        *recipe.split(),
        *words(**flags),
        "--output_dir",
        str(out),
    ]
    command = [word for word in command if word != "--do_train"]  # the recipe has it
    with open(text, "ab") as file:
        how = {"stdout": file, "stderr": file, "cwd": tmp_path}
        process = subprocess.Popen(command, env=run_sh | {"RESTART": "1"}, **how)
        wait_for_steps(text, 7)
        os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
        wait_for(text, "starting it again")
        assert "2 processes, by torchrun" in text.read_text()
        assert len(errors(text.read_text())) == 1
        wait_for_steps(text, count_steps(text) + 3)
        assert "continues from" in text.read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143, text.read_text()[-3000:]
        assert status(out)["code"] == 143 and text.read_text().count("saved: ") == 1
        steps = sorted(int(path.name[11:]) for path in out.glob("checkpoint-*"))
        assert steps[-1] < 40 and all(step % 5 == 0 for step in steps[:-1])
        assert subprocess.run(command, env=run_sh, timeout=120, **how).returncode == 0, (
            text.read_text()[-3000:]
        )
    assert runs["long"] == [0, 0] and same_weights(out, runs["folder"] / "long")
    assert history(out / "checkpoint-40", "loss") == history(
        runs["folder"] / "long" / "checkpoint-40", "loss"
    )
