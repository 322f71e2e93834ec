"""Every figure equals a direct computation, and a step that is not logged makes no host wait."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import adapters  # noqa: F401  registers them
from ldm import build, registry
from ldm.config import RunConfig, TrainConfig, from_mapping
from ldm.control import Adapter
from ldm.data.images import Batch, Sample, collate
from ldm.denoiser import Denoiser
from ldm.models.unet import EncoderLevel, UNet
from ldm.training import diffusion, loop, optim
from ldm.training.distributed import Rank, fit
from ldm.training.learning import by_time, loudness, step_figures
from ldm.training.stage import choose_trainable
from ldm.training.state import State
from scripts.benchmarks import measure
from tests.small import SHALLOW, latents, trained_unet, waken

ALONE = Rank(0, 1, torch.device("cpu"))
CONTROLNET = {"name": "controlnet", "hint_widths": [4, 8]}
MODEL: dict[str, Any] = {
    "unet": {"name": "unet", "channels": [8, 16], "blocks": 1, "depth": [0, 1], "num_heads": 2, "groups": 4},
    "vae": {"name": "kl", "channels": [8, 8], "blocks": 1, "groups": 4, "scale_factor": 1.0},
    "text": {"name": "clip", "width": 16, "layers": 1, "heads": 2, "merges": 60, "context_length": 16},
}
MODEL["unet"]["context_dim"] = MODEL["text"]["width"]


def norm(tensors: Any) -> float:
    return torch.cat([x.detach().flatten() for x in tensors]).norm().item()


def stepped(module: nn.Module, config: TrainConfig, steps: int) -> tuple[torch.optim.AdamW, list[Tensor]]:
    """AdamW after some steps, and the parameters before the last one."""
    parameters = list(module.parameters())
    optimizer, before = optim.adamw(parameters, config), []
    for _ in range(steps):
        before = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = fit(torch.randn(p.shape), p)
        optim.guarded_step(optimizer, parameters, config.clip)
    return optimizer, before


@pytest.mark.parametrize("steps", [1, 4])
def test_update_ratio_is_the_change_of_the_last_step_over_the_weights(steps: int) -> None:
    module = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7))
    module.register_parameter("temperature", nn.Parameter(torch.tensor(0.5)))
    optimizer, before = stepped(module, TrainConfig(lr=0.03, weight_decay=0.4), steps)
    change = norm(p - old for p, old in zip(module.parameters(), before, strict=True))
    want = change / norm(module.parameters())
    assert step_figures({"model": optimizer}, module, ALONE) == {"update_ratio": pytest.approx(want, rel=1e-5)}
    for p in module.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optim.guarded_step(optimizer, list(module.parameters()), None)  # skipped
    assert step_figures({"model": optimizer}, module, ALONE) == {"update_ratio": pytest.approx(want, rel=1e-5)}


def test_each_player_has_its_update_ratio_and_one_without_gradients_has_zero() -> None:
    modules = nn.Linear(3, 3), nn.Linear(3, 3)
    players = {"model": stepped(modules[0], TrainConfig(), 1)[0], "critic": stepped(modules[1], TrainConfig(), 0)[0]}
    found = step_figures(players, nn.Linear(1, 1), ALONE)
    assert found["update_ratio"] > 0 and found["critic_update_ratio"] == 0.0


def test_sharded_weights_give_the_same_figures(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # here: importing them takes seconds
    from torch.distributed.tensor import Shard, distribute_tensor

    module, config = nn.Linear(4, 6), TrainConfig(lr=0.1, clip=None)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh, sharded = init_device_mesh("cpu", (1,)), nn.Linear(4, 6)
        for name, p in module.named_parameters():
            setattr(sharded, name, nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])))
        found: list[dict[str, float]] = []
        for linear in (sharded, module):
            torch.manual_seed(1)
            found.append(step_figures({"model": stepped(linear, config, 2)[0]}, linear, ALONE))
    finally:
        dist.destroy_process_group()
    assert found[0] == found[1] and found[0]["update_ratio"] > 0


def denoiser(**nodes: dict[str, Any]) -> Denoiser:
    """Adapters on a UNet whose output is not zero."""
    unet = trained_unet(SHALLOW)
    return Denoiser(unet, {name: registry.build("adapter", node, unet=unet) for name, node in nodes.items()})


def test_zero_norm_is_that_of_the_zero_convolutions_alone() -> None:
    this = denoiser(edge=CONTROLNET, sketch={"name": "t2i_adapter"}, timed={"name": "t2i_adapter", "time": True})
    assert step_figures({}, this, ALONE) == {"edge.zero_norm": 0.0, "timed.zero_norm": 0.0}
    state = waken(this).adapter("edge").state_dict()
    layers = ("zero_convs.", "zero_mid.", "hint.convs.3.")
    want = norm(x for name, x in state.items() if name.startswith(layers))
    found = step_figures({}, this, ALONE)
    assert found["edge.zero_norm"] == pytest.approx(want, rel=1e-5) and found["timed.zero_norm"] > 0
    optim.trainable(this, ["adapters.timed.*"])
    assert list(step_figures({}, this, ALONE)) == ["timed.zero_norm"]  # what is not trained has no figure


@pytest.mark.parametrize("name", registry.names("adapter"))
def test_adapters_name_what_starts_at_zero(name: str) -> None:
    """Only those that start as no-ops have such layers, and all of those but the published exceptions do."""
    cls: type[Adapter[Any]] = registry.registered()[("adapter", name)]  # pyright: ignore[reportAssignmentType]
    owns = cls.zero_layers is not Adapter.zero_layers
    assert owns == (name in ("controlnet", "controlnet_lite", "t2i_adapter", "seecoder"))


def features(unet: UNet, *inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of each level's last block, and of each downsampling, before anything is added."""
    found: tuple[list[Any], list[Any]] = [], []
    levels: list[EncoderLevel] = list(unet.encoder.levels)  # pyright: ignore[reportAssignmentType]
    hooks = [level.blocks[-1].register_forward_hook(lambda m, a, y: found[0].append(y)) for level in levels]
    hooks += [
        level.down.register_forward_hook(lambda m, a, y: found[1].append(y))
        for level in levels
        if level.down is not None
    ]
    unet(*inputs)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
