"""The same random weights in a reference network (diffusers, transformers) and in ours, at two sizes."""

from dataclasses import dataclass
from typing import Any, TypeVar

import diffusers as _diffusers
import torch
import transformers as _transformers
from torch import Tensor, nn

from adapters.controlnet import ControlNet, ControlNetOptions
from adapters.ip_adapter import IPAdapter, IPAdapterOptions
from adapters.t2i_adapter import T2IAdapter, T2IAdapterOptions
from ldm.convert import KeyMap, diffusers_controlnet, diffusers_unet, diffusers_vae, transformers_text
from ldm.convert.diffusers_config import text_words
from ldm.convert.ip_adapter import published
from ldm.convert.tables_t2i import T2IConfig, diffusers_t2i
from ldm.models.clip import ImageTower
from ldm.models.text import TextConfig, TextEncoder, Tokenizer
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig

diffusers: Any = _diffusers  # their signatures are no concern of ours
transformers: Any = _transformers
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Scale:
    """Sizes of everything. Latents are 1/8 of pixels.

    Attributes:
        unet, vae, text: the networks.
        hint_widths: of ControlNet's hint encoder.
        image_dim: width of image prompts; 1024 is that of OpenCLIP ViT-H/14.
        step: pixels of the denoising step and of the VAE; 512 gives latents of 64 x 64.
        picture: pixels of a whole sampling run and of the training step.
        steps: sampling steps.
    """

    unet: UNetConfig
    vae: VAEConfig
    text: TextConfig
    hint_widths: tuple[int, ...]
    image_dim: int
    step: int
    picture: int
    steps: int


SCALES = {
    "full": Scale(
        UNetConfig(), VAEConfig(), TextConfig(), (16, 32, 96, 256), image_dim=1024, step=512, picture=256, steps=20
    ),
    "tiny": Scale(
        UNetConfig(channels=(16, 32, 32, 32), context_dim=32, num_heads=4, groups=8),
        VAEConfig(channels=(8, 16, 16, 16), blocks=1, groups=4),
        TextConfig(width=32, layers=2, heads=4, merges=200),
        (4, 8, 8, 16),
        image_dim=24,
        step=64,
        picture=64,
        steps=3,
    ),
}


@torch.no_grad()
def randomise(module: M) -> M:
    """Random weights of about unit gain everywhere, also where networks start at zero; never degenerate."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.05)
    return module.eval()


def _empty(make: Any, device: torch.device) -> Any:
    """A network whose weights are memory that nobody has written yet: fast to build."""
    with torch.device("meta"):
        module = make()
    return module.to_empty(device=device)


def _filled(ours: M, keys: KeyMap, theirs: nn.Module) -> M:
    """Ours with their weights: the same memory, not a copy."""
    ours.load_state_dict(keys.to_ours(theirs.state_dict()), assign=True)
    return ours.eval()


def _shape(config: UNetConfig) -> dict[str, Any]:
    """What UNet2DConditionModel and ControlNetModel have in common; `attention_head_dim` is the number of heads."""
    return {
        "in_channels": config.in_channels,
        "block_out_channels": config.channels,
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in config.depth],
        "layers_per_block": config.blocks,
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": [config.heads(c) for c in config.channels],
        "norm_num_groups": config.groups,
    }


def their_unet(scale: Scale, device: torch.device) -> nn.Module:
    """A diffusers UNet2DConditionModel."""
    up = ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(scale.unet.depth)]
    shape = _shape(scale.unet)
    return randomise(_empty(lambda: diffusers.UNet2DConditionModel(**shape, up_block_types=up), device))


def our_unet(scale: Scale, device: torch.device, theirs: nn.Module | None) -> UNet:
    """Our UNet with their weights, or with random ones."""
    unet: UNet = _empty(lambda: UNet(scale.unet), torch.device("meta") if theirs else device)
    return _filled(unet, diffusers_unet(scale.unet), theirs) if theirs else randomise(unet)


def their_controlnet(scale: Scale, device: torch.device) -> nn.Module:
    """A diffusers ControlNetModel."""
    words = _shape(scale.unet) | {"conditioning_embedding_out_channels": scale.hint_widths}
    return randomise(_empty(lambda: diffusers.ControlNetModel(**words), device))


def our_controlnet(scale: Scale, device: torch.device, unet: UNet, theirs: nn.Module | None) -> ControlNet:
    """Our ControlNet with their weights, or with random ones."""
    options = ControlNetOptions(hint_widths=scale.hint_widths, init="random")
    net: ControlNet = _empty(lambda: ControlNet(options, unet=unet), torch.device("meta") if theirs else device)
    return _filled(net, diffusers_controlnet(scale.unet), theirs) if theirs else randomise(net)


def their_t2i(scale: Scale, device: torch.device) -> nn.Module:
    """A full diffusers T2IAdapter for sketches."""
    return randomise(_empty(lambda: diffusers.T2IAdapter(1, list(scale.unet.channels), 2, 8, "full_adapter"), device))


def our_t2i(scale: Scale, device: torch.device, unet: UNet, theirs: nn.Module | None) -> T2IAdapter:
    """Our T2I-Adapter with their weights, or with random ones."""
    options = T2IAdapterOptions(hint_channels=1)
    net: T2IAdapter = _empty(lambda: T2IAdapter(options, unet=unet), torch.device("meta") if theirs else device)
    keys = diffusers_t2i(T2IConfig(scale.unet.channels, folded=options.vae_factor**2, blocks=2))
    return _filled(net, keys, theirs) if theirs else randomise(net)


class Features(ImageTower):
    """Stands where images were encoded before: as wide as the tower that did it, without its weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.pooled_width, self.image_size = width, width, 1

    def forward(self, x: Tensor) -> Tensor:
        """Features b d as they are."""
        return x

    def tokens(self, x: Tensor, *, last: bool = False) -> Tensor:
        """Features b n d as they are."""
        del last
        return x


