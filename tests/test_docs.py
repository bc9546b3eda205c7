"""README.md, docs/ and CONTRIBUTING.md: the code accepts every command, flag, table and link in
them."""

import ast
import functools
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
from huggingface_hub.cli import hf

import demo
import run_speech_recognition_seq2seq_streaming as script
from speech_finetuning.base.errors import ExitCode
from speech_finetuning.cli import export, transcribe
from speech_finetuning.cli.parsing import FlagParser
from speech_finetuning.cli.retired import RETIRED_RENAMED, RETIRED_WITHOUT_EFFECT

PROJECT = Path(script.__file__).parent
SCRIPT_NAME = "run_speech_recognition_seq2seq_streaming.py"
README = PROJECT / "README.md"
MEMORY_PAGE = PROJECT / "docs" / "memory.md"
MIGRATION_PAGE = PROJECT / "docs" / "migrating-from-2022.md"
QUESTION_PAGES = sorted((PROJECT / "docs").glob("*.md"))
PAGES = [README, PROJECT / "CONTRIBUTING.md", PROJECT / "CHANGELOG.md", *QUESTION_PAGES]
PAGE_NAMES = [str(page.relative_to(PROJECT)) for page in PAGES]

# These need a token before they can be parsed; everything else of a command is parsed and
# checked here.
NEEDS_MORE_THAN_THIS_MACHINE = ("--push_to_hub", "$@")

# A command that starts with one of these belongs to another program: to the shell, or to a project
# whose documentation says the same, or another test runs it (tests of the demo, of the export, of
# `bash run.sh test`).
OTHER_PROGRAMS = (
    "#!/bin/bash",
    "#SBATCH",
    ".venv/bin/pip install faster-whisper",
    ".venv/bin/pip install -r requirements-demo.txt",
    ".venv/bin/pip install -r requirements-lora.txt",
    "cd /workspace/whisper",
    "cmake",
    "code=0",
    "exit",
    "git clone",
    'grep -v "^torch==" requirements.txt',
    "if [[ $code == 75",
    "mkdir",
    "pip install --quiet -r others.txt",
    "python whisper.cpp/models/convert-h5-to-ggml.py",
    "source .venv/bin/activate",
    "tar",
    "tmux",
    "whisper.cpp/build/bin/whisper-cli",
)


def code_blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language on a page, without their fences."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def shell_lines(block: str) -> list[str]:
    """The commands of a shell block: continued lines joined, here-documents and comments left
    out."""
    without_documents = re.sub(r" <<'END'\n.*?\nEND\n", "\n", block, flags=re.S)
    joined = without_documents.replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("# ")]


def command_words(line: str) -> list[str]:
    """The words of a command, without what the shell does before and after it."""
    command = line.split("||")[0].removeprefix("srun ")
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return words


