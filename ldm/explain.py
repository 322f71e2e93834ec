"""Where each value of a run's config comes from: the file and line, the command line, or the default."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

from ldm import config
from ldm.config import Node
from ldm.config_yaml import Loader, inline

WIDTH = 72  # longer `key = value` push their origin to the right


@dataclass(frozen=True, slots=True)
class _Value:
    """A value that is no mapping. Equal by what it is, not by where it stands: names decide how configs merge."""

    value: Any
    origin: str = field(compare=False)


def explain(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """One line per value of the config that `config.load` gives: `train.lr = 0.0005    configs/a.yaml:33`.

    The line is that of the value's key: of the last file that sets it, of the anchor where it was merged from one, of
    the whole list, of the key that holds an interpolation.

    Raises: ConfigError as `config.load`.
    """
    values = OmegaConf.to_container(OmegaConf.structured(config.load(path, overrides)))
    origins = config.merged(path, overrides, _marked)
    rows = [(f"{key} = {inline(value)}", origin) for key, value, origin in _walk(cast("Node", values), origins, "")]
    return "\n".join(f"{left:<{WIDTH}}  {origin}" for left, origin in rows)


def asked(args: Namespace, cfg: config.RunConfig, path: str | Path, overrides: Sequence[str]) -> str | None:
    """What `--print-config` or `--explain` is to print of a loaded config; None if neither was given.

    Raises: ConfigError as `config.load`.
    """
    if args.print_config:
        return config.dump(cfg).rstrip("\n")
    return explain(path, overrides) if args.explain else None


def _walk(values: Node, origins: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """(dotted key, value, origin) of every value that is no mapping, or an empty one."""
    for name, value in values.items():
        below = origins.get(name) if isinstance(origins, dict) else origins
        if isinstance(value, dict) and value:
            yield from _walk(cast("Node", value), below, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, below.origin if isinstance(below, _Value | _Mapping) else "default"


class _Mapping(dict[str, Any]):
    """A mapping that knows where its own key stands, for when nothing is in it."""

    origin = "default"


def _marked(text: str | bytes, where: str) -> Any:
    """YAML with every value as `_Value`, but for `include`, which names files; mappings stay mappings.

    As `config.merged` calls it: with a file's bytes and its path, or with the text of an override.
    """
    loader = Loader(text)
    node = loader.get_single_node()
    shown = _shown(Path(where)) if isinstance(text, bytes) else ""
    if node is None:
        return _Value(None, "command line") if isinstance(text, str) else None
    tree = _tree(loader, node, node, shown)
    if isinstance(text, bytes) and isinstance(tree, dict) and "include" in tree:
        tree["include"] = tree["include"].value
    return tree


def _tree(loader: Loader, node: yaml.Node, key: yaml.Node, file: str) -> Any:
    origin = f"{file}:{key.start_mark.line + 1}" if file else "command line"
    if not isinstance(node, yaml.MappingNode):
        return _Value(loader.construct_object(node, deep=True), origin)
    loader.flatten_mapping(node)  # puts the pairs of `<<: *anchor` in front of its own
    tree = _Mapping((loader.construct_object(k), _tree(loader, v, k, file)) for k, v in node.value)
    tree.origin = origin
    return tree


def _shown(path: Path) -> str:
    """Relative to the current folder where it is in it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
