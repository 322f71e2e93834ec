"""The `config.json` that diffusers and transformers want beside each network's weights, from our configs."""

from collections.abc import Mapping
from typing import Any

from ldm.convert.infer import Config, ControlNetConfig, ProjectedTextConfig
from ldm.models.text import TextConfig
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAEConfig

SIZES = 256  # width of one embedded size of SDXL
SDXL_SCALE = 0.13025


def config_json(config: Config, *, sdxl: bool = False) -> Mapping[str, Any]:
    """What `from_pretrained` reads of a network; empty for one that has no class of its own there.

    `sdxl`: it is part of such a model, whose VAE has a latent scale of its own; no file holds that.
    """
    if isinstance(config, UNetConfig):
        up = ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(config.depth)]
        more = {"out_channels": config.out_channels, "up_block_types": up}
        return {"_class_name": "UNet2DConditionModel"} | _unet(config) | more
    if isinstance(config, ControlNetConfig):
        hint = {
            "conditioning_channels": config.hint_channels,
            "conditioning_embedding_out_channels": list(config.hint_widths),
        }
        return {"_class_name": "ControlNetModel"} | _unet(config.unet) | hint
    if isinstance(config, VAEConfig):
        return _vae(config) | ({"scaling_factor": SDXL_SCALE} if sdxl else {})
    if isinstance(config, TextConfig):
        return _tower(config, "CLIPTextModel")
    if isinstance(config, ProjectedTextConfig):
        return _tower(config.text, "CLIPTextModelWithProjection") | {"projection_dim": config.dim}
    return {}


def _unet(config: UNetConfig) -> dict[str, Any]:
    """What UNet and ControlNet have in common; `attention_head_dim` is the number of heads there."""
    blocks = [config.blocks_at(i) for i in range(len(config.channels))]
    words: dict[str, Any] = {
        "in_channels": config.in_channels,
        "block_out_channels": list(config.channels),
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in config.depth],
        "layers_per_block": blocks[0] if len(set(blocks)) == 1 else blocks,
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": [config.heads(c) for c in config.channels],
        "transformer_layers_per_block": [*(d or 1 for d in config.depth[:-1]), config.mid_depth or 1],
        "use_linear_projection": config.linear_proj,
        "norm_num_groups": config.groups,
    }
    if config.vector_dim is not None:
        words |= {"addition_embed_type": "text_time", "addition_time_embed_dim": SIZES}
        words |= {"projection_class_embeddings_input_dim": config.vector_dim}
    return words


def _vae(config: VAEConfig) -> dict[str, Any]:
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "block_out_channels": list(config.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "scaling_factor": config.scale_factor,
    }


def _tower(config: TextConfig, name: str) -> dict[str, Any]:
    last = config.vocab_size - 1
    marks = {"bos_token_id": last - 1, "eos_token_id": last}
    return {"architectures": [name], "model_type": "clip_text_model"} | text_words(config) | marks


def text_words(config: TextConfig) -> dict[str, Any]:
    """The shape of a text tower in the words of transformers' CLIPTextConfig."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.context_length,
        "hidden_act": config.activation,
    }
