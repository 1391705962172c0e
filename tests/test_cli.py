"""The command line: formats, help texts, and errors if libraries are missing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from altgrad import __version__
from altgrad.quantization import FORMATS
from tests.command_line import altgrad
from tests.report.runs import write_run


def run(*arguments: str, setup: str = "") -> subprocess.CompletedProcess[str]:
    script = f"{setup}\nimport sys; sys.argv = ['altgrad', *{list(arguments)!r}]\n"
    script += "from altgrad.cli import main; main()"
    environment = {"COLUMNS": "80", "PATH": ""}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )


def slow(value: Any) -> Any:
    """Mark a case slow, as each starts Python."""
    return pytest.param(value, marks=pytest.mark.slow)


def test_formats_prints_every_format_in_80_columns() -> None:
    result = altgrad("formats")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    rows = {line.split()[0]: " ".join(line.split()) for line in lines if line.strip()}
    assert set(FORMATS) <= set(rows)
    assert rows["e4m3fn"] == "e4m3fn 8 4 3 7 448 2^-6 2^-9 2^-3 nan"
    assert rows["e5m2"] == "e5m2 8 5 2 15 57344 2^-14 2^-16 2^-2 inf nan"
    assert rows["e0m7"] == "e0m7 8 0 7 1 0.99219 none 2^-7 2^-7"
    assert "…" not in result.stdout
    assert max(map(len, lines)) <= 80


def test_the_version_is_printed() -> None:
    shown = altgrad("--version")
    assert (shown.returncode, shown.stdout) == (0, f"altgrad {__version__}\n")
    assert "--version" in altgrad("--help").stdout


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("reprot", "did you mean report?"),
        ("fromats", "did you mean formats?"),
        ("Compare", "did you mean compare?"),
        ("xyz\n", "run altgrad --help"),
    ],
)
def test_a_misspelt_command_is_answered_with_the_nearest(name: str, remedy: str) -> None:
    failed = altgrad(name, "folder")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert "expected one of the commands formats, report, compare" in failed.stderr
    assert failed.stderr.endswith(f"; {remedy}\n")
    assert failed.stderr[:-1].isprintable()


def test_a_misspelt_option_is_answered_with_the_nearest() -> None:
    failed = altgrad("report", "folder", "--jsn")
    assert failed.returncode == 2
    assert "--json" in failed.stderr


def test_python_m_altgrad_runs_the_altgrad_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "altgrad", "--help"], capture_output=True, text=True, check=True
    )
    assert "formats" in result.stdout
    assert "demo" in result.stdout


NOT_INSTALLED = "import importlib.metadata as it; it.entry_points = lambda **_: ()"


def test_a_checkout_that_is_not_installed_has_the_commands_of_its_package() -> None:
    shown = run("--help", setup=NOT_INSTALLED).stdout
    assert all(command in shown for command in ("formats", "report", "compare"))
    for command in ("report", "compare"):
        result = run(command, "--help", setup=NOT_INSTALLED)
        assert (result.returncode, "Usage" in result.stdout) == (0, True), result.stderr


def test_an_entry_point_does_not_replace_a_command_of_the_package() -> None:
    other = "it.EntryPoint('report', 'math:no_such_name', 'altgrad.commands')"
    setup = f"import importlib.metadata as it; it.entry_points = lambda **_: [{other}] * 2"
    shown = run("--help", setup=setup).stdout
    assert shown.count("report ") == 1
    assert "Not available here" not in shown


def test_no_argument_shows_the_help() -> None:
    result = altgrad()
    assert "formats" in result.stdout + result.stderr


@pytest.mark.parametrize("arguments", [("formats",), ("demo",)])
def test_without_typer_the_error_is_one_line_with_the_remedy(arguments: tuple[str, ...]) -> None:
    result = run(*arguments, setup="import sys; sys.modules['typer'] = None")
    assert result.returncode == 1
    assert result.stderr.strip().endswith("pip install 'altgrad[demo]'")
    assert "Traceback" not in result.stderr


def test_without_lightning_every_command_but_the_demo_works() -> None:
    setup = "import sys; sys.modules.update(pytorch_lightning=None, lightning=None)"
    demo = run("demo", "--steps", "20", setup=setup)
    assert demo.returncode == 1
    assert "pip install 'altgrad[demo]'" in demo.stderr
    assert run("formats", setup=setup).returncode == 0


def test_formats_works_without_the_package_of_the_demo() -> None:
    setup = "import sys; sys.modules['altgrad_lightning'] = None"
    assert run("formats", setup=setup).returncode == 0
    assert "Not available here" in run("--help", setup=setup).stdout


@pytest.mark.parametrize(
    "command", [(), ("report",), ("compare",), ("formats",), ("demo",)], ids=str
)
def test_every_help_text_fits_80_columns_and_is_complete(command: tuple[str, ...]) -> None:
    shown = altgrad(*command, "--help")
    assert shown.returncode == 0, shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert "…" not in shown.stdout
    assert "..." not in shown.stdout.replace("COMMAND [ARGS]...", "")


# --- any output


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), ["名前"], ["b\ud800"])


@pytest.mark.parametrize("encoding", [*map(slow, ["latin-1", "cp1252"]), "ascii", "utf-8"])
def test_a_report_is_printed_in_any_encoding(run_file: Path, encoding: str) -> None:
    result = write_to(subprocess.PIPE, "report", run_file, encoding=encoding)
    assert (result.returncode, result.stderr) == (0, b"")
    assert ("名前" in result.stdout.decode(encoding)) is (encoding == "utf-8")


@pytest.mark.parametrize(
    "command", [["compare"], ["formats"], slow(["--help"]), slow(["report", "--help"])]
)
def test_every_command_prints_in_ascii(run_file: Path, command: list[str]) -> None:
    paths = [run_file, run_file] if command == ["compare"] else []
    result = write_to(subprocess.PIPE, *command, *paths, encoding="ascii")
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.isascii()


def test_json_on_stdout_is_utf_8_in_any_encoding(run_file: Path) -> None:
    result = write_to(subprocess.PIPE, "report", run_file, "--json=-", encoding="ascii")
    assert {*json.loads(result.stdout)["layers"]} == {"名前", "b\ud800"}
    assert "名前" in result.stdout.decode("utf-8")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this device")
@pytest.mark.parametrize("option", ["--layers=0", slow("--json=-"), slow("--help")])
def test_a_full_disk_behind_stdout_is_one_sentence(run_file: Path, option: str) -> None:
    with Path("/dev/full").open("wb") as full:
        result = write_to(full, "report", run_file, option)
    assert result.returncode == 2
    assert result.stderr == b"altgrad: output cannot be written (No space left on device)\n"


@pytest.mark.skipif(os.name != "posix", reason="a pipe of POSIX")
def test_a_reader_that_has_seen_enough_ends_the_command_silently(run_file: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        result = write_to(closed, "report", run_file)
    assert (result.returncode, result.stderr) == (1, b"")


def test_a_closed_stdout_is_no_error(run_file: Path) -> None:
    setup = "import sys; sys.stdout = None"
    assert run("report", str(run_file), setup=setup).returncode == 0


def write_to(
    stdout: Any, *arguments: object, encoding: str = "utf-8"
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "altgrad", *map(str, arguments)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={"COLUMNS": "80", "PATH": "", "PYTHONIOENCODING": encoding},
        check=False,
    )
