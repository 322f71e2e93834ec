"""`weights:` takes our files, published files and folders, each slot its own part; and what cannot be one is said."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import adapters  # noqa: F401
from ldm import build, config, registry
from ldm.conditioning import TextUse, condition
from ldm.convert import model, slots
from ldm.models.text import TextEncoder
from ldm.registry import ConfigError
from ldm.sampling import output, plan
from ldm.training import checkpoint

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SMALL = {"merges": 40, "context_length": 9}
UNET = {
    "name": "unet",
    "channels": [8, 16],
    "blocks": 1,
    "depth": [1, 0],
    "context_dim": 16,
    "num_heads": 4,
    "groups": 4,
}
NODES: dict[str, dict[str, Any]] = {
    "unet": UNET,
    "vae": {"name": "kl", "channels": [8, 16], "blocks": 1, "groups": 4},
    "text": {"name": "clip", "width": 16, "layers": 2, "heads": 1, **SMALL},
}
SDXL = {
    "name": "sdxl",
    "clip": {"width": 16, "layers": 2, "heads": 1, **SMALL},
    "open_clip": {"width": 24, "layers": 2, "heads": 1, "projection": 20, **SMALL},
}
NET = {"name": "controlnet", "hint_widths": [8, 16]}


def saved(path: Path, module: nn.Module, prefix: str = "") -> None:
    """A part of a module's tensors as one of our files."""
    path.parent.mkdir(exist_ok=True)
    save_file({k[len(prefix) :]: v for k, v in module.state_dict().items() if k.startswith(prefix)}, path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same three networks in every layout: ours/, whole.safetensors, whole.ckpt, diffusers/."""
    torch.manual_seed(1)
    root = tmp_path_factory.mktemp("sources")
    for kind, node in NODES.items():
        saved(root / "ours" / f"{kind}.safetensors", registry.build(kind, node))
    model.export([root / "ours"], "original", root / "whole.safetensors")
    model.export([root / "ours"], "diffusers", root / "diffusers")
    torch.save({"state_dict": load_file(root / "whole.safetensors"), "epoch": 1}, root / "whole.ckpt")
    return root


def same(module: nn.Module, file: Path) -> None:
    expected, state = load_file(file), module.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[k], expected[k]) for k in state)


@pytest.mark.parametrize("source", ["ours", "whole.safetensors", "whole.ckpt", "diffusers"])
def test_one_path_fills_all_three_slots(source: str, sources: Path) -> None:
    for kind, node in NODES.items():
        module = build.component(kind, {**node, "weights": str(sources / source)})
        same(module, sources / "ours" / f"{kind}.safetensors")


@pytest.mark.parametrize("part", ["vae", "vae/diffusion_pytorch_model.safetensors"])
def test_a_component_of_a_diffusers_folder_is_enough(part: str, sources: Path) -> None:
    module = build.component("vae", {**NODES["vae"], "weights": str(sources / "diffusers" / part)})
    same(module, sources / "ours" / "vae.safetensors")


def test_half_precision_files_fill_full_precision_modules(sources: Path, tmp_path: Path) -> None:
    halves = {k: v.half() for k, v in load_file(sources / "whole.safetensors").items()}
    save_file(halves, tmp_path / "half.safetensors")
    module = build.component("unet", {**UNET, "weights": str(tmp_path / "half.safetensors")})
    expected = load_file(sources / "ours" / "unet.safetensors")
    assert all(torch.equal(v, expected[k].half().float()) for k, v in module.state_dict().items())


def denoiser(net: dict[str, Any], unet: Path) -> Any:
    nodes = {"model": {"unet": {**UNET, "weights": str(unet)}}, "adapters": {"net": {**NET, **net}}}
    return build.denoiser(config.from_mapping(nodes))


def test_controlnet_loads_from_every_layout(sources: Path, tmp_path: Path) -> None:
    whole = sources / "whole.safetensors"
    net = denoiser({}, whole).adapters["net"]
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    saved(tmp_path / "ours.safetensors", net)
    for layout in ("controlnet_original", "controlnet_standalone", "controlnet_diffusers"):
        model.export([tmp_path / "ours.safetensors"], layout, tmp_path / f"{layout}.safetensors")
    (tmp_path / "folder").mkdir()
    (tmp_path / "controlnet_diffusers.safetensors").rename(tmp_path / "folder/diffusion_pytorch_model.safetensors")
    for name in ("ours.safetensors", "controlnet_original.safetensors", "controlnet_standalone.safetensors", "folder"):
        same(denoiser({"weights": str(tmp_path / name)}, whole).adapters["net"], tmp_path / "ours.safetensors")


def test_both_sdxl_towers_come_from_one_file_or_folder(tmp_path: Path) -> None:
    text = registry.build("text", SDXL)
    saved(tmp_path / "ours/text.safetensors", text, "clip.")
    saved(tmp_path / "ours/text_2.safetensors", text, "open_clip.")
    model.export([tmp_path / "ours"], "original", tmp_path / "whole.safetensors")
    model.export([tmp_path / "ours"], "diffusers", tmp_path / "diffusers")
    whole, second = load_file(tmp_path / "whole.safetensors"), tmp_path / "diffusers/text_encoder_2/model.safetensors"
    assert "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight" in whole
    projection = whole["conditioner.embedders.1.model.text_projection"]
    assert torch.equal(load_file(second)["text_projection.weight"], projection.t())
    for name in ("ours", "whole.safetensors", "diffusers"):
        loaded = build.component("text", {**SDXL, "weights": str(tmp_path / name)})
        assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in text.state_dict().items())
    mark = "conditioner.embedders.{}.model."
    refiner = {k.replace(mark.format(1), mark.format(0)): v for k, v in whole.items() if k.startswith(mark.format(1))}
    save_file(refiner, tmp_path / "refiner.safetensors")
    node = {**SDXL, "clip": None, "weights": str(tmp_path / "refiner.safetensors")}
    assert torch.equal(build.component("text", node).open_clip.text_proj, text.open_clip.text_proj)


def test_sd2_tower_without_its_unused_last_block(tmp_path: Path) -> None:
    node = {**NODES["text"], "layers": 3, "layer": "penultimate", "activation": "gelu", "pad": "zero"}
    text = registry.build("text", node)
    state = {k: v for k, v in text.state_dict().items() if not k.startswith("transformer.resblocks.2.")}
    save_file(state, tmp_path / "text.safetensors")
    loaded = build.component("text", {**node, "weights": str(tmp_path / "text.safetensors")})
    ids = text.ids(["a cat"])
    assert torch.equal(loaded(ids), text(ids))
    with pytest.raises(
        ConfigError,
        match=r"12 missing: transformer\.resblocks\.2\.attn\.in_proj_bias, .*found: CLIP text \(16 wide, 2 layers\)",
    ):
        build.component("text", {**node, "layer": "last", "weights": str(tmp_path / "text.safetensors")})


def test_clip_skip_1_is_refused_where_diffusers_left_out_the_last_block(tmp_path: Path) -> None:
    node = {**NODES["text"], "layers": 3, "layer": "penultimate", "activation": "gelu", "pad": "zero"}
    text = registry.build("text", node)
    saved(tmp_path / "whole.safetensors", text)
    state = {k: v for k, v in text.state_dict().items() if not k.startswith("transformer.resblocks.2.")}
    save_file(state, tmp_path / "text.safetensors")
    model.export([tmp_path / "text.safetensors"], "diffusers", tmp_path / "sd2")
    loaded = build.component("text", {**node, "weights": str(tmp_path / "sd2")})

    def context(tower: TextEncoder, clip_skip: int | None) -> torch.Tensor:
        found = condition(tower, ["a cat"], (8, 8), TextUse(clip_skip)).context
        assert found is not None
        return found

    assert all(torch.equal(context(loaded, skip), context(text, skip)) for skip in (None, 2, 3))
    said = r"clip_skip is 1, .* have no last block .*; allowed: 2\.\.3 or null; name weights with all 3 blocks for 1"
    with pytest.raises(ConfigError, match=said) as caught:
        context(loaded, 1)
    assert "\n" not in str(caught.value)
    whole = build.component("text", {**node, "weights": str(tmp_path / "whole.safetensors")})
    assert torch.equal(context(whole, 1), context(text, 1)) and not torch.equal(context(text, 1), context(text, 2))


def refiner(root: Path) -> tuple[Path, dict[str, nn.Module]]:
    """A single file with the names of SDXL's refiner, and the networks in it."""
    torch.manual_seed(2)
    unet = {**UNET, "channels": [8, 16, 16], "depth": [0, 4, 0], "mid_depth": 4, "num_heads": None, "head_dim": 8}
    nets: dict[str, nn.Module] = {
        "unet": registry.build("unet", {**unet, "linear_proj": True, "vector_dim": 6}),
        "vae": registry.build("vae", NODES["vae"]),
        "text": registry.build("text", {**SDXL, "clip": None, "aesthetic": 6.0}),
    }
    saved(root / "ours/unet.safetensors", nets["unet"])
    saved(root / "ours/vae.safetensors", nets["vae"])
    saved(root / "ours/text_2.safetensors", nets["text"], "open_clip.")
    model.export([root / "ours"], "original", root / "refiner.safetensors")
    return root / "refiner.safetensors", nets


@pytest.mark.long
def test_a_refiners_single_file_fills_every_slot_and_comes_back(tmp_path: Path) -> None:
    file, nets = refiner(tmp_path)
    names = load_file(file)
    assert "conditioner.embedders.0.model.transformer.resblocks.1.mlp.c_fc.weight" in names
    assert not any("embedders.1" in key for key in names)
    said = "\n".join(model.inspect(file))
    assert said.count("complete") == 3 and all(f"  {part}: " in said for part in ("unet", "vae", "text_2"))
    assert "not in this file" not in said
    written = model.import_model(file, tmp_path / "in")
    assert [path.stem for path in written] == ["unet", "vae", "text_2"]
    model.export([tmp_path / "in"], "original", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == names.keys() and all(torch.equal(back[k], v) for k, v in names.items())
    for kind, net in nets.items():
        for source in (file, tmp_path / "in"):
            again = copy.deepcopy(net)
            [nn.init.zeros_(p) for p in again.parameters()]
            node = {"name": "sdxl", "clip": None} if kind == "text" else {"name": {"vae": "kl"}.get(kind, kind)}
            checkpoint.load_weights(again, source, parts=slots.parts(kind, node))
            assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items())


def test_other_parts_of_a_file_are_left_alone(sources: Path, tmp_path: Path) -> None:
    state = load_file(sources / "whole.safetensors")
    state["model.diffusion_model.out.2.bias"][:] = torch.nan
    save_file(state, tmp_path / "x.safetensors")
    same(build.component("vae", {**NODES["vae"], "weights": str(tmp_path / "x.safetensors")}), ours(sources, "vae"))
    with pytest.raises(ConfigError, match=r"unet has NaN or infinite values in 1 tensors \(decoder.conv_out.bias\)"):
        build.component("unet", {**UNET, "weights": str(tmp_path / "x.safetensors")})


def ours(sources: Path, kind: str) -> Path:
    return sources / "ours" / f"{kind}.safetensors"


def truncated(sources: Path, path: Path) -> None:
    path.write_bytes((sources / "whole.safetensors").read_bytes()[:-100])


def half(sources: Path, path: Path) -> None:
    state = load_file(sources / "whole.safetensors")
    save_file({k: v for k, v in state.items() if ".output_blocks." not in k}, path)


def nan(sources: Path, path: Path) -> None:
    state = {k: v.half() for k, v in load_file(ours(sources, "unet")).items()}
    state["encoder.conv_in.bias"][0] = torch.inf
    save_file(state, path)


def lora(sources: Path, path: Path) -> None:
    del sources
    save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.ones(2, 2)}, path)


