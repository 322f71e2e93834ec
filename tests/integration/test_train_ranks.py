"""Every adapter trains the same on two ranks as on one, whole (DDP) and in shards (FSDP2): the losses of 20 steps.

All two-rank runs share two processes, since starting those takes longest. Of the adapters, one is in `make test-ranks`;
`pytest -m slow -rP tests/integration/test_train_ranks.py` is all of them, and prints how far they are apart.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import adapters  # noqa: F401
from ldm import config, registry
from ldm.training import run
from tests.ranks import ROOT, launch_two_ranks

pytestmark = pytest.mark.ranks

LDM = str(ROOT / "configs" / "train" / "tiny" / "ldm.yaml")
SMALL = ["device=cpu", "train.threads=1", "train.precision=fp32", "train.steps=20", "train.batch=4", "train.lr=1e-3"]
SMALL += ["train.warmup=0", "train.decay=constant", "train.ema=0.9", "train.trainable=[adapters.*]", "log.every=1"]
SMALL += ["data.length=16", "data.size=16", "data.reference=true", "validation.data=null", "stage.cache=false"]
SMALL += ["stage.drop_text=0.3", "stage.drop_hint=0.3", "model.vae.weights=null", "model.text.weights=null"]
SMALL += [f"model.unet.weights={ROOT}/checkpoints/tiny/unet.safetensors"]  # a fresh one gives adapters no gradient
VIT = "encoder: {name: vit, image_size: 16, patch: 8, width: 16, layers: 1, heads: 2}"
SWIN = "encoder: {name: swin, image_size: 16, patch: 2, width: 8, depths: [2, 2], heads: [1, 2], window: 2}"
SEE = f"name: seecoder, {SWIN}, levels: 2, local_queries: 3, layers: 2, hidden: 16, decoder_layers: 1, heads: 2"
ADAPTERS = {
    "controlnet": ["adapters.edge={name: controlnet, hint_widths: [4, 4, 8]}"],
    "controlnet middle only": ["adapters.edge={name: controlnet, hint_widths: [4, 4, 8], middle_only: true}"],
    "controlnet_lite": ["adapters.edge={name: controlnet_lite, hint_widths: [4, 4, 8]}"],
    "t2i_adapter": ["adapters.edge={name: t2i_adapter, vae_factor: 4}"],
    "t2i_adapter light": ["adapters.edge={name: t2i_adapter, vae_factor: 4, variant: light, hint_channels: 1}"],
    "t2i_adapter time": ["adapters.edge={name: t2i_adapter, vae_factor: 4, time: true}"],
    "ip_adapter": [f"adapters.look={{name: ip_adapter, {VIT}}}"],
    "ip_adapter plus": [f"adapters.look={{name: ip_adapter, {VIT}, variant: plus, tokens: 3, depth: 1}}"],
    "ip_adapter full": [f"adapters.look={{name: ip_adapter, {VIT}, variant: full}}"],
    "ip_adapter_simple": [f"adapters.look={{name: ip_adapter_simple, {VIT}}}"],
    "t2i_style": [f"adapters.look={{name: t2i_style, {VIT}, tokens: 3, depth: 1, heads: 2}}"],
    "t2i_style with fuser": [
        f"adapters.style={{name: t2i_style, {VIT}, tokens: 3, depth: 1, heads: 2}}",
        "adapters.edge={name: t2i_adapter, vae_factor: 4}",
        "fuser={name: coadapter, depth: 1, tasks: {edge: canny}}",
        "train.trainable=[adapters.*, fuser.*]",
    ],
    "seecoder": [f"adapters.see={{{SEE}}}", "model.text=null"],  # with dropout
    "seecoder position": [
        f"adapters.see={{{SEE}, position: true, decoder_attention: over_tokens}}",
        "model.text=null",
    ],
}
QUICK = ("seecoder position",)  # the one whose layers draw for themselves
KINDS = {"whole": "none", "in shards": "full"}
Curves = dict[str, dict[str, list[float]]]  # adapter -> "one rank" or a kind -> losses


def arguments(name: str, folder: Path, shard: str = "none") -> list[str]:
    return [f"run.dir={folder}", f"train.shard={shard}", *SMALL, *ADAPTERS[name]]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["grad_norm"] > 0 for line in lines[1:])  # the adapter is trained: some have no gradient at first
    return [line["loss"] for line in lines]


def trained(names: tuple[str, ...], folder: Path) -> Curves:
    """Losses of each adapter's runs, with one rank and with two."""
    found: Curves = {}
    pairs = [(name, kind, folder / kind / name) for name in names for kind in KINDS]
    launch_two_ranks([["--config", LDM, *arguments(name, at, KINDS[kind])] for name, kind, at in pairs], folder)
    for name in names:
        run.train(config.load(LDM, arguments(name, folder / "one" / name)))
        found[name] = {"one rank": losses(folder / "one" / name)}
    for name, kind, at in pairs:
        found[name][kind] = losses(at)
    return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Curves]:
    yield trained(QUICK, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Curves]:
    yield trained(tuple(ADAPTERS), tmp_path_factory.mktemp("every"))


def check(curves: dict[str, list[float]], kind: str) -> None:
    one, two = curves["one rank"], curves[kind]
    assert len(one) == len(two) == 20
    print(f"largest difference {max(abs(a - b) for a, b in zip(one, two, strict=True)):.1e}, losses {one[0]:.4f} ...")
    assert two == pytest.approx(one, abs=1e-6, rel=0)


def test_every_registered_adapter_is_in_the_list() -> None:
    nodes = [part.partition("={name: ")[2] for parts in ADAPTERS.values() for part in parts if part[:9] == "adapters."]
    assert {node.split(",")[0] for node in nodes} == set(registry.names("adapter"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUICK)
def test_two_ranks_have_one_ranks_losses(name: str, kind: str, quick: Curves) -> None:
    check(quick[name], kind)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_two_ranks_have_one_ranks_losses_with_every_adapter(name: str, kind: str, every: Curves) -> None:
    check(every[name], kind)
