"""The names that the libraries do not promise: one that changes fails here, by its name."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import accelerate
import datasets
import pytest
import torch
import transformers

from speech_finetuning.training import compat
from speech_finetuning.training.compat import PRIVATE_NAMES, PrivateName

PROJECT = Path(__file__).parents[2]


def find(path: str) -> Any:
    """The object that 'module:Class.name' names. Raises: AttributeError, ImportError."""
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def source_of_module(name: str) -> str:
    """The text of one of our modules, 'training.trainer', or of the script."""
    paths = [PROJECT / "speech_finetuning" / Path(*name.split(".")), PROJECT / name]
    (path,) = [path.with_suffix(".py") for path in paths if path.with_suffix(".py").is_file()]
    return path.read_text(encoding="utf-8")


def last_part(private: PrivateName) -> str:
    return re.split(r"[:.]", private.path)[-1]


@pytest.mark.parametrize("private", PRIVATE_NAMES, ids=lambda private: private.path)
def test_the_installed_library_still_has_the_name(private: PrivateName):
    name = last_part(private)
    if private.is_set_in is None:
        assert find(private.path) is not None or name in vars(find(private.path.rpartition(".")[0]))
        return
    owner = private.path.removesuffix(f".{name}")
    setter = private.is_set_in if ":" in private.is_set_in else f"{owner}.{private.is_set_in}"
    assert re.search(rf"self\.{name}\b.* = ", inspect.getsource(find(setter)))


@pytest.mark.parametrize(
    "private",
    [private for private in PRIVATE_NAMES if private.parameters is not None],
    ids=lambda private: private.path,
)
def test_it_is_called_as_before(private: PrivateName):
    """The parameters that we name come first, and none that follow must be given; an override that
    passes the others on is named in it."""
    found = inspect.signature(find(private.path)).parameters
    assert tuple(found)[: len(private.parameters)] == private.parameters


@pytest.mark.parametrize("private", PRIVATE_NAMES, ids=lambda private: private.path)
def test_the_list_says_where_it_is_used(private: PrivateName):
    for module in private.used_in.split(", "):
        assert re.search(rf"\b{last_part(private)}\b", source_of_module(module)), module


def test_every_private_name_that_is_used_is_listed():
    """Names that begin with an underscore and that we do not define ourselves, and what comes from
    a module whose name begins with one."""
    listed = {part for private in PRIVATE_NAMES for part in re.split(r"[:.]", private.path)}
    listed.add("_exit")  # of os, documented
    unlisted = []
    for path in [*PROJECT.glob("speech_finetuning/*/*.py"), *PROJECT.glob("run_*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        for node in imports:
            if re.search(r"(^|\.)_[a-z]", node.module or ""):
                names = {alias.name for alias in node.names} - listed
                unlisted += [f"{path.name}: {name} of {node.module}" for name in sorted(names)]
        for name in used - defined - listed:
            if name.startswith("_") and not name.startswith("__"):
                unlisted.append(f"{path.name}: {name}")
    assert unlisted == []


def test_datasets_retries_are_switched_off(monkeypatch: pytest.MonkeyPatch):
    names = [name for name in vars(datasets.config) if name.startswith("STREAMING_")]
    for name in names:
        monkeypatch.setattr(datasets.config, name, 99)
    compat.leave_retrying_to_us()
    left = {name for name in names if getattr(datasets.config, name) == 99}
    # How long to wait after the one try to open that is made.
    assert left == {"STREAMING_OPEN_RETRY_INTERVAL"}


class Fake:
    """A trainer's parts that the context managers touch."""

    def __init__(self) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True)
        self.args = transformers.TrainingArguments(use_cpu=True)
        self.model = torch.nn.Linear(1, 1)
        self.deepspeed = None
        self.state = transformers.TrainerState(best_global_step=7)

    def _get_output_dir(self, trial: Any) -> str:
        return self.args.output_dir


def test_a_model_that_is_scored_first_is_not_prepared_afterwards():
    trainer = Fake()
    trainer.accelerator.free_memory()
    with compat.scoring_untrained_model(trainer):
        assert trainer.accelerator._models == [trainer.model]
    assert trainer.accelerator._models == []
    trainer.accelerator._models.append(trainer.model)  # as a training does
    with pytest.raises(ZeroDivisionError), compat.scoring_untrained_model(trainer):
        assert trainer.accelerator._models == [trainer.model]
        _ = 1 / 0
    assert trainer.accelerator._models == [trainer.model]
    trainer.accelerator.free_memory()


def test_checkpoints_go_elsewhere_and_no_best_step_is_known_meanwhile(tmp_path: Path):
    trainer = Fake()
    with (
        pytest.raises(ZeroDivisionError),
        compat.saving_in(trainer, tmp_path / "aside"),
        compat.without_best_step(trainer.state),
    ):
        assert trainer._get_output_dir(None) == str(tmp_path / "aside")
        assert trainer.state.best_global_step is None
        _ = 1 / 0
    assert trainer._get_output_dir(None) == trainer.args.output_dir
    assert trainer.state.best_global_step == 7
