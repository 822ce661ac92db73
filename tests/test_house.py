"""The house: folders are rooms, imports go one way, the front door is light, and nothing grows too long."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ebm_prior"
BACKBONES = ROOT / "backbones"

# Folders and modules of ebm_prior/: each imports from itself and from those before it. A new file needs no edit here.
ROOMS = (
    *("errors", "plain", "settings", "interfaces", "compute", "model", "training", "storage"),
    *("data", "pictures", "evaluation", "runs", "reports", "experiments", "api", "cli"),
)
# The contract kit ships with the library, a guest of its lower floors. Fits have it look at adapters from outside.
KIT = "testing"
ASK_THE_KIT = {"api", "cli"}
MAY_KNOW = {
    "errors",
    "settings",
    "interfaces",
    "compute.randomness",
    "model.backbone",
    "storage.skeleton",
    "storage.weights",
}
"""Of the library, what a backbone may import: the contract and how it is kept, and no energies."""
MATHEMATICS = ("compute", "model", "training")
FILES = {"pathlib", "os", "io", "shutil", "tempfile", "sys", "json"}
OF_FILES = {
    **{"backbone": {"pathlib"}, "prior": {"pathlib"}, "parallel": {"io"}, "memory": {"os", "pathlib"}},
    **{"stopping": {"os", "sys"}, "heartbeat": {"os"}},
}
"""What the mathematics knows of files: signatures, bytes to send, where Linux says how much memory is free, and how a
process ends."""


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}: imports are written in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(path: Path) -> Iterator[str]:
    """What a module imports of the library, without the library's name."""
    return (name.removeprefix("ebm_prior.") for name in imports(path) if name.startswith("ebm_prior."))


def foreign(path: Path) -> set[str]:
    """The packages that a module imports from elsewhere."""
    return {name.split(".")[0] for name in imports(path)} - {"ebm_prior"}


def within(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def test_every_module_is_in_a_room() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found == {*ROOMS, KIT, "__init__", "__main__"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    """Nor does a room take a name from the face, which may be that of any other room."""
    allowed = {*ROOMS[: ROOMS.index(room) + 1], "__version__"} | ({"backbones"} if room == "experiments" else set())
    allowed |= {KIT} if room in ASK_THE_KIT else set()
    paths = modules(PACKAGE / room) if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]
    wrong = [f"{path.relative_to(ROOT)}: {name}" for path in paths for name in own(path) if not within(name, allowed)]
    assert wrong == []


def test_the_kit_knows_the_contract() -> None:
    wrong = [f"{path.name}: {name}" for path in modules(PACKAGE / KIT) for name in own(path)]
    assert [each for each in wrong if not within(each.split(": ")[1], MAY_KNOW | {KIT, "model.checked_images"})] == []


def test_no_modules_import_one_another() -> None:
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in modules(PACKAGE)}
    graph = {name: {other for other in map(module_of, own(path)) if other in paths} for name, path in paths.items()}
    del graph["__init__"]  # which names what it gives out, and imports it when it is asked for
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def module_of(name: str) -> str:
    """`model.prior` of `model.prior.EBMPrior`, and of itself."""
    path = PACKAGE.joinpath(*name.split("."))
    return name if path.with_suffix(".py").exists() else name.rpartition(".")[0]


def test_the_mathematics_knows_torch_and_numpy_alone() -> None:
    for path in (path for room in MATHEMATICS for path in modules(PACKAGE / room)):
        assert foreign(path) <= {"torch", "numpy", *sys.stdlib_module_names}, path.name
        assert foreign(path) & FILES <= OF_FILES.get(path.stem, set()), path.name


def test_click_is_the_command_lines_alone() -> None:
    users = {path for path in modules(PACKAGE) + modules(BACKBONES) if "click" in foreign(path)}
    assert users
    assert {path.parent.name for path in users} == {"cli"}


def test_backbones_know_the_contract_alone() -> None:
    names = [(path, name) for path in modules(BACKBONES) for name in own(path)]
    wrong = [f"{path.relative_to(ROOT)}: {name}" for path, name in names if not within(name, MAY_KNOW | {"backbones"})]
    assert wrong == []


# Sizes.


