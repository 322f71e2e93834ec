import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.data.captions import CONCEPT_SHARE, PAIR_SHARE, STYLES, caption, split_group, split_name, split_of


@pytest.mark.parametrize(
    ("concept", "style", "variant", "expected"),
    [
        ("red-apple", "flat", "base", "a flat emoji of a red apple"),
        ("abacus", "line", "base", "a line drawing of an abacus"),
        ("hourglass-done", "noto", "base", "a noto emoji of an hourglass done"),
        ("unicorn", "twemoji", "base", "a twemoji of a unicorn"),
        ("one-oclock", "flat", "base", "a flat emoji of a one oclock"),
        ("glasses", "flat", "base", "a flat emoji of glasses"),
        ("bus", "flat", "base", "a flat emoji of a bus"),
        ("face-with-crossed-out-eyes", "flat", "base", "a flat emoji of a face with crossed out eyes"),
        ("man-lifting-weights", "flat", "base", "a flat emoji of a man lifting weights"),
        ("people-hugging", "noto", "base", "a noto emoji of people hugging"),
        ("flag-japan", "twemoji", "base", "a twemoji of the flag of japan"),
        ("waving-hand", "noto", "medium-dark", "a noto emoji of a waving hand, medium dark skin tone"),
        ("kiss", "noto", "light+dark", "a noto emoji of a kiss, light and dark skin tone"),
    ],
)
def test_caption(concept, style, variant, expected):
    assert caption(concept, style, variant) == expected


def test_unknown_style_is_refused():
    with pytest.raises(ValueError, match="style is 'oil'; allowed: flat, line, noto, twemoji"):
        caption("apple", "oil")


@pytest.mark.parametrize(
    ("name", "style", "expected"),
    [
        ("waving-hand-medium-dark-skin-tone", "noto", ("waving-hand", "medium-dark")),
        ("person-dark-skin-tone-red-hair", "noto", ("person-red-hair", "dark")),
        ("kiss-man-man-light-skin-tone-dark-skin-tone", "twemoji", ("kiss-man-man", "light+dark")),
        ("man-elf-tone2", "noto", ("man-elf", "medium-light")),
        ("waving-hand-medium-dark", "flat", ("waving-hand", "medium-dark")),
        ("horizontal-traffic-light", "flat", ("horizontal-traffic-light", "base")),
        ("waving-hand", "flat", ("waving-hand", "base")),
        ("waving-hand-dark", "line", ("waving-hand-dark", "base")),
    ],
)
def test_skin_tones_leave_the_concept(name, style, expected):
    assert split_name(name, style, frozenset({"waving-hand", "man"})) == expected


@pytest.mark.parametrize(
    ("concept", "splits"),
    [
        ("abacus", ("train", "train", "train", "train")),
        ("aerial-tramway", ("heldout_concept",) * 4),
        ("toothbrush", ("train", "heldout_pair", "train", "train")),
    ],
)
def test_splits_are_fixed_for_ever(concept, splits):
    assert tuple(split_of(concept, style) for style in STYLES) == splits


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("man-artist", "artist"),
        ("woman-running-facing-right", "person-running"),
        ("kiss-man-man", "kiss"),
        ("women-holding-hands", "people-holding-hands"),
    ],
)
def test_near_copies_share_a_split(a, b):
    assert split_group(a) == split_group(b)
    assert [split_of(a, style) for style in STYLES] == [split_of(b, style) for style in STYLES]


def test_short_names_keep_themselves():
    assert [split_group(name) for name in ("man", "woman", "mango", "womans-hat")] == [
        "man",
        "woman",
        "mango",
        "womans-hat",
    ]


@given(st.from_regex(r"[a-z]{1,8}(-[a-z]{1,8}){0,3}", fullmatch=True))
def test_a_heldout_concept_is_held_out_in_every_style(concept):
    splits = {split_of(concept, style) for style in STYLES}
    assert splits == {"heldout_concept"} or "heldout_concept" not in splits


def test_shares_are_the_stated_ones():
    splits = [split_of(f"thing {i}", "flat") for i in range(20000)]
    assert abs(splits.count("heldout_concept") / 20000 - CONCEPT_SHARE) < 0.01
    assert abs(splits.count("heldout_pair") / 20000 - PAIR_SHARE * (1 - CONCEPT_SHARE)) < 0.005
