"""What is timed: for each workload the two sides as functions without arguments, on the same weights and inputs."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import fast, generate
from ldm.config import TrainConfig
from ldm.control import Control
from ldm.denoiser import Denoiser
from ldm.guidance import combine
from ldm.samplers import DDIM
from ldm.samplers.base import ImageNoise
from ldm.schedule import Schedule
from ldm.training import optim
from scripts.benchmarks import networks
from scripts.benchmarks.networks import Scale, diffusers

GUIDANCE, SEED, PROMPT = 7.5, 0, "a watercolour of a lighthouse at dawn"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Setting:
    """Where and at which size a workload is built.

    Attributes:
        scale, device, dtype: of the networks.
        sides: which are wanted.
        prepack: whether our weights are laid out as sampling does it (`ldm.fast`); off for training and compiling.
    """

    scale: Scale
    device: torch.device
    dtype: torch.dtype
    sides: tuple[str, ...] = ("ours", "theirs")
    prepack: bool = True


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    Attributes:
        build: setting -> the wanted sides; a call does the work once and returns what both must agree on.
        dtype: fp32 | bf16; of the weights, or of autocast for training.
        bar: largest time ratio, ours to theirs, that this project accepts.
        tolerance: largest difference of the outputs, relative to the largest value of theirs.
        steps: whether a call is one denoising or training step, for which host syncs and graph breaks are promised.
        trains: whether a call runs backward.
        why: the known reason where the bar is missed.
    """

    build: Callable[[Setting], dict[str, Run]]
    dtype: str
    bar: float = 1.0
    tolerance: float = 1e-4
    steps: bool = False
    trains: bool = False
    why: str = ""


def ready(module: Any, setting: Setting) -> Any:
    """Ours as `ldm.sampling` sets models up: frozen, in the dtype, channels last, prepacked."""
    module = module.requires_grad_(False).eval().to(setting.dtype).to(memory_format=torch.channels_last)
    if setting.prepack:
        fast.prepack(module)
    return module


def _both(setting: Setting, theirs: Callable[[], nn.Module], ours: Callable[[Any], Any]) -> tuple[Any, Any]:
    """(theirs, ours) with one set of weights; None for a side that is not wanted."""
    their = theirs() if "theirs" in setting.sides else None
    mine = ours(their) if "ours" in setting.sides else None
    return (None if their is None else their.requires_grad_(False).to(setting.dtype)), mine


def _noise(setting: Setting, *shape: int) -> Tensor:
    """Standard normal numbers that depend on the shape alone."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(setting.device, setting.dtype)


def _hint(setting: Setting, b: int, side: int) -> Tensor:
    return _noise(setting, b, 3, side, side).sigmoid()


def denoising_step(setting: Setting, *, control: bool) -> dict[str, Run]:
    """One step of guided sampling of one picture: both branches in one call, then guidance."""
    scale, side = setting.scale, setting.scale.step // 8
    x, t = _noise(setting, 1, 4, side, side), torch.tensor([501], device=setting.device)
    context, hint = _noise(setting, 2, 77, scale.unet.context_dim), _hint(setting, 1, scale.step)
    theirs, ours = _denoisers(setting, control)
    runs: dict[str, Run] = {}
    if ours is not None:
        hints = {"net": torch.cat([hint, hint])} if control else {}
        runs["ours"] = our_step(ours, Control(context=context), hints, x, t)
    if theirs is not None:
        runs["theirs"] = partial(_their_step, *theirs, x, t, context, torch.cat([hint, hint]))
    return runs


def _denoisers(setting: Setting, control: bool) -> tuple[tuple[Any, Any] | None, Denoiser | None]:
    """(their UNet, their ControlNet or None) and our Denoiser, ready to sample."""
    scale, device = setting.scale, setting.device
    their, unet = _both(setting, partial(networks.their_unet, scale, device), partial(networks.our_unet, scale, device))
    their_net, net = None, None
    if control:
        their_net, net = _both(
            setting,
            partial(networks.their_controlnet, scale, device),
            lambda theirs: networks.our_controlnet(scale, device, unet, theirs),
        )
    ours = None if unet is None else ready(Denoiser(unet, {} if net is None else {"net": net}), setting)
    return None if their is None else (their, their_net), ours


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
def _their_step(unet: Any, net: Any, x: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> Tensor:
    """The body of diffusers' pipeline loop."""
    twice, words = torch.cat([x] * 2), {"encoder_hidden_states": context, "return_dict": False}
    residuals: dict[str, Any] = {}
    if net is not None:
        skips, mid = net(twice, t[0], controlnet_cond=hint, **words)
        residuals = {"down_block_additional_residuals": skips, "mid_block_additional_residual": mid}
    uncond, cond = unet(twice, t[0], **words, **residuals)[0].chunk(2)
    return uncond + GUIDANCE * (cond - uncond)


