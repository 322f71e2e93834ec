"""One training step of each adapter on a frozen UNet, on both sides."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.config import TrainConfig
from ldm.control import Control
from ldm.denoiser import Denoiser
from ldm.schedule import Schedule
from ldm.training import optim
from scripts.benchmarks import networks
from scripts.benchmarks.networks import diffusers
from scripts.benchmarks.setting import BETAS, Run, Setting, noise
from scripts.benchmarks.steps import Theirs, denoisers, hint

LR, DECAY, CLIP = 1e-5, 0.01, 1.0


@dataclass(frozen=True)
class Batch:
    """Two pictures: latents, noise, timesteps, text and the adapter's hint; float32."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    context: Tensor
    hint: Tensor


def training_step(setting: Setting, *, kind: str) -> dict[str, Run]:
    """One step on a batch of two, as the trainers take it: autocast, squared error of the noise, clip 1.0, AdamW.

    Theirs are diffusers' examples/controlnet/train_controlnet.py, the step of its t2i_adapter/train_t2i_adapter_sdxl.py
    with the loss of SD1.5, and the IP-Adapter authors' tutorial_train.py on diffusers' own layers. That tutorial leaves
    the UNet in float32 and does not clip: here it is spared the casts, and both sides clip.

    The trained weights are float32; the locked UNet's are in the autocast dtype, as diffusers' trainers have them and
    `ldm.training` too. Image prompts are encoded before. A call returns the loss and the gradient norm before clipping.
    """
    scale, side = setting.scale, setting.scale.picture // 8
    locked = dataclasses.replace(setting, dtype=torch.float32, prepack=False)
    theirs, ours = denoisers(locked, (kind,))
    x0, t = noise(locked, 2, 4, side, side), torch.tensor([101, 801], device=setting.device)
    context = noise(locked, 2, 77, scale.unet.context_dim)
    batch = Batch(x0, x0.roll(1, 0), t, context, hint(locked, kind, 2, scale.picture))
    runs: dict[str, Run] = {}
    if ours is not None:
        if theirs is not None:  # each side trains weights of its own
            ours.adapters.load_state_dict({k: v.clone() for k, v in ours.adapters.state_dict().items()}, assign=True)
        runs["ours"] = _ours(ours, setting, kind, batch)
    if theirs is not None:
        runs["theirs"] = _theirs(theirs, setting, kind, batch)
    return runs


def _ours(denoiser: Denoiser, setting: Setting, kind: str, batch: Batch) -> Run:
    parameters = optim.trainable(denoiser.train(), ["adapters.*"])
    optim.store_frozen(denoiser, setting.dtype)
    optimizer, schedule = optim.adamw(parameters, TrainConfig(lr=LR, weight_decay=DECAY)), Schedule()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(setting.device.type, dtype=setting.dtype):
            noisy = schedule.add_noise(batch.x0, batch.eps, batch.t)
            output = denoiser(noisy, batch.t, Control(context=batch.context), {kind: batch.hint})
            loss = F.mse_loss(output.float(), batch.eps)
        loss.backward()
        return torch.stack([loss.detach(), optim.guarded_step(optimizer, parameters, CLIP)])

    return step


def _theirs(theirs: Theirs, setting: Setting, kind: str, batch: Batch) -> Run:
    trained = networks.prompt_layers(theirs.unet) if kind == "ip" else theirs.nets[kind]
    parameters = list(trained.requires_grad_(True).train().parameters())
    for p in theirs.unet.parameters():
        if not p.requires_grad:
            p.data = p.data.to(setting.dtype)
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY)
    scheduler = diffusers.DDPMScheduler(**BETAS)

    def step() -> Tensor:
        with torch.autocast(setting.device.type, dtype=setting.dtype):
            noisy = scheduler.add_noise(batch.x0, batch.eps, batch.t)
            words = {"encoder_hidden_states": batch.context, "return_dict": False}
            told = _told(theirs, kind, batch, noisy, setting.dtype)
            output = theirs.unet(noisy, batch.t, **words, **told)[0]
            loss = F.mse_loss(output.float(), batch.eps.float(), reduction="mean")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach(), norm])

    return step


def _told(theirs: Theirs, kind: str, batch: Batch, noisy: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """What the adapter gives their UNet, in the dtype that it is in."""
    if kind == "ip":
        return {"added_cond_kwargs": {"image_embeds": [batch.hint[:, :, 0]]}}
    if kind == "t2i":
        return {"down_intrablock_additional_residuals": [x.to(dtype) for x in theirs.nets[kind](batch.hint)]}
    words = {"encoder_hidden_states": batch.context, "return_dict": False}
    skips, mid = theirs.nets[kind](noisy, batch.t, controlnet_cond=batch.hint, **words)
    return {
        "down_block_additional_residuals": [skip.to(dtype) for skip in skips],
        "mid_block_additional_residual": mid.to(dtype),
    }
