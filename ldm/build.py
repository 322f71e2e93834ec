"""From a config to objects: models with their weights, stages, data."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm import models, registry  # noqa: F401  (importing models registers them)
from ldm.config import Node, RunConfig
from ldm.control import Adapter, Fuser
from ldm.convert import slots
from ldm.data.images import ImageData
from ldm.denoiser import AdapterUse, Denoiser, check_use
from ldm.models.clip import ImageTower
from ldm.models.unet import MidBlock, UNet, UNetBlock, UNetDecoder, UNetEncoder
from ldm.registry import ConfigError
from ldm.schedule import Schedule, ScheduleConfig
from ldm.training import checkpoint
from ldm.training.stage import Stage

COMPILER = "inductor"  # torch.compile's backend


class _Unfilled(TorchFunctionMode):
    """New parameters keep whatever memory they were given: the weights that follow would overwrite their start."""

    FILLING: ClassVar = {Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.FILLING or getattr(func, "__module__", None) == nn.init.__name__:
            target = args[0] if args else kwargs["tensor"]
            if isinstance(target, nn.Parameter):  # a buffer may be in no file
                return target
        return func(*args, **kwargs)


def component(kind: str, node: Node | None, slot: str | None = None, **runtime: Any) -> Any:
    """Build one model and load its `weights:` (see `weights_file`; `weights_prefix:` picks a part of one of our files).

    On the meta device (`with torch.device("meta")`) weights are not read.

    Raises: ConfigError if the slot is empty, the node is wrong, or the weights are missing or of another architecture.
    """
    slot = slot or f"model.{kind}"
    if node is None:
        raise ConfigError(f"{slot} is not set; this run needs it: include one of configs/model/*.yaml")
    options = {k: v for k, v in node.items() if k not in ("weights", "weights_prefix")}
    prefix = node.get("weights_prefix", "")
    if not isinstance(prefix, str):
        raise ConfigError(f"{slot}.weights_prefix is {prefix!r}, must be text, e.g. 'text.'")
    return _filled(kind, options, node.get("weights"), slot, prefix, **runtime)


def _filled(kind: str, options: Node, weights: Any, slot: str, prefix: str = "", **runtime: Any) -> Any:
    """Build a module and load its weights, if it has any."""
    meta = torch.get_default_device().type == "meta"
    file = None if meta else weights_file(kind, {**options, "weights": weights}, slot)
    if file is None:
        return registry.build(kind, options, **runtime)
    with _Unfilled():
        module: nn.Module = registry.build(kind, options, **runtime)
    checkpoint.load_weights(module, file, prefix, parts=slots.parts(kind, options))
    return module


def weights_file(kind: str, node: Node, slot: str) -> Path | None:
    """What a node's `weights:` name, None if it has none.

    Allowed: a safetensors file of ours, a run folder (its newest complete checkpoint), a published file
    (.safetensors, .ckpt, .pth, .bin) or diffusers folder that holds the network, alone or among others.

    Args:
        kind: of the node, as in the registry.
        node: its YAML.
        slot: where it stands: "model.unet", "adapters.canny", "fuser".

    Returns: a file; a folder of models only where the node needs several of them.
    Raises: ConfigError if the key holds no path, or a folder does not have the network.
    """
    value = node.get("weights")
    if not isinstance(value, str | Path | None):
        raise ConfigError(f"{slot}.weights is {value!r}, must be the path of a weight file or a folder with one")
    if not value:
        return None
    name = slot.partition(".")[2]
    stems = (f"adapter.{name}", "adapter") if kind == "adapter" else (kind, "model")
    return checkpoint.find_weights(Path(value), stems, slots.parts(kind, node))


def frozen(module: nn.Module) -> nn.Module:
    """In eval mode, without gradients."""
    return module.requires_grad_(False).eval()


def checkpoint_activations(module: nn.Module) -> None:
    """Make every UNet half in the module (ControlNet's copy too) recompute its blocks. Raises: ConfigError if none."""
    halves = [m for m in module.modules() if isinstance(m, UNetEncoder | UNetDecoder)]
    if not halves:
        raise ConfigError("train.checkpoint_activations is on, but this stage has no UNet; drop the key")
    for half in halves:
        half.checkpoint_activations()


def compile_blocks(module: nn.Module) -> None:
    """Compile every UNet block in the module (ControlNet's copy too), in place; names of parameters stay.

    Each is one graph: a break in it is an error. Blocks have caches of their own, one entry per size of input.

    Raises: ConfigError if there is none, or torch is too old.
    """
    blocks = [m for m in module.modules() if isinstance(m, UNetBlock | MidBlock)]
    if not blocks:
        raise ConfigError("train.compile is on, but this stage has no UNet; drop the key")
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        raise ConfigError(
            f"train.compile is on, but torch {torch.__version__} is too old for it; update torch, or drop it"
        )
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, backend=COMPILER, recompile_limit=64, isolate_recompiles=True)


def data(node: Node | None, what: str = "data") -> ImageData:
    """Build a data set. Raises: ConfigError if it is not set or cannot be read."""
    if node is None:
        raise ConfigError(f"{what} is not set; include one of configs/data/*.yaml")
    made: ImageData = registry.build("data", node)
    if what == "validation.data" and len(made.groups()) > 1:
        raise ConfigError(f"{what}.buckets is set; what is held out is of one size, data.size: drop the key")
    return made


