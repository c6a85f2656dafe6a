"""The report on an installation: which versions are outside of what is tested."""

import re
from importlib import metadata
from pathlib import Path

import pytest

from interactdiff.doctor import TESTED, doctor, untested

ROOT = Path(__file__).parent.parent


def versions(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_tested_versions_are_those_of_the_constraints() -> None:
    lowest, highest = versions("constraints-lowest.txt"), versions("constraints.txt")
    assert {name: (lowest[name], highest[name]) for name in TESTED} == TESTED


def test_the_lowest_versions_are_what_is_promised() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    promised, lowest = dict(re.findall(r'"([\w-]+)>=([\d.]+)', text)), versions("constraints-lowest.txt")
    for name in ("diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow", "peft"):
        got, wanted = (version.split(".") for version in (lowest[name], promised[name]))
        assert got[: len(wanted)] == wanted, name


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ("0.35.2", ", outside of what is tested, 0.36.0 to 0.42.1"),
        ("0.36.0", ""),
        ("0.40.0", ""),
        ("0.42.1+local", ""),
        ("0.43.0.dev0", ", outside of what is tested, 0.36.0 to 0.42.1"),
        ("1.0", ", outside of what is tested, 0.36.0 to 0.42.1"),
    ],
)
def test_a_version_outside_of_what_is_tested_is_named(
    monkeypatch: pytest.MonkeyPatch, installed: str, said: str
) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: installed if name == "diffusers" else real(name))
    assert untested("diffusers") == said
    assert f"\n  diffusers {installed}{said}\n" in doctor()


def test_the_tests_that_the_table_of_compatibility_names_exist() -> None:
    """A name without a file is in that of the one before it."""
    table, file, missing = (ROOT / "docs/compatibility.md").read_text(), "", []
    for own, name in re.findall(r"`(test_\w+\.py)?(?:::)?(test_\w+)?`", table):
        file = own or file
        if name and f"def {name}(" not in (ROOT / "tests" / file).read_text():
            missing.append(f"{file}::{name}")
    assert not missing
