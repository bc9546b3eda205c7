"""run.sh and the shape of the code."""

import subprocess
import sys
from pathlib import Path

import pytest
from fake_venv import make_venv

import run_speech_recognition_seq2seq_streaming as script

PROJECT = Path(script.__file__).parent
NAME = "run_speech_recognition_seq2seq_streaming.py"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("dance", "unknown recipe 'dance'"),
        ("-x", "unknown recipe '-x'. bash run.sh help lists them."),
        ("check", "which data? Use: bash run.sh check DATA"),
        ("demo", "which model? Use: bash run.sh demo FOLDER"),
    ],
)
def test_run_sh_refuses_what_it_does_not_know(words: str, message: str):
    result = subprocess.run(["bash", PROJECT / "run.sh", words], capture_output=True, text=True)
    assert result.returncode == 2 and message in result.stderr


def test_run_sh_refuses_an_old_python_in_one_line(tmp_path: Path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    result = subprocess.run(
        ["bash", PROJECT / "run.sh", "smoke"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(old), "VENV": str(tmp_path / "venv")},
    )
    assert result.returncode == 2
    assert result.stderr.strip() == (
        f"error: Python 3.11 or newer is needed, {old} is Python 3.9.2. Set PYTHON=python3.12 (or where yours is)."
    )


@pytest.mark.slow
def test_smoke_recipe_from_another_directory(tmp_path: Path, forked_python: str):
    """The same interpreter stands in for .venv, so that nothing is installed twice. The training is a
    start like any other; what makes the data and looks at the model has its imports done."""
    start = f'case "$1" in -m) exec {forked_python} "$@";; *) exec {sys.executable} "$@";; esac'
    make_venv(tmp_path, python=f"#!/bin/sh\n{start}\n")
    result = subprocess.run(
        ["bash", PROJECT / "run.sh", "smoke", "--max_steps", "2", "--num_decoding_threads", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            "PATH": "/usr/bin:/bin",
            "VENV": str(tmp_path),
            "TMPDIR": str(tmp_path),
            "HOME": str(tmp_path),
        },
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "after training" in result.stderr
    assert result.stdout.splitlines()[-3].startswith("smoke ok: ")
    output = next(tmp_path.glob("whisper-smoke.*/output"))
    assert (output / "checkpoint-2" / "stream_state.json").is_file()


@pytest.mark.parametrize(
    ("endings", "code", "starts"),
    [("75 kill 143 0", 0, 4), ("2", 2, 1), ("130", 130, 1), ("75 76", 76, 2), ("75 74", 74, 2)],
)
def test_restart_starts_again_only_when_that_helps(
    tmp_path: Path, endings: str, code: int, starts: int
):
    """A stand-in for Python ends as told: with an exit code or, for "kill", by SIGKILL."""
    (tmp_path / "endings").write_text(endings)
    make_venv(
        tmp_path,
        python=f"""#!/bin/bash
        read -r now rest <{tmp_path}/endings; echo "$rest" >{tmp_path}/endings; echo start >>{tmp_path}/starts
        [[ $now == kill ]] && kill -9 $$; exit "$now\"""",
    )
    environment = {
        "PATH": "/usr/bin:/bin",
        "VENV": str(tmp_path),
        "RESTART": "1",
        "RESTART_DELAY": "0.1",
    }
    result = subprocess.run(
        ["bash", PROJECT / "run.sh"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == code, result.stderr
    assert (tmp_path / "starts").read_text().count("start") == starts
    assert result.stderr.count("starting it again") == starts - 1


def run_stand_in(
    folder: Path, lines: str, flags: list[str], **environment: str
) -> subprocess.CompletedProcess:
    """run.sh with a shell script in place of Python."""
    make_venv(folder, python=f"#!/bin/bash\n{lines}\n")
    return subprocess.run(
        ["bash", PROJECT / "run.sh", *flags],
        env={"PATH": "/usr/bin:/bin", "VENV": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
    )


@pytest.mark.parametrize(
    ("environment", "launched"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,2,5"}, "--nproc_per_node 3"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1f,GPU-2a"}, "--nproc_per_node 2"),
        ({"CUDA_VISIBLE_DEVICES": ""}, f"{NAME} --model"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, f"{NAME} --model"),
        ({"CUDA_VISIBLE_DEVICES": "3,4", "NUM_PROCESSES": "1"}, f"GPUs 3 {PROJECT / NAME} --model"),
        ({"CUDA_VISIBLE_DEVICES": "", "NUM_PROCESSES": "4"}, "--nproc_per_node 4"),
    ],
)
def test_run_sh_starts_a_process_for_each_visible_gpu(
    tmp_path: Path, environment: dict[str, str], launched: str
):
    result = run_stand_in(tmp_path, 'echo "GPUs $CUDA_VISIBLE_DEVICES $@"', [], **environment)
    assert result.returncode == 0 and launched in result.stdout
    assert ("by torchrun" in result.stderr) == ("nproc_per_node" in launched)


# In place of the Python that .venv is made with: pip talks.
MAKES_VENV = """#!/bin/bash
if [[ "$*" == "-m venv"* ]]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi
case "$*" in
  *version_info*) ;;
  "-m venv"* | "-m pip"*) echo "noise of pip" ;;
  *) echo "said" ;;
esac
"""


@pytest.mark.parametrize(
    "words",
    ["transcribe m x.wav", "export m --to ggml", "demo m", "check d", "learn", "smoke", "test", ""],
)
def test_the_first_start_writes_results_only_to_stdout(tmp_path: Path, words: str):
    """`bash run.sh transcribe MODEL x.wav > x.txt`: what goes on is told on stderr."""
    found = tmp_path / "python3"
    found.write_text(MAKES_VENV)
    found.chmod(0o755)
    result = subprocess.run(
        ["bash", PROJECT / "run.sh", *words.split()],
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHON": str(found),
            "VENV": str(tmp_path / "venv"),
            "TMPDIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "setting up" in result.stderr and "noise of pip" in result.stderr
    assert set(result.stdout.splitlines()) <= {"said"}


@pytest.mark.parametrize(
    ("data", "output_dir"),
    [
        ("speech", "check-speech"),
        ("speech/", "check-speech"),
        ("v1.0", "check-v1.0"),
        ("v1.1", "check-v1.1"),
        ("a/list.CSV", "check-list"),
        ("mozilla/common_voice_17.0", "check-common_voice_17.0"),
        ("https://example.com/a/list.tsv?raw=true", "check-list"),
        (".", "{here}/check-work"),
        ("./", "{here}/check-work"),
        ("..", "{above}/check-here"),
        ("../sister", "check-sister"),
        ("../wo", "check-wo"),
    ],
)
def test_a_check_is_named_after_its_data_and_lies_outside_them(
    tmp_path: Path, data: str, output_dir: str
):
    here = tmp_path / "here"
    for name in ("work/speech", "work/v1.0", "work/v1.1", "sister", "wo"):
        (here / name).mkdir(parents=True)
    make_venv(tmp_path, python='#!/bin/bash\necho "$@"\n')
    result = subprocess.run(
        ["bash", PROJECT / "run.sh", "check", data],
        env={"PATH": "/usr/bin:/bin", "VENV": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=here / "work",
    )
    expected = output_dir.format(here=here, above=tmp_path)
    assert f"--dataset_name {data} --output_dir {expected}\n" in result.stdout, result


def test_run_sh_takes_the_exit_code_that_torchrun_hides(tmp_path: Path):
    """The first start leaves 75 behind, the second one 74, both end with 1; the file of an earlier
    run in the output folder means nothing, and stays."""
    (tmp_path / "out").mkdir()
    of_earlier_run = tmp_path / "out" / "exit_status.json"
    of_earlier_run.write_text('{\n  "code": 0,\n  "reason": "done"\n}\n')
    lines = [
        "[[ -e started ]] && code=74 || code=75",
        "touch started",
        "[[ -e $EXIT_STATUS_FILE ]] && exit 99",
        r"""printf '{\n  "code": %s,\n  "reason": "r"\n}\n' "$code" >$EXIT_STATUS_FILE""",
        "exit 1",
    ]
    environment = {
        "NUM_PROCESSES": "2",
        "RESTART": "1",
        "RESTART_DELAY": "0.1",
        "TMPDIR": str(tmp_path / "tmp"),
    }
    (tmp_path / "tmp").mkdir()
    result = run_stand_in(tmp_path, "\n".join(lines), ["--output_dir=out"], **environment)
    assert result.returncode == 74 and result.stderr.count("starting it again") == 1
    assert '"code": 0' in of_earlier_run.read_text()
    assert list((tmp_path / "tmp").iterdir()) == [], "nothing stays behind"


def test_run_sh_help_names_every_recipe_and_the_folders():
    result = subprocess.run(
        ["bash", PROJECT / "run.sh", "help"], capture_output=True, text=True, check=True
    )
    for recipe in (
        "smoke",
        "learn",
        "demo MODEL",
        "transcribe MODEL FILE...",
        "export MODEL --to ctranslate2",
        "test",
        "help",
    ):
        assert f"  bash run.sh {recipe}" in result.stdout
    assert "./whisper-learn" in result.stdout and "#" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80, "a terminal of 80 columns"


# In place of Python: makes the demonstration, or says what the trainer would be started with.
DEMONSTRATION_STAND_IN = """
case "$*" in
  *cli.early_exit*) ;;
  *cli.demonstration*) mkdir -p "$3/speech" "$3/model"; echo made >>made; [[ ! -e fail ]] ;;
  *) echo "trains $*" ;;
esac
"""


@pytest.mark.parametrize("recipe", ["learn", "smoke"])
@pytest.mark.parametrize(
    ("flag", "code", "answer"),
    [("--lr", 2, "Did you mean --learning_rate?"), ("--help", 0, "usage: ")],
)
def test_a_recipe_answers_before_it_makes_its_data(
    tmp_path: Path, recipe: str, flag: str, code: int, answer: str
):
    make_venv(tmp_path)
    here = tmp_path / "here"
    here.mkdir()
    result = subprocess.run(
        ["bash", PROJECT / "run.sh", recipe, flag, "1"],
        env={"PATH": "/usr/bin:/bin", "VENV": str(tmp_path), "TMPDIR": str(here)},
        capture_output=True,
        text=True,
        cwd=here,
    )
    assert result.returncode == code and answer in result.stdout + result.stderr
    assert list(here.iterdir()) == []


def test_learn_goes_on_where_it_was_interrupted(tmp_path: Path):
    (tmp_path / "fail").touch()  # while the demonstration is made
    result = run_stand_in(tmp_path, DEMONSTRATION_STAND_IN, ["learn"])
    assert result.returncode == 1 and "trains" not in result.stdout
    (tmp_path / "fail").unlink()
    for start in range(2):
        result = run_stand_in(tmp_path, DEMONSTRATION_STAND_IN, ["learn"])
        assert result.returncode == 0, result.stderr
        assert f"--output_dir {tmp_path}/whisper-learn/output" in result.stdout
        assert ("going on in" in result.stderr) == (start == 1)
    assert (tmp_path / "made").read_text().count("made") == 2
    folders = {path.name for path in (tmp_path / "whisper-learn").iterdir()}
    assert folders == {"speech", "model"}
