"""Every value of a config is traced to its file and line."""

import subprocess
import sys
from pathlib import Path

import pytest

from ldm import config, explain
from ldm.registry import ConfigError
from scripts import evaluate, sample, train

ROOT = Path(__file__).resolve().parents[2]


def origins(text: str) -> dict[str, tuple[str, str]]:
    """Dotted key -> (value, origin)."""
    rows = [line.split(" = ", 1) for line in text.splitlines()]
    return {key: (rest.rsplit("  ", 1)[0].strip(), rest.rsplit("  ", 1)[1]) for key, rest in rows}


def written(folder: Path, name: str, *lines: str) -> Path:
    file = folder / name
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_last_of_several_files_wins_and_the_rest_is_default(here: Path) -> None:
    written(here, "a.yaml", "train:", "  steps: 5", "  lr: 1e-3", "seed: 1")
    written(here, "b.yaml", "# comment", "train: {lr: 2e-3}", "seed: 2")
    written(here, "c.yaml", "include: [a.yaml, b.yaml]", "", "seed: 3")
    found = origins(explain.explain("c.yaml"))
    assert found["train.steps"] == ("5", "a.yaml:2")
    assert found["train.lr"] == ("0.002", "b.yaml:2")
    assert found["seed"] == ("3", "c.yaml:3")
    assert found["train.warmup"] == ("0", "default")


def test_command_line_wins_over_files(here: Path) -> None:
    written(here, "a.yaml", "train: {steps: 5}", "data: {name: synthetic, size: 32}")
    found = origins(explain.explain("a.yaml", ["train.steps=7", "data={size: 64}", "train.clip=", "grid={seed: [1]}"]))
    assert found["train.steps"] == ("7", "command line")
    assert found["data.name"] == ("synthetic", "a.yaml:2")
    assert found["data.size"] == ("64", "command line")
    assert found["train.clip"] == ("null", "command line")
    assert found["grid.seed"] == ("[1]", "command line")


def test_interpolation_shows_its_value_and_the_line_that_holds_it(here: Path) -> None:
    written(here, "a.yaml", "model:", "  weights: w.safetensors", "  unet:", "    weights: ${model.weights}")
    written(here, "b.yaml", "include: [a.yaml]", "validation: {data: '${data}'}", "data: {name: synthetic, size: 8}")
    found = origins(explain.explain("b.yaml"))
    assert found["model.unet.weights"] == ("w.safetensors", "a.yaml:4")
    assert found["validation.data.size"] == ("8", "b.yaml:2")


def test_anchors_and_merges_point_at_where_the_value_is_written(here: Path) -> None:
    lines = ["data: &base", "  name: synthetic", "  size: 8", "validation:", "  data:", "    <<: *base", "    size: 16"]
    written(here, "a.yaml", *lines)
    found = origins(explain.explain("a.yaml"))
    assert found["validation.data.name"] == ("synthetic", "a.yaml:2")
    assert found["data.size"] == ("8", "a.yaml:3")
    assert found["validation.data.size"] == ("16", "a.yaml:7")


def test_lists_are_one_value_with_the_line_of_their_key(here: Path) -> None:
    written(here, "a.yaml", "train:", "  trainable:", "    - a.*", "    - b.*", "data: {name: folder, hints: {}}")
    found = origins(explain.explain("a.yaml"))
    assert found["train.trainable"] == ("[a.*, b.*]", "a.yaml:2")
    assert found["train.betas"] == ("[0.9, 0.999]", "default")
    assert found["data.hints"] == ("{}", "a.yaml:5")


def test_another_class_starts_afresh_in_origins_as_in_values(here: Path) -> None:
    written(here, "a.yaml", "data: {name: synthetic, size: 8}")
    written(here, "b.yaml", "include: [a.yaml]", "data: {name: folder}")
    found = origins(explain.explain("b.yaml"))
    assert found["data.name"] == ("folder", "b.yaml:2")
    assert "data.size" not in found


def test_a_file_outside_of_the_current_folder_has_its_whole_path(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "below").mkdir()
    other = written(here, "a.yaml", "seed: 1")
    written(here / "below", "b.yaml", "include: [../a.yaml]")
    assert origins(explain.explain("below/b.yaml"))["seed"] == ("1", "a.yaml:1")
    monkeypatch.chdir(here / "below")
    assert origins(explain.explain("b.yaml"))["seed"] == ("1", f"{other}:1")


def test_every_value_of_a_shipped_config_has_a_line_that_names_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = "configs/train/emoji/seecoder.yaml"
    found = origins(explain.explain(path))
    assert found["train.lr"] == ("0.0005", f"{path}:33")
    for key, (_, origin) in found.items():
        if origin != "default":
            file, line = origin.rsplit(":", 1)
            assert f"{key.rpartition('.')[2]}:" in Path(file).read_text().splitlines()[int(line) - 1]
    assert len(found) > len(config.dump(config.RunConfig()).splitlines()) / 2


def test_bad_config_is_refused_as_load_refuses_it(here: Path) -> None:
    written(here, "a.yaml", "train: {stepz: 5}")
    with pytest.raises(ConfigError, match=r"unknown key 'train\.stepz'"):
        explain.explain("a.yaml")


@pytest.mark.parametrize("script", [train, sample, evaluate])
def test_scripts_explain_and_stop(script: object, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(here, "a.yaml", "train: {steps: 5}")
    script.main(["--config", "a.yaml", "--explain", "sample.batch=2"])  # pyright: ignore
    found = origins(capsys.readouterr().out)
    assert found["train.steps"] == ("5", "a.yaml:1")
    assert found["sample.batch"] == ("2", "command line")
    assert [file.name for file in here.iterdir()] == ["a.yaml"]


def test_explaining_imports_no_torch(here: Path) -> None:
    written(here, "a.yaml", "train: {steps: 5}")
    call = "from scripts import train; train.main(['--config', 'a.yaml', '--explain'])"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {call}; assert 'torch' not in sys.modules"
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (said.returncode, said.stderr) == (0, "")
    assert "a.yaml:1" in said.stdout
