"""CLIP text towers of any size, with their tokenizer: prompts to tokens for cross-attention.

Radford et al. 2021 (arXiv:2103.00020), section 2.4. Built on open_clip's transformer blocks and byte-pair encoding.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.registry import ConfigError, register

logger = logging.getLogger(__name__)

ALPHABET = 512  # 256 bytes, each with and without the end-of-word mark
ALL_MERGES = 48894  # of the published byte-pair encoding: a vocabulary of 49408
ACTIVATIONS = ("quick_gelu", "gelu")
PADDINGS = ("eos", "zero")
LAYERS = ("last", "penultimate")
TOKEN_STD = 0.02  # initial standard deviations of the published models
POSITION_STD = 0.01


@dataclass(frozen=True)
class TextConfig:
    """Shape of a text tower; the defaults are CLIP ViT-L/14's, which Stable Diffusion 1.x uses.

    SD2.x: width 1024, layers 24, heads 16, activation gelu, pad zero, layer penultimate.

    Attributes:
        width: channels of the residual stream, and of the output tokens.
        layers: transformer blocks.
        heads: attention heads; divides `width`.
        activation: "quick_gelu" (OpenAI's weights) or "gelu" (exact; OpenCLIP's).
        context_length: positions, begin and end marks included.
        merges: byte-pair merges kept, the most frequent first; fewer give a smaller vocabulary. None keeps all 48894.
        pad: token behind the end mark: "eos" repeats it (SD1.x), "zero" is id 0 (SD2.x).
        layer: output of the "last" block or of the "penultimate" one.
        final_norm: apply the final LayerNorm to it (SDXL does not).
        projection: width of the pooled output, behind a linear map without bias; null has no pooled output.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    activation: str = "quick_gelu"
    context_length: int = 77
    merges: int | None = None
    pad: str = "eos"
    layer: str = "last"
    final_norm: bool = True
    projection: int | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: on a word that is not listed above or a number out of range.
        """
        for name, allowed in (("activation", ACTIVATIONS), ("pad", PADDINGS), ("layer", LAYERS)):
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(f"text.{name} is {value!r}, must be one of {', '.join(allowed)}")
        if self.heads < 1 or self.width < 1 or self.width % self.heads:
            raise ConfigError(f"text.width is {self.width}, must be a positive multiple of text.heads={self.heads}")
        if self.layers < (fewest := 1 + (self.layer == "penultimate")):
            raise ConfigError(f"text.layers is {self.layers}, must be at least {fewest} with text.layer={self.layer}")
        if self.context_length < 3:
            raise ConfigError(f"text.context_length is {self.context_length}, must be at least 3: begin, word, end")
        if self.merges is not None and not 0 <= self.merges <= ALL_MERGES:
            raise ConfigError(f"text.merges is {self.merges}, must be null or 0..{ALL_MERGES}")
        if self.projection is not None and self.projection < 1:
            raise ConfigError(f"text.projection is {self.projection}, must be null or at least 1")

    @property
    def vocab_size(self) -> int:
        """Number of token ids; the last two are the begin and end marks."""
        return ALPHABET + (ALL_MERGES if self.merges is None else self.merges) + 2


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids, b n int64, and the indices of the prompts that did not fit and were cut."""

    ids: Tensor
    truncated: tuple[int, ...]


