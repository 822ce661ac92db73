"""Rooms and who may call whom: imports go one way, and `import ebm_prior` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ebm_prior"

# From the mathematics to the command line; a module imports from its own room and those before it.
ROOMS = (
    {"errors", "randomness", "parallel", "cuda_graphs"},
    {"backbone", "energy", "samplers", "objectives", "metrics", "detection", "batch_norm"},
    {
        "scores",
        "prior",
        "training",
        "stages",
        "recipes",
        "draws",
        "fit",
        "pretrain",
        "joint_config",
        "joint_loss",
        "joint",
        "gauge",
    },
    {"files", "weights", "registry", "checkpoint", "image_files", "data", "runs"}
    | {"figures", "plots", "pages", "classifier", "inception"},
    {
        "fid",
        "evaluate",
        "outliers",
        "doctor",
        "show",
        "options",
        "sources",
        "memory",
        "commands",
        "joint_run",
        "pretrain_run",
        "jobs",
        "anomaly_table",
        "latents_2d",
        "ablations",
    }
    | {"report", "findings", "web_page", "run_report", "demo", "progress", "allocator"},
    {"command_line", "training_commands", "reading_commands", "experiment_commands", "cli", "__main__"},
)


def imports(path: Path, *, at_the_top: bool = False) -> set[str]:
    """Dotted names of what a module imports: anywhere in it, or only when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in tree.body if at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_modules(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("ebm_prior.")}


def room(module: str) -> int:
    return next(number for number, modules in enumerate(ROOMS) if module in modules)


MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def test_every_module_has_a_room() -> None:
    assert sorted(set().union(*ROOMS) & set(MODULES)) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    known = set().union(*ROOMS)
    later = {name for name in own_modules(PACKAGE / f"{module}.py") & known if room(name) > room(module)}
    assert not later, f"{module} imports {', '.join(sorted(later))} of a later room"


@pytest.mark.parametrize("module", sorted(ROOMS[0] | ROOMS[1] | ROOMS[2]))
def test_the_mathematics_knows_torch_and_numpy_only(module: str) -> None:
    outside = {name.split(".")[0] for name in imports(PACKAGE / f"{module}.py")} - {"ebm_prior"}
    foreign = {name for name in outside if name not in sys.stdlib_module_names} - {"torch", "numpy"}
    assert not foreign
    assert not outside & {"pathlib", "os", "io", "shutil", "tempfile", "sys", "json"} - (
        {"backbone": {"pathlib"}, "parallel": {"io"}}.get(module, set())  # load_official's signature; bytes to send
    )


def test_click_is_the_command_lines_alone() -> None:
    users = {path.stem for path in PACKAGE.rglob("*.py") if "click" in {n.split(".")[0] for n in imports(path)}}
    assert users == {"options", "command_line", "training_commands", "reading_commands", "experiment_commands", "cli"}


def test_backbones_know_the_contract_and_no_energies() -> None:
    for path in (ROOT / "backbones").glob("*.py"):
        assert own_modules(path) <= {"backbone", "errors", "randomness", "weights"}, path.name


def test_import_is_light() -> None:
    """Nor must `ebm-prior --help` wait for clean-fid or torchvision, which only some commands need."""
    program = "import sys, ebm_prior; print(*sys.modules); import ebm_prior.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    library, commands = ({name.split(".")[0] for name in line.split()} for line in done.stdout.splitlines())
    assert "torch" in library
    assert not library & {"torchvision", "cleanfid", "matplotlib", "click", "safetensors", "scipy", "PIL"}
    assert not commands & {"torchvision", "cleanfid", "matplotlib"}
