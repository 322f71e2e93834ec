"""Noise schedules, training targets and timestep spacings of variance-preserving diffusion (DDPM, arXiv:2006.11239)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.registry import ConfigError

OBJECTIVES = ("eps", "v", "x0")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a network says about x_t: the clean latent and the noise, each b c h w.

    The two fields are separate because they may come from different passes (Asyrp, arXiv:2210.10960).
    """

    x0: Tensor
    eps: Tensor


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """Noise schedule; the defaults are those of SD1.x, SD2.x and SDXL.

    Attributes:
        kind: scaled_linear (called "linear" in the original ldm code), linear ("sqrt_linear" there) or cosine.
        steps: number T of training timesteps, at least 2.
        beta_start, beta_end: first and last beta, 0 < beta_start <= beta_end < 1; cosine ignores them.
        zero_terminal_snr: rescale so that x at t = T-1 is pure noise (Lin et al. 2023, arXiv:2305.08891).
    """

    kind: str = "scaled_linear"
    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _BETAS:
            raise ConfigError(f"schedule.kind is {self.kind!r}; allowed: {', '.join(_BETAS)}; choose one of these")
        if self.steps < 2:
            raise ConfigError(f"schedule.steps is {self.steps}; allowed: 2 or more; published models use 1000")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(
                f"schedule.beta_start, beta_end are {self.beta_start}, {self.beta_end}; allowed: "
                "0 < beta_start <= beta_end < 1; published models use 0.00085, 0.012"
            )


