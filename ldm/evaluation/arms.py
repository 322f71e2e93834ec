"""Arms of a comparison: the same prompts and seeds drawn with different adapters, and what is measured of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from ldm import build, registry
from ldm.config import RunConfig
from ldm.denoiser import AdapterUse, Denoiser, check_use
from ldm.evaluation import likeness, maps  # noqa: F401  registers their measures
from ldm.evaluation.measures import Measure, Model, by_hint
from ldm.evaluation.sets import SetMeasure, set_measure
from ldm.registry import ConfigError, suggest
from ldm.sampling.output import file_digest

BASE: Final = "base"
CEILING, CHANCE = "ground_truth", "chance"
ALL: Final = "all"
PICTURES: Final = ""
KINDS: Final = {True: "image prompts", False: "maps of the picture to draw"}


@dataclass(frozen=True)
class Plan:
    """What to draw and measure.

    Attributes:
        arms: name -> adapter -> its use; "base", without adapters, comes first where there is a text encoder.
        measures: adapter -> name -> measure, of that adapter's hint.
        pictures: name -> measure, of the pictures themselves.
        sets: name -> set metrics, of all pictures of an arm together.
        paired: every picture has a real one, its own; else there is neither ceiling nor chance.
    """

    arms: Mapping[str, Mapping[str, AdapterUse]]
    measures: Mapping[str, Mapping[str, Measure]]
    pictures: Mapping[str, Measure] = field(default_factory=dict[str, Measure])
    sets: Mapping[str, SetMeasure] = field(default_factory=dict[str, SetMeasure])
    paired: bool = True

    @property
    def columns(self) -> dict[tuple[str, str], Measure]:
        """(adapter, name) -> measure; those of the pictures themselves have "" for the adapter."""
        named = {(adapter, name): m for adapter, found in self.measures.items() for name, m in found.items()}
        return named | {(PICTURES, name): m for name, m in self.pictures.items()}


def plan(config: RunConfig, denoiser: Denoiser) -> Plan | None:
    """Read `evaluation:` for the adapters of a config.

    Arms, unless given: base, each adapter alone under its own name, and all of them together ("all"). Measures, unless
    given: as `by_hint` says. Without a text encoder there is no base: arms have an adapter that stands for the text.

    Returns: None if nothing has a measure.
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
    return _planned(drawn, measures, config)


def plan_without(arm: str, config: RunConfig, *, paired: bool = True) -> Plan | None:
    """As `plan`, of one arm that has nothing to do with adapters. Raises: ConfigError on keys that speak of them."""
    if given := next((key for key in ("measures", "arms") if getattr(config.evaluation, key)), None):
        raise ConfigError(
            f"evaluation.{given} is set, but there are no adapters here; use evaluation.pictures and sets"
        )
    return _planned({arm: {}}, {}, config, paired)


def _planned(
    arms: Mapping[str, Mapping[str, AdapterUse]],
    measures: Mapping[str, Mapping[str, Measure]],
    config: RunConfig,
    paired: bool = True,
) -> Plan | None:
    """With what is measured of the pictures themselves; None if nothing is measured."""
    where = "evaluation.pictures"
    pictures = _built(config.evaluation.pictures, where)
    for name, measure in pictures.items():
        check_independent(f"{where}: {name}", measure.models, config)
    sets = {name: set_measure(name, node) for name, node in config.evaluation.sets.items()}
    for measure in sets.values():
        check_independent(f"{measure.where}.features", measure.features.models, config)
    if not (any(measures.values()) or pictures or sets):
        return None
    return Plan(arms, measures, pictures, sets, paired)


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
    found = _built(wanted, where)
    for name, measure in found.items():
        if measure.reads != "hint":
            raise ConfigError(f"{where} is {name}, which reads the {measure.reads}: set evaluation.pictures")
        if measure.image_prompt != prompted:
            reads, brings = (KINDS[kind] for kind in (measure.image_prompt, prompted))
            raise ConfigError(f"{where} is {name}, which reads {reads}; the adapter takes {brings}: name another")
        check_independent(f"{where}: {name}", measure.models, config)
    return found


def _built(given: Any, where: str) -> dict[str, Measure]:
    """Name -> measure, of one node or a list of them."""
    found: dict[str, Measure] = {}
    for item in given if isinstance(given, list | tuple) else [] if given is None else [given]:
        node = _node(item)
        measure: Measure = registry.build("measure", node)
        name = str(node["name"])
        if name in found:
            raise ConfigError(f"{where} has {name} twice, but figures go by name; keep one")
        found[name] = measure
    return found


def check_independent(where: str, models: Sequence[Model], config: RunConfig) -> None:
    """Refuse an image tower that one of the adapters reads too, however its file is spelled, or copied."""
    for kind, node, key in models:
        if kind == "image":
            judge = _tower(node, f"{where}.{key}")
            for name, adapter in config.adapters.items():
                encoder = build.encoder_node(name, adapter)
                if encoder is not None and _same(_tower(encoder, f"adapters.{name}.encoder"), judge):
                    raise ConfigError(
                        f"{where}.{key} is {node['weights']}, which adapter {name!r} reads too; "
                        "must be another model: name its weights"
                    )


def shared_text(plan: Plan, config: RunConfig) -> list[str]:
    """A mark for each measure whose text tower is that which the drawing model reads: it judges itself."""
    text, marks = config.model.text, list[str]()
    if text is None or (own := _tower(text, "model.text", "text"))[0] is None:
        return marks
    for name, measure in plan.pictures.items():
        for kind, node, key in measure.models:
            judge = _tower(node, key, kind)
            judge = (judge[0], "text.") if kind == "clip" else judge
            if kind in ("clip", "text") and _same(own, judge):
                marks.append(f"{name} judges by the text encoder that the model draws with ({node['weights']})")
    return marks


def _tower(node: Mapping[str, Any], slot: str, kind: str = "image") -> tuple[Path | None, str]:
    """What tells one encoder from another: its weight file, and which part of it."""
    file = build.weights_file(kind, dict(node), slot)
    return file.resolve() if file else None, node.get("weights_prefix", "")


def _same(a: tuple[Path | None, str], b: tuple[Path | None, str]) -> bool:
    """Whether they are one model: the same part of one file, or of files with the same content."""
    if a[1] != b[1] or a[0] is None or b[0] is None:
        return a == b
    if a[0] == b[0]:
        return True
    if not (a[0].is_file() and b[0].is_file()) or a[0].stat().st_size != b[0].stat().st_size:
        return False
    return file_digest(a[0]) == file_digest(b[0])


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
