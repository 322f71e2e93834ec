"""Every key of a config with its type, default and meaning, from the code that reads it: docs/config.md.

A key's meaning is the comment behind its field, or its line under `Attributes:` or `Args:` of a docstring.
"""

import ast
import dataclasses
import functools
import inspect
import io
import re
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

import ldm.training.run  # noqa: F401  (registers the stages)
from ldm import build, registry  # noqa: F401  (build registers the models)
from ldm.ablation.table import TableFile
from ldm.config import RunConfig
from ldm.config_yaml import inline
from ldm.data.buckets import Buckets
from ldm.data.records import Pairing
from ldm.denoiser import AdapterUse
from ldm.evaluation import likeness, maps, measures, sets  # noqa: F401  (they register what measures)
from ldm.schedule import ScheduleConfig

Target = Callable[..., Any]  # what takes the keys: a dataclass, a class or a function
PLACES: Final[Mapping[str, tuple[str, ...]]] = {  # kind -> where a config names one of it
    "adapter": ("adapters.NAME",),
    "hint": ("data.hints.NAME", "adapters.NAME.extractor"),
    "fuser": ("fuser",),
    "stage": ("stage",),
    "data": ("data", "validation.data"),
    "sampler": ("sample.sampler",),
    "measure": ("evaluation.measures.NAME", "evaluation.pictures"),
    "features": ("evaluation.sets.NAME.features",),
    "unet": ("model.unet",),
    "vae": ("model.vae",),
    "text": ("model.text",),
    "clip": ("model.clip",),
    "image": ("adapters.NAME.encoder", "model.clip.image"),
}
WEIGHED: Final = ("adapter", "fuser", "unet", "vae", "text", "clip", "image")  # kinds whose nodes take `weights`
PLAIN: Final[Mapping[type, tuple[str, ...]]] = {  # options that stand at a place of their own, without a name
    AdapterUse: ("adapters.NAME",),
    ScheduleConfig: ("model.schedule",),
    Pairing: ("data.reference", "validation.data.reference"),
    Buckets: ("data.buckets",),
    sets.SetOptions: ("evaluation.sets.NAME",),
    TableFile: (),
}
TITLES: Final[Mapping[type, str]] = {
    AdapterUse: "every adapter",
    TableFile: "a table below configs/ablation",
}
INTRO: Final = """\
# Every key of a config

Written by `make docs` from the code; a test compares. Keys are dotted: `train.lr` is `lr` under `train:` in a file, and
`train.lr=1e-4` on the command line. What a file may hold besides: `include:` ([README](../README.md), "Configs") and
references to other keys, `${run.dir}`.

A node is a mapping with `name:`, one of those below; its other keys are that class's own, and a key whose default is
"required" has to be given. NAME is a name of yours: an adapter's, a hint's, a set's. Nodes of models, image encoders
and the fuser take two keys more: `weights` (a file or run folder; that of an adapter is in the table "every adapter")
and `weights_prefix` (the part of one of our files, e.g. `text.`). `scripts/train.py --print-config` shows a config
with all its defaults, `--explain` where each value is set.
"""


@dataclass(frozen=True)
class Key:
    """One key: its name, type and default in the words of YAML, and its meaning."""

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """Keys that stand at the same places.

    Attributes:
        title: heading.
        about: what it is, in Markdown; perhaps empty.
        places: dotted prefixes; "" is the top of a file.
        keys: in order.
    """

    title: str
    about: str
    places: tuple[str, ...]
    keys: tuple[Key, ...]


def sections() -> dict[str, list[Section]]:
    """Chapter -> its sections: the run, what stands at fixed places, then each kind of node."""
    chapters = {"Keys of a run": list(_groups(RunConfig, ""))}
    chapters["Keys without a name of a class"] = [
        Section(TITLES.get(target, places[0] if places else ""), _summary(target), places, _keys(target))
        for target, places in PLAIN.items()
    ]
    ours: dict[str, dict[str, Target]] = {}
    for (kind, name), factory in sorted(registry.registered().items()):
        if factory.__module__.partition(".")[0] in ("ldm", "adapters"):  # what a test registers is not ours
            ours.setdefault(kind, {})[name] = factory
    for kind in sorted(ours, key=list(PLACES).index):
        chapters[f"Nodes: {kind}"] = list(_nodes(kind, ours[kind]))
    return chapters


def dotted(chapters: Mapping[str, Sequence[Section]]) -> set[str]:
    """Every key with its place, e.g. train.lr, adapters.NAME.scale, sample.sampler.steps."""
    found = {f"{place}.name" for places in PLACES.values() for place in places}
    found |= {f"{place}.{key}" for kind in WEIGHED for place in PLACES[kind] for key in ("weights", "weights_prefix")}
    for section in (section for chapter in chapters.values() for section in chapter):
        found |= {f"{place}.{key.name}".lstrip(".") for place in section.places for key in section.keys}
    return found | {place for places in (*PLACES.values(), *PLAIN.values()) for place in places}


