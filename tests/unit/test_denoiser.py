import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.control import Adapter, Control, ExtraKV
from ldm.denoiser import AdapterUse, Denoiser, weigh_blocks, weigh_skips
from ldm.models.unet import UNetSpec
from ldm.registry import ConfigError
from tests.small import SD1, SHALLOW, latents, random_control, trained_unet

GUESS = [0.0994, 0.1205, 0.1461, 0.1770, 0.2146, 0.2601, 0.3153, 0.3822, 0.4633, 0.5615, 0.6806, 0.8250, 1.0]


class Constant(Adapter[Tensor]):
    """Says `value` times the hint's mean everywhere; remembers what it was given."""

    def __init__(self, spec: UNetSpec, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.spec = spec
        self.bases: list[Control] = []

    def prepare(self, hint: Tensor) -> Tensor:
        return hint.mean(dim=(1, 2, 3), keepdim=True)

    def control(self, x_t: Tensor, t: Tensor, base: Control, prepared: Tensor) -> Control:
        self.bases.append(base)
        b, _, h, w = x_t.shape
        filled = self.value * prepared

        def full(channels: int, stride: int) -> Tensor:
            return filled.expand(b, channels, h // stride, w // stride)

        skips = tuple(full(tap.channels, tap.stride) for tap in self.spec.skips)
        return Control(skips=skips, mid=full(self.spec.mid.channels, self.spec.mid.stride))


def ones(skips: int = 12) -> Control:
    return Control(skips=(torch.ones(1, 1, 1, 1),) * skips, mid=torch.ones(1, 1, 1, 1))


def weights(control: Control) -> list[float]:
    assert control.mid is not None
    return [x.item() for x in (*control.skips, control.mid)]


@pytest.mark.parametrize(
    ("steps", "start", "end", "active"),
    [
        (10, 0.2, 0.8, range(2, 8)),
        (20, 0.1, 0.9, range(2, 18)),
        (20, 0.0, 1.0, range(20)),
        (7, 0.0, 1.0, range(7)),
        (10, 0.0, 0.5, range(5)),
        (10, 0.5, 1.0, range(5, 10)),
        (10, 0.0, 0.0, range(0)),
        (10, 1.0, 1.0, range(0)),
        (50, 0.0, 0.4, range(20)),
        (50, 0.0, 0.5, range(25)),
        (50, 0.0, 0.8, range(40)),
        (50, 0.0, 1.0, range(50)),
    ],
)
def test_active_steps(steps: int, start: float, end: float, active: range) -> None:
    use = AdapterUse(start=start, end=end)
    assert [i for i in range(steps) if use.active(i, steps)] == list(active)


def test_plain_use_passes_the_control_on() -> None:
    control = ones()
    assert AdapterUse().weigh(control) is control


def test_scale_multiplies_every_residual() -> None:
    assert weights(AdapterUse(scale=0.5).weigh(ones())) == [0.5] * 13


def test_guess_ladder_has_the_released_codes_values() -> None:
    assert weights(AdapterUse(guess=True).weigh(ones())) == pytest.approx(GUESS, abs=5e-5)
    scaled = weights(AdapterUse(guess=True, scale=2.0).weigh(ones()))
    assert scaled == pytest.approx([2 * g for g in GUESS], abs=1e-4)
    assert scaled[-1] == 2.0


def test_guess_ladder_follows_the_number_of_skips() -> None:
    assert weights(AdapterUse(guess=True).weigh(ones(skips=2))) == pytest.approx([0.825**2, 0.825, 1.0])
    assert weights(AdapterUse(guess=True).weigh(ones(skips=0))) == [1.0]


def test_skip_scales_weigh_each_skip_and_then_the_middle() -> None:
    scales = tuple(i / 10 for i in range(13))
    assert weights(AdapterUse(skip_scales=scales).weigh(ones())) == pytest.approx(scales)
    doubled = AdapterUse(skip_scales=scales, scale=2.0).weigh(ones())
    assert weights(doubled) == pytest.approx([2 * s for s in scales])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_skip_scales_are_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="must be finite numbers"):
        AdapterUse(skip_scales=(1.0, bad))


def test_skip_scales_leave_the_rest_alone() -> None:
    kv = ExtraKV(k=(torch.ones(1, 1, 1),), v=(torch.ones(1, 1, 1),))
    stages = (torch.ones(1, 1, 1, 1),)
    skips = (torch.ones(1, 1, 1, 1),)
    weighed = weigh_skips(Control(stages=stages, skips=skips, attn=(kv,)), [0.5, 2.0])
    assert weighed.mid is None and weighed.stages is stages and weighed.attn == (kv,)
    assert torch.equal(weighed.skips[0], 0.5 * skips[0])


def test_skip_scales_that_weigh_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="this adapter has neither"):
        weigh_skips(Control(stages=(torch.ones(1, 1, 1, 1),)), [0.5])


@pytest.mark.parametrize("n", [0, 12, 14])
def test_skip_scales_of_the_wrong_length_are_refused(n: int) -> None:
    with pytest.raises(ConfigError, match=f"skip_scales has {n} entries; .* 12 skips and a middle"):
        AdapterUse(skip_scales=(1.0,) * n).weigh(ones())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": math.nan}, "scale is nan"),
        ({"scale": math.inf}, "scale is inf"),
        ({"start": 0.6, "end": 0.4}, r"start is 0\.6 and end 0\.4"),
        ({"start": -0.1}, r"start is -0\.1"),
        ({"end": 1.1}, r"end 1\.1"),
        ({"start": math.nan}, "start is nan"),
        ({"guess": True, "skip_scales": (1.0,)}, "drop skip_scales or guess"),
    ],
)
def test_use_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterUse(**options)


