"""A parser of the script's flags, read from the source of the script, of this package and of
transformers.

Importing transformers' TrainingArguments takes seconds (benchmarks/early_exit.md), which is too long
for --help or a misspelt flag. The fields of its dataclasses say all that argparse needs, and `ast`
reads them in a tenth of a second. A test compares the result with HfArgumentParser's.
"""

import argparse
import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any, cast

from speech_finetuning.base.errors import UserError
from speech_finetuning.cli.flags import OneLineErrors

LIBRARY_CLASSES = {
    "training_args.py": "TrainingArguments",
    "training_args_seq2seq.py": "Seq2SeqTrainingArguments",
}
FILES_WITH_ENUMS = ("training_args.py", "trainer_utils.py")
OUR_CLASSES = ("TrainingArguments", "ModelArguments")
DATA = Path(__file__).parents[1] / "data"


def read_parser(script: Path) -> OneLineErrors:
    """The parser of the script's three dataclasses and of what they inherit."""
    specification = importlib.util.find_spec("transformers")  # finds it, imports nothing
    if specification is None or specification.origin is None:
        raise UserError("transformers is not installed. Run pip install -r requirements.txt.")
    library = Path(specification.origin).parent
    fields: dict[str, ast.AnnAssign] = {}
    for file, class_name in LIBRARY_CLASSES.items():
        fields |= read_fields(library / file, class_name)
    for class_name in OUR_CLASSES:
        fields |= read_fields(script, class_name)
    fields |= read_fields(DATA / "prompts.py", "PromptArguments")
    fields |= read_fields(script, "SourceArguments")
    fields |= read_fields(DATA / "augmentation.py", "AugmentationArguments")
    fields |= read_fields(script, "DataArguments")
    enums: dict[str, list[str]] = {}
    for file in FILES_WITH_ENUMS:
        enums |= read_enums(library / file)
    parser = OneLineErrors(add_help=False, allow_abbrev=False)
    for name, node in fields.items():
        add_flag(parser, name, node, enums)
    return parser


@functools.cache
def parse(file: Path) -> ast.Module:
    """The syntax of a source file; several classes of one are asked for."""
    return ast.parse(file.read_text(encoding="utf-8"))


def read_fields(file: Path, class_name: str) -> dict[str, ast.AnnAssign]:
    """{name: its declaration} of the fields of a dataclass, in their order."""
    for node in parse(file).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            declared = [entry for entry in node.body if isinstance(entry, ast.AnnAssign)]
            return {cast(ast.Name, entry.target).id: entry for entry in declared if is_flag(entry)}
    raise AssertionError(f"{file} has no class {class_name}")


def is_flag(node: ast.AnnAssign) -> bool:
    """Whether a field is one of the command line's: not a class variable, not init=False."""
    if not isinstance(node.target, ast.Name) or "ClassVar" in ast.unparse(node.annotation):
        return False
    return read_settings(node).get("init", True)


def read_enums(file: Path) -> dict[str, list[str]]:
    """{class: its values} of the enumerations in a file, whose values are strings."""
    enums = {}
    for node in parse(file).body:
        if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(b) for b in node.bases):
            values = [literal(entry.value) for entry in node.body if isinstance(entry, ast.Assign)]
            enums[node.name] = values
    return enums


class Source(str):
    """An expression that is no constant: its source."""


def literal(node: ast.expr) -> Any:
    """The value of a constant expression; of any other its source."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return Source(ast.unparse(node))


def read_settings(node: ast.AnnAssign) -> dict[str, Any]:
    """The keywords of HfArg(...), or of field(..., metadata={...}) with those of the metadata."""
    settings = {}
    for entry in node.value.keywords if isinstance(node.value, ast.Call) else []:
        if isinstance(entry.value, ast.Dict):
            for key, value in zip(entry.value.keys, entry.value.values, strict=True):
                assert key is not None  # as of {**others}
                settings[literal(key)] = literal(value)
        else:
            settings[entry.arg] = literal(entry.value)
    return settings


def add_flag(
    parser: argparse.ArgumentParser, name: str, node: ast.AnnAssign, enums: dict[str, list[str]]
) -> None:
    """Adds a field to a parser, as HfArgumentParser would."""
    settings = read_settings(node)
    default = [] if settings.get("default_factory") == "list" else settings.get("default")
    options: dict[str, Any] = {"default": default, "help": settings.get("help")}
    options |= options_of_kind(ast.unparse(node.annotation), enums)
    for key in ("nargs", "const", "choices"):
        if key in settings and not isinstance(settings[key], Source):
            options[key] = settings[key]
    names = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
    parser.add_argument(*names, dest=name, **options)
    if options.get("type") is truth_value and options["default"] is True:
        opposites = [option.replace("--", "--no_", 1) for option in names]
        parser.add_argument(*opposites, dest=name, action="store_false", default=True)


def options_of_kind(annotation: str, enums: dict[str, list[str]]) -> dict[str, Any]:
    """argparse's type, nargs, const and choices for a field's type, as 'int | None'."""
    kinds = annotation.split(" | ")
    if annotation.startswith("Literal["):
        listed = annotation.removeprefix("Literal").removesuffix(" | None")
        choices = ast.parse(listed, mode="eval").body
        return {"choices": literal(choices)}
    for kind in kinds:
        if kind in enums:
            return {"choices": enums[kind]}
    if "bool" in kinds and "None" in kinds:
        return {"type": truth_value}
    if "bool" in kinds:
        return {"type": truth_value, "nargs": "?", "const": True}
    takes_list = any(kind.startswith("list[") for kind in kinds)
    if takes_list and kinds[0] != "None":  # else HfArgumentParser takes one word
        return {"nargs": "+", "type": float if "list[float]" in kinds else str}
    for kind, type_ in (("int", int), ("float", float)):
        if kind in kinds:
            return {"type": type_}
    return {"type": str}


def truth_value(word: str) -> bool:
    """As HfArgumentParser reads it. Raises: argparse.ArgumentTypeError."""
    if word.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if word.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, found {word!r}")
