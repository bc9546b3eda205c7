"""README, run.sh and the shape of the code: what is promised there is accepted here."""

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import run_speech_recognition_seq2seq_streaming as script

PROJECT = Path(script.__file__).parent
NAME = "run_speech_recognition_seq2seq_streaming.py"


def commands(text: str) -> list[list[str]]:
    """The words after the script's name in every command of a text, continued lines joined."""
    joined = text.replace("\\\n", " ")
    pieces = [
        line.split(name)[1] for line in joined.splitlines() for name in (NAME, '"$script"', "  train ") if name in line
    ]
    return [shlex.split(piece) for piece in pieces if "--model_name_or_path" in piece]


def test_every_command_is_accepted():
    sources = [(PROJECT / name).read_text() for name in ("README.md", "run.sh")] + [script.__doc__]
    found = [words for text in sources for words in commands(text)]
    assert len(found) >= 5
    for words in found:
        plain = [word for word in words if word not in ("--fp16", "$@", "--push_to_hub")]
        arguments = script.parse_arguments(plain)
        script.check_arguments(*arguments[1:])
        for word in words:
            assert not word.startswith("--") or word[2:].split("=")[0] in script_flags(), word


def script_flags() -> set[str]:
    parser = script.ArgumentParser((script.TrainingArguments, script.ModelArguments, script.DataArguments))
    return {option.removeprefix("--") for option in parser._option_string_actions}


def readme_blocks() -> list[str]:
    """The shell code in README.md, here-documents left out."""
    blocks = re.findall(r"```bash\n(.*?)```", (PROJECT / "README.md").read_text(), re.S)
    return [re.sub(r" <<'END'\n.*?\nEND\n", "\n", block, flags=re.S) for block in blocks]


def check_flags(words: list[str], parser_of: str) -> None:
    """A command of the trainer, or of run.sh, whose recipe's flags come first, is parsed and checked by the script."""
    base: list[str] = []
    if parser_of == "run.sh":
        known = ("smoke", "learn", "test")
        recipe = words.pop(0) if words and not words[0].startswith("--") else ""
        assert recipe in ("", *known), recipe
        recipes = dict(zip(("smoke", "learn", ""), commands((PROJECT / "run.sh").read_text()), strict=True))
        base = recipes.get(recipe, recipes[""])
    plain = [word for word in [*base, *words] if word not in ("--fp16", "$@", "--push_to_hub")]
    script.check_arguments(*script.parse_arguments(plain)[1:])


OTHER_PROGRAMS = "mkdir tar tmux git cmake #!/bin/bash #SBATCH code=0 exit whisper.cpp/build/bin/whisper-cli".split()
OTHER_COMMANDS = [  # that another test runs, or that come from another project's documentation
    ".venv/bin/pip install -r requirements-demo.txt",
    ".venv/bin/pip install -r requirements-lora.txt",
    "pip install faster-whisper",
    ".venv/bin/ct2-transformers-converter",
    "python - whisper-small-es",
    "python whisper.cpp/models/convert-h5-to-ggml.py",
    "if [[ $code == 75",
]


def test_every_shell_block_of_the_readme_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = "model_name_or_path: m\ndataset_name: d\noutput_dir: o\ndo_train: true\nmax_steps: 1\n"
    (tmp_path / "recipe.yaml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    blocks, checked = readme_blocks(), 0
    for block in blocks:
        assert subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True).stderr == ""
        for line in filter(None, block.replace("\\\n", " ").splitlines()):
            command = line.split("||")[0].removeprefix("RESTART=1 ").removeprefix("srun ")
            words = shlex.split(command, comments=True)
            checked += (program := next((name for name in (NAME, "run.sh", "demo.py") if name in words), "")) != ""
            if program == "demo.py":
                flags = {word for word in words if word.startswith("--")}
                assert flags and all(f'"{flag}"' in (PROJECT / "demo.py").read_text() for flag in flags), line
            elif program:
                check_flags(words[words.index(program) + 1 :], program)
            else:
                is_known = line.split()[0] in OTHER_PROGRAMS or line.startswith(tuple(OTHER_COMMANDS))
                assert is_known or line.startswith("#"), f"{line!r}: no test knows this command"
    assert len(blocks) >= 9 and checked >= 9