def picture(setting: Setting, *, control: bool) -> dict[str, Run]:
    """Prompt to picture: text encoder, DDIM with guidance, VAE decoder."""
    scale, device = setting.scale, setting.device
    theirs, denoiser = _denoisers(setting, control)
    their_vae, vae = _both(
        setting, partial(networks.their_vae, scale, device), partial(networks.our_vae, scale, device)
    )
    their_text, text = _both(
        setting, partial(networks.their_text, scale, device), partial(networks.our_text, scale, device)
    )
    hint = _hint(setting, 1, scale.picture)
    runs: dict[str, Run] = {}
    if denoiser is not None:
        schedule = Schedule()
        models = generate.Models(denoiser, ready(vae, setting), ready(text, setting), schedule, "eps")
        request = generate.Request(
            [PROMPT], [SEED], (scale.picture, scale.picture), hints={"net": hint} if control else {}
        )
        runs["ours"] = partial(generate.images, models, request, DDIM(schedule, steps=scale.steps))
    if theirs is not None:
        side = scale.picture // 8
        noise = ImageNoise([SEED], (4, side, side), device)().to(setting.dtype)
        runs["theirs"] = _their_picture(setting, *theirs, their_vae, their_text, noise, hint)
    return runs


def _their_picture(setting: Setting, unet: Any, net: Any, vae: Any, text: Any, noise: Tensor, hint: Tensor) -> Run:
    ids = networks.ids(setting.scale, ["", PROMPT]).to(setting.device)
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts: dict[str, Any] = {"vae": vae, "text_encoder": text, "tokenizer": None, "unet": unet, "scheduler": scheduler}
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    words: dict[str, Any] = {"latents": noise, "num_inference_steps": setting.scale.steps, "output_type": "pt"}
    words["guidance_scale"] = GUIDANCE
    if net is None:
        pipe = diffusers.StableDiffusionPipeline(**parts)
        words |= dict.fromkeys(("height", "width"), setting.scale.picture)
    else:
        pipe = diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=net)
        words["image"] = hint
    pipe.set_progress_bar_config(disable=True)

    def run() -> Tensor:
        with torch.no_grad():
            negative, positive = text(ids)[0].chunk(2)
        return pipe(prompt_embeds=positive, negative_prompt_embeds=negative, **words).images

    return run


def training_step(setting: Setting) -> dict[str, Run]:
    """One ControlNet step on a batch of two, as each project's own trainer takes it: autocast, clip 1.0, AdamW.

    The trained weights are float32; the locked UNet's are in the autocast dtype, as diffusers' trainer has them and
    `ldm.training` too. A call returns the loss and the gradient norm before clipping.
    """
    scale, device, side = setting.scale, setting.device, setting.scale.picture // 8
    locked = dataclasses.replace(setting, dtype=torch.float32, prepack=False)
    theirs, ours = _denoisers(locked, control=True)
    x0 = _noise(locked, 2, 4, side, side)
    eps = x0.roll(1, 0)
    batch = (x0, eps, torch.tensor([101, 801], device=device), _noise(locked, 2, 77, scale.unet.context_dim))
    hint = _hint(locked, 2, scale.picture)
    runs: dict[str, Run] = {}
    if ours is not None:
        if theirs is not None:  # each side trains weights of its own
            ours.adapters.load_state_dict({k: v.clone() for k, v in ours.adapters.state_dict().items()}, assign=True)
        runs["ours"] = _our_training(ours, setting, *batch, hint)
    if theirs is not None:
        runs["theirs"] = _their_training(*theirs, setting, *batch, hint)
    return runs


def _our_training(
    denoiser: Denoiser, setting: Setting, x0: Tensor, eps: Tensor, t: Tensor, context: Tensor, hint: Tensor
) -> Run:
    parameters = optim.trainable(denoiser.train(), ["adapters.*"])
    optim.store_frozen(denoiser, setting.dtype)
    optimizer, schedule = optim.adamw(parameters, TrainConfig(lr=1e-5)), Schedule()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(setting.device.type, dtype=setting.dtype):
            output = denoiser(schedule.add_noise(x0, eps, t), t, Control(context=context), {"net": hint})
            loss = F.mse_loss(output.float(), eps)
        loss.backward()
        return torch.stack([loss.detach(), optim.guarded_step(optimizer, parameters, 1.0)])

    return step


