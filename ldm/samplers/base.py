"""What every sampler shares: its levels, its loop, and noise that belongs to an image rather than to a batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from ldm.registry import ConfigError
from ldm.schedule import Prediction, Schedule

__all__ = ["Draw", "ImageNoise", "OnStep", "Predict", "Prediction", "Sampler", "Trajectory"]

Predict = Callable[[Tensor, float], Prediction]
"""x_t (b c h w, variance-preserving scale) and t (a Python number: no device sync) -> x0 and eps."""

Draw = Callable[[], Tensor]
"""Fresh standard normal noise, b c h w."""

OnStep = Callable[[int, Tensor], Tensor | None]
"""Called after each step with its index and the new latent; a returned tensor replaces that latent."""

Trajectory = Generator[Tensor, Tensor, None]
"""Yields the latent after each step; is sent the latent to go on from."""


class Sampler(ABC):
    """Walks from noise to a latent through the levels of a schedule.

    A subclass writes `trajectory`, a generator: one `yield` per step. What a method remembers (past predictions of
    a multistep solver) is a local variable there, so the object itself never changes and serves any batch.

    Latents enter, leave and are yielded in the variance-preserving scale, x = sqrt(a_bar) x0 + sqrt(1 - a_bar) eps.
    A method that works on x0 + sigma eps multiplies by sqrt(1 + sigma^2) on entry and divides before its `yield`.

    Attributes:
        timesteps: n times, descending; `predict` is asked at these.
        levels: n + 1 alpha-bars: those of `timesteps`, then the one the last step ends at.
    """

    def __init__(self, schedule: Schedule, timesteps: Sequence[float], *, final: str) -> None:
        """Lay out the levels.

        Args:
            schedule: of the model that will be sampled.
            timesteps: descending, in 0..T-1; mostly from `ldm.schedule.timesteps`, but fractions are welcome.
            final: where the last step ends: "first" is the schedule's first alpha-bar (diffusers calls this
                set_alpha_to_one False; SD's setting), "one" is no noise at all.

        Raises: ConfigError for another `final`, or a zero-terminal-SNR schedule not entered at its last step.
        """
        if final not in ("first", "one"):
            raise ConfigError(f"sampler.final is {final!r}; allowed: first, one; Stable Diffusion's DDIM uses first")
        if schedule.a_bar_at(schedule.steps - 1) == 0 and timesteps[0] != schedule.steps - 1:
            raise ConfigError(
                f"sampler starts at timestep {timesteps[0]} with schedule.zero_terminal_snr true; allowed there: "
                f"{schedule.steps - 1}, the last one; set sampler.spacing: trailing"
            )
        last = schedule.a_bar_at(0) if final == "first" else 1.0
        self.timesteps: tuple[float, ...] = tuple(timesteps)
        self.levels: tuple[float, ...] = (*(schedule.a_bar_at(t) for t in timesteps), last)

    def sample(
        self,
        predict: Predict,
        x_T: Tensor,
        draw: Draw,
        *,
        on_step: OnStep | None = None,
        start: int = 0,
    ) -> Tensor:
        """Run the steps `start`..n-1.

        Args:
            predict: the (guided) model; all arithmetic outside it is in float32 or wider.
            x_T: b c h w: standard normal when `start` is 0, else a latent noised to `timesteps[start]`.
            draw: gives the noise of stochastic samplers; deterministic ones never call it.
            on_step: sees (and may replace, e.g. to blend in a known region) the latent after each step.
            start: index of the first step, 0..n-1; above 0 for image-to-image.

        Returns: b c h w, the latent at the final level, in float32 or wider.
        Raises: ValueError if `start` is outside 0..n-1.
        """
        if not 0 <= start < len(self.timesteps):
            raise ValueError(
                f"start is {start}; allowed: 0..{len(self.timesteps) - 1}; lower it or raise sampler.steps"
            )
        x = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
        path = self.trajectory(predict, x, draw, start)
        for i in range(start, len(self.timesteps)):
            x = next(path) if i == start else path.send(x)
            if on_step is not None and (replaced := on_step(i, x)) is not None:
                x = replaced
        return x

    @abstractmethod
    def trajectory(self, predict: Predict, x: Tensor, draw: Draw, start: int) -> Trajectory:
        """Take the steps `start`..n-1 from x: `x = yield next_x`, once for each of them."""


class ImageNoise:
    """Standard normal noise in which image i depends on its own seed only, never on its batch or device.

    One CPU generator per image (CPU, because its numbers are the same on every machine).
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device | str = "cpu") -> None:
        """Start one generator per seed; `shape` is c h w of one image's latent."""
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._shape = shape
        self._device = torch.device(device)

    def __call__(self) -> Tensor:
        """The next draw: b c h w float32 on the device."""
        return torch.stack([torch.randn(self._shape, generator=g) for g in self._generators]).to(self._device)
