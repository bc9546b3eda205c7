"""Pushing: what is uploaded and what never is, faults during and after training, the preflight,
going on elsewhere.

The trainer is a process of its own, the Hub a real HTTP server on loopback."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fork_server import ForkedProcess
from hub_clients import HubClients, HubWithClients
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.cli import demonstration

pytestmark = pytest.mark.slow  # a process each
REPO = "alice/whisper-tiny-es"
SECRET = "hf_owner_token"


@pytest.fixture
def hub(hub_clients: HubClients) -> Iterator[HubWithClients]:
    with hub_clients.new_hub() as server:
        yield server


def command(tiny_model: Path, speech: Path | str, output_dir: str, **flags: object) -> list[str]:
    values = {
        "model_name_or_path": tiny_model,
        "dataset_name": speech,
        "language": "es",
        "max_steps": 6,
        "save_steps": 2,
        "eval_steps": 2,
        "logging_steps": 1,
        "report_clips": 0,
        "per_device_train_batch_size": 4,
        "generation_max_length": 8,
        "output_dir": output_dir,
        "hub_model_id": REPO,
        "max_network_wait_in_minutes": 0.1,
        **flags,
    }
    words = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return ["--do_train", "--do_eval", "--push_to_hub", *words]


def run(
    hub: HubWithClients,
    folder: Path,
    words: list[str],
    token: str | None = SECRET,
    forks_children: bool = True,
    **variables: str,
) -> subprocess.CompletedProcess:
    """The script's end, in a process that works in `folder`."""
    code, output, log = hub.clients.run(
        folder, words, token=token, variables=variables, forks_children=forks_children
    )
    return subprocess.CompletedProcess(words, code, output, log)


def start(
    hub: HubWithClients, folder: Path, words: list[str], forks_children: bool = True
) -> ForkedProcess:
    """The script, whose output goes to folder/log."""
    return hub.clients.forks.start(
        words,
        log=folder / "log",
        cwd=folder,
        environment={"HF_TOKEN": SECRET},
        forks_children=forks_children,
    )