def render(chapters: Mapping[str, Sequence[Section]]) -> str:
    """The chapters as Markdown, with the introduction."""
    lines = [INTRO]
    for chapter, found in chapters.items():
        lines.append(f"## {chapter}\n")
        for section in found:
            where = ", ".join(f"`{place}`" for place in section.places if place)
            lines += [f"### {section.title}\n", *([f"{section.about}\n"] if section.about else [])]
            lines += [f"At {where}.\n"] if where and f"`{section.title}`" != where else []
            lines += _table(section.keys)
    return "\n".join(lines).rstrip() + "\n"


def _table(keys: Sequence[Key]) -> list[str]:
    if not keys:
        return ["No keys of its own.\n"]
    rows = [(f"`{k.name}`", k.type, f"`{k.default}`" if k.default else "required", k.meaning) for k in keys]
    cells = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *(f"| {c} |" for c in cells), ""]


def _groups(group: type, prefix: str) -> Iterator[Section]:
    """The keys of a group of the run config, then those of the groups in it."""
    hints = get_type_hints(group)
    inner = {name: hint for name, hint in hints.items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)}
    keys = tuple(key for key in _keys(group) if key.name not in inner)
    yield Section(prefix or "at the top", _summary(group), (prefix,), keys)
    for name, hint in inner.items():
        yield from _groups(hint, f"{prefix}.{name}".lstrip("."))


def _nodes(kind: str, factories: Mapping[str, Target]) -> Iterator[Section]:
    """The names of a kind; those with the same keys share a section."""
    names: dict[tuple[Key, ...], list[str]] = {}
    for name in factories:
        names.setdefault(_keys(registry.accepts(kind, name)), []).append(name)
    for keys, same in names.items():
        said = {name: _summary(factories[name]) for name in same}
        several = len(set(said.values())) > 1
        about = "\n".join(f"- `{n}`: {text}" for n, text in said.items()) if several else said[same[0]]
        yield Section(", ".join(same), about, PLACES[kind], keys)


def _keys(target: Target) -> tuple[Key, ...]:
    """What YAML may give to a dataclass, class or function: its parameters of types that YAML has."""
    plain = inspect.isclass(target) and not dataclasses.is_dataclass(target)
    hints = get_type_hints(target.__init__ if plain else target)
    meanings = _meanings(target)
    return tuple(
        Key(name, registry.in_yaml(hints[name]), _default(target, parameter), meanings.get(name, ""))
        for name, parameter in inspect.signature(target).parameters.items()
        if _in_yaml(hints.get(name, object))
    )


def _in_yaml(hint: Any) -> bool:
    """Whether YAML has values of this annotation."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType) or (inspect.isclass(origin) and issubclass(origin, Mapping | Sequence)):
        return all(h is ... or _in_yaml(h) for h in arguments)
    return hint in (Any, str, int, float, bool, type(None)) or dataclasses.is_dataclass(hint)


def _default(target: Target, parameter: inspect.Parameter) -> str:
    """In YAML; "" where there is none."""
    value = parameter.default
    if dataclasses.is_dataclass(target):
        field = {f.name: f for f in dataclasses.fields(target)}[parameter.name]
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value in (inspect.Parameter.empty, dataclasses.MISSING) or dataclasses.is_dataclass(value):
        return ""
    return inline(value)


def _summary(target: Target) -> str:
    """First paragraph of the docstring, without what dataclasses make up."""
    text = inspect.getdoc(target) or ""
    return " ".join(text.split("\n\n")[0].split()) if not text.startswith(f"{target.__name__}(") else ""


def _meanings(target: Target) -> dict[str, str]:
    """Name -> meaning, from the docstrings and field comments of a function, or of a class and its bases."""
    found: dict[str, str] = {}
    for owner in reversed(getattr(target, "__mro__", (target,))):
        if owner.__module__ == "builtins":
            continue
        init = vars(owner).get("__init__")
        for doc in (owner.__doc__, getattr(init, "__doc__", None)):
            found |= _listed(inspect.cleandoc(doc or ""))
        if isinstance(owner, type) and dataclasses.is_dataclass(owner):
            found |= _comments(Path(inspect.getfile(owner))).get(owner.__name__, {})
    return found


def _listed(doc: str) -> dict[str, str]:
    """What a docstring says under `Attributes:` or `Args:`, or behind it in the same line."""
    head = re.search(r"^(?:Attributes|Args):(.*(?:\n(?:[ ].*|(?=\n[ ]{4})))*)", doc, re.MULTILINE)
    if head is None:
        return {}
    text = head[1]
    if text.lstrip(" ").startswith("\n"):
        entries = re.findall(r"^ {4}([\w, ]+): (.*(?:\n {5,}.*)*)", text, re.MULTILINE)
    else:
        entries = re.findall(
            r"(?:^|(?<=\. ))([a-z_]+(?:, [a-z_]+)*): (.*?)(?=\. [a-z_, ]+: |$)", text.strip(), re.DOTALL
        )
    return {
        name.strip(): " ".join(meaning.split()).removesuffix(".")
        for names, meaning in entries
        for name in names.split(",")
    }


@functools.cache
def _comments(file: Path) -> dict[str, dict[str, str]]:
    """Class -> field -> the comment behind it, for every class of a source file."""
    source = file.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    found: dict[str, dict[str, str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                item.target.id: " ".join(comments[n] for n in _lines(item) if n in comments)
                for item in node.body
                if isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and any(n in comments for n in _lines(item))
            }
    return found


def _lines(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)
