import pytest
import torch
from torch import Tensor

from ldm.guidance import GuidanceConfig, combine, combine_apart, guided, rescale
from ldm.registry import ConfigError
from ldm.schedule import Prediction

X = torch.randn(2, 4, 3, 3)


class Pair:
    """A model whose conditional output is x + 1 and unconditional output x; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def __call__(self, x: Tensor, t: float, both: bool) -> tuple[Tensor, ...]:
        self.asked.append(both)
        return (x, x + 1) if both else (x + 1,)


def raw(output: Tensor, x_t: Tensor, t: float) -> Prediction:
    return Prediction(x0=x_t, eps=output)


def test_combine_by_hand() -> None:
    cond, uncond = torch.tensor([3.0]), torch.tensor([1.0])
    assert [combine(cond, uncond, w).item() for w in (0.0, 1.0, 7.5)] == [1.0, 3.0, 16.0]


def test_rescale_zero_is_a_no_op_and_one_restores_the_spread() -> None:
    cond, output = torch.randn(2, 4, 8, 8), 5 * torch.randn(2, 4, 8, 8) + 1
    assert rescale(output, cond, 0.0) is output
    restored = rescale(output, cond, 1.0)
    torch.testing.assert_close(restored.std((1, 2, 3)), cond.std((1, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(rescale(output, cond, 0.7), 0.7 * restored + 0.3 * output, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_scales_up_to_one_are_the_conditional_output_in_one_pass(scale: float) -> None:
    pair = Pair()
    predict = guided(pair, raw, GuidanceConfig(scale=scale, rescale=0.7), lambda t: 0.0)
    assert torch.equal(predict(X, 5).eps, X + 1)
    assert pair.asked == [False]


def test_guidance_extrapolates_from_the_unconditional_output() -> None:
    predict = guided(Pair(), raw, GuidanceConfig(scale=3.0), lambda t: 0.0)
    torch.testing.assert_close(predict(X, 5).eps, X + 3, rtol=0, atol=1e-5)


def test_guidance_acts_inside_its_interval_only() -> None:
    pair = Pair()
    predict = guided(pair, raw, GuidanceConfig(start=0.2, end=0.8), lambda t: (10 - t) / 10)
    for t in range(10, -1, -1):
        predict(X, t)
    assert [i for i, both in enumerate(pair.asked) if both] == [2, 3, 4, 5, 6, 7]


def test_an_end_of_one_includes_the_very_last_step() -> None:
    assert GuidanceConfig().active(1.0)
    assert not GuidanceConfig(end=0.5).active(0.5)


def test_bf16_outputs_are_combined_in_float32() -> None:
    def pair(x: Tensor, t: float, both: bool) -> tuple[Tensor, ...]:
        return x.bfloat16(), x.bfloat16() + 0.01

    eps = guided(pair, raw, GuidanceConfig(), lambda t: 0.0)(X, 5).eps
    uncond, cond = X.bfloat16(), X.bfloat16() + 0.01
    assert torch.equal(eps, combine(cond.float(), uncond.float(), 7.5))


def apart(x: Tensor, t: float, guided: bool) -> tuple[Tensor, ...]:
    """A model that is linear in its conditions: an image prompt adds 10, the text 1."""
    return (x, x + 10, x + 11) if guided else (x + 11,)


@pytest.mark.parametrize(
    ("text", "image", "added"),
    [(3.0, 2.0, 23.0), (1.0, 1.0, 11.0), (0.0, 3.0, 30.0), (1.0, 4.0, 41.0), (5.0, 0.0, 5.0)],
)
def test_text_and_image_prompt_are_guided_apart(text: float, image: float, added: float) -> None:
    eps = guided(apart, raw, GuidanceConfig(scale=text, image=image), lambda t: 0.0)(X, 5).eps
    torch.testing.assert_close(eps, X + added, rtol=0, atol=2e-5)


def test_equal_scales_are_ordinary_guidance() -> None:
    uncond, image, cond = torch.randn(3, 2, 4, 8, 8)
    ordinary = combine(cond, uncond, 7.5)
    both = combine_apart(cond, image, uncond, text_scale=7.5, image_scale=7.5)
    torch.testing.assert_close(both, ordinary, rtol=0, atol=1e-5)
    other = combine_apart(cond, image, uncond, text_scale=7.5, image_scale=2.0)
    assert (other - ordinary).abs().max() > 1


def test_guidance_apart_keeps_interval_and_rescale() -> None:
    config = GuidanceConfig(scale=1.0, image=4.0, start=0.2, end=0.6, rescale=1.0)
    predict = guided(apart, raw, config, lambda t: (10 - t) / 10)
    for t in range(10, 3, -1):
        output = predict(X, t).eps
        assert torch.equal(output, X + 11) == (t in (10, 9, 4))
        torch.testing.assert_close(output.std((1, 2, 3)), X.std((1, 2, 3)))  # the spread of the conditional output


def test_an_image_scale_alone_switches_guidance_on() -> None:
    assert GuidanceConfig(scale=1.0, image=1.5).on and GuidanceConfig(scale=1.5, image=0.0).on
    assert not GuidanceConfig(scale=1.0, image=1.0).on and not GuidanceConfig(scale=0.5).on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1.0}, "guidance.scale is -1.0; allowed: 0 or more"),
        ({"scale": float("nan")}, "guidance.scale is nan; allowed: 0 or more"),
        ({"image": -1.0}, "guidance.image is -1.0; allowed: 0 or more, or null"),
        ({"image": float("inf")}, "guidance.image is inf"),
        ({"rescale": 1.5}, r"guidance.rescale is 1.5; allowed: 0\.\.1"),
        ({"start": 0.8, "end": 0.2}, "guidance.start, end are 0.8, 0.2; allowed: 0 <= start < end <= 1"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GuidanceConfig(**options)
