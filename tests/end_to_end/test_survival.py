"""A run that cannot be lost: signals, kills, a lost network, a full disk, broken losses, changed
flags.

Real processes get real signals; the Hub is a real HTTP server with injected faults."""

import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kill_training
import pytest
import torch
from fork_server import ForkedProcess, ForkServer
from hub import Hub
from huggingface_hub.errors import HfHubHTTPError
from log_lines import count_steps, wait_for_steps
from safetensors.torch import load_file

import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base import network
from speech_finetuning.base.errors import RunEnded, UserError
from speech_finetuning.base.network import is_network_error, retry_on_network_error
from speech_finetuning.cli import demonstration
from speech_finetuning.cli.exit_status import exit_code_of
from speech_finetuning.sharing.uploads import HubUploads
from speech_finetuning.training.checkpoints import find_checkpoint, is_complete
from speech_finetuning.training.loss import TokenWeightedLoss
from speech_finetuning.training.progress import StreamProgress
from speech_finetuning.training.trainer import SpeechTrainer


def losses(folder: Path) -> list[float]:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def rates(folder: Path) -> list[float]:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [entry["learning_rate"] for entry in history if "learning_rate" in entry]


def status(folder: Path) -> dict:
    return json.loads((folder / "exit_status.json").read_text())


def same_weights(first: Path, second: Path) -> bool:
    one, other = (load_file(path / "model.safetensors") for path in (first, second))
    return all(torch.equal(one[name], other[name]) for name in one)


def output(flags: list[str]) -> Path:
    return Path(flags[flags.index("--output_dir") + 1])


@pytest.fixture(scope="session")
def dropout_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demonstration.make_model(
        tmp_path_factory.mktemp("dropout"), d_model=16, num_layers=1, dropout=0.2
    )


# -------------------------------------------------------------------------------- in this process


def test_a_larger_max_steps_continues_with_the_right_schedule(
    train: Callable, flags: list[str], tmp_path: Path
):
    train(f"--do_train --max_steps 12 --output_dir {tmp_path / 'whole'}")
    train("--do_train --max_steps 6")
    train("--do_train --max_steps 12")
    whole, parts = rates(tmp_path / "whole"), rates(output(flags))
    assert len(parts) == 12 and parts[6:] == pytest.approx(whole[6:])
    card = (output(flags) / "README.md").read_text()
    assert "* from step 0 on: --warmup_steps 1, --max_steps 6\n" in card
    assert "* from step 6 on: --warmup_steps 2, --max_steps 12\n" in card
    assert card.count("--do_train --max_steps") == 2


def test_changed_flags_count_on_resume(
    train: Callable, flags: list[str], caplog: pytest.LogCaptureFixture
):
    train(
        "--do_train --max_steps 10 --save_steps 5 --learning_rate 1e-3 --lr_scheduler_type constant"
    )
    (output(flags) / "checkpoint-10").rename(output(flags).parent / "later")
    train(
        "--do_train --do_eval --max_steps 10 --save_steps 2 --eval_steps 3 --learning_rate 5e-4 "
        "--lr_scheduler_type constant --per_device_train_batch_size 2"
    )
    assert rates(output(flags)) == pytest.approx([1e-3] * 5 + [5e-4] * 5)
    assert "learning rate: 0.0005 now, 0.001 in the checkpoint" in caplog.text
    assert {path.name for path in output(flags).glob("checkpoint-*")} == {
        f"checkpoint-{n}" for n in (5, 6, 8, 10)
    }
    state = json.loads((output(flags) / "checkpoint-10" / "stream_state.json").read_text())
    assert state["position"]["row"] == state["counts"]["num_rows"] == 5 * 4 + 5 * 2


