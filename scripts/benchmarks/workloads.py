"""For each workload the two sides as functions without arguments, on the same weights and inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from scripts.benchmarks import networks
from scripts.benchmarks.references import seecoder_encoding
from scripts.benchmarks.setting import Run, Setting, both, noise, ready
from scripts.benchmarks.steps import ADAPTERS, PROMPT, denoising_step, picture
from scripts.benchmarks.training import training_step


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
    tolerance: float = 1e-5
    steps: bool = False
    trains: bool = False
    why: str = ""


def autoencoder(setting: Setting, *, decode: bool) -> dict[str, Run]:
    """VAE at the size of the step: picture to mean latent, or latent to picture."""
    scale, side = setting.scale, setting.scale.step
    theirs, vae = both(
        setting, partial(networks.their_vae, scale, setting.device), partial(networks.our_vae, scale, setting.device)
    )
    x = noise(setting, 1, 4, side // 8, side // 8) if decode else noise(setting, 1, 3, side, side).tanh()
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
    theirs, text = both(
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

SWIN_WHY = "timm's blocks, padded before they shift to be exact at every size, mark their windows anew for each picture"

TRAIN_WHY = (
    "the UNet's forward and its backward to the adapter are the same kernels on both sides; what differs is small"
)


def _workloads() -> dict[str, Workload]:
    """Name -> workload. bf16 rounds at 0.4 %, and 20 steps add such errors up."""
    out: dict[str, Workload] = {}
    for dtype, tolerance in (("fp32", 1e-5), ("bf16", 0.05)):
        # Guidance amplifies differences, more so over a whole picture.
        step = partial(Workload, dtype=dtype, bar=0.8, tolerance=2 * tolerance, steps=True, why=STEP_WHY)
        out[f"unet_step_{dtype}"] = step(denoising_step)
        out[f"controlnet_step_{dtype}"] = step(partial(denoising_step, kinds=("controlnet",)))
        for name, kinds in (("t2i", ("t2i",)), ("ip", ("ip",)), ("all", ADAPTERS)):
            out[f"{name}_step_{dtype}"] = step(partial(denoising_step, kinds=kinds), bar=0.85)
        whole = partial(Workload, dtype=dtype, tolerance=1e-4 if dtype == "fp32" else 0.2)
        out[f"text_to_image_{dtype}"] = whole(picture)
        out[f"controlnet_image_{dtype}"] = whole(partial(picture, kinds=("controlnet",)))
        once = partial(Workload, dtype=dtype, tolerance=tolerance)
        out[f"vae_encode_{dtype}"] = once(partial(autoencoder, decode=False))
        out[f"vae_decode_{dtype}"] = once(partial(autoencoder, decode=True))
        out[f"text_encode_{dtype}"] = once(text_encoding)
        out[f"seecoder_encode_{dtype}"] = once(seecoder_encoding, why=SWIN_WHY)
    for kind in ADAPTERS:
        train = partial(training_step, kind=kind)
        out[f"{kind}_train_bf16"] = Workload(
            train, "bf16", bar=0.85, tolerance=0.05, steps=True, trains=True, why=TRAIN_WHY
        )
    return out


WORKLOADS = _workloads()
