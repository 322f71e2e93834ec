"""One step of guided sampling with any adapters, and whole pictures, on both sides."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm import generate
from ldm.control import Control
from ldm.denoiser import Denoiser
from ldm.guidance import combine
from ldm.samplers import DDIM
from ldm.samplers.base import ImageNoise
from ldm.schedule import Schedule
from scripts.benchmarks import networks
from scripts.benchmarks.networks import diffusers
from scripts.benchmarks.setting import BETAS, GUIDANCE, Run, Setting, both, noise, ready

SEED, PROMPT = 0, "a watercolour of a lighthouse at dawn"
NETWORKS = {
    "controlnet": (networks.their_controlnet, networks.our_controlnet),
    "t2i": (networks.their_t2i, networks.our_t2i),
}
ADAPTERS = (*NETWORKS, "ip")


@dataclass(frozen=True)
class Theirs:
    """Diffusers' networks.

    Attributes:
        unet: with the layers of an image prompt, if there is one.
        nets: the adapters that are networks of their own: controlnet, t2i.
    """

    unet: Any
    nets: dict[str, Any]


def denoisers(setting: Setting, kinds: Sequence[str]) -> tuple[Theirs | None, Denoiser | None]:
    """Their networks and our Denoiser with these adapters, named by kind; float32 weights are shared where possible."""
    scale, device = setting.scale, setting.device
    their, unet = both(setting, partial(networks.their_unet, scale, device), partial(networks.our_unet, scale, device))
    nets: dict[str, Any] = {}
    adapters: dict[str, Any] = {}
    for kind in kinds:
        if kind == "ip":
            adapters[kind], parts = networks.ip_adapter(scale, device)
            their = None if their is None else networks.prompted(their, parts).requires_grad_(False)
        else:
            make, convert = NETWORKS[kind]
            ours = partial(convert, scale, device, unet)
            nets[kind], adapters[kind] = both(setting, partial(make, scale, device), ours)
    denoiser = None if unet is None else ready(Denoiser(unet, adapters), setting)
    return None if their is None else Theirs(their, nets), denoiser


def hint(setting: Setting, kind: str, b: int, side: int) -> Tensor:
    """What our adapter prepares: a map of `side` pixels (ControlNet b 3 h w, a sketch b 1 h w), or features b 1 1 d."""
    if kind == "ip":
        return noise(setting, b, 1, 1, setting.scale.image_dim)
    if kind == "t2i":
        return noise(setting, b, 1, side, side).gt(1).to(setting.dtype)
    return noise(setting, b, 3, side, side).sigmoid()


def denoising_step(setting: Setting, *, kinds: Sequence[str] = ()) -> dict[str, Run]:
    """One step of guided sampling of one picture: both branches in one call, then guidance."""
    scale, side = setting.scale, setting.scale.step // 8
    x, t = noise(setting, 1, 4, side, side), torch.tensor([501], device=setting.device)
    context = noise(setting, 2, 77, scale.unet.context_dim)
    one = {kind: hint(setting, kind, 1, scale.step) for kind in kinds}
    hints = {kind: torch.cat([torch.zeros_like(h) if kind == "ip" else h, h]) for kind, h in one.items()}
    theirs, ours = denoisers(setting, kinds)
    runs: dict[str, Run] = {}
    if ours is not None:
        runs["ours"] = our_step(ours, Control(context=context), hints, x, t)
    if theirs is not None:
        runs["theirs"] = their_step(theirs, context, hints, x, t)
    return runs


def our_step(denoiser: Denoiser, base: Control, hints: dict[str, Tensor], x: Tensor, t: Tensor) -> Run:
    """A step as `ldm.generate` takes it: what does not depend on x and t is done once, here."""
    with torch.no_grad():
        whole = denoiser.unet.project(base)
        prepared = denoiser.settle(denoiser.prepare(hints), base)

    @torch.no_grad()
    def step() -> Tensor:
        twice, times = torch.cat([x, x]), torch.cat([t, t])
        control = whole + denoiser.control(twice, times, base, prepared)
        uncond, cond = denoiser.unet(twice, times, control).chunk(2)
        return combine(cond, uncond, GUIDANCE)

    return step


@torch.no_grad()
def their_step(theirs: Theirs, context: Tensor, hints: dict[str, Tensor], x: Tensor, t: Tensor) -> Run:
    """The body of the loops of diffusers' pipelines; what these do once per picture is done here.

    T2I features are made once and copied at every step, tokens of the image prompt are made anew at every step.
    """
    features = theirs.nets["t2i"](hints["t2i"]) if "t2i" in hints else []
    words = {"encoder_hidden_states": context, "return_dict": False}
    constant: dict[str, Any] = {}
    if "ip" in hints:
        constant["added_cond_kwargs"] = {"image_embeds": [hints["ip"][:, :, 0]]}  # b m d, of one adapter

    @torch.no_grad()
    def step() -> Tensor:
        twice, told = torch.cat([x] * 2), dict(constant)
        if "controlnet" in hints:
            skips, mid = theirs.nets["controlnet"](twice, t[0], controlnet_cond=hints["controlnet"], **words)
            told |= {"down_block_additional_residuals": skips, "mid_block_additional_residual": mid}
        if features:
            told["down_intrablock_additional_residuals"] = [feature.clone() for feature in features]
        uncond, cond = theirs.unet(twice, t[0], **words, **told)[0].chunk(2)
        return uncond + GUIDANCE * (cond - uncond)

    return step


def picture(setting: Setting, *, kinds: Sequence[str] = ()) -> dict[str, Run]:
    """Prompt to picture: text encoder, DDIM with guidance, VAE decoder. Kinds: none, or ControlNet."""
    scale, device = setting.scale, setting.device
    theirs, denoiser = denoisers(setting, kinds)
    their_vae, vae = both(setting, partial(networks.their_vae, scale, device), partial(networks.our_vae, scale, device))
    their_text, text = both(
        setting, partial(networks.their_text, scale, device), partial(networks.our_text, scale, device)
    )
    hints = {kind: hint(setting, kind, 1, scale.picture) for kind in kinds}
    runs: dict[str, Run] = {}
    if denoiser is not None:
        schedule = Schedule()
        models = generate.Models(denoiser, ready(vae, setting), ready(text, setting), schedule, "eps")
        request = generate.Request([PROMPT], [SEED], (scale.picture, scale.picture), hints=hints)
        runs["ours"] = partial(generate.images, models, request, DDIM(schedule, steps=scale.steps))
    if theirs is not None:
        side = scale.picture // 8
        first = ImageNoise([SEED], (4, side, side), device)().to(setting.dtype)
        runs["theirs"] = _their_picture(setting, theirs, their_vae, their_text, first, hints)
    return runs


def _their_picture(
    setting: Setting, theirs: Theirs, vae: Any, text: Any, first: Tensor, hints: dict[str, Tensor]
) -> Run:
    ids = networks.ids(setting.scale, ["", PROMPT]).to(setting.device)
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts: dict[str, Any] = {"vae": vae, "text_encoder": text, "tokenizer": None, "unet": theirs.unet}
    parts |= {"scheduler": scheduler, "safety_checker": None, "feature_extractor": None}
    words: dict[str, Any] = {"latents": first, "num_inference_steps": setting.scale.steps, "output_type": "pt"}
    words["guidance_scale"] = GUIDANCE
    if hints:
        pipe = diffusers.StableDiffusionControlNetPipeline(
            **parts, requires_safety_checker=False, controlnet=theirs.nets["controlnet"]
        )
        words["image"] = hints["controlnet"]
    else:
        pipe = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
        words |= dict.fromkeys(("height", "width"), setting.scale.picture)
    pipe.set_progress_bar_config(disable=True)

    def run() -> Tensor:
        with torch.no_grad():
            negative, positive = text(ids)[0].chunk(2)
        return pipe(prompt_embeds=positive, negative_prompt_embeds=negative, **words).images

    return run
