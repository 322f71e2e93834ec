"""Whole trajectories against diffusers: each implementation feeds its own outputs back in."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.registry import build
from ldm.samplers import Prediction
from ldm.schedule import Schedule, ScheduleConfig, timesteps

diffusers = pytest.importorskip("diffusers")

OBJECTIVES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
SHAPE = (2, 4, 8, 8)


def toy(x: Tensor, t: float) -> Tensor:
    """A smooth stand-in for a network that depends on x and t, with output near unit scale."""
    return 0.6 * x + 0.4 * torch.sin(3 * x + t / 200)


def ours(node: dict[str, Any], x_T: Tensor, seed: int, objective: str = "eps", zero_snr: bool = False) -> list[Tensor]:
    schedule = Schedule(ScheduleConfig(zero_terminal_snr=zero_snr))
    path: list[Tensor] = []

    def predict(x: Tensor, t: float) -> Prediction:
        return schedule.predict(objective, toy(x, t), x, schedule.a_bar_at(t))

    generator = torch.Generator().manual_seed(seed)
    sampler = build("sampler", node, schedule=schedule)
    sampler.sample(
        predict,
        x_T,
        lambda: torch.randn(SHAPE, generator=generator, dtype=x_T.dtype),
        on_step=lambda _, x: path.append(x),
    )
    return path


def theirs(scheduler: Any, steps: int, x: Tensor, seed: int, **step_options: float) -> list[Tensor]:
    generator, path = torch.Generator().manual_seed(seed), []
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(toy(x, t.item()), t, x, generator=generator, **step_options).prev_sample
        path.append(x)
    return path


def assert_same_path(path: list[Tensor], reference: list[Tensor], atol: float = 1e-4) -> None:
    torch.testing.assert_close(torch.stack(path), torch.stack(reference), rtol=0, atol=atol)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 20, 30, 50])
def test_ddim_with_stable_diffusions_settings(steps: int, eta: float) -> None:
    reference = diffusers.DDIMScheduler(**SD, steps_offset=1, set_alpha_to_one=False)
    x_T = torch.randn(SHAPE)
    assert_same_path(
        ours({"name": "ddim", "steps": steps, "eta": eta}, x_T, 1), theirs(reference, steps, x_T, 1, eta=eta)
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("final", "to_one"), [("one", True), ("first", False)])
def test_ddim_objectives_and_final_level(objective: str, final: str, to_one: bool) -> None:
    options = {"prediction_type": OBJECTIVES[objective], "set_alpha_to_one": to_one, "timestep_spacing": "trailing"}
    x_T = torch.randn(SHAPE)
    path = ours({"name": "ddim", "steps": 20, "spacing": "trailing", "final": final}, x_T, 1, objective)
    assert_same_path(path, theirs(diffusers.DDIMScheduler(**SD, **options), 20, x_T, 1))


def test_ddim_from_zero_terminal_snr() -> None:
    options = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    x_T = torch.randn(SHAPE)
    path = ours({"name": "ddim", "steps": 20, "spacing": "trailing", "final": "one"}, x_T, 1, "v", zero_snr=True)
    assert_same_path(path, theirs(diffusers.DDIMScheduler(**SD, **options), 20, x_T, 1))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [10, 20, 30, 50, 200])
def test_ddpm(steps: int, variance: str) -> None:
    reference = diffusers.DDPMScheduler(**SD, variance_type=variance)
    x_T = torch.randn(SHAPE)
    path = ours({"name": "ddpm", "steps": steps, "variance": variance}, x_T, 2)
    assert_same_path(path, theirs(reference, steps, x_T, 2))


def test_ddpm_over_all_training_steps() -> None:
    """In float32, diffusers' 1 - A_t / A_prev cancels and a thousand steps drift by 1.2e-4; so here it gets float64."""
    reference = diffusers.DDPMScheduler(**SD)
    reference.alphas_cumprod, reference.one = Schedule().a_bar, torch.tensor(1.0, dtype=torch.float64)
    x_T = torch.randn(SHAPE, dtype=torch.float64)
    assert_same_path(ours({"name": "ddpm"}, x_T, 2), theirs(reference, 1000, x_T, 2), atol=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 10, 20, 30, 50, 77, 1000])
def test_timesteps(spacing: str, steps: int) -> None:
    if (spacing, steps) == ("linspace", 1):
        pytest.skip("numpy's linspace of one point is 0, the end; ours is T-1, the start")
    reference = diffusers.DDIMScheduler(**SD, timestep_spacing=spacing, steps_offset=int(steps < 1000))
    reference.set_timesteps(steps)
    assert timesteps(spacing, steps) == tuple(reference.timesteps.tolist())


@pytest.mark.parametrize(("kind", "name"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_schedules(kind: str, name: str) -> None:
    reference = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=name).alphas_cumprod
    torch.testing.assert_close(Schedule(ScheduleConfig(kind=kind)).a_bar.float(), reference, rtol=1e-4, atol=1e-7)


def test_training_tables() -> None:
    reference, schedule = diffusers.DDPMScheduler(**SD), Schedule()
    x0, eps, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([3, 801])
    torch.testing.assert_close(schedule.add_noise(x0, eps, t), reference.add_noise(x0, eps, t), rtol=0, atol=1e-5)
    torch.testing.assert_close(schedule.target("v", x0, eps, t), reference.get_velocity(x0, eps, t), rtol=0, atol=1e-5)