def _their_training(
    unet: Any, net: Any, setting: Setting, x0: Tensor, eps: Tensor, t: Tensor, context: Tensor, hint: Tensor
) -> Run:
    """The body of diffusers' examples/controlnet/train_controlnet.py under mixed precision."""
    unet.to(setting.dtype)
    parameters = list(net.requires_grad_(True).train().parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.01)
    scheduler = diffusers.DDPMScheduler(**BETAS)
    words = {"encoder_hidden_states": context, "return_dict": False}

    def step() -> Tensor:
        with torch.autocast(setting.device.type, dtype=setting.dtype):
            noisy = scheduler.add_noise(x0, eps, t)
            skips, mid = net(noisy, t, controlnet_cond=hint, **words)
            residuals = {
                "down_block_additional_residuals": [skip.to(setting.dtype) for skip in skips],
                "mid_block_additional_residual": mid.to(setting.dtype),
            }
            output = unet(noisy, t, **residuals, **words)[0]
            loss = F.mse_loss(output.float(), eps.float(), reduction="mean")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach(), norm])

    return step


def autoencoder(setting: Setting, *, decode: bool) -> dict[str, Run]:
    """VAE at the size of the step: picture to mean latent, or latent to picture."""
    scale, side = setting.scale, setting.scale.step
    theirs, vae = _both(
        setting, partial(networks.their_vae, scale, setting.device), partial(networks.our_vae, scale, setting.device)
    )
    x = _noise(setting, 1, 4, side // 8, side // 8) if decode else _noise(setting, 1, 3, side, side).tanh()
    runs: dict[str, Run] = {}
    if vae is not None:
        ours = ready(vae, setting)
        runs["ours"] = (lambda: ours.decode(x)) if decode else (lambda: ours.encode(x).mean)
    if theirs is not None:
        runs["theirs"] = (lambda: theirs.decode(x).sample) if decode else (lambda: theirs.encode(x).latent_dist.mean)
    return {side: torch.no_grad()(run) for side, run in runs.items()}


def text_encoding(setting: Setting) -> dict[str, Run]:
    """Two prompts, 77 tokens each, through the text tower."""
    scale = setting.scale
    theirs, text = _both(
        setting, partial(networks.their_text, scale, setting.device), partial(networks.our_text, scale, setting.device)
    )
    ids = networks.ids(scale, ["", PROMPT]).to(setting.device)
    runs: dict[str, Run] = {}
    if text is not None:
        ours = ready(text, setting)
        runs["ours"] = lambda: ours(ids)
    if theirs is not None:
        runs["theirs"] = lambda: theirs(ids)[0]
    return {side: torch.no_grad()(run) for side, run in runs.items()}


STEP_WHY = (
    "attention over 64 x 64 pixels is the same kernel on both sides, and packed weights help linear maps and the "
    "convolutions below 32 x 32 only; attention in parts that fit the cache, unfused, takes hundreds of operations more"
)


def _workloads() -> dict[str, Workload]:
    """Name -> workload. bf16 rounds at 0.4 %, and 20 steps add such errors up."""
    out: dict[str, Workload] = {}
    for dtype, tolerance in (("fp32", 1e-4), ("bf16", 0.05)):
        # Guidance amplifies differences.
        step = partial(Workload, dtype=dtype, bar=0.8, tolerance=4 * tolerance, steps=True, why=STEP_WHY)
        out[f"unet_step_{dtype}"] = step(partial(denoising_step, control=False))
        out[f"controlnet_step_{dtype}"] = step(partial(denoising_step, control=True))
        whole = partial(Workload, dtype=dtype, tolerance=1e-3 if dtype == "fp32" else 0.5)
        out[f"text_to_image_{dtype}"] = whole(partial(picture, control=False))
        out[f"controlnet_image_{dtype}"] = whole(partial(picture, control=True))
        once = partial(Workload, dtype=dtype, tolerance=tolerance)
        out[f"vae_encode_{dtype}"] = once(partial(autoencoder, decode=False))
        out[f"vae_decode_{dtype}"] = once(partial(autoencoder, decode=True))
        out[f"text_encode_{dtype}"] = once(text_encoding)
    out["controlnet_train_bf16"] = Workload(training_step, "bf16", bar=0.85, tolerance=0.05, steps=True, trains=True)
    return out


WORKLOADS = _workloads()