@functools.cache
def recipes() -> dict[str, list[str]]:
    """The flags of every recipe in run.sh by its name; the recipe without a name is the real
    one."""
    text = (PROJECT / "run.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    functions = re.findall(r"^(\w+)\(\) \{\n(.*?)^\}", text, re.M | re.S)
    found = {}
    for name, body in functions:
        if listed := re.search(r"^  local flags=\((.*?)^  \)", body, re.M | re.S):
            found[name] = shlex.split(listed[1])
            continue
        for line in body.splitlines():
            words = line.split()
            if words[:1] == ["train"] and len(words) > 1:
                found["" if name == "recipe" else name] = shlex.split(line)[1:]
    return found


def script_parser() -> FlagParser:
    return FlagParser((script.TrainingArguments, script.ModelArguments, script.DataArguments))


@functools.cache
def script_flags() -> set[str]:
    return {option.removeprefix("--") for option in script_parser()._option_string_actions}


def check_training_flags(words: list[str]) -> None:
    """The script parses these flags and its own checks of their combination pass."""
    for word in words:
        if word.startswith("--"):
            assert word.removeprefix("--").split("=")[0] in script_flags(), word
    parsable = [word for word in words if word not in NEEDS_MORE_THAN_THIS_MACHINE]
    parsable += ["--fp16", "False"]  # a recipe may have it in its file
    script.check_arguments(*script.parse_arguments(parsable)[1:])


def check_recipe(words: list[str]) -> None:
    """`bash run.sh WORDS`: the recipe exists, and the script accepts its flags followed by the
    others."""
    name = ""
    if words and not words[0].startswith("-"):
        name = words[0]
        words = words[1:]
    if name == "test":
        return  # what follows are pytest's flags
    if name in OTHER_PARSERS:
        OTHER_PARSERS[name]().parse_args(words)
        return
    assert name in recipes(), f"run.sh has no recipe {name!r}"
    if name == "check":
        words = ["--dataset_name", *words]
    check_training_flags([*recipes()[name], *words])


# Recipes that are programs of their own.
OTHER_PARSERS = {
    "demo": demo.make_parser,
    "export": export.make_parser,
    "transcribe": transcribe.make_parser,
}


def check_hf_command(words: list[str]) -> None:
    """The installed `hf` knows the command; what a job runs is a command of this project."""
    command: Any = hf.app
    context = None
    name = "hf"
    words = words[1:]
    while isinstance(command, click.Group):
        context = click.Context(command, info_name=name, parent=context)
        name, command, words = command.resolve_command(context, words)
    parameters = command.make_context(name, words, parent=context).params
    if name == "run":
        assert re.fullmatch(r"\w+:[\d.]+", parameters["image"]), parameters["image"]
        assert parameters["flavor"] and parameters["secrets"] == ["HF_TOKEN"]
        *_, script_of_shell = parameters["command"]
        assert check_command(script_of_shell.split("&&")[-1].replace("/code/", "").strip())


def check_command(line: str) -> bool:
    """Whether the line is a command of this project, which is then checked; an unknown command
    fails."""
    words = command_words(line)
    if SCRIPT_NAME in words:
        check_training_flags(words[words.index(SCRIPT_NAME) + 1 :])
        return True
    if words[:2] == ["bash", "run.sh"]:
        check_recipe(words[2:])
        return True
    if words[:1] == ["hf"]:
        check_hf_command(words)
        return True
    if "demo.py" in words:
        demo.make_parser().parse_args(words[words.index("demo.py") + 1 :])
        return True
    if words[:1] == ["python"] and words[1:] and words[1].startswith(("benchmarks/", "tests/")):
        assert (PROJECT / words[1]).is_file(), line
        return True
    assert line.startswith(OTHER_PROGRAMS), f"{line!r}: no test knows this command"
    return False


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe.yaml and the recipes/ that commands name, in the current directory."""
    settings = {
        "model_name_or_path": "m",
        "dataset_name": "d",
        "output_dir": "o",
        "do_train": True,
        "max_steps": 1,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))  # JSON is YAML as well
    (tmp_path / "recipes").symlink_to(PROJECT / "recipes")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("recipe_file")
@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_every_shell_command_is_accepted(page: Path):
    for block in code_blocks(page, "bash"):
        syntax = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert syntax.stderr == ""
        for line in shell_lines(block):
            check_command(line)


@pytest.mark.usefixtures("recipe_file")
def test_the_pages_have_commands_of_their_own():
    """Against a reader of blocks that finds none: the test above would then pass for want of
    anything to check."""
    lines = [
        line for page in PAGES for block in code_blocks(page, "bash") for line in shell_lines(block)
    ]
    assert sum(check_command(line) for line in lines) >= 9


@pytest.mark.usefixtures("recipe_file")
@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_commands_within_a_sentence_are_accepted(page: Path):
    for span in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
        is_ours = re.search(r"\b(run\.sh|demo\.py|python (benchmarks|tests)/)", span)
        if is_ours and " " in span:
            check_command(span)


@pytest.mark.usefixtures("recipe_file")
def test_every_recipe_of_run_sh_is_accepted():
    assert {"", "smoke", "learn"} <= set(recipes())
    for flags in recipes().values():
        check_training_flags(flags)


@pytest.mark.usefixtures("recipe_file")
def test_every_command_in_the_script_s_docstring_is_accepted():
    lines = script.__doc__.replace("\\\n", " ").splitlines()
    commands = [command_words(line) for line in lines if SCRIPT_NAME in line]
    assert len(commands) >= 2
    for words in commands:
        flags = words[words.index(SCRIPT_NAME) + 1 :]
        if flags != ["--help"]:
            check_training_flags(flags)


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_flags_in_prose_exist(page: Path):
    known = script_flags() | {"help"}  # argparse's own
    for flag in re.findall(r"`--(\w+)", page.read_text(encoding="utf-8")):
        assert flag in known, f"--{flag}"


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_code_of_other_languages_parses(page: Path):
    for block in code_blocks(page, "json"):
        json.loads(block)
    for block in code_blocks(page, "python"):
        compile(block, str(page), "exec")


def test_the_mix_in_the_documentation_is_read_as_a_mix(tmp_path: Path):
    (block,) = code_blocks(PROJECT / "docs" / "data.md", "yaml")
    (tmp_path / "mix.yaml").write_text(block)
    words = f"--model_name_or_path m --output_dir o --do_eval --data_mix {tmp_path / 'mix.yaml'}"
    records = script.data_records(script.parse_arguments(words.split())[1])
    assert [(record.language, record.weight) for record in records] == [("de", 3), ("nl", 1)]


def memory_rows(page: Path) -> list[tuple[str, str, str, str]]:
    """Model, batch, accumulation and further flags of each line of a table of cards."""
    return re.findall(
        r"^\| \d+ GB \| (\S+) \| (\d+) \| (\d+) \| (.*?) \| ",
        page.read_text(encoding="utf-8"),
        re.M,
    )


def test_every_line_of_the_memory_table_is_a_command():
    rows = memory_rows(MEMORY_PAGE)
    assert len(rows) >= 10
    for model, batch, accumulation, more in rows:
        words = [
            *("--model_name_or_path", f"openai/whisper-{model}"),
            *("--per_device_train_batch_size", batch),
            *("--gradient_accumulation_steps", accumulation),
            *more.replace("`", "").split(),
        ]
        check_recipe(words)
        assert int(batch) * int(accumulation) == 32, (
            "the page says that the global batch is 32 everywhere"
        )


def test_the_readme_s_lines_of_the_memory_table_are_those_of_its_page():
    lines = re.findall(r"^\| \d+ GB .*$", README.read_text(encoding="utf-8"), re.M)
    assert len(lines) >= 5
    assert set(lines) <= set(MEMORY_PAGE.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(("code", "is_requeued"), [(0, False), (2, False), (75, True), (138, True)])
def test_the_slurm_job_queues_again_only_when_that_helps(
    tmp_path: Path, code: int, is_requeued: bool
):
    blocks = code_blocks(PROJECT / "docs" / "long-runs.md", "bash")
    (job,) = (block for block in blocks if "#SBATCH" in block)
    stand_ins = {"srun": f"exit {code}", "scontrol": f'echo "$@" >{tmp_path}/requeued'}
    for name, line in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    assert subprocess.run(["bash", "-c", job], env=environment).returncode == code
    assert (tmp_path / "requeued").exists() == is_requeued
    assert not is_requeued or (tmp_path / "requeued").read_text() == "requeue 7\n"


def migration_table() -> str:
    """The table of retired flags, from the script's own."""
    lines = ["| flag of 2022, or of the library then | today |", "|---|---|"]
    lines += [f"| `{name}` | `--{today}` |" for name, today in RETIRED_RENAMED.items()]
    for name, reason in RETIRED_WITHOUT_EFFECT.items():
        marked = re.sub(r"(--\w+)", r"`\1`", reason)
        lines.append(f"| `{name}` | no effect: {marked} |")
    return "\n".join(lines) + "\n"


def write_migration_table() -> None:
    """Writes the table into its page: PYTHONPATH=. python tests/test_docs.py"""
    first_line = migration_table().split("\n")[0]
    text = MIGRATION_PAGE.read_text(encoding="utf-8")
    text = re.sub(rf"^{re.escape(first_line)}\n(\|.*\n)+", migration_table(), text, flags=re.M)
    MIGRATION_PAGE.write_text(text, encoding="utf-8")


def test_the_table_of_retired_flags_is_the_script_s():
    assert migration_table() in MIGRATION_PAGE.read_text(encoding="utf-8"), (
        write_migration_table.__doc__
    )


def table_cells(page: Path, heading: str) -> list[str]:
    """The first cell of every line of the table under a heading, without the table's own two
    lines."""
    section = page.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| (.*?) \|", section, re.M)[1:]


def test_the_table_of_metrics_is_complete():
    """The golden scores are of a mix: without a mix there are no names of sets between eval_ and
    the metric."""
    scores = json.loads((PROJECT / "tests" / "golden" / "scores.json").read_text())
    produced = {name for name in scores if re.fullmatch(r"eval_(?!clean_|flawed_).*", name)}
    produced |= {"eval_bleu", "eval_chrf"}  # of translations only
    for rate in ("wer", "cer"):  # newer than the golden scores
        produced |= {f"eval_{rate}_change_low", f"eval_{rate}_change_high"}
    # Of sets with rows in which nobody speaks only.
    produced |= {"eval_invented_words", "eval_invented_words_per_minute", "eval_nonspeech_minutes"}
    cells = table_cells(PROJECT / "docs" / "metrics.md", "Metrics")
    assert set(re.findall(r"`(\w+)`", " ".join(cells))) == produced


def test_the_table_of_exit_codes_is_complete():
    cells = table_cells(PROJECT / "docs" / "long-runs.md", "Exit codes")
    documented = {int(cell) for cell in cells if cell.isdigit()}
    assert documented == {code.value for code in ExitCode}


def heading_anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_every_relative_link_leads_somewhere(page: Path):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in heading_anchors(target), link


def test_every_page_is_reached_from_the_readme_and_leads_back():
    readme = README.read_text(encoding="utf-8")
    assert len(QUESTION_PAGES) >= 10
    for page in QUESTION_PAGES:
        assert f"](docs/{page.name})" in readme, page.name
        assert "](../README.md" in page.read_text(encoding="utf-8"), page.name


if __name__ == "__main__":
    write_migration_table()


def top_level_names(file: Path) -> set[str]:
    """Functions, classes and constants of a module; of a template none."""
    if file.suffix != ".py":
        return set()
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_the_contributors_table_names_what_is_there():
    """'To change X open Y': every file exists, and contains the names in brackets behind it."""
    text = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("| to change | open |")[1].split("\n\n")[0]
    rows = [line.split(" | ")[1] for line in table.splitlines()[2:]]
    place = r"(the script|`[\w/]+[.]\w+`)(?: \(([^)]*)\))?"  # the second group: the names
    found = [match for row in rows for match in re.findall(place, row)]
    assert len(rows) > 30 and len(found) >= len(rows)
    for file_name, names in found:
        file = PROJECT / "speech_finetuning" / file_name.strip("`")
        if file_name == "the script":
            file = PROJECT / SCRIPT_NAME
        assert file.is_file(), file_name
        assert set(re.findall(r"`(\w+)`", names)) <= top_level_names(file), file_name


def reasons_in(module: Path) -> set[str]:
    """The constants that a module gives Rejection as its reason."""
    calls = [
        node
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Rejection"
    ]
    return {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)}