def test_evaluation_does_not_change_training(train: Callable, dropout_model: Path, tmp_path: Path):
    common = f"--do_train --max_steps 8 --model_name_or_path {dropout_model}"
    train(f"{common} --output_dir {tmp_path / 'a'}")
    train(f"{common} --do_eval --eval_steps 2 --eval_before_training --output_dir {tmp_path / 'b'}")
    assert same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "optimizer.pt").unlink(),
        lambda folder: (folder / "stream_state.json").unlink(),
        lambda folder: (folder / "rng_state.pth").unlink(),
        lambda folder: (folder / "trainer_state.json").write_text('{"global_step": 8, "log_his'),
        lambda folder: os.truncate(folder / "model.safetensors", 50_000),
        lambda folder: os.truncate(folder / "optimizer.pt", 20_000),
    ],
)
def test_damaged_checkpoints_are_named_and_stepped_over(
    train: Callable, flags: list[str], damage: Callable, caplog: pytest.LogCaptureFixture
):
    train("--do_train --max_steps 8 --save_steps 4")
    expected = load_file(output(flags) / "model.safetensors")
    damage(output(flags) / "checkpoint-8")
    train("--do_train --max_steps 8 --save_steps 4")
    assert "checkpoint-8 is incomplete or damaged; trying the one before" in caplog.text
    found = load_file(output(flags) / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert is_complete(output(flags) / "checkpoint-8")


def test_the_best_checkpoint_has_its_real_name(train: Callable, flags: list[str]):
    train(
        "--do_train --do_eval --max_steps 6 --save_steps 2 --eval_steps 2 "
        "--load_best_model_at_end --save_total_limit 1"
    )
    state = json.loads((output(flags) / "checkpoint-6" / "trainer_state.json").read_text())
    assert (
        Path(state["best_model_checkpoint"]).is_dir()
        and "_unfinished" not in state["best_model_checkpoint"]
    )
    assert not (output(flags) / "_unfinished").exists()


def test_rejections_are_listed_once_after_a_resume(
    train: Callable, flags: list[str], tmp_path: Path
):
    rows = [
        (b"junk", "uno") if i % 4 == 0 else row
        for i, row in enumerate(demonstration.make_rows(24, seed=3))
    ]
    demonstration.write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows)
    common = f"--do_train --num_train_epochs 1 --save_steps 2 --dataset_name {tmp_path / 'data'}"
    train(common)
    listing = output(flags) / "rejected.jsonl"
    once = listing.read_text()
    for name in ("checkpoint-4", "checkpoint-6"):
        (output(flags) / name).rename(tmp_path / name)
    train(common)
    assert listing.read_text() == once
    splits = [json.loads(line)["split"] for line in once.splitlines()]
    assert splits == ["data report"] * 6 + ["train"] * 6


class BrokenLoss(TokenWeightedLoss):
    """NaN in the calls that `broken` names."""

    broken: range = range(0)
    calls = 0

    def __call__(self, *args: object, **kwargs: object) -> torch.Tensor:
        BrokenLoss.calls += 1
        loss = super().__call__(*args, **kwargs)
        return loss * float("nan") if BrokenLoss.calls - 1 in self.broken else loss


