"""The package as a whole: what it exports, and what importing it costs."""

import subprocess
import sys

import pytest

import interactdiff


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


def test_attach_stays_the_function_when_its_module_is_imported_first() -> None:
    code = "import interactdiff.attach; import interactdiff; print(type(interactdiff.attach).__name__)"
    assert in_fresh_python(code) == "function"


@pytest.mark.parametrize("name", ["app", "pipelines", "training"])
def test_mapped_folders_refuse_their_bare_names(name: str) -> None:
    code = f"try:\n  import {name}\nexcept ImportError as e: print(e)"
    assert in_fresh_python(code).startswith(f"import interactdiff.{name}, not {name}")
