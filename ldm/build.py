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
    if node.get("weights") and not any(p.is_meta for p in module.parameters()):
        checkpoint.load_weights(module, Path(node["weights"]), node.get("weights_prefix", ""), (kind, "model"))
    return module


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
    node = config.model.schedule
    known = [f.name for f in dataclasses.fields(ScheduleConfig)]
    if unknown := sorted(node.keys() - set(known)):
        hint = registry.suggest(unknown[0], known)
        raise ConfigError(f"model.schedule has {unknown}; options: {', '.join(known)}{hint}")
    result = Schedule(ScheduleConfig(**node))
    result.check_objective(config.model.objective)
    return result


def split_use(name: str, node: Node) -> tuple[AdapterUse, Node]:
    """An adapter's YAML node -> how it is used, and what it is built from."""
    fields = {f.name for f in dataclasses.fields(AdapterUse)}
    use: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in node.items() if k in fields}
    try:
        return AdapterUse(**use), {k: v for k, v in node.items() if k not in fields}
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"adapters.{name}: {error}") from error


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
