"""Whole trajectories of PLMS, LCM and the sigma-space samplers against diffusers, outputs fed back in.

Latents are compared in the variance-preserving scale; diffusers' sigma-space schedulers hold sqrt(1 + sigma^2) as much.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.registry import build
from ldm.samplers import DDIM, Prediction, ddim_inversion
from ldm.samplers.sigmas import sigma_of
from ldm.schedule import Schedule

diffusers = pytest.importorskip("diffusers")

OBJECTIVES = {"eps": "epsilon", "v": "v_prediction"}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE = (2, 4, 8, 8)
SCHEDULE = Schedule()
STEPS = pytest.mark.parametrize("steps", [10, 20, 30, 50])
SIGMAS: dict[str, dict[str, bool]] = {
    "schedule": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
}


def toy(x: Tensor, t: float) -> Tensor:
    """A smooth stand-in for a network that depends on x and t, with output near unit scale."""
    return 0.6 * x + 0.4 * torch.sin(3 * x + t / 200)


def ours(
    node: dict[str, Any], x_T: Tensor, objective: str = "eps", heard: Callable[[float], float] = float
) -> list[Tensor]:
    """The latents after each step; `heard` is what the network is told of t."""
    path, generator = [], torch.Generator().manual_seed(3)

    def predict(x: Tensor, t: float) -> Prediction:
        return SCHEDULE.predict(objective, toy(x, heard(t)), x, SCHEDULE.a_bar_at(t))

    sampler = build("sampler", node, schedule=SCHEDULE)
    sampler.sample(predict, x_T, lambda: torch.randn(SHAPE, generator=generator), on_step=lambda _, x: path.append(x))
    return path


def theirs(
    scheduler: Any, steps: int, x_T: Tensor, *, sigma_space: bool = False, as_it_is: bool = False
) -> list[Tensor]:
    """The latents after each call of the network, from the same draws; `as_it_is` leaves the scheduler's sigmas."""
    scheduler.set_timesteps(steps)
    if isinstance(scheduler, diffusers.EulerAncestralDiscreteScheduler) and not as_it_is:
        # Between whole times ours is linear in log sigma, theirs in sigma: about 4e-6 apart, 3e-4 after 50 steps.
        sigmas = [sigma_of(SCHEDULE.a_bar_at(t)) for t in scheduler.timesteps.tolist()]
        scheduler.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float64)
    sigmas = scheduler.sigmas.double() if sigma_space else torch.zeros(len(scheduler.timesteps) + 1)
    scales, path = (1 + sigmas**2).sqrt().tolist(), []
    drawn = {"generator": torch.Generator().manual_seed(3)} if stochastic(scheduler) else {}
    x = x_T * scales[0]
    for t, scale in zip(scheduler.timesteps, scales[1:], strict=True):
        x = scheduler.step(toy(scheduler.scale_model_input(x, t), t.item()), t, x, **drawn).prev_sample
        path.append(x / scale)
    return path


def stochastic(scheduler: Any) -> bool:
    return "generator" in scheduler.step.__annotations__


def assert_same_path(path: list[Tensor], reference: list[Tensor], atol: float = 1e-4) -> None:
    torch.testing.assert_close(torch.stack(path), torch.stack(reference), rtol=0, atol=atol)


@STEPS
def test_plms(steps: int) -> None:
    reference = diffusers.PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    x_T = torch.randn(SHAPE)
    path = theirs(reference, steps, x_T)
    assert len(path) == steps + 1  # the first step is tried, then taken
    assert_same_path(ours({"name": "plms", "steps": steps}, x_T), path[1:])


