"""Prompts with weights, `a (red:1.3) [small] apple`, in the syntax of AUTOMATIC1111's web UI."""

import re
from typing import Final

ROUND: Final = 1.1  # factor of (...), from that program
SQUARE: Final = 1 / 1.1  # factor of [...]
_PIECES: Final = re.compile(r"\\[\\()\[\]]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|[\\:]")


def parse(prompt: str) -> list[tuple[str, float]]:
    r"""Split a prompt into texts and the weight of each.

    `(x)` weighs x by 1.1, `[x]` by 1/1.1 and `(x:1.3)` by 1.3; nested brackets multiply. `\(`, `\)`, `\[`, `\]` and
    `\\` are those characters. All else is literal, so no text is refused: a colon without a plain decimal number
    and `)` behind it, as in `(word:abc)` (which weighs "word:abc" by 1.1) or in `[word:1.3]`; a closing bracket that
    nothing opened. A bracket that nothing closes weighs all that follows it.

    Returns: non-empty texts in order, neighbours of equal weight merged; the unweighted rest has 1.
    """
    parts: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where the brackets that are still open began

    def weigh(first: int, factor: float) -> None:
        parts[first:] = [(text, weight * factor) for text, weight in parts[first:]]

    for found in _PIECES.finditer(prompt):
        piece, number = found[0], found[1]
        if piece in opened:
            opened[piece].append(len(parts))
        elif number is not None and opened["("]:
            weigh(opened["("].pop(), float(number))
        elif piece == ")" and opened["("]:
            weigh(opened["("].pop(), ROUND)
        elif piece == "]" and opened["["]:
            weigh(opened["["].pop(), SQUARE)
        else:
            parts.append((piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, 1.0))
    for kind, factor in (("(", ROUND), ("[", SQUARE)):
        for first in opened[kind]:
            weigh(first, factor)
    return _merged(parts)


def _merged(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    out: list[tuple[str, float]] = []
    for text, weight in parts:
        if out and out[-1][1] == weight:
            out[-1] = (out[-1][0] + text, weight)
        else:
            out.append((text, weight))
    return out
