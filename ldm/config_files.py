"""Config files, their includes and arguments as one plain mapping; `ldm.config` says what may stand in it."""

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from ldm.config_yaml import parse as parse_yaml
from ldm.registry import ConfigError, suggest

Node = dict[str, Any]  # {name: <registered>, ...options}; checked by registry.build
Parse = Callable[[str | bytes, str], Any]  # YAML and where it stands -> value


def read(path: Path, parse: Parse = parse_yaml, parents: tuple[Path, ...] = ()) -> Node:
    """A file on top of its includes; `parents`: files that include it. Raises: ConfigError as `ldm.config.load`."""
    path = path.resolve()
    if path in parents:
        raise ConfigError(f"{path}: includes itself through {' -> '.join(p.name for p in parents)}; break the circle")
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        then = suggest(path.name, siblings) or "; correct the path; configs to begin with are in configs/"
        raise ConfigError(f"config file {path} does not exist{then}")
    parsed: Any = parse(path.read_bytes(), str(path)) or {}
    if not isinstance(parsed, dict):
        raise ConfigError(f"{path}: top level is {type(parsed).__name__}, must be a mapping of keys")
    node = cast("Node", parsed)
    includes: Any = node.pop("include", [])
    if not isinstance(includes, list):
        raise ConfigError(f"{path}: include is {includes!r}, must be a list of files")
    parts = [read(path.parent / str(item), parse, (*parents, path)) for item in cast("list[Any]", includes)]
    return functools.reduce(over, [*parts, node], {})


def overridden(node: Node, overrides: Sequence[str], parse: Parse = parse_yaml) -> Node:
    """A mapping below `key=value` arguments. Raises: ConfigError if one is none, or its value is no YAML."""
    for item in overrides:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise ConfigError(f"argument {item!r} is not key=value; write e.g. train.steps=100")
        node = over(node, nested(key, parse(value, f"argument {item!r}")))
    return node


def over(base: Node, above: Node) -> Node:
    """`above` wins key by key. A node that names another class replaces the whole node: their options differ."""
    if "name" in base and base["name"] != above.get("name", base["name"]):
        return above
    result = copy.copy(base)
    for key, value in above.items():
        old = base.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = over(cast("Node", old), cast("Node", value)) if both else value
    return result


def nested(key: str, value: Any) -> Node:
    """A mapping in which a dotted key has that value."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value
