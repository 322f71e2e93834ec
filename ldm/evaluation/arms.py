"""Arms of a comparison: the same prompts and seeds drawn with different adapters, and what is measured of them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from ldm import build, registry
from ldm.config import RunConfig
from ldm.denoiser import AdapterUse, Denoiser
from ldm.evaluation.measures import ClipI, Measure, by_hint
from ldm.registry import ConfigError, suggest

BASE: Final = "base"
CEILING, CHANCE = "ground_truth", "chance"
ALL: Final = "all"


@dataclass(frozen=True)
class Plan:
    """What to draw and measure.

    Attributes:
        arms: name -> adapter -> its use; "base", without adapters, comes first.
        measures: adapter -> name -> measure, of that adapter's hint.
    """

    arms: Mapping[str, Mapping[str, AdapterUse]]
    measures: Mapping[str, Mapping[str, Measure]]


def plan(config: RunConfig, denoiser: Denoiser) -> Plan | None:
    """Read `evaluation:` for the adapters of a config.

    Arms, unless given: base, each adapter alone under its own name, and all of them together ("all"). Measures, unless
    given: as `by_hint` says.

    Returns: None if no adapter has a measure.
    Raises: ConfigError on names that do not exist, and whatever would fail only after drawing.
    """
    uses, given = build.uses(config), config.evaluation
    if unknown := sorted(given.measures.keys() - uses.keys()):
        raise ConfigError(f"evaluation.measures has {unknown[0]!r}, which is no adapter; {_known(unknown[0], uses)}")
    alone = {name: [name] for name in uses}
    arms = given.arms or alone | ({ALL: list(uses)} if len(uses) > 1 else {})
    drawn = {BASE: {}} | {name: _arm(name, node, uses, denoiser) for name, node in arms.items()}
    measures = {name: _measures(name, use, config) for name, use in uses.items()}
    return Plan(drawn, measures) if any(measures.values()) else None


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
    for adapter, scale in scales.items():
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ConfigError(f"{where}.{adapter} is {scale!r}, must be a finite number, the adapter's scale")
        if scale not in (0, 1) and not denoiser.adapter(adapter).weighable:
            raise ConfigError(f"{where}.{adapter} is {scale:g}; this adapter speaks through the text: allowed: 0, 1")
    return {adapter: dataclasses.replace(uses[adapter], scale=scale) for adapter, scale in scales.items()}


def _measures(adapter: str, use: AdapterUse, config: RunConfig) -> dict[str, Measure]:
    """The measures of one adapter's hint, by name."""
    wanted = config.evaluation.measures.get(adapter)
    encoder = build.encoder_node(adapter, config.adapters[adapter])
    if wanted is None and encoder is not None:
        raise ConfigError(
            f"adapter {adapter!r} takes image prompts, measured by clip_i with a model that it does not read: set "
            f"evaluation.measures.{adapter}, e.g. to {{name: clip_i, encoder: {{...}}}}, or to [] for none"
        )
    if wanted is None:
        wanted = by_hint(adapter, _words(adapter, use, config))
    found: dict[str, Measure] = {}
    for item in wanted if isinstance(wanted, list | tuple) else [wanted]:
        node = item if isinstance(item, Mapping) else {"name": item}
        measure: Measure = registry.build("measure", cast("Mapping[str, Any]", node))
        if isinstance(measure, ClipI) and encoder is not None and _same(measure.node, encoder):
            raise ConfigError(
                f"evaluation.measures.{adapter}: clip_i.encoder is {encoder['weights']}, which the adapter reads too; "
                "must be another model: name its weights"
            )
        found[str(node["name"])] = measure
    return found


def _words(adapter: str, use: AdapterUse, config: RunConfig) -> list[str]:
    """What an adapter's hint is called: by its extractor, by the data's extractor, by name."""
    hint = use.hint or adapter
    hints = (config.validation.data or {}).get("hints")
    nodes = (use.extractor, hints.get(hint) if isinstance(hints, Mapping) else None)
    named = [node.get("name") if isinstance(node, Mapping) else node for node in nodes]
    return [*dict.fromkeys(str(word) for word in (*named, hint) if word is not None)]


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all(a.get(key) == b.get(key) for key in ("weights", "weights_prefix"))


def _known(word: str, uses: Mapping[str, AdapterUse]) -> str:
    return f"adapters: {', '.join(uses) or 'none'}{suggest(word, uses)}"