class Schedule:
    """Tables of one noise schedule: x_t = sqrt(a_bar_t) x0 + sqrt(1 - a_bar_t) eps (DDPM, Eq. 4).

    `a_bar` is float64 on the CPU. Training looks values up on the device of its integer tensor `t`, from a copy
    that is moved there once, so no call waits for the device.
    """

    def __init__(self, config: ScheduleConfig | None = None) -> None:
        self.config = config or ScheduleConfig()
        self.steps = self.config.steps
        a_bar = torch.cumprod(1 - _BETAS[self.config.kind](self.config), dim=0)
        self.a_bar: Tensor = _zero_terminal(a_bar) if self.config.zero_terminal_snr else a_bar  # T, float64
        self._a_bar: list[float] = self.a_bar.tolist()
        self._moved: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def a_bar_at(self, t: float) -> float:
        """Alpha-bar at one time in [0, T-1]; between integers log sigma is interpolated linearly.

        Raises: ValueError if t lies outside the schedule.
        """
        if not 0 <= t <= self.steps - 1:
            raise ValueError(f"t is {t}; allowed: 0..{self.steps - 1}; pass a time of this schedule")
        low = math.floor(t)
        part = t - low
        if part == 0:
            return self._a_bar[low]
        a, b = self._a_bar[low], self._a_bar[low + 1]
        if b == 0:  # zero-terminal SNR: sigma has no upper end, so the last interval is linear in a_bar
            return a * (1 - part)
        log_snr = (1 - part) * math.log(a / (1 - a)) + part * math.log(b / (1 - b))
        return 1 / (1 + math.exp(-log_snr))

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio a_bar / (1 - a_bar) at integer times t: b -> b float32."""
        return self._tables(t.device, torch.float32)[2][t]

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Noise clean latents to times t (DDPM, Eq. 4).

        Args:
            x0: b c h w, latent of about unit variance.
            eps: b c h w, standard normal noise.
            t: b, integers in 0..T-1.

        Returns: x_t, b c h w, float32 or wider.
        """
        signal, noise = self._coefficients(x0, t)
        return signal * x0 + noise * eps

    def target(self, objective: str, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network is trained to output.

        eps: the noise (DDPM). x0: the clean latent. v: sqrt(a_bar) eps - sqrt(1 - a_bar) x0
        (Salimans & Ho 2022, arXiv:2202.00512, appendix D).

        Args:
            objective: eps, v or x0.
            x0: b c h w, as given to `add_noise`.
            eps: b c h w, likewise.
            t: b, integers in 0..T-1.

        Returns: b c h w.
        Raises: ConfigError for an unknown objective, or eps on a zero-terminal-SNR schedule.
        """
        self.check_objective(objective)
        if objective == "eps":
            return eps
        if objective == "x0":
            return x0
        signal, noise = self._coefficients(x0, t)
        return signal * eps - noise * x0

    @staticmethod
    def predict(objective: str, output: Tensor, x_t: Tensor, a_bar: float) -> Prediction:
        """Turn a network output at one noise level into x0 and eps.

        Args:
            objective: eps, v or x0: what the network was trained to output.
            output: b c h w, any dtype.
            x_t: b c h w, the network's input.
            a_bar: in [0, 1]; a Python number, so that nothing waits for the device.

        Returns: Prediction in float32 or wider.
        Raises: ConfigError for an unknown objective; ValueError where x0 (or eps) is undefined at this a_bar.
        """
        _check_objective_name(objective)
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        x_t, output = x_t.to(dtype), output.to(dtype)
        signal, noise = math.sqrt(a_bar), math.sqrt(1 - a_bar)
        if objective == "v":
            return Prediction(x0=signal * x_t - noise * output, eps=signal * output + noise * x_t)
        if (signal if objective == "eps" else noise) == 0:
            raise ValueError(
                f"objective {objective!r} is undefined at a_bar {a_bar}; allowed: eps for a_bar > 0, x0 for a_bar < 1; "
                "use a v-objective model"
            )
        if objective == "eps":
            return Prediction(x0=(x_t - noise * output) / signal, eps=output)
        return Prediction(x0=output, eps=(x_t - signal * output) / noise)

    def loss_weight(self, objective: str, t: Tensor, min_snr_gamma: float | None = None) -> Tensor:
        """Factor on the per-sample mean squared error.

        Min-SNR-gamma (Hang et al. 2023, arXiv:2303.09556, section 3.4) caps the x0-weight SNR at gamma:
        min(SNR, g)/SNR for eps, min(SNR, g)/(SNR + 1) for v, min(SNR, g) for x0.

        Args:
            objective: eps, v or x0.
            t: b, integers in 0..T-1.
            min_snr_gamma: gamma (5 in the paper), or None for plain weights of 1.

        Returns: b float32.
        Raises: ConfigError as `target`; ValueError if gamma is not positive.
        """
        self.check_objective(objective)
        if min_snr_gamma is None:
            return torch.ones(t.shape, device=t.device)
        if min_snr_gamma <= 0:
            raise ValueError(f"min_snr_gamma is {min_snr_gamma}; allowed: above 0, or None for no weighting; try 5")
        snr = self.snr(t)
        capped = snr.clamp(max=min_snr_gamma)
        if objective == "eps":
            return capped / snr
        return capped / (snr + 1) if objective == "v" else capped

    def check_objective(self, objective: str) -> None:
        """Refuse an unknown objective, and eps where the last step holds no signal.

        Raises: ConfigError.
        """
        _check_objective_name(objective)
        if objective == "eps" and self._a_bar[-1] == 0:
            raise ConfigError(
                "objective is 'eps' with schedule.zero_terminal_snr true; allowed there: v, x0 "
                "(at t = T-1 the noise says nothing about x0); set objective: v"
            )

    def _coefficients(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_bar) and sqrt(1 - a_bar) at t, each b 1 1 1 for an x of four dimensions."""
        table = self._tables(t.device, torch.promote_types(x.dtype, torch.float32))
        shape = (-1, *[1] * (x.ndim - 1))
        return table[0][t].view(shape), table[1][t].view(shape)

    def _tables(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """sqrt(a_bar), sqrt(1 - a_bar), SNR as a 3 T tensor on a device, moved there once."""
        if (device, dtype) not in self._moved:
            a = self.a_bar
            self._moved[device, dtype] = torch.stack([a.sqrt(), (1 - a).sqrt(), a / (1 - a)]).to(device, dtype)
        return self._moved[device, dtype]


def timesteps(spacing: str, n: int, T: int = 1000, offset: int = 1) -> tuple[int, ...]:
    """Training timesteps visited by n inference steps, descending (names as in Lin et al. 2023, Table 2).

    Args:
        spacing: leading: k (T // n) + offset; trailing: round(T - k T/n) - 1; linspace: n points from T-1 to 0.
        n: 1..T.
        T: length of the schedule.
        offset: at least 0, used by leading only (SD: 1); lowered where the first timestep would pass T-1 (n = T).

    Returns: n distinct integers in 0..T-1. With leading they start below T-1: n = 20 gives 951, 901, ..., 1.
    Raises: ConfigError for an unknown spacing, n outside 1..T, a negative offset.
    """
    if not 1 <= n <= T:
        raise ConfigError(f"sampler.steps is {n}; allowed 1..{T}; 20 to 50 suit most samplers")
    if offset < 0:
        raise ConfigError(f"sampler.offset is {offset}; allowed: 0 or more; Stable Diffusion uses 1")
    if spacing == "leading":
        stride = T // n
        shift = min(offset, T - 1 - (n - 1) * stride)
        return tuple(k * stride + shift for k in reversed(range(n)))
    if spacing == "trailing":
        return tuple(round(T - k * T / n) - 1 for k in range(n))
    if spacing == "linspace":
        return tuple(round(k * ((T - 1) / max(n - 1, 1))) for k in reversed(range(n))) if n > 1 else (T - 1,)
    raise ConfigError(f"sampler.spacing is {spacing!r}; allowed: leading, trailing, linspace; choose one of these")


def _check_objective_name(objective: str) -> None:
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective is {objective!r}; allowed: {', '.join(OBJECTIVES)}; choose one of these")


def _scaled_linear(config: ScheduleConfig) -> Tensor:
    """Linear in sqrt(beta), as the released Stable Diffusion weights were trained."""
    return _linspace(math.sqrt(config.beta_start), math.sqrt(config.beta_end), config.steps) ** 2


def _linear(config: ScheduleConfig) -> Tensor:
    """DDPM (arXiv:2006.11239), section 4."""
    return _linspace(config.beta_start, config.beta_end, config.steps)


def _cosine(config: ScheduleConfig) -> Tensor:
    """Nichol & Dhariwal 2021 (arXiv:2102.09672), Eq. 17; s = 0.008 and the cap 0.999 are theirs."""
    u = torch.arange(config.steps + 1, dtype=torch.float64, device="cpu") / config.steps
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def _linspace(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start, end, n, dtype=torch.float64, device="cpu")  # also while models are built on meta


def _zero_terminal(a_bar: Tensor) -> Tensor:
    """Shift and scale sqrt(a_bar) so that the last entry is 0 and the first is kept (arXiv:2305.08891, Alg. 1)."""
    s = a_bar.sqrt()
    return ((s - s[-1]) * s[0] / (s[0] - s[-1])) ** 2


_BETAS: dict[str, Callable[[ScheduleConfig], Tensor]] = {
    "scaled_linear": _scaled_linear,
    "linear": _linear,
    "cosine": _cosine,
}
