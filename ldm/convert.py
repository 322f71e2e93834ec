"""Key maps between our parameter names and those of other libraries, one table per layout, read in both directions.

A layout is a generator of `Pair`s made from the network's config; `KeyMap` applies it to state dicts.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.models.text import TextConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig

SHOWN = 8  # keys listed in an error


@dataclass(frozen=True, slots=True)
class Pair:
    """One of our tensors and what it is called elsewhere; several names mean that ours is their rows, concatenated."""

    ours: str
    theirs: tuple[str, ...]


@dataclass(frozen=True)
class KeyMap:
    """A layout: the tensors that may occur, and what else its files hold.

    Attributes:
        pairs: every tensor that may occur; a network need not have all of them.
        prefixes: prefixes that some files put before their names; the first is written, any is read.
        aliases: older spellings of parts of their names, old to new.
        ignored: ends of their names that hold no weights.
    """

    pairs: tuple[Pair, ...]
    prefixes: tuple[str, ...] = ("",)
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename their state dict to ours; tensors are shared where no concatenation is needed.

        Raises:
            ValueError: on keys that the layout does not have, or rows of which some are missing.
        """
        known = {name for pair in self.pairs for name in pair.theirs}
        names = {self._normal(key, known): key for key in state if not key.endswith(self.ignored)}
        _refuse(sorted(names[name] for name in names.keys() - known), "are not in this layout")
        out: dict[str, Tensor] = {}
        for pair in self.pairs:
            parts = [state[names[name]] for name in pair.theirs if name in names]
            if parts and len(parts) < len(pair.theirs):
                _refuse([name for name in pair.theirs if name not in names], "are missing")
            if parts:
                out[pair.ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out

    def to_theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename our state dict to theirs; tensors are shared.

        Raises:
            ValueError: on keys that the layout does not have.
        """
        table = {pair.ours: pair.theirs for pair in self.pairs}
        _refuse(sorted(state.keys() - table.keys()), "have no name in this layout")
        out: dict[str, Tensor] = {}
        for key, value in state.items():
            names = table[key]
            parts = [value] if len(names) == 1 else value.chunk(len(names))
            out.update((self.prefixes[0] + name, part) for name, part in zip(names, parts, strict=True))
        return out

    def _normal(self, key: str, known: set[str]) -> str:
        for old, new in self.aliases.items():
            key = key.replace(old, new)
        return next((key[len(p) :] for p in self.prefixes if key.startswith(p) and key[len(p) :] in known), key)


def _refuse(keys: list[str], what: str) -> None:
    if keys:
        shown = ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
        raise ValueError(f"convert: {len(keys)} keys {what}: {shown}; check that the config is that of the weights")


def diffusers_unet(config: UNetConfig) -> KeyMap:
    """`UNet` and the `unet` folder of a diffusers pipeline (UNet2DConditionModel)."""
    return KeyMap((*_unet_encoder(config), *_unet_decoder(config)))


def diffusers_controlnet(config: UNetConfig, hint_convs: int = 8) -> KeyMap:
    """`ControlNet` on a UNet of this config, and diffusers' ControlNetModel.

    Args:
        config: the UNet's config.
        hint_convs: convolutions of the hint encoder; 8 for VAEs with f=8.
    """
    skips = sum(config.blocks_at(level) for level in range(len(config.channels))) + len(config.channels)
    hint = ("conv_in", *(f"blocks.{i}" for i in range(hint_convs - 2)), "conv_out")
    modules = [
        *((f"hint.convs.{i}", f"controlnet_cond_embedding.{name}") for i, name in enumerate(hint)),
        *((f"zero_convs.{k}", f"controlnet_down_blocks.{k}") for k in range(skips)),
        ("zero_mid", "controlnet_mid_block"),
    ]
    return KeyMap((*_unet_encoder(config), *_modules(modules)))


def diffusers_vae(config: VAEConfig) -> KeyMap:
    """`VAE` and the `vae` folder of a diffusers pipeline (AutoencoderKL), with today's or the older attention names."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    aliases = {f"attentions.0.{a}.": f"attentions.0.{b}." for a, b in old.items()}
    return KeyMap(
        (*_modules([("quant", "quant_conv"), ("post_quant", "post_quant_conv")]), *_vae_halves(config)), aliases=aliases
    )


def transformers_text(config: TextConfig) -> KeyMap:
    """`TextEncoder` and transformers' CLIPTextModel, whose names begin with `text_model.` in published files."""
    return KeyMap(tuple(_text(config)), prefixes=("text_model.", ""), ignored=("embeddings.position_ids",))


def _modules(pairs: Iterable[tuple[str, str]]) -> Iterator[Pair]:
    """Weight and bias of each pair of modules; a module without bias leaves that pair unused."""
    for ours, theirs in pairs:
        for leaf in ("weight", "bias"):
            yield Pair(f"{ours}.{leaf}", (f"{theirs}.{leaf}",))


def _inside(ours: str, theirs: str, table: Iterable[tuple[str, str]]) -> Iterator[Pair]:
    return _modules((f"{ours}.{a}", f"{theirs}.{b}") for a, b in table)


def _same(*names: str) -> list[tuple[str, str]]:
    return [(name, name) for name in names]


_VAE_RES = [*_same("norm1", "conv1", "norm2", "conv2"), ("shortcut", "conv_shortcut")]
_VAE_ATTN = [("norm", "group_norm"), *_same("to_q", "to_k", "to_v"), ("to_out", "to_out.0")]
_UNET_RES = [*_VAE_RES, ("emb", "time_emb_proj")]
_ATTN = [*_same("to_q", "to_k", "to_v"), ("to_out", "to_out.0")]
_TRANSFORMER_BLOCK = [
    *_same("norm1", "norm2", "norm3"),
    *((f"{attn}.{a}", f"{attn}.{b}") for attn in ("attn1", "attn2") for a, b in _ATTN),
    ("ff.proj", "ff.net.0.proj"),
    ("ff.out", "ff.net.2"),
]
_TEXT_BLOCK = [
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
]


def _transformer(ours: str, theirs: str, depth: int) -> Iterator[Pair]:
    if depth:
        yield from _inside(ours, theirs, _same("norm", "proj_in", "proj_out"))
    for i in range(depth):
        yield from _inside(f"{ours}.blocks.{i}", f"{theirs}.transformer_blocks.{i}", _TRANSFORMER_BLOCK)


def _unet_encoder(config: UNetConfig) -> Iterator[Pair]:
    for ours, theirs in (("time_embed", "time_embedding"), ("vector_embed", "add_embedding")):
        yield from _inside(f"encoder.{ours}", theirs, [("0", "linear_1"), ("2", "linear_2")])
    yield from _modules([("encoder.conv_in", "conv_in")])
    for level, depth in enumerate(config.depth):
        ours, theirs = f"encoder.levels.{level}", f"down_blocks.{level}"
        for j in range(config.blocks_at(level)):
            yield from _inside(f"{ours}.blocks.{j}.res", f"{theirs}.resnets.{j}", _UNET_RES)
            yield from _transformer(f"{ours}.blocks.{j}.attn", f"{theirs}.attentions.{j}", depth)
        yield from _modules([(f"{ours}.down.conv", f"{theirs}.downsamplers.0.conv")])
    yield from _inside("encoder.mid.res1", "mid_block.resnets.0", _UNET_RES)
    yield from _transformer("encoder.mid.attn", "mid_block.attentions.0", config.mid_depth)
    yield from _inside("encoder.mid.res2", "mid_block.resnets.1", _UNET_RES)


def _unet_decoder(config: UNetConfig) -> Iterator[Pair]:
    """Both sides count decoder levels in processing order, the lowest resolution first."""
    for k, level in enumerate(reversed(range(len(config.channels)))):
        ours, theirs = f"decoder.levels.{k}", f"up_blocks.{k}"
        for j in range(config.blocks_at(level) + 1):
            yield from _inside(f"{ours}.blocks.{j}.res", f"{theirs}.resnets.{j}", _UNET_RES)
            yield from _transformer(f"{ours}.blocks.{j}.attn", f"{theirs}.attentions.{j}", config.depth[level])
        yield from _modules([(f"{ours}.up.conv", f"{theirs}.upsamplers.0.conv")])
    yield from _modules([("decoder.norm_out", "conv_norm_out"), ("decoder.conv_out", "conv_out")])


def _vae_halves(config: VAEConfig) -> Iterator[Pair]:
    """Both sides count decoder levels in processing order, the lowest resolution first."""
    halves = (("encoder", "down", config.blocks), ("decoder", "up", config.blocks + 1))
    for half, way, blocks in halves:
        yield from _inside(half, half, [*_same("conv_in", "conv_out"), ("norm_out", "conv_norm_out")])
        mid = f"{half}.mid_block"
        yield from _inside(f"{half}.mid.res1", f"{mid}.resnets.0", _VAE_RES)
        yield from _inside(f"{half}.mid.attn", f"{mid}.attentions.0", _VAE_ATTN)
        yield from _inside(f"{half}.mid.res2", f"{mid}.resnets.1", _VAE_RES)
        for level in range(len(config.channels)):
            ours, theirs = f"{half}.levels.{level}", f"{half}.{way}_blocks.{level}"
            for j in range(blocks):
                yield from _inside(f"{ours}.blocks.{j}", f"{theirs}.resnets.{j}", _VAE_RES)
            yield from _modules([(f"{ours}.{way}.conv", f"{theirs}.{way}samplers.0.conv")])


def _text(config: TextConfig) -> Iterator[Pair]:
    yield Pair("token_embedding.weight", ("embeddings.token_embedding.weight",))
    yield Pair("positional_embedding", ("embeddings.position_embedding.weight",))
    for i in range(config.layers):
        ours, theirs = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for leaf in ("weight", "bias"):
            rows = tuple(f"{theirs}.self_attn.{x}_proj.{leaf}" for x in "qkv")
            yield Pair(f"{ours}.attn.in_proj_{leaf}", rows)
        yield from _inside(ours, theirs, _TEXT_BLOCK)
    yield from _modules([("ln_final", "final_layer_norm")])
