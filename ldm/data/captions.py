"""Names, captions and splits of the emoji set: pure text functions, no files.

An icon name ("waving-hand-medium-dark-skin-tone") becomes a concept ("waving-hand"), a variant
("medium-dark"), a caption ("a noto emoji of a waving hand, medium dark skin tone") and a split that depends on
nothing but a sha256 of the concept, so it is the same on every machine and for every subset of the styles.
"""

import hashlib
import re
from typing import Final

STYLES: Final = ("flat", "line", "noto", "twemoji")
SPLITS: Final = ("train", "heldout_concept", "heldout_pair")
CONCEPT_SHARE: Final = 0.14  # of the concepts are never trained on, in any style
PAIR_SHARE: Final = 0.03  # of the remaining (concept, style) pairs are never trained on, the concept's other styles are

_LEAD: Final = {
    "flat": "a flat emoji of",
    "line": "a line drawing of",
    "noto": "a noto emoji of",
    "twemoji": "a twemoji of",
}
_TONE: Final = "medium-light|medium-dark|light|medium|dark"
_LONG_TONE: Final = re.compile(rf"-({_TONE})-skin-tone")
_SHORT_TONE: Final = re.compile(rf"-({_TONE})$")
_NUMBERED_TONE: Final = re.compile(r"-tone([1-5])$")
_NUMBERED: Final = ("light", "medium-light", "medium", "medium-dark", "dark")
_GENDER: Final = re.compile(r"^(?:man|woman|person|men|women|people)-(?=.)")
_COUPLES: Final = ("couple-with-heart", "kiss", "family", "holding-hands")
_PREPOSITION: Final = re.compile(
    r" (?:with|without|in|into|of|on|over|under|from|at|to|behind|wearing|holding|feeding|facing|pointing) "
)
_SILENT_H: Final = ("hour", "honest", "heir")
_CONSONANT_VOWEL: Final = ("uni", "use", "uk", "eu", "one", "ufo", "ur", "ewe")
_PEOPLE: Final = ("people", "men", "women", "children")
_PERSON: Final = ("man", "woman", "person")
_ZODIAC: Final = ("aquarius", "aries", "cancer", "capricorn", "gemini", "leo", "libra", "ophiuchus", "pisces")
_ZODIAC_REST: Final = ("sagittarius", "scorpio", "taurus", "virgo")
_MASS: Final = ("fire", "ice", "fog", "rice", "bread", "bacon", "butter", "garlic", "luggage", "hair", "meat", "milk")
_MASS_REST: Final = ("sake", "soap", "salt", "thread", "wood", "yarn", "broccoli", "lightning", "ginger", "money")
_NO_ARTICLE: Final = frozenset((*_PEOPLE, *_ZODIAC, *_ZODIAC_REST, *_MASS, *_MASS_REST))


def split_name(name: str, style: str, known: frozenset[str] = frozenset()) -> tuple[str, str]:
    """Separate an icon name into (concept, variant).

    Args:
        name: icon name, lower case words joined by dashes.
        style: one of STYLES; "flat" writes skin tones as a bare suffix ("-medium-dark").
        known: names in the same set; a bare suffix is a skin tone only if the rest is one of them ("traffic-light" is
            not a light-skinned traffic).

    Returns: concept without skin tones, and the tones joined by "+", or "base" without any.
    """
    if match := _NUMBERED_TONE.search(name):
        return name[: match.start()], _NUMBERED[int(match[1]) - 1]
    if tones := _LONG_TONE.findall(name):
        return _LONG_TONE.sub("", name), "+".join(tones)
    match = _SHORT_TONE.search(name)
    if style == "flat" and match and name[: match.start()] in known:
        return name[: match.start()], match[1]
    return name, "base"


def caption(concept: str, style: str, variant: str = "base") -> str:
    """English caption: style, an article where the head noun wants one, the name, the skin tone.

    Raises: ValueError on an unknown style.
    """
    if style not in _LEAD:
        raise ValueError(f"style is {style!r}; allowed: {', '.join(STYLES)}")
    words = concept.replace("-", " ")
    if words.startswith("flag "):
        subject = f"the flag of {words[5:]}"
    else:
        subject = f"{_article(words)}{words}"
    tones = "" if variant == "base" else f", {variant.replace('-', ' ').replace('+', ' and ')} skin tone"
    return f"{_LEAD[style]} {subject}{tones}"


def _article(words: str) -> str:
    head = _PREPOSITION.split(f"{words} ", maxsplit=1)[0].split()[-1]
    first = words.split()[0]
    plural = len(head) > 1 and head.endswith("s") and not head.endswith(("ss", "us", "is", "as", "os", "lens"))
    if first in _PEOPLE or (first not in _PERSON and (plural or head in _NO_ARTICLE)):
        return ""
    if len(first) == 1:
        vowel = first in "aefhilmnorsx8"
    else:
        vowel = first.startswith(_SILENT_H) or (first[0] in "aeiou" and not first.startswith(_CONSONANT_VOWEL))
    return "an " if vowel else "a "


def split_group(concept: str) -> str:
    """Concepts that are near copies of each other share a group, and with it a split.

    "man-artist", "woman-artist" and "artist" are one group, as are a walker and its mirror image "-facing-right".
    """
    for couple in _COUPLES:
        if concept == couple or concept.startswith(f"{couple}-") or concept.endswith(f"-{couple}"):
            return couple
    return _GENDER.sub("", concept.removesuffix("-facing-right"))


def split_of(concept: str, style: str) -> str:
    """Fixed split of one (concept, style): "train", "heldout_concept" or "heldout_pair"."""
    group = split_group(concept)
    if _unit_hash(f"concept:{group}") < CONCEPT_SHARE:
        return "heldout_concept"
    return "heldout_pair" if _unit_hash(f"pair:{group}:{style}") < PAIR_SHARE else "train"


def _unit_hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64