def test_every_reason_of_a_rejection_is_explained():
    modules = (PROJECT / "speech_finetuning").glob("*/*.py")
    reasons = set().union(*map(reasons_in, modules))
    page = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
    table = page.split("| reason | what was found |")[1].split("\n\n")[0]
    explained = [line.split(" | ")[0] for line in table.splitlines()[2:]]
    assert len(reasons) > 10
    assert set(re.findall(r"`(\w+)`", " ".join(explained))) == reasons


ASKING = ("item", "tolist", "cpu", "numpy", "isfinite", "isnan", "isinf", "nonzero", "synchronize")


def functions_that_ask(module: Path) -> set[tuple[str, str]]:
    """(module, function) of every call that would fetch a value from the GPU."""
    found = set()
    name = f"{module.parent.name}/{module.name}"
    for function in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if not isinstance(function, ast.FunctionDef):
            continue
        calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
        if any(isinstance(call, ast.Attribute) and call.attr in ASKING for call in calls):
            found.add((name, function.name))
    return found


def test_every_wait_for_the_gpu_is_listed_with_its_reason():
    page = (PROJECT / "docs" / "gpu-waits.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+/\w+\.py)` \| `(\w+)` \| .+ \| .+ \| .+ \|$", page, re.M)
    package = PROJECT / "speech_finetuning"
    modules = [*package.glob("training/*.py"), *package.glob("model/*.py")]
    asking = set().union(*map(functions_that_ask, modules))
    assert len(asking) >= 4
    assert set(listed) == asking
    assert functions_that_ask(Path(script.__file__)) == set()
