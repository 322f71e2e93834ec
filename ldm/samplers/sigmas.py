"""Which noise levels a sampler visits, sigma = sqrt((1 - a_bar) / a_bar): spacings in time, or in sigma itself."""

import math
from bisect import bisect_right

from ldm.registry import ConfigError
from ldm.samplers.base import Sampler
from ldm.schedule import Schedule, timesteps

SIGMAS = ("schedule", "karras", "exponential")

_RHO = 7.0  # Karras et al. 2022 (arXiv:2206.00364), section 3
_LEAST_A_BAR = 2.0**-24  # stands for 0 (zero-terminal SNR) where sigma must be finite; x0 changes by at most 2^-12 x


def sigma_of(a_bar: float) -> float:
    """Sigma of an alpha-bar in [0, 1]; 0 counts as 2^-24."""
    return math.sqrt((1 - a_bar) / max(a_bar, _LEAST_A_BAR))


def half_log_snr(a_bar: float) -> float:
    """Lambda = log(sqrt(a_bar) / sqrt(1 - a_bar)) of an alpha-bar in [0, 1); 0 counts as 2^-24."""
    return -math.log(sigma_of(a_bar))


def sigma_times(
    schedule: Schedule,
    steps: int,
    *,
    spacing: str,
    offset: int,
    sigmas: str,
    final: str,
    multistep: bool = False,
) -> tuple[float, ...]:
    """Times of the levels a sampler in sigma space visits before its last one.

    With `sigmas` other than schedule the times are those at which the schedule has that sigma, mostly fractions
    (diffusers' multistep solvers round them for the model; here the model hears the time it is really at).

    Args:
        schedule: of the model that will be sampled.
        steps: number n of times, 1..T, or 1..T-1 where the first level is left out (below).
        spacing: leading, trailing or linspace, see `ldm.schedule.timesteps`; linspace keeps fractions here.
        offset: at least 0, used by leading only.
        sigmas: schedule (levels at the times of `spacing`), karras (arXiv:2206.00364, Eq. 5) or exponential (equal
            steps in log sigma), both between the schedule's ends and whatever the spacing.
        final: where the sampler ends, see `Sampler`. For "first" n + 1 levels are laid out, the last being that end.
        multistep: n + 1 levels are laid out and the last is dropped whatever `final`, so that the step to zero sigma,
            which is of first order, starts higher (as DPM-Solver++ and UniPC are used in diffusers).

    Returns: n descending times in [0, T-1].
    Raises: ConfigError for values outside these, or karras and exponential with zero-terminal SNR.
    """
    T = schedule.steps
    dropped = multistep or final == "first"
    if not 1 <= steps <= T - dropped:
        raise ConfigError(f"sampler.steps is {steps}; allowed 1..{T - dropped}; 20 to 50 suit most samplers")
    if sigmas not in SIGMAS:
        raise ConfigError(f"sampler.sigmas is {sigmas!r}; allowed: {', '.join(SIGMAS)}; choose one of these")
    if sigmas != "schedule":
        return _sigma_spaced(schedule, steps + (final == "first"), sigmas)[:steps]
    if spacing == "linspace" and not dropped:
        return tuple((T - 1) * (1 - k / max(steps - 1, 1)) for k in range(steps))
    if spacing == "trailing" or not dropped:
        result = timesteps(spacing, steps, T, offset)
    else:
        result = timesteps(spacing, steps + 1, T, offset)[:-1]
    if final == "first" and result[-1] == 0:
        raise ConfigError(f"sampler.steps is {steps}: the last step has no length with sampler.final first; lower it")
    return result


def refuse_infinite(schedule: Schedule, what: str) -> None:
    """Refuse a zero-terminal-SNR schedule where an infinite sigma has no meaning. Raises: ConfigError."""
    if schedule.a_bar_at(schedule.steps - 1) == 0:
        raise ConfigError(
            f"{what} with schedule.zero_terminal_snr true: its first sigma is infinite; allowed there: "
            "ddim, euler, euler_ancestral, dpmpp_2m, unipc with sampler.sigmas schedule"
        )


class SigmaSampler(Sampler):
    """A sampler whose levels are spaced in sigma, or in time with fractions.

    Attributes:
        multistep: it leaves the last of n + 1 levels out, see `sigma_times`.
        finite: it cannot start from an infinite sigma, that is, with zero-terminal SNR.
    """

    multistep = False
    finite = False

    def __init__(
        self,
        schedule: Schedule,
        *,
        steps: int = 20,
        spacing: str = "linspace",
        offset: int = 0,
        sigmas: str = "schedule",
        final: str = "one",
    ) -> None:
        """Build for a schedule.

        Args:
            schedule: of the model that will be sampled.
            steps: 1..T.
            spacing: leading, trailing or linspace, see `ldm.schedule.timesteps`.
            offset: at least 0, used by leading only.
            sigmas: schedule, or karras | exponential: levels spaced in sigma, whatever `spacing`.
            final: first or one, see `Sampler`.

        Raises: ConfigError as `sigma_times`.
        """
        if self.finite:
            refuse_infinite(schedule, f"sampler.name is {type(self).__name__.lower()!r}")
        times = sigma_times(
            schedule, steps, spacing=spacing, offset=offset, sigmas=sigmas, final=final, multistep=self.multistep
        )
        super().__init__(schedule, times, final=final)


def _sigma_spaced(schedule: Schedule, n: int, kind: str) -> tuple[float, ...]:
    """Times of n sigmas from the schedule's last to its first."""
    refuse_infinite(schedule, f"sampler.sigmas is {kind!r}")
    logs = [math.log(sigma_of(a)) for a in schedule.a_bar.tolist()]  # ascending
    high, low = logs[-1], logs[0]
    parts = [k / max(n - 1, 1) for k in range(n)]
    if kind == "exponential":
        spaced = [high + part * (low - high) for part in parts]
    else:
        top, bottom = math.exp(high / _RHO), math.exp(low / _RHO)
        spaced = [_RHO * math.log(top + part * (bottom - top)) for part in parts]
    return tuple(_time_of(log_sigma, logs) for log_sigma in spaced)


def _time_of(log_sigma: float, logs: list[float]) -> float:
    """Inverse of `Schedule.a_bar_at`, which is linear in log sigma between whole times."""
    i = min(max(bisect_right(logs, log_sigma) - 1, 0), len(logs) - 2)
    return min(max(i + (log_sigma - logs[i]) / (logs[i + 1] - logs[i]), 0.0), len(logs) - 1.0)
