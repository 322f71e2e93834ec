"""Models in and out: `inspect`, `load`, `import_model` and `export` over any published layout."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.convert import detect, files, infer
from ldm.convert.detect import SECTIONS, Contents, Part
from ldm.convert.diffusers_config import config_json
from ldm.convert.infer import Config, UNetConfig
from ldm.convert.keymap import grouped
from ldm.convert.tables_seecoder import swin_buffers
from ldm.models.swin import SwinConfig
from ldm.registry import ConfigError

ADAPTERS = {  # layout of one adapter -> its networks
    **dict.fromkeys(("controlnet_original", "controlnet_standalone", "controlnet_diffusers"), ("controlnet",)),
    **dict.fromkeys(("t2i_original", "t2i_diffusers"), ("t2i_adapter",)),
    "t2i_style": ("t2i_style",),
    "coadapter_fuser": ("fuser",),
    "ip_adapter": ("ip_adapter",),
    "seecoder": ("seecoder", "swin"),
}
PLACED = ("controlnet_original", "seecoder")  # those of them whose names have a prefix
LAYOUTS = ("original", "diffusers", *ADAPTERS)
WHOLE = {"unet", "vae", "text", "text_2"}  # networks of a whole model's file
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


@dataclass(frozen=True, slots=True)
class Model:
    """Networks under our names, and buffers under the names of the layout that they came from.

    Attributes:
        parts: component ("unet", "vae", "text", "text_2", "controlnet") -> config and tensors.
        extras: what the networks do not use; names of a diffusers folder begin with "<folder>/".
    """

    parts: dict[str, tuple[Config, dict[str, Tensor]]]
    extras: dict[str, Tensor]


def read(paths: Sequence[Path], ema: bool = False) -> Model:
    """Every network of files or folders in any layout, strictly.

    Args:
        paths: files, diffusers folders, or folders written by `import_model`.
        ema: take the UNet's averaged weights of a training checkpoint.

    Raises: ConfigError if a file is unreadable, no model, incomplete, of mixed layouts, or not finite.
    """
    parts: dict[str, tuple[Config, dict[str, Tensor]]] = {}
    extras: dict[str, Tensor] = {}
    for name, file in (item for path in paths for item in files.sources(path).items()):
        state = files.read(file)
        if name == files.EXTRAS:
            extras |= state
            continue
        found = _contents(with_ema(state, file) if ema else state, file)
        if found.unknown:
            raise ConfigError(f"{file} has {len(found.unknown)} tensors of no known model: {grouped(found.unknown)}")
        for part in found.parts:
            component = name or part.section.component
            if component in parts:
                raise ConfigError(f"{file} has a second {component}; give one file for each network")
            parts[component] = (part.config, _whole(part, file))
            extras |= _unused(part, component, state)
        extras |= {key: state[key] for key in found.kept}
    return Model(parts, extras)


def _unused(part: Part, component: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Buffers and heads that the network does not use, less what only training needed."""
    places = {"original": "", "diffusers": next((f"{f}/" for f, c in files.FOLDERS.items() if c == component), "")}
    if part.section.layout not in places:
        return {}
    kept = (key for key in part.unused if not re.search(r"(^|\.)(loss|model_ema|visual)\.", key))
    return {places[part.section.layout] + key: state[key] for key in kept}


def load(path: Path, component: str) -> dict[str, Tensor]:
    """One network of a file or folder in any layout, under our names; the tensors are mapped from the file.

    Args:
        path: file or folder.
        component: unet | vae | text | text_2 | controlnet.

    Raises: ConfigError as `read`, or if the file has no such network.
    """
    return _whole(*find(path, component))


def find(path: Path, component: str) -> tuple[Part, Path]:
    """One network as it is, perhaps incomplete, and its file. Arguments and errors as `load`."""
    all_files = files.sources(path)
    file = all_files.get(component) or all_files.get("")
    if file is None:
        raise ConfigError(f"{path} has {', '.join(all_files)}, no {component}; name a file or folder that has one")
    state = files.read(file)
    with _about(file):
        found = {section.component: section for section in reversed(detect.sections(state))}
        if component not in found:
            there = ", ".join(reversed(found))
            raise ConfigError(f"holds {there}, no {component}; name a file or folder that has one")
        return detect.part(state, found[component]), file


def _contents(state: Mapping[str, Tensor], file: Path) -> Contents:
    with _about(file):
        return detect.contents(state)


