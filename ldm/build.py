"""From a config to objects: models with their weights, stages, data."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

from torch import nn

from ldm import models, registry  # noqa: F401  (importing models registers them)
from ldm.config import Node, RunConfig
from ldm.control import Adapter
from ldm.data.images import ImageData
from ldm.denoiser import AdapterUse, Denoiser
from ldm.models.unet import UNet, UNetDecoder, UNetEncoder
from ldm.registry import ConfigError
from ldm.schedule import Schedule, ScheduleConfig
from ldm.training import checkpoint
from ldm.training.stage import Stage


def component(kind: str, node: Node | None, **runtime: Any) -> Any:
    """Build one model and load its `weights:` (a safetensors file; `weights_prefix:` picks a part of it).

    On the meta device (`with torch.device("meta")`) weights are not read.

    Raises: ConfigError if the slot is empty, the node is wrong, or the weights are missing or of another architecture.
    """
    if node is None:
        raise ConfigError(f"model.{kind} is not set; this run needs it: include one of configs/model/*.yaml")
    options = {k: v for k, v in node.items() if k not in ("weights", "weights_prefix")}
    module: nn.Module = registry.build(kind, options, **runtime)
    file, prefix = weights_file(node, f"model.{kind}"), node.get("weights_prefix", "")
    if not isinstance(prefix, str):
        raise ConfigError(f"model.{kind}.weights_prefix is {prefix!r}, must be text, e.g. 'text.'")
    if file and not any(p.is_meta for p in module.parameters()):
        checkpoint.load_weights(module, file, prefix, (kind, "model"))
    return module


def weights_file(node: Node, slot: str) -> Path | None:
    """Where a node's `weights:` are, None if it has none. Raises: ConfigError if the key holds no path."""
    value = node.get("weights")
    if not isinstance(value, str | Path | None):
        raise ConfigError(f"{slot}.weights is {value!r}, must be the path of a safetensors file or a run folder")
    return Path(value) if value else None


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


def data(node: Node | None, what: str = "data") -> ImageData:
    """Build a data set. Raises: ConfigError if it is not set or cannot be read."""
    if node is None:
        raise ConfigError(f"{what} is not set; include one of configs/data/*.yaml")
    return registry.build("data", node)


def stage(config: RunConfig) -> Stage:
    """Build what `stage:` names, with what its factory asks for by keyword (vae, clip, text, denoiser, schedule)."""
    if config.stage is None:
        known = " | ".join(registry.names("stage"))
        raise ConfigError(f"stage is not set; say what to train: stage: {{name: {known}}}")
    factory = registry.registered().get(("stage", config.stage.get("name", "")))
    makers = {
        "vae": lambda: component("vae", config.model.vae),
        "clip": lambda: component("clip", config.model.clip),
        "text": lambda: component("text", config.model.text),
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


def schedule(config: RunConfig) -> Schedule:
    """The noise schedule. Raises: ConfigError on an unknown key or value."""
    result = Schedule(registry.checked(ScheduleConfig, config.model.schedule, "model.schedule"))
    result.check_objective(config.model.objective)
    return result


def split_use(name: str, node: Node) -> tuple[AdapterUse, Node]:
    """An adapter's YAML node -> how it is used, and what it is built from.

    Raises: ConfigError on a name that no module can have, a node that is no mapping, or a wrong value.
    """
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise ConfigError(
            f"adapters has the name {name!r}, must be letters, digits and _, and no word of PyTorch's modules (keys, "
            "values, train, ...); choose another, e.g. canny"
        )
    if not isinstance(node, dict):  # pyright: ignore[reportUnnecessaryIsInstance]  (YAML may hold anything here)
        raise ConfigError(f"adapters.{name} is {node!r}, must be a mapping of keys, e.g. {{name: controlnet}}")
    fields = {f.name for f in dataclasses.fields(AdapterUse)}
    use = registry.checked(AdapterUse, {k: v for k, v in node.items() if k in fields}, f"adapters.{name}")
    return use, {k: v for k, v in node.items() if k not in fields}


def uses(config: RunConfig) -> dict[str, AdapterUse]:
    """Adapter name -> its use, for every adapter of the config."""
    return {name: split_use(name, node)[0] for name, node in config.adapters.items()}


def denoiser(config: RunConfig) -> Denoiser:
    """The UNet with every adapter of the config, weights loaded.

    Raises: ConfigError as `component`.
    """
    unet: UNet = component("unet", config.model.unet)
    built: dict[str, Adapter[Any]] = {}
    for name, node in config.adapters.items():
        use, options = split_use(name, node)
        adapter: Adapter[Any] = registry.build("adapter", options, unet=unet)
        if use.weights and not any(p.is_meta for p in adapter.parameters()):
            checkpoint.load_weights(adapter, Path(use.weights), stems=(f"adapter.{name}", "adapter"))
        built[name] = adapter
    return Denoiser(unet, built)