class Tokenizer:
    """Lower-case byte-pair encoding of prompts: begin mark, tokens, end mark, padding."""

    def __init__(self, context_length: int = 77, merges: int | None = None, pad: str = "eos") -> None:
        """Load the encoding that open_clip ships.

        Args:
            context_length: ids per prompt.
            merges: keep this many merges, the most frequent first; None keeps all. A prefix of the merge list is
                itself a valid encoding, with a smaller vocabulary.
            pad: "eos" or "zero".
        """
        from open_clip.tokenizer import SimpleTokenizer  # slow to import: not before a prompt needs it

        bpe = SimpleTokenizer()
        kept = ALL_MERGES if merges is None else merges
        if kept < ALL_MERGES:
            words = [*list(bpe.encoder)[: ALPHABET + kept], *(bpe.decoder[i] for i in bpe.all_special_ids)]
            bpe.encoder = {word: i for i, word in enumerate(words)}
            bpe.decoder = dict(enumerate(words))
            bpe.bpe_ranks = {pair: rank for pair, rank in bpe.bpe_ranks.items() if rank < kept}
        self._bpe = bpe
        self.context_length = context_length
        self.vocab_size = ALPHABET + kept + 2
        self.bos, self.eos = self.vocab_size - 2, self.vocab_size - 1
        self.pad = self.eos if pad == "eos" else 0

    @property
    def room(self) -> int:
        """Tokens between the begin and the end mark."""
        return self.context_length - 2

    def words(self, text: str) -> list[int]:
        """All tokens of a text, however many, without marks and padding."""
        return self._bpe.encode(text)

    def rows(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        """Tokens, at most `room` a chunk, -> b n int64: begin mark, tokens, end mark, padding."""
        ids = torch.full((len(chunks), self.context_length), self.pad, dtype=torch.int64)
        for i, words in enumerate(chunks):
            ids[i, : len(words) + 2] = torch.tensor([self.bos, *words, self.eos])
        return ids

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Encode prompts; those longer than `room` tokens are cut, and keep their end mark."""
        words = [self.words(text) for text in texts]
        truncated = tuple(i for i, row in enumerate(words) if len(row) > self.room)
        return Tokens(self.rows([row[: self.room] for row in words]), truncated)


class CutWarning:
    """Says once, and never again, that prompts were longer than a tokenizer's context."""

    def __init__(self) -> None:
        self._seen, self._said = 0, False

    def __call__(self, texts: Sequence[str], truncated: Sequence[int], context_length: int) -> None:
        """Count these texts; log the first time that some of them, whose indices are `truncated`, were cut."""
        self._seen += len(texts)
        if truncated and not self._said:
            self._said = True
            logger.warning(
                "%d of the %d prompts so far are longer than %d tokens and were cut, e.g. %.60r; this is said once",
                len(truncated),
                self._seen,
                context_length,
                texts[truncated[0]],
            )


class Text(nn.Module, ABC):
    """A text kind: what `ldm.conditioning` turns prompts into a UNet's condition with.

    Attributes:
        zero_empty: an empty prompt is zeros, tokens and pooled, not the encoding of "".
    """

    zero_empty = False

    @property
    @abstractmethod
    def towers(self) -> tuple["TextEncoder", ...]:
        """Towers of one encoding that read the same prompt; their tokens are concatenated channel by channel."""

    @abstractmethod
    def vector(self, pooled: Tensor | None, size: tuple[int, int]) -> Tensor | None:
        """The UNet's vector condition, or None for models that have none.

        Args:
            pooled: b p, projected features of the last tower; None if it has no projection.
            size: (height, width) of the picture in pixels.

        Returns: b v or None.
        """

    def placed(self, vector: Tensor | None, origin: Tensor) -> Tensor | None:
        """The vector with where pictures were cut from in place of "drawn whole"; as it is in models without such.

        Args:
            vector: b v, or None.
            origin: b 4, height and width of the file, top and left of the cut (`ldm.data.images.Sample`).
        """
        del origin
        return vector


@register("text", "clip", options=TextConfig)
class TextEncoder(Text):
    """Causal transformer over the tokens of a prompt; padding is not masked, as in the published models."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        from open_clip.transformer import QuickGELU, Transformer  # slow to import: not before a tower is built

        self.config = config
        self.tokenizer = Tokenizer(config.context_length, config.merges, config.pad)
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        activation = QuickGELU if config.activation == "quick_gelu" else nn.GELU
        self.transformer = Transformer(config.width, config.layers, config.heads, act_layer=activation)
        self.ln_final = nn.LayerNorm(config.width)
        # Right-multiplied: text_proj is in x out, as in OpenCLIP's files.
        self.text_proj = nn.Parameter(torch.empty(config.width, config.projection)) if config.projection else None
        self._cut = CutWarning()
        self._init()

    def _init(self) -> None:
        """Gaussian start, residual branches scaled down by depth (released CLIP code)."""
        width, branches = self.config.width, 2 * self.config.layers
        nn.init.normal_(self.token_embedding.weight, std=TOKEN_STD)
        nn.init.normal_(self.positional_embedding, std=POSITION_STD)
        stds = {
            "attn.in_proj_weight": width**-0.5,
            "attn.out_proj.weight": (width * branches) ** -0.5,
            "mlp.c_fc.weight": (2 * width) ** -0.5,
            "mlp.c_proj.weight": (width * branches) ** -0.5,
        }
        for block in self.transformer.resblocks:
            for name, std in stds.items():
                nn.init.normal_(block.get_parameter(name), std=std)
        if self.text_proj is not None:
            nn.init.normal_(self.text_proj, std=width**-0.5)

    @property
    def towers(self) -> tuple["TextEncoder", ...]:
        """See `Text`: itself alone."""
        return (self,)

    def vector(self, pooled: Tensor | None, size: tuple[int, int]) -> None:
        """See `Text`: SD1.x and SD2.x have none."""
        del pooled, size

    def hidden(self, ids: Tensor, skip: int = 0) -> Tensor:
        """Output of block `layers - skip`, before the final LayerNorm.

        Args:
            ids: b n int64, n at most `context_length`.
            skip: blocks left out at the end.

        Returns: b n d.

        Raises:
            ValueError: if the prompt has more positions than the tower, or `skip` more blocks.
        """
        n = ids.shape[1]
        if n > self.config.context_length or not 0 <= skip < self.config.layers:
            raise ValueError(
                f"text: {n} positions and skip={skip}; this tower has {self.config.context_length} positions and "
                f"{self.config.layers} layers: cut the ids with its tokenizer, lower skip"
            )
        h = self.token_embedding(ids) + self.positional_embedding[:n]  # b n d
        return self._run(h, 0, self.config.layers - skip)

    def _run(self, h: Tensor, first: int, end: int) -> Tensor:
        """Blocks first..end-1 on b n d."""
        blocks: Any = self.transformer.resblocks[first:end]
        for block in blocks:
            h = h + block.ls_1(_causal_attention(block.attn, block.ln_1(h)))
            h = h + block.ls_2(block.mlp(block.ln_2(h)))
        return h

    @property
    def whole(self) -> bool:
        """Whether the last block has weights: zeros stand for it where a file leaves it out (`ldm.convert.slots`)."""
        weight = self.get_parameter(f"transformer.resblocks.{self.config.layers - 1}.ln_1.weight")
        return weight.is_meta or bool(weight.any())  # without memory nothing is missing yet

    def skipped(self, clip_skip: int | None) -> int:
        """Blocks left out at the end: `clip_skip` - 1, or as `config.layer` says where it is None."""
        return int(self.config.layer == "penultimate") if clip_skip is None else clip_skip - 1

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids b n int64 -> tokens for cross-attention, b n d, as the config's layer and final norm say."""
        h = self.hidden(ids, self.skipped(None))
        return self.ln_final(h) if self.config.final_norm else h

    def outputs(self, ids: Tensor, clip_skip: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens for cross-attention and the projected pooled features, in one run through the blocks.

        Args:
            ids: b n int64.
            clip_skip: see `ldm.conditioning.TextUse`. The pooled features always come from the last block.

        Returns: b n d, and b p (None without a projection).

        Raises:
            ValueError: as `hidden`.
        """
        skip = self.skipped(clip_skip)
        h = self.hidden(ids, skip)
        tokens = self.ln_final(h) if self.config.final_norm else h
        if self.text_proj is None:
            return tokens, None
        last = self.ln_final(self._run(h, self.config.layers - skip, self.config.layers))
        return tokens, self.pooled(last, ids) @ self.text_proj

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Prompts -> token ids b n int64, on the tower's device.

        Prompts that are too long are cut; the first time that happens there is a warning, and none after it.
        """
        tokens = self.tokenizer(texts)
        self._cut(texts, tokens.truncated, self.config.context_length)
        return tokens.ids.to(self.token_embedding.weight.device)

    def pooled(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """Features of each prompt at its first end mark.

        Args:
            tokens: b n d, output of the last block after the final LayerNorm.
            ids: b n int64, the ids they were made from.

        Returns: b d.
        """
        first = (ids == self.tokenizer.eos).to(torch.int32).argmax(dim=1)  # b
        return tokens[torch.arange(len(tokens), device=tokens.device), first]


def _causal_attention(attn: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Each position sees itself and those before; b n d -> b n d.

    With the module's own weights but not its forward, which turns the batch to the middle: on CPUs the projection of
    such a view copies the weights at every call (many times slower in bf16).
    """
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=attn.num_heads)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attn.out_proj(rearrange(out, "b h n d -> b n (h d)"))
