"""One suite for every registered adapter. A new adapter adds its tiny settings to CASES."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

import adapters  # noqa: F401  (registers them)
from ldm import registry
from ldm.config import TrainConfig
from ldm.control import Adapter, Control
from ldm.denoiser import Denoiser
from ldm.models.unet import UNet
from ldm.training import checkpoint, optim
from tests.small import SHALLOW, latents, trained_unet, waken

IN_THE_TEXT = ("ip_adapter_simple", "t2i_style", "seecoder")  # its own attention, where halves do not add up
STEPS_TO_WAKE = 6  # from here on every trainable parameter has a gradient, whatever starts at zero


@dataclass(frozen=True)
class Case:
    """Tiny settings of one adapter; its hint is `hint` channels and `factor` times the latent's size."""

    options: dict[str, Any]
    hint: int = 3
    factor: int = 8
    no_op: bool = True  # whether the paper starts it at zero
    features: int | list[tuple[int, int]] = 0  # of an image prompt: tokens, or (channels, side) of the encoded maps


CASES = {
    "controlnet": Case({"name": "controlnet", "hint_widths": [4, 4, 8, 8]}),
    "controlnet, grey hint, 2x": Case(
        {"name": "controlnet", "hint_widths": [4, 8], "hint_channels": 1}, hint=1, factor=2
    ),
    "controlnet, random trunk": Case({"name": "controlnet", "hint_widths": [4, 8], "init": "random"}, factor=2),
    "controlnet, middle only": Case({"name": "controlnet", "hint_widths": [4, 8], "middle_only": True}, factor=2),
    "controlnet, gaussian": Case(
        {"name": "controlnet", "hint_widths": [4, 8], "zero_conv": "gaussian"}, factor=2, no_op=False
    ),
    "controlnet_lite": Case({"name": "controlnet_lite", "hint_widths": [4, 4, 8, 8]}),
    "controlnet_lite, gaussian": Case(
        {"name": "controlnet_lite", "hint_widths": [4, 8], "zero_conv": "gaussian"}, factor=2, no_op=False
    ),
    "t2i_adapter": Case({"name": "t2i_adapter"}, no_op=False),
    "t2i_adapter, light, one channel": Case(
        {"name": "t2i_adapter", "variant": "light", "hint_channels": 1, "vae_factor": 2}, hint=1, factor=2, no_op=False
    ),
    "t2i_adapter, one scale, both halves": Case(
        {"name": "t2i_adapter", "vae_factor": 4, "scales": [0], "guide": "both"}, factor=4, no_op=False
    ),
    "t2i_adapter, time": Case({"name": "t2i_adapter", "vae_factor": 2, "time": True}, factor=2, no_op=False),
}
VIT = {"name": "vit", "image_size": 16, "patch": 8, "width": 16, "layers": 2, "heads": 2}
for _name, _tokens in (("ip_adapter", 1), ("ip_adapter_simple", 1), ("ip_adapter plus", 5), ("ip_adapter full", 5)):
    _options = {"name": _name.split()[0], "encoder": VIT, "variant": [*_name.split(), "base"][1], "width": 64}
    CASES[_name] = Case(_options, no_op=False, features=_tokens)
CASES["t2i_style"] = Case(
    {"name": "t2i_style", "encoder": VIT, "tokens": 4, "depth": 2, "heads": 2}, no_op=False, features=5
)
SWIN = {"name": "swin", "image_size": 16, "width": 8, "depths": [2, 2], "heads": [1, 2], "window": 2}
SEECODER = {"name": "seecoder", "encoder": SWIN, "levels": 2, "global_queries": 2, "local_queries": 3, "layers": 2}
SEECODER |= {"hidden": 16, "decoder_layers": 1, "decoder_hidden": 16, "heads": 2, "dropout": 0.0}
_maps = [(8, 4), (16, 2)]
CASES["seecoder"] = Case(SEECODER, no_op=False, features=_maps)
CASES["seecoder, position, true attention"] = Case(
    SEECODER | {"position": True, "decoder_attention": "over_tokens"}, no_op=False, features=_maps
)
MAPS = {name: case for name, case in CASES.items() if not case.features}
every_adapter = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_map = pytest.mark.parametrize("case", MAPS.values(), ids=MAPS.keys())


def make(case: Case, unet: UNet) -> Adapter[Any]:
    return registry.build("adapter", case.options, unet=unet)


