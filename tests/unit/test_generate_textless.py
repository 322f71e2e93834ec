"""SeeCoder in place of the text: what is computed once, what the other adapters hear, what cannot be drawn."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import adapters  # noqa: F401  (registers them)
from ldm import registry
from ldm.control import Adapter, Control
from ldm.denoiser import AdapterUse, Denoiser
from ldm.generate import Models, Request, images
from ldm.guidance import GuidanceConfig
from ldm.models.attention import TransformerBlock
from ldm.models.vae import VAE, VAEConfig
from ldm.samplers import DDIM
from ldm.schedule import Schedule
from tests.small import SHALLOW, trained_unet, waken

SIZE, STEPS, TOKENS = (16, 16), 3, 5
SWIN = {"name": "swin", "image_size": 16, "width": 8, "depths": [1, 1], "heads": [1, 2], "window": 2}
VIT = {"name": "vit", "image_size": 16, "patch": 8, "width": 16, "layers": 1, "heads": 2}
SEE = {"name": "seecoder", "encoder": SWIN, "levels": 2, "global_queries": 2, "local_queries": TOKENS - 2, "layers": 2}
SEE |= {"hidden": 16, "decoder_layers": 1, "decoder_hidden": 16, "heads": 2}
NODES: dict[str, dict[str, Any]] = {
    "see": SEE,
    "net": {"name": "controlnet", "hint_widths": [4, 8]},
    "lines": {"name": "t2i_adapter", "vae_factor": 2},
    "look": {"name": "ip_adapter", "encoder": VIT},
}


@cache
def models() -> Models:
    torch.manual_seed(0)
    unet = trained_unet()
    built: dict[str, Adapter[Any]] = {n: waken(registry.build("adapter", o, unet=unet)) for n, o in NODES.items()}
    vae = VAE(VAEConfig(channels=(8, 8), blocks=1, groups=4, scale_factor=1.0))
    return Models(Denoiser(unet, built).eval().requires_grad_(False), vae.eval(), None, Schedule(), "eps")


def hints(*names: str) -> dict[str, Tensor]:
    shapes = {
        n: (1, 1, 3, 24, 20) if n == "see" else (1, 1, 3, 16, 16) if n == "look" else (1, 3, *SIZE) for n in names
    }
    return {n: torch.rand(s, generator=torch.Generator().manual_seed(len(n))) for n, s in shapes.items()}


def draw(*names: str, scale: float = 3.0, **words: Any) -> Tensor:
    request = Request([""], [0], SIZE, hints=hints(*names), guidance=GuidanceConfig(scale=scale), **words)
    return images(models(), request, DDIM(Schedule(), steps=STEPS))


def test_tokens_and_their_keys_are_made_once_and_the_null_is_of_one_pixel() -> None:
    net: Any = models().denoiser.adapter("see")
    calls: list[Any] = []
    keys: list[int] = []
    hooks = [net.query_transformer.register_forward_pre_hook(lambda _, args: calls.append(args[1]))]
    hooks += [net.encoder.tower.net.patch_embed.register_forward_pre_hook(lambda *_: calls.append("tower"))]
    hooks += [
        module.attn2.to_k.register_forward_hook(lambda *_: keys.append(1))
        for module in models().denoiser.unet.modules()
        if isinstance(module, TransformerBlock)
    ]
    try:
        draw("see")
    finally:
        [hook.remove() for hook in hooks]
    assert calls == ["tower", [(6, 5), (3, 3)], [(1, 1), (1, 1)]]
    assert len(keys) == 2 * len(models().denoiser.unet.spec.cross_attn)  # with guidance and without, not per step


def test_guidance_of_one_hears_the_tokens_alone_and_zeros_are_what_it_moves_away_from() -> None:
    seen: list[Tensor] = []
    unet = models().denoiser.unet
    hook = unet.register_forward_pre_hook(lambda _, args: seen.append(args[2].context))
    try:
        draw("see", scale=1.0)
        draw("see", scale=3.0)
    finally:
        hook.remove()
    alone, both = seen[0], seen[-1]
    assert alone.shape == (1, TOKENS, SHALLOW.context_dim) and both.shape[0] == 2
    assert torch.equal(both[1:], alone) and not both[0].any() and alone.any()


@pytest.mark.parametrize("name", ["net", "lines", "look"])
def test_every_adapter_works_beside_it(name: str) -> None:
    assert not torch.equal(draw("see", name), draw("see"))
    off = {name: AdapterUse(scale=0.0)}
    assert torch.equal(draw("see", name, uses=off), draw("see"))
    assert torch.equal(draw(name, "see"), draw("see", name))


def test_all_of_them_at_once() -> None:
    pictures = {n: draw(*(m for m in NODES if m != n)) for n in ("net", "lines", "look")}
    everything = draw(*NODES)
    assert everything.isfinite().all() and not any(torch.equal(everything, x) for x in pictures.values())


def test_a_controlnet_beside_it_hears_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    net, heard = models().denoiser.adapter("net"), []
    settle = type(net).settle

    def listen(self: Any, prepared: Any, base: Control) -> Any:
        heard.append(base.context)
        return settle(self, prepared, base)

    monkeypatch.setattr(type(net), "settle", listen)
    draw("see", "net")
    context = models().denoiser.prepare({"see": models().denoiser.adapter("see").encode(hints("see")["see"])})["see"]
    assert [tuple(x.shape) for x in heard] == [(1, TOKENS, 12), (2, TOKENS, 12)]
    assert torch.equal(heard[0], context.context) and torch.equal(heard[1][1:], context.context)
    assert not heard[1][0].any()


def test_texts_that_nothing_reads_are_refused() -> None:
    request = Request(["a cat"], [0], SIZE, hints=hints("see"))
    with pytest.raises(ValueError, match="a prompt is 'a cat', but there is no text encoder"):
        images(models(), request, DDIM(Schedule(), steps=1))


def test_tell_puts_the_tokens_into_the_base_and_leaves_the_rest() -> None:
    denoiser = models().denoiser
    prepared = denoiser.prepare({n: denoiser.adapter(n).encode(h) for n, h in hints("see", "lines").items()})
    text = Control(context=torch.randn(1, 4, 12), vector=torch.randn(1, 2))
    base, rest = denoiser.tell(text, prepared)
    assert base.context is not None and text.context is not None and list(rest) == ["lines"]
    assert torch.equal(base.context, torch.cat([text.context, prepared["see"].context], dim=1))
    assert base.vector is text.vector and rest["lines"] is prepared["lines"]
    alone, none = denoiser.tell(Control(), {"see": prepared["see"]})
    assert alone.context is not None and torch.equal(alone.context, prepared["see"].context) and none == {}
    assert denoiser.tell(text, {"lines": prepared["lines"]})[0] is text


def test_training_hears_it_as_sampling_does() -> None:
    """`Denoiser.forward` and one step of sampling: the same prediction."""
    denoiser = models().denoiser
    encoded = denoiser.encode(hints("see", "net"))
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    base, rest = denoiser.tell(Control(), denoiser.prepare(encoded))
    expected = denoiser.unet(x_t, t, base + denoiser.control(x_t, t, base, rest))
    torch.testing.assert_close(denoiser(x_t, t, Control(), encoded), expected)
    assert rest.keys() == {"net"}