@contextlib.contextmanager
def _about(file: Path) -> Generator[None]:
    """Say which file an error is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _whole(part: Part, file: Path) -> dict[str, Tensor]:
    if part.problems:
        problems = "; ".join(part.problems)
        raise ConfigError(f"{file}: {part.section.component} does not fit ({problems}); {part.remedy}")
    check_finite(part.tensors, part.section.component, file)
    return part.tensors


def check_finite(tensors: Mapping[str, Tensor], what: str, file: Path) -> None:
    """Refuse weights that would turn every picture black. Raises: ConfigError with the tensors."""
    if bad := not_finite(tensors):
        raise ConfigError(
            f"{file}: {what} has NaN or infinite values in {len(bad)} tensors ({grouped(bad)}); "
            "download it again or use a file of another precision"
        )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with a NaN or an infinite value. Both reach the extremes: one pass, no mask in memory."""
    floats = (
        (k, v.half() if v.itemsize == 1 else v) for k, v in tensors.items() if v.is_floating_point() and v.numel()
    )
    return [k for k, v in floats if not all(bool(torch.isfinite(x)) for x in torch.aminmax(v))]


def with_ema(state: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The state dict with the UNet's averaged weights, whose names have no dots. Raises: ConfigError if it has none."""
    averaged = {k: "model_ema." + k[len("model.") :].replace(".", "") for k in state if k.startswith("model.diffusion")}
    missing = [key for key, name in averaged.items() if name not in state]
    if missing or not averaged:
        raise ConfigError(f"{file} lacks the averaged weights (model_ema.*) of {len(missing)} tensors; drop --ema")
    return {k: state[averaged.get(k, k)] for k in state}


def inspect(path: Path) -> Iterator[str]:
    """What a file or folder holds, in lines: layout, architecture, size, dtype, what is missing.

    Raises: ConfigError if it cannot be read or holds no known model; behind the last line, as loading raises it, if a
        network is not whole.
    """
    broken: list[ConfigError] = []
    for file in files.sources(path).values():
        state = files.read(file)
        size = sum(v.numel() * v.element_size() for v in state.values())
        yield f"{file}: {len(state)} tensors, {size / 1e6:.1f} MB"
        if what := detect.foreign(state):
            yield f"  layout: {what}"
        elif file.stem == files.EXTRAS:
            yield "  buffers that no network uses"
        else:
            found = _contents(state, file)
            bad = [not_finite(part.tensors) for part in found.parts]
            yield from _described(found, bad)
            for part in found.parts:
                try:
                    _whole(part, file)
                except ConfigError as error:
                    broken.append(error)
    if broken:
        raise broken[0]


def _described(found: Contents, infinite: Sequence[Sequence[str]]) -> list[str]:
    """Lines about networks; `infinite`: of each, the tensors that are not finite."""
    layouts = sorted({part.section.layout for part in found.parts})
    lines = [f"  layout: {', '.join(layouts)}"]
    for part, bad in zip(found.parts, infinite, strict=True):
        kinds = ", ".join(sorted({SHORT.get(v.dtype, str(v.dtype)) for v in part.tensors.values()}))
        count = sum(v.numel() for v in part.tensors.values())
        name = detect.architecture(part.config)
        lines.append(f"  {part.section.component}: {name}, {len(part.tensors)} tensors, {count:,} parameters, {kinds}")
        problems = [*part.problems, *([f"NaN or infinite values in {grouped(bad)}"] if bad else [])]
        lines += [f"    {said}" for said in (*problems, part.remedy) if said] or ["    complete"]
    there = {part.section.component for part in found.parts}
    if "original" in layouts and there & WHOLE:
        if any(part.section.prefix.startswith("conditioner.embedders.0.") for part in found.parts):
            there.add("text")  # the refiner's first tower is the one that others have second
        absent = WHOLE - {"text_2"} - there
        lines += [f"  not in this file: {', '.join(sorted(absent))}"] if absent else []
    lines += [f"  buffers: {grouped(found.kept)}"] if found.kept else []
    lines += [f"  averaged weights (--ema): {len(found.dropped)} tensors"] if found.dropped else []
    lines += [f"  unknown: {grouped(found.unknown)}"] if found.unknown else []
    return lines


def import_model(path: Path, out: Path, ema: bool = False) -> list[Path]:
    """Write every network of a file or folder as `out/<component>.safetensors`, dtypes and values unchanged.

    What the networks do not use goes to `out/extras.safetensors`, so that `export` gives back the same tensors.

    Returns: the files written.
    Raises: ConfigError as `read`; nothing is written then.
    """
    model = read([path], ema)
    _refuse_existing([out / f"{name}.safetensors" for name in (*model.parts, files.EXTRAS)])
    if not model.parts:
        raise ConfigError(f"{path} holds no network; give a model file or a diffusers folder")
    written: list[Path] = []
    for component, (config, tensors) in model.parts.items():
        header = {"component": component, "config": json.dumps(dataclasses.asdict(config)), "source": path.name}
        written.append(out / f"{component}.safetensors")
        files.write(written[-1], tensors, header)
    if model.extras:
        written.append(out / f"{files.EXTRAS}.safetensors")
        files.write(written[-1], model.extras, {"component": files.EXTRAS})
    return written


def export(paths: Sequence[Path], layout: str, out: Path) -> list[Path]:
    """Write models in a published layout.

    Args:
        paths: files or folders in any layout, ours among them.
        layout: one of LAYOUTS; "diffusers" writes a folder of networks, each with its config.json, the others one file.
        out: file, or folder for "diffusers".

    Returns: the files written.
    Raises: ConfigError as `read`, or if the layout has no place for what was given.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}, must be one of {', '.join(LAYOUTS)}")
    if layout != "diffusers" and out.suffix != ".safetensors":
        raise ConfigError(f"--out is {out}, must end in .safetensors for layout {layout}")
    folders = [out / folder for folder in files.FOLDERS] if layout == "diffusers" else []
    _refuse_existing([*folders, *([] if folders else [out])])
    model = read(paths)
    if layout not in ADAPTERS and (odd := sorted({*files.ALONE} & model.parts.keys())):
        allowed = ", ".join(name for name, parts in ADAPTERS.items() if odd[0] in parts) or "no layout"
        raise ConfigError(f"layout {layout} has no place for a {odd[0]}; use {allowed}")
    if layout == "diffusers":
        return _export_folder(model, out)
    wanted = set(ADAPTERS.get(layout, model.parts))
    if not wanted or wanted - model.parts.keys():
        need = " and ".join(ADAPTERS.get(layout, ("network",)))
        raise ConfigError(f"layout {layout} needs {need}; given: {', '.join(model.parts) or 'no network'}")
    tensors: dict[str, Tensor] = {}
    for component in sorted(wanted):
        tensors |= _published(model, component, layout)
    if layout == "original":
        tensors |= {key: value for key, value in model.extras.items() if "/" not in key}
    files.write(out, tensors, {})
    return [out]


def _refuse_existing(paths: Iterable[Path]) -> None:
    """Raise ConfigError where a file stands already."""
    if there := next((path for path in paths if path.exists()), None):
        raise ConfigError(f"{there} exists already, and nothing is overwritten; give --out a new name")


def _published(model: Model, component: str, layout: str) -> dict[str, Tensor]:
    config, tensors = model.parts[component]
    if layout in ADAPTERS and layout not in PLACED:
        naming, prefix = "diffusers" if layout.endswith("diffusers") else "original", ""
    else:
        section = _place(model, component)
        naming, prefix = section.naming, section.prefix
    theirs = infer.keymap(config, naming).to_theirs(tensors)
    theirs |= swin_buffers(config) if isinstance(config, SwinConfig) else {}
    return {prefix + k: v for k, v in theirs.items()}


def _place(model: Model, component: str) -> detect.Section:
    """Where a single file has a component: text towers moved with every generation."""
    candidates = [section for section in SECTIONS if section.component == component]
    if component == "text":
        sd1, sd2, sdxl = candidates
        return {"sd1": sd1, "sd2": sd2, "sdxl": sdxl}[_generation(model)]
    if component == "text_2":
        return candidates[0] if "text" in model.parts or "unet" not in model.parts else candidates[1]
    return candidates[0]


def _generation(model: Model) -> str:
    unet = model.parts.get("unet", (None, {}))[0]
    if "text_2" in model.parts or (isinstance(unet, UNetConfig) and unet.vector_dim):
        return "sdxl"
    if isinstance(unet, UNetConfig):
        return "sd2" if unet.linear_proj else "sd1"
    text = model.parts["text"][0]
    return "sd2" if isinstance(text, infer.TextConfig) and text.activation == "gelu" else "sd1"


def _export_folder(model: Model, out: Path) -> list[Path]:
    written: list[Path] = []
    for folder, component in files.FOLDERS.items():
        if component in model.parts:
            config, tensors = model.parts[component]
            text = component in ("text", "text_2")
            theirs = infer.keymap(config, "transformers" if text else "diffusers").to_theirs(tensors)
            mark = folder + "/"
            theirs |= {k[len(mark) :]: v for k, v in model.extras.items() if k.startswith(mark)}
            name = "model.safetensors" if text else "diffusion_pytorch_model.safetensors"
            written.append(out / folder / name)
            files.write(written[-1], theirs, {})
            words = config_json(config, sdxl="unet" in model.parts and _generation(model) == "sdxl")
            (out / folder / "config.json").write_text(json.dumps(words, indent=1), encoding="utf-8")
    return written