def test_every_line_of_the_memory_table_is_a_command():
    rows = re.findall(r"^\| \d+ GB \| (\S+) \| (\d+) \| (\d+) \| (.*?) \| ", (PROJECT / "README.md").read_text(), re.M)
    assert len(rows) >= 10
    for model, batch, accumulation, more in rows:
        words = f"--model_name_or_path openai/whisper-{model} --per_device_train_batch_size {batch}".split()
        words += f"--gradient_accumulation_steps {accumulation} {more.replace('`', '')}".split()
        check_flags(words, "run.sh")
        assert int(batch) * int(accumulation) == 32, "the README says that the global batch is 32 everywhere"


@pytest.mark.parametrize(("code", "is_requeued"), [(0, False), (2, False), (75, True), (138, True)])
def test_the_slurm_job_queues_again_only_when_that_helps(tmp_path: Path, code: int, is_requeued: bool):
    (job,) = (block for block in readme_blocks() if "#SBATCH" in block)
    for name, line in (("srun", f"exit {code}"), ("scontrol", f'echo "$@" >{tmp_path}/requeued')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    assert subprocess.run(["bash", "-c", job], env=environment).returncode == code
    assert (tmp_path / "requeued").exists() == is_requeued
    assert not is_requeued or (tmp_path / "requeued").read_text() == "requeue 7\n"


def upgrade_table() -> str:
    """README's table of retired flags, from the script's own."""
    lines = ["| flag of 2022, or of the library then | write instead |", "|---|---|"]
    for replacement, names in script.RETIRED_BY_REPLACEMENT.items():
        code = re.sub(r"(--\w+)", r"`\1`", replacement)
        lines.append(f"| {', '.join(f'`{name}`' for name in names.split())} | {code} |")
    return "\n".join(lines) + "\n"


def write_upgrade_table() -> None:
    """README's table anew: PYTHONPATH=.:tests python -c 'import test_project as t; t.write_upgrade_table()'."""
    path = PROJECT / "README.md"
    first = upgrade_table().split("\n")[0]
    path.write_text(re.sub(rf"^{re.escape(first)}\n(\|.*\n)+", upgrade_table(), path.read_text(), flags=re.M))


def test_the_upgrade_table_is_the_script_s():
    assert upgrade_table() in (PROJECT / "README.md").read_text(), write_upgrade_table.__doc__


def test_flags_in_prose_exist():
    named = set(re.findall(r"`--(\w+)", (PROJECT / "README.md").read_text()))
    assert len(named) > 10 and named <= script_flags()


def test_functions_stay_short():
    tree = ast.parse((PROJECT / NAME).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert lengths.pop("set_up") <= 75  # the list of the stages
    assert {name: length for name, length in lengths.items() if length > 45} == {}
    nested = [inner.name for node in functions for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef)]
    assert len(nested) == len(functions)  # each function only finds itself
    untyped = [node.name for node in functions if node.returns is None]
    assert untyped == []


def test_the_script_stays_readable_in_a_sitting():
    """Lines of code: blank lines, comments and docstrings are not counted."""
    text = (PROJECT / NAME).read_text()
    holders = (ast.FunctionDef, ast.ClassDef, ast.Module)
    documented = [
        node.body[0] for node in ast.walk(ast.parse(text)) if isinstance(node, holders) and ast.get_docstring(node)
    ]
    prose = {number for node in documented for number in range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(text.splitlines(), start=1)
    code = [line for number, line in lines if number not in prose and line.strip() and line.strip()[0] != "#"]
    assert len(code) <= 2_370


def test_the_yaml_in_the_readme_is_a_mix(tmp_path: Path):
    blocks = re.findall(r"```yaml\n(.*?)```", (PROJECT / "README.md").read_text(), re.S)
    assert len(blocks) == 1
    (tmp_path / "mix.yaml").write_text(blocks[0])
    words = f"--model_name_or_path m --output_dir o --data_mix {tmp_path / 'mix.yaml'}"
    records = script.data_records(script.parse_arguments(words.split())[1])
    assert [(record.language, record.weight) for record in records] == [("de", 3), ("nl", 1)]


@pytest.mark.parametrize(
    ("words", "message"), [("dance", "unknown recipe 'dance'"), ("-h", "Use: bash run.sh [smoke|learn|test]")]
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
def test_smoke_recipe_from_another_directory(tmp_path: Path):
    """The same interpreter stands in for .venv, so that nothing is installed twice."""
    import sys

    stamp = subprocess.run(["cksum"], input=(PROJECT / "requirements.txt").read_bytes(), capture_output=True).stdout
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / ".requirements-1").write_bytes(stamp)
    result = subprocess.run(
        ["bash", PROJECT / "run.sh", "smoke", "--max_steps", "2", "--num_decoding_threads", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "VENV": str(tmp_path), "TMPDIR": str(tmp_path), "HOME": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "after training" in result.stderr and "reloaded " in result.stdout
    output = next(tmp_path.glob("whisper-smoke.*/output"))
    assert (output / "checkpoint-2" / "stream_state.json").is_file()


@pytest.mark.parametrize(
    ("endings", "code", "starts"),
    [("75 kill 143 0", 0, 4), ("2", 2, 1), ("130", 130, 1), ("75 76", 76, 2), ("75 74", 74, 2)],
)
def test_restart_starts_again_only_when_that_helps(tmp_path: Path, endings: str, code: int, starts: int):
    """A stand-in for Python ends as told: with an exit code or, for "kill", by SIGKILL."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "endings").write_text(endings)
    stand_in = tmp_path / "bin" / "python"
    stand_in.write_text(
        f"""#!/bin/bash
        read -r now rest <{tmp_path}/endings; echo "$rest" >{tmp_path}/endings; echo start >>{tmp_path}/starts
        [[ $now == kill ]] && kill -9 $$; exit "$now\""""
    )
    stand_in.chmod(0o755)
    stamp = subprocess.run(["cksum"], input=(PROJECT / "requirements.txt").read_bytes(), capture_output=True).stdout
    (tmp_path / ".requirements-1").write_bytes(stamp)
    environment = {"PATH": "/usr/bin:/bin", "VENV": str(tmp_path), "RESTART": "1", "RESTART_DELAY": "0.1"}
    result = subprocess.run(["bash", PROJECT / "run.sh"], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == code, result.stderr
    assert (tmp_path / "starts").read_text().count("start") == starts
    assert result.stderr.count("starting it again") == starts - 1


def run_stand_in(folder: Path, lines: str, flags: list[str], **environment: str) -> subprocess.CompletedProcess:
    """run.sh with a shell script in place of Python."""
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f"#!/bin/bash\n{lines}\n")
    (folder / "bin" / "python").chmod(0o755)
    stamp = subprocess.run(["cksum"], input=(PROJECT / "requirements.txt").read_bytes(), capture_output=True).stdout
    (folder / ".requirements-1").write_bytes(stamp)
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
def test_run_sh_starts_a_process_for_each_visible_gpu(tmp_path: Path, environment: dict[str, str], launched: str):
    result = run_stand_in(tmp_path, 'echo "GPUs $CUDA_VISIBLE_DEVICES $@"', [], **environment)
    assert result.returncode == 0 and launched in result.stdout
    assert ("by torchrun" in result.stderr) == ("nproc_per_node" in launched)


def test_run_sh_takes_the_exit_code_that_torchrun_hides(tmp_path: Path):
    """The first start leaves 75 behind, the second one 74, both end with 1; a file from before means nothing."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "exit_status.json").write_text('{\n  "code": 0,\n  "reason": "done"\n}\n')
    code = "[[ -e started ]] && code=74 || code=75; touch started; [[ -e out/exit_status.json ]] && exit 99\n"
    code += 'printf \'{\\n  "code": %s,\\n  "reason": "r"\\n}\\n\' "$code" >out/exit_status.json; exit 1'
    environment = {"NUM_PROCESSES": "2", "RESTART": "1", "RESTART_DELAY": "0.1"}
    result = run_stand_in(tmp_path, code, ["--output_dir", "elsewhere", "--output_dir=out"], **environment)
    assert result.returncode == 74 and result.stderr.count("starting it again") == 1
