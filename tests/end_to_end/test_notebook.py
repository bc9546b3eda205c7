"""The notebook runs from top to bottom, and its flags for a real run are accepted."""

import re
from pathlib import Path

import pytest

import run_speech_recognition_seq2seq_streaming as script

nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-test.txt")
nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-test.txt")
NOTEBOOK = Path(script.__file__).parent / "notebooks" / "fine_tune_whisper.ipynb"
# For Colab and Kaggle; its outputs are stored.
RECORDINGS = NOTEBOOK.with_name("train_on_your_recordings.ipynb")


def printed(cell: dict) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def test_no_output_is_committed():
    cells = [
        cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"
    ]
    assert len(cells) > 10
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_the_flags_of_a_real_run_are_accepted():
    prose = [
        cell.source
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells
        if cell.cell_type == "markdown"
    ]
    (flags,) = re.findall(r'flags = """(.*?)"""', "\n".join(prose), re.S)
    _, data_args, args = script.parse_arguments(flags.split())
    script.check_arguments(data_args, args)
    assert args.do_train and args.max_steps == 2000 and data_args.dataset_config_name == "spanish"


@pytest.mark.slow
def test_the_notebook_runs_and_its_model_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in (
        "HOME",
        "TMPDIR",
        "IPYTHONDIR",
        "JUPYTER_RUNTIME_DIR",
    ):  # the kernel leaves nothing elsewhere
        monkeypatch.setenv(name, str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    (table,) = (
        printed(cell) for cell in notebook.cells if cell.source.startswith("print(score_table")
    )
    before, after = (float(line.split()[2]) for line in table.splitlines()[1:3])
    assert before >= 100 and after < 25
    assert re.search(r"^said: +(\S.*)\nheard: \1$", printed(notebook.cells[-1]), re.M)


def test_stored_outputs_are_those_of_a_whole_run_and_tell_no_place():
    cells = nbformat.read(RECORDINGS, as_version=4).cells
    cells = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert kinds == {"stream", "execute_result"}
    text = "".join(map(printed, cells))
    assert re.search(r"after training +\d\.\d\d ", text) and "uno tres cinco" in text
    assert not re.search(r"/(?:home|root|tmp|work|Users)\b|hf_\w", str([c.outputs for c in cells]))


@pytest.mark.slow
def test_the_notebook_for_colab_runs_without_recordings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked_python: str
):
    """The kernel is real; what it starts, four times, has its imports done."""
    for name in ("HOME", "TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    (tmp_path / "project").symlink_to(NOTEBOOK.parents[1])
    notebook = nbformat.read(RECORDINGS, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("--max_steps 300", "--max_steps 2").replace(
            "--train 1000 --validation 50", "--train 8 --validation 4"
        )
        if "pip" in cell.source:  # nothing is installed here
            cell.source = f"import torch\nsys.executable = {forked_python!r}"
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    text = "".join(map(printed, (cell for cell in notebook.cells if cell.cell_type == "code")))
    assert "usable rows" in text and "after training" in text and "not pushed" in text
    assert (tmp_path / "whisper-mine" / "model.safetensors").is_file()


def test_the_flags_of_a_run_on_recordings_are_accepted():
    cells = nbformat.read(RECORDINGS, as_version=4).cells
    (push,) = re.findall(r'push = "(.*?)"', "\n".join(cell.source for cell in cells))
    recipe = NOTEBOOK.parents[1] / "recipes" / "one-hour-lora.yaml"
    flags = (
        f"--config {recipe} --dataset_name speech --language sw --output_dir out {push} USER/NAME"
    )
    _, data_args, args = script.parse_arguments(flags.split())
    script.check_arguments(data_args, args)
    assert args.do_train and args.push_to_hub and args.hub_private_repo
