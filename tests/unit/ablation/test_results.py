"""Figures of ablations: intervals over seeds, verdicts on the papers' claims, tables that read back, the report."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from ldm.ablation import compare, report, results, table
from ldm.ablation.result import Result, same
from ldm.evaluation.intervals import Interval
from ldm.registry import ConfigError


def runs(row: str, *values: float) -> list[Result]:
    return [Result(row, seed, "x", {"m": Interval(v, v, v)}, 4, "abc") for seed, v in enumerate(values)]


def test_interval_over_seeds_is_students_t() -> None:
    found = results.over_seeds([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - 2.0 == pytest.approx(4.303 / math.sqrt(3))
    assert math.isinf(results.over_seeds([1.0]).high)


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        ((0.5, 0.6, 0.7), (0.4, 0.5, 0.6), "agrees"),  # by seed: +0.1 each, though the rows overlap
        ((0.4, 0.5, 0.6), (0.5, 0.6, 0.7), "does not"),
        ((0.5, 0.6, 0.7), (0.6, 0.4, 0.7), "too noisy"),
        ((0.5,), (0.4,), "too noisy"),
    ],
)
def test_verdict_pairs_the_runs_of_one_seed(a: tuple[float, ...], b: tuple[float, ...], word: str) -> None:
    assert results.verdict(("m", "a", "b"), runs("a", *a) + runs("b", *b))[0] == word


def test_verdict_against_a_number_and_without_runs() -> None:
    assert results.verdict(("m", "a", 0.3), runs("a", 0.5, 0.51, 0.52))[0] == "agrees"
    assert results.verdict(("m", "a", "b"), runs("a", 0.5)) == ("not run", None)


@pytest.mark.parametrize(
    ("values", "share"),
    [([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1], 1.0), ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 0.1), ([1, 0, 0, 0], 0.0)],
)
def test_steepest_tenth_tells_a_jump_from_a_slope(values: list[float], share: float) -> None:
    assert results.steepest([(10 * i, v) for i, v in enumerate(values)]) == pytest.approx(share)


def beside(runs: list[Result], *values: float) -> list[Result]:
    return [dataclasses.replace(r, beside={"m": {"base": v}}) for r, v in zip(runs, values, strict=True)]


def test_base_is_what_stands_beside_every_row_or_nothing() -> None:
    found = beside(runs("a", 0.5, 0.6, 0.7), 0.4, 0.5, 0.6) + beside(runs("b", 0.4, 0.5, 0.6), 0.4, 0.5, 0.6)
    assert results.verdict(("m", "a", "base"), found)[0] == "agrees"
    assert same(results.from_csv(results.as_csv(found)), "m", "base") == {0: 0.4, 1: 0.5, 2: 0.6}
    assert same(beside(runs("a", 0.5), 0.4) + beside(runs("b", 0.5), 0.3), "m", "base") == {}  # rows draw it otherwise


def test_csv_reads_back() -> None:
    found = [*runs("a, with a comma", 0.5, 0.25), *runs("b", 1.0)]
    again = results.from_csv(results.as_csv(found))
    assert [(r.row, r.seed, dict(r.figures), r.items, r.config) for r in again] == [
        (r.row, r.seed, dict(r.figures), r.items, r.config) for r in found
    ]


@pytest.mark.long
def test_report_writes_every_table_with_its_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(table.files(Path("configs/ablation"))[0].resolve().parents[3])
    known = table.load(Path("configs/ablation/t2i_adapter/size.yaml"), "short")
    figures = {"full": 0.5, "small": 0.49, "tiny": 0.48}
    keys = {row.name: row for row in known.rows}
    found = [
        Result(name, seed, "sketch", {m: Interval(v, v, v) for m in known.measures}, 64, config=keys[name].key(seed))
        for name, v in figures.items()
        for seed in known.seeds
    ]
    found[0] = dataclasses.replace(found[0], config="0000")
    results.write(known, found, tmp_path / "short" / "t2i_adapter" / "size")
    said = report.write(tmp_path / "short", tmp_path / "ablations.md")
    text = (tmp_path / "ablations.md").read_text()
    assert "1 tables" in said
    assert (
        known.file.says in text
        and "`full > tiny`" in text
        and "--config configs/ablation/t2i_adapter/size.yaml" in text
    )
    assert f"**1 of {len(found)} runs had other settings than the file has now.**" in text
    again = report.write(tmp_path / "ablations", tmp_path / "again.md")  # from what it keeps beside the document
    assert again.replace("again", "ablations") == said
    (tmp_path / "ablations" / "t2i_adapter" / "size" / "table.csv").write_text(results.as_csv(runs("huge", 1.0)))
    with pytest.raises(ConfigError, match="row 'huge', which t2i_adapter/size has not"):
        report.write(tmp_path / "ablations", tmp_path / "again.md")
    with pytest.raises(ConfigError, match=r"has no <paper>/<table>/table\.csv"):
        report.write(tmp_path / "nowhere", tmp_path / "again.md")


def test_compare_shows_keys_and_figures_that_differ(tmp_path: Path) -> None:
    for name, lr in (("a", 0.1), ("b", 0.2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"seed: 1\ntrain: {{lr: {lr}}}\nrun: {{dir: {name}}}\n")
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": lr}) + "\n")
    text = compare.compare(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    assert "| train.lr | 0.1 | 0.2 |" in text and "| train: loss | 0.1 | 0.2 |" in text
    assert "seed" not in text and "run.dir" not in text
    assert "pictures: the runs have none of one sort" in text
    with pytest.raises(ConfigError, match=r"has no config\.yaml, so it is no run folder"):
        compare.compare(tmp_path / "a", tmp_path)
