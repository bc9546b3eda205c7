"""The house: its floors, and how large a room may be. See speech_finetuning/__init__.py for the
plan."""

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
SCRIPT = PROJECT / "run_speech_recognition_seq2seq_streaming.py"
PACKAGE = PROJECT / "speech_finetuning"
FLOORS = ["base", "data", "model", "scoring", "training", "sharing", "cli"]
MODULES = sorted(PACKAGE.glob("*/*.py"))
MAX_LINES_OF_MODULE = 450
MAX_LINES_OF_SCRIPT = 850
MAX_LINES_OF_FUNCTION = 50


def name_of(module: Path) -> str:
    """'data.stream' of speech_finetuning/data/stream.py."""
    return ".".join(module.relative_to(PACKAGE).with_suffix("").parts)


def imported_names(module: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere, also within functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide the floor"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(module: Path) -> set[str]:
    """Rooms of the package that a module imports, as 'data.stream'."""
    rooms = {name_of(path) for path in MODULES}
    prefix = f"{PACKAGE.name}."
    names = {
        name.removeprefix(prefix) for name in imported_names(module) if name.startswith(prefix)
    }
    return names & rooms


def functions(module: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [n for n in ast.walk(ast.parse(module.read_text("utf-8"))) if isinstance(n, kinds)]


def test_every_room_is_on_a_known_floor():
    assert {module.parent.name for module in MODULES} == set(FLOORS)


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_a_room_imports_only_what_stands_to_its_left(module: Path):
    floor = FLOORS.index(module.parent.name)
    above = [room for room in own_imports(module) if FLOORS.index(room.split(".")[0]) > floor]
    assert above == []
    assert SCRIPT.stem not in imported_names(module), "nothing in the package imports the script"


def test_no_rooms_import_each_other_in_a_circle():
    imports = {name_of(module): own_imports(module) for module in MODULES}
    while leaves := [room for room, needed in imports.items() if not needed]:
        for leaf in leaves:
            del imports[leaf]
        imports = {room: needed - set(leaves) for room, needed in imports.items()}
    assert imports == {}


def floor_plan(text: str) -> set[str]:
    """'data.stream' and so on: what stands between a floor's name and the colon after its
    modules."""
    rooms = set()
    for floor in FLOORS:
        (names,) = re.findall(rf"^ +{floor}/? +([\w,\s]+):", text, re.M)
        rooms |= {f"{floor}.{name}" for name in re.findall(r"\w+", names)}
    return rooms


@pytest.mark.parametrize(
    "plan", [PROJECT / "CONTRIBUTING.md", PACKAGE / "__init__.py"], ids=lambda path: path.name
)
def test_the_floor_plan_is_the_package(plan: Path):
    """In CONTRIBUTING.md and in the package's docstring: every room, and none that is gone."""
    rooms = {name_of(path) for path in MODULES if path.name != "__init__.py"}
    assert floor_plan(plan.read_text(encoding="utf-8")) ^ rooms == set()


def test_a_floor_re_exports_nothing():
    for module in PACKAGE.glob("*/__init__.py"):
        assert ast.parse(module.read_text("utf-8")).body == [], module


@pytest.mark.parametrize("module", [SCRIPT, *MODULES], ids=lambda path: path.stem)
def test_a_room_can_be_read_in_a_sitting(module: Path):
    limit = MAX_LINES_OF_SCRIPT if module == SCRIPT else MAX_LINES_OF_MODULE
    assert len(module.read_text("utf-8").splitlines()) <= limit


@pytest.mark.parametrize("module", [SCRIPT, *MODULES], ids=lambda path: path.stem)
def test_functions_are_short_typed_and_not_nested(module: Path):
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions(module)}
    assert {n: length for n, length in lengths.items() if length > MAX_LINES_OF_FUNCTION} == {}
    assert [node.name for node in functions(module) if node.returns is None] == []
    for node in functions(module):
        nested = [
            n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef) and n is not node
        ]
        assert nested == [], f"nested in {node.name}"
