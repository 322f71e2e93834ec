"""The bookkeeping of the loop; whole runs are in tests/integration/test_train.py."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config import RunConfig, TrainConfig
from ldm.registry import ConfigError
from ldm.training.distributed import Rank
from ldm.training.loop import _read_window
from ldm.training.state import State

RANK = Rank(0, 1, torch.device("cpu"))
CONFIG = RunConfig(train=TrainConfig(lr=0.5, max_nonfinite=2))


def state_after(*steps: dict[str, float]) -> State:
    """A state whose window holds these steps' scalars."""
    state = State(optimizers={}, parameters={}, ema=None, scaler=torch.amp.GradScaler("cpu", enabled=False))
    state.step = len(steps)
    state.window = [{name: torch.tensor(value) for name, value in step.items()} for step in steps]
    state.keys = [[f"sample {i}"] for i in range(len(steps))]
    return state


def test_window_is_averaged_and_emptied(tmp_path: Path) -> None:
    state = state_after({"loss": 1.0, "grad_norm": 4.0}, {"loss": 3.0, "grad_norm": 2.0})
    assert _read_window(state, tmp_path, CONFIG, RANK) == {
        "loss": 2.0,
        "grad_norm": 3.0,
        "lr": 0.5,
        "skipped": 0.0,
        "steps": 2.0,
    }
    assert state.window == [] and state.keys == []


def test_parts_of_the_loss_may_begin_within_a_window(tmp_path: Path) -> None:
    state = state_after({"loss": 1.0}, {"loss": 3.0, "adversarial": 9.0})
    values = _read_window(state, tmp_path, CONFIG, RANK)
    assert values["loss"] == 2.0 and "adversarial" not in values


def test_steps_that_are_not_finite_are_left_out_counted_and_dumped(tmp_path: Path) -> None:
    state = state_after({"loss": 1.0}, {"loss": math.nan}, {"loss": 3.0}, {"loss": math.inf})
    values = _read_window(state, tmp_path, CONFIG, RANK)
    assert (values["loss"], values["skipped"], values["steps"]) == (2.0, 2.0, 4.0)
    dumps = sorted((tmp_path / "nonfinite").iterdir())
    assert [d.name for d in dumps] == ["step-00000001-rank0.json", "step-00000003-rank0.json"]
    record: dict[str, Any] = json.loads(dumps[0].read_text())
    assert record == {"step": 1, "scalars": {"loss": "nan"}, "samples": ["sample 1"]}
    assert state.skipped_in_a_row == 1


def test_too_many_bad_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    state = state_after({"loss": 1.0}, {"loss": math.nan}, {"loss": math.nan})
    with pytest.raises(ConfigError, match=r"not finite for 2 steps in a row \(last: step 2\).*lower train\.lr"):
        _read_window(state, tmp_path, CONFIG, RANK)


def test_bad_steps_in_a_row_are_counted_across_windows(tmp_path: Path) -> None:
    state = state_after({"loss": 1.0}, {"loss": math.nan})
    _read_window(state, tmp_path, CONFIG, RANK)
    state.window, state.keys, state.step = [{"loss": torch.tensor(math.nan)}], [["next"]], 3
    with pytest.raises(ConfigError, match="2 steps in a row"):
        _read_window(state, tmp_path, CONFIG, RANK)


def test_window_without_one_good_step_has_no_loss(tmp_path: Path) -> None:
    values = _read_window(state_after({"loss": math.nan}), tmp_path, CONFIG, RANK)
    assert "loss" not in values and values["skipped"] == 1.0  # NaN would be no JSON


def test_steps_that_fp16_skips_to_find_its_loss_scale_are_no_faults(tmp_path: Path) -> None:
    state = state_after(
        {"loss": 1.0, "grad_norm": math.inf, "loss_scale": 65536.0},
        {"loss": 1.0, "grad_norm": math.nan, "loss_scale": 32768.0},
        {"loss": 3.0, "grad_norm": 1.0, "loss_scale": 16384.0},
    )
    values = _read_window(state, tmp_path, CONFIG, RANK)
    assert (values["loss"], values["skipped"], state.skipped_in_a_row) == (3.0, 0.0, 0)
    assert not (tmp_path / "nonfinite").exists()


@pytest.mark.parametrize("fault", [{"grad_norm": math.inf, "loss_scale": 1.0}, {"loss": math.nan, "loss_scale": 64.0}])
def test_fp16_faults_that_no_loss_scale_mends_are_dumped(fault: dict[str, float], tmp_path: Path) -> None:
    assert _read_window(state_after({"loss": 1.0} | fault), tmp_path, CONFIG, RANK)["skipped"] == 1.0
    assert (tmp_path / "nonfinite").exists()
