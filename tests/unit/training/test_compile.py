"""torch.compile per block: one graph each, the same gradients, names and files. Without code generation (eager)."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapters  # noqa: F401
from ldm import build, config, registry
from ldm.denoiser import Denoiser
from ldm.models.unet import MidBlock, UNetBlock
from ldm.registry import ConfigError
from ldm.training import checkpoint, run
from tests.small import SHALLOW, latents, trained_unet, waken

ROOT = Path(__file__).resolve().parents[3]
TINY = ["device=cpu", "train.batch=2", "train.precision=fp32", "data.length=8", "data.size=16", "train.ema=null"]
TINY += ["model.vae.weights=null", "model.text.weights=null", "stage.cache=false", "validation.items=2"]
TINY += [f"model.unet.weights={ROOT}/checkpoints/tiny/unet.safetensors", "validation.images=1", "stage.preview_steps=1"]


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "COMPILER", "eager")
    torch._dynamo.reset()  # pyright: ignore[reportPrivateImportUsage]


def denoiser() -> Denoiser:
    torch.manual_seed(0)
    unet = trained_unet()
    made = registry.build("adapter", {"name": "controlnet", "hint_widths": [4, 8]}, unet=unet)
    return Denoiser(unet, {"edge": waken(made)}).train()


def step(module: Denoiser) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of the adapter."""
    torch.manual_seed(1)
    x_t, t, base = latents(SHALLOW)
    output = module(x_t, t, base, {"edge": torch.rand(len(x_t), 3, *(2 * side for side in x_t.shape[-2:]))})
    weights = [p for p in module.parameters() if p.requires_grad]
    return output, list(torch.autograd.grad(output.square().mean(), weights))


def same(a: tuple[Tensor, list[Tensor]], b: tuple[Tensor, list[Tensor]]) -> bool:
    return torch.equal(a[0], b[0]) and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True])
def test_every_block_of_unet_and_controlnet_is_one_graph_with_the_same_gradients(recomputed: bool) -> None:
    module = denoiser()
    names, plain = list(module.state_dict()), step(module)
    if recomputed:
        build.checkpoint_activations(module)
    build.compile_blocks(module)
    counters = torch._dynamo.utils.counters  # pyright: ignore[reportPrivateImportUsage]
    counters.clear()
    assert same(step(module), plain) and same(step(module), plain)
    assert not counters["graph_break"]
    blocks = sum(isinstance(part, UNetBlock | MidBlock) for part in module.modules())
    assert counters["stats"]["unique_graphs"] == blocks == 10  # and none is compiled twice
    assert list(module.state_dict()) == names


@pytest.mark.slow
def test_the_whole_training_forward_is_one_graph() -> None:
    module = denoiser()
    plain = step(module)
    module.compile(fullgraph=True, backend="eager")
    assert same(step(module), plain)


@pytest.mark.slow
def test_a_break_in_a_block_is_an_error() -> None:
    module = denoiser()
    build.compile_blocks(module)
    module.unet.encoder.mid.res1.register_forward_hook(lambda *_: torch._dynamo.graph_break())  # pyright: ignore
    with pytest.raises(torch._dynamo.exc.Unsupported):  # pyright: ignore[reportPrivateImportUsage]
        step(module)


@pytest.mark.slow
def test_compiled_and_plain_runs_continue_each_other_and_write_the_same_file(tmp_path: Path) -> None:
    def start(folder: str, *more: str) -> dict[str, Tensor]:
        words = [f"run.dir={tmp_path / folder}", *TINY, *more]
        done = run.train(config.load(ROOT / "configs" / "train" / "tiny" / "controlnet.yaml", words))
        return checkpoint.files.read(done / "adapter.safetensors")

    whole = start("plain", "train.steps=3", "validation.data=null")
    start("mixed", "train.steps=1", "validation.data=null")
    start("mixed", "train.steps=2", "train.compile=true")  # and validates
    mixed = start("mixed", "train.steps=3", "validation.data=null")
    assert mixed.keys() == whole.keys() and all(torch.equal(mixed[name], whole[name]) for name in whole)


def test_shards_are_not_compiled(tmp_path: Path) -> None:
    words = [f"run.dir={tmp_path / 'run'}", *TINY, "train.compile=true", "train.shard=full", "validation.data=null"]
    with pytest.raises(ConfigError, match=r"train\.compile is on, and train\.shard is 'full'; set one of them off"):
        run.train(config.load(ROOT / "configs" / "train" / "tiny" / "controlnet.yaml", words))
    assert not (tmp_path / "run").exists()


def test_what_has_no_unet_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"train\.compile is on, but this stage has no UNet; drop the key"):
        build.compile_blocks(nn.Linear(2, 2))
