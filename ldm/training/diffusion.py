"""Training in latent space: the UNet itself, or adapters on a frozen UNet.

Rombach et al. 2022 (arXiv:2112.10752), Eq. 2; Zhang et al. 2023 (arXiv:2302.05543), Eq. 5, for adapters.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm import generate
from ldm.conditioning import condition, count_cut
from ldm.control import Control
from ldm.data.images import Batch, ImageData
from ldm.denoiser import AdapterUse, Denoiser
from ldm.guidance import GuidanceConfig
from ldm.models.text import CutWarning, Text
from ldm.models.vae import VAE, Posterior
from ldm.registry import ConfigError, register, suggest
from ldm.samplers import DDIM
from ldm.schedule import Schedule
from ldm.training import cache_key, learning
from ldm.training.cache import Encoders, Keep, LatentData, Latents, tree_map
from ldm.training.cache_folder import Folder
from ldm.training.distributed import Rank
from ldm.training.draws import SAMPLINGS, Draws
from ldm.training.losses import diffusion_loss
from ldm.training.stage import Drawn, Loss, Report, Stage
from ldm.training.workers import NONE, Workers


@dataclass(frozen=True)
class DiffusionOptions:
    """How the denoising loss is made.

    Attributes:
        drop_text: probability that a caption is replaced by "" (for classifier-free guidance).
        drop_hint: probability, drawn independently, that a hint is replaced by the adapter's null (zeros if it has
            none).
        all_or_none: shares of samples that keep every hint, and that lose every one; the rest draws by drop_hint
            (CoAdapter: [0.1, 0.1] with drop_hint 0.5). null = all draw.
        drop_both: probability that caption and hints are dropped together; when it is set, drop_text and drop_hint are
            the probabilities of dropping only the one or only the other (IP-Adapter: 0.05 each). null = independent.
        timestep_sampling: "uniform", or "cubic": mostly noisy times (T2I-Adapter, arXiv:2302.08453, section 3.4).
        min_snr_gamma: min-SNR weighting (arXiv:2303.09556), e.g. 5; null = none.
        offset_noise: strength of per-channel noise offsets; 0 = none.
        cache: encode all images and captions once before training and keep them in memory (no augmentation then).
        cache_dir: folder to keep them in instead, for later runs; docs/training-at-scale.md. null = memory.
        preview_steps: DDIM steps of validation pictures.
        preview_guidance: guidance scale of validation pictures.
    """

    drop_text: float = 0.1
    drop_hint: float = 0.0
    all_or_none: tuple[float, float] | None = None
    drop_both: float | None = None
    timestep_sampling: str = "uniform"
    min_snr_gamma: float | None = None
    offset_noise: float = 0.0
    cache: bool = False
    cache_dir: str | None = None
    preview_steps: int = 20
    preview_guidance: float = 4.0

    def __post_init__(self) -> None:
        for name in ("drop_text", "drop_hint", "drop_both"):
            if not 0.0 <= (getattr(self, name) or 0.0) <= 1.0:
                raise ConfigError(f"stage.{name} is {getattr(self, name)}; must be a probability in [0, 1]")
        if self.drop_both is not None and self.drop_both + self.drop_text + self.drop_hint > 1:
            shares = f"{self.drop_both}, {self.drop_text}, {self.drop_hint}"
            raise ConfigError(f"stage.drop_both, drop_text, drop_hint are {shares}; their sum must be at most 1")
        shares = self.all_or_none or (0.0, 0.0)
        if not (min(shares) >= 0 and sum(shares) <= 1) or (self.all_or_none and self.drop_both is not None):
            raise ConfigError(
                f"stage.all_or_none is {self.all_or_none}; must be two shares from 0 that sum to at most 1, or null "
                f"where drop_both ({self.drop_both}) is set"
            )
        if self.timestep_sampling not in SAMPLINGS:
            word, known = self.timestep_sampling, ", ".join(SAMPLINGS)
            raise ConfigError(f"stage.timestep_sampling is {word!r}; allowed: {known}{suggest(word, SAMPLINGS)}")
        if self.cache_dir is not None and not (self.cache and self.cache_dir):
            raise ConfigError(
                f"stage.cache_dir is {self.cache_dir!r} and stage.cache {self.cache}; a folder needs stage.cache=true, "
                "null is for memory"
            )
        if self.preview_steps < 1:
            raise ConfigError(f"stage.preview_steps is {self.preview_steps}; must be at least 1")
        if not self.preview_guidance >= 0:
            raise ConfigError(f"stage.preview_guidance is {self.preview_guidance}; must be at least 0; 1 is none")


@register("stage", "diffusion", options=DiffusionOptions)
class DiffusionStage(Stage):
    """Noise-prediction training of whatever `train.trainable` names in the denoiser."""

    def __init__(
        self,
        options: DiffusionOptions,
        *,
        denoiser: Denoiser,
        vae: VAE,
        text: Text | None,
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
        self.partial = denoiser.fuser is not None  # its part for style tokens, say, where there is no style adapter
        self._null: dict[tuple[int, int], Control] = {}  # picture size -> condition of the empty caption
        self._cut = CutWarning()

    @property
    def trained(self) -> nn.Module:
        """The denoiser: unet.*, adapters.* and fuser.*."""
        return self.denoiser

    @property
    def autocast(self) -> Sequence[nn.Module]:
        """All but the VAE: see `_posterior`."""
        return (self.denoiser, *([] if self.text is None else [self.text]), *self.denoiser.heard.values())

    def train(self, mode: bool = True) -> "DiffusionStage":
        """Frozen encoders and adapters stay in eval mode: no dropout in what others learn from."""
        super().train(mode)
        self.vae.eval()
        for name in self.denoiser.adapters:
            adapter = self.denoiser.adapter(name)
            if not any(p.requires_grad for p in adapter.parameters()):
                adapter.eval()
        if self.text is not None:
            self.text.eval()
        return self

    def exports(self) -> Mapping[str, nn.Module]:
        """The UNet as "model" when no adapter exists; else each adapter, the fuser, and the UNet if it is trained."""
        adapters = dict(self.denoiser.adapters.items())
        if not adapters:
            return {"model": self.denoiser.unet}
        stem = (lambda name: "adapter") if len(adapters) == 1 else (lambda name: f"adapter.{name}")
        unet = {"unet": self.denoiser.unet} if any(p.requires_grad for p in self.denoiser.unet.parameters()) else {}
        fuser = {} if self.denoiser.fuser is None else {"fuser": self.denoiser.fuser}
        return {stem(name): module for name, module in adapters.items()} | fuser | unet

    def check(self, batch: Batch) -> None:
        """Raises: ConfigError if the batch does not bring every adapter's hint, or is of a size that does not fit."""
        hints = self.hints(batch)
        height, width = batch.image.shape[-2:]
        multiple = self.vae.factor * self.denoiser.unet.spec.multiple
        if height % multiple or width % multiple:
            raise ConfigError(
                f"images are {width}x{height} (w x h), VAE and UNet need multiples of {multiple}; change data.size or "
                "data.buckets"
            )
        for name, hint in hints.items():
            adapter = self.denoiser.adapter(name)
            if not adapter.image_prompt:
                try:
                    with torch.no_grad():
                        adapter.prepare(adapter.encode(hint))
                except ValueError as error:
                    raise ConfigError(f"adapter {name!r}, images of {width}x{height} (w x h): {error}") from error

    @torch.no_grad()
    def cached(self, data: ImageData, rank: Rank, workers: Workers = NONE, keep: Keep | None = None) -> Dataset:
        """Latents and text conditions computed once, if asked for.

        Raises: ConfigError if the data is augmented, or `stage.cache_dir` holds something else; signals.Stopped.
        """
        view = getattr(data, "options", None)
        pairs = getattr(getattr(view, "pairing", None), "augments", False)
        if self.options.cache and (pairs or getattr(view, "flip", False) or getattr(view, "crop", "") == "random"):
            raise ConfigError(
                "stage.cache is on, but data.flip, data.crop or data.reference asks for augmentation; switch one off"
            )
        if not self.options.cache:
            return data
        if len(getattr(view, "shapes", ())) > 1:
            raise ConfigError("stage.cache is on, but data.buckets asks for several sizes; switch one off")
        texts = None if self.text is None else self.base
        encoders = Encoders(self._posterior, texts, self._encoded if self._prompted() else None)
        where = self.options.cache_dir
        folder = Folder(Path(where), lambda: self._cache_key(data, rank.device), rank) if where else None
        return LatentData(data, encoders, rank, folder, workers, keep)

    def _cache_key(self, data: ImageData, device: torch.device) -> dict[str, str]:
        networks: dict[str, nn.Module] = {"VAE": self.vae}
        networks |= {} if self.text is None else {"text encoder": self.text}
        features: dict[str, Any] = {}
        if (prompted := self._prompted()) and (reference := data[0].reference) is not None:
            features = self._encoded(reference[None].to(device))
        for name in prompted:
            kind = type(self.denoiser.adapter(name)).__name__
            networks[f"image encoder of {name} ({kind})"] = self.denoiser.heard[name]
        return cache_key.key(data, device, networks, features)

    def _prompted(self) -> list[str]:
        """Adapters that take image prompts."""
        return [name for name in self.uses if self.denoiser.adapter(name).image_prompt]

    def forward(self, batch: Batch | Latents, draws: Draws, player: str, step: int) -> Loss:
        """Weighted squared error at random timesteps. See Stage.forward."""
        o = self.options
        draws.seed_layers(self.denoiser, step)
        x0, base = self._encode(batch, draws)
        t = draws.timesteps(o.timestep_sampling, self.schedule.steps)
        eps = draws.normal("noise", *x0.shape[1:])
        if o.offset_noise:
            eps = eps + o.offset_noise * draws.normal("offset", x0.shape[1], 1, 1)
        drop_text, drop_hints = self._dropped(draws)
        base = tree_map(lambda x, null: self._drop(x, null, drop_text), base, self._null_base(x0))
        base = self._placed(base, batch)
        return Loss(self._losses(x0, base, self._hints(batch, drop_hints), t, eps).mean())

    @torch.no_grad()
    def base(self, captions: Sequence[str], size: tuple[int, int]) -> Control:
        """Condition of captions for pictures of `size` (height, width) in pixels; warns once if some had to be cut.

        Empty without a text encoder: captions are not read then.
        """
        if self.text is None:
            return Control()
        truncated = [i for i, caption in enumerate(captions) if count_cut(self.text, caption)]
        self._cut(captions, truncated, self.text.towers[0].config.context_length)
        return condition(self.text, captions, size)

    def _null_base(self, x0: Tensor) -> Control:
        """Condition of the empty caption, all tensors 1 ..., for pictures whose latents are like x0."""
        size = (x0.shape[-2] * self.vae.factor, x0.shape[-1] * self.vae.factor)
        if size not in self._null:
            self._null[size] = self.base([""], size)
        return self._null[size]

    def _placed(self, base: Control, batch: Batch | Latents) -> Control:
        """Tell models with a size condition (SDXL) where the pictures were cut from; encoded ones count as whole."""
        if self.text is None or base.vector is None or isinstance(batch, Latents) or batch.origin is None:
            return base
        return dataclasses.replace(base, vector=self.text.placed(base.vector, batch.origin))

    def _losses(self, x0: Tensor, base: Control, hints: dict[str, Any], t: Tensor, eps: Tensor) -> Tensor:
        x_t = self.schedule.add_noise(x0, eps, t)
        output = self.denoiser(x_t, t, base, hints)
        target = self.schedule.target(self.objective, x0, eps, t)
        return diffusion_loss(output, target, self.schedule, self.objective, t, self.options.min_snr_gamma)

    @torch.no_grad()
    def _encode(self, batch: Batch | Latents, draws: Draws) -> tuple[Tensor, Control]:
        """Scaled latent (a posterior sample, as Stable Diffusion trains) and condition of the captions."""
        if isinstance(batch, Latents):
            mean, std, base = batch.mean, batch.std, batch.base
        else:
            posterior = self._posterior(batch.image)
            mean, std = posterior.mean, posterior.std
            base = self.base(batch.text, (batch.image.shape[-2], batch.image.shape[-1]))
        return self.vae.config.scale_factor * (mean + std * draws.normal("posterior", *mean.shape[1:])), base

    def _posterior(self, images: Tensor) -> Posterior:
        """Of the unscaled latent, in float32 whatever autocast says: in fp16 SDXL's VAE overflows."""
        with torch.autocast(images.device.type, enabled=False):
            return self.vae.encode(images)

    def _dropped(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Which captions are dropped, b bool, and which hints of each adapter."""
        o = self.options
        if o.drop_both is None:
            hints = {name: draws.uniform(f"drop_hint.{name}") < o.drop_hint for name in self.uses}
            if o.all_or_none is not None:
                r, (every, none) = draws.uniform("all_or_none"), o.all_or_none
                hints = {name: (r >= every) & (drop | (r < every + none)) for name, drop in hints.items()}
            return draws.uniform("drop_text") < o.drop_text, hints
        r, one = draws.uniform("drop"), o.drop_both + o.drop_text
        hint = (r < o.drop_both) | ((r >= one) & (r < one + o.drop_hint))
        return r < one, dict.fromkeys(self.uses, hint)

    def _hints(self, batch: Batch | Latents, drop: Mapping[str, Tensor]) -> dict[str, Any]:
        """Adapter name -> encoded hint; its null in the samples where `drop` says so."""
        hints = self._features(batch)
        for name, hint in hints.items():
            null = self.denoiser.adapter(name).null(hint)
            null = tree_map(torch.zeros_like, hint) if null is None else null
            hints[name] = tree_map(lambda x, none, drop=drop[name]: self._drop(x, none, drop), hint, null)
        return hints

    @torch.no_grad()
    def _features(self, batch: Batch | Latents) -> dict[str, Any]:
        """Adapter name -> its encoded hint in this batch. Raises: ConfigError as `hints`."""
        return (
            batch.prompts | self.hints(batch) if isinstance(batch, Latents) else self.denoiser.encode(self.hints(batch))
        )

    def _encoded(self, reference: Tensor) -> dict[str, Any]:
        """Adapter name -> features b 1 ... of image prompts b 3 h w in [-1, 1], for the adapters that take them."""
        return self.denoiser.encode({name: _prompts(reference) for name in self._prompted()})

    def hints(self, batch: Batch | Latents) -> dict[str, Tensor]:
        """Adapter name -> its hint in this batch, as `Adapter.encode` takes it; of `Latents` without image prompts.

        Raises: ConfigError if the data does not bring one.
        """
        found: dict[str, Tensor] = {}
        for name, use in self.uses.items():
            source = use.hint or name
            if not self.denoiser.adapter(name).image_prompt:
                if source not in batch.hints:
                    have = f"{sorted(batch.hints)}{suggest(source, batch.hints) or ': add it to data.hints'}"
                    raise ConfigError(f"adapter {name!r} wants hint {source!r}; the data's hints are {have}")
                found[name] = batch.hints[source]
            elif isinstance(batch, Batch):
                if batch.reference is None:
                    raise ConfigError(f"adapter {name!r} wants an image prompt; set data.reference, e.g. to file")
                found[name] = _prompts(batch.reference)
        return found

    def prompts(self, batch: Batch) -> list[str]:
        """The captions to draw; empty ones without a text encoder, which nothing reads."""
        return [*batch.text] if self.text is not None else [""] * len(batch.keys)

    @staticmethod
    def _drop(x: Tensor, null: Tensor, drop: Tensor) -> Tensor:
        return torch.where(drop.view(-1, *[1] * (x.ndim - 1)), null.to(x.dtype), x)

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch], images: int, seed: int) -> Report:
        """Held-out loss on fixed noise and evenly spread timesteps, ADAPTER.residual_ratio (the root of `loudness`'s).

        Pictures are drawn with and without the adapters.
        """
        losses: list[Tensor] = []
        times: list[Tensor] = []
        loud: dict[str, Tensor] = {}
        shown: list[Batch] = []
        count = 0
        for batch in batches:
            b = len(batch.keys)
            if count < images:
                shown.append(batch)
            draws = Draws(seed, range(count, count + b), batch.image.device)
            x0, base = self._encode(batch, draws)
            base = self._placed(base, batch)
            t = torch.arange(count, count + b, device=x0.device) * 577 % self.schedule.steps  # coprime to T: spreads
            hints, eps = self._features(batch), draws.normal("noise", *x0.shape[1:])
            losses.append(self._losses(x0, base, hints, t, eps))
            times.append(t)
            heard = learning.loudness(self.denoiser, self.schedule.add_noise(x0, eps, t), t, base, hints)
            loud = {name: squares + loud.get(name, 0.0) for name, squares in heard.items()}
            count += b
        figures = learning.by_time(torch.cat(losses), torch.cat(times), self.schedule.steps)
        figures |= {f"{name}.residual_ratio": (own / met).sqrt().item() for name, (own, met) in loud.items()}
        drawn = self._drawn(shown, images, seed)
        return Report(figures, {} if drawn is None else drawn.columns(), drawn)

    def _drawn(self, batches: Sequence[Batch], images: int, seed: int) -> Drawn | None:
        """Samples of the first `images` items without and with the adapters; None of none."""
        parts: list[Drawn] = []
        left, first = images, seed
        for batch in batches:
            n = min(left, len(batch.keys))
            parts.append(self._draw(batch, n, first))
            left, first = left - n, first + n
        return tree_map(lambda *xs: torch.cat(xs), parts[0], *parts[1:]) if parts else None

    def _draw(self, batch: Batch, n: int, seed: int) -> Drawn:
        models = generate.Models(self.denoiser, self.vae, self.text, self.schedule, self.objective)
        sampler = DDIM(self.schedule, steps=min(self.options.preview_steps, self.schedule.steps))
        plain = generate.Request(
            self.prompts(batch)[:n],
            [seed + i for i in range(n)],
            (batch.image.shape[-2], batch.image.shape[-1]),
            guidance=GuidanceConfig(scale=self.options.preview_guidance),
        )
        hints = {name: hint[:n] for name, hint in self.hints(batch).items()}
        adapted = dataclasses.replace(plain, hints=hints, uses=self.uses)
        return Drawn(
            hints=hints,
            base=None if self.text is None else generate.images(models, plain, sampler),
            adapted=generate.images(models, adapted, sampler) if hints else None,
            real=batch.image[:n].float() * 0.5 + 0.5,
        )


def _prompts(reference: Tensor) -> Tensor:
    """Image prompts of the data, b 3 h w in [-1, 1], as adapters take them: b 1 3 h w in [0, 1]."""
    return (reference / 2 + 0.5)[:, None]