def vae(sources: Path, path: Path) -> None:
    path.write_bytes((sources / "diffusers/vae/diffusion_pytorch_model.safetensors").read_bytes())


def wider(sources: Path, path: Path) -> None:
    del sources
    saved(path, registry.build("unet", {**UNET, "channels": [8, 24]}))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (truncated, r"is not readable .*; it has \d+ bytes, compare that with the source: download it again"),
        (
            half,
            r"unet does not fit \(\d+ of \d+ tensors missing: decoder\.levels\.0.*\); .*part of a checkpoint: down",
        ),
        (nan, r"it has NaN or infinite values in 1 tensors \(encoder.conv_in.bias\); download it again or use"),
        (lora, "this is a LoRA .changes to a model.; merge it into its base model first"),
        (vae, "holds vae, no unet; name a file or folder that has one"),
        (
            wider,
            r"of another architecture than UNet \(\d+ mis-shaped: .*; change the config .*found: custom UNet \(chan",
        ),
    ],
)
def test_what_cannot_fill_a_slot_is_said_in_one_line(
    make: Callable[[Path, Path], None], said: str, sources: Path, tmp_path: Path
) -> None:
    make(sources, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=said) as caught:
        build.component("unet", {**UNET, "weights": str(tmp_path / "x.safetensors")})
    assert "\n" not in str(caught.value) and "x.safetensors" in str(caught.value)


