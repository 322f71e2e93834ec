"""A closed world of names that configs may build: nothing is ever imported or evaluated from YAML."""

import dataclasses
import difflib
import inspect
import itertools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class ConfigError(ValueError):
    """Bad user input (YAML, command line, files). Scripts print its one line and exit with code 2."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    factory: Callable[..., Any]
    options: type | None


_KNOWN: dict[tuple[str, str], _Entry] = {}


def register(kind: str, name: str, options: type | None = None) -> Callable[[F], F]:
    """Class or function decorator: makes `{name: <name>, ...}` buildable where `kind` is expected.

    Args:
        kind: what the config slot holds, e.g. "unet", "sampler", "adapter".
        name: the word written in YAML.
        options: a frozen dataclass whose fields are the YAML keys; the factory then gets one instance of it
            as its first argument. Without it the factory's own signature lists the keys.

    Raises: ValueError if the name is taken.
    """

    def add(factory: F) -> F:
        if (kind, name) in _KNOWN:
            raise ValueError(f"{kind} {name!r} is registered twice")
        _KNOWN[kind, name] = _Entry(factory, options)
        return factory

    return add


def names(kind: str) -> list[str]:
    """Registered names of one kind, sorted."""
    return sorted(n for k, n in _KNOWN if k == kind)


def registered() -> dict[tuple[str, str], Callable[..., Any]]:
    """Everything registered: (kind, name) -> factory. For tests and `--help`."""
    return {key: entry.factory for key, entry in _KNOWN.items()}


def keys(kind: str, name: object) -> list[str]:
    """The YAML keys of a registered name, without those that the program gives; none if it is not registered."""
    entry = _KNOWN.get((kind, str(name)))
    return [] if entry is None or entry.options is None else list(inspect.signature(entry.options).parameters)


def accepts(kind: str, name: str) -> Callable[..., Any]:
    """What the YAML keys of a registered name are parameters of: its options dataclass, or else its factory."""
    entry = _KNOWN[kind, name]
    return entry.options or entry.factory


def suggest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known word, else an empty string.

    Of words that are equally close, the one that begins as the word does: sd15 for sd16, not sd21.
    """
    close = difflib.get_close_matches(word, list(known), n=5)  # the closest first
    if not close:
        return ""
    ratio = difflib.SequenceMatcher(None, b=word)

    def likeness(other: str) -> tuple[float, int]:
        ratio.set_seq1(other)
        return ratio.ratio(), len(
            [*itertools.takewhile(lambda pair: pair[0] == pair[1], zip(word, other, strict=False))]
        )

    return f"; did you mean {max(close, key=likeness)!r}?"


def build(kind: str, node: Mapping[str, Any], **runtime: Any) -> Any:
    """Build `node["name"]` of this kind from its YAML keys.

    Args:
        kind: as given to `register`.
        node: mapping with `name` and the factory's options; lists become tuples.
        runtime: arguments that come from the program, never from YAML (e.g. `unet=`).

    Raises: ConfigError on an unregistered name, an unknown or missing key, or a value the factory refuses.
    """
    entry, params = _resolve(kind, node, runtime)
    with _user_error(_where(kind, node)):
        if entry.options is None:
            return entry.factory(**params, **runtime)
        return entry.factory(entry.options(**params), **runtime)


def options(kind: str, node: Mapping[str, Any]) -> Any:
    """The checked options of a node as the dataclass it was registered with, without building it.

    For what must be known before anything exists: the image size of a data set that is not on this machine.

    Raises: ConfigError as `build`; ValueError if `node["name"]` was registered without `options=`.
    """
    entry, params = _resolve(kind, node, {})
    if entry.options is None:
        raise ValueError(f"{kind} {node['name']!r} has no options dataclass; register it with options=")
    with _user_error(_where(kind, node)):
        return entry.options(**params)


