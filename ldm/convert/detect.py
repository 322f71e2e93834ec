"""What a file holds, told from its tensor names and shapes alone."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm import registry
from ldm.convert import infer, ip_adapter, tables_coadapter, tables_seecoder, tables_t2i
from ldm.convert.infer import Config, ControlNetConfig, ProjectedTextConfig
from ldm.convert.ip_adapter import IPAdapterConfig
from ldm.convert.keymap import Renamed, grouped, nearest
from ldm.convert.tables_coadapter import FuserConfig, StyleConfig
from ldm.convert.tables_seecoder import SeeCoderConfig
from ldm.convert.tables_t2i import T2IConfig
from ldm.models.swin import Swin, SwinConfig
from ldm.models.text import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.models.vision import OpenCLIPConfig, OpenCLIPTower
from ldm.registry import ConfigError


@dataclass(frozen=True, slots=True)
class Section:
    """Where one network is found: names that begin with `prefix`, one of which is `prefix + probe`."""

    component: str
    layout: str
    naming: str
    prefix: str
    probe: str


_CONV, _WORDS = "encoder.conv_in.weight", "embeddings.token_embedding.weight"
SECTIONS = (  # of whole files, several at once; the first of each component is the one that is written
    Section("unet", "original", "original", "model.diffusion_model.", "input_blocks.0.0.weight"),
    Section("vae", "original", "original", "first_stage_model.", _CONV),
    Section("text", "original", "transformers", "cond_stage_model.transformer.", _WORDS),
    Section("text", "original", "open_clip", "cond_stage_model.model.", "token_embedding.weight"),
    Section("text", "original", "transformers", "conditioner.embedders.0.transformer.", _WORDS),
    Section("text_2", "original", "open_clip", "conditioner.embedders.1.model.", "token_embedding.weight"),
    Section("text_2", "original", "open_clip", "conditioner.embedders.0.model.", "token_embedding.weight"),  # refiner
    Section("controlnet", "original", "original", "control_model.", "input_hint_block.0.weight"),
    Section("swin", "seecoder", "original", f"{tables_seecoder.OUTER}imencoder.", "patch_embed.proj.weight"),
    Section("seecoder", "seecoder", "original", tables_seecoder.OUTER, "qtransformer.init_query.weight"),
)
BARE = (  # of files of one network: the first whose probe is there
    Section("t2i_adapter", "diffusers", "diffusers", "", "adapter.body.0.resnets.0.block1.weight"),
    Section("t2i_adapter", "ours", "ours", "", "levels.0.blocks.0.conv1.weight"),
    *(
        Section("t2i_adapter", "original", "original", prefix, probe)
        for prefix in ("", "adapter.", "module.")
        for probe in ("body.0.block1.weight", "body.0.body.0.block1.weight")  # full and XL; light
    ),
    *(
        Section(part, "original", "original", prefix, probe)
        for prefix in ("", "adapter.", "module.")
        for part, probe in (("t2i_style", "style_embedding"), ("fuser", "task_embedding"))
    ),
    Section("t2i_style", "ours", "ours", "", "queries"),
    Section("fuser", "ours", "ours", "", "write_tokens"),
    Section("seecoder", "ours", "ours", "", "query_transformer.queries"),
    Section("swin", "ours", "ours", "", "net.patch_embed.proj.weight"),
    Section("ip_adapter", "original", "original", "", "ip_adapter.1.to_k_ip.weight"),
    Section("ip_adapter", "ours", "ours", "", "to_k.0.weight"),
    Section("image", "diffusers", "transformers", "", "vision_model.embeddings.class_embedding"),
    Section("image", "ours", "ours", "", "net.class_embedding"),
    Section("controlnet", "standalone", "original", "", "input_hint_block.0.weight"),
    Section("controlnet", "diffusers", "diffusers", "", "controlnet_cond_embedding.conv_in.weight"),
    Section("controlnet", "ours", "ours", "", "hint.convs.0.weight"),
    Section("unet", "standalone", "original", "", "input_blocks.0.0.weight"),
    Section("unet", "diffusers", "diffusers", "", "down_blocks.0.resnets.0.conv1.weight"),
    Section("unet", "ours", "ours", "", "encoder.levels.0.blocks.0.res.conv1.weight"),
    Section("vae", "standalone", "original", "", "encoder.down.0.block.0.conv1.weight"),
    Section("vae", "diffusers", "diffusers", "", "encoder.down_blocks.0.resnets.0.conv1.weight"),
    Section("vae", "ours", "ours", "", "encoder.levels.0.blocks.0.conv1.weight"),
    Section("text_2", "diffusers", "transformers", "", "text_projection.weight"),
    Section("text_2", "ours", "ours", "", "text_proj"),
    Section("text", "diffusers", "transformers", "", f"text_model.{_WORDS}"),
    Section("text", "diffusers", "transformers", "", _WORDS),
    Section("text", "ours", "ours", "", "token_embedding.weight"),
    Section("image", "open_clip", "open_clip", "", "visual.class_embedding"),
)
_FACE = ("an IP-Adapter FaceID (it hears a face recogniser, which is not supported)", "use base, plus or full")
FOREIGN: tuple[tuple[tuple[str, ...], str, str], ...] = (  # files that no model here is read from:
    # patterns that names match, each one; what it is; what to do
    ((r"^difference$",), "a 'difference' ControlNet (stored minus the base UNet)", "use the full ControlNet file"),
    ((r"^ip_adapter\.\d+\.to_q_lora",), *_FACE),
    ((r"^image_proj\.proj\.0\.", r"^image_proj\.norm\."), *_FACE),  # a file without its LoRA
    ((r"lora_controlnet",), "a Control-LoRA", "use a full ControlNet file"),
    (
        (r"^lora_(te|unet)|\.lora_(up|down|A|B)\b|[._]lora\.(up|down)\b",),
        "a LoRA (changes to a model)",
        "merge it into its base model first",
    ),
    ((r"^(string_to_param|emb_params)",), "a textual inversion", "name a UNet, VAE, text encoder or ControlNet"),
    ((r"(double|joint|single)_blocks\.0\.",), "a diffusion transformer (SD3, FLUX)", "use SD1.x, SD2.x or SDXL"),
)
KEPT = re.compile(  # buffers of training checkpoints: the schedule follows from the config
    r"^(betas|(sqrt_)?(one_minus_)?alphas_cumprod(_prev)?|(sqrt|log)_one_minus_alphas_cumprod"
    r"|sqrt_recip(m1)?_alphas_cumprod|posterior_\w+|lvlb_weights|logvar|scale_factor|denoiser\.\w+)$"
)
DROPPED = re.compile(r"^model_ema\.")
READERS: dict[str, Callable[[Mapping[str, Tensor], str], tuple[Config, Renamed]]] = {
    "unet": infer.unet,
    "vae": infer.vae,
    "text": infer.text,
    "text_2": infer.projected_text,
    "controlnet": infer.controlnet,
    "t2i_adapter": tables_t2i.t2i,
    "t2i_style": tables_coadapter.style,
    "fuser": tables_coadapter.fuser,
    "ip_adapter": ip_adapter.ip_adapter,
    "image": ip_adapter.vision,
    "seecoder": tables_seecoder.seecoder,
    "swin": tables_seecoder.swin,
}


@dataclass(frozen=True, slots=True)
class Part:
    """One network of a file.

    Attributes:
        section: where it was found.
        config: its shape.
        tensors: under our names.
        unused: names in the file of tensors that this project does not use.
        problems: what keeps it from being loaded, one phrase each; empty if it is whole.
        remedy: what it then is, and what to do; "" if it is whole.
    """

    section: Section
    config: Config
    tensors: dict[str, Tensor]
    unused: tuple[str, ...]
    problems: tuple[str, ...]
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Contents:
    """Networks of a file, the names of kept and dropped buffers, and names that belong nowhere."""

    parts: tuple[Part, ...]
    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    unknown: tuple[str, ...]


def foreign(state: Mapping[str, Tensor]) -> str | None:
    """What a file is that no model can be read from, with the next move; None for model weights."""
    for patterns, what, then in FOREIGN:
        if all(any(re.search(pattern, key) for key in state) for pattern in patterns):
            return f"{what}; {then}"
    return None


def sections(state: Mapping[str, Tensor]) -> tuple[Section, ...]:
    """The networks of a state dict, by their names alone. Raises: ConfigError if there is none."""
    if what := foreign(state):
        raise ConfigError(f"this is {what}")
    found = [s for s in _placed(state) if any(key.startswith(s.prefix) for key in state)]
    found = found or [s for s in BARE if s.prefix + s.probe in state][:1]
    if not found:
        some = grouped(sorted(state))
        raise ConfigError(
            f"no known model among {len(state)} tensors ({some}); known: SD1/2, SDXL, VAE, ControlNet, T2I-Adapter"
        )
    return tuple(found)


def _placed(state: Mapping[str, Tensor]) -> list[Section]:
    """SECTIONS, those of SeeCoder where this file has it, if it has: any prefix may stand before its names."""
    there = tables_seecoder.places(state)
    seecoder = [dataclasses.replace(s, prefix=there[s.component]) for s in SECTIONS if s.component in there]
    return [s for s in SECTIONS if s.layout != "seecoder"] + seecoder


def contents(state: Mapping[str, Tensor]) -> Contents:
    """Find every network of a state dict.

    Raises: ConfigError if there is none, or one without the tensors that tell its shape.
    """
    found = sections(state)
    parts = tuple(part(state, section) for section in found)
    prefixes = tuple(s.prefix for s in found)
    rest = [key for key in state if not key.startswith(prefixes)]
    kept = tuple(k for k in rest if KEPT.search(k))
    dropped = tuple(k for k in rest if DROPPED.search(k))
    return Contents(parts, kept, dropped, tuple(sorted(set(rest) - set(kept) - set(dropped))))


def part(state: Mapping[str, Tensor], section: Section) -> Part:
    """One network of a state dict. Raises: ConfigError if the tensors that tell its shape are not there."""
    inner = {k[len(section.prefix) :]: v for k, v in state.items() if k.startswith(section.prefix)}
    try:
        config, renamed = READERS[section.component](inner, section.naming)
    except ConfigError as error:
        place = section.prefix + "*" if section.prefix else section.layout
        raise ConfigError(f"{section.component} ({place}): {error}; download it again") from error
    unused = tuple(section.prefix + key for key in renamed.ignored)
    problems = tuple(_problems(config, renamed))
    return Part(section, config, renamed.tensors, unused, problems, _remedy(config, renamed) if problems else "")


def _problems(config: Config, renamed: Renamed) -> list[str]:
    """Missing, unexpected and mis-shaped tensors, each group in a phrase."""
    wanted = shapes(config)
    missing = sorted(wanted.keys() - renamed.tensors.keys())
    foreign_keys = sorted(renamed.tensors.keys() - wanted.keys())
    out: list[str] = []
    if missing:
        near = nearest(missing, renamed.unknown)
        out.append(f"{len(missing)} of {len(wanted)} tensors missing: {grouped(missing, near)}")
    if unknown := [*renamed.unknown, *foreign_keys]:
        out.append(f"{len(unknown)} unexpected: {grouped(unknown, renamed.near)}")
    wrong = {
        key: f"{key} {tuple(value.shape)} (expected {tuple(wanted[key])})"
        for key, value in renamed.tensors.items()
        if key in wanted and value.shape != wanted[key]
    }
    if wrong:
        out.append(f"{len(wrong)} of another shape: {next(iter(wrong.values()))}")
    return out


def _remedy(config: Config, renamed: Renamed) -> str:
    """What a network with problems most likely is, and what to do about it."""
    wanted, found = shapes(config).keys(), renamed.tensors.keys()
    if isinstance(config, IPAdapterConfig) and found == wanted:
        return (
            "its layers are numbered in another order than the authors' (down, up, mid): use a published file, or "
            "renumber them"
        )
    if renamed.unknown or found - wanted:
        return "its names are of no layout that is known here: use a published file, or correct them"
    if wanted - found:
        return "this is part of a checkpoint: download it again, or name the file that has the rest"
    return "it is of an architecture that is not known here: use weights of SD1.x, SD2.x or SDXL"


@functools.cache
def shapes(config: Config) -> Mapping[str, torch.Size]:
    """Our name -> shape of every tensor of a network, from the network itself on the meta device."""
    if isinstance(config, ProjectedTextConfig):
        return {**shapes(config.text), "text_proj": torch.Size((config.text.width, config.dim))}
    with torch.device("meta"):
        if isinstance(config, SwinConfig):
            net = Swin(config)
        elif isinstance(config, ControlNetConfig):
            options: dict[str, Any] = {"hint_channels": config.hint_channels, "hint_widths": config.hint_widths}
            net = registry.build("adapter", {"name": "controlnet", **options}, unet=UNet(config.unet))
        elif isinstance(config, T2IConfig | IPAdapterConfig | SeeCoderConfig):
            net = registry.build("adapter", config.node, unet=UNet(config.unet))
        elif isinstance(config, StyleConfig | FuserConfig):
            net = registry.build(config.kind, config.node, unet=UNet(config.unet))
        elif isinstance(config, OpenCLIPConfig):
            net = OpenCLIPTower(config)
        elif isinstance(config, UNetConfig):
            net = UNet(config)
        else:
            net = VAE(config) if isinstance(config, VAEConfig) else TextEncoder(config)
    return {key: value.shape for key, value in net.state_dict().items()}


def architecture(config: Config) -> str:
    """The published model that a network has the shape of, or its shape in words."""
    if isinstance(config, T2IConfig | IPAdapterConfig | StyleConfig | FuserConfig | SeeCoderConfig):
        return config.words
    if isinstance(config, SwinConfig):
        return tables_seecoder.swin_words(config)
    if isinstance(config, OpenCLIPConfig):
        name = {(1280, 32): "OpenCLIP ViT-H/14", (1664, 48): "OpenCLIP ViT-bigG/14", (1024, 24): "CLIP ViT-L/14"}
        known = name.get((config.width, config.layers), "CLIP image")
        return f"{known} ({config.width} wide, {config.layers} layers, embeddings of {config.embed_dim})"
    if isinstance(config, ControlNetConfig):
        return f"ControlNet for {architecture(config.unet)}"
    if isinstance(config, ProjectedTextConfig):
        return f"{architecture(config.text)} with projection to {config.dim}"
    if isinstance(config, VAEConfig):
        return (
            f"KL-VAE f={2 ** (len(config.channels) - 1)}, channels {config.channels}, latent {config.latent_channels}"
        )
    if isinstance(config, TextConfig):
        name = TEXTS.get((config.width, config.layers))
        return f"{name or 'CLIP text'} ({config.width} wide, {config.layers} layers)"
    family = FAMILIES.get((config.channels, config.context_dim, config.linear_proj, config.vector_dim))
    variant = {4: "", 5: " depth", 8: " image editing (8 channels)", 9: " inpainting"}
    name = (
        f"{family}{variant.get(config.in_channels, f' ({config.in_channels} channels)')}" if family else "custom UNet"
    )
    shape = f"channels {config.channels}, depth {config.depth}, in {config.in_channels}, context {config.context_dim}"
    return f"{name} ({shape})"


TEXTS = {
    (768, 12): "CLIP ViT-L/14",
    (1024, 24): "OpenCLIP ViT-H/14",
    (1024, 23): "OpenCLIP ViT-H/14 less its last layer",
    (1280, 32): "OpenCLIP ViT-bigG/14",
}
_WIDE = (320, 640, 1280, 1280)
FAMILIES = {
    (_WIDE, 768, False, None): "SD1.x",
    (_WIDE, 1024, True, None): "SD2.x",  # eps or v leaves no trace in the weights
    ((320, 640, 1280), 2048, True, 2816): "SDXL base",
    ((384, 768, 1536, 1536), 1280, True, 2560): "SDXL refiner",
}
