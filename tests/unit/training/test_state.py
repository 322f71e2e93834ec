"""What may differ between a run and its checkpoint: compared before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ldm.config import RunConfig, from_mapping, plain
from ldm.registry import ConfigError
from ldm.training import state
from ldm.training.state import State

FOLDER = Path("runs/a/checkpoints/step-00000010")
BEGUN: dict[str, Any] = {
    "data": {"name": "folder", "root": "data/emoji", "size": 64, "hints": {"edge": "canny"}},
    "train": {"lr": 1e-4, "batch": 8, "steps": 100},
}


def check(
    changes: dict[str, Any],
    samples: int = 10,
    allow: bool = False,
    saved: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
) -> None:
    """Go on with the run of BEGUN under these changes."""
    old, new = OmegaConf.create(BEGUN), OmegaConf.create(BEGUN)
    for key, value in changes.items():
        OmegaConf.update(new, key, value)
    first, config = (from_mapping(OmegaConf.to_container(c)) for c in (old, new))  # pyright: ignore
    if allow:
        OmegaConf.update(new, "train.allow_changes", True)
        config = from_mapping(OmegaConf.to_container(new))  # pyright: ignore[reportArgumentType]
    had = {"config": plain(first), "cwd": str(Path.cwd()), "samples": {"": 10}} | (saved or {})
    there = State({}, {}, None, torch.amp.GradScaler("cpu", enabled=False), samples={"": samples}, inputs=inputs or {})
    state._check_config(had, there, config, FOLDER)


HARMLESS = {
    "train.steps": 200,
    "train.micro_batch": 2,
    "train.workers": 3,
    "train.threads": 1,
    "log.every": 5,
    "checkpoint.every": 7,
    "validation.items": 3,
    "device": "cpu",
    "data.memory": False,
}


def test_what_leaves_the_numbers_alone_is_accepted_and_shown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        check({**HARMLESS, "sample.batch": 2, "run.dir": "runs/moved"})
    lines = [record.getMessage() for record in caplog.records]
    assert "changed since step-00000010: train.steps=100, not 200" in lines
    assert {line.split(": ")[1].split("=")[0] for line in lines} == HARMLESS.keys()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.lr", 1e-5, "train.lr=0.0001, not 1e-05"),
        ("train.betas", [0.9, 0.99], "train.betas=(0.9, 0.999), not (0.9, 0.99)"),
        ("train.precision", "fp32", "train.precision='bf16', not 'fp32'"),
        ("train.ema", 0.99, "train.ema=None, not 0.99"),
        ("data.root", "data/other", "data.root='data/emoji', not 'data/other'"),
        ("data.hints.edge", "sobel", "data.hints.edge='canny', not 'sobel'"),
        ("data.buckets", {"step": 8}, "data.buckets.step=None, not 8"),
        ("seed", 1, "seed=0, not 1"),
    ],
)
def test_what_changes_the_numbers_is_refused_unless_allowed(
    key: str, value: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="is of a run with") as caught:
        check({key: value, "train.steps": 200})
    text = str(caught.value)
    assert said in text and "train.steps" not in text and "\n" not in text
    assert text.endswith("to go on with the change, train.allow_changes=true")
    with caplog.at_level("INFO"):
        check({key: value}, allow=True)
    assert f"changed since step-00000010: {said}" in caplog.text


def test_steps_are_part_of_a_decaying_rate() -> None:
    check({"train.steps": 200})
    begun = from_mapping({**BEGUN, "train": {**BEGUN["train"], "decay": "cosine"}})
    with pytest.raises(ConfigError, match=r"with train\.steps=100, not 200; use"):
        check({"train.decay": "cosine", "train.steps": 200}, saved={"config": plain(begun)})


def test_a_data_set_that_grew_is_another_one() -> None:
    with pytest.raises(ConfigError, match=r"is of a run with data with samples=10, not 12; use"):
        check({}, samples=12)
    check({}, samples=12, allow=True)
    saved = {"samples": {"512x512": 4, "448x576": 6}}
    with pytest.raises(ConfigError, match=r"with data with samples=0, not 10; data with samples of 448x576=6, not 0;"):
        check({}, saved=saved)


def test_paths_are_compared_by_the_file_they_lead_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data/emoji").mkdir(parents=True)
    (tmp_path / "link").symlink_to("data/emoji")
    monkeypatch.chdir(tmp_path)
    begun = {"cwd": str(tmp_path)}
    for same in ("./data/emoji/", str(tmp_path / "data/emoji"), "link"):
        check({"data.root": same}, saved=begun)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    check({"data.root": "../data/emoji"}, saved=begun)
    check({}, saved=begun)  # a run that was moved as a whole
    with pytest.raises(ConfigError, match=r"data\.root='data/emoji', not 'emoji'"):
        check({"data.root": "emoji"}, saved=begun)


def test_other_content_at_the_same_paths_is_another_run(caplog: pytest.LogCaptureFixture) -> None:
    saved = {"inputs": {"the frozen unet": 64 * "a", "the data": 64 * "b"}}
    check({}, saved=saved, inputs={"the frozen unet": 64 * "a", "the frozen vae": 64 * "c"})
    other = {"the frozen unet": 64 * "d", "the data": 64 * "b"}
    with pytest.raises(ConfigError, match=r"with another content of the frozen unet \(a{12}, not d{12}\); use"):
        check({}, saved=saved, inputs=other)
    with caplog.at_level("INFO"):
        check({}, saved=saved, inputs=other, allow=True)
    assert "another content of the frozen unet" in caplog.text


def test_checkpoints_from_before_samples_were_counted_go_on() -> None:
    begun = plain(from_mapping(BEGUN))
    there = State({}, {}, None, torch.amp.GradScaler("cpu", enabled=False), samples={"": 3})
    state._check_config({"config": begun}, there, from_mapping(BEGUN), FOLDER)
    assert RunConfig().train.allow_changes is False