def test_what_is_uploaded_and_what_never_is(
    hub: HubWithClients, tmp_path: Path, tiny_model: Path, speech: Path
):
    """output_dir is './', with other people's files in it."""
    for name in (".env", "notes.txt", ".git/config", ".venv/pyvenv.cfg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"token={SECRET}")
    words = command(tiny_model, speech, "./", eval_before_training=True, test_split_name="test")
    result = run(
        hub,
        tmp_path,
        [*words, "--hub_strategy", "checkpoint", "--save_total_limit", "1"],
        forks_children=False,  # here as users have them: with command line and environment
        WANDB="x",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    stored = [request for request in hub.requests if request.host == "storage"]
    assert stored and not [request for request in stored if "authorization" in request.headers]
    files = hub.files("model", REPO)
    code = {name: files.pop(name) for name in list(files) if name.startswith("training_code/")}
    check_training_code(code, tmp_path / "downloaded code")
    top = {name for name in files if "/" not in name}
    assert top == {
        *"README.md all_results.json config.json generation_config.json model.safetensors run_info.json".split(),
        *"preprocessor_config.json processor_config.json scorecard.json tokenizer.json tokenizer_config.json".split(),
        *(".gitattributes", "curve.png"),
    }
    assert any(name.startswith("runs/") and "events" in name for name in files)
    last = {
        name.removeprefix("last-checkpoint/")
        for name in files
        if name.startswith("last-checkpoint/")
    }
    assert {
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "stream_state.json",
    } <= last
    everything = b"".join([*files.values(), *code.values()])
    assert SECRET.encode() not in everything and b"training_args" not in b"".join(
        n.encode() for n in files
    )
    for local_path in (tmp_path, tiny_model, speech):
        assert str(local_path).encode() not in everything
    local = (tmp_path / "predictions_eval.jsonl").read_text().splitlines()
    assert len(local) == 8 and not [
        name for name in files if "prediction" in name or "worst" in name
    ]
    transcripts = {json.loads(line)["reference"].encode() for line in local} | {
        json.loads(line)["prediction"].encode() for line in local
    }
    rest = b"".join(files.values())
    assert not [text for text in transcripts if len(text) > 12 and text in rest]
    assert (
        load(files["model.safetensors"]).keys() == load_file(tmp_path / "model.safetensors").keys()
    )
    assert "hub_pushed" in (tmp_path / "trainer_log.jsonl").read_text()
    card = ModelCard(files["README.md"].decode())
    kinds = {(r.metric_type, r.dataset_split) for r in card.data.eval_results}
    assert kinds == {("wer", "validation"), ("cer", "validation"), ("wer", "test"), ("cer", "test")}
    assert (
        "before training" in card.text
        and "| step | training loss |" in card.text
        and "--max_steps 6" in card.text
    )
    assert (
        "24 rows, repeats counted (0 of them rejected), with " in card.text
        and 'language="es"' in card.text
    )
    folder = tmp_path / "downloaded"
    for name in top:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(files[name])
    assert AutoModelForSpeechSeq2Seq.from_pretrained(folder) and AutoProcessor.from_pretrained(
        folder
    )


def make_list(folder: Path, elsewhere: Path, split: str, num_rows: int) -> None:
    """A list whose clips are named in every way: beside it, by an absolute path, by an address, or
    in another folder."""
    lines = ["path,text"]
    for i, (data, text) in enumerate(demonstration.make_rows(num_rows, seed=num_rows)):
        clip = (elsewhere if i % 4 == 3 else folder / "clips") / f"{split} {i}.flac"
        clip.parent.mkdir(parents=True, exist_ok=True)
        clip.write_bytes(data)
        relative = os.path.relpath(clip, folder)
        name = [relative, str(clip), f"file://{clip}", relative][i % 4]
        lines.append(f'"{name}",{text}')
    (folder / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_nothing_local_is_in_any_byte_that_is_uploaded(
    hub: HubWithClients, tmp_path: Path, tiny_model: Path
):
    """A model, data and folders of a customer's, named in ways that no pattern would find."""
    secret = "Acme"
    model = tmp_path / f"{secret} Corp, Inc" / "base model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModel": f"{secret}.Model"}
    (model / "config.json").write_text(json.dumps(config))
    data = tmp_path / "customers" / secret / "speech"
    for split, num_rows in (("train", 8), ("validation", 8)):
        make_list(data, tmp_path / f"other {secret}", split, num_rows)
    recipe = tmp_path / f"{secret}.yaml"
    recipe.write_text("save_total_limit: 2\nlogging_steps: 1\n")
    words = command(
        Path(f"{secret} Corp, Inc/base model"),
        f"../{tmp_path.name}/customers/{secret}/speech",
        f"runs, of {secret}/out dir",
        max_steps=4,
        config=recipe.name,
        hub_strategy="checkpoint",
        push_predictions=True,
        load_best_model_at_end=True,
        run_name=secret,
    )
    result = run(hub, tmp_path, words)
    assert result.returncode == 0, result.stderr[-3000:]
    assert SECRET not in result.stdout + result.stderr
    output_dir = tmp_path / f"runs, of {secret}" / "out dir"
    for path in output_dir.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert secret in (output_dir / "run_info.json").read_text()  # for whoever has the folder
    files = hub.files("model", REPO)
    host = socket.gethostname()
    for name, content in files.items():
        if name.startswith("training_code/"):
            continue
        assert secret not in name and host not in name
        for text in (secret, "customers", "runs, of", str(tmp_path), tmp_path.name, "auto_map"):
            assert text.encode() not in content, (name, text)
    assert any(name.startswith("runs/") and "tfevents" in name for name in files)
    card = ModelCard(files["README.md"].decode())
    assert "A local model fine-tuned on local data" in card.text and card.data.datasets is None
    assert "--dataset_name 'local data'" in card.text and "--max_steps 4" in card.text
    rows = [json.loads(line) for line in files["predictions_eval.jsonl"].decode().splitlines()]
    clips = {row["id"].split("/", 3)[3] for row in rows}
    assert clips == {f"clips/validation {i}.flac" for i in (0, 1, 2, 4, 5, 6)} | {
        "validation 3.flac",
        "validation 7.flac",
    }
    assert files["worst_eval.txt"].decode().count(", WER ") == 8
    assert b"clips/validation 0.flac" in files["report.html"]
    state = json.loads(files["last-checkpoint/trainer_state.json"])
    assert state["best_model_checkpoint"] in ("checkpoint-2", "checkpoint-4")


def check_training_code(files: dict[str, bytes], folder: Path) -> None:
    """The code on the Hub is all of it and no more, and runs where it is downloaded."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    names = {name.removeprefix("training_code/") for name in files}
    project = Path(script.__file__).parent
    modules = project.glob("speech_finetuning/**/*.py")
    expected = {path.relative_to(project).as_posix() for path in modules}
    assert expected | {"LICENSE", "requirements.txt", Path(script.__file__).name} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests/")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = folder / "training_code" / Path(script.__file__).name
    result = subprocess.run(
        [sys.executable, program, "--help_all"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "--max_network_wait_in_minutes" in result.stdout


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all_checkpoints", {"checkpoint-2", "checkpoint-4", "checkpoint-6"}),
        ("every_save", set()),
        ("end", set()),
    ],
)
def test_strategies_do_what_they_say(
    hub: HubWithClients,
    tmp_path: Path,
    tiny_model: Path,
    speech: Path,
    strategy: str,
    expected: set[str],
):
    words = command(
        tiny_model, speech, "out", hub_strategy=strategy, save_total_limit=1, push_predictions=True
    )
    result = run(hub, tmp_path, words)
    assert result.returncode == 0, result.stderr[-3000:]
    files = hub.files("model", REPO)
    assert {name.split("/")[0] for name in files if "optimizer.pt" in name} == expected
    assert "predictions_eval.jsonl" in files
    assert files["curve.png"].startswith(b"\x89PNG")
    for name in expected:
        assert (
            f"checkpoint-{json.loads(files[f'{name}/trainer_state.json'])['global_step']}" == name
        )
    titles = [commit.title for commit in hub.commits("model", REPO)]
    assert len(titles) == 2 if strategy == "end" else len(titles) > 2, (
        titles
    )  # the first one makes the repo
    assert_same_weights(hub, tmp_path / "out")


LARGE_FILES = ("/info/lfs/objects/batch", "/verify")
FAULTS = {
    "errors that hf gives up at": [
        *(("/commit/", {"status": status}) for status in (500, 403, 429)),
        ("validate-yaml", {"status": 503}),
    ],
    "errors that hf tries again": [
        *((path, {"status": 503}) for path in ("/preupload/", *LARGE_FILES)),
        ("/objects/", {"status": 500, "method": "PUT"}),
    ],
    "lost connections": [
        *(("/commit/", {"action": action}) for action in ("drop", "truncate")),
        *((path, {"action": "drop"}) for path in LARGE_FILES),
        ("/objects/", {"action": "drop", "method": "PUT"}),
    ],
}


@pytest.mark.parametrize("kind", FAULTS)
def test_passing_faults_cost_nothing(
    hub: HubWithClients, tmp_path: Path, tiny_model: Path, speech: Path, kind: str
):
    """Faults begin when the preflight is over."""
    words = command(tiny_model, speech, "out", max_network_wait_in_minutes=1)
    child = start(hub, tmp_path, words)
    wait_for(lambda: "may be written by" in (tmp_path / "log").read_text())
    for path_contains, fault in FAULTS[kind]:
        hub.add_fault(path_contains=path_contains, **fault)
    assert child.wait(240) == 0, (tmp_path / "log").read_text()[-3000:]
    assert not [fault for fault in hub.faults if fault.times]  # each of them came
    assert_same_weights(hub, tmp_path / "out")
    assert not (tmp_path / "out" / "_upload" / "next").exists()


def assert_same_weights(hub: HubWithClients, folder: Path) -> None:
    """The Hub has the model that lies in the folder."""
    local = load_file(folder / "model.safetensors")
    there = load(hub.files("model", REPO)["model.safetensors"])
    assert there.keys() == local.keys() and all(
        torch.equal(tensor, local[name]) for name, tensor in there.items()
    )


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_a_hub_that_never_answers_delays_neither_training_nor_the_end(
    hub: HubWithClients, tmp_path: Path, tiny_model: Path, speech: Path
):
    hub.add_fault(path_contains="/commit/", times=None, action="hang", seconds=600)
    began = time.monotonic()
    result = run(
        hub, tmp_path, command(tiny_model, speech, "out", max_network_wait_in_minutes=0.05)
    )
    assert result.returncode == 76 and time.monotonic() - began < 60
    assert (
        "trained and saved, but not uploaded" in result.stderr
        and "hub: an upload failed" in result.stderr
    )
    assert "Traceback" not in result.stderr
    hub.remove_faults()
    finish = result.stderr.split("Finish with: ")[1].split("\n")[0].split()
    assert finish[:2] == ["hf", "upload"]
    finished = subprocess.run(
        [sys.executable, "-m", "huggingface_hub.cli.hf", *finish[1:]],
        env=hub.environment(tmp_path / "home", token=SECRET),
        cwd=tmp_path,
        timeout=120,
    )
    assert finished.returncode == 0
    local = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        torch.equal(tensor, local[name])
        for name, tensor in load(hub.files("model", REPO)["model.safetensors"]).items()
    )


@pytest.mark.parametrize(
    "fault",
    [
        {"path_contains": "/commit/", "status": 401},
        {"path_contains": "/info/lfs/objects/batch", "status": 503},
        {"path_contains": "/objects/", "method": "PUT", "action": "drop"},
    ],
)
def test_a_push_that_never_works_is_known_at_the_end(
    hub: HubWithClients, tmp_path: Path, tiny_model: Path, speech: Path, fault: dict
):
    hub.add_fault(times=None, **fault)
    words = command(
        tiny_model, speech, "out", max_steps=1, hub_strategy="end", max_network_wait_in_minutes=0.02
    )
    result = run(hub, tmp_path, words)
    assert result.returncode == 76 and "Finish with: hf upload" in result.stderr, result.stderr[
        -2000:
    ]
    assert (tmp_path / "out" / "model.safetensors").is_file() and "Traceback" not in result.stderr


def test_a_hub_that_is_gone_is_waited_for_and_then_exit_75(
    hub_clients: HubClients, tmp_path: Path, tiny_model: Path, speech: Path
):
    with hub_clients.new_hub() as hub:
        pass  # its port is closed
    result = run(
        hub, tmp_path, command(tiny_model, speech, "out", max_network_wait_in_minutes=0.02)
    )
    assert (
        result.returncode == 75 and "asking the Hub: no network for 0.02 minutes" in result.stderr
    )


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_that_vanishes_is_not_made_anew(
    hub: HubWithClients, tmp_path: Path, tiny_model: Path, speech: Path, private: bool
):
    """Although a lost network would be waited for: half an hour."""
    words = command(
        tiny_model, speech, "out", hub_private_repo=private, max_network_wait_in_minutes=30
    )
    log = tmp_path / "log"
    began = time.monotonic()
    child = start(hub, tmp_path, words)
    wait_for(lambda: "may be written by" in log.read_text())
    assert hub.repos["model", REPO].private == private
    hub.remove_repo("model", REPO)
    assert child.wait(240) == 76
    last = log.read_text().splitlines()[-1]
    assert f"not uploaded ({REPO} is gone, or this token" in last and last.endswith(" --private")
    assert not hub.repos and time.monotonic() - began < 200
    status = json.loads((tmp_path / "out" / "exit_status.json").read_text())
    assert status["code"] == 76 and f"{REPO} is gone" in status["reason"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_hung_upload_ends_the_run_at_once(
    hub: HubWithClients, tmp_path: Path, tiny_model: Path, speech: Path, number: int
):
    words = command(tiny_model, speech, "out", max_steps=100_000, eval_steps=100_000)
    hub.add_fault(path_contains="/commit/", action="hang", seconds=600, times=None)
    child = start(hub, tmp_path, words, forks_children=False)  # `uploaders` reads command lines
    wait_for(lambda: any("/commit/" in request.path for request in hub.requests))
    assert uploaders(tmp_path)
    began = time.monotonic()
    child.send_signal(number)
    assert child.wait(60) == 128 + number and time.monotonic() - began < 20
    assert "saved: out/checkpoint-" in (tmp_path / "log").read_text()
    wait_for(lambda: not uploaders(tmp_path))


def uploaders(folder: Path) -> list[str]:
    """Command lines of upload processes that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        is_uploader = "speech_finetuning.sharing.upload_process" in words
        if is_uploader and os.path.realpath(path.parent / "cwd") == str(folder.resolve()):
            found.append(" ".join(words))
    return found


def test_transcripts_of_private_data_in_a_public_repo_are_warned_about(
    hub: HubWithClients, tmp_path: Path, tiny_model: Path, speech: Path
):
    hub.add_repo("dataset", "alice/private", speech, private=True)
    words = command(
        tiny_model, "alice/private", "out", max_steps=1, push_predictions=True, hub_strategy="end"
    )
    result = run(hub, tmp_path, words)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"transcripts of ['alice/private'], not public, go to {REPO}, public" in result.stderr


@pytest.mark.parametrize(
    ("token", "flags", "message"),
    [
        (None, {}, "--push_to_hub needs a token. Run `hf auth login`, set HF_TOKEN, or append"),
        ("hf_reader_token", {}, "The token needs write access"),
        ("hf_unknown_token", {}, "The token needs write access"),
        (SECRET, {"hub_model_id": "not a name/x/y"}, "--push_to_hub to not a name/x/y"),
    ],
)
def test_the_preflight_finds_out_before_any_work(
    hub: HubWithClients, tmp_path: Path, tiny_model: Path, speech: Path, token, flags, message
):
    hub.add_repo("model", REPO, {"README.md": b"mine"})
    result = run(hub, tmp_path, command(tiny_model, speech, "out", **flags), token)
    check_refusal(result, message)


def test_a_push_without_a_network_is_refused_by_its_variable(
    hub: HubWithClients, tmp_path: Path, tiny_model: Path, speech: Path
):
    """A process of its own: the variable is read when huggingface_hub is imported."""
    words = [sys.executable, script.__file__, *command(tiny_model, speech, "out")]
    result = subprocess.run(
        words,
        capture_output=True,
        text=True,
        env=hub.environment(tmp_path / "home", token=SECRET) | {"HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        timeout=120,
    )
    check_refusal(result, "--push_to_hub with HF_HUB_OFFLINE=1")


def check_refusal(result: subprocess.CompletedProcess, message: str) -> None:
    """One line, before any work."""
    assert result.returncode == 2, result.stderr[-2000:]
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line and "Traceback" not in result.stderr
    assert "parameters" not in result.stderr  # no model was loaded


def test_a_preflight_that_had_to_wait_still_pushes(
    hub: HubWithClients, tmp_path: Path, tiny_model: Path, speech: Path
):
    for fault in ({"status": 503}, {"status": 429}, {"action": "drop"}):
        hub.add_fault(path_contains="/api/repos/create", **fault)
    hub.add_fault(path_contains="/api/whoami", status=503)
    words = command(
        tiny_model, speech, "out", max_steps=1, hub_strategy="end", max_network_wait_in_minutes=1
    )
    result = run(hub, tmp_path, words)
    assert result.returncode == 0 and "asking the Hub" in result.stderr, result.stderr[-2000:]
    assert_same_weights(hub, tmp_path / "out")


def test_another_machine_goes_on_from_the_hub(
    hub: HubWithClients, tmp_path: Path, tiny_model: Path, speech: Path
):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    words = command(
        tiny_model, speech, "out", hub_strategy="checkpoint", lr_scheduler_type="constant"
    )
    whole = run(
        hub,
        tmp_path,
        [*words, "--output_dir", "whole", "--max_steps", "10", "--hub_model_id", "alice/other"],
    )
    assert whole.returncode == 0, whole.stderr[-2000:]
    words += ["--resume_from_checkpoint", "hub"]
    for folder in ("first", "second"):  # an absolute path, another one on each machine
        rows = tmp_path / f"{folder} left out.txt"
        rows.write_text("train/0/0/none\n")
    first = run(
        hub, tmp_path / "first", [*words, "--exclude_rows", f"{tmp_path}/first left out.txt"]
    )
    assert first.returncode == 0 and "has no checkpoint yet: the run begins" in first.stderr
    state = hub.files("model", REPO)["last-checkpoint/stream_state.json"]
    assert b"left out" not in state and b'"--exclude_rows": "a list of 1 (' in state
    words += ["--exclude_rows", f"{tmp_path}/second left out.txt"]
    finished = run(hub, tmp_path / "second", words)
    assert finished.returncode == 0 and "nothing is left to train" in finished.stderr, finished
    again = run(hub, tmp_path / "second", [*words, "--max_steps", "10"])
    assert again.returncode == 0, again.stderr[-3000:]
    assert "continues from out/checkpoint-6" in again.stderr
    one, other = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "second/out")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_are_pushed_merged_and_kept_apart_in_the_checkpoint(
    hub: HubWithClients, tmp_path: Path, tiny_model: Path, speech: Path
):
    """The first save is what a Hub that fails afterwards would be left with."""
    words = command(tiny_model, speech, "out", hub_strategy="checkpoint", lora_rank=2, max_steps=2)
    result = run(hub, tmp_path, words)
    assert result.returncode == 0, result.stderr[-2000:]
    files, plain = hub.files("model", REPO), load_file(tiny_model / "model.safetensors")
    assert load(files["model.safetensors"]).keys() == plain.keys()
    assert any("lora_A" in name for name in load(files["last-checkpoint/model.safetensors"]))
    assert_same_weights(hub, tmp_path / "out")
    for commit in hub.commits("model", REPO):
        if "model.safetensors" in commit.files:
            assert load(commit.files["model.safetensors"].data).keys() == plain.keys()
