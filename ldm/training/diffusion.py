"""Training in latent space: the UNet itself, or adapters on a frozen UNet.

Rombach et al. 2022 (arXiv:2112.10752), Eq. 2; Zhang et al. 2023 (arXiv:2302.05543), Eq. 5, for adapters.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm import generate
from ldm.control import Control
from ldm.data.images import Batch, ImageData
from ldm.denoiser import AdapterUse, Denoiser
from ldm.guidance import GuidanceConfig
from ldm.models.text import TextEncoder
from ldm.models.vae import VAE
from ldm.registry import ConfigError, register
from ldm.samplers import DDIM
from ldm.schedule import Schedule
from ldm.training.cache import LatentData, Latents
from ldm.training.draws import Draws
from ldm.training.losses import diffusion_loss
from ldm.training.stage import Loss, Report, Stage


@dataclass(frozen=True)
class DiffusionOptions:
    """How the denoising loss is made.

    Attributes:
        drop_text: probability that a caption is replaced by "" (for classifier-free guidance).
        drop_hint: probability, drawn independently, that a hint is replaced by zeros.
        min_snr_gamma: min-SNR weighting (arXiv:2303.09556), e.g. 5; null = none.
        offset_noise: strength of per-channel noise offsets; 0 = none.
        cache: encode all images and captions once before training and keep them in memory (no augmentation then).
        preview_steps: DDIM steps of validation pictures.
        preview_guidance: guidance scale of validation pictures.
    """

    drop_text: float = 0.1
    drop_hint: float = 0.0
    min_snr_gamma: float | None = None
    offset_noise: float = 0.0
    cache: bool = False
    preview_steps: int = 20
    preview_guidance: float = 4.0

    def __post_init__(self) -> None:
        for name in ("drop_text", "drop_hint"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"stage.{name} is {getattr(self, name)}; must be a probability in [0, 1]")
        if self.preview_steps < 1:
            raise ConfigError(f"stage.preview_steps is {self.preview_steps}; must be at least 1")


@register("stage", "diffusion", options=DiffusionOptions)
class DiffusionStage(Stage):
    """Noise-prediction training of whatever `train.trainable` names in the denoiser."""

    def __init__(
        self,
        options: DiffusionOptions,
        *,
        denoiser: Denoiser,
        vae: VAE,
        text: TextEncoder,
        schedule: Schedule,
        objective: str,
        uses: Mapping[str, AdapterUse],
    ) -> None:
        super().__init__()
        self.options = options
        self.denoiser = denoiser
        self.vae = vae
        self.text = text
        self.schedule = schedule
        self.objective = objective
        self.uses = dict(uses)
        self._null: Tensor | None = None  # context of the empty caption

    @property
    def trained(self) -> nn.Module:
        """The denoiser: unet.* and adapters.*."""
        return self.denoiser

    def train(self, mode: bool = True) -> "DiffusionStage":
        """Frozen encoders stay in eval mode."""
        super().train(mode)
        self.vae.eval()
        self.text.eval()
        return self

    def exports(self) -> Mapping[str, nn.Module]:
        """The UNet as "model" when no adapter exists; else each adapter, and the UNet if any of it is trained."""
        adapters = dict(self.denoiser.adapters.items())
        if not adapters:
            return {"model": self.denoiser.unet}
        stem = (lambda name: "adapter") if len(adapters) == 1 else (lambda name: f"adapter.{name}")
        unet = {"unet": self.denoiser.unet} if any(p.requires_grad for p in self.denoiser.unet.parameters()) else {}
        return {stem(name): module for name, module in adapters.items()} | unet

    @torch.no_grad()
    def cached(self, data: ImageData, device: torch.device) -> Dataset:
        """Latents and text tokens computed once, if asked for. Raises: ConfigError if the data is augmented."""
        view = getattr(data, "options", None)
        if self.options.cache and (getattr(view, "flip", False) or getattr(view, "crop", "") == "random"):
            raise ConfigError("stage.cache is on, but data.flip or data.crop asks for augmentation; switch one off")
        return LatentData(data, self.vae, self.text, device) if self.options.cache else data

    def forward(self, batch: Batch | Latents, draws: Draws, player: str, step: int) -> Loss:
        """Weighted squared error at random timesteps. See Stage.forward."""
        o = self.options
        x0, context = self._encode(batch, draws)
        t = draws.integers("timestep", self.schedule.steps)
        eps = draws.normal("noise", *x0.shape[1:])
        if o.offset_noise:
            eps = eps + o.offset_noise * draws.normal("offset", x0.shape[1], 1, 1)
        context = self._drop(context, self.null_context(), draws.uniform("drop_text") < o.drop_text)
        loss = self._loss(x0, context, self._hints(batch, draws), t, eps)
        return Loss(loss)

    def null_context(self) -> Tensor:
        """Tokens of the empty caption, 1 n d."""
        if self._null is None:
            with torch.no_grad():
                self._null = self.text.encode([""])
        return self._null

    def _loss(self, x0: Tensor, context: Tensor, hints: dict[str, Tensor], t: Tensor, eps: Tensor) -> Tensor:
        x_t = self.schedule.add_noise(x0, eps, t)
        output = self.denoiser(x_t, t, Control(context=context), hints)
        target = self.schedule.target(self.objective, x0, eps, t)
        return diffusion_loss(output, target, self.schedule, self.objective, t, self.options.min_snr_gamma)

    @torch.no_grad()
    def _encode(self, batch: Batch | Latents, draws: Draws) -> tuple[Tensor, Tensor]:
        """Scaled latent (a posterior sample, as Stable Diffusion trains) and text tokens."""
        if isinstance(batch, Latents):
            noise = draws.normal("posterior", *batch.mean.shape[1:])
            return self.vae.config.scale_factor * (batch.mean + batch.std * noise), batch.context
        size = [s // self.vae.factor for s in batch.image.shape[-2:]]
        noise = draws.normal("posterior", self.vae.config.latent_channels, *size)
        return self.vae.to_latent(batch.image, noise), self.text.encode(batch.text)

    def _hints(self, batch: Batch | Latents, draws: Draws) -> dict[str, Tensor]:
        """Adapter name -> hint, dropped independently per sample and adapter."""
        hints = self.hints(batch)
        for name, hint in hints.items():
            null = self.denoiser.adapter(name).null(hint)
            drop = draws.uniform(f"drop_hint.{name}") < self.options.drop_hint
            hints[name] = self._drop(hint, torch.zeros_like(hint) if null is None else null, drop)
        return hints

    def hints(self, batch: Batch | Latents) -> dict[str, Tensor]:
        """Adapter name -> its hint in this batch. Raises: ConfigError if the data does not bring one."""
        wanted = {name: use.hint or name for name, use in self.uses.items()}
        for name, source in wanted.items():
            if source not in batch.hints:
                have = sorted(batch.hints)
                raise ConfigError(f"adapter {name!r} wants hint {source!r}; the data's hints are {have}: add it there")
        return {name: batch.hints[source] for name, source in wanted.items()}

    @staticmethod
    def _drop(x: Tensor, null: Tensor, drop: Tensor) -> Tensor:
        return torch.where(drop.view(-1, *[1] * (x.ndim - 1)), null.to(x.dtype), x)

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch], images: int, seed: int) -> Report:
        """Held-out loss on fixed noise and evenly spread timesteps; pictures with and without the adapters."""
        total, count = torch.zeros((), device=self.null_context().device), 0
        shown: list[Batch] = []
        for batch in batches:
            b = len(batch.keys)
            if count < images:
                shown.append(batch)
            draws = Draws(seed, range(count, count + b), batch.image.device)
            x0, context = self._encode(batch, draws)
            t = torch.arange(count, count + b, device=x0.device) * 577 % self.schedule.steps  # coprime to T: spreads
            hints = self.hints(batch)
            total += b * self._loss(x0, context, hints, t, draws.normal("noise", *x0.shape[1:]))
            count += b
        return Report({"loss": (total / count).item()}, self._pictures(shown, images, seed))

    def _pictures(self, batches: Sequence[Batch], images: int, seed: int) -> dict[str, Tensor]:
        """Labelled columns: the hints, samples without and with the adapters, the ground truth."""
        columns: dict[str, list[Tensor]] = {}
        left, first = images, seed
        for batch in batches:
            n = min(left, len(batch.keys))
            for label, pictures in self._columns(batch, n, first).items():
                columns.setdefault(label, []).append(pictures)
            left, first = left - n, first + n
        return {label: torch.cat(parts) for label, parts in columns.items()}

    def _columns(self, batch: Batch, n: int, seed: int) -> dict[str, Tensor]:
        models = generate.Models(self.denoiser, self.vae, self.text, self.schedule, self.objective)
        settings = {
            "prompts": batch.text[:n],
            "seeds": [seed + i for i in range(n)],
            "size": (batch.image.shape[-2], batch.image.shape[-1]),
            "sampler": DDIM(self.schedule, steps=min(self.options.preview_steps, self.schedule.steps)),
            "guidance": GuidanceConfig(scale=self.options.preview_guidance),
        }
        hints = {name: hint[:n] for name, hint in self.hints(batch).items()}
        columns = {f"hint: {name}": hint for name, hint in hints.items()}
        columns["base"] = generate.images(models, **settings)
        if hints:
            columns["with adapter"] = generate.images(models, **settings, hints=hints, uses=self.uses)
        return columns | {"ground truth": batch.image[:n].float() * 0.5 + 0.5}
