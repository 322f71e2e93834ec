import pytest
import torch
from torch import Tensor

from ldm.registry import ConfigError
from ldm.samplers import DDIM, ImageNoise, Prediction
from ldm.schedule import Schedule, ScheduleConfig

SCHEDULE = Schedule()


def toy(x: Tensor, t: float) -> Prediction:
    return Schedule.predict("eps", torch.tanh(x + t / 500), x, SCHEDULE.a_bar_at(t))


def no_noise() -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def test_on_step_sees_every_latent_in_order() -> None:
    seen: list[tuple[int, Tensor]] = []
    result = DDIM(SCHEDULE, steps=5).sample(
        toy, torch.randn(1, 1, 2, 2), no_noise, on_step=lambda i, x: seen.append((i, x))
    )
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[-1][1], result)


def test_on_step_may_replace_the_latent() -> None:
    sampler, known = DDIM(SCHEDULE, steps=4), torch.full((1, 1, 2, 2), 0.3)
    result = sampler.sample(toy, torch.randn(1, 1, 2, 2), no_noise, on_step=lambda i, _: known if i == 2 else None)
    assert torch.equal(result, sampler.sample(toy, known, no_noise, start=3))


def test_starting_late_continues_the_same_walk() -> None:
    sampler, x_T, middle = DDIM(SCHEDULE, steps=10), torch.randn(2, 1, 2, 2), []
    whole = sampler.sample(toy, x_T, no_noise, on_step=lambda _, x: middle.append(x))
    assert torch.equal(sampler.sample(toy, middle[5], no_noise, start=6), whole)


@pytest.mark.parametrize("start", [-1, 10])
def test_start_outside_the_steps_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match=rf"start is {start}; allowed: 0\.\.9"):
        DDIM(SCHEDULE, steps=10).sample(toy, torch.zeros(1, 1, 2, 2), no_noise, start=start)


def test_bf16_noise_is_sampled_in_float32() -> None:
    asked: list[torch.dtype] = []

    def predict(x: Tensor, t: float) -> Prediction:
        asked.append(x.dtype)
        return toy(x, t)

    result = DDIM(SCHEDULE, steps=3).sample(predict, torch.randn(1, 1, 2, 2).bfloat16(), no_noise)
    assert result.dtype == torch.float32
    assert asked == [torch.float32] * 3


def test_the_starting_noise_is_left_alone() -> None:
    x_T = torch.randn(1, 1, 2, 2)
    before = x_T.clone()
    DDIM(SCHEDULE, steps=3).sample(toy, x_T, no_noise)
    assert torch.equal(x_T, before)


def test_levels_end_where_final_says() -> None:
    assert DDIM(SCHEDULE, steps=10).levels[-1] == SCHEDULE.a_bar[0].item()
    assert DDIM(SCHEDULE, steps=10, final="one").levels[-1] == 1.0
    with pytest.raises(ConfigError, match=r"sampler\.final is 'zero'; allowed: first, one"):
        DDIM(SCHEDULE, steps=10, final="zero")


def test_zero_terminal_snr_must_be_entered_at_its_last_step() -> None:
    zero = Schedule(ScheduleConfig(zero_terminal_snr=True))
    assert DDIM(zero, steps=10, spacing="trailing").levels[0] == 0
    with pytest.raises(
        ConfigError, match=r"sampler starts at timestep 901 with schedule\.zero_terminal_snr true; allowed there: 999"
    ):
        DDIM(zero, steps=10)


def test_an_images_noise_depends_on_its_own_seed_only() -> None:
    together, alone = ImageNoise([3, 7, 5], (4, 3, 2)), ImageNoise([7], (4, 3, 2))
    for _ in range(3):
        batch, single = together(), alone()
        assert batch.shape == (3, 4, 3, 2)
        assert torch.equal(batch[1:2], single)


def test_draws_differ_and_do_not_touch_the_global_generator() -> None:
    state = torch.get_rng_state()
    noise = ImageNoise([1, 2], (1, 8, 8))
    first, second = noise(), noise()
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(torch.get_rng_state(), state)
