"""Documents name code and keys that exist: `path.py:Name.attribute` in the maps, dotted keys of configs."""

import dataclasses
import functools
import importlib
import re
from pathlib import Path

import pytest

import adapters  # noqa: F401  (registers them)
from ldm import reference, registry

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"`((?:ldm|adapters|scripts)/[\w/]+\.py):([A-Za-z_][\w.]*)`")
GROUPS = "adapters|checkpoint|data|evaluation|fuser|log|model|run|sample|stage|train|validation"
KEY = re.compile(rf"`((?:{GROUPS})\.[\w.]+)")
FILE = re.compile(r"\.(?:py|md|yaml|json|png|csv|safetensors)$")
NAMED = re.compile(r"^(adapters|data\.hints|validation\.data\.hints|evaluation\.(?:measures|arms|sets))\.\w+")
REFERENCES = [(text, *found) for text in TEXTS for found in CODE.findall(text.read_text(encoding="utf-8"))]


@functools.cache
def known() -> set[str]:
    return reference.dotted(reference.sections())


def has(owner: object, name: str) -> bool:
    fields = {f.name for f in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else set()
    return hasattr(owner, name) or name in fields


@pytest.mark.parametrize(("text", "path", "name"), REFERENCES, ids=lambda item: getattr(item, "stem", item))
def test_code_that_a_map_names_exists(text: Path, path: str, name: str) -> None:
    assert (ROOT / path).is_file()
    owner = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    *parents, last = name.split(".")
    for part in parents:
        owner = getattr(owner, part)
    assert has(owner, last), f"{text.name}: {path} has no {name}"


def test_every_adapter_and_fuser_has_a_page_with_a_map() -> None:
    named = {(path, name) for _, path, name in REFERENCES}
    for (kind, name), factory in registry.registered().items():
        if kind in ("adapter", "fuser") and factory.__module__.startswith("adapters."):
            place = (f"{factory.__module__.replace('.', '/')}.py", factory.__name__)
            pages = [n for p, n in named if p == place[0] and n.partition(".")[0] == place[1]]
            assert pages, f"no page of docs/ has {place[0]}:{place[1]}, of {kind} {name!r}"


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_keys_that_a_text_names_exist(text: Path) -> None:
    found = {key.rstrip(".") for key in KEY.findall(text.read_text(encoding="utf-8")) if not FILE.search(key)}
    plain = {NAMED.sub(r"\1.NAME", key) for key in found}
    unknown = {key for key in plain - known() if not any(k.startswith(f"{key}.") for k in known())}
    assert not unknown


def test_a_key_that_no_class_has_is_found_out() -> None:
    assert "adapters.NAME.middle_only" in known()
    assert "adapters.NAME.sd_locked" not in known()


def test_every_row_of_coming_from_names_a_key_or_says_that_there_is_none() -> None:
    text = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (.+?) \| .*\|$", text, re.MULTILINE)
    rows = [(theirs, ours) for theirs, ours in rows if theirs not in ("theirs", "---")]
    assert len(rows) > 150
    for theirs, ours in rows:
        keys = [re.split(r"[=\[{]", key)[0] for key in re.findall(r"`([^`]+)`", ours)]
        assert ours == "not here" or keys, theirs
        assert {NAMED.sub(r"\1.NAME", key) for key in keys} <= known(), theirs
