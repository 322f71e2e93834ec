import pytest

from ldm import sweep
from ldm.registry import ConfigError


def test_every_combination_once_the_last_key_fastest() -> None:
    assert sweep.combinations({"a.b": [1, 2], "c": ["x"], "d": [None, {"e": 1}]}) == [
        {"a.b": 1, "c": "x", "d": None},
        {"a.b": 1, "c": "x", "d": {"e": 1}},
        {"a.b": 2, "c": "x", "d": None},
        {"a.b": 2, "c": "x", "d": {"e": 1}},
    ]
    assert sweep.combinations({}) == [{}]


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"a.b": []}, r"grid.a.b is \[\], must be a list of at least one value, e.g. grid='\{a.b: \[0, 1\]\}'"),
        ({"a": "0-3"}, "grid.a is '0-3', must be a list"),
        ({"a": [0, 1, 0]}, "grid.a has 0 twice"),
        ({"a.b.c": [1], "a.b": [2]}, "grid has a.b and a.b.c, one inside the other"),
        ({"a": list(range(101)), "b": list(range(100))}, "grid has 10,100 combinations, allowed: up to 10,000"),
    ],
)
def test_what_is_no_grid_is_refused(grid: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sweep.combinations(grid)


def test_names_are_as_short_as_they_can_be() -> None:
    keys = ["adapters.a.scale", "adapters.b.scale", "sample.guidance.scale", "sample.sampler.eta", "seed"]
    assert list(sweep.short_names(keys).values()) == ["a.scale", "b.scale", "guidance.scale", "eta", "seed"]


def test_file_names_say_the_values_and_never_meet() -> None:
    found = sweep.combinations({"x.scale": [0, 0.5], "guess": [True, None]})
    assert sweep.file_names(found) == [
        "scale=0_guess=true",
        "scale=0_guess=null",
        "scale=0.5_guess=true",
        "scale=0.5_guess=null",
    ]
    assert sweep.file_names(sweep.combinations({"mask": ["a/b.png", "a b.png"]})) == [
        "c0000_mask=a-b.png",
        "c0001_mask=a-b.png",
    ]
    long = sweep.file_names(sweep.combinations({"mask": ["x" * 300]}))
    assert long == ["c0000_mask=" + "x" * 115]
    assert sweep.file_names([{}]) == [""]