def test_folders_that_lack_the_part_say_what_they_have(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"have unet, vae, text, no text_2; name a file or folder"):
        build.component("text", {**SDXL, "weights": str(sources / "diffusers")})
    with pytest.raises(ConfigError, match="has no weights: wanted a diffusers folder"):
        build.component("unet", {**UNET, "weights": str(tmp_path)})


def test_weights_that_follow_are_not_preceded_by_random_numbers(sources: Path) -> None:
    before = torch.get_rng_state()
    build.component("unet", {**UNET, "weights": str(sources / "whole.safetensors")})
    assert torch.equal(torch.get_rng_state(), before)
    build.component("unet", UNET)
    assert not torch.equal(torch.get_rng_state(), before)


def test_one_key_names_the_whole_model_and_a_slot_may_have_its_own() -> None:
    loaded = config.load(CONFIGS / "model/sd15.yaml", ["model.weights=a.ckpt", "model.vae.weights=b.safetensors"]).model
    assert loaded.unet and loaded.vae and loaded.text
    assert [node["weights"] for node in (loaded.unet, loaded.vae, loaded.text)] == ["a.ckpt", "b.safetensors", "a.ckpt"]


def test_sampling_pins_the_files_of_a_folder_and_their_content(sources: Path, tmp_path: Path) -> None:
    folder = str(sources / "diffusers")
    nodes = {kind: {**node, "weights": folder} for kind, node in NODES.items()}
    job = plan.plan(config.from_mapping({"model": nodes, "sample": {"prompts": ["x"]}}))
    assert job.weights["model.text"] == sources / "diffusers/text_encoder/model.safetensors"
    for name in ("text", "text_2"):
        (tmp_path / f"{name}.safetensors").write_text(name)
    first = output.file_digest(tmp_path)
    (tmp_path / "text_2.safetensors").write_text("other")
    assert output.file_digest(tmp_path) != first
