"""Whatever people type into a prompt is read, and nothing of it is lost."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.prompt_weights import ROUND, parse

PLAIN = st.text(st.characters(exclude_characters="()[]\\:"), min_size=1)
TRICKY = st.text(st.sampled_from("ab (:)[]\\1.3-"), max_size=30)


def escaped(text: str) -> str:
    return re.sub(r"([\\()\[\]])", r"\\\1", text)


@given(st.one_of(TRICKY, st.text()))
def test_every_text_is_read_and_escaping_keeps_it_whole(text: str) -> None:
    assert "".join(part for part, _ in parse(escaped(text))) == text
    assert all(weight == 1 for _, weight in parse(escaped(text)))


@given(TRICKY)
def test_parts_are_not_empty_and_neighbours_differ_in_weight(text: str) -> None:
    parts = parse(text)
    assert all(part for part, _ in parts)
    assert all(a != b for (_, a), (_, b) in pairwise(parts))


@given(PLAIN, st.integers(1, 6))
def test_nested_brackets_multiply(text: str, depth: int) -> None:
    [(part, weight)] = parse("(" * depth + text + ")" * depth)
    assert part == text and weight == pytest.approx(ROUND**depth)


@given(PLAIN, st.decimals(-9, 9, places=2))
def test_numbers_are_the_weight(text: str, number: float) -> None:
    assert parse(f"({text}:{number})") == [(text, float(number))]
