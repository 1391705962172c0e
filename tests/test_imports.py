"""Imports run one way, from room to room downwards, and load little."""

import ast
import importlib
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN = str(ROOT / "tests" / "golden" / "data" / "altgrad.jsonl")

ROOMS = (
    "integrations",
    "output",
    "report",
    "monitor",
    "distributed",
    "twins",
    "recipes",
    "measurement",
    "observation",
    "quantization",
)
"""Rooms from the top floor to the ground floor; each imports only from itself and rows below."""

CELLAR = {"_lazy", "_messages", "_version"}
"""Modules that every room may import, and that import no module of the project."""

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


def find_imports(file: Path) -> set[str]:
    """Return the project's modules that a file imports, also in functions and for types."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert not any(alias.name == "*" for alias in node.names), f"{file}: star import"
            assert node.module is not None
            both = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = both & MODULES.keys()
            found |= modules
            if modules != both:  # names of the package itself
                found.add(node.module)
    return {name for name in found if name.split(".")[0] in ("altgrad", "altgrad_lightning")}


def place(module: str) -> str:
    """Return the room, or the module on the roof or in the cellar."""
    return module.partition(".")[2].partition(".")[0]


def floor(module: str) -> int:
    """Return 0 for the cellar, then the rooms, then the roof, then the Lightning package."""
    if module.startswith("altgrad_lightning"):
        return len(ROOMS) + 2
    if place(module) in CELLAR:
        return 0
    if place(module) in ROOF:
        return len(ROOMS) + 1
    return len(ROOMS) - ROOMS.index(place(module))


def test_the_ground_plan_lists_the_rooms_from_top_to_bottom() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"(?m)^\| `altgrad/(\w+)/` \|.*\| (.*) \|$", text)
    assert tuple(room for room, _ in rows) == ROOMS
    for room, files in rows:
        for name in re.findall(r"`(\w+)`", files):
            assert f"altgrad.{room}.{name}" in MODULES


def test_every_module_has_a_place_in_the_plan() -> None:
    places = {place(name) for name in MODULES if name.split(".")[0] == "altgrad"}
    assert places == {*ROOMS} | CELLAR | ROOF


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_downwards(module: str) -> None:
    for imported in find_imports(MODULES[module]):
        assert floor(imported) <= floor(module), f"{module} imports {imported}"


def test_imports_have_no_cycles() -> None:
    graph = {name: find_imports(file) & MODULES.keys() for name, file in MODULES.items()}
    TopologicalSorter(graph).prepare()


def test_the_lightning_package_imports_only_public_names() -> None:
    for module, file in MODULES.items():
        if not module.startswith("altgrad_lightning"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "altgrad":
                public = {*importlib.import_module(node.module).__all__}
                names = {alias.name for alias in node.names}
                assert names <= public, f"{module} imports {names - public} from {node.module}"


# --- names that are imported on first use

LAZY = ("altgrad", "altgrad.quantization", "altgrad.recipes", "altgrad.report")


def typed_names(package: str) -> dict[str, str]:
    """Map each name that editors and mypy see to the module that defines it."""
    for node in ast.parse(MODULES[package].read_text()).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            imports = [each for each in node.body if isinstance(each, ast.ImportFrom)]
            return {
                alias.name: str(each.module)
                for each in imports
                for alias in each.names
                if alias.asname is None  # names with an alias are rooms
            }
    raise AssertionError(f"{package} has no TYPE_CHECKING block")


@pytest.mark.parametrize("package", LAZY)
def test_editors_see_the_names_that_python_finds(package: str) -> None:
    module, typed = importlib.import_module(package), typed_names(package)
    assert {*module.__all__} - {"__version__"} == {*typed}
    for name, source in typed.items():
        assert getattr(module, name) is getattr(importlib.import_module(source), name)
    own = (name.rpartition(".") for name in MODULES)
    submodules = {name for parent, _, name in own if parent == package}
    assert not submodules & {*module.__all__}, "a module would hide the name"


@pytest.mark.parametrize("package", LAZY)
def test_names_are_listed_before_they_are_used(package: str) -> None:
    script = f"import {package} as it; assert {{*it.__all__}} <= {{*dir(it)}}"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("package", [*LAZY, "altgrad_lightning"])
def test_an_unknown_name_is_an_attribute_error(package: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        getattr(importlib.import_module(package), "nothing")  # noqa: B009 - as a user would


@pytest.mark.slow
def test_mypy_reports_missing_names(tmp_path: Path) -> None:
    """Check with a missing name: a `__getattr__` visible to mypy would make every name Any."""
    lines = [
        "import altgrad",
        "from altgrad import UpdateMonitr",
        "from altgrad.report import Verdct",
        "from altgrad_lightning import PrecisionMonitr",
        "altgrad.report.rad",
        "altgrad.quantization.quantise",
        "altgrad.report.read, altgrad.measurement.get_metric, altgrad.observation.StepObserver",
    ]
    file = tmp_path / "names.py"
    file.write_text("\n".join(lines))
    mypy = pytest.importorskip("mypy.api", reason="mypy is of the dev extra alone")
    report, _, _ = mypy.run(["--strict", str(file), "--cache-dir", str(tmp_path / "cache")])
    wrong = {int(line.split(":")[1]) for line in report.splitlines() if ": error:" in line}
    assert wrong == {2, 3, 4, 5, 6}, report


def test_rooms_are_attributes_of_the_package() -> None:
    statement = "import altgrad; assert altgrad.quantization.E4M3.max == 448; altgrad.report.read"
    assert "torch" not in modules_after(statement)


@pytest.mark.parametrize(
    "first_use",
    [pytest.param("altgrad.UpdateMonitor", marks=pytest.mark.slow), "from altgrad import *"],
)
def test_names_can_be_first_used_under_another_default_device(first_use: str) -> None:
    """Check that tensors in modules are on the CPU under any default device."""
    script = f"""
