from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass

import pytest

from ldm import registry
from ldm.registry import ConfigError

KIND = "fruit"  # a kind of these tests only


@dataclass(frozen=True)
class AppleOptions:
    colour: str
    seeds: int = 5
    sizes: tuple[int, ...] = ()
    skin: tuple[float, float] | None = None
    worms: str | Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.seeds < 0:
            raise ConfigError(f"apple.seeds is {self.seeds}, must be at least 0")


@registry.register(KIND, "apple", options=AppleOptions)
class Apple:
    def __init__(self, options: AppleOptions, *, tree: str) -> None:
        self.options = options
        self.tree = tree


@registry.register(KIND, "pear")
def pear(*, weight: float, tree: str = "none") -> tuple[float, str]:
    if weight <= 0:
        raise ValueError(f"weight is {weight}, must be positive")
    return weight, tree


@registry.register(KIND, "plum")
def plum(*, weight: float) -> float:
    return weight + 0.5


def test_options_dataclass_receives_the_keys_and_the_factory_the_runtime_arguments() -> None:
    apple = registry.build(KIND, {"name": "apple", "colour": "red"}, tree="old")
    assert isinstance(apple, Apple)
    assert (apple.options, apple.tree) == (AppleOptions("red"), "old")


def test_signature_lists_the_keys_where_there_is_no_options_dataclass() -> None:
    assert registry.build(KIND, {"name": "pear", "weight": 0.2}, tree="old") == (0.2, "old")


def test_decorator_returns_what_it_decorates() -> None:
    assert pear(weight=1.0) == (1.0, "none")
    assert registry.registered()[KIND, "pear"] is pear


def test_keys_are_those_of_the_options() -> None:
    assert registry.keys(KIND, "apple") == ["colour", "seeds", "sizes", "skin", "worms"]
    assert registry.keys(KIND, "aple") == registry.keys(KIND, None) == []


def test_names_are_sorted_and_of_one_kind() -> None:
    assert registry.names(KIND) == ["apple", "pear", "plum"]
    assert registry.names("no such kind") == []


def test_lists_become_tuples_at_every_depth() -> None:
    @registry.register("basket", "nested")
    def nested(*, items: object) -> object:
        return items

    assert registry.build("basket", {"name": "nested", "items": [1, [2, {"a": [3]}]]}) == (1, (2, {"a": (3,)}))


def test_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match="fruit 'apple' is registered twice"):
        registry.register(KIND, "apple")(lambda: None)


def test_unregistered_name_is_refused_with_the_registered_ones_and_a_suggestion() -> None:
    with pytest.raises(
        ConfigError, match=r"fruit.name is 'aple'; registered: apple, pear, plum; did you mean 'apple'\?"
    ):
        registry.build(KIND, {"name": "aple"})


@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "builtins.eval", "__import__"])
def test_dotted_paths_are_only_unregistered_names(name: str) -> None:
    with pytest.raises(ConfigError, match="registered: apple"):
        registry.build(KIND, {"name": name, "command": "true"})


@pytest.mark.parametrize("node", [{}, {"name": None}, {"name": ["apple"]}, {"name": {"apple": 1}}, {"name": 3}])
def test_missing_or_odd_name_is_a_config_error(node: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"fruit.name is"):
        registry.build(KIND, node)


def test_unknown_key_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"fruit 'apple': unknown keys \['color'\]; options: colour.*mean 'colour'\?"):
        registry.build(KIND, {"name": "apple", "color": "red", "colour": "red"}, tree="old")


def test_key_that_is_not_text_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"unknown keys \['3'\]"):
        registry.build(KIND, {"name": "apple", "colour": "red", 3: 4}, tree="old")  # pyright: ignore


def test_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"fruit 'pear': missing keys \['weight'\]; options: weight"):
        registry.build(KIND, {"name": "pear"})


def test_yaml_cannot_set_a_runtime_argument() -> None:
    with pytest.raises(ConfigError, match=r"unknown keys \['tree'\]"):
        registry.build(KIND, {"name": "pear", "weight": 1.0, "tree": "mine"}, tree="old")


