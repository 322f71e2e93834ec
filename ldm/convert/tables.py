"""Key maps of every network: one table of names in three columns (ours, diffusers, original), read in both directions.

"Original" are the names of the CompVis and Stability single files, without their prefixes (`model.diffusion_model.`).
"""

from collections.abc import Iterable, Iterator

from ldm.convert.keymap import KeyMap, Pair
from ldm.models.text import TextConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig

Row = tuple[str, str, str]  # a module in our, diffusers' and the original names
DIFFUSERS, ORIGINAL = 1, 2


def _same(*names: str) -> tuple[Row, ...]:
    return tuple((name, name, name) for name in names)


RES: tuple[Row, ...] = (
    ("norm1", "norm1", "in_layers.0"),
    ("conv1", "conv1", "in_layers.2"),
    ("emb", "time_emb_proj", "emb_layers.1"),
    ("norm2", "norm2", "out_layers.0"),
    ("conv2", "conv2", "out_layers.3"),
    ("shortcut", "conv_shortcut", "skip_connection"),
)
EMBED: tuple[Row, ...] = (("0", "linear_1", "0"), ("2", "linear_2", "2"))
TRANSFORMER = _same("norm", "proj_in", "proj_out")
TRANSFORMER_BLOCK: tuple[Row, ...] = (
    *_same("norm1", "norm2", "norm3"),
    *(row for attn in ("attn1", "attn2") for row in _same(f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v")),
    *((f"{attn}.to_out", f"{attn}.to_out.0", f"{attn}.to_out.0") for attn in ("attn1", "attn2")),
    ("ff.proj", "ff.net.0.proj", "ff.net.0.proj"),
    ("ff.out", "ff.net.2", "ff.net.2"),
)
VAE_RES: tuple[Row, ...] = (
    *_same("norm1", "conv1", "norm2", "conv2"),
    ("shortcut", "conv_shortcut", "nin_shortcut"),
)
VAE_ATTN: tuple[Row, ...] = (
    ("norm", "group_norm", "norm"),
    ("to_q", "to_q", "q"),
    ("to_k", "to_k", "k"),
    ("to_v", "to_v", "v"),
    ("to_out", "to_out.0", "proj_out"),
)
VAE_OLD_ATTN = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
TEXT_BLOCK = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)


def diffusers_unet(config: UNetConfig) -> KeyMap:
    """`UNet` and the `unet` folder of a diffusers pipeline (UNet2DConditionModel)."""
    return KeyMap(_pairs((*_unet_encoder(config), *_unet_decoder(config)), DIFFUSERS))


def original_unet(config: UNetConfig) -> KeyMap:
    """`UNet` and `model.diffusion_model.*` of a single file, without that prefix."""
    return KeyMap(_pairs((*_unet_encoder(config), *_unet_decoder(config)), ORIGINAL))


def diffusers_controlnet(config: UNetConfig, hint_convs: int = 8) -> KeyMap:
    """`ControlNet` on a UNet of this config, and diffusers' ControlNetModel.

    Args:
        config: the UNet's config.
        hint_convs: convolutions of the hint encoder; 8 for VAEs with f=8.
    """
    return KeyMap(_pairs((*_unet_encoder(config), *_controlnet(config, hint_convs)), DIFFUSERS))


def original_controlnet(config: UNetConfig, hint_convs: int = 8) -> KeyMap:
    """`ControlNet` and `control_model.*` of a single file, without that prefix. Arguments as above."""
    return KeyMap(_pairs((*_unet_encoder(config), *_controlnet(config, hint_convs)), ORIGINAL))


def diffusers_vae(config: VAEConfig) -> KeyMap:
    """`VAE` and the `vae` folder of a diffusers pipeline (AutoencoderKL), with today's or the older attention names."""
    aliases = {f"attentions.0.{old}.": f"attentions.0.{new}." for old, new in VAE_OLD_ATTN.items()}
    return KeyMap(_pairs(_vae(config), DIFFUSERS), aliases=aliases)


def original_vae(config: VAEConfig) -> KeyMap:
    """`VAE` and `first_stage_model.*` of a single file; its attention projections are 1x1 convolutions."""
    changes = tuple(
        Pair(p.ours, p.theirs, "conv1x1" if ".mid.attn.to_" in p.ours and p.ours.endswith("weight") else "")
        for p in _pairs(_vae(config), ORIGINAL)
    )
    return KeyMap(changes, ignored=r"^loss\.|^model_ema\.")


def transformers_text(config: TextConfig, projection: bool = False) -> KeyMap:
    """`TextEncoder` and transformers' CLIPTextModel; some of its releases leave out `text_model.`.

    Args:
        config: the tower's config.
        projection: the file has a projection behind the tower (CLIPTextModelWithProjection); ours: `text_proj`.
    """
    extra = (Pair("text_proj", ("text_projection.weight",), "transpose"),) if projection else ()
    return KeyMap((*_text(config), *extra), optional="text_model.", ignored=r"embeddings\.position_ids$")


def open_clip_text(config: TextConfig, projection: bool = False) -> KeyMap:
    """`TextEncoder` and open_clip's CLIP, whose names ours are; arguments as above."""
    names = [pair.ours for pair in _text(config)]
    extra = (Pair("text_proj", ("text_projection",)),) if projection else ()
    ignored = r"^(logit_scale|logit_bias|attn_mask|visual\..*" + ("" if projection else "|text_projection") + r")$"
    return KeyMap((*(Pair(name, (name,)) for name in names), *extra), ignored=ignored)


def _pairs(rows: Iterable[Row], column: int) -> tuple[Pair, ...]:
    """Weight and bias of each module; a module without bias leaves that pair unused."""
    return tuple(Pair(f"{r[0]}.{leaf}", (f"{r[column]}.{leaf}",)) for r in rows for leaf in ("weight", "bias"))


def _inside(at: Row, table: Iterable[Row]) -> Iterator[Row]:
    for row in table:
        yield at[0] + "." + row[0], at[1] + "." + row[1], at[2] + "." + row[2]


def _transformer(at: Row, depth: int) -> Iterator[Row]:
    if depth:
        yield from _inside(at, TRANSFORMER)
    for i in range(depth):
        block = (f"{at[0]}.blocks.{i}", *(f"{name}.transformer_blocks.{i}" for name in at[1:]))
        yield from _inside(block, TRANSFORMER_BLOCK)  # pyright: ignore[reportArgumentType]


def _unet_encoder(config: UNetConfig) -> Iterator[Row]:
    yield from _inside(("encoder.time_embed", "time_embedding", "time_embed"), EMBED)
    yield from _inside(("encoder.vector_embed", "add_embedding", "label_emb.0"), EMBED)
    yield "encoder.conv_in", "conv_in", "input_blocks.0.0"
    n = 1  # the original numbers convolution, blocks and downsamplings in one row
    for level, depth in enumerate(config.depth):
        ours, theirs = f"encoder.levels.{level}", f"down_blocks.{level}"
        for j in range(config.blocks_at(level)):
            yield from _inside((f"{ours}.blocks.{j}.res", f"{theirs}.resnets.{j}", f"input_blocks.{n}.0"), RES)
            attn = (f"{ours}.blocks.{j}.attn", f"{theirs}.attentions.{j}", f"input_blocks.{n}.1")
            yield from _transformer(attn, depth)
            n += 1
        yield f"{ours}.down.conv", f"{theirs}.downsamplers.0.conv", f"input_blocks.{n}.0.op"
        n += 1
    last = 2 if config.mid_depth else 1
    yield from _inside(("encoder.mid.res1", "mid_block.resnets.0", "middle_block.0"), RES)
    yield from _transformer(("encoder.mid.attn", "mid_block.attentions.0", "middle_block.1"), config.mid_depth)
    yield from _inside(("encoder.mid.res2", "mid_block.resnets.1", f"middle_block.{last}"), RES)


def _unet_decoder(config: UNetConfig) -> Iterator[Row]:
    """All sides count decoder levels in processing order, the lowest resolution first."""
    n = 0
    for k, level in enumerate(reversed(range(len(config.channels)))):
        ours, theirs, depth = f"decoder.levels.{k}", f"up_blocks.{k}", config.depth[level]
        for j in range(config.blocks_at(level) + 1):
            yield from _inside((f"{ours}.blocks.{j}.res", f"{theirs}.resnets.{j}", f"output_blocks.{n}.0"), RES)
            attn = (f"{ours}.blocks.{j}.attn", f"{theirs}.attentions.{j}", f"output_blocks.{n}.1")
            yield from _transformer(attn, depth)
            n += 1
        child = 2 if depth else 1  # upsampling follows the transformer where the level has one
        yield f"{ours}.up.conv", f"{theirs}.upsamplers.0.conv", f"output_blocks.{n - 1}.{child}.conv"
    yield "decoder.norm_out", "conv_norm_out", "out.0"
    yield "decoder.conv_out", "conv_out", "out.2"


def _controlnet(config: UNetConfig, hint_convs: int) -> Iterator[Row]:
    skips = sum(config.blocks_at(level) for level in range(len(config.channels))) + len(config.channels)
    names = ("conv_in", *(f"blocks.{i}" for i in range(hint_convs - 2)), "conv_out")
    for i, name in enumerate(names):  # the original counts the activations between them too
        yield f"hint.convs.{i}", f"controlnet_cond_embedding.{name}", f"input_hint_block.{2 * i}"
    for k in range(skips):
        yield f"zero_convs.{k}", f"controlnet_down_blocks.{k}", f"zero_convs.{k}.0"
    yield "zero_mid", "controlnet_mid_block", "middle_block_out.0"


def _vae(config: VAEConfig) -> Iterator[Row]:
    """Ours and diffusers' decoder levels are in processing order; the original numbers them by resolution."""
    yield from (("quant", "quant_conv", "quant_conv"), ("post_quant", "post_quant_conv", "post_quant_conv"))
    levels = len(config.channels)
    for half, way, blocks in (("encoder", "down", config.blocks), ("decoder", "up", config.blocks + 1)):
        yield from _inside(
            (half, half, half), (*_same("conv_in", "conv_out"), ("norm_out", "conv_norm_out", "norm_out"))
        )
        ours, theirs, first = f"{half}.mid", f"{half}.mid_block", f"{half}.mid"
        yield from _inside((f"{ours}.res1", f"{theirs}.resnets.0", f"{first}.block_1"), VAE_RES)
        yield from _inside((f"{ours}.attn", f"{theirs}.attentions.0", f"{first}.attn_1"), VAE_ATTN)
        yield from _inside((f"{ours}.res2", f"{theirs}.resnets.1", f"{first}.block_2"), VAE_RES)
        for level in range(levels):
            number = level if half == "encoder" else levels - 1 - level
            ours, theirs = f"{half}.levels.{level}", f"{half}.{way}_blocks.{level}"
            first = f"{half}.{way}.{number}"
            for j in range(blocks):
                at = (f"{ours}.blocks.{j}", f"{theirs}.resnets.{j}", f"{first}.block.{j}")
                yield from _inside(at, VAE_RES)
            yield f"{ours}.{way}.conv", f"{theirs}.{way}samplers.0.conv", f"{first}.{way}sample.conv"


def _text(config: TextConfig) -> Iterator[Pair]:
    yield Pair("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",))
    yield Pair("positional_embedding", ("text_model.embeddings.position_embedding.weight",))
    modules = [("ln_final", "text_model.final_layer_norm")]
    for i in range(config.layers):
        ours, theirs = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        for leaf in ("weight", "bias"):
            rows = tuple(f"{theirs}.self_attn.{x}_proj.{leaf}" for x in "qkv")
            yield Pair(f"{ours}.attn.in_proj_{leaf}", rows)
        modules += [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in TEXT_BLOCK]
    for ours, theirs in modules:
        for leaf in ("weight", "bias"):
            yield Pair(f"{ours}.{leaf}", (f"{theirs}.{leaf}",))
