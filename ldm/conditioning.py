"""Prompts to the base condition of a UNet: what the text encoders say, before any adapter.

Clip skip, prompt weights and long prompts follow AUTOMATIC1111's web UI, whose prompts people share.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from einops import rearrange
from torch import Tensor

from ldm.control import Control
from ldm.models.text import Text, TextEncoder, Tokenizer
from ldm.prompt_weights import parse
from ldm.registry import ConfigError, suggest
from ldm.transfer import send

LONG: Final = ("cut", "chunks")
MOST: Final = 16  # chunks of a row
MEAN: Final = 1e-4  # means below this share of the tokens' root mean square are taken for zero


@dataclass(frozen=True, slots=True)
class TextUse:
    """How prompts are read.

    Attributes:
        clip_skip: take the tokens behind block `layers - (clip_skip - 1)` of every tower, so 1 is the last block and 2
            the one before it; the final LayerNorm follows where the model's config has it. None is the layer of the
            config: 1 for SD1.x, 2 for SD2.x and SDXL. This is the web UI's number; diffusers' `clip_skip`, which counts
            from the model's own layer, is one less for SD1.x and two less for SDXL. Pooled text is never skipped.
        weights: read `(word:1.3)` as in `ldm.prompt_weights`; else brackets are plain text.
        long: "cut" reads the first 75 tokens; "chunks" reads all, in chunks of 75 that are encoded apart.
    """

    clip_skip: int | None = None
    weights: bool = False
    long: str = "cut"

    def __post_init__(self) -> None:
        if self.clip_skip is not None and self.clip_skip < 1:
            raise ConfigError(f"clip_skip is {self.clip_skip}; allowed: from 1 (the last block), or null")
        if self.long not in LONG:
            raise ConfigError(f"long_prompts is {self.long!r}; allowed: {', '.join(LONG)}{suggest(self.long, LONG)}")

    def check(self, text: Text | None) -> None:
        """Raises: ConfigError if a model has too few blocks, or no text encoder reads what is set here."""
        if text is None:
            if self != TextUse():
                raise ConfigError(f"{self} is set, but the model has no text encoder to use it; drop these keys")
            return
        layers = min(tower.config.layers for tower in text.towers)
        if self.clip_skip is not None and self.clip_skip > layers:
            raise ConfigError(f"clip_skip is {self.clip_skip}; allowed for this text encoder: 1..{layers}, or null")
        if self.clip_skip == 1 and not all(tower.whole for tower in text.towers):
            raise ConfigError(
                "clip_skip is 1, but the text encoder's weights have no last block (diffusers leaves out SD2.x's); "
                f"allowed: 2..{layers} or null; name weights with all {layers} blocks for 1"
            )


DEFAULT: Final = TextUse()


@dataclass(frozen=True, slots=True)
class _Chunk:
    """At most as many tokens as a tower reads at once, and the weight of each."""

    words: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


def condition(
    text: Text | None,
    prompts: Sequence[str],
    size: tuple[int, int],
    use: TextUse = DEFAULT,
    beside: Sequence[str] | None = None,
) -> Control:
    """Tokens for cross-attention (and the vector of models that have one); each different chunk is encoded once.

    With long prompts, row i has as many chunks as the longer of prompt i and text i of `beside`, the missing ones
    being the encoding of ""; so the two branches of guidance fit each other, and nothing else decides. Rows of
    different length then repeat their chunks up to a common multiple: softmax attention over k copies of the same
    tokens is attention over one, so a row means the same (up to rounding) whatever shares its batch.

    Args:
        text: None where an adapter brings the context.
        prompts: b texts.
        size: (height, width) of the picture in pixels, which models with a size condition are told.
        use: how prompts are read.
        beside: b texts of the other branch of guidance, if there is one.

    Returns: Control with `context` b n d, and `vector` b v if the model has one, of the first chunk's pooled text.

    Raises:
        ConfigError: as `TextUse.check`, or if chunk counts in a batch have no small common multiple.
    """
    use.check(text)
    if text is None:
        return Control()
    rows = _rows(text.towers[0].tokenizer, prompts, prompts if beside is None else beside, use)
    different = {chunk: i for i, chunk in enumerate(dict.fromkeys(chunk for row in rows for chunk in row))}
    tokens, pooled = _encode(text, list(different), use)
    index = send(torch.tensor([[different[chunk] for chunk in row] for row in rows]), tokens.device)  # b k
    context = rearrange(tokens[index], "b k n d -> b (k n) d")
    pooled = None if pooled is None else pooled[index[:, 0]]  # b p
    if text.zero_empty and "" in prompts:
        said = send(torch.tensor([float(prompt != "") for prompt in prompts]), tokens.device).to(tokens.dtype)  # b
        context = context * said[:, None, None]
        pooled = None if pooled is None else pooled * said[:, None]
    return Control(context=context, vector=text.vector(pooled, size))


def check_rows(text: Text, prompts: Sequence[str], use: TextUse = DEFAULT, beside: Sequence[str] | None = None) -> None:
    """Refuse prompts that cannot share a batch, by the tokenizer alone. Raises: ConfigError as `condition`."""
    if use.long != "cut":  # cut ones are one chunk each
        _rows(text.towers[0].tokenizer, prompts, prompts if beside is None else beside, use)


def count_cut(text: Text, prompt: str, use: TextUse = DEFAULT) -> int:
    """Tokens of a prompt that its encoding leaves out: those beyond the context, where `use.long` is "cut"."""
    tokenizer = text.towers[0].tokenizer
    return max(len(_words(tokenizer, prompt, use)) - tokenizer.room, 0) if use.long == "cut" else 0


def _words(tokenizer: Tokenizer, prompt: str, use: TextUse) -> list[tuple[int, float]]:
    """All tokens of a prompt with their weights. Each weighted part is split into tokens apart from the others."""
    parts = parse(prompt) if use.weights else [(prompt, 1.0)]
    return [(word, weight) for part, weight in parts for word in tokenizer.words(part)]


def _rows(tokenizer: Tokenizer, prompts: Sequence[str], beside: Sequence[str], use: TextUse) -> list[list[_Chunk]]:
    """Chunks of each prompt, as many in every row."""
    room = tokenizer.room

    def chunks(prompt: str) -> list[_Chunk]:
        words = _words(tokenizer, prompt, use)
        words = words[:room] if use.long == "cut" else words
        parts = [words[i : i + room] for i in range(0, len(words), room)] or [[]]
        return [_Chunk(tuple(word for word, _ in part), tuple(weight for _, weight in part)) for part in parts]

    rows: list[list[_Chunk]] = []
    for prompt, other in zip(prompts, beside, strict=True):
        row = chunks(prompt)
        rows.append(row + [_Chunk()] * (len(chunks(other)) - len(row)))
    if (n := math.lcm(*map(len, rows))) > max(MOST, *map(len, rows)):
        lengths = ", ".join(map(str, sorted({*map(len, rows)})))
        raise ConfigError(
            f"prompts of {lengths} chunks share a batch, which takes {n} chunks each; allowed: {MOST}; "
            "set sample.batch=1, or sort prompts by length"
        )
    return [row * (n // len(row)) for row in rows]


def _encode(text: Text, chunks: Sequence[_Chunk], use: TextUse) -> tuple[Tensor, Tensor | None]:
    """Chunks -> tokens of all towers, m n d, and the last tower's pooled text, m p."""
    outputs = [_read(tower, chunks, use) for tower in text.towers]
    tokens = torch.cat([tokens for tokens, _ in outputs], dim=-1)
    return tokens, outputs[-1][1]


