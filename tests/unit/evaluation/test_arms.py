"""Reading `evaluation:`, and the protocol on drawings whose scores are known."""

import functools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import adapters  # noqa: F401  registers them
import ldm.training.run  # noqa: F401  registers the stages
from ldm import build, config
from ldm.data.images import Batch
from ldm.denoiser import AdapterUse
from ldm.evaluation.arms import Plan, plan, shared_text
from ldm.evaluation.intervals import bootstrap
from ldm.evaluation.measures import EdgeF1, Measure, Palette
from ldm.evaluation.obedience import obedience
from ldm.registry import ConfigError
from ldm.training import estimate

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
EDGE = "adapters={edge: {name: controlnet}}"
TWO = "adapters={sketch: {name: t2i_adapter, hint: edge, scale: 0.7}, tint: {name: t2i_adapter, hint: palette}}"
SECOND = "evaluation.measures={prompt: {name: clip_i, encoder: {name: vit, weights: v}}, second: []}"
SIMPLE = "adapters={prompt: {name: ip_adapter_simple, encoder: {name: vit, image_size: 32, weights: w}}}"


def planned(*overrides: str, file: Path = CONFIGS / "train" / "tiny" / "ldm.yaml") -> Plan | None:
    cfg = config.load(file, overrides)
    with torch.device("meta"):
        return plan(cfg, build.denoiser(cfg))


def scales(arms: Mapping[str, Mapping[str, AdapterUse]]) -> dict[str, dict[str, float]]:
    return {arm: {name: use.scale for name, use in uses.items()} for arm, uses in arms.items()}


def test_arms_are_base_each_adapter_alone_and_all_together() -> None:
    got = planned(TWO)
    assert got is not None
    expected = {"base": {}, "sketch": {"sketch": 0.7}, "tint": {"tint": 1}, "all": {"sketch": 0.7, "tint": 1}}
    assert scales(got.arms) == expected
    assert next(iter(got.arms)) == "base"
    assert {name: list(measures) for name, measures in got.measures.items()} == {
        "sketch": ["edge_f1"],
        "tint": ["palette", "palette_lab"],
    }


def test_one_adapter_alone_is_all() -> None:
    got = planned(EDGE)
    assert got is not None
    assert scales(got.arms) == {"base": {}, "edge": {"edge": 1}}


def test_without_a_text_every_arm_has_what_stands_for_it() -> None:
    textless = CONFIGS / "train" / "tiny" / "seecoder.yaml"
    both = [EDGE, "data.hints=[edge]"]
    got = planned(*both, file=textless)
    assert got is not None
    assert scales(got.arms) == {"see": {"see": 1}, "all": {"see": 1, "edge": 1}}
    got = planned(*both, "evaluation.arms={a: [see], b: {see: 1, edge: 0.5}}", file=textless)
    assert got is not None
    assert scales(got.arms) == {"a": {"see": 1}, "b": {"see": 1, "edge": 0.5}}
    for arms in ("{a: [see], b: [edge]}", "{b: {see: 0, edge: 1}}"):
        with pytest.raises(ConfigError, match=r"arms.b has no context: model.text is null, and see stands for it"):
            planned(*both, f"evaluation.arms={arms}", file=textless)


def test_a_list_keeps_scales_and_a_mapping_sets_them() -> None:
    got = planned(TWO, "evaluation.arms={a: [sketch], b: {sketch: 0.5, tint: 0}, base: []}")
    assert got is not None
    assert scales(got.arms) == {"base": {}, "a": {"sketch": 0.7}, "b": {"sketch": 0.5, "tint": 0}}