def test_denoiser_without_hints_is_the_unet() -> None:
    unet = trained_unet(SD1)
    denoiser = Denoiser(unet, {"a": Constant(unet.spec, 1.0)})
    x_t, t, base = latents(SD1, multiple=1)
    assert torch.equal(denoiser(x_t, t, base, {}), unet(x_t, t, base))


def test_denoiser_sums_its_adapters_in_any_order() -> None:
    unet = trained_unet(SD1)
    one, two = Constant(unet.spec, 1.0), Constant(unet.spec, 2.0)
    x_t, t, base = latents(SD1, multiple=1)
    hints = {"one": torch.ones(2, 3, 8, 8), "two": torch.full((2, 3, 8, 8), 0.5)}
    got = Denoiser(unet, {"one": one, "two": two})(x_t, t, base, hints)
    by_hand = one.control(x_t, t, base, one.prepare(hints["one"])) + two.control(
        x_t, t, base, two.prepare(hints["two"])
    )
    assert torch.equal(got, unet(x_t, t, base + by_hand))
    turned = Denoiser(unet, {"two": two, "one": one})(x_t, t, base, dict(reversed(hints.items())))
    torch.testing.assert_close(turned, got, atol=1e-6, rtol=0)


def test_adapters_never_see_each_other() -> None:
    unet = trained_unet(SD1)
    adapters = {name: Constant(unet.spec, 1.0) for name in "ab"}
    x_t, t, base = latents(SD1, multiple=1)
    Denoiser(unet, adapters)(x_t, t, base, {name: torch.ones(2, 3, 8, 8) for name in "ab"})
    assert all(adapter.bases == [base] for adapter in adapters.values())


def test_uses_weigh_each_adapter_by_name() -> None:
    unet = trained_unet(SD1)
    adapters = {"a": Constant(unet.spec, 1.0), "b": Constant(unet.spec, 1.0)}
    denoiser = Denoiser(unet, adapters)
    x_t, t, base = latents(SD1, multiple=1)
    prepared = denoiser.prepare({name: torch.ones(2, 3, 8, 8) for name in "ab"})
    total = denoiser.control(x_t, t, base, prepared, {"a": AdapterUse(scale=0.5), "b": AdapterUse(guess=True)})
    assert total.mid is not None
    means = [x.mean().item() for x in (*total.skips, total.mid)]
    assert means == pytest.approx([0.5 + g for g in GUESS], abs=1e-4)


def test_hint_without_an_adapter_is_refused() -> None:
    unet = trained_unet(SD1)
    denoiser = Denoiser(unet, {"canny": Constant(unet.spec, 1.0)})
    with pytest.raises(ConfigError, match=r"hints \['depth'\] have no adapter; adapters: canny"):
        denoiser.prepare({"depth": torch.ones(1, 3, 8, 8)})
    with pytest.raises(ConfigError, match="adapters: none"):
        Denoiser(unet).prepare({"depth": torch.ones(1, 3, 8, 8)})


def test_parameters_are_named_for_their_part() -> None:
    unet = trained_unet(SD1)
    names = [name for name, _ in Denoiser(unet, {"canny": Constant(unet.spec, 1.0)}).named_parameters()]
    assert "adapters.canny.value" in names
    assert {name.split(".")[0] for name in names} == {"unet", "adapters"}


def test_half_a_control_at_twice_equals_the_whole() -> None:
    unet = trained_unet(SD1)
    x_t, t, base = latents(SD1, multiple=1)
    control = random_control(unet.spec, *x_t.shape[-2:])
    control = dataclasses.replace(control, stages=())
    halves = control.scaled(0.5) + control.scaled(0.5)
    assert torch.equal(unet(x_t, t, base + halves), unet(x_t, t, base + control))


def test_blocks_weigh_a_resolution_wherever_it_enters() -> None:
    unet = trained_unet(SD1)
    x_t, _, _ = latents(SD1)
    control = random_control(unet.spec, *x_t.shape[-2:])
    weighed = weigh_blocks(control, {"down.0": 0.0, "mid": 0.5}, unet.spec)
    assert weighed.mid is not None and control.mid is not None and torch.equal(weighed.mid, 0.5 * control.mid)
    for tap, before, after in zip(unet.spec.skips, control.skips, weighed.skips, strict=True):
        assert torch.equal(after, torch.zeros_like(before) if tap.stride == 1 else before)
    assert not weighed.stages[0].any() and torch.equal(weighed.stages[1], control.stages[1])


@pytest.mark.parametrize(
    ("part", "blocks", "said"),
    [
        ("stages", {"up": 0.0}, "'up', where this adapter says nothing; it speaks at down.0, down.1: drop the key"),
        ("stages", {"down": 1.0, "mid": 0.0}, "'mid', where"),
        (
            "attn",
            {"down.0": 0.0},
            "'down.0', where .*; it speaks at down.1.0, mid, up.0.0, up.0.1",
        ),
    ],
)
def test_blocks_where_an_adapter_says_nothing_are_refused(part: str, blocks: dict[str, float], said: str) -> None:
    unet = trained_unet(SHALLOW)
    whole = random_control(unet.spec, 4, 8)
    prompt = tuple(torch.ones(2, 3, layer.inner_dim) for layer in unet.spec.cross_attn)
    control = {"stages": Control(stages=whole.stages), "attn": Control(attn=(ExtraKV(k=prompt, v=prompt),))}[part]
    with pytest.raises(ConfigError, match=said):
        weigh_blocks(control, blocks, unet.spec)
