"""Scores of what validation draws: the measures themselves, chosen by the hint or by name."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import adapters  # noqa: F401  registers them
import ldm.training.run  # noqa: F401  registers the stages
from ldm import build, config, registry
from ldm.evaluation.adherence import Judges, adherence, judges
from ldm.evaluation.measures import EdgeF1, Palette, PaletteLab
from ldm.training.stage import Drawn

LDM = Path(__file__).resolve().parents[3] / "configs" / "train" / "tiny" / "ldm.yaml"
VIT = {"name": "vit", "image_size": 8, "patch": 4, "width": 8, "layers": 1, "heads": 1}
THREE = (
    "adapters={edge: {name: t2i_adapter}, tint: {name: t2i_adapter, hint: palette}, depth: {name: t2i_adapter}, "
    "look: {name: ip_adapter, encoder: {name: vit, image_size: 32, weights: w}}}"
)


def chosen(*overrides: str) -> Judges:
    cfg = config.load(LDM, [THREE, *overrides])
    with torch.device("meta"):
        denoiser = build.denoiser(cfg)
    return judges(cfg, denoiser)


def drawn(base: bool = True) -> Drawn:
    hints = {"edge": torch.rand(3, 3, 16, 16), "tint": torch.rand(3, 3, 16, 16)}
    return Drawn(hints, torch.rand(3, 3, 16, 16) if base else None, torch.rand(3, 3, 16, 16), torch.rand(3, 3, 16, 16))


def test_measures_are_those_of_the_hints_and_none_where_none_is_known(caplog: pytest.LogCaptureFixture) -> None:
    names = {adapter: list(named) for adapter, named in chosen().items()}
    assert names == {"edge": ["edge_f1"], "tint": ["palette", "palette_lab"]}
    assert len(caplog.messages) == 2, caplog.messages
    for said, adapter in zip(caplog.messages, ("depth", "look"), strict=True):
        assert said.startswith(f"no adherence of {adapter} will be logged, and evaluate.py will refuse: adapter ")
        assert f"set evaluation.measures.{adapter}" in said
    assert judges(config.load(LDM, [THREE]), torch.nn.Linear(1, 1)) == {}


def test_measures_that_the_config_names_win(tmp_path: Path) -> None:
    save_file(registry.build("image", VIT).state_dict(), tmp_path / "vit.safetensors")
    clip_i = {"name": "clip_i", "encoder": {**VIT, "weights": str(tmp_path / "vit.safetensors")}}
    names = chosen(f"evaluation.measures={{edge: palette, tint: [], look: {clip_i}}}")
    assert {adapter: list(named) for adapter, named in names.items()} == {
        "edge": ["palette"],
        "tint": [],
        "look": ["clip_i"],
    }
    with pytest.raises(registry.ConfigError, match="registered"):
        chosen("evaluation.measures={edge: edge_f2}")


def test_scores_are_the_mean_of_the_measure_with_and_without_adapters() -> None:
    pictures = drawn()
    found = adherence(
        {"edge": {"edge_f1": EdgeF1()}, "tint": {"palette": Palette(), "palette_lab": PaletteLab()}}, pictures
    )
    for adapter, name, measure in (("edge", "edge_f1", EdgeF1()), ("tint", "palette_lab", PaletteLab())):
        for arm, images in (("", pictures.adapted), (".base", pictures.base)):
            assert images is not None
            score = measure.score(measure.picture(images), measure.hint(pictures.hints[adapter]))
            assert found[f"{adapter}.{name}{arm}"] == pytest.approx(score.mean().item())
    assert len(found) == 6 and found["tint.palette"] != found["tint.palette.base"]


def test_without_a_text_there_is_no_base() -> None:
    assert list(adherence({"edge": {"edge_f1": EdgeF1()}}, drawn(base=False))) == ["edge.edge_f1"]


def test_a_hint_that_a_measure_cannot_read_has_a_line_in_the_log_and_no_figure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        found = adherence({"tint": {"palette": Palette(cells=32)}, "edge": {"edge_f1": EdgeF1()}}, drawn())
    assert list(found) == ["edge.edge_f1", "edge.edge_f1.base"]
    assert caplog.messages == ["no figure tint.palette: picture is (3, 3, 16, 16), must be b 3 h w and at least 32x32"]