def test_value_that_the_factory_refuses_is_a_config_error_that_names_the_node() -> None:
    with pytest.raises(ConfigError, match=r"fruit 'pear': weight is -1, must be positive"):
        registry.build(KIND, {"name": "pear", "weight": -1})


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"name": "plum", "weight": "heavy"}, "fruit 'plum': weight is 'heavy', must be float"),
        ({"name": "plum", "weight": True}, "fruit 'plum': weight is True, must be float"),
        ({"name": "apple", "colour": 3}, "fruit 'apple': colour is 3, must be str"),
        ({"name": "apple", "colour": "red", "seeds": 1.5}, "fruit 'apple': seeds is 1.5, must be int"),
        ({"name": "apple", "colour": "red", "sizes": 3}, r"sizes is 3, must be a list of int"),
        ({"name": "apple", "colour": "red", "sizes": [3, "x"]}, r"sizes is \(3, 'x'\), must be a list of int"),
        ({"name": "apple", "colour": "red", "skin": "waxy"}, r"skin is 'waxy', must be \[float, float\] \| null"),
        ({"name": "apple", "colour": "red", "skin": [1]}, r"skin is \(1,\), must be \[float, float\] \| null"),
        (
            {"name": "apple", "colour": "red", "worms": 3},
            r"worms is 3, must be str \| a mapping of names to float \| null",
        ),
        ({"name": "apple", "colour": "red", "worms": ["a"]}, r"worms is \('a',\), must be str \| a mapping"),
        ({"name": "apple", "colour": "red", "worms": {1: 2}}, r"worms is \{1: 2\}, must be str \| a mapping"),
        ({"name": "apple", "colour": "red", "worms": {"a": "b"}}, r"worms is \{'a': 'b'\}, must be str \| a mapping"),
    ],
)
def test_value_of_another_type_is_refused(node: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        registry.build(KIND, node, **({"tree": "old"} if node["name"] == "apple" else {}))


def test_whole_numbers_and_null_fit_where_they_should() -> None:
    options = registry.options(KIND, {"name": "apple", "colour": "red", "skin": [1, 0.5]})
    assert options.skin == (1, 0.5)
    assert registry.options(KIND, {"name": "apple", "colour": "red", "skin": None}).skin is None
    assert registry.options(KIND, {"name": "apple", "colour": "red", "worms": {"a": 1}}).worms == {"a": 1}
    assert registry.build(KIND, {"name": "plum", "weight": 1}) == 1.5


def test_options_own_message_is_kept() -> None:
    with pytest.raises(ConfigError, match=r"^apple.seeds is -1, must be at least 0$"):
        registry.build(KIND, {"name": "apple", "colour": "red", "seeds": -1}, tree="old")


def test_options_are_read_without_building() -> None:
    options = registry.options(KIND, {"name": "apple", "colour": "red", "sizes": [1, 2]})
    assert options == AppleOptions("red", sizes=(1, 2))
    with pytest.raises(FrozenInstanceError):
        options.seeds = 6


def test_options_are_checked_as_in_build() -> None:
    with pytest.raises(ConfigError, match=r"unknown keys \['core'\]"):
        registry.options(KIND, {"name": "apple", "colour": "red", "core": 1})


def test_options_of_a_factory_without_a_dataclass_are_refused() -> None:
    with pytest.raises(ValueError, match="'pear' has no options dataclass; register it with options="):
        registry.options(KIND, {"name": "pear", "weight": 1.0})


def test_suggest_is_silent_when_nothing_is_close() -> None:
    assert registry.suggest("zebra", ["apple"]) == ""
    assert registry.suggest("appel", ["apple", "pear"]) == "; did you mean 'apple'?"


def test_options_without_a_name_are_checked_the_same_way() -> None:
    assert registry.checked(AppleOptions, {"colour": "red", "sizes": [1, 2]}, "basket") == AppleOptions(
        "red", sizes=(1, 2)
    )
    for node, said in (
        ({"colour": 3}, "basket: colour is 3, must be str"),
        ({"color": "red"}, r"basket: unknown keys \['color'\], missing keys \['colour'\].*did you mean 'colour'"),
    ):
        with pytest.raises(ConfigError, match=said):
            registry.checked(AppleOptions, node, "basket")


def test_of_equally_close_words_the_one_that_begins_alike_is_suggested() -> None:
    assert registry.suggest("sd16", ["sd21", "sd15", "sd21-base"]) == "; did you mean 'sd15'?"
    assert registry.suggest("sd16", ["sd15", "sd21"]) == "; did you mean 'sd15'?"
    assert registry.suggest("steps", ["step", "steps2x", "stops"]) == "; did you mean 'step'?"  # closer beats that
    assert registry.suggest("zzz", ["sd15"]) == ""