def hint_for(case: Case, x_t: Tensor) -> Any:
    h, w = (case.factor * side for side in x_t.shape[-2:])
    if isinstance(case.features, list):
        return tuple(torch.randn(x_t.shape[0], 1, c, side, side) for c, side in case.features)
    if case.features:
        return torch.randn(x_t.shape[0], 1, case.features, 16)
    return torch.rand(x_t.shape[0], case.hint, h, w)


def said(adapter: Adapter[Any], case: Case) -> list[Tensor]:
    """Tensors of the adapter's Control on fixed input."""
    torch.manual_seed(1)
    x_t, t, base = latents()
    control = adapter.control(x_t, t, base, adapter.prepare(hint_for(case, x_t)))
    return [leaf for leaf in pytree.tree_leaves(control) if isinstance(leaf, Tensor)]


def train(denoiser: Denoiser, case: Case, steps: int) -> None:
    """Some AdamW steps on the adapters alone; the last step's gradients stay."""
    config = TrainConfig(lr=1e-2)
    parameters = optim.trainable(denoiser, ["adapters.*"])
    optimizer = optim.adamw(parameters, config)
    x_t, t, base = latents()
    hints, target = {"a": hint_for(case, x_t)}, torch.randn_like(x_t)
    for _ in range(steps):
        optimizer.zero_grad()
        (denoiser(x_t, t, base, hints) - target).square().mean().backward()
        optim.guarded_step(optimizer, parameters, config.clip)


def test_every_registered_adapter_is_tested() -> None:
    assert {case.options["name"] for case in CASES.values()} == set(registry.names("adapter"))


@every_adapter
def test_fresh_adapter_changes_no_bit_where_its_paper_says_so(case: Case) -> None:
    unet = trained_unet()
    denoiser = Denoiser(unet, {"a": make(case, unet)})
    x_t, t, base = latents()
    for _ in range(2):  # other hints, other noise
        plain, controlled = unet(x_t, t, base), denoiser(x_t, t, base, {"a": hint_for(case, x_t)})
        assert torch.equal(plain, controlled) == case.no_op
        x_t, t, base = latents()


@every_adapter
def test_building_an_adapter_leaves_the_unet_alone(case: Case) -> None:
    unet = trained_unet()
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    adapter = make(case, unet)
    assert all(torch.equal(before[k], v) for k, v in unet.state_dict().items())
    assert not any(p.requires_grad for p in unet.parameters())
    assert all(p.requires_grad for p in adapter.parameters())
    assert not any(m.training for m in unet.modules())


@every_adapter
def test_training_moves_the_adapter_and_not_one_bit_of_the_base(case: Case) -> None:
    unet = trained_unet()
    adapter = make(case, unet)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    fresh = {k: v.clone() for k, v in adapter.state_dict().items()}
    train(Denoiser(unet, {"a": adapter}), case, steps=3)
    assert all(p.grad is None for p in unet.parameters())
    assert all(torch.equal(before[k], v) for k, v in unet.state_dict().items())
    assert any(not torch.equal(fresh[k], v) for k, v in adapter.state_dict().items())


@every_adapter
def test_every_trainable_parameter_gets_a_gradient(case: Case) -> None:
    unet = trained_unet()
    adapter = make(case, unet)
    train(Denoiser(unet, {"a": adapter}), case, steps=STEPS_TO_WAKE)
    asleep = [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
    assert not asleep


@every_adapter
def test_adapter_holds_no_weight_of_the_unet(case: Case) -> None:
    unet = trained_unet()
    adapter = make(case, unet)
    assert not [key for key in adapter.state_dict() if key.startswith(("decoder", "unet"))]
    assert UNet not in {type(module) for module in adapter.modules()}
    theirs = {p.data_ptr() for p in unet.parameters()}
    assert not [name for name, p in adapter.named_parameters() if p.data_ptr() in theirs]


@every_adapter
def test_trained_adapters_commute(case: Case) -> None:
    unet = trained_unet()
    one, two = waken(make(case, unet)).eval(), waken(make(case, unet)).eval()
    x_t, t, base = latents()
    hints = {"one": hint_for(case, x_t), "two": hint_for(case, x_t)}
    forth = Denoiser(unet, {"one": one, "two": two})(x_t, t, base, hints)
    back = Denoiser(unet, {"two": two, "one": one})(x_t, t, base, dict(reversed(hints.items())))
    torch.testing.assert_close(forth, back, atol=1e-5, rtol=0)
    alone = Denoiser(unet, {"one": one})(x_t, t, base, {"one": hints["one"]})
    assert not torch.equal(forth, alone)


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.options["name"] not in IN_THE_TEXT])
def test_two_halves_equal_one(case: Case) -> None:
    unet = trained_unet()
    adapter = waken(make(case, unet))
    x_t, t, base = latents()
    control = adapter.control(x_t, t, base, adapter.prepare(hint_for(case, x_t)))
    whole, halves = unet(x_t, t, base + control), unet(x_t, t, base + control.scaled(0.5) + control.scaled(0.5))
    torch.testing.assert_close(halves, whole, atol=1e-5, rtol=0)
    assert torch.equal(unet(x_t, t, base + control.scaled(0.0)), unet(x_t, t, base))


