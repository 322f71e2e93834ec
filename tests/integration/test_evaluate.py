"""Held-out figures from a config, and sharing weights of a run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adapters  # noqa: F401
from ldm.training import checkpoint
from scripts import convert, evaluate

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "train" / "tiny"
SIZE = ["model.vae.weights=null", "model.text.weights=null", "train.precision=fp32", "sample.batch=2"]
HELD_OUT = "validation.data={name: synthetic, size: 16, length: 4, seed: 1, hints: [edge]}"


def test_adapter_figures_name_adapter_base_ceiling_and_chance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*SIZE, "model.unet.weights=null", HELD_OUT, f"out.dir={tmp_path}", "sample.sampler.steps=2"]
    args += ["stage.preview_steps=2", "sample.guidance.scale=2"]
    evaluate.main(["--config", str(TINY / "controlnet.yaml"), *args])
    figures = json.loads(capsys.readouterr().out)
    assert figures["edge_f1_items"] == 4
    assert figures["edge_f1_adapter"] == figures["edge_f1_base"]  # a fresh ControlNet changes nothing
    assert figures["edge_f1_ground_truth"] > figures["edge_f1_chance"]
    assert json.loads((tmp_path / "eval.json").read_text())["figures"] == figures
    assert (tmp_path / "grid.png").is_file()


def test_vae_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(["--config", str(TINY / "vae.yaml"), *SIZE, HELD_OUT, f"out.dir={tmp_path}"])
    assert {"psnr", "scale_factor"} <= json.loads(capsys.readouterr().out).keys()


def test_evaluating_nothing_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        evaluate.main(["--config", str(TINY / "vae.yaml"), "validation.data=null"])
    assert exit_info.value.code == 2
    assert "validation.data is not set" in capsys.readouterr().err


def run_with(tmp_path: Path, **tensors: torch.Tensor) -> Path:
    run = tmp_path / "run"
    checkpoint.save(run, 1, {"model": tensors}, {"step": 1}, {"step": "1"}, keep=1)
    return run


def test_share_halves_floats_keeps_integers_and_metadata(tmp_path: Path) -> None:
    run = run_with(tmp_path, w=torch.tensor([1.0, 0.1]), n=torch.tensor([3]))
    convert.main(["share", str(run), str(tmp_path / "out" / "w.safetensors")])
    shared = load_file(tmp_path / "out" / "w.safetensors")
    assert shared["w"].dtype == torch.float16
    assert shared["n"].dtype == torch.int64
    torch.testing.assert_close(shared["w"].float(), torch.tensor([1.0, 0.1]), atol=1e-4, rtol=0)
    assert checkpoint.read_metadata(tmp_path / "out" / "w.safetensors")["step"] == "1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "not finite in w"), (["--stem", "adapter"], "has model: name one"), (["--dtype", "bf16"], "")],
)
def test_share_refuses_what_it_would_spoil(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(tmp_path, w=torch.tensor([1e6]))  # beyond fp16, fine in bf16
    command = ["share", str(run), str(tmp_path / "w.safetensors"), *arguments]
    if not message:
        convert.main(command)
        return
    with pytest.raises(SystemExit) as exit_info:
        convert.main(command)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w.safetensors").exists()