def lengths() -> Iterator[tuple[type, str, int]]:
    """Every module, class and function, with the lines that it has."""
    for path in modules(PACKAGE) + modules(BACKBONES):
        text, place = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        yield ast.Module, place, len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                assert node.end_lineno is not None
                yield type(node), f"{place}: {node.name}", node.end_lineno - node.lineno + 1


@pytest.mark.parametrize(
    ("kind", "most"),
    [(ast.Module, 400), (ast.ClassDef, 200), (ast.FunctionDef, 60)],
    ids=["module", "class", "function"],
)
def test_nothing_grows_too_long(kind: type, most: int) -> None:
    assert [(place, lines) for each, place, lines in lengths() if each is kind and lines > most] == []


# The front door.

HEAVY = {"torch", "numpy", "scipy", "torchvision", "cleanfid", "matplotlib", "PIL", "safetensors", "tqdm"}


@pytest.mark.parametrize(
    ("program", "may"),
    [
        ("import ebm_prior", set()),
        ("from ebm_prior.cli.main import main; main(['--help'], standalone_mode=False)", {"click"}),
    ],
    ids=["import ebm_prior", "ebm-prior --help"],
)
def test_the_front_door_is_light(program: str, may: set[str]) -> None:
    program += "; import sys; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stderr.splitlines()[-1].split()}
    assert loaded & (HEAVY | {"click"}) == may


# What README.md says of it.


def test_the_readme_shows_the_folders_as_they_are() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Development\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    tree = next(block for language, block in blocks if not language)
    shown = set(re.findall(r"(?<!\S)(\w+)/(?!\w)", tree))
    real = {path.name for top in (ROOT, PACKAGE, BACKBONES) for path in top.iterdir() if any(path.glob("*.py"))}
    assert {"ebm_prior", "backbones", "checkpoints", "tests"} <= real
    assert real <= shown
    assert shown <= real | {"helpers", "benchmarks"}
    assert all((ROOT / "tests" / name).is_dir() for name in ("helpers", "benchmarks"))


def test_tests_mirror_the_folders() -> None:
    """A folder of tests is that of a room or of an adapter, or `helpers` or `benchmarks`."""
    tests = ROOT / "tests"
    assert {path.name for path in tests.iterdir() if any(path.glob("*.py"))} <= {
        *ROOMS,
        *(KIT, "backbones", "helpers", "benchmarks"),
    }
    adapters = {path.name for path in BACKBONES.iterdir() if (path / "__init__.py").exists()}
    assert {path.name for path in (tests / "backbones").iterdir() if any(path.glob("*.py"))} <= adapters


# What the library says.

SPOKEN = {", ", " and ", " or "}  # separators of a list of names
RESULTS = {"reports", "experiments"}  # rooms that write whole tables and pages
WHOLE = {f"ebm_prior/{name}.py" for name in ("errors", "runs/export", "cli/progress", "cli/help")}
"""Modules that list all there is: `few` itself, a prior's card, the numbers of a step, a mistake of our own."""


def unbounded_lists(path: Path) -> Iterator[str]:
    """Places where names are joined for a reader, however many there are: `errors.few` lists ten of them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join"):
            continue
        separator = node.func.value
        if isinstance(separator, ast.Constant) and separator.value in SPOKEN and not bounded(node.args[0]):
            yield f"{path.relative_to(ROOT)}:{node.lineno}"


def bounded(names: ast.expr) -> bool:
    """Whether names are as few as the code says: a slice, a display, a constant of the module, or these mapped."""
    match names:
        case ast.Subscript(slice=ast.Slice(upper=ast.Constant() | ast.Name())) | ast.Tuple() | ast.List():
            return True
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Subscript(value=ast.Name(id=name)):
            return name.isupper()
        case ast.Call(func=ast.Name(id="sorted" | "get_args"), args=[inner, *_]):
            return bounded(inner) or names.func.id == "get_args"  # type: ignore[attr-defined]
        case ast.Call(func=ast.Name(id="map"), args=[_, inner]):
            return bounded(inner)
        case ast.GeneratorExp(generators=[ast.comprehension(iter=inner)]):
            return bounded(inner)
    return False


def test_no_message_lists_more_than_ten_names() -> None:
    paths = [path for path in modules(PACKAGE) + modules(BACKBONES) if path.parent.name not in RESULTS]
    paths = [path for path in paths if path.relative_to(ROOT).as_posix() not in WHOLE]
    assert [place for path in paths for place in unbounded_lists(path)] == []