def checked(options: type[T], node: Mapping[str, Any], where: str) -> T:
    """Make an options dataclass from YAML keys that stand at a place of their own, without a registered name.

    Args:
        options: the dataclass; its fields are the keys.
        node: the keys; lists become tuples.
        where: the place, for messages, e.g. "model.schedule".

    Raises: ConfigError as `build`.
    """
    params = _params(options, node, where, {})
    with _user_error(where):
        return options(**params)


def _where(kind: str, node: Mapping[str, Any]) -> str:
    return f"{kind} {node['name']!r}"


def _resolve(kind: str, node: Mapping[str, Any], runtime: Mapping[str, Any]) -> tuple[_Entry, dict[str, Any]]:
    """Find what the node names and check its keys."""
    name = str(node.get("name", ""))
    entry = _KNOWN.get((kind, name))
    if entry is None:
        raise ConfigError(f"{kind}.name is {name!r}; registered: {', '.join(names(kind))}{suggest(name, names(kind))}")
    keys = {k: v for k, v in node.items() if k != "name"}
    return entry, _params(entry.options or entry.factory, keys, _where(kind, node), runtime)


def _params(
    target: Callable[..., Any], keys: Mapping[str, Any], where: str, runtime: Mapping[str, Any]
) -> dict[str, Any]:
    """YAML keys as arguments of `target`: every one known, none missing, all of the annotated type."""
    params = {str(k): _freeze(v) for k, v in keys.items()}
    signature = inspect.signature(target).parameters
    known = {n: p for n, p in signature.items() if n not in runtime}
    unknown = sorted(params.keys() - known.keys())
    missing = sorted(n for n, p in known.items() if p.default is p.empty and n not in params)
    if unknown or missing:
        hint = suggest(unknown[0], known) if unknown else ""
        said = [f"{what} keys {found}" for what, found in (("unknown", unknown), ("missing", missing)) if found]
        raise ConfigError(f"{where}: {', '.join(said)}; options: {', '.join(known)}{hint}")
    plain_class = inspect.isclass(target) and not dataclasses.is_dataclass(target)
    hints = get_type_hints(cast("Any", target).__init__ if plain_class else target)
    for key, value in params.items():
        hint = hints.get(key, Any)
        if not fits(value, hint):
            raise ConfigError(f"{where}: {key} is {value!r}, must be {in_yaml(hint)}")
    return params


def in_yaml(hint: Any) -> str:
    """An annotation in the words of YAML."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " | ".join(map(in_yaml, arguments))
    if origin is tuple:
        several = arguments[1:] == (...,)
        return f"a list of {in_yaml(arguments[0])}" if several else f"[{', '.join(map(in_yaml, arguments))}]"
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return "a mapping" if arguments[1] is Any else f"a mapping of names to {in_yaml(arguments[1])}"
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        return f"a list of {in_yaml(arguments[0])}"
    if hint is type(None):
        return "null"
    if hint is Any:
        return "any"
    return hint.__name__ if inspect.isclass(hint) else str(hint)


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value has the type of its annotation; annotations that YAML has no values for fit anything."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, h) for h in arguments)
    if origin is tuple:
        items = cast("tuple[Any, ...]", value) if isinstance(value, tuple) else None
        each = arguments[:1] * len(items or ()) if arguments[1:] == (...,) else arguments
        return items is not None and len(items) == len(each) and all(map(fits, items, each))
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        pairs = cast("Mapping[Any, Any]", value).items() if isinstance(value, Mapping) else None
        return pairs is not None and all(fits(k, arguments[0]) and fits(v, arguments[1]) for k, v in pairs)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return hint is Any or not inspect.isclass(hint) or isinstance(value, hint)


@contextmanager
def _user_error(where: str) -> Generator[None, None, None]:
    """A value that a factory refuses is the user's: say which node it is in."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _freeze(v) for k, v in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return tuple(_freeze(v) for v in cast("Sequence[Any]", value))
    return value
