"""Arms of a comparison: the same prompts and seeds drawn with different adapters, and what is measured of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from ldm import build, registry
from ldm.config import RunConfig
from ldm.denoiser import AdapterUse, Denoiser, check_use
from ldm.evaluation.measures import ClipI, Measure, by_hint
from ldm.registry import ConfigError, suggest

BASE: Final = "base"
CEILING, CHANCE = "ground_truth", "chance"
ALL: Final = "all"
KINDS: Final = {True: "image prompts", False: "maps of the picture to draw"}


@dataclass(frozen=True)
class Plan:
    """What to draw and measure.

    Attributes:
        arms: name -> adapter -> its use; "base", without adapters, comes first where there is a text encoder.
        measures: adapter -> name -> measure, of that adapter's hint.
    """

    arms: Mapping[str, Mapping[str, AdapterUse]]
    measures: Mapping[str, Mapping[str, Measure]]


def plan(config: RunConfig, denoiser: Denoiser) -> Plan | None:
    """Read `evaluation:` for the adapters of a config.

    Arms, unless given: base, each adapter alone under its own name, and all of them together ("all"). Measures, unless
    given: as `by_hint` says. Without a text encoder there is no base: arms have an adapter that stands for the text.

    Returns: None if no adapter has a measure.
    Raises: ConfigError on names that do not exist, and whatever would fail only after drawing.
    """
    uses, given = build.uses(config), config.evaluation
    _check_uses(uses, config)
    if unknown := sorted(given.measures.keys() - uses.keys()):
        raise ConfigError(f"evaluation.measures has {unknown[0]!r}, which is no adapter; {_known(unknown[0], uses)}")
    arms = given.arms or _usual(uses)
    drawn = {BASE: {}} | {name: _arm(name, node, uses, denoiser) for name, node in arms.items()}
    if config.model.text is None:
        drawn = _with_context(drawn, denoiser, told=bool(given.arms))
    measures = {name: measures_of(name, use, config, denoiser) for name, use in uses.items()}
    return Plan(drawn, measures) if any(measures.values()) else None


def _check_uses(uses: Mapping[str, AdapterUse], config: RunConfig) -> None:
    """Refuse what sampling reads and evaluation does not: a mask, and an extractor other than the data's own."""
    for name, use in uses.items():
        if use.mask is not None:
            raise ConfigError(f"adapters.{name}.mask is {use.mask}, but held-out items have no masks; drop the key")
        given = _data_hint(use.hint or name, config)
        if use.extractor is not None and _node(use.extractor) != _node(given):
            raise ConfigError(
                f"adapters.{name}.extractor is {use.extractor}, but hints come from validation.data, whose hints."
                f"{use.hint or name} is {given}; drop the key, or set both alike"
            )


def _usual(uses: Mapping[str, AdapterUse]) -> dict[str, list[str]]:
    """Each adapter alone and, of several, all together."""
    together = {ALL: list(uses)} if len(uses) > 1 else {}
    if taken := [name for name in uses if name in (BASE, CEILING, CHANCE, *together)]:
        raise ConfigError(
            f"adapters has the name {taken[0]!r}, which is that of another arm or row; rename it, or set "
            f"evaluation.arms, e.g. to {{only_{taken[0]}: [{taken[0]}]}}"
        )
    return {name: [name] for name in uses} | together


def _with_context(
    arms: Mapping[str, Mapping[str, AdapterUse]], denoiser: Denoiser, told: bool
) -> dict[str, Mapping[str, AdapterUse]]:
    """The arms that have something in place of the text. Raises: ConfigError on another that the config asks for."""
    able = {
        arm: uses
        for arm, uses in arms.items()
        if any(denoiser.adapter(name).gives_context and use.scale for name, use in uses.items())
    }
    if told and (unable := [arm for arm in arms if arm not in able and arm != BASE]):
        givers = ", ".join(name for name in denoiser.adapters if denoiser.adapter(name).gives_context)
        raise ConfigError(
            f"evaluation.arms.{unable[0]} has no context: model.text is null, and {givers} stands for it; add that"
        )
    return able


