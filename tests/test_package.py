"""The package as a whole: what it exports, and what importing it costs."""

import importlib
import pkgutil
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import interactdiff

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def in_fresh_python(code: str) -> str:
    """What a program prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_costs_no_torch() -> None:
    code = "import interactdiff, sys; interactdiff.Scene('a'); print('torch' in sys.modules)"
    assert in_fresh_python(code) == "False"


def test_public_names_are_there() -> None:
    for name in interactdiff.__all__:
        assert getattr(interactdiff, name) is not None
        assert name in dir(interactdiff)
    with pytest.raises(AttributeError, match="has no attribute 'colour'"):
        interactdiff.colour  # noqa: B018


@pytest.mark.parametrize("package", ["interactdiff", "interactdiff.clear", "interactdiff.pipelines"])
def test_no_module_has_the_name_of_something_public(package: str) -> None:
    """Importing the module would put it in the place of the function or class."""
    module = importlib.import_module(package)
    modules = {found.name for found in pkgutil.iter_modules(module.__path__)}
    assert not modules & set(module.__all__)


@pytest.mark.parametrize("name", ["app", "pipelines", "training"])
def test_mapped_folders_refuse_their_bare_names(name: str) -> None:
    code = f"try:\n  import {name}\nexcept ImportError as e: print(e)"
    assert in_fresh_python(code).startswith(f"import interactdiff.{name}, not {name}")


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda script: script.stem)
def test_scripts_of_benchmarks_import_what_there_is(script: Path) -> None:
    assert callable(runpy.run_path(str(script))["main"])