def _read(tower: TextEncoder, chunks: Sequence[_Chunk], use: TextUse) -> tuple[Tensor, Tensor | None]:
    device, n = tower.token_embedding.weight.device, tower.config.context_length
    ids = tower.tokenizer.rows([chunk.words for chunk in chunks])
    tokens, pooled = tower.outputs(send(ids, device), use.clip_skip)
    if not use.weights:
        return tokens, pooled
    rows = [(1.0, *chunk.weights, *[1.0] * (n - 1 - len(chunk.weights))) for chunk in chunks]
    return _weighted(tokens, send(torch.tensor(rows), device)), pooled


def _weighted(tokens: Tensor, weights: Tensor) -> Tensor:
    """Tokens times their weights, then scaled so that each chunk keeps its mean over tokens and channels.

    The web UI takes that mean over the whole batch; here it is the chunk's own, so batch mates do not matter. And a
    mean that is zero but for rounding (a LayerNorm gives one, until training moves it), or that the weights turned
    round, is not restored: the factor would be noise, or negative.

    Args:
        tokens: m n d.
        weights: m n; marks and padding have 1.

    Returns: m n d.
    """
    z = tokens.float()
    y = z * weights[..., None]
    before, after = (x.mean(dim=(1, 2), keepdim=True) for x in (z, y))
    smallest = MEAN * z.square().mean(dim=(1, 2), keepdim=True).sqrt()
    restored = (before * after > 0) & (after.abs() > smallest) & (before.abs() > smallest)
    return torch.where(restored, y * (before / after), y).to(tokens.dtype)