def test_measures_are_named_with_or_without_options() -> None:
    got = planned(TWO, "evaluation.measures={sketch: [], tint: [edge_f1, {name: palette, cells: 4}]}")
    assert got is not None
    assert {name: list(measures) for name, measures in got.measures.items()} == {
        "sketch": [],
        "tint": ["edge_f1", "palette"],
    }
    assert planned(EDGE, "evaluation.measures.edge=[]") is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.measures.egde=edge_f1"], r"'egde', which is no adapter; .* did you mean 'edge'"),
        (["evaluation.measures.edge=edge_f2"], r"registered: clip_i, .*edge_f1.* did you mean 'edge_f1'"),
        (["evaluation.arms.x=[egde]"], r"arms.x has 'egde', which is no adapter"),
        (["evaluation.arms.x=edge"], r"arms.x is 'edge', must be a list"),
        (["evaluation.arms.x.edge=.nan"], r"arms.x.edge: scale is nan; must be a finite number"),
        (["evaluation.arms.x.edge=true"], r"arms.x.edge is True, must be a finite number"),
        (["adapters.edge.mask=m.png"], r"adapters.edge.mask is m.png, but held-out items have no masks"),
        (["adapters.edge.extractor=canny"], r"adapters.edge.extractor is canny, .*hints.edge is None; drop the key"),
        (["evaluation.measures.edge=[edge_f1, {name: edge_f1}]"], r"measures.edge has edge_f1 twice"),
        (
            [SIMPLE, "evaluation.measures.prompt=edge_f1"],
            r"measures.prompt is edge_f1, which reads maps .* image prompts",
        ),
        (
            ["evaluation.measures.edge={name: clip_i, encoder: {name: vit, weights: v}}"],
            r"edge is clip_i, .* takes maps",
        ),
        (["adapters={all: {name: controlnet, hint: edge}}"], r"has the name 'all', which is that of another arm"),
        (["adapters={base: {name: controlnet, hint: edge}}"], r"has the name 'base', .* evaluation.arms"),
        (["evaluation.arms.chance=[edge]"], r"arms.chance is a taken name"),
        (["evaluation.arms.base=[edge]"], r"arms.base is a taken name"),
        (["adapters={d: {name: controlnet, hint: depth}}"], r"'d' has hint depth, without a known measure"),
        ([SIMPLE], r"'prompt' takes image prompts, measured by clip_i with a model that no adapter reads"),
        (
            [SIMPLE, "evaluation={measures: {prompt: []}, arms: {x: {prompt: 0.5}}}"],
            r"arms.x.prompt: adapters.prompt speaks .* 0.5, allowed: 0, 1",
        ),
        ([SIMPLE, "evaluation.measures.prompt={name: clip_i, encoder: {name: vit, weights: w}}"], "reads too"),
        ([SIMPLE, "evaluation.measures.prompt={name: clip_i, encoder: {name: vit, weights: x/../w}}"], "reads too"),
        (
            [SIMPLE, SIMPLE.replace("prompt", "second").replace("weights: w", "weights: v"), SECOND],
            r"clip_i.encoder is v, which adapter 'second' reads too",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(EDGE, *overrides)


def test_adapters_with_names_of_rows_are_measured_in_arms_of_other_names() -> None:
    got = planned("adapters={all: {name: controlnet, hint: edge}}", EDGE, "evaluation.arms={both: [all, edge]}")
    assert got is not None
    assert scales(got.arms) == {"base": {}, "both": {"all": 1, "edge": 1}}


def test_a_copy_of_an_adapters_tower_is_no_judge(tmp_path: Path) -> None:
    for name, content in (("w", b"tower"), ("copy", b"tower"), ("other", b"judge")):
        (tmp_path / name).write_bytes(content)
    own = SIMPLE.replace("weights: w", f"weights: {tmp_path / 'w'}")
    off = "evaluation.measures.prompt=[]"
    judge = "{{name: vit, image_size: 32, weights: {}}}"
    places = {
        "evaluation.measures.prompt": "{{name: clip_i, encoder: {}}}",
        "evaluation.pictures": "{{name: dino_i, encoder: {}}}",
        "evaluation.sets.judge": "{{features: {{name: tower, encoder: {}}}}}",
    }
    for place, node in places.items():
        for name in ("w", "copy"):
            with pytest.raises(ConfigError, match=rf"^{place}.*encoder is .*{name}, which adapter 'prompt' reads too"):
                planned(own, off, f"{place}={node.format(judge.format(tmp_path / name))}")
        assert planned(own, off, f"{place}={node.format(judge.format(tmp_path / 'other'))}") is not None


def test_a_text_tower_that_the_model_draws_with_is_marked(tmp_path: Path) -> None:
    for name in ("own", "other"):
        (tmp_path / name).write_bytes(name.encode())
    text = "{width: 8, layers: 1, heads: 1, merges: 0}"
    for name, marks in (("own", 1), ("other", 0)):
        clip = f"{{name: clip, text: {text}, weights: {tmp_path / name}}}"
        args = [f"model.text.weights={tmp_path / 'own'}", f"evaluation.pictures={{name: clip_t, clip: {clip}}}"]
        cfg = config.load(CONFIGS / "train" / "tiny" / "ldm.yaml", args)
        with torch.device("meta"):
            got = plan(cfg, build.denoiser(cfg))
        assert got is not None and cfg.model.text is not None and cfg.model.text["weights_prefix"] == "text."
        found = shared_text(got, cfg)
        assert len(found) == marks
        assert not marks or found[0].startswith("clip_t judges by the text encoder that the model draws with")


def test_segmentation_is_measured_by_its_regions() -> None:
    got = planned("adapters={s: {name: controlnet, hint: segmentation}}")
    assert got is not None and list(got.measures["s"]) == ["region_iou"]


def test_another_part_of_the_same_file_is_another_model() -> None:
    other = "evaluation.measures.prompt={name: clip_i, encoder: {name: vit, weights: w, weights_prefix: image.}}"
    assert planned(SIMPLE, other) is not None


PROMPTED = sorted(p for p in (CONFIGS / "train").rglob("ip_adapter*.yaml") if p.parent.name in ("tiny", "emoji"))


@pytest.mark.parametrize("path", PROMPTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_image_prompt_trainings_can_be_evaluated(path: Path) -> None:
    got = planned(file=path)
    measures = [] if got is None else list(got.measures["prompt"])
    assert measures == (["clip_i", "palette_reference"] if path.parent.name == "emoji" else [])


EVALUATE = sorted(p for p in (CONFIGS / "evaluate").rglob("*.yaml") if "adapters:" in p.read_text())


@pytest.mark.parametrize("path", EVALUATE, ids=lambda path: path.stem)
def test_shipped_configs_build_without_weights(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    got = planned(file=path)
    assert got is not None
    assert any(got.measures.values())
    cfg = config.load(path)
    assert all(node["weights"].startswith("checkpoints/") for node in cfg.adapters.values())
    assert cfg.run.dir == f"runs/emoji/{path.stem}"
    assert estimate.meta_stage(cfg).exports()


def batches() -> list[Batch]:
    """Five flat pictures of grey 0, 0.1, ..., in batches of 2, 2 and 1."""
    images = [torch.full((1, 3, 8, 8), 0.1 * i) * 2 - 1 for i in range(5)]
    return [Batch([str(i) for i in part], torch.cat([images[i] for i in part]), ["" for _ in part]) for part in PARTS]


PARTS = [(0, 1), (2, 3), (4,)]


def test_every_arm_is_drawn_once_per_batch_on_the_same_seeds_and_scored() -> None:
    drawn: list[tuple[tuple[str, ...], int]] = []

    def draw(batch: Batch, hints: Mapping[str, Tensor], uses: Mapping[str, AdapterUse], seed: int) -> Tensor:
        drawn.append((tuple(uses), seed))
        return (hints["tint"] if uses else torch.zeros_like(batch.image)).clone()

    wanted = Plan({"base": {}, "tint": {"tint": AdapterUse()}}, {"tint": {"palette": Palette()}})
    found = obedience(wanted, batches(), lambda b: {"tint": b.image / 2 + 0.5}, draw, seed=7, pictures=3)
    assert drawn == [(arm, seed) for seed in (7, 9, 11) for arm in ((), ("tint",))]
    rows = found.rows["tint"]["palette"]
    assert list(rows) == ["base", "tint", "ground_truth", "chance"]
    step = 0.1 * 3**0.5
    means = [rows[row].mean for row in rows]
    assert means == pytest.approx([2 * step, 0, 0, (4 * step + 4 * step) / 5], abs=1e-6)  # neighbours: 4, 1, 1, 1, 1
    assert rows["base"].low < 2 * step < rows["base"].high
    assert found.items == 5
    assert {label: len(images) for label, images in found.columns.items()} == dict.fromkeys(
        ("hint: tint", "base", "tint", "ground truth"), 3
    )


class Nth(Measure):
    """Scores that tell which picture was put beside which hint; counts the items whose features it holds."""

    def picture(self, images: Tensor) -> Tensor:
        return images[:, 0, 0, 0]

    def score(self, pictures: Tensor, hints: Tensor) -> Tensor:
        return pictures.exp() * hints.cos()


@pytest.mark.parametrize("measure", [Nth(), Palette(2), EdgeF1()], ids=["nth", "palette", "edge_f1"])
@pytest.mark.parametrize("sizes", [(7,), (1, 6), (3, 3, 1), (1,) * 7])
def test_chance_and_ceiling_by_batches_are_those_of_all_at_once(measure: Measure, sizes: tuple[int, ...]) -> None:
    real, hint = torch.rand(2, 7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    parts = zip(real.split(sizes), hint.split(sizes), strict=True)
    loaded = [Batch([""] * len(x), x * 2 - 1, [""] * len(x), hints={"h": y}) for x, y in parts]
    wanted = Plan({"base": {}}, {"h": {"m": measure}})
    found = obedience(wanted, loaded, lambda b: b.hints, lambda b, *_: torch.zeros_like(b.image), seed=0, pictures=1)
    pictures, hints = measure.picture((real * 2 - 1) * 0.5 + 0.5), measure.hint(hint)
    expected = {"ground_truth": measure.score(pictures, hints), "chance": measure.score(pictures.roll(1, 0), hints)}
    rows = found.rows["h"]["m"]
    assert {row: rows[row] for row in expected} == {row: bootstrap(values) for row, values in expected.items()}


def test_one_item_has_no_chance() -> None:
    draw = functools.partial(lambda batch, *_: torch.zeros_like(batch.image))
    wanted = Plan({"base": {}}, {"tint": {"palette": Palette()}})
    found = obedience(wanted, batches()[2:], lambda b: {"tint": b.image / 2 + 0.5}, draw, seed=0, pictures=1)
    assert list(found.rows["tint"]["palette"]) == ["base", "ground_truth"]


def test_a_hint_that_a_measure_cannot_read_is_one_line_before_drawing() -> None:
    def draw(*_: object) -> Tensor:
        raise AssertionError("nothing may be drawn")

    wanted = Plan({"base": {}}, {"tint": {"palette": Palette()}})
    with pytest.raises(ConfigError, match=r"measures.tint: palette cannot read this hint .* \(2, 1, 8, 8\)"):
        obedience(wanted, batches(), lambda b: {"tint": b.image[:, :1]}, draw, seed=0, pictures=1)


def test_references_of_another_size_fit_into_the_grid() -> None:
    hint = torch.rand(1, 1, 3, 20, 20)
    draw = functools.partial(lambda batch, *_: torch.zeros_like(batch.image))
    found = obedience(Plan({"base": {}}, {"p": {}}), batches()[2:], lambda _: {"p": hint}, draw, seed=0, pictures=8)
    assert found.columns["hint: p"].shape == (1, 3, 8, 8)
