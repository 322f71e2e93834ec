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
from ldm.evaluation.arms import Plan, plan
from ldm.evaluation.measures import Palette
from ldm.evaluation.obedience import obedience
from ldm.registry import ConfigError
from ldm.training import estimate

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
EDGE = "adapters={edge: {name: controlnet}}"
TWO = "adapters={sketch: {name: t2i_adapter, hint: edge, scale: 0.7}, tint: {name: t2i_adapter, hint: palette}}"
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
        (["evaluation.measures.edge=edge_f2"], r"registered: clip_i, edge_f1.* did you mean 'edge_f1'"),
        (["evaluation.arms.x=[egde]"], r"arms.x has 'egde', which is no adapter"),
        (["evaluation.arms.x=edge"], r"arms.x is 'edge', must be a list"),
        (["evaluation.arms.x.edge=.nan"], r"arms.x.edge is nan, must be a finite number"),
        (["evaluation.arms.chance=[edge]"], r"arms.chance is a taken name"),
        (["evaluation.arms.base=[edge]"], r"arms.base is a taken name"),
        (["adapters={d: {name: controlnet, hint: depth}}"], r"'d' has hint depth, without a known measure"),
        ([SIMPLE], r"'prompt' takes image prompts, measured by clip_i with a model that it does not read"),
        (
            [SIMPLE, "evaluation={measures: {prompt: []}, arms: {x: {prompt: 0.5}}}"],
            r"x.prompt is 0.5; .* allowed: 0, 1",
        ),
        ([SIMPLE, "evaluation.measures.prompt={name: clip_i, encoder: {name: vit, weights: w}}"], "reads too"),
    ],
)
def test_what_does_not_fit_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(EDGE, *overrides)


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


def test_references_of_another_size_fit_into_the_grid() -> None:
    hint = torch.rand(1, 1, 3, 20, 20)
    draw = functools.partial(lambda batch, *_: torch.zeros_like(batch.image))
    found = obedience(Plan({"base": {}}, {"p": {}}), batches()[2:], lambda _: {"p": hint}, draw, seed=0, pictures=8)
    assert found.columns["hint: p"].shape == (1, 3, 8, 8)
