"""The CoAdapter fuser: published size, forward, start, who takes part and who does not."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from adapters.fuser import TASKS, CoAdapterFuser, FuserOptions
from ldm import build, generate, registry
from ldm.config import from_mapping
from ldm.control import Adapter, Control
from ldm.convert.tables_coadapter import FuserConfig
from ldm.denoiser import AdapterUse, Denoiser
from ldm.models.unet import UNet, num_parameters
from ldm.registry import ConfigError
from ldm.source import Start
from tests.small import SD15, SHALLOW, latents, trained_unet, waken
from tests.unit.adapters.test_style_adapter import VIT, transformer

NODES: dict[str, dict[str, Any]] = {
    "sketch": {"name": "t2i_adapter", "vae_factor": 2, "hint_channels": 1},
    "color": {"name": "t2i_adapter", "vae_factor": 2, "variant": "light", "scales": [0]},
    "style": {"name": "t2i_style", "encoder": VIT, "tokens": 4, "heads": 2},
    "net": {"name": "controlnet", "hint_widths": [4, 8]},
}
NODE = {"name": "coadapter", "heads": 4}
UNET_NODE = {"name": "unet", "channels": [8, 16], "blocks": 1, "depth": [0, 1], "head_dim": 8, "num_heads": None}
UNET_NODE |= {"groups": 4, "context_dim": 12, "linear_proj": True}


@functools.cache
def setting(trained: bool = True) -> Denoiser:
    torch.manual_seed(0)
    unet = trained_unet()
    nets: dict[str, Adapter[Any]] = {n: registry.build("adapter", node, unet=unet) for n, node in NODES.items()}
    waken(nets["net"])
    fuser = registry.build("fuser", NODE, unet=unet, adapters=nets)
    return Denoiser(unet, nets, waken(fuser) if trained else fuser).requires_grad_(False).eval()


def hints(x_t: Tensor) -> dict[str, Tensor]:
    b, _, h, w = x_t.shape
    maps = {"sketch": (1, 2), "color": (3, 2), "net": (3, 2)}
    made = {name: torch.rand(b, c, f * h, f * w) for name, (c, f) in maps.items()}
    return made | {"style": torch.randn(b, 1, 5, 16)}


def plain(net: Denoiser) -> Denoiser:
    return Denoiser(net.unet, {name: net.adapter(name) for name in net.adapters})


def flat(ready: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(ready) if isinstance(x, Tensor)]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def test_size_of_the_published_fuser() -> None:
    with torch.device("meta"):
        fuser = CoAdapterFuser(FuserOptions(), unet=UNet(SD15))
    assert num_parameters(fuser) == 27_285_184 and len(fuser.state_dict()) == 59


def test_at_the_start_it_is_the_plain_sum_bit_for_bit() -> None:
    net = setting(trained=False)
    x_t, t, base = latents()
    given = hints(x_t)
    assert torch.equal(net(x_t, t, base, given), plain(net)(x_t, t, base, given))
    assert not torch.equal(setting()(x_t, t, base, given), plain(setting())(x_t, t, base, given))


def test_forward_is_that_of_the_released_code() -> None:
    net = setting()
    fuser = net.fuser
    assert isinstance(fuser, CoAdapterFuser)
    x_t, _, _ = latents()
    ready = net.prepare(hints(x_t))
    state = FuserConfig(12, (8, 16)).keymap("original").to_theirs(fuser.state_dict())

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    rows: list[Tensor] = []
    for name in ("color", "style", "sketch"):  # an order of its own
        task = state["task_embedding"][{"sketch": 0, "style": 5, "color": 6}[name]]
        if name == "style":
            rows += [0.5 * ready[name].tokens + task]
        else:
            pooled = [linear(F.silu(f.mean((2, 3))), f"spatial_feat_mapping.{k}.1") for k, f in enumerate(ready[name])]
            rows += [torch.stack([p + state["positional_embedding"][k] + task for k, p in enumerate(pooled)], dim=1)]
    x = transformer(state, torch.cat(rows, dim=1), heads=4)
    color, style, sketch = x.split([r.shape[1] for r in rows], dim=1)
    got = net.fuse(ready, {"style": 0.5})
    for name, y in (("color", color), ("sketch", sketch)):
        for k, feature in enumerate(ready[name]):
            wanted = feature * (1 + linear(y[:, k], f"spatial_ch_projs.{k}"))[..., None, None]
            torch.testing.assert_close(got[name][k], wanted, atol=1e-5, rtol=1e-5)
    wanted = ready["style"].tokens * (1 + style @ state["seq_proj"])  # read at its weight, returned without it
    torch.testing.assert_close(got["style"].tokens, wanted, atol=1e-5, rtol=1e-5)


def test_others_pass_through_and_the_order_of_adapters_does_not_matter() -> None:
    net = setting()
    x_t, _, _ = latents()
    ready = net.prepare(hints(x_t))
    forth, back = net.fuse(ready), net.fuse(dict(reversed(ready.items())))
    assert forth["net"] is ready["net"]
    assert all(same(forth[name], back[name]) for name in ready)
    turned = registry.build(
        "fuser", NODE, unet=net.unet, adapters={name: net.adapter(name) for name in reversed(NODES)}
    )
    assert isinstance(net.fuser, CoAdapterFuser)
    turned.load_state_dict(net.fuser.state_dict())
    assert all(same(turned(ready, {}, {})[name], forth[name]) for name in ready)


def test_adapter_without_a_hint_takes_no_part() -> None:
    net = setting()
    x_t, _, _ = latents()
    given = hints(x_t)
    alone = net.fuse(net.prepare({"sketch": given["sketch"]}))
    both = net.fuse(net.prepare({"sketch": given["sketch"], "color": given["color"]}))
    assert alone.keys() == {"sketch"} and not same(alone["sketch"], both["sketch"])
    assert net.fuse(net.prepare({"net": given["net"]})).keys() == {"net"}
    assert net.fuse({}) == {}


def test_scale_is_seen_by_the_others_and_left_to_the_control() -> None:
    net = setting()
    x_t, t, base = latents()
    ready = net.prepare({n: h for n, h in hints(x_t).items() if n in ("sketch", "color")})
    whole, half = net.fuse(ready), net.fuse(ready, {"color": 0.5})
    assert not same(whole["sketch"], half["sketch"])
    uses = {"color": AdapterUse(scale=0.5), "sketch": AdapterUse()}
    factor = half["color"][0] / ready["color"][0]  # of the unweighted features
    said = net.control(x_t, t, base, {"color": half["color"]}, uses)
    torch.testing.assert_close(said.stages[0], 0.5 * ready["color"][0] * factor, atol=1e-6, rtol=1e-5)


def test_dropped_hints_are_silent_and_unseen_sample_by_sample() -> None:
    net = setting()
    x_t, _, _ = latents()
    given = hints(x_t)
    given["sketch"][0] = 0
    given["style"][0] = 0
    del given["net"]
    mixed = net.fuse(net.prepare(given), dropped=given)
    lone = net.fuse(net.prepare({"color": given["color"][:1]}))
    torch.testing.assert_close(mixed["color"][0][:1], lone["color"][0], atol=1e-5, rtol=1e-5)
    assert not any(x[0].any() for x in mixed["sketch"]) and all(x[1].any() for x in mixed["sketch"])
    none = {name: torch.zeros_like(hint) for name, hint in given.items()}
    assert all(x.isfinite().all() for x in flat(net.fuse(net.prepare(none), dropped=none)))


def test_guided_branches_have_the_same_fused_maps_and_their_own_style() -> None:
    net = setting()
    x_t, _, base = latents()
    assert base.context is not None
    negative = Control(context=torch.randn_like(base.context))
    given = hints(x_t) | {"style": torch.rand(2, 1, 3, 16, 16)}
    pair = generate._Branches(net, base, negative, 1, Start(x_t))
    pair.prepare(given, {}, {})
    uncond, cond = pair(x_t, 500.0, True)
    fused, t = net.fuse(net.prepare(net.encode(given))), torch.full((2,), 500.0)
    torch.testing.assert_close(cond, net.unet(x_t, t, base + net.control(x_t, t, base, fused)), atol=1e-5, rtol=0)
    null = net.prepare({"style": torch.zeros(2, 1, 5, 16)})
    silent = net.control(x_t, t, negative, fused | null)
    torch.testing.assert_close(uncond, net.unet(x_t, t, negative + silent), atol=1e-5, rtol=0)
    counted: list[int] = []
    assert net.fuser is not None
    handle = net.fuser.register_forward_hook(lambda *_: counted.append(1))
    pair.prepare(given, {"style": AdapterUse(scale=0.0)}, {})
    for _ in range(3):
        pair(x_t, 500.0, True)
    handle.remove()
    assert len(counted) == 1 and "style" not in pair.heard  # once per image; scale 0 is absent


def test_tasks_follow_names_and_can_be_given_or_left_out() -> None:
    unet, nets = setting().unet, dict(setting().adapters.items())

    def tasks(**given: str | None) -> dict[str, str]:
        fuser = registry.build("fuser", NODE | {"tasks": given}, unet=unet, adapters=nets)
        return {name: TASKS[row] for name, row in fuser.tasks.items()}

    assert tasks() == {"sketch": "sketch", "style": "style", "color": "color"}
    assert tasks(sketch="canny", color=None) == {"sketch": "canny", "style": "style"}


@pytest.mark.parametrize(
    ("tasks", "adapters", "message"),
    [
        (
            {"sketch": "skecth"},
            ("sketch",),
            r"fuser\.tasks\.sketch is 'skecth'; allowed: sketch, .*did you mean 'sketch'",
        ),
        (
            {"net": "canny"},
            ("sketch", "net"),
            "fuser.tasks has 'net', a ControlNet; allowed: T2I-Adapters .* here sketch",
        ),
        ({"sketchy": "canny"}, ("sketch",), "'sketchy', no adapter of this run; .*did you mean 'sketch'"),
        ({}, ("lines",), "fuser.tasks does not say what adapter 'lines' is; allowed: .*tasks: {lines: sketch}"),
        ({}, ("net",), "fuser has no adapter to fuse; adapters that can be: none"),
        ({"sketch": None}, ("sketch",), "fuser has no adapter to fuse; adapters that can be: sketch"),
        (["sketch"], ("sketch",), "tasks is .*must be a mapping"),
    ],
)
def test_tasks_that_make_no_sense_are_one_line(tasks: Any, adapters: tuple[str, ...], message: str) -> None:
    nodes = {name: NODES.get(name, NODES["sketch"]) for name in adapters}
    node = {"model": {"unet": UNET_NODE}, "adapters": nodes, "fuser": NODE | {"tasks": tasks}}
    with torch.device("meta"), pytest.raises(ConfigError, match=message) as caught:
        build.denoiser(from_mapping(node))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"heads": 5}, "fuser.heads is 5, must divide the text's width 12"), ({"depth": 0}, "fuser.depth is 0, must be")],
)
def test_shapes_that_no_fuser_has_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.build("fuser", NODE | options, unet=UNet(SHALLOW))