@every_adapter
def test_weights_survive_a_file(case: Case, tmp_path: Path) -> None:
    unet = trained_unet()
    adapter, other = waken(make(case, unet)), make(case, unet)
    save_file(adapter.state_dict(), tmp_path / "adapter.safetensors")
    checkpoint.load_weights(other, tmp_path / "adapter.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(said(adapter, case), said(other, case), strict=True))


@every_adapter
def test_what_is_prepared_doubles_for_guidance(case: Case) -> None:
    unet = trained_unet()
    adapter = waken(make(case, unet))
    x_t, t, base = latents()
    assert base.context is not None
    ready = adapter.prepare(hint_for(case, x_t))
    uncond = Control(context=torch.zeros_like(base.context))
    twice = pytree.tree_map_only(Tensor, lambda x: torch.cat([x, x]), ready)
    together = adapter.control(torch.cat([x_t, x_t]), torch.cat([t, t]), Control.batch(uncond, base), twice)
    apart = Control.batch(adapter.control(x_t, t, uncond, ready), adapter.control(x_t, t, base, ready))
    torch.testing.assert_close(pytree.tree_leaves(together), pytree.tree_leaves(apart), atol=1e-5, rtol=0)


@every_map
def test_hint_of_another_size_is_refused(case: Case) -> None:
    unet = trained_unet()
    adapter = make(case, unet)
    x_t, t, base = latents()
    hint = hint_for(case, x_t)[..., : -2 * case.factor]
    h, w = (case.factor * side for side in x_t.shape[-2:])
    with pytest.raises(
        ValueError, match=rf"hint is {h}x{w - 2 * case.factor} \(h w\), the image {h}x{w} if the VAE shrinks"
    ):
        adapter.control(x_t, t, base, adapter.prepare(hint))


@every_map
def test_hint_that_is_a_few_pixels_short_is_refused(case: Case) -> None:
    x_t, _, _ = latents()
    hint = hint_for(case, x_t)[:, :, 1:]
    h, w = hint.shape[-2:]
    with pytest.raises(ValueError, match=rf"hint is {h}x{w} \(h w\), must be a multiple of {case.factor}; resize"):
        make(case, trained_unet()).prepare(hint)


@every_map
def test_hint_with_another_number_of_channels_is_refused(case: Case) -> None:
    adapter = make(case, trained_unet())
    message = rf"hint has {case.hint + 1} channels; this adapter takes {case.hint}"
    with pytest.raises(ValueError, match=message):
        adapter.prepare(torch.rand(2, case.hint + 1, 32, 32))


@every_map
def test_unknown_option_is_refused(case: Case) -> None:
    with pytest.raises(registry.ConfigError, match=r"unknown keys \['hint_chanels'\].*did you mean 'hint_channels'"):
        registry.build("adapter", {**case.options, "hint_chanels": 4}, unet=UNet(SHALLOW))


@every_adapter
def test_adapter_builds_without_memory(case: Case) -> None:
    with torch.device("meta"):
        adapter = make(case, UNet(SHALLOW))
    assert all(p.is_meta for p in adapter.parameters())


@every_adapter
def test_adapter_takes_the_unets_precision(case: Case) -> None:
    unet = trained_unet().bfloat16()
    denoiser = Denoiser(unet, {"a": make(case, unet).bfloat16()})
    x_t, t, base = latents()
    assert base.context is not None
    half = Control(context=base.context.bfloat16())
    assert denoiser(x_t.bfloat16(), t, half, {"a": hint_for(case, x_t)}).dtype == torch.bfloat16