def test_a_step_without_a_finite_loss_is_skipped_and_counted(
    train: Callable, flags: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(script, "TokenWeightedLoss", BrokenLoss)
    monkeypatch.setattr(
        BrokenLoss, "broken", range(5, 6)
    )  # the second micro-batch of the third step
    monkeypatch.setattr(BrokenLoss, "calls", 0)
    train("--do_train --max_steps 5 --gradient_accumulation_steps 2 --save_steps 1")
    logged = losses(output(flags))
    assert [loss == loss for loss in logged] == [
        True,
        True,
        False,
        True,
        True,
    ]  # the log hides nothing
    before, after, later = (output(flags) / f"checkpoint-{n}" for n in (2, 3, 4))
    assert same_weights(before, after) and not same_weights(after, later)
    assert json.loads((later / "stream_state.json").read_text())["counts"]["num_skipped_steps"] == 1


def test_ten_broken_steps_in_a_row_end_the_run(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(script, "TokenWeightedLoss", BrokenLoss)
    monkeypatch.setattr(BrokenLoss, "broken", range(3, 100))
    monkeypatch.setattr(BrokenLoss, "calls", 0)
    assert exit_code_of(script.main, [*flags, "--do_train", "--max_steps", "50"]) == 70
    assert "10 steps in a row" in capsys.readouterr().err and status(output(flags))["code"] == 70
    assert len(json.loads((output(flags) / "diverged_rows.json").read_text())) == 40


def test_a_run_all_of_whose_steps_were_skipped_is_not_done(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(script, "TokenWeightedLoss", BrokenLoss)
    monkeypatch.setattr(BrokenLoss, "broken", range(0, 100))
    monkeypatch.setattr(BrokenLoss, "calls", 0)
    words = [*flags, "--do_train", "--max_steps", "3"]
    for _ in range(2):  # nor when it is started again
        assert exit_code_of(script.main, words) == 70
        assert "in any of the 3 steps: nothing has been trained" in capsys.readouterr().err


def test_a_checkpoint_of_an_fp16_run_goes_on_without_fp16(train: Callable, flags: list[str]):
    train("--do_train --max_steps 2")
    torch.save({"scale": 65536.0}, output(flags) / "checkpoint-2" / "scaler.pt")
    assert train("--do_train --max_steps 4")["train_rows"] == 16


@pytest.mark.slow
def test_a_signal_in_the_middle_of_a_write_to_stderr(tmp_path: Path, forks: ForkServer):
    """The handler must not write through the buffer that it has interrupted: that raises "reentrant
    call"."""
    code = """if True:
        import io, logging, os, signal, sys
        from speech_finetuning.base.shutdown import StopSignals
        import run_speech_recognition_seq2seq_streaming as script
        script.logger.addHandler(logging.StreamHandler())
        class Terminal(io.RawIOBase):
            def writable(self): return True
            def write(self, data):
                signal.raise_signal(signal.SIGTERM)
                return len(data)
        with StopSignals() as stop:
            stop.is_deferred = True
            terminal = io.TextIOWrapper(io.BufferedWriter(Terminal()))
            sys.stderr = script.logger.handlers[0].stream = terminal
            print("a line of a progress bar", file=sys.stderr, flush=True)
            sys.exit(stop.received)"""
    program = tmp_path / "program.py"
    program.write_text(code)
    process = forks.start([], log=tmp_path / "log", program=program)
    assert process.wait(60) == signal.SIGTERM
    assert "SIGTERM received: saving and stopping." in (tmp_path / "log").read_text()


def test_an_output_dir_that_vanishes_costs_only_what_was_in_it(
    train: Callable, flags: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    rows = [
        (b"junk", "uno") if i % 4 == 0 else row
        for i, row in enumerate(demonstration.make_rows(24, seed=3))
    ]
    demonstration.write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows)
    demonstration.write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", rows[1:4])
    update = StreamProgress.update

    def vanish(self: StreamProgress, **step: object) -> None:
        if self.num_rows == 12:
            shutil.rmtree(self.output_dir)
        update(self, **step)

    monkeypatch.setattr(StreamProgress, "update", vanish)
    train(
        f"--do_train --do_eval --max_steps 6 --save_steps 2 --eval_steps 2 --dataset_name {tmp_path / 'data'}"
    )
    assert {path.name for path in output(flags).glob("checkpoint-*")} == {
        "checkpoint-4",
        "checkpoint-6",
    }
    assert (
        is_complete(output(flags) / "checkpoint-6")
        and (output(flags) / "model.safetensors").is_file()
    )


def test_a_finished_run_keeps_the_best_model_its_figures_and_its_curve(
    train: Callable, flags: list[str]
):
    more = (
        "--do_train --do_eval --max_steps 6 --save_steps 2 --eval_steps 2 --load_best_model_at_end "
        "--learning_rate 1e-3"
    )
    metrics = train(more)
    best = load_file(output(flags) / "model.safetensors")
    card = output(flags) / "README.md"
    curve = curve_of(card)
    assert [row[0] for row in curve] == ["2", "4", "6"]
    again = train(more)
    assert curve_of(card) == curve
    before = card.read_bytes(), (output(flags) / "run_info.json").read_bytes()
    with pytest.raises(UserError, match="--learning_rate was 0.001, is now 0.0005"):
        train(f"{more} --learning_rate 5e-4")
    with pytest.raises(UserError, match="but without --do_train"):
        train("--do_eval")
    assert before == (card.read_bytes(), (output(flags) / "run_info.json").read_bytes())
    assert all(
        torch.equal(best[name], tensor)
        for name, tensor in load_file(output(flags) / "model.safetensors").items()
    )
    assert (
        again["eval_wer"] == metrics["eval_wer"]
        and again["train_rows"] == metrics["train_rows"] == 24
    )


def curve_of(card: Path) -> list[list[str]]:
    """The table of steps on a model card, without its header."""
    _, _, table = card.read_text(encoding="utf-8").partition("| step |")
    lines = table.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_run_that_stopped_early_is_finished(train: Callable, flags: list[str]):
    more = "--do_train --do_eval --max_steps 9 --save_steps 1 --eval_steps 1 --metric_for_best_model loss"
    more += " --greater_is_better True --early_stopping_patience"
    metrics = train(f"{more} 2")
    assert metrics["train_rows"] == 12 and train(f"{more} 2")["train_rows"] == 12
    assert train(f"{more} 4")["train_rows"] == 20


def test_the_scores_are_those_of_the_saved_model(train: Callable, flags: list[str]):
    """Even if the best step lies between two checkpoints, here at 1."""
    more = (
        "--do_train --do_eval --max_steps 6 --save_steps 3 --eval_steps 1 --load_best_model_at_end"
    )
    metrics = train(f"{more} --metric_for_best_model loss --greater_is_better True")
    scored = train(
        f"--do_eval --model_name_or_path {output(flags)} --output_dir {output(flags).parent / 'scored'}"
    )
    assert metrics["eval_loss"] == pytest.approx(scored["eval_loss"], abs=1e-5)


def test_out_of_gpu_memory_names_the_next_flags(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def no_memory(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("speech_finetuning.training.trainer.pad_features", no_memory)
    assert exit_code_of(script.main, [*flags, "--do_train", "--max_steps", "2"]) == 74
    told = "error: out of GPU memory. Append to the same command: --per_device_train_batch_size 2 "
    told += (
        "--gradient_accumulation_steps 2 --gradient_checkpointing (the same batch in all) (CUDA "
    )
    assert f"{told}out of memory. Tried to allocate 2.00 GiB.)\n" in capsys.readouterr().err


@pytest.mark.slow
def test_the_time_limit_saves_and_exits_with_75(
    flags: list[str],
    dropout_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    """An hour passes during the fifth step."""
    step, now = SpeechTrainer.training_step, time.monotonic

    def slow_step(trainer: SpeechTrainer, *args: object) -> torch.Tensor:
        if trainer.state.global_step == 4:
            monkeypatch.setattr(time, "monotonic", lambda: now() + 3600)
        return step(trainer, *args)

    monkeypatch.setattr(SpeechTrainer, "training_step", slow_step)
    common = [
        *flags,
        "--do_train",
        "--do_eval",
        "--max_steps",
        "40",
        "--model_name_or_path",
        str(dropout_model),
    ]
    assert exit_code_of(script.main, [*common, "--max_train_time_in_hours", "1"]) == 75
    monkeypatch.undo()
    assert [path.name for path in output(flags).glob("checkpoint-*")] == ["checkpoint-5"]
    assert not (output(flags) / "all_results.json").exists()
    told = capsys.readouterr().err.splitlines()
    assert (
        "stopped: the time of --max_train_time_in_hours is over. To go on, start the same command again."
        in told
    )
    assert exit_code_of(script.main, common) == 0
    assert exit_code_of(script.main, [*common, "--output_dir", str(tmp_path / "whole")]) == 0
    assert same_weights(output(flags), tmp_path / "whole")


def test_what_counts_as_the_network():
    class Answer:
        def __init__(self, code: int) -> None:
            self.status_code, self.headers, self.request = code, {}, None

    def hub_error(code: int) -> Exception:
        error = HfHubHTTPError.__new__(HfHubHTTPError)
        OSError.__init__(error, f"status {code}")
        error.response = Answer(code)
        return error

    wrapped = FileNotFoundError("Couldn't find any data file")
    wrapped.__cause__ = hub_error(503)
    waits = [
        hub_error(500),
        hub_error(429),
        hub_error(504),
        ConnectionResetError(),
        TimeoutError(),
        wrapped,
    ]
    ends = [
        hub_error(401),
        hub_error(403),
        hub_error(404),
        ValueError(),
        FileNotFoundError(),
        OSError(28, "disk full"),
    ]
    before = network.HF_HUB_OFFLINE
    network.HF_HUB_OFFLINE = False
    try:
        assert [is_network_error(error) for error in waits + ends] == [True] * 6 + [False] * 6
    finally:
        network.HF_HUB_OFFLINE = before


def test_back_off_is_real_and_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("speech_finetuning.base.network.HF_HUB_OFFLINE", False)
    tries = []

    def fail() -> None:
        tries.append(time.monotonic())
        raise ConnectionError("gone")

    with pytest.raises(RunEnded, match="no network for 0.06") as ending:
        retry_on_network_error(fail, limit_in_seconds=4, task="reading")
    assert ending.value.code == 75
    pauses = [b - a for a, b in zip(tries, tries[1:], strict=False)]
    assert pauses == pytest.approx([1, 2, 1], abs=0.3)


# -------------------------------------------------------------------------------- other processes


def wait_for(log: Path, text: str, count: int = 1, seconds: float = 120) -> None:
    """Until the log holds the text so many times."""
    deadline = time.monotonic() + seconds
    while log.read_text(errors="replace").count(text) < count:
        assert time.monotonic() < deadline, (
            f"no {text!r} in {log.read_text(errors='replace')[-2000:]}"
        )
        time.sleep(0.02)


@pytest.mark.slow
def test_every_signal_saves_and_the_run_ends_with_the_same_weights(
    flags: list[str], dropout_model: Path, train: Callable, tmp_path: Path, forks: ForkServer
):
    common = "--do_train --do_eval --max_steps 200 --eval_steps 50 --save_steps 99"
    common += f" --model_name_or_path {dropout_model}"
    train(f"{common} --output_dir {tmp_path / 'whole'}")
    words = [*flags, *common.split(), "--dataloader_num_workers", "1", "--disable_tqdm", "True"]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        log = tmp_path / f"{number}.log"
        process = forks.start(words, log=log)
        wait_for_steps(log, 10)
        os.killpg(process.pid, number)  # the whole group, as a terminal or Slurm does
        assert process.wait(60) == 128 + number, log.read_text()[-2000:]
        text = log.read_text()
        assert (
            f"{number.name} received: saving and stopping" in text
            and "To go on, start the same command" in text
        )
        assert "Traceback" not in text and "after training" not in text
        assert status(output(flags))["code"] == 128 + number
        assert find_checkpoint(output(flags), "auto") is not None
    assert exit_code_of(script.main, words) == 0
    assert same_weights(output(flags), tmp_path / "whole")
    assert losses(output(flags)) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_during_evaluation(flags: list[str], tmp_path: Path):
    """A real terminal, which sends SIGINT to the whole foreground group; the evaluation would take
    minutes."""
    folder = demonstration.make_speech(tmp_path / "data", {"train": 8, "validation": 400})
    words = [
        *flags,
        "--do_train",
        "--do_eval",
        "--max_steps",
        "20",
        "--eval_steps",
        "3",
        "--dataset_name",
        str(folder),
    ]
    words += [
        "--generation_max_length",
        "60",
        "--per_device_eval_batch_size",
        "1",
        "--dataloader_num_workers",
        "1",
    ]
    process, terminal = pty.fork()
    if process == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execv(sys.executable, [sys.executable, script.__file__, *words])
    fcntl.ioctl(
        terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0)
    )  # else the progress bar hides
    text = read_terminal(terminal, "/400 batches")
    os.write(terminal, b"\x03")
    text += read_terminal(terminal, None)
    _, ended = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(ended) == 130, text[-2000:]
    assert "SIGINT received" in text and "Traceback" not in text
    assert [path.name for path in output(flags).glob("checkpoint-*")] == ["checkpoint-3"]
    assert is_complete(output(flags) / "checkpoint-3")


def read_terminal(terminal: int, until: str | None) -> str:
    """What the terminal shows until a text comes after the training has begun, or until the program
    ends."""
    text = ""
    while until is None or until not in text.partition("clips/s")[2]:
        try:
            text += os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # the other side has closed
            break
    return text


@pytest.mark.slow
def test_three_kills_change_nothing(tmp_path: Path, forks: ForkServer):
    """SIGKILL at random instants; tests/support/kill_training.py takes any number."""
    log = tmp_path / "log"
    program = Path(kill_training.__file__)
    output = tmp_path / "counts"
    process = forks.start([tmp_path, "--kills", "3"], log=log, output=output, program=program)
    assert process.wait(400) == 0, log.read_text()[-3000:]
    assert json.loads(output.read_text().splitlines()[-1])["kills"] == 3


@pytest.mark.slow
def test_a_full_disk_keeps_the_older_checkpoint_and_ends_with_73(
    flags: list[str], tmp_path: Path, forks: ForkServer
):
    """A limit on the size of files stands in for the full disk: weights fit, the optimiser's state
    does not."""
    words = [*flags, "--do_train", "--save_steps", "2", "--disable_tqdm", "True", "--max_steps"]
    assert exit_code_of(script.main, [*words, "2"]) == 0
    size = (output(flags) / "tokenizer.json").stat().st_size
    assert size < (output(flags) / "checkpoint-2" / "optimizer.pt").stat().st_size
    log = tmp_path / "log"
    process = forks.start([*words, "6"], log=log, max_file_size_in_bytes=size + 10_000)
    assert process.wait(120) == 73, log.read_text()[-2000:]
    text = log.read_text()
    assert "checkpoint-4 could not be saved" in text and "checkpoint-6 could not be saved" in text
    assert "Traceback" not in text and status(output(flags))["code"] == 73
    assert find_checkpoint(output(flags), "auto").name == "checkpoint-2"
    assert exit_code_of(script.main, [*words, "6"]) == 0  # with space again


@pytest.fixture(scope="module")
def hub(speech: Path, tiny_model: Path):
    files = {path.name: path.read_bytes() for path in speech.glob("*.parquet")}
    with Hub() as server:
        server.add_repo("dataset", "alice/speech", files)
        server.add_repo("dataset", "alice/again", files)  # nothing of it is in the cache yet
        server.add_repo("model", "alice/tiny", tiny_model)
        yield server
        server.remove_faults()


@pytest.fixture(scope="module")
def hub_forks(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Clients of the hub. The libraries' back-off and ours take a tenth of a second each."""
    environment = hub.environment(tmp_path_factory.mktemp("home"), HF_HUB_DOWNLOAD_TIMEOUT="2")
    with ForkServer(environment, sleeps_at_most=0.1) as server:
        yield server


def on_hub(
    forks: ForkServer, flags: list[str], folder: Path, more: str, dataset_name: str = "alice/speech"
) -> tuple[ForkedProcess, Path]:
    """The script with its data on the Hub. Returns the process and its log."""
    words = [*flags, "--do_train", "--dataset_name", dataset_name, "--disable_tqdm", "True"]
    words += [
        "--shuffle_buffer_size",
        "10",
        "--dataloader_num_workers",
        "1",
        "--output_dir",
        str(folder / "out"),
    ]
    folder.mkdir()
    log = folder / "log"
    return forks.start([*words, *more.split()], log=log, cwd=folder), log


FAULTS = [
    {"status": 503, "times": 8},
    {"status": 429, "times": 3, "headers": {"Retry-After": "1"}},
    {"status": 500, "times": 7},
    {"action": "drop", "times": 7},
    {"action": "truncate", "times": 3},
    {"status": 504, "times": 3},
    {"action": "hang", "seconds": 5, "times": 1},
    {"action": "page", "times": 3},
    {"action": "short", "times": 3},
]
LOADING_FAULTS = {
    "/datasets/alice/again/resolve/main/README.md": {"action": "drop", "times": 1},
    "/api/datasets/alice/again": {"status": 503, "times": 2},
    "?name=model.safetensors": {"method": "GET", "status": 503, "times": 2},
}


@pytest.mark.slow
def test_network_faults_lose_and_double_nothing(
    hub: Hub, hub_forks: ForkServer, flags: list[str], train: Callable, tmp_path: Path
):
    """One kind after the other, each when a file is opened or read: its footer first, in five
    passes."""
    steps = "--max_steps 50 --data_report_samples 0"
    whole = tmp_path / "whole"
    train(f"--do_train {steps} --shuffle_buffer_size 10 --output_dir {whole}")  # from the disk
    hub.remove_faults()
    for number, fault in enumerate(FAULTS, start=1):
        hub.add_fault(method="GET", path_contains="?name=train-00001", after=number, **fault)
    first = len(hub.requests)
    process, log = on_hub(hub_forks, flags, tmp_path / "disturbed", steps)
    assert process.wait(100) == 0, log.read_text()[-3000:]
    met = [request for request in hub.requests[first:] if request.fault]
    assert len(met) == sum(fault["times"] for fault in FAULTS)
    assert losses(tmp_path / "disturbed" / "out") == losses(whole)
    assert same_weights(tmp_path / "disturbed" / "out", whole)
    hub.remove_faults()


@pytest.mark.slow
def test_a_run_goes_on_with_the_data_that_it_began_with(
    hub: Hub, hub_forks: ForkServer, flags: list[str], train: Callable, tmp_path: Path
):
    """Between two starts the branch moves on to other data."""
    hub.remove_faults()
    common = "--do_train --lr_scheduler_type constant --warmup_steps 0 --shuffle_buffer_size 10"
    train(f"{common} --max_steps 12 --output_dir {tmp_path / 'whole'}")  # the same rows, from disk
    hub.add_repo("dataset", "alice/moves", hub.files("dataset", "alice/speech"))
    log = tmp_path / "log"
    words = [*flags, *common.split(), "--dataset_name", "alice/moves", "--max_steps"]
    process = hub_forks.start([*words, "4"], log=log)
    assert process.wait(100) == 0, log.read_text()[-3000:]
    other = tmp_path / "other" / "train-00000-of-00001.parquet"
    demonstration.write_parquet(other, demonstration.make_rows(40, seed=8))
    hub.add_commit("dataset", "alice/moves", other.parent, replace=True)
    process = hub_forks.start([*words, "12"], log=log)
    assert process.wait(100) == 0, log.read_text()[-3000:]
    assert "alice/moves has changed on the Hub since this run began" in log.read_text()
    assert losses(output(flags)) == losses(tmp_path / "whole")
    assert same_weights(output(flags), tmp_path / "whole")


@pytest.mark.slow
def test_loading_is_tried_again(hub: Hub, hub_forks: ForkServer, flags: list[str], tmp_path: Path):
    hub.remove_faults()
    first = len(hub.requests)
    for path, fault in LOADING_FAULTS.items():
        hub.add_fault(path_contains=path, **fault)
    process, log = on_hub(
        hub_forks,
        flags,
        tmp_path / "load",
        "--max_steps 2 --model_name_or_path alice/tiny",
        "alice/again",
    )
    assert process.wait(200) == 0, log.read_text()[-3000:]
    met = [request for request in hub.requests[first:] if request.fault]
    assert len(met) == sum(fault["times"] for fault in LOADING_FAULTS.values())
    text = log.read_text()
    assert "opening the data" in text and "loading alice/tiny" in text and "Trying again in" in text


@pytest.mark.slow
def test_a_network_that_stays_away_saves_and_exits_with_75_and_a_signal_is_heard_while_waiting(
    hub: Hub, hub_forks: ForkServer, flags: list[str], tmp_path: Path
):
    hub.remove_faults()
    hub.add_fault(method="GET", path_contains="train-0000", status=503, times=None)
    process, log = on_hub(
        hub_forks, flags, tmp_path / "never", "--max_steps 20 --max_network_wait_in_minutes 0.01"
    )
    assert process.wait(200) == 75, log.read_text()[-3000:]
    assert "no network for 0.01 minutes" in log.read_text() and "Traceback" not in log.read_text()
    hub.remove_faults()
    # All is well until the first pass has opened its files; the second one meets a server that is
    # gone.
    process, log = on_hub(
        hub_forks, flags, tmp_path / "later", "--max_steps 400 --save_steps 300 --logging_steps 1"
    )
    wait_for_steps(log, 3)
    hub.add_fault(method="GET", path_contains="train-0000", status=503, times=None)
    wait_for(log, "Trying again in", 1)
    trained = count_steps(log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143, log.read_text()[-3000:]
    checkpoint = find_checkpoint(tmp_path / "later" / "out", "auto")
    assert checkpoint is not None and int(checkpoint.name[11:]) >= trained > 3
    hub.remove_faults()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status_code", "message"), [(401, "error: "), (403, "error: "), (404, "error: ")]
)
def test_what_waiting_cannot_mend_ends_at_once(
    hub: Hub,
    hub_forks: ForkServer,
    flags: list[str],
    tmp_path: Path,
    status_code: int,
    message: str,
):
    hub.remove_faults()
    hub.add_fault(
        method="GET", path_contains="/api/datasets/alice/speech", status=status_code, times=None
    )
    began = time.monotonic()
    process, log = on_hub(hub_forks, flags, tmp_path / "out", "--max_steps 2")
    assert process.wait(100) == 2, log.read_text()[-3000:]
    assert message in log.read_text().splitlines()[-1]
    tries = log.read_text().count("Trying again")
    assert tries <= (1 if status_code == 403 else 0)  # an address may have expired: asked anew once
    assert time.monotonic() - began < 60
    hub.remove_faults()


@pytest.mark.parametrize("where", ["Popen", "rename"])
def test_an_upload_that_the_disk_prevents_is_neither_lost_nor_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    """The disk is full when the upload starts, or when its end is noted; then it is not, and the
    upload fails."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    uploads = HubUploads(
        repo_id="alice/x",
        output_dir=tmp_path,
        strategy="every_save",
        with_transcripts=False,
        must_be_private=False,
        wait_in_seconds=0.5,
    )
    module = subprocess if where == "Popen" else Path
    real, fails = getattr(module, where), [OSError(28, "No space left on device")]
    num_calls_before = 0 if where == "Popen" else 1  # the first one starts the upload

    def full(*args: object, **kwargs: object) -> object:
        nonlocal num_calls_before
        num_calls_before -= 1
        if fails and num_calls_before < 0:
            raise fails.pop()
        return real(*args, **kwargs)

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(module, where, full)
    uploads.submit(tmp_path / "model", "card")
    with pytest.raises(
        RunEnded, match="trained and saved, but not uploaded .*hf upload alice/x"
    ) as ending:
        uploads.finish()
    assert ending.value.code == 76 and not fails
    folder = ending.value.reason.split("hf upload alice/x ")[1].split()[0]
    assert Path(folder, "config.json").is_file()


def test_a_disk_that_is_full_at_the_end_is_one_line(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script, "write_reports", full)
    assert exit_code_of(script.main, [*flags, "--do_eval"]) == 73
    assert "error: the disk is full: " in capsys.readouterr().err