def stage(config: RunConfig) -> Stage:
    """Build what `stage:` names, with what its factory asks for by keyword (vae, clip, text, denoiser, schedule)."""
    if config.stage is None:
        known = " | ".join(registry.names("stage"))
        raise ConfigError(f"stage is not set; say what to train: stage: {{name: {known}}}")
    factory = registry.registered().get(("stage", config.stage.get("name", "")))
    makers = {
        "vae": lambda: component("vae", config.model.vae),
        "clip": lambda: component("clip", config.model.clip),
        "text": lambda: text(config),
        "denoiser": lambda: denoiser(config),
        "schedule": lambda: schedule(config),
        "objective": lambda: config.model.objective,
        "uses": lambda: uses(config),
    }
    wanted = [n for n in inspect.signature(factory).parameters if n in makers] if factory else []
    result: Stage = registry.build("stage", config.stage, **{n: makers[n]() for n in wanted})
    if config.train.checkpoint_activations:
        checkpoint_activations(result)
    return result


def text(config: RunConfig) -> Any:
    """The text encoder; None where `model.text` is null and an adapter stands for it.

    Raises: ConfigError as `component`, or if neither gives the UNet its context.
    """
    if config.model.text is None and any(
        getattr(registry.registered().get(("adapter", str(node.get("name")))), "gives_context", False)
        for node in config.adapters.values()
    ):
        return None
    return component("text", config.model.text)


def schedule(config: RunConfig) -> Schedule:
    """The noise schedule. Raises: ConfigError on an unknown key or value."""
    result = Schedule(registry.checked(ScheduleConfig, config.model.schedule, "model.schedule"))
    result.check_objective(config.model.objective)
    return result


def split_use(name: str, node: Node) -> tuple[AdapterUse, Node]:
    """An adapter's YAML node -> how it is used, and what it is built from.

    Raises: ConfigError on a name that no module can have, a node that is no mapping, an unknown key, or a wrong value.
    """
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise ConfigError(
            f"adapters has the name {name!r}, must be letters, digits and _, and no word of PyTorch's modules (keys, "
            "values, train, ...); choose another, e.g. canny"
        )
    if not isinstance(node, dict):  # pyright: ignore[reportUnnecessaryIsInstance]  (YAML may hold anything here)
        raise ConfigError(f"adapters.{name} is {node!r}, must be a mapping of keys, e.g. {{name: controlnet}}")
    fields = [f.name for f in dataclasses.fields(AdapterUse)]
    use = registry.checked(AdapterUse, {k: v for k, v in node.items() if k in fields}, f"adapters.{name}")
    options = {k: v for k, v in node.items() if k not in fields}
    own = registry.keys("adapter", node.get("name"))
    if own and (unknown := [str(k) for k in options if k not in (*own, "name")]):
        known = list(dict.fromkeys([*own, *fields]))
        raise ConfigError(
            f"adapters.{name} has the unknown key {unknown[0]!r}; keys: {', '.join(known)}"
            f"{registry.suggest(unknown[0], known)}"
        )
    return use, options


def uses(config: RunConfig) -> dict[str, AdapterUse]:
    """Adapter name -> its use, for every adapter of the config."""
    return {name: split_use(name, node)[0] for name, node in config.adapters.items()}


def encoder_node(name: str, node: Node) -> Node | None:
    """The image encoder in an adapter's YAML node. Raises: ConfigError if it is no mapping."""
    encoder = node.get("encoder")
    if not isinstance(encoder, dict | None):
        raise ConfigError(f"adapters.{name}.encoder is {encoder!r}, must be a mapping, e.g. {{name: open_clip}}")
    return encoder


def reference_size(name: str, node: Node) -> int | None:
    """Side in pixels of an adapter's image prompts, 0 for their own; None if its hint is a map of the picture to draw.

    Raises: ConfigError as `denoiser`, about the encoder.
    """
    if (encoder := encoder_node(name, node)) is None:
        return None
    if getattr(registry.registered().get(("adapter", str(node.get("name")))), "gives_context", False):
        return 0
    return _encoder_options(encoder).image_size


def least_reference(name: str, node: Node) -> int:
    """Side in pixels of the smallest image prompt that the adapter's encoder reads. Raises: as `reference_size`."""
    return getattr(_encoder_options(encoder_node(name, node) or {}), "patch", 1)


def _encoder_options(encoder: Node) -> Any:
    return registry.options("image", {k: v for k, v in encoder.items() if k not in ("weights", "weights_prefix")})


def _tower(name: str, node: Node) -> ImageTower:
    """An adapter's frozen image encoder with its weights."""
    tower: ImageTower = component("image", node, f"adapters.{name}.encoder")
    frozen(tower)
    return tower


def denoiser(config: RunConfig) -> Denoiser:
    """The UNet with every adapter of the config and its fuser, weights loaded.

    Raises: ConfigError as `component`.
    """
    unet: UNet = component("unet", config.model.unet)
    built: dict[str, Adapter[Any]] = {}
    towers: dict[str, ImageTower] = {}
    for name, node in config.adapters.items():
        use, options = split_use(name, node)
        runtime: dict[str, Any] = {"unet": unet}
        if encoder := encoder_node(name, options):
            key = json.dumps(encoder, sort_keys=True, default=str)
            towers[key] = towers.get(key) or _tower(name, encoder)  # adapters with equal encoders share one
            runtime["tower"] = towers[key]
        adapter: Adapter[Any] = _filled("adapter", options, use.weights, f"adapters.{name}", **runtime)
        check_use(name, use, adapter, unet.spec)
        built[name] = adapter
    fuser: Fuser | None = None
    if config.fuser is not None:
        fuser = component("fuser", config.fuser, "fuser", unet=unet, adapters=built)
    return Denoiser(unet, built, fuser)
