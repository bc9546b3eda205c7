"""What is answered before torch is imported, in real processes."""

import importlib.util
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import ForkServer

PROJECT = Path(__file__).parents[2]
SCRIPT = PROJECT / "run_speech_recognition_seq2seq_streaming.py"
REQUIRED = "--model_name_or_path m --dataset_name d --output_dir out --language es".split()


def make_stand_ins(folder: Path, *names: str) -> dict[str, str]:
    """An environment in which these packages cannot be imported."""
    for name in names:
        package = folder / "stand_ins" / name
        package.mkdir(parents=True)
        specification = importlib.util.find_spec(name)
        assert specification is not None and specification.origin is not None
        real = Path(specification.origin).parent
        # Its source may be read, but nobody may import it.
        for file in ("training_args.py", "training_args_seq2seq.py", "trainer_utils.py"):
            if (real / file).is_file():
                (package / file).symlink_to(real / file)
        (package / "__init__.py").write_text(f"raise SystemExit('{name} was imported')")
    return {**os.environ, "PYTHONPATH": str(folder / "stand_ins")}


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing heavy can be imported."""
    return make_stand_ins(tmp_path, "torch", "transformers", "datasets")


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Starts in which torch cannot be imported. Names are compared with those that `datasets` and
    `transformers` know, and importing these two takes 1.3 of the 1.6 s of CPU time of a start."""
    environment = make_stand_ins(tmp_path_factory.mktemp("without_torch"), "torch")
    known = ("speech_finetuning.data.dataset_names", "speech_finetuning.model.languages")
    with ForkServer(environment, imports=("datasets", *known)) as server:
        yield server


def run_fork(words: list[str], forks: ForkServer, folder: Path) -> tuple[int, str]:
    """(exit code, what was said)"""
    code = forks.start(words, log=folder / "log", cwd=folder).wait(60)
    return code, (folder / "log").read_text()


def run(words: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *words],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_fits_two_screens_the_required_flags_first(
    without_torch: dict[str, str], tmp_path: Path
):
    result = run(["--help"], without_torch, tmp_path)
    lines = result.stdout.splitlines()
    assert (result.returncode, result.stderr) == (0, "")
    assert len(lines) <= 48 and max(map(len, lines)) <= 80
    assert lines[3] == "required:" and "--model_name_or_path" in lines[4]


