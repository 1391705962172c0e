"""The command line: formats, the demo's entry point, and what it says without its libraries."""

import subprocess
import sys

import pytest

from altgrad.quantization import FORMATS


def run(*arguments: str, setup: str = "") -> subprocess.CompletedProcess[str]:
    script = f"{setup}\nimport sys; sys.argv = ['altgrad', *{list(arguments)!r}]\n"
    script += "from altgrad.cli import main; main()"
    environment = {"COLUMNS": "140", "PATH": ""}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )


def test_formats_prints_every_format_with_its_maximum() -> None:
    result = run("formats")
    assert result.returncode == 0, result.stderr
    rows = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if "│" in line}
    assert set(FORMATS) <= set(rows)
    assert " 448 " in rows["e4m3fn"]
    assert "float8_e4m3fn" in rows["e4m3fn"]
    assert " 57344 " in rows["e5m2"]
    assert " none " in rows["e0m7"]


def test_python_m_altgrad_is_the_same_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "altgrad", "--help"], capture_output=True, text=True, check=True
    )
    assert "formats" in result.stdout
    assert "demo" in result.stdout


def test_no_argument_shows_the_help() -> None:
    result = run()
    assert "formats" in result.stdout + result.stderr


@pytest.mark.parametrize("arguments", [("formats",), ("demo",)])
def test_without_typer_one_line_names_the_remedy(arguments: tuple[str, ...]) -> None:
    result = run(*arguments, setup="import sys; sys.modules['typer'] = None")
    assert result.returncode == 1
    assert result.stderr.strip().endswith("pip install 'altgrad[demo]'")
    assert "Traceback" not in result.stderr


def test_without_lightning_only_the_demo_is_unavailable() -> None:
    setup = "import sys; sys.modules['pytorch_lightning'] = None"
    demo = run("demo", setup=setup)
    assert demo.returncode == 1
    assert "pip install 'altgrad[demo]'" in demo.stderr
    assert run("formats", setup=setup).returncode == 0
