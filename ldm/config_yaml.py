"""YAML as configs are written in it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, cast

import yaml

from ldm.registry import ConfigError


class Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number (YAML 1.1 wants a dot) and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As YAML says. Raises: ConstructorError on a key that is given twice."""
        keys = [k.value for k, _ in node.value]
        if twice := sorted({k for k in keys if keys.count(k) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]  (types-PyYAML leaves it bare)
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse(text: str | bytes, where: str) -> Any:
    """Plain values of YAML text that stands in `where`. Raises: ConfigError, in one line, if it is not YAML."""
    try:
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def inline(value: Any) -> str:
    """A value in one line of YAML."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    return " ".join(text.removesuffix("...\n").split())


def refuse_resolvers(node: Any, source: str) -> None:
    """Raises: ConfigError if a text below `node` has a `${` that is no plain reference: resolvers, nested ones too."""
    if isinstance(node, dict):
        node = [part for pair in cast("dict[Any, Any]", node).items() for part in pair]
    if isinstance(node, list):
        for part in cast("list[Any]", node):
            refuse_resolvers(part, source)
    elif found := re.search(r"\$\{(?![\w.\[\]]+\}).{0,60}", str(node)):
        raise ConfigError(f"{source}: {found[0]} is a resolver; only references to keys, like ${{seed}}, are allowed")


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; empty ones have none."""
    result: dict[str, Any] = {}
    for key, value in node.items():
        inside = isinstance(value, dict)
        result |= flat(cast("dict[str, Any]", value), f"{prefix}{key}.") if inside else {f"{prefix}{key}": value}
    return result
