"""A config's `grid:`: dotted keys with lists of values, to all their combinations and names for them."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ldm.registry import ConfigError

MAX: Final = 10_000  # combinations
LONGEST: Final = 120  # letters of a file name's part


def combinations(grid: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the values of `grid`, as key -> value; the last key changes fastest.

    Args:
        grid: dotted key -> list of values; an empty one has one combination, of nothing.

    Raises: ConfigError on an axis that is no list, is empty or has a value twice, on one key inside another, and on
        more than `MAX` combinations.
    """
    count = 1
    for key, values in grid.items():
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(
                f"grid.{key} is {values!r:.60}, must be a list of at least one value, e.g. grid='{{{key}: [0, 1]}}'"
            )
        said = [json.dumps(value, default=str) for value in values]
        if twice := [value for i, value in enumerate(said) if value in said[:i]]:
            raise ConfigError(f"grid.{key} has {twice[0]:.60} twice; give each value once")
        if inside := [other for other in grid if str(other).startswith(f"{key}.")]:
            raise ConfigError(f"grid has {key} and {inside[0]}, one inside the other; drop one")
        count *= len(values)
    if count > MAX:
        raise ConfigError(f"grid has {count:,} combinations, allowed: up to {MAX:,}; drop values or an axis")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Key -> its last part, or as many of its last parts as tell it from the others."""

    def tail(key: str, n: int) -> str:
        return ".".join(key.split(".")[-n:])

    def shortest(key: str) -> str:
        others = [other for other in keys if other != key]
        return next(s for n in itertools.count(1) if (s := tail(key, n)) not in [tail(o, n) for o in others])

    return {key: shortest(key) for key in keys}


def text(value: Any) -> str:
    """A value as people write it in YAML, without quotes."""
    return json.dumps(value, default=str, ensure_ascii=False).replace('"', "")


def slug(name: str) -> str:
    """A name as a part of file names."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", name)


def file_names(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """One part of a file name for each combination: `scale=0.5_eta=1`, numbered where that is no name of its own."""
    short = short_names(list(found[0]))
    names = ["_".join(f"{short[key]}={text(value)}" for key, value in each.items()) for each in found]
    names = [slug(name) for name in names]
    if len(set(names)) == len(names) and max(map(len, names)) <= LONGEST:
        return names
    return [f"c{i:04d}_{name[:LONGEST]}" for i, name in enumerate(names)]
