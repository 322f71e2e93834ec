"""Curves of a run: which figures share a panel, and a picture of them."""

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from ldm.config import LogConfig
from ldm.training import curves
from ldm.training.metrics import Metrics

FIGURES = {"loss": 0.5, "loss_t0": 0.9, "loss_t3": 0.1, "lr": 1e-4, "images_per_s": 8.0}
HELD_OUT = {"val_loss": 0.4, "val_loss_t0": 0.8, "val_edge.edge_f1": 0.6, "val_edge.edge_f1.base": 0.3}


def fill(run: Path) -> Metrics:
    metrics = Metrics(run, LogConfig())
    for step in range(1, 31):
        metrics.scalars(step, {name: value / step for name, value in FIGURES.items()})
        if step % 10 == 0:
            metrics.scalars(step, HELD_OUT | {"val_nothing": float("nan")})
    return metrics


def test_a_figure_shares_its_panel_with_its_twins(tmp_path: Path) -> None:
    fill(tmp_path)
    panels = curves.read_panels(tmp_path / "metrics.jsonl")
    assert {title: list(lines) for title, lines in panels.items()} == {
        "loss": ["loss", "val_loss"],
        "loss_t": ["loss_t0", "loss_t3", "val_loss_t0"],
        "lr": ["lr"],
        "images_per_s": ["images_per_s"],
        "edge.edge_f1": ["val_edge.edge_f1", "val_edge.edge_f1.base"],
    }
    assert panels["loss"]["val_loss"] == [(10, 0.4), (20, 0.4), (30, 0.4)]


def test_two_points_are_no_curve(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, LogConfig())
    for step in (1, 2):
        metrics.scalars(step, FIGURES)
    assert curves.read_panels(tmp_path / "metrics.jsonl") == {}
    metrics.close()
    assert not (tmp_path / curves.FILE).exists()


def test_closing_draws_the_curves(tmp_path: Path) -> None:
    fill(tmp_path).close()
    picture = Image.open(tmp_path / curves.FILE)
    assert picture.width > picture.height > 300  # three panels beside each other, in two rows
    colours = picture.convert("RGB").getcolors(1 << 20)
    assert colours is not None and len(colours) > 50  # lines, not an empty sheet


def test_nothing_new_is_not_drawn_again(tmp_path: Path) -> None:
    metrics = fill(tmp_path)
    metrics.curves()
    (tmp_path / curves.FILE).unlink()
    metrics.curves()
    assert not (tmp_path / curves.FILE).exists()
    assert curves.draw_curves(tmp_path / "empty") is None


def test_without_matplotlib_there_is_one_quiet_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(curves, "available", lambda: False)
    with caplog.at_level(logging.INFO):
        metrics = fill(tmp_path)
        metrics.curves()
        metrics.close()
    assert [record.getMessage() for record in caplog.records] == [
        "no curves.png in the run folder: matplotlib is not installed (extra plots)"
    ]
    assert not (tmp_path / curves.FILE).exists()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["loss"] == 0.5
