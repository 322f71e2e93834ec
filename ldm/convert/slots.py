"""Weights for one slot of a config, from whatever its `weights:` names: our files, published files and folders.

A whole model may be named in several slots; of it, only the tensors of the slot's own networks are read.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.convert import detect, files, model
from ldm.models.text import TextEncoder
from ldm.registry import ConfigError

log = logging.getLogger(__name__)
PARTS: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("unet", "unet"): {"": "unet"},
    ("vae", "kl"): {"": "vae"},
    ("text", "clip"): {"": "text"},
    ("text", "sdxl"): {"clip.": "text", "open_clip.": "text_2"},
    ("adapter", "controlnet"): {"": "controlnet"},
    ("adapter", "t2i_adapter"): {"": "t2i_adapter"},
    ("adapter", "ip_adapter"): {"": "ip_adapter"},
    ("adapter", "t2i_style"): {"": "t2i_style"},
    ("adapter", "seecoder"): {"": "seecoder"},
    ("fuser", "coadapter"): {"": "fuser"},
    ("image", "open_clip"): {"": "image"},
    ("image", "swin"): {"": "swin"},
}  # kind and name of a node -> prefix of the module's tensors -> the network of published files that they are


def parts(kind: str, node: Mapping[str, Any]) -> Mapping[str, str]:
    """The networks of published files that fill a node; none for a class that was never published.

    A part whose key is null in the node is left out (`clip: null` of the SDXL refiner).
    """
    table = PARTS.get((kind, str(node.get("name"))), {})
    return {mark: part for mark, part in table.items() if node.get(mark.rstrip("."), {}) is not None}


def locate(folder: Path, parts: Mapping[str, str]) -> Path:
    """What to read of a folder of models: the file of the only network, or the folder if several are needed.

    Raises: ConfigError if the folder has no models, or lacks one of these.
    """
    found = files.sources(folder)
    if lacking := [name for name in parts.values() if name not in found and "" not in found]:
        raise ConfigError(
            f"weights {folder} have {', '.join(found)}, no {', '.join(lacking)}; name a file or folder that has it"
        )
    if len(parts) > 1 and "" not in found:
        return folder
    return found.get("") or found[next(iter(parts.values()))]


def state(path: Path, module: nn.Module, prefix: str, parts: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a file for a module, under its names, mapped from the file.

    Args:
        path: file in any layout, or a folder of models.
        module: what they are for.
        prefix: only names that start with it are taken, without it; the file is then one of ours.
        parts: as `parts` gives.

    Raises: ConfigError if the file cannot be read, holds something else, only a part of it, or values not finite.
    """
    own = module.state_dict().keys()
    if not path.is_dir():
        tensors = files.read(path)
        bare = {f"net.{k}": v for k, v in tensors.items() if k != "mask_token"}  # as timm publishes a network
        if not prefix and not parts and bare.keys() == own:
            tensors = bare
        if prefix or not parts or tensors.keys() == own:
            picked = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            if not picked:
                raise ConfigError(f"weights {path} have no tensor that begins with {prefix!r}; correct weights_prefix")
            model.check_finite(picked, "it", path)
            return picked
    out = {mark + k: v for mark, part in parts.items() for k, v in model.load(path, part).items()}
    return out | _unused_block(module, out)


def found(path: Path, parts: Mapping[str, str]) -> str:
    """The architectures that a file has for a slot, in words; empty where they cannot be told."""
    try:
        return " and ".join(detect.architecture(model.find(path, part)[0].config) for part in parts.values())
    except ConfigError:
        return ""


def wanted(module: nn.Module, parts: Mapping[str, str]) -> str:
    """The architectures that a module's own tensors have for a slot, in words; empty where they cannot be told."""
    own = module.state_dict()
    try:
        each = {part: {k[len(mark) :]: v for k, v in own.items() if k.startswith(mark)} for mark, part in parts.items()}
        return " and ".join(detect.architecture(detect.READERS[part](x, "ours")[0]) for part, x in each.items())
    except ConfigError:
        return ""


def _unused_block(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for the last block of a tower whose output is taken before it: diffusers' SD2 files leave it out."""
    if not isinstance(module, TextEncoder) or module.config.layer != "penultimate":
        return {}
    mark = f"transformer.resblocks.{module.config.layers - 1}."
    block = {k: torch.zeros_like(v) for k, v in module.state_dict().items() if k.startswith(mark)}
    if block.keys() & tensors.keys():
        return {}
    log.info("text encoder: the file has no last block; text.layer: penultimate never runs it, zeros stand there")
    return block
