"""A T2I-Adapter and an IP-Adapter trained in one diffusion stage: what changes, the cache, use on another base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import adapters  # noqa: F401  registers them
from ldm import build
from ldm.config import TrainConfig, from_mapping
from ldm.control import Control
from ldm.data.images import Batch, ImageData, collate
from ldm.training import checkpoint, optim, stream
from ldm.training.cache import LatentData
from ldm.training.diffusion import DiffusionStage
from ldm.training.distributed import ALONE, Rank
from ldm.training.draws import Draws
from ldm.training.stage import choose_trainable, networks
from tests.small import waken

MODEL: dict[str, Any] = {
    "unet": {"name": "unet", "channels": [8, 16], "blocks": 1, "depth": [0, 1], "num_heads": 2, "groups": 4},
    "vae": {"name": "kl", "channels": [8, 8], "blocks": 1, "groups": 4, "scale_factor": 1.0},
    "text": {"name": "clip", "width": 16, "layers": 1, "heads": 2, "merges": 60, "context_length": 16},
}
MODEL["unet"]["context_dim"] = MODEL["text"]["width"]
VIT = {"name": "vit", "image_size": 16, "patch": 8, "width": 16, "layers": 2, "heads": 2}
LINES = {"name": "t2i_adapter", "hint": "edge", "hint_channels": 1, "vae_factor": 2}
LOOK = {"name": "ip_adapter", "encoder": VIT}
PLUS = {**LOOK, "variant": "plus", "width": 64}
NAMES = ("lines", "look")


def stage(seed: int = 0, look: dict[str, Any] = LOOK, **options: Any) -> DiffusionStage:
    """The stage of a base of that seed, with both adapters."""
    torch.manual_seed(seed)
    node = {"name": "diffusion", **options}
    built = build.stage(from_mapping({"model": MODEL, "adapters": {"lines": LINES, "look": look}, "stage": node}))
    assert isinstance(built, DiffusionStage)
    choose_trainable(built, ["adapters.*"])
    waken(built.denoiser.unet)  # its output starts at zero, which would hide all before it
    return built.train()


def data() -> ImageData:
    return build.data({"name": "synthetic", "size": 16, "length": 4, "hints": ["edge"], "reference": True})


def batch() -> Batch:
    return collate([data()[i] for i in range(4)])


def loss(this: DiffusionStage, of: Any, step: int = 0) -> Tensor:
    return this(of, Draws(3, range(4 * step, 4 * step + 4)), "model", step).total


def told(this: DiffusionStage, world: int, micro: int, step: int = 3) -> dict[int, Any]:
    """Global position -> x_t, t, caption's condition and hints, of one step of 8 copies of one sample."""
    found: dict[int, Any] = {}
    for index in range(world):
        for where in stream.positions(step, micro, 8 // micro // world, Rank(index, world, torch.device("cpu"))):
            hook = this.denoiser.register_forward_pre_hook(lambda _, args, w=where: found.update(rows(w, args)))
            this(collate([data()[0]] * len(where)), Draws(3, where), "model", step)
            hook.remove()
    return found


def rows(where: list[int], args: Any) -> dict[int, list[Tensor]]:
    leaves = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    return {p: [leaf[i] for leaf in leaves] for i, p in enumerate(where)}


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 4), (2, 2), (4, 1)])
def test_a_samples_noise_time_and_dropped_conditions_are_its_own_on_any_rank(world: int, micro: int) -> None:
    this = stage(drop_text=0.5, drop_hint=0.5, offset_noise=0.1)
    alone, shared = told(this, 1, 8), told(this, world, micro)
    assert alone.keys() == shared.keys() == set(range(24, 32))
    for position, expected in alone.items():  # x0 is encoded in batches of other sizes: equal to rounding
        torch.testing.assert_close(shared[position], expected, atol=1e-5, rtol=1e-5)


def test_ranks_draw_different_noise_times_and_dropped_conditions() -> None:
    found = told(stage(drop_text=0.5, drop_hint=0.5), 2, 4)
    ranks = [[found[24 + 4 * index + i] for i in range(4)] for index in range(2)]
    ones, twos = ([torch.stack(parts) for parts in zip(*rank, strict=True)] for rank in ranks)
    assert (ones[0] - twos[0]).flatten(1).norm(dim=1).min() > 1  # x_t of the one sample
    assert all(not torch.equal(a, b) for a, b in zip(ones, twos, strict=True)) and len(ones) == 5