def ip_adapter(scale: Scale, device: torch.device) -> tuple[IPAdapter, dict[str, dict[str, Tensor]]]:
    """Our IP-Adapter with random weights, and the same weights as its authors publish them: part -> name -> tensor."""
    options = IPAdapterOptions({"name": "open_clip", "embed_dim": scale.image_dim}, init="random")
    with torch.device("meta"):
        unet = UNet(scale.unet)
    net = randomise(_empty(lambda: IPAdapter(options, unet=unet, tower=Features(scale.image_dim)), device))
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, value in published(unet.spec.cross_attn, "base").to_theirs(net.state_dict()).items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    return net, parts


def prompted(unet: Any, parts: dict[str, dict[str, Tensor]]) -> Any:
    """A diffusers UNet2DConditionModel with an IP-Adapter: what diffusers' own loader makes of a published file."""
    unet._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    return unet.eval()


def prompt_layers(unet: Any) -> nn.ModuleList:
    """What an IP-Adapter added to a diffusers UNet: the projection, and keys and values of each layer."""
    own = [layer for layer in unet.attn_processors.values() if isinstance(layer, nn.Module)]
    return nn.ModuleList([unet.encoder_hid_proj, *own])


def their_vae(scale: Scale, device: torch.device) -> nn.Module:
    """A diffusers AutoencoderKL."""
    config = scale.vae
    words: dict[str, Any] = {
        "down_block_types": ["DownEncoderBlock2D"] * len(config.channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(config.channels),
        "block_out_channels": config.channels,
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "scaling_factor": config.scale_factor,
    }
    return randomise(_empty(lambda: diffusers.AutoencoderKL(**words), device))


def our_vae(scale: Scale, device: torch.device, theirs: nn.Module | None) -> VAE:
    """Our VAE with their weights, or with random ones."""
    vae: VAE = _empty(lambda: VAE(scale.vae), torch.device("meta") if theirs else device)
    return _filled(vae, diffusers_vae(scale.vae), theirs) if theirs else randomise(vae)


def their_text(scale: Scale, device: torch.device) -> nn.Module:
    """A transformers CLIPTextModel."""
    last = scale.text.vocab_size - 1
    words = transformers.CLIPTextConfig(**text_words(scale.text), eos_token_id=last, bos_token_id=last - 1)
    return randomise(transformers.CLIPTextModel(words)).to(device)  # pyright: ignore[reportArgumentType]


def our_text(scale: Scale, device: torch.device, theirs: nn.Module | None) -> TextEncoder:
    """Our text tower with their weights, or with random ones."""
    text = TextEncoder(scale.text)
    return _filled(text, transformers_text(scale.text), theirs) if theirs else randomise(text).to(device)


def ids(scale: Scale, prompts: list[str]) -> torch.Tensor:
    """Token ids b n for both towers."""
    return Tokenizer(scale.text.context_length, scale.text.merges, scale.text.pad)(prompts).ids
