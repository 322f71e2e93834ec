"""Adapters of several kinds in one picture: every way of sampling, their order, taking them away, what each hears."""

import itertools
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.ip_adapter import IPAdapter
from ldm import registry
from ldm.control import Adapter, Control
from ldm.denoiser import AdapterUse, Denoiser
from ldm.generate import Models, Request, images
from ldm.guidance import GuidanceConfig
from ldm.models.attention import Attention, TransformerBlock
from ldm.models.text import TextConfig, TextEncoder
from ldm.models.unet import UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.samplers import DDIM, Sampler
from ldm.schedule import Schedule
from ldm.source import Source
from tests.small import trained_unet, waken

SIZE, STEPS, WORDS = (16, 16), 3, 16
TOWER = {"name": "vit", "image_size": 16, "patch": 8, "width": 16, "layers": 1, "heads": 2}
NODES: dict[str, dict[str, Any]] = {
    "net": {"name": "controlnet", "hint_widths": [4, 8]},
    "lines": {"name": "t2i_adapter", "vae_factor": 2},
    "look": {"name": "ip_adapter", "encoder": TOWER},
    "simple": {"name": "ip_adapter_simple", "encoder": TOWER},
}
NODES |= {f"{name}2": NODES[name] for name in ("net", "lines", "look")}
THREE = ("net", "lines", "look")
SOURCES = {"img2img": 4, "blend": 4, "inpainting": 9}  # and the UNet's input channels


def fresh(names: tuple[str, ...] = THREE, in_channels: int = 4) -> Models:
    torch.manual_seed(0)
    unet = trained_unet(
        UNetConfig(in_channels, channels=(8, 16), blocks=1, depth=(1, 1), context_dim=16, num_heads=2, groups=4)
    )
    built: dict[str, Adapter[Any]] = {n: waken(registry.build("adapter", NODES[n], unet=unet)) for n in names}
    vae = VAE(VAEConfig(channels=(8, 8), blocks=1, groups=4, scale_factor=1.0))
    text = TextEncoder(TextConfig(width=16, layers=1, heads=2, merges=100, context_length=WORDS))
    denoiser = Denoiser(unet, built).eval().requires_grad_(False)
    return Models(denoiser, vae.eval(), text.eval(), Schedule(), "eps")


models = cache(fresh)


def hints(names: Iterable[str] = THREE) -> dict[str, Tensor]:
    """For one picture, the same for a name however often it is called."""
    maps, generator = {"net", "lines"}, torch.Generator()
    shapes = {name: (1, 3, *SIZE) if name.strip("2") in maps else (1, 1, 3, 16, 16) for name in names}
    return {n: torch.rand(s, generator=generator.manual_seed(sum(n.encode()))) for n, s in shapes.items()}


def draw(
    used: Models, told: Mapping[str, Tensor], sampler: Sampler | None = None, prompt: str = "a", **options: Any
) -> Tensor:
    """The latent after each step, and the picture last, in one row."""
    path: list[Tensor] = []
    request = Request([prompt], [1], SIZE, hints=told, guidance=GuidanceConfig(scale=3.0), **options)
    sampler = sampler or DDIM(used.schedule, steps=STEPS)
    picture = images(used, request, sampler, on_step=lambda _, x: path.append(x))
    return torch.cat([x.flatten() for x in (*path, picture)])


def scaled(names: Iterable[str], scale: float = 0.0) -> dict[str, AdapterUse]:
    return dict.fromkeys(names, AdapterUse(scale=scale))


def source(kind: str) -> Source:
    generator = torch.Generator().manual_seed(2)
    mask = torch.zeros(1, 1, *SIZE)
    mask[..., :8] = 1
    image = torch.rand(1, 3, *SIZE, generator=generator) * 2 - 1
    return Source(image, 0.8, None if kind == "img2img" else mask)


@pytest.mark.parametrize("way", [*registry.names("sampler"), *SOURCES])
def test_sketch_and_image_prompt_work_together_in_every_way_of_sampling(way: str) -> None:
    used = models(in_channels=SOURCES.get(way, 4))
    node = {"name": "ddim" if way in SOURCES else way, "steps": 4}
    options: dict[str, Any] = {"source": source(way)} if way in SOURCES else {}
    options["sampler"] = registry.build("sampler", node, schedule=used.schedule)
    both = hints(("lines", "look"))
    base, together = draw(used, {}, **options), draw(used, both, **options)
    assert together.isfinite().all()
    for name in both:
        alone = draw(used, {name: both[name]}, **options)
        assert (alone - base).abs().max() > 1e-3 and (together - alone).abs().max() > 1e-3
    assert torch.equal(draw(used, both, **options, uses=scaled(both)), base)