def train(this: DiffusionStage, steps: int) -> None:
    parameters = [p for p in this.denoiser.parameters() if p.requires_grad]
    optimizer = optim.adamw(parameters, TrainConfig(lr=1e-2))
    for step in range(steps):
        optimizer.zero_grad()
        loss(this, batch(), step).backward()
        optim.guarded_step(optimizer, parameters, 1.0)


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_a_step_changes_both_adapters_and_nothing_else_bit_for_bit() -> None:
    this = stage()
    frozen = {name: module for name, module in networks(this).items() if name != "adapters"}
    assert frozen.keys() == {"unet", "vae", "text", "encoder_look"}
    before = {name: copied(module) for name, module in frozen.items()}
    fresh = {name: copied(this.denoiser.adapter(name)) for name in NAMES}
    train(this, steps=1)
    assert all(same(module, before[name]) for name, module in frozen.items())
    assert not any(same(this.denoiser.adapter(name), fresh[name]) for name in NAMES)
    trained = {name for name, p in this.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trained if name.startswith("denoiser.adapters.")} == {*NAMES}
    assert {n.split(".")[3] for n in trained if "adapters.look" in n} == {"image", "to_k", "to_v"}


@torch.no_grad()
def drawn(this: DiffusionStage, *names: str) -> Tensor:
    """One prediction with these adapters, on fixed input."""
    generator = torch.Generator().manual_seed(5)
    x_t, words = torch.randn(4, 4, 8, 8, generator=generator), torch.randn(4, 6, 16, generator=generator)
    hints = this.denoiser.encode({n: h for n, h in this.hints(batch()).items() if n in names})
    return this.denoiser(x_t, torch.full((4,), 500), Control(context=words), hints)


def test_adapters_of_one_base_load_strictly_on_another_and_act_there(tmp_path: Path) -> None:
    first, second = stage(seed=0), stage(seed=1)
    train(first, steps=2)
    before = copied(second.denoiser.unet)
    assert not same(first.denoiser.unet, before)
    networks(second)["encoder_look"].load_state_dict(networks(first)["encoder_look"].state_dict())  # published, shared
    base, fresh = drawn(second), {name: drawn(second, name) for name in NAMES}
    exported = first.exports()
    assert exported.keys() == {f"adapter.{name}" for name in NAMES}
    for name in NAMES:
        save_file(exported[f"adapter.{name}"].state_dict(), tmp_path / f"{name}.safetensors")
        checkpoint.load_weights(second.denoiser.adapter(name), tmp_path / f"{name}.safetensors")
        assert same(second.denoiser.adapter(name), first.denoiser.adapter(name).state_dict())
        got = drawn(second, name)
        assert (got - base).abs().max() > 1e-3 and (got - fresh[name]).abs().max() > 1e-3
    assert (drawn(second, *NAMES) - drawn(second, "look")).abs().max() > 1e-3
    assert same(second.denoiser.unet, before) and torch.equal(drawn(second), base)


@pytest.mark.parametrize(("look", "calls"), [(LOOK, []), (PLUS, [1])], ids=["base", "plus"])
@torch.no_grad()
def test_cached_image_prompts_give_the_uncached_loss_and_no_step_runs_the_tower(
    look: dict[str, Any], calls: list[int]
) -> None:
    this = stage(look=look, drop_hint=0.3, cache=True)
    ran: list[int] = []  # images of each call of the tower
    patches = next(m for m in networks(this)["encoder_look"].modules() if isinstance(m, nn.Conv2d))
    patches.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    cached = this.cached(data(), ALONE)
    assert isinstance(cached, LatentData) and ran == [4]  # every reference, once
    ran.clear()
    told: list[Tensor] = []
    this.denoiser.register_forward_pre_hook(lambda _, args: told.append(args[3]["look"]))
    encoded = cached.collate([cached.load(row) for row in range(4)])
    losses = [loss(this, encoded, step) for step in range(3)]
    assert ran == calls  # plus: the null image, once a run
    torch.testing.assert_close(losses, [loss(this, batch(), step) for step in range(3)], rtol=1e-3, atol=0)
    torch.testing.assert_close(told[:3], told[3:], rtol=1e-3, atol=1e-3)  # the cache keeps half precision
    assert (told[3][0] - told[3][1]).abs().max() > 1e-2  # each picture has its own


def test_adapters_that_are_not_trained_stay_in_eval_mode() -> None:
    this = stage()
    choose_trainable(this, ["adapters.lines.*"])
    this.train()
    assert this.denoiser.adapter("lines").training and not this.denoiser.adapter("look").training
