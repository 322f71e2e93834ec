"""What a run says of its learning: figures at logged steps, of its own weights, and no judge in its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapters  # noqa: F401
from ldm import registry
from ldm.training import checkpoint, loop
from tests.integration.test_train import WATCHED, start
from tests.small import figures

VIT = {"name": "vit", "image_size": 16, "patch": 8, "width": 8, "layers": 1, "heads": 1}


def test_figures_come_at_logged_steps_and_are_those_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = loop.step_figures

    def counted(optimizers: Any, *rest: Any) -> dict[str, float]:
        (steps,) = {int(s["step"]) for s in optimizers["model"].state.values()}
        asked.append(steps)
        return real(optimizers, *rest)

    monkeypatch.setattr(loop, "step_figures", counted)
    folder = start("controlnet", tmp_path, "train.steps=4", "train.batch=2", "log.every=2", "train.ema=null", *WATCHED)
    assert asked == [2, 4]
    found = figures(tmp_path)
    assert found["2 update_ratio"] > 0 and found["4 grad_norm"] > 0
    assert found["4 edge.zero_norm"] > found["2 edge.zero_norm"] > 0
    layers = ("zero_convs.", "zero_mid.", "hint.convs.5.")
    weights = load_file(folder / "adapter.safetensors").items()
    started = torch.cat([value.flatten() for name, value in weights if name.startswith(layers)])
    assert found["4 edge.zero_norm"] == pytest.approx(started.norm().item(), rel=1e-5)
    at_validation = {name.removeprefix("4 val_") for name in found if name.startswith("4 val_")}
    assert at_validation == {"loss", "loss_t0", "loss_t2", "edge.residual_ratio", "edge.palette", "edge.palette.base"}
    assert found["4 val_edge.residual_ratio"] > 0


def test_a_judge_is_in_no_file_of_the_run(tmp_path: Path) -> None:
    save_file(registry.build("image", VIT).state_dict(), tmp_path / "vit.safetensors")
    judge = {"name": "clip_i", "encoder": {**VIT, "weights": str(tmp_path / "vit.safetensors")}}
    data = "{name: synthetic, size: 16, length: 4, reference: true}"
    look = json.dumps({"look": {"name": "ip_adapter", "encoder": VIT}})
    more = [f"data={data}", f"validation.data={data}", "validation.images=2", "stage.preview_steps=1"]
    more += [f"adapters={look}", f"evaluation.measures.look={json.dumps(judge)}", "train.trainable=[adapters.*]"]
    folder = start("ldm", tmp_path / "run", "train.steps=1", "train.batch=2", "model.unet.weights=null", *more)
    found = figures(tmp_path / "run")
    assert -1 <= found["1 val_look.clip_i"] <= 1 and "1 val_look.clip_i.base" in found
    state = checkpoint.read_state(folder)
    kept = [*load_file(folder / "adapter.safetensors"), *state["names"]["model"], *state["buffers"]]
    assert {name.removeprefix("adapters.look.").split(".")[0] for name in kept} == {"image", "to_k", "to_v"}
