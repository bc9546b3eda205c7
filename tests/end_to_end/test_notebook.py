"""The notebook runs from top to bottom, and its flags for a real run are accepted."""

import re
from pathlib import Path

import pytest

import run_speech_recognition_seq2seq_streaming as script

nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-test.txt")
nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-test.txt")
NOTEBOOK = Path(script.__file__).parent / "notebooks" / "fine_tune_whisper.ipynb"


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
