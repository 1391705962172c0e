"""What importing costs, and that imports run one way: from room to room downwards."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ROOMS = {
    "report": "the run file, verdicts, tables and pages of plain numbers",
    "monitor": "which steps, layers and elements; what is kept between steps",
    "distributed": "the same step on several ranks",
    "recipes": "what is stored how",
    "measurement": "tensors, sums, metrics, figures",
    "observation": "the optimizer step that happened",
    "quantization": "formats, rounding, scales",
}
"""From the top floor to the ground floor: each imports only from itself and from rows below."""

CELLAR = {"_messages", "_version"}
"""Imported by any, and importing nothing of the project."""

ROOF = {"", "__main__", "cli"}
"""Above the rooms: the package itself and the command line; no room imports them."""


def project_modules() -> dict[str, Path]:
    files = [*ROOT.glob("altgrad/**/*.py"), *ROOT.glob("altgrad_lightning/**/*.py")]
    names = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


MODULES = project_modules()


def imports_of(file: Path) -> set[str]:
    """Modules of the project that a file imports, in functions and for types, too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert not any(alias.name == "*" for alias in node.names), f"{file}: star import"
            assert node.module is not None
            both = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (both & MODULES.keys()) | {node.module}
    return {name for name in found if name.split(".")[0] in ("altgrad", "altgrad_lightning")}


def place(module: str) -> str:
    """The room, or the module on the roof or in the cellar."""
    package, _, rest = module.partition(".")
    assert package == "altgrad"
    return rest.partition(".")[0]


def floor(module: str) -> int:
    """0 for the cellar, then the rooms, then the roof, then the Lightning package."""
    if module.startswith("altgrad_lightning"):
        return len(ROOMS) + 2
    if place(module) in CELLAR:
        return 0
    if place(module) in ROOF:
        return len(ROOMS) + 1
    return len(ROOMS) - [*ROOMS].index(place(module))


def test_every_module_has_its_place() -> None:
    places = {place(name) for name in MODULES if name.split(".")[0] == "altgrad"}
    assert places == {*ROOMS} | CELLAR | ROOF


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_runs_up(module: str) -> None:
    for imported in imports_of(MODULES[module]):
        assert floor(imported) <= floor(module), f"{module} imports {imported}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: imports_of(file) & MODULES.keys() for name, file in MODULES.items()}
    TopologicalSorter(graph).prepare()


def modules_after(statement: str) -> set[str]:
    script = f"{statement}; import sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_altgrad_imports_torch_and_nothing_more() -> None:
    added = modules_after("import torch, altgrad") - modules_after("import torch")
    foreign = {name for name in added if name.split(".")[0] != "altgrad"}
    # Standard library modules that torch happens not to have imported yet are no cost.
    heavy = {name for name in foreign if name.split(".")[0] not in sys.stdlib_module_names}
    assert heavy == set()


@pytest.mark.parametrize("heavy", ["pytorch_lightning", "lightning", "matplotlib", "tensorboard"])
def test_importing_altgrad_does_not_import(heavy: str) -> None:
    assert heavy not in {name.split(".")[0] for name in modules_after("import altgrad")}