def test_help_all_has_every_flag_but_those_that_do_nothing(
    without_torch: dict[str, str], tmp_path: Path
):
    result = run(["--help_all"], without_torch, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    for flag in ("--shuffle_buffer_size", "--weight_decay", "--max_steps", "--report_to"):
        assert f"\n  {flag} " in result.stdout
    for flag in ("--sortish_sampler", "--hub_token", "--length_column_name", "--no_streaming"):
        assert f"\n  {flag}" not in result.stdout
    assert "%%" not in result.stdout
    assert "https://github.com/huggingface/transformers/issues/34242" in result.stdout


def test_version_names_the_commit_and_the_libraries(without_torch: dict[str, str], tmp_path: Path):
    result = run(["--version"], without_torch, tmp_path)
    assert result.returncode == 0
    assert "torch 2." in result.stdout and "transformers 5." in result.stdout


def test_mistakes_are_answered_without_torch(without_torch: dict[str, str], tmp_path: Path):
    words = [*REQUIRED, "--lr", "1e-5", "--max_steps", "many"]
    result = run(words, without_torch, tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: unknown flag --lr. Did you mean --learning_rate?",
        "error: --max_steps: expected a whole number, found 'many'.",
    ]
    words = [*REQUIRED, "--do_train", "--load_best_model_at_end", "--fp16", "--bf16"]
    result = run(words, without_torch, tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: --load_best_model_at_end needs --do_train and --do_eval.",
        "error: --fp16 and --bf16: pass one, not both.",
    ]


@pytest.mark.slow
def test_misspelt_names_are_answered_without_torch(without_torch: dict[str, str], tmp_path: Path):
    for name in ("transformers", "datasets"):
        shutil.rmtree(tmp_path / "stand_ins" / name)
    (tmp_path / "speech").mkdir()
    words = "--model_name_or_path ./m --dataset_name ./speach --language Spansh".split()
    result = run([*words, "--output_dir", "out", "--do_train"], without_torch, tmp_path)
    here = "In this folder: speech, stand_ins."
    assert result.stderr.splitlines() == [
        f"error: --model_name_or_path ./m: there is no such folder. {here}",
        f"error: --dataset_name ./speach: does not exist. {here} Did you mean speech?",
        "error: --language Spansh: no such language. Did you mean Spanish (es)?",
    ]
    assert result.returncode == 2
    words = [*REQUIRED, "--model_name_or_path", "a/m", "--dataset_name", "a/b", "--do_train"]
    result = run(words, without_torch, tmp_path)
    assert result.returncode == 1 and "torch was imported" in result.stderr


@pytest.mark.parametrize("flag", ["dataset_name", "noise_dataset"])
@pytest.mark.parametrize(
    "name", ["speech", "speech/train.csv", "train.TSV", "https://example.org/train.csv", "a/b"]
)
def test_names_that_may_be_right_are_not_refused(
    forks: ForkServer, tmp_path: Path, flag: str, name: str
):
    """A folder, a list, an address, a data set of the Hub: whoever opens it will see."""
    (tmp_path / "speech").mkdir()
    for table in ("speech/train.csv", "train.TSV"):
        (tmp_path / table).write_text("path,sentence\n")
    words = [*REQUIRED, "--model_name_or_path", "a/m", "--dataset_name", "a/b", "--do_train"]
    code, said = run_fork([*words, f"--{flag}", name], forks, tmp_path)
    assert code == 1 and said.endswith("torch was imported\n")


@pytest.mark.parametrize("flag", ["noise_dataset", "room_dataset"])
@pytest.mark.parametrize("name", ["nowhere", "noise/", "../noise", "noise.csv"])
def test_noise_that_is_not_there_is_answered_without_torch(
    forks: ForkServer, tmp_path: Path, flag: str, name: str
):
    words = [*REQUIRED, "--model_name_or_path", "a/m", "--dataset_name", "a/b", "--do_train"]
    code, said = run_fork([*words, f"--{flag}", name], forks, tmp_path)
    (line,) = said.splitlines()
    assert line.startswith(f"error: --{flag} {name}: does not exist. In ")
    assert code == 2


def test_only_the_first_process_tells_a_mistake(without_torch: dict[str, str], tmp_path: Path):
    result = run([*REQUIRED, "--lr", "1"], {**without_torch, "RANK": "1"}, tmp_path)
    assert (result.returncode, result.stderr) == (2, "")


def test_a_correct_command_goes_on_to_torch(without_torch: dict[str, str], tmp_path: Path):
    words = [*REQUIRED, "--do_train", "--max_steps", "1"]
    result = run(words, without_torch, tmp_path)
    assert result.returncode == 1 and "was imported" in result.stderr


def test_a_terminal_is_told_of_the_start_before_torch(
    without_torch: dict[str, str], tmp_path: Path
):
    """Importing torch takes seconds, in which nothing else would be said."""
    terminal, stderr = pty.openpty()
    subprocess.run(
        [sys.executable, SCRIPT, *REQUIRED, "--do_train", "--max_steps", "1"],
        env={**without_torch, "TERM": "xterm"},
        cwd=tmp_path,
        stderr=stderr,
        timeout=60,
    )
    assert os.read(terminal, 1000).startswith(b"starting ...\r")
    os.close(terminal)
    os.close(stderr)


def test_a_refused_start_leaves_the_ending_of_a_run_alone(
    without_torch: dict[str, str], tmp_path: Path
):
    (tmp_path / "out").mkdir()
    ending = tmp_path / "out" / "exit_status.json"
    assert run([*REQUIRED, "--lr", "1"], without_torch, tmp_path).returncode == 2
    assert json.loads(ending.read_text())["code"] == 2  # there was none
    ending.write_text("how it ended")
    of_launcher = tmp_path / "status"
    environment = {**without_torch, "EXIT_STATUS_FILE": str(of_launcher)}
    assert run([*REQUIRED, "--lr", "1"], environment, tmp_path).returncode == 2
    assert ending.read_text() == "how it ended"
    assert json.loads(of_launcher.read_text())["code"] == 2


def test_ctrl_c_while_python_ends_is_one_line():
    """A second one, after the run has been saved: torch has work left for its end."""
    lines = [
        "import atexit, os, signal",
        "from speech_finetuning.cli.early_exit import leave",
        "signal.signal(signal.SIGINT, leave)",
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)",
    ]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=PROJECT, capture_output=True, text=True
    )
    assert result.returncode == 130
    assert result.stderr == "stopped by Ctrl-C. To go on, start the same command again.\n"


def test_ctrl_c_while_libraries_are_imported_is_one_line(
    without_torch: dict[str, str], tmp_path: Path
):
    slow = "import time; print('importing', flush=True); time.sleep(60)"
    for file in (tmp_path / "stand_ins").glob("*/__init__.py"):
        file.write_text(slow)
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *REQUIRED, "--do_train", "--max_steps", "1"],
        env=without_torch,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "stopped by Ctrl-C. To go on, start the same command again.\n"
