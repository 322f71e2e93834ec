"""A layout as pairs of names, applied to state dicts in either direction."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.registry import ConfigError

SHOWN = 4  # groups of keys listed in an error


@dataclass(frozen=True, slots=True)
class Pair:
    """One of our tensors and what it is called elsewhere.

    Attributes:
        ours: our name.
        theirs: their name; several mean that ours is their rows, concatenated.
        change: "" for the same shape; "conv1x1" if theirs has two trailing axes of size 1; "transpose".
    """

    ours: str
    theirs: tuple[str, ...]
    change: str = ""


@dataclass(frozen=True, slots=True)
class Renamed:
    """Their state dict under our names, and what did not fit.

    Attributes:
        tensors: our name -> tensor.
        ignored: their names of tensors that this project does not use.
        unknown: their names that the layout does not have.
        lacking: their names without which one of our tensors cannot be put together.
        near: unknown name -> the most similar name that the layout has and the file has not.
    """

    tensors: dict[str, Tensor]
    ignored: list[str]
    unknown: list[str]
    lacking: list[str]
    near: dict[str, str]


@dataclass(frozen=True)
class KeyMap:
    """A layout: the tensors that may occur, and what else its files hold.

    Attributes:
        pairs: every tensor that may occur; a network need not have all of them.
        optional: a prefix in `pairs` that some files leave out; it is always written.
        aliases: older spellings of parts of their names, old to new.
        ignored: pattern of their names that this project does not use.
    """

    pairs: tuple[Pair, ...]
    optional: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: str = r"$^"

    def identity(self) -> "KeyMap":
        """The same tensors under our own names."""
        return KeyMap(tuple(Pair(pair.ours, (pair.ours,)) for pair in self.pairs), ignored=self.ignored)

    def rename(self, state: Mapping[str, Tensor]) -> Renamed:
        """Their state dict under our names; tensors are shared except for concatenated rows.

        Raises: ConfigError if rows do not fit each other. Nothing else is judged here.
        """
        known = {name for pair in self.pairs for name in pair.theirs}
        names = {self._normal(key, known): key for key in state}
        foreign = names.keys() - known
        ignored = sorted(names[name] for name in foreign if re.search(self.ignored, name))
        unknown = sorted({names[name] for name in foreign} - set(ignored))
        lacking: list[str] = []
        out: dict[str, Tensor] = {}
        for pair in self.pairs:
            parts = [_inward(state[names[name]], pair.change) for name in pair.theirs if name in names]
            if parts and len(parts) < len(pair.theirs):
                lacking += [name for name in pair.theirs if name not in names]
            elif parts:
                out[pair.ours] = parts[0] if len(parts) == 1 else _rows(pair, parts)
        absent = sorted(known - names.keys())
        return Renamed(out, ignored, unknown, lacking, nearest(unknown, absent))

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename their state dict to ours; tensors are shared where no concatenation is needed.

        Raises:
            ConfigError: on keys that the layout does not have, or rows of which some are missing.
        """
        renamed = self.rename(state)
        _refuse(renamed.unknown, "are not in this layout", renamed.near)
        _refuse(renamed.lacking, "are missing", {})
        return renamed.tensors

    def to_theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename our state dict to theirs; tensors are shared.

        Raises:
            ConfigError: on keys that the layout does not have.
        """
        table = {pair.ours: pair for pair in self.pairs}
        foreign = sorted(state.keys() - table.keys())
        _refuse(foreign, "have no name in this layout", nearest(foreign, sorted(table.keys() - state.keys())))
        out: dict[str, Tensor] = {}
        for key, value in state.items():
            pair = table[key]
            parts = [value] if len(pair.theirs) == 1 else value.chunk(len(pair.theirs))
            out.update((name, _outward(part, pair.change)) for name, part in zip(pair.theirs, parts, strict=True))
        return out

    def _normal(self, key: str, known: set[str]) -> str:
        for old, new in self.aliases.items():
            key = key.replace(old, new)
        longer = self.optional + key
        return longer if key not in known and (longer in known or re.search(self.ignored, longer)) else key


def _rows(pair: Pair, parts: list[Tensor]) -> Tensor:
    shapes = [tuple(part.shape) for part in parts]
    if len(set(shapes)) > 1 or not shapes[0] or len({part.dtype for part in parts}) > 1:
        raise ConfigError(f"{', '.join(pair.theirs)} have shapes {shapes}, must be alike and of one dtype")
    return torch.cat(parts)


def _inward(value: Tensor, change: str) -> Tensor:
    if change == "transpose":
        return value.t() if value.ndim == 2 else value
    return value[..., 0, 0] if change == "conv1x1" and value.ndim == 4 and value.shape[2:] == (1, 1) else value


def _outward(value: Tensor, change: str) -> Tensor:
    if change == "transpose":
        return value.t()
    return value[..., None, None] if change == "conv1x1" else value


def size(ours: Mapping[str, Tensor], key: str, axis: int) -> int:
    """Size of one of our tensors along an axis, at least 1.

    Raises: ConfigError if the tensor is not there, has too few axes, or is empty along that one.
    """
    shape = tuple(ours[key].shape) if key in ours else None
    if shape is None or len(shape) <= axis or not shape[axis]:
        found = "is missing" if shape is None else f"is {shape}, wanted a size of at least 1 on axis {axis}"
        raise ConfigError(f"{key} (our name) {found}: this is part of a checkpoint")
    return shape[axis]


def indices(keys: Collection[str], pattern: str) -> list[tuple[int, ...]]:
    """The numbers that a pattern's groups find in each name that it matches; an empty group is 0.

    Raises: ConfigError on a number that is not below the number of names: no whole network counts like that.
    """
    found = [match.groups("") for key in keys if (match := re.search(pattern, key))]
    if odd := [n for groups in found for n in groups if len(n) > len(str(len(keys))) or int(n or 0) >= len(keys)]:
        raise ConfigError(f"a name has number {odd[0][:12]} among {len(keys)} tensors: this is part of a checkpoint")
    return [tuple(int(n or 0) for n in groups) for groups in found]


def count(keys: Collection[str], pattern: str) -> int:
    """One more than the highest number that a pattern's group finds in names; 0 without any. Raises: as `indices`."""
    return max((n + 1 for (n,) in indices(keys, pattern)), default=0)


def nearest(names: Iterable[str], candidates: list[str]) -> dict[str, str]:
    """The first few names -> the most similar candidate, where there is one."""
    close = {name: difflib.get_close_matches(name, candidates, n=1, cutoff=0.8) for name in list(names)[:SHOWN]}
    return {name: found[0] for name, found in close.items() if found}


def grouped(keys: Iterable[str], near: Mapping[str, str] | None = None) -> str:
    """Keys in one line: one example of each group that differs only in numbers and leaf, with its nearest name."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        stem = key.removesuffix(".weight").removesuffix(".bias")
        groups.setdefault(re.sub(r"\d+", "*", stem), []).append(key)
    near, shown = near or {}, []
    for members in list(groups.values())[:SHOWN]:
        example = next((k for k in members if k in near), members[0])
        more = f" and {len(members) - 1} like it" if len(members) > 1 else ""
        shown.append(example + more + (f" (nearest: {near[example]})" if example in near else ""))
    return ", ".join(shown) + (f", {len(groups) - SHOWN} more groups" if len(groups) > SHOWN else "")


def _refuse(keys: list[str], what: str, near: Mapping[str, str]) -> None:
    if keys:
        listed = grouped(keys, near)
        raise ConfigError(f"convert: {len(keys)} keys {what}: {listed}; check that the config is that of the weights")
