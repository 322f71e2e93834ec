import pytest

from ldm.prompt_weights import ROUND, SQUARE, parse


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", []),
        ("a red apple", [("a red apple", 1.0)]),
        ("a (red) apple", [("a ", 1.0), ("red", ROUND), (" apple", 1.0)]),
        ("a [red] apple", [("a ", 1.0), ("red", SQUARE), (" apple", 1.0)]),
        ("a (red apple:1.3)", [("a ", 1.0), ("red apple", 1.3)]),
        ("(a: 0.5 )b", [("a", 0.5), ("b", 1.0)]),
        ("(a:-.5)(b:2.)", [("a", -0.5), ("b", 2.0)]),
        ("((a) b:2)", [("a", ROUND * 2), (" b", 2.0)]),
        ("([a])", [("a", SQUARE * ROUND)]),
        (r"\(a\) \[b\] \\", [(r"(a) [b] " + "\\", 1.0)]),
        (r"(a\):2)", [("a)", 2.0)]),
        ("(a)(b)", [("ab", ROUND)]),
        ("()", []),
    ],
)
def test_syntax(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert [text for text, _ in parse(prompt)] == [text for text, _ in parts]
    assert [weight for _, weight in parse(prompt)] == pytest.approx([weight for _, weight in parts])


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("(word:abc)", [("word:abc", ROUND)]),
        ("(word:1.2.3)", [("word:1.2.3", ROUND)]),
        ("(word:)", [("word:", ROUND)]),
        ("[word:1.3]", [("word:1.3", SQUARE)]),
        ("word:1.3)", [("word:1.3)", 1.0)]),
        ("a) b]", [("a) b]", 1.0)]),
        ("a (b c", [("a ", 1.0), ("b c", ROUND)]),
        ("time 10:30", [("time 10:30", 1.0)]),
        ("a \\ b", [("a \\ b", 1.0)]),
    ],
)
def test_malformed_prompts_follow_the_literal_rule(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert parse(prompt) == parts