@pytest.mark.parametrize("guide", ["controlnet", "encoder", "both", "xl"])
def test_loudness_is_that_of_the_residuals_and_of_the_features_they_meet(guide: str) -> None:
    t2i = {"name": "t2i_adapter", "vae_factor": 2}
    node = {"controlnet": CONTROLNET, "xl": {**t2i, "variant": "xl"}}.get(guide, {**t2i, "guide": guide})
    this = waken(denoiser(own=node))
    x_t, t, base = latents(SHALLOW)
    hint = torch.rand(2, 3, *(2 * side for side in x_t.shape[-2:]))
    adapter = this.adapter("own")
    said = adapter.control(x_t, t, base, adapter.prepare(hint))
    stages, downs = features(this.unet, x_t, t, base + said)
    encoded = this.unet.encoder(x_t, t, base + said)
    residuals = [*said.skips, *said.stages, *said.downs, *([] if said.mid is None else [said.mid])]
    met = [*(encoded.skips if said.skips else ()), *(stages if said.stages else ()), *(downs if said.downs else ())]
    met += [] if said.mid is None else [encoded.mid]
    assert [x.shape for x in residuals] == [x.shape for x in met]
    found = loudness(this, x_t, t, base, {"own": hint})["own"].sqrt().tolist()
    assert found == pytest.approx([norm(residuals), norm(met)], rel=1e-4) and norm(residuals) > 0


@torch.no_grad()
def test_two_adapters_meet_the_features_that_both_make() -> None:
    t2i = {"name": "t2i_adapter", "vae_factor": 2}
    this, (x_t, t, base) = denoiser(a=t2i, b=t2i), latents(SHALLOW)
    hint = torch.rand(2, 3, *(2 * side for side in x_t.shape[-2:]))
    said = {name: this.adapter(name).control(x_t, t, base, this.adapter(name).prepare(hint)) for name in "ab"}
    stages, _ = features(this.unet, x_t, t, base + said["a"] + said["b"])
    found = loudness(this, x_t, t, base, {"a": hint, "b": hint})
    for name in "ab":
        assert found[name].sqrt().tolist() == pytest.approx([norm(said[name].stages), norm(stages)], rel=1e-4)


def stage(**nodes: dict[str, Any]) -> diffusion.DiffusionStage:
    node = {"name": "diffusion", "preview_steps": 1}
    built = build.stage(from_mapping({"model": MODEL, "adapters": nodes, "stage": node}))
    assert isinstance(built, diffusion.DiffusionStage)
    waken(built.denoiser.unet)
    return built


def samples(n: int) -> list[Sample]:
    data = build.data({"name": "synthetic", "size": 16, "length": n, "hints": ["edge"]})
    return [data[i] for i in range(n)]


def batch(n: int) -> Batch:
    return collate(samples(n))


def test_held_out_loss_falls_apart_into_quarters_of_the_schedule() -> None:
    losses, t = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([0, 249, 250, 999, 750])
    assert by_time(losses, t, 1000) == {"loss": pytest.approx(6.2), "loss_t0": 1.5, "loss_t1": 4.0, "loss_t3": 12.0}


def test_validation_figures_do_not_depend_on_batches() -> None:
    this, whole = waken(stage(edge=CONTROLNET)).eval(), batch(8)
    report = this.validate([whole], 2, 0)
    apart = this.validate([collate([sample]) for sample in samples(8)], 0, 0).figures
    names = ["loss", *(f"loss_t{i}" for i in range(4)), "edge.residual_ratio"]
    assert [apart[n] for n in names] == pytest.approx([report.figures[n] for n in names], rel=1e-4)
    quarters = torch.bincount(torch.arange(8) * 577 % 1000 * 4 // 1000)
    mean = sum(int(n) * report.figures[f"loss_t{i}"] for i, n in enumerate(quarters)) / 8
    assert mean == pytest.approx(report.figures["loss"], rel=1e-5)
    assert report.figures["edge.residual_ratio"] > 0
    assert list(report.columns) == ["hint: edge", "base", "with adapter", "ground truth"]


def test_an_unlogged_step_makes_no_host_wait() -> None:
    this = stage(edge=CONTROLNET)
    choose_trainable(this, ["adapters.*"])
    parameters = {name: p for name, p in this.denoiser.named_parameters() if p.requires_grad}
    config = RunConfig(train=TrainConfig(precision="fp32"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = State({"model": optim.adamw(parameters.values(), config.train)}, {"model": parameters}, None, scaler)
    micro_batches = [([0, 1], batch(2))]
    loop._step(this, state, micro_batches, config, ALONE)  # what is made once is made

    def step() -> Tensor:
        return loop._step(this, state, micro_batches, config, ALONE)["loss"]

    assert measure.counts(step).syncs == 0
