"""docs/config.md holds every key, each with a meaning, and is what the code gives now."""

import ast
from pathlib import Path

import pytest

import adapters  # noqa: F401  (registers them)
from ldm import reference
from ldm.reference import Section

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = sorted(path for top in ("ldm", "adapters") for path in (ROOT / top).rglob("*.py"))
NOT_CONFIG = {"Published", "TextConfig"}  # entries of checkpoints/weights.yaml; the options of text node `clip`


@pytest.fixture(scope="module")
def chapters() -> dict[str, list[Section]]:
    return reference.sections()


def called(name: str) -> list[ast.Call]:
    """Every call of a function of that name in ldm and adapters."""
    sources = [text for path in LIBRARY if f"{name}(" in (text := path.read_text(encoding="utf-8"))]
    calls = [n for text in sources for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
    return [n for n in calls if getattr(n.func, "id", getattr(n.func, "attr", "")) == name]


def test_the_document_is_what_the_code_gives(chapters: dict[str, list[Section]]) -> None:
    found = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert found == reference.render(chapters), "run `make docs` (python scripts/document.py) and commit docs/config.md"


def test_every_key_has_a_meaning(chapters: dict[str, list[Section]]) -> None:
    every = [(s.title, key.name, key.meaning) for found in chapters.values() for s in found for key in s.keys]
    assert not [(title, name) for title, name, meaning in every if not meaning], (
        "write a comment behind the field, or a line under Attributes: or Args:"
    )


def test_every_registered_name_is_in_it(chapters: dict[str, list[Section]]) -> None:
    literal = [[a.value for a in call.args if isinstance(a, ast.Constant)] for call in called("register")]
    registered = [(kind, name) for kind, name in (words for words in literal if len(words) == 2)]
    assert len(registered) > 40
    titles = {kind: {t for s in chapters[f"Nodes: {kind}"] for t in s.title.split(", ")} for kind, _ in registered}
    assert not [(kind, name) for kind, name in registered if name not in titles[kind]]


def test_options_without_a_name_are_in_it() -> None:
    taken = {call.args[0].id for call in called("checked") if call.args and isinstance(call.args[0], ast.Name)}
    taken |= {call.args[0].attr for call in called("checked") if call.args and isinstance(call.args[0], ast.Attribute)}
    assert taken - NOT_CONFIG == {target.__name__ for target in reference.PLAIN}


def test_keys_are_read_from_comments_docstrings_and_bases(chapters: dict[str, list[Section]]) -> None:
    keys = {(s.title, key.name): key for found in chapters.values() for s in found for key in s.keys}
    assert keys["train", "lr"] == reference.Key("lr", "float", "0.0001", "peak learning rate")
    assert keys["webdataset", "root"].default == ""
    assert keys["webdataset", "root"].meaning.startswith("data folder; for shards")
    assert keys["webdataset", "caption"].meaning.startswith("ending of the member")
    assert keys["palette, palette_lab", "cells"].meaning.startswith("per side of the picture")
    assert keys["every adapter", "scale"].type == "float"
    known = reference.dotted(chapters)
    assert {"train.lr", "adapters.NAME.zero_conv", "data.reference.same", "sample.guidance.image", "seed"} <= known
    assert "sample.sampler.schedule" not in known
