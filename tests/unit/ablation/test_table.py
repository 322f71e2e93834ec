"""Ablation files: rows, claims, which trainings they share, and what is refused before anything is trained."""

from pathlib import Path

import pytest

import adapters  # noqa: F401  (registers them)
import ldm.training.run  # noqa: F401  (registers the stages)
from ldm.ablation import table
from ldm.ablation.table import Table
from ldm.registry import ConfigError

ROOT = Path(__file__).resolve().parents[3] / "configs" / "ablation"
TEXT = """
paper: P
question: Q?
says: S.
measure: edge_f1
budgets: {smoke: base.yaml}
"""


def made(folder: Path, text: str, budget: str = "smoke", overrides: tuple[str, ...] = ()) -> Table:
    (folder / "base.yaml").write_text(f"include: [{ROOT / 'base' / 'controlnet_smoke.yaml'}]\n")
    (folder / "table.yaml").write_text(TEXT + text)
    return table.load(folder / "table.yaml", budget, overrides)


@pytest.mark.parametrize("path", table.files(ROOT), ids=lambda p: f"{p.parent.name}/{p.stem}")
@pytest.mark.parametrize("budget", table.BUDGETS)
def test_every_table_has_every_budget_and_every_row_is_a_run(path: Path, budget: str) -> None:
    found = table.load(path, budget)
    assert found.file.question.endswith("?") and found.file.says.endswith(".")
    assert "arXiv" in path.read_text().splitlines()[0] + path.read_text().splitlines()[1] + found.file.paper
    assert len({row.key(0) for row in found.rows}) == len(found.rows)
    if budget == "short":
        assert len(found.seeds) >= 3


def test_rows_that_differ_in_drawing_alone_share_a_training(tmp_path: Path) -> None:
    rows = "rows: {a: {}, b: {adapters.*.scale: 0.5, sample.sampler.steps: 7}, c: {draw: {seed: 9}}, d: {train.lr: 1}}"
    a, b, c, d = made(tmp_path, rows).rows
    assert table.run_name(a, 0) == table.run_name(b, 0) == table.run_name(c, 0)
    assert table.run_name(d, 0) != table.run_name(a, 0) != table.run_name(a, 1000)
    assert len({table.digest(row.config(0)) for row in (a, b, d)}) == 3
    assert c.config(0).seed == 0, "the seed of a run is not a row's"


def test_rows_times_grid_and_every_adapter(tmp_path: Path) -> None:
    found = made(tmp_path, "rows: {a: {}, b: {train.lr: 0.5}}\ngrid: {adapters.*.scale: [0, 1]}")
    assert [row.name for row in found.rows] == ["a scale=0", "a scale=1", "b scale=0", "b scale=1"]
    assert found.rows[2].config(0).adapters["edge"]["scale"] == 0
    assert found.rows[2].config(0).train.lr == 0.5


def test_another_class_keeps_the_options_that_it_has_too(tmp_path: Path) -> None:
    (row,) = made(tmp_path, "rows: {lite: {adapters.*.name: controlnet_lite}}").rows
    assert row.config(0).adapters["edge"] == {"name": "controlnet_lite", "hint_widths": [8, 16, 32]}


def test_overrides_are_for_all_rows_and_below_them(tmp_path: Path) -> None:
    found = made(tmp_path, "rows: {a: {}, b: {train.lr: 0.5}}", overrides=("train.lr=0.1", "train.steps=3"))
    assert [(row.config(0).train.lr, row.config(0).train.steps) for row in found.rows] == [(0.1, 3), (0.5, 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: {a: {train.stepz: 3}}", "row 'a': unknown key 'train.stepz'.*did you mean"),
        ("rows: {a: {adapters.*.hint_width: [1]}}", "row 'a': .*hint_width.*did you mean 'hint_widths'"),
        ("grid: {train.stepz: [3]}", "unknown key 'train.stepz'"),
        ("rows: {a b: {}, a-b: {}}", "two rows are called 'a-b'"),
        ("rows: {a: 3}", "row 'a' is 3, must be a mapping"),
        ("grid: {train.steps: [2, 2]}", "grid.train.steps has 2 twice"),
        ("", "has no rows"),
        ("rows: {a: {}}\nexpect: [a > b]", "expect names 'b', which is no row; rows: a"),
        ("rows: {a: {}}\nexpect: [a is better]", "must be 'A > B'"),
        ("rows: {a: {}}\nexpect: ['fid: a > 1']", "must be 'A > B'"),
        ("rows: {a: {}}\nzzz: 1", "unknown keys \\['zzz'\\]"),
    ],
)
def test_what_does_not_fit_is_one_line_before_any_training(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        table.check(made(tmp_path, text))


def test_budget_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="budget is 'long'; allowed: smoke, short, paper"):
        made(tmp_path, "rows: {a: {}}", "long")
    with pytest.raises(ConfigError, match="has no budget 'paper'; it has smoke"):
        made(tmp_path, "rows: {a: {}}", "paper")


def test_a_config_that_names_all_weights_is_not_trained(tmp_path: Path) -> None:
    a, b = made(tmp_path, "rows: {a: {}, b: {adapters.*.weights: some.safetensors}}").rows
    assert table.trains(a.config(0)) and not table.trains(b.config(0))
