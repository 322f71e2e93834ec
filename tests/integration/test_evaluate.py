"""Held-out figures from a config, and sharing weights of a run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapters  # noqa: F401
import ldm.training.run  # noqa: F401
from ldm import build, config
from ldm.training import checkpoint
from scripts import convert, evaluate, train

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "train" / "tiny"
SIZE = ["model.vae.weights=null", "model.text.weights=null", "train.precision=fp32", "sample.batch=2"]
HELD_OUT = "validation.data={name: synthetic, size: 16, length: 4, seed: 1, hints: [edge]}"


def saved(kind: str, folder: Path) -> str:
    """Random weights of one tiny model as a file."""
    cfg = config.load(TINY / ("controlnet.yaml" if kind == "unet" else f"{kind}.yaml"), SIZE)
    module = build.component(kind, {k: v for k, v in getattr(cfg.model, kind).items() if k != "weights"})
    folder.mkdir(exist_ok=True)
    save_file(module.state_dict(), folder / f"{kind}.safetensors")
    return str(folder / f"{kind}.safetensors")


def test_adapter_figures_name_adapter_base_ceiling_and_chance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*SIZE, f"model.unet.weights={saved('unet', tmp_path)}", HELD_OUT, f"run.dir={tmp_path}"]
    args += ["stage.preview_steps=2", "sample.guidance.scale=2", "sample.sampler.steps=2"]
    cfg = config.load(TINY / "controlnet.yaml", args)
    adapter = build.stage(cfg).exports()["adapter"]  # fresh: zero convolutions
    save_file(adapter.state_dict(), tmp_path / "adapter.safetensors")
    args.append(f"adapters.edge.weights={tmp_path / 'adapter.safetensors'}")
    evaluate.main(["--config", str(TINY / "controlnet.yaml"), *args])
    figures = json.loads(capsys.readouterr().out)
    assert figures["edge_f1_items"] == 4
    assert figures["edge_f1_adapter"] == figures["edge_f1_base"]  # a fresh ControlNet changes nothing
    assert figures["edge_f1_ground_truth"] > figures["edge_f1_chance"]
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["figures"] == figures
    assert (tmp_path / "eval" / "grid.png").is_file()


def test_the_newest_checkpoint_of_the_run_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(saved("vae", tmp_path / "source"))
    checkpoint.save(tmp_path / "run", 3, {"model": tensors}, {"step": 3}, {"step": "3"}, keep=1)
    args = ["--config", str(TINY / "vae.yaml"), *SIZE, HELD_OUT]
    evaluate.main([*args, f"run.dir={tmp_path / 'run'}"])
    from_run = json.loads(capsys.readouterr().out)
    named = f"model.vae.weights={tmp_path / 'source' / 'vae.safetensors'}"
    evaluate.main([*args, named, f"run.dir={tmp_path / 'other'}"])
    assert json.loads(capsys.readouterr().out) == from_run
    assert {"psnr", "scale_factor"} <= from_run.keys()


@pytest.mark.parametrize("trainable", ["[adapters.*]", "[adapters.*,unet.decoder.*]"])
def test_an_adapter_run_is_measured_from_its_folder(
    trainable: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = f"model.unet.weights={saved('unet', tmp_path)}"
    args = ["--config", str(TINY / "controlnet.yaml"), *SIZE, base, f"run.dir={tmp_path / 'run'}", HELD_OUT]
    args += [
        "stage.preview_steps=2",
        "sample.guidance.scale=2",
        "sample.sampler.steps=2",
        f"train.trainable={trainable}",
    ]
    train.main([*args, "train.steps=2", "train.batch=2", "data.size=16", "data.length=4", "stage.cache=false"])
    capsys.readouterr()
    evaluate.main(args)
    assert json.loads(capsys.readouterr().out)["edge_f1_items"] == 4


def test_a_folder_that_was_only_evaluated_can_still_be_trained(tmp_path: Path) -> None:
    args = ["--config", str(TINY / "vae.yaml"), *SIZE, HELD_OUT, f"run.dir={tmp_path / 'run'}"]
    evaluate.main([*args, f"model.vae.weights={saved('vae', tmp_path)}"])
    train.main([*args, "train.steps=1", "train.batch=2", "data.size=16", "data.length=4", "validation.data=null"])
    assert checkpoint.latest(tmp_path / "run") is not None


def test_random_weights_are_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        evaluate.main(["--config", str(TINY / "vae.yaml"), *SIZE, HELD_OUT, f"run.dir={tmp_path}"])
    assert exit_info.value.code == 2
    assert "no weights: for vae and no checkpoint" in capsys.readouterr().err


def test_evaluating_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        weights = f"model.vae.weights={saved('vae', tmp_path)}"
        evaluate.main(["--config", str(TINY / "vae.yaml"), "validation.data=null", weights])
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


def test_share_can_write_a_part(tmp_path: Path) -> None:
    run = run_with(tmp_path, **{"image.w": torch.ones(2), "text.w": torch.ones(2)})
    convert.main(["share", str(run), str(tmp_path / "w.safetensors"), "--only", "image."])
    assert list(load_file(tmp_path / "w.safetensors")) == ["image.w"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "audio."], "only is 'audio.'"),
        ([], "not finite in w"),
        (["--stem", "adapter"], "has model: name one"),
        (["--dtype", "bf16"], ""),
    ],
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
