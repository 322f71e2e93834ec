"""scripts/ablate.py end to end: a table of the tiny model, interrupted and gone on with."""

import csv
import signal
from pathlib import Path
from types import ModuleType

import pytest

from ldm.ablation import run
from ldm.training import signals
from scripts import ablate
from tests.ranks import finish, start_ranks

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    base = ROOT / "configs" / "ablation" / "base" / "controlnet_smoke.yaml"
    file = tmp_path / "some" / "conv.yaml"
    file.parent.mkdir()
    file.write_text(
        "paper: P\nquestion: Q?\nsays: S.\nmeasure: [edge_f1, loss]\nexpect: [zero > weak]\n"
        f"budgets: {{smoke: {base}}}\n"
        "rows: {zero: {}, weak: {adapters.*.scale: 0.5}, gaussian: {adapters.*.zero_conv: gaussian}}\n"
    )
    return file


def read(out: Path, name: Path = Path("smoke", "some", "conv")) -> list[list[str]]:
    """The table without what clocks said."""
    with (out / name / "table.csv").open() as file:
        return [line[:-2] for line in csv.reader(file)]


def test_interrupted_table_goes_on_and_is_the_same(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ablate_into(name: str) -> None:
        ablate.main(["--config", str(table), "budget=smoke", "--out", str(tmp_path / name)])

    ablate_into("whole")
    assert "| weak |" in capsys.readouterr().out
    rows = read(tmp_path / "whole")
    assert [line[0] for line in rows[1:]] == ["zero", "zero", "weak", "weak", "gaussian", "gaussian"]
    assert len(list((tmp_path / "whole" / "smoke" / "runs").iterdir())) == 2, "weak is drawn with the weights of zero"

    evaluate, calls = run.evaluate, list[str]()

    def failing(config: object) -> object:
        calls.append("")
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(config)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(run, "evaluate", failing)
    with pytest.raises(SystemExit) as exit_:
        ablate_into("again")
    assert exit_.value.code == 130
    assert read(tmp_path / "again") == rows[:3]
    ablate_into("again")
    assert len(calls) == 4, "one of the first start, the one interrupted, two of the second"
    assert read(tmp_path / "again") == rows

    # A measure that the kept evaluations have is read from them; one that they have not is measured.
    table.write_text(table.read_text().replace("[edge_f1, loss]", "[loss, edge_f1, edge.residual_ratio]"))
    ablate_into("again")
    assert len(calls) == 4
    assert {line[2] for line in read(tmp_path / "again")[1:]} == {"loss", "edge_f1", "edge.residual_ratio"}


def test_dry_run_lists_what_is_to_do_and_trains_nothing(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablate.main(["--config", str(table), "budget=smoke", "--out", str(tmp_path / "out"), "--dry-run"])
    text = capsys.readouterr().out
    assert "some/conv | zero | seed 0 | train controlnet-" in text
    assert "some/conv | weak | seed 0 | measure controlnet-" in text
    assert "optimizer" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["budget=long"], "budget is 'long'"),
        (["budget=smoke", "train.stepz=1"], "unknown key 'train.stepz'"),
        (["report"], "name --config FILE, or one of the commands"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    table: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        ablate.main(["--config", str(table), *words])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "name", "said", "done"),
    [
        (run.results, "write", "with 1 of 3 runs of some/conv done, which are kept", 2),  # between two runs
        (run.run, "train", "before measuring zero of some/conv; its training is kept", 0),  # behind the last step
        pytest.param(run, "evaluate", "while measuring, of which nothing is kept", 0, marks=pytest.mark.slow),
    ],
)
def test_a_signal_between_trainings_ends_the_table_with_its_code(
    module: ModuleType,
    name: str,
    said: str,
    done: int,
    table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["--config", str(table), "budget=smoke", "validation.items=2", "train.steps=1", "--out", str(tmp_path)]
    real = getattr(module, name)
    handlers = [signal.getsignal(number) for number in signals.SIGNALS]

    def interrupted(*args: object, **kwargs: object) -> object:
        if name == "evaluate":
            signal.raise_signal(signal.SIGTERM)
        result = real(*args, **kwargs)
        signal.raise_signal(signal.SIGTERM)
        return result

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(module, name, interrupted)
        patch.setattr("ldm.ablation.table.check", lambda table: None)  # of which other tests are
        ablate.main(words)
    assert exit_.value.code == 75
    assert capsys.readouterr().err.endswith(f"stopped by SIGTERM {said}: the same command goes on from there\n")
    assert [signal.getsignal(number) for number in signals.SIGNALS] == handlers
    file = tmp_path / "smoke" / "some" / "conv" / "table.csv"
    assert (len(read(tmp_path)) - 1 if file.exists() else 0) == done


@pytest.mark.ranks
def test_two_ranks_give_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = ["--config", "configs/ablation/core/guidance.yaml", "budget=smoke", "validation.items=6", "--out"]
    ablate.main([*words, str(tmp_path / "one")])
    finish(start_ranks(["scripts/ablate.py", *words, str(tmp_path / "two")], 2))
    name = Path("smoke", "core", "guidance")
    assert read(tmp_path / "one", name) == read(tmp_path / "two", name)