def _arm(name: str, node: Any, uses: Mapping[str, AdapterUse], denoiser: Denoiser) -> dict[str, AdapterUse]:
    """Adapter -> its use in this arm: a list leaves the scales as they are, a mapping sets them."""
    where = f"evaluation.arms.{name}"
    if name in (CEILING, CHANCE) or (name == BASE and node):
        raise ConfigError(f"{where} is a taken name: base has no adapters, {CEILING} and {CHANCE} no arm; rename it")
    if not isinstance(node, Mapping | list | tuple):
        raise ConfigError(f"{where} is {node!r}, must be a list of adapters, or a mapping of adapters to scales")
    scales = cast("Mapping[str, Any] | Sequence[str]", node)
    if unknown := sorted(str(adapter) for adapter in scales if adapter not in uses):
        raise ConfigError(f"{where} has {unknown[0]!r}, which is no adapter; {_known(unknown[0], uses)}")
    if not isinstance(scales, Mapping):
        return {adapter: uses[adapter] for adapter in scales}
    return {
        adapter: _scaled(f"{where}.{adapter}", adapter, uses[adapter], scale, denoiser)
        for adapter, scale in scales.items()
    }


def _scaled(where: str, adapter: str, use: AdapterUse, scale: Any, denoiser: Denoiser) -> AdapterUse:
    if not registry.fits(scale, float):
        raise ConfigError(f"{where} is {scale!r}, must be a finite number, the adapter's scale")
    try:
        scaled = dataclasses.replace(use, scale=scale)
        check_use(adapter, scaled, denoiser.adapter(adapter), denoiser.unet.spec)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    return scaled


def measures_of(adapter: str, use: AdapterUse, config: RunConfig, denoiser: Denoiser) -> dict[str, Measure]:
    """The measures of one adapter's hint, by name.

    Raises: ConfigError if the config names none and the hint has none, or a measure cannot be.
    """
    wanted, where = config.evaluation.measures.get(adapter), f"evaluation.measures.{adapter}"
    prompted = denoiser.adapter(adapter).image_prompt
    if wanted is None and prompted:
        raise ConfigError(
            f"adapter {adapter!r} takes image prompts, measured by clip_i with a model that no adapter reads: set "
            f"{where}, e.g. to {{name: clip_i, encoder: {{...}}}}, or to [] for none"
        )
    if wanted is None:
        wanted = by_hint(adapter, hint_words(adapter, use, config))
    found: dict[str, Measure] = {}
    for item in wanted if isinstance(wanted, list | tuple) else [wanted]:
        node = _node(item)
        measure: Measure = registry.build("measure", node)
        name = str(node["name"])
        if name in found:
            raise ConfigError(f"{where} has {name} twice, but figures go by name; keep one")
        if measure.image_prompt != prompted:
            reads, brings = (KINDS[kind] for kind in (measure.image_prompt, prompted))
            raise ConfigError(f"{where} is {name}, which reads {reads}; the adapter takes {brings}: name another")
        if isinstance(measure, ClipI):
            _check_independent(where, measure, config)
        found[name] = measure
    return found


def _check_independent(where: str, measure: ClipI, config: RunConfig) -> None:
    """Refuse a tower that one of the adapters reads too, however its file is spelled."""
    judge = _tower(measure.node, f"{where}.encoder")
    for name, node in config.adapters.items():
        encoder = build.encoder_node(name, node)
        if encoder is not None and _tower(encoder, f"adapters.{name}.encoder") == judge:
            raise ConfigError(
                f"{where}: clip_i.encoder is {measure.node['weights']}, which adapter {name!r} reads too; "
                "must be another model: name its weights"
            )


def _tower(node: Mapping[str, Any], slot: str) -> tuple[Path | None, str]:
    """What tells one image encoder from another: its weight file, and which part of it."""
    file = build.weights_file("image", dict(node), slot)
    return file.resolve() if file else None, node.get("weights_prefix", "")


def hint_words(adapter: str, use: AdapterUse, config: RunConfig) -> list[str]:
    """What an adapter's hint is called: by the data's extractor, by name."""
    hint = use.hint or adapter
    named = _node(_data_hint(hint, config)).get("name")
    return [*dict.fromkeys(str(word) for word in (named, hint) if word is not None)]


def _data_hint(hint: str, config: RunConfig) -> Any:
    """What the held-out data says of a hint; None where that has no options."""
    hints = (config.validation.data or {}).get("hints")
    return cast("Mapping[str, Any]", hints).get(hint) if isinstance(hints, Mapping) else None


def _node(value: Any) -> dict[str, Any]:
    """A registered name with its options, whether it was written with any or alone."""
    return dict(cast("Mapping[str, Any]", value)) if isinstance(value, Mapping) else {"name": value}


def _known(word: str, uses: Mapping[str, AdapterUse]) -> str:
    return f"adapters: {', '.join(uses) or 'none'}{suggest(word, uses)}"
