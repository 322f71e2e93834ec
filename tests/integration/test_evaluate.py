"""Held-out figures from a config, and sharing weights of a run."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapters  # noqa: F401
import ldm.training.run  # noqa: F401
from ldm import build, config, registry
from ldm.training import checkpoint, diffusion
from scripts import convert, evaluate, train
from tests.small import waken

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "train" / "tiny"
SIZE = ["model.vae.weights=null", "model.text.weights=null", "train.precision=fp32", "sample.batch=2"]
HELD_OUT = "validation.data={name: synthetic, size: 16, length: 4, seed: 1, hints: [edge]}"
BOTH = HELD_OUT.replace("[edge]", "[edge, palette]")
TWO = "adapters={color: {name: t2i_adapter, hint: palette, vae_factor: 4}}"


def saved(kind: str, folder: Path) -> str:
    """Random weights of one tiny model as a file."""
    cfg = config.load(TINY / ("ldm.yaml" if kind in ("unet", "text") else f"{kind}.yaml"), SIZE)
    module = build.component(kind, {k: v for k, v in getattr(cfg.model, kind).items() if k != "weights"})
    folder.mkdir(exist_ok=True)
    save_file(waken(module).state_dict(), folder / f"{kind}.safetensors")
    return str(folder / f"{kind}.safetensors")


def with_weights(name: str, folder: Path, *overrides: str) -> list[str]:
    """Arguments for a tiny config: files with random weights of its models, fresh ones of its adapters."""
    args = [*SIZE, *overrides, "model.text.weights_prefix=''"]
    args += [f"model.{kind}.weights={saved(kind, folder)}" for kind in ("unet", "vae", "text")]
    args += ["stage.preview_steps=2", "sample.guidance.scale=2", "sample.sampler.steps=2"]
    for adapter, module in build.denoiser(config.load(TINY / f"{name}.yaml", args)).adapters.items():
        save_file(module.state_dict(), folder / f"{adapter}.safetensors")
        args.append(f"adapters.{adapter}.weights={folder / adapter}.safetensors")
    return ["--config", str(TINY / f"{name}.yaml"), *args, f"run.dir={folder}"]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "eval" / "eval.json").read_text())


def test_adapter_figures_name_adapter_base_ceiling_and_chance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main(with_weights("controlnet", tmp_path, HELD_OUT))
    found = record(tmp_path)
    rows = found["measures"]["edge"]["edge_f1"]
    assert rows["edge"] == rows["base"]  # a fresh ControlNet changes nothing
    assert rows["ground_truth"]["mean"] > rows["chance"]["mean"]
    assert all(row["low"] <= row["mean"] <= row["high"] for row in rows.values())
    assert (found["items"], found["seeds"], found["sampler"]["steps"]) == (4, [0, 3], 2)
    assert list(found["figures"]) == ["loss", "loss_t0", "loss_t2", "edge.residual_ratio"]  # at 4 timesteps
    digest = hashlib.sha256((tmp_path / "edge.safetensors").read_bytes()).hexdigest()
    assert found["weights"][str(tmp_path / "edge.safetensors")] == digest
    assert (tmp_path / "eval" / "grid.png").is_file()
    table = capsys.readouterr().out
    assert "|  | edge: edge_f1 (more) |" in table
    assert f"| ground truth | {rows['ground_truth']['mean']:.3f} [" in table


def test_adapters_of_several_runs_are_measured_alone_and_together(tmp_path: Path) -> None:
    arms = "evaluation.arms={both: [sketch, color], color: {color: 1}, zero: {sketch: 0, color: 0}}"
    evaluate.main(with_weights("t2i_adapter_sketch", tmp_path, TWO, arms, BOTH))
    measures = record(tmp_path)["measures"]
    assert list(measures) == ["sketch", "color"]
    for rows in (rows for named in measures.values() for rows in named.values()):
        assert list(rows) == ["base", "both", "color", "zero", "ground_truth", "chance"]
        assert rows["zero"] == rows["base"]
        assert len({rows[row]["mean"] for row in ("base", "both", "color")}) == 3
    assert measures["color"]["palette"]["ground_truth"]["mean"] < measures["color"]["palette"]["chance"]["mean"]


def test_an_image_prompt_is_measured_by_a_model_it_does_not_read(tmp_path: Path) -> None:
    vit = {"name": "vit", "image_size": 16, "patch": 8, "width": 8, "layers": 1, "heads": 1}
    save_file(registry.build("image", vit).state_dict(), tmp_path / "vit.safetensors")
    encoder = {**vit, "weights": str(tmp_path / "vit.safetensors")}
    measure = f"evaluation.measures.prompt={json.dumps({'name': 'clip_i', 'encoder': encoder})}"
    data = HELD_OUT.replace("hints: [edge]", "reference: true")
    own = f"adapters.prompt.encoder={json.dumps({**vit, 'weights': None, 'weights_prefix': ''})}"
    evaluate.main(with_weights("ip_adapter", tmp_path, measure, data, own))
    rows = record(tmp_path)["measures"]["prompt"]["clip_i"]
    assert rows["ground_truth"]["mean"] == pytest.approx(1, abs=1e-6)  # each scene is its own reference
    assert rows["prompt"] != rows["base"]
    assert str(tmp_path / "vit.safetensors") in record(tmp_path)["weights"]


def test_weights_that_the_config_names_win_over_those_of_the_run(tmp_path: Path) -> None:
    args = with_weights("t2i_adapter_sketch", tmp_path, TWO, BOTH, "validation.items=2")
    evaluate.main(args)
    named = record(tmp_path)["measures"]
    sketch, color = (load_file(tmp_path / f"{name}.safetensors") for name in ("sketch", "color"))
    other = {key: torch.zeros_like(value) for key, value in color.items()}
    files = {"adapter.sketch": sketch, "adapter.color": other}
    checkpoint.save(tmp_path, 1, files, {"step": 1}, {"step": "1"}, keep=checkpoint.Keep(1))
    evaluate.main([arg for arg in args if not arg.startswith("adapters.sketch.weights")])
    assert record(tmp_path)["measures"] == named


def test_the_newest_checkpoint_of_the_run_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(saved("vae", tmp_path / "source"))
    checkpoint.save(tmp_path / "run", 3, {"model": tensors}, {"step": 3}, {"step": "3"}, keep=checkpoint.Keep(1))
    args = ["--config", str(TINY / "vae.yaml"), *SIZE, HELD_OUT]
    evaluate.main([*args, f"run.dir={tmp_path / 'run'}"])
    from_run = record(tmp_path / "run")["figures"]
    named = f"model.vae.weights={tmp_path / 'source' / 'vae.safetensors'}"
    evaluate.main([*args, named, f"run.dir={tmp_path / 'other'}"])
    assert record(tmp_path / "other")["figures"] == from_run
    assert {"psnr", "scale_factor"} <= from_run.keys()
    assert f"| psnr | {from_run['psnr']:.4g} |" in capsys.readouterr().out


@pytest.mark.parametrize("trainable", ["[adapters.*]", "[adapters.*,unet.decoder.*]"])
def test_an_adapter_run_is_measured_from_its_folder(trainable: str, tmp_path: Path) -> None:
    base = f"model.unet.weights={saved('unet', tmp_path)}"
    args = ["--config", str(TINY / "controlnet.yaml"), *SIZE, base, f"run.dir={tmp_path / 'run'}", HELD_OUT]
    args += [
        "stage.preview_steps=2",
        "sample.guidance.scale=2",
        "sample.sampler.steps=2",
        f"train.trainable={trainable}",
    ]
    train.main([*args, "train.steps=2", "train.batch=2", "data.size=16", "data.length=4", "stage.cache=false"])
    evaluate.main(args)
    found = record(tmp_path / "run")
    files = [Path(file).name for file in found["weights"]]
    trained = ["adapter.safetensors", "unet.safetensors"] if "unet" in trainable else ["adapter.safetensors"]
    assert files == [*trained, "unet.safetensors"]  # the last one is the base
    assert found["items"] == 4


def test_a_folder_that_was_only_evaluated_can_still_be_trained(tmp_path: Path) -> None:
    args = ["--config", str(TINY / "vae.yaml"), *SIZE, HELD_OUT, f"run.dir={tmp_path / 'run'}"]
    evaluate.main([*args, f"model.vae.weights={saved('vae', tmp_path)}"])
    train.main([*args, "train.steps=1", "train.batch=2", "data.size=16", "data.length=4", "validation.data=null"])
    assert checkpoint.latest(tmp_path / "run") is not None


def test_random_weights_are_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        evaluate.main(["--config", str(TINY / "vae.yaml"), *SIZE, HELD_OUT, f"run.dir={tmp_path}"])
    assert exit_info.value.code == 2
    assert "no complete checkpoint; train it first, or set model.vae.weights=FILE" in capsys.readouterr().err


def test_evaluating_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        weights = f"model.vae.weights={saved('vae', tmp_path)}"
        evaluate.main(["--config", str(TINY / "vae.yaml"), "validation.data=null", weights])
    assert exit_info.value.code == 2
    assert "validation.data is not set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grid={seed: [1, 2]}", "grid has seed, but only sample.py sweeps; drop it for evaluation.arms"),
        ("run.dir=FILE", "eval cannot be written (Not a directory); choose another folder"),
    ],
)
def test_what_cannot_be_written_or_swept_is_refused_before_drawing(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(diffusion.DiffusionStage, "validate", None)  # calling it would be another error
    with pytest.raises(SystemExit) as exit_info:
        override = override.replace("FILE", str(tmp_path / "file"))
        evaluate.main([*with_weights("controlnet", tmp_path, HELD_OUT), override])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def run_with(tmp_path: Path, **tensors: torch.Tensor) -> Path:
    run = tmp_path / "run"
    checkpoint.save(run, 1, {"model": tensors}, {"step": 1}, {"step": "1"}, keep=checkpoint.Keep(1))
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


@pytest.mark.parametrize(("name", "message"), [("w.safetensors", "exists already"), ("w.png", "no .safetensors")])
def test_share_overwrites_nothing(name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = run_with(tmp_path, w=torch.ones(2)), tmp_path / name
    if name == "w.safetensors":
        out.write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        convert.main(["share", str(run), str(out)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert out.exists() == (name == "w.safetensors") and (not out.exists() or out.read_text() == "mine")


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