@pytest.mark.parametrize("order", [*itertools.permutations(THREE)], ids=" ".join)
def test_three_kinds_draw_the_same_in_any_order_bit_for_bit(order: tuple[str, ...]) -> None:
    used = models()
    net = Denoiser(used.denoiser.unet, {name: used.denoiser.adapter(name) for name in order})
    turned = Models(net, used.vae, used.text, used.schedule, used.objective)
    told = hints()
    assert torch.equal(draw(turned, {name: told[name] for name in order}), draw(used, told))


def test_two_of_each_kind_draw_the_same_in_another_order() -> None:
    names = (*THREE, *(f"{name}2" for name in THREE))
    used, told = models(names), hints(names)
    expected = draw(used, told)
    turned = draw(used, dict(reversed(told.items())))
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)  # sums of three in another order round differently
    assert (expected - draw(used, {name: told[name] for name in THREE})).abs().max() > 1e-3


def test_all_at_scale_zero_or_without_adapters_is_the_base_bit_for_bit() -> None:
    used = models()
    bare = Models(Denoiser(used.denoiser.unet), used.vae, used.text, used.schedule, used.objective)
    base = draw(bare, {})
    assert torch.equal(draw(used, {}), base)
    assert torch.equal(draw(used, hints(), uses=scaled(THREE)), base)
    assert (draw(used, hints()) - base).abs().max() > 1e-3


@pytest.mark.parametrize("gone", THREE)
def test_each_can_be_taken_away_from_the_others(gone: str) -> None:
    used, told = models(), hints()
    rest = {name: hint for name, hint in told.items() if name != gone}
    without = draw(used, rest)
    assert torch.equal(draw(used, told, uses=scaled([gone])), without)
    assert (draw(used, told) - without).abs().max() > 1e-3


def counted(layers: Iterable[torch.nn.Module]) -> list[int]:
    """Filled with the number of tokens at each call of these layers."""
    calls: list[int] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    return calls


def cross(network: torch.nn.Module) -> list[Attention]:
    return [m.attn2 for m in network.modules() if isinstance(m, TransformerBlock)]


@pytest.mark.parametrize("prompts", [("look",), ("simple",), ("look", "simple")], ids=" ".join)
def test_a_controlnet_hears_the_text_alone_beside_image_prompts(prompts: tuple[str, ...]) -> None:
    names = ("net", *prompts)
    used = fresh(names)
    net = used.denoiser.adapter("net")
    copied, own = (counted(a.to_k for a in cross(m)) for m in (net, used.denoiser.unet))
    draw(used, hints(names))
    assert copied and set(copied) == {WORDS}
    assert max(own) == (WORDS + 4 if "simple" in prompts else WORDS)  # 4 tokens stand behind the text's


def test_keys_and_values_are_made_once_a_run_and_anew_for_another_prompt() -> None:
    used = fresh()
    unet, look, told = used.denoiser.unet, used.denoiser.adapter("look"), list[Control]()
    assert isinstance(look, IPAdapter)
    image, words = counted([look.to_k[0]]), counted([cross(unet)[0].to_k])
    unet.register_forward_pre_hook(lambda _, args: told.append(args[2]))
    reference = hints(("look",))["look"]
    for prompt, shown in (("a", reference), ("a", 1 - reference), ("b", reference)):
        draw(used, {"look": shown}, prompt=prompt)
    assert len(told) == 3 * STEPS
    assert image == [4, 4] * 3 and words == [WORDS, WORDS] * 3  # of both branches, whatever the steps
    first, other_image, other_text = told[::STEPS]
    (k, _), (same, _), (another, _) = (control.kv[0] for control in (first, other_image, other_text))
    assert torch.equal(k, same) and torch.equal(k[:1], another[:1])  # the negative comes first
    assert not torch.equal(k[1:], another[1:])
    k, another, same = (control.attn[0].k[0] for control in (first, other_image, other_text))
    assert torch.equal(k, same) and torch.equal(k[:1], another[:1])  # the null image likewise
    assert not torch.equal(k[1:], another[1:])