import torch, altgrad
with torch.device("meta"):
    exec({first_use!r})
import altgrad.distributed.shards
layer = torch.nn.Linear(30, 30)
optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
with altgrad.UpdateMonitor(layer, strict=True).attach(optimizer) as monitor:
    layer(torch.ones(2, 30)).sum().backward()
    optimizer.step()
    with torch.device("meta"):
        (_, bits), *_ = monitor.state_dict()["ever_moved"].values()
assert bits.device.type == "cpu"
for name in [*sys.modules]:
    if name.startswith("altgrad"):
        for value in vars(sys.modules[name]).values():
            assert not isinstance(value, torch.Tensor), (name, value)
"""
    subprocess.run([sys.executable, "-c", "import sys" + script], check=True)


def test_submodules_of_the_contract_are_attributes() -> None:
    module = importlib.import_module("altgrad.quantization")
    own = {name.rpartition(".")[2] for name in MODULES if name.startswith("altgrad.quantization.")}
    for name in own:
        assert getattr(module, name).__name__ == f"altgrad.quantization.{name}"


def test_the_callbacks_are_listed_before_they_are_used() -> None:
    names = {*dir(importlib.import_module("altgrad_lightning"))}
    assert {"PrecisionMonitor", "StoreAs"} <= names


# --- modules that an import loads


def modules_after(statement: str) -> set[str]:
    script = f"{statement}; import sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def heavy_modules_after(statement: str) -> set[str]:
    """Return the modules outside altgrad and the standard library."""
    tops = {name.partition(".")[0] for name in modules_after(statement)}
    return tops - sys.stdlib_module_names - STARTED


STARTED = {name.partition(".")[0] for name in modules_after("pass")} | {"altgrad"}
"""Modules that a fresh interpreter holds before any import."""


def test_importing_altgrad_loads_no_heavy_module() -> None:
    assert heavy_modules_after("import altgrad") == set()


def test_measuring_loads_only_torch_and_numpy() -> None:
    """Import all in one process, as torch takes seconds, and list the modules after each import."""
    script = """
import sys, torch, numpy
print(*sys.modules)
from altgrad import UpdateMonitor, WeightStorage, measure, model_figures
print(*sys.modules)
from altgrad import *
print(*sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    both, measuring, every = (
        {name.partition(".")[0] for name in line.split()} for line in run.stdout.splitlines()
    )
    assert {"torch", "numpy"} <= both
    added = sys.stdlib_module_names | STARTED
    assert measuring - both <= added
    assert every - both - added <= {"filelock"}  # for the run file


NO_TORCH = {"torch", "pytorch_lightning", "lightning", "altgrad_lightning.callback"}


@pytest.mark.parametrize(
    "statement",
    [
        "import altgrad.report",
        "from altgrad.quantization import BLOCK_FORMATS, FORMATS, FloatFormat, get_formats",
        "from altgrad.quantization.format_set import FormatSet; FormatSet(['bf16', 'nvfp4'])",
        "import altgrad.cli",
    ],
)
def test_a_statement_without_tensors_loads_neither_torch_nor_numpy(statement: str) -> None:
    assert not {*NO_TORCH, "numpy"} & modules_after(statement)


def test_all_names_of_reports_load_no_torch() -> None:
    """NumPy is loaded: it decodes the figures of a run file."""
    assert not NO_TORCH & modules_after("from altgrad.report import *")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["report", RUN], ["compare", RUN, RUN], ["formats"]]
)
def test_commands_do_not_load_torch(arguments: list[str]) -> None:
    script = f"""
import sys
sys.argv = ["altgrad", *{arguments!r}]
from altgrad.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", *sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    output, _, loaded = run.stdout.rpartition("loaded:")
    assert output
    assert not NO_TORCH & {*loaded.split()}
    assert arguments != ["formats"] or "numpy" not in loaded.split()


def test_making_a_page_does_not_import_torch(tmp_path: Path) -> None:
    page = f"RunReport.from_run(read({RUN!r}))"
    statement = f"from altgrad.report import RunReport, page, read; page({page})"
    assert not NO_TORCH & modules_after(statement)