@STEPS
@pytest.mark.parametrize("sigmas", SIGMAS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_euler(steps: int, sigmas: str, objective: str) -> None:
    reference = diffusers.EulerDiscreteScheduler(**SD, prediction_type=OBJECTIVES[objective], **SIGMAS[sigmas])
    x_T = torch.randn(SHAPE)
    path = ours({"name": "euler", "steps": steps, "sigmas": sigmas}, x_T, objective)
    assert_same_path(path, theirs(reference, steps, x_T, sigma_space=True))


@STEPS
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_euler_ancestral(steps: int, objective: str) -> None:
    reference = diffusers.EulerAncestralDiscreteScheduler(**SD, prediction_type=OBJECTIVES[objective])
    x_T = torch.randn(SHAPE)
    path = ours({"name": "euler_ancestral", "steps": steps}, x_T, objective)
    assert_same_path(path, theirs(reference, steps, x_T, sigma_space=True))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_euler_ancestral_with_the_references_own_sigmas(objective: str) -> None:
    """Between whole times the two read sigma otherwise (see `theirs`), and `toy` steepens that: 8.5e-5 apart here in

    eps, and between 6e-5 and 3.5e-4 over five other draws.
    """
    reference = diffusers.EulerAncestralDiscreteScheduler(**SD, prediction_type=OBJECTIVES[objective])
    x_T = torch.randn(SHAPE)
    path = ours({"name": "euler_ancestral", "steps": 20}, x_T, objective)
    assert_same_path(path, theirs(reference, 20, x_T, sigma_space=True, as_it_is=True))


@STEPS
@pytest.mark.parametrize("sigmas", SIGMAS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_heun(steps: int, sigmas: str, objective: str) -> None:
    reference = diffusers.HeunDiscreteScheduler(**SD, prediction_type=OBJECTIVES[objective], **SIGMAS[sigmas])
    x_T = torch.randn(SHAPE)
    path = theirs(reference, steps, x_T, sigma_space=True)
    assert len(path) == 2 * steps - 1
    path = [*path[1:-1:2], path[-1]]  # after both calls of a step; the last one has one
    assert_same_path(ours({"name": "heun", "steps": steps, "sigmas": sigmas}, x_T, objective), path)


@STEPS
@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "heun"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_spacings_of_one_step_methods(steps: int, name: str, spacing: str) -> None:
    kinds = {
        "euler": diffusers.EulerDiscreteScheduler,
        "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
        "heun": diffusers.HeunDiscreteScheduler,
    }
    x_T = torch.randn(SHAPE)
    path = theirs(kinds[name](**SD, timestep_spacing=spacing, steps_offset=1), steps, x_T, sigma_space=True)
    path = [*path[1:-1:2], path[-1]] if name == "heun" else path
    assert_same_path(ours({"name": name, "steps": steps, "spacing": spacing, "offset": 1}, x_T), path)


MULTISTEP: dict[str, Callable[..., Any]] = {
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "dpmpp_2m_sde": lambda **options: diffusers.DPMSolverMultistepScheduler(
        **options, algorithm_type="sde-dpmsolver++"
    ),
    "unipc": diffusers.UniPCMultistepScheduler,
}


@STEPS
@pytest.mark.parametrize("name", MULTISTEP)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_multistep(steps: int, name: str, spacing: str, objective: str) -> None:
    reference = MULTISTEP[name](**SD, prediction_type=OBJECTIVES[objective], timestep_spacing=spacing, steps_offset=1)
    x_T = torch.randn(SHAPE)
    node = {"name": name, "steps": steps, "spacing": spacing, "offset": 1}
    assert_same_path(ours(node, x_T, objective), theirs(reference, steps, x_T))


@STEPS
@pytest.mark.parametrize("name", MULTISTEP)
@pytest.mark.parametrize(("sigmas", "heard"), [("karras", round), ("exponential", lambda t: min(math.floor(t), 998))])
def test_multistep_sigmas(steps: int, name: str, sigmas: str, heard: Callable[[float], float]) -> None:
    """diffusers tells the network a whole number near the time (998 for 999 - 1e-4); for once so do we."""
    x_T = torch.randn(SHAPE)
    path = ours({"name": name, "steps": steps, "sigmas": sigmas}, x_T, heard=heard)
    assert_same_path(path, theirs(MULTISTEP[name](**SD, **SIGMAS[sigmas]), steps, x_T))


@pytest.mark.parametrize("steps", [1, 4, 8, 10, 20, 30, 50])
def test_lcm(steps: int) -> None:
    reference = diffusers.LCMScheduler(**SD, clip_sample=False)
    x_T = torch.randn(SHAPE)
    assert_same_path(ours({"name": "lcm", "steps": steps}, x_T), theirs(reference, steps, x_T))


@STEPS
def test_ddim_inversion(steps: int) -> None:
    reference = diffusers.DDIMInverseScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    x0, path = torch.randn(SHAPE), list[Tensor]()
    ddim_inversion(
        lambda x, t: SCHEDULE.predict("eps", toy(x, t), x, SCHEDULE.a_bar_at(t)),
        x0,
        DDIM(SCHEDULE, steps=steps),
        on_step=lambda _, x: path.append(x),
    )
    assert_same_path(path, theirs(reference, steps, x0))
