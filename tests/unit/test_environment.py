"""pyproject.toml is the one list of packages; environment.yml, constraints.txt, README and pre-commit follow it."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {name: [Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()}
RUN_TIME = [Requirement(text) for text in PROJECT["dependencies"]]


def bounds(requirements: list[Requirement]) -> dict[str, str]:
    return {canonicalize_name(item.name): str(item.specifier) for item in requirements}


def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_conda_environment_repeats_pyproject() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip,) = (item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    listed = [Requirement(text) for text in pip if not text.startswith("-")]
    assert environment["name"] == PROJECT["name"]
    assert f"python{PROJECT['requires-python']}" in conda
    assert bounds(listed) == bounds(RUN_TIME + EXTRAS["data"])
    assert {"-c constraints.txt", "-e ."} <= set(pip)


@pytest.mark.parametrize("requirement", [*RUN_TIME, *EXTRAS["data"], *EXTRAS["test"]], ids=str)
def test_constraints_pin_a_version_inside_the_bounds(requirement: Requirement) -> None:
    pinned = constraints().get(canonicalize_name(requirement.name))
    assert pinned is not None, f"constraints.txt does not pin {requirement.name}"
    assert requirement.specifier.contains(pinned), f"constraints.txt pins {pinned}, pyproject wants {requirement}"


@pytest.mark.parametrize("requirement", EXTRAS["test"], ids=str)
def test_test_extra_is_pinned_exactly(requirement: Requirement) -> None:
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="


def test_pre_commit_uses_the_pinned_ruff() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (revision,) = (item["rev"] for item in config["repos"] if "ruff" in item["repo"])
    assert f"=={revision.removeprefix('v')}" == bounds(EXTRAS["test"])["ruff"]
    local = [hook["entry"] for item in config["repos"] if item["repo"] == "local" for hook in item["hooks"]]
    assert local == ["make types"]


def test_readme_lists_the_packages() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Packages\n(.*?)(?=^## )", readme, flags=re.MULTILINE | re.DOTALL)
    assert section is not None, "README.md has no '## Packages' section"
    rows = dict(re.findall(r"^\| ([\w-]+) \| (.+?) \|", section.group(1), flags=re.MULTILINE))
    listed = {name: set(re.findall(r"`([\w-]+)`", rows.get(name, ""))) for name in ("run-time", *EXTRAS)}
    wanted = {name: {item.name for item in items} for name, items in {"run-time": RUN_TIME, **EXTRAS}.items()}
    wanted["test"] -= wanted["run-time"]
    assert listed == wanted


def test_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
