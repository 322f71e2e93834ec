"""The training loop end to end on synthetic data: learning, exact resume, ranks, faults, errors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adapters  # noqa: F401
from ldm import config
from ldm.registry import ConfigError
from ldm.training import checkpoint, optim, run
from scripts import train
from tests.ranks import launch_two_ranks
from tests.small import figures

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "train" / "tiny"
SMALL = [
    "train.precision=fp32",
    "validation.data=null",
    "data.length=64",
    "data.size=16",
    "log.every=1",
    "train.warmup=0",
    "train.decay=constant",
]
WATCHED = ["validation.data={name: synthetic, size: 16, length: 4, hints: [edge]}", "evaluation.measures.edge=palette"]
WATCHED += ["validation.images=2", "stage.preview_steps=1", "model.unet.channels=[32,64]"]
WATCHED += [f"model.unet.weights={ROOT}/checkpoints/tiny/unet.safetensors"]  # a fresh one gives adapters no gradient
ADVERSARY = ["stage.disc_weight=0.5", "stage.disc_start=1", "stage.disc_width=8", "stage.disc_layers=1"]
MODELS = ["model.vae.weights=null", "model.text.weights=null", "model.unet.channels=[16,32]", "stage.cache=false"]


def overrides(what: str, folder: Path, *more: str) -> list[str]:
    unet = [*MODELS, "model.unet.weights=null"] if what in ("ldm", "controlnet") else []
    return [f"run.dir={folder}", *SMALL, *(unet if what == "controlnet" else unet[:-1]), *more]


def losses(folder: Path) -> list[float]:
    return [value for name, value in figures(folder).items() if name.endswith(" loss")]


def start(what: str, folder: Path, *more: str) -> Path:
    return run.train(config.load(TINY / f"{what}.yaml", overrides(what, folder, *more)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = sorted(folder.glob("*.safetensors"))
    return load_file(file)


@pytest.mark.parametrize("what", ["vae", "ldm", "clip"])
def test_loss_falls_in_20_steps(what: str, tmp_path: Path) -> None:
    more = ["model.clip.image.image_size=16"] if what == "clip" else []
    start(what, tmp_path, "train.steps=20", "train.batch=8", "train.ema=null", "train.lr=3e-3", "data.length=8", *more)
    curve = losses(tmp_path)
    assert len(curve) == 20
    assert sum(curve[-5:]) < 0.98 * sum(curve[:5])


@pytest.mark.long
@pytest.mark.parametrize("what", ["vae", "controlnet", "ldm"])
def test_stop_and_resume_equals_never_stopping_bit_for_bit(what: str, tmp_path: Path) -> None:
    more = ["train.batch=4", "checkpoint.every=3", "train.ema=0.9"]
    if what == "vae":
        more += ADVERSARY
    more += ["train.moments=bf16"] if what == "ldm" else []
    whole = start(what, tmp_path / "whole", "train.steps=6", *more)
    start(what, tmp_path / "parts", "train.steps=3", *more)
    parts = start(what, tmp_path / "parts", "train.steps=6", *more)
    a, b = weights(whole), weights(parts)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    state = checkpoint.read_state(whole), checkpoint.read_state(parts)
    for x, y in zip(state[0]["parameters"]["model"], state[1]["parameters"]["model"], strict=True):
        assert torch.equal(x, y)


@pytest.mark.ranks
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    more = ["train.steps=3", "train.batch=4", "device=cpu", "train.ema=null", "train.threads=1"]
    own = {
        "vae": [*more, *ADVERSARY],
        "clip": [*more, "model.clip.image.image_size=16"],
        "ldm": more,
        "controlnet": [*more, *WATCHED],
    }
    launch_two_ranks(
        [["--config", str(TINY / f"{w}.yaml"), *overrides(w, tmp_path / f"{w}2", *own[w])] for w in own], tmp_path
    )
    for what in own:
        start(what, tmp_path / what, *own[what])
        two, one = tmp_path / f"{what}2", tmp_path / what
        assert figures(two) == pytest.approx(figures(one), abs=1e-5, rel=1e-4), what
        a, b = (weights(checkpoint.complete(folder)[-1]) for folder in (one, two))
        for key in a:
            x, y = a[key], b[key]
            if key.endswith("in_proj_bias"):  # softmax ignores key biases: their gradient is rounding, blown up by Adam
                x, y = (torch.cat([v.chunk(3)[0], v.chunk(3)[2]]) for v in (x, y))
            torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-4, msg=lambda m, w=what, k=key: f"{w} {k}: {m}")


@pytest.mark.long
def test_adapter_training_leaves_the_base_alone_and_shares_only_the_adapter(tmp_path: Path) -> None:
    before = start("ldm", tmp_path / "ldm", "train.steps=2", "train.batch=4")
    base = [f"model.unet.weights={tmp_path / 'ldm'}"]
    cfg = config.load(TINY / "controlnet.yaml", overrides("controlnet", tmp_path / "cn", "train.steps=3", *base))
    folder = run.train(cfg)
    keys = weights(folder).keys()
    assert [p.name for p in folder.glob("*.safetensors")] == ["adapter.safetensors"]
    assert any(k.startswith("zero_convs.") for k in keys)
    assert not any(k.startswith(("unet.", "decoder.")) for k in keys)
    assert weights(before).keys()  # the base run's own file is still readable and untouched


def test_unlocked_decoder_is_trained_and_exported_with_the_adapter(tmp_path: Path) -> None:
    folder = start("controlnet", tmp_path, "train.steps=2", "train.trainable=[adapters.*,unet.decoder.*]")
    assert sorted(p.name for p in folder.glob("*.safetensors")) == ["adapter.safetensors", "unet.safetensors"]


def test_cached_latents_train_like_encoding_on_the_fly(tmp_path: Path) -> None:
    start("ldm", tmp_path / "cached", "train.steps=2", "train.batch=4", "stage.cache=true")
    start("ldm", tmp_path / "plain", "train.steps=2", "train.batch=4")
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)


def test_run_folder_says_what_ran(tmp_path: Path) -> None:
    start("ldm", tmp_path, "train.steps=2", "train.batch=4", "checkpoint.every=1", "checkpoint.keep_last=1")
    assert config.load(tmp_path / "config.yaml").train.steps == 2
    started = json.loads((tmp_path / "starts.jsonl").read_text().splitlines()[0])
    assert {"command", "git", "torch", "python"} <= started.keys()
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-00000002"]
    metadata = checkpoint.read_metadata(tmp_path / "checkpoints" / "step-00000002" / "model.safetensors")
    assert metadata["step"] == "2"
    assert "objective: eps" in metadata["config"]


def test_validation_writes_figures_and_labelled_pictures(tmp_path: Path) -> None:
    start("controlnet", tmp_path, "train.steps=1", *WATCHED)
    assert "1 val_loss" in figures(tmp_path)
    assert (tmp_path / "images" / "step-00000001.png").is_file()


def test_non_finite_gradients_are_skipped_counted_dumped_and_abort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = optim.adamw

    def poisoned(parameters, cfg):
        parameters = list(parameters)
        parameters[0].register_hook(lambda grad: grad * float("nan"))
        return real(parameters, cfg)

    monkeypatch.setattr(optim, "adamw", poisoned)
    with pytest.raises(ConfigError, match="not finite for 3 steps in a row"):
        start("vae", tmp_path, "train.steps=9", "train.batch=2", "train.max_nonfinite=3")
    dumps = sorted(p.name for p in (tmp_path / "nonfinite").iterdir())
    assert dumps == [f"step-{i:08d}-rank0.json" for i in range(3)]
    assert json.loads((tmp_path / "nonfinite" / dumps[0]).read_text())["samples"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.stesp=3", "did you mean 'steps'"),
        ("train.steps=many", "train.steps"),
        ("stage.name=vea", "did you mean 'vae'"),
        ("model.vae.channls=[8]", "did you mean 'channels'"),
        ("train.trainable=[nothing.*]", "matches no parameter"),
        ("train.micro_batch=7", "must divide"),
        ("train.precision=int8", "allowed: fp32, bf16, fp16"),
        ("train.init_from=nowhere.safetensors", "do not exist"),
        ("device=tpu", "allowed: auto, cpu, cuda"),
        ("data.name=imagenet", "registered:"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    argument: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = overrides("vae", tmp_path / "run", "train.steps=1", argument)
    with pytest.raises(SystemExit) as exit_info:
        train.main(["--config", str(TINY / "vae.yaml"), *args])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_resuming_another_architecture_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    done = start("vae", tmp_path, "train.steps=1", "train.batch=2")
    before = (done / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="use the config of that run"):
        start("vae", tmp_path, "train.steps=2", "train.batch=2", "model.vae.channels=[8,16]")
    assert (done / "model.safetensors").read_bytes() == before


FIRST = ["train.steps=1", "train.batch=2", "train.ema=0.9", *ADVERSARY, "stage.disc_start=0"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("stage.disc_weight=0", r"stage\.disc_weight=0\.5, not 0"),
        ("seed=1", "seed=0, not 1"),
        ("train.batch=4", r"train\.batch=2, not 4"),
        ("data.length=32", r"data\.length=64, not 32"),
        ("model.vae.groups=2", r"model\.vae\.groups="),
        ("train.ema=null train.allow_changes=true", r"EMA weights that train\.ema=null would drop"),
        ("train.trainable=[decoder.*] train.allow_changes=true", r"do not both train 'encoder\..*' of 'model'"),
    ],
)
def test_what_a_run_may_not_change_while_it_goes_on_is_named(argument: str, message: str, tmp_path: Path) -> None:
    start("vae", tmp_path, *FIRST)
    with pytest.raises(ConfigError, match=message):
        start("vae", tmp_path, *FIRST, "train.steps=2", *argument.split())


@pytest.mark.long
def test_a_base_that_trained_on_is_another_base(tmp_path: Path) -> None:
    more = ["train.batch=2", "device=cpu", "train.ema=null"]
    start("ldm", tmp_path / "base", "train.steps=1", *more)
    adapter = [*more, f"model.unet.weights={tmp_path / 'base'}"]
    first = start("controlnet", tmp_path / "adapter", "train.steps=1", *adapter)
    start("ldm", tmp_path / "base", "train.steps=2", *more)
    with pytest.raises(ConfigError, match=r"with another content of the frozen unet \("):
        start("controlnet", tmp_path / "adapter", "train.steps=2", *adapter)
    assert first.exists()
    start("controlnet", tmp_path / "adapter", "train.steps=2", *adapter, "train.allow_changes=true")


def test_a_run_may_go_on_with_other_steps_rates_and_precision(tmp_path: Path, caplog: Any) -> None:
    start("vae", tmp_path, *FIRST, "train.precision=bf16")
    other = ["train.lr=1e-5", "train.weight_decay=0.5", "train.decay=cosine", "log.every=2", "train.allow_changes=true"]
    caplog.set_level("INFO")
    folder = start("vae", tmp_path, *FIRST, "train.steps=2", "train.precision=fp16", *other)
    assert "changed since step-00000001: train.lr=" in caplog.text
    state = checkpoint.read_state(folder)
    assert state["step"] == 2 and state["scaler"]["scale"] > 0
    assert state["optimizers"]["model"]["param_groups"][0]["weight_decay"] == 0.5


def test_averages_that_begin_with_a_resume_begin_at_the_trained_weights(tmp_path: Path) -> None:
    first = start("vae", tmp_path, "train.steps=1", "train.ema=null", "train.batch=2", "train.lr=0.1")
    trained = checkpoint.read_state(first)["parameters"]["model"]
    other = ["train.ema=0.9", "train.lr=0", "train.allow_changes=true"]
    last = start("vae", tmp_path, "train.steps=2", "train.batch=2", *other)
    averages = checkpoint.read_state(last)["ema"]["weights"].values()
    for mean, value in zip(averages, trained, strict=True):
        torch.testing.assert_close(mean, value)


def test_a_state_that_lacks_something_is_refused(tmp_path: Path) -> None:
    folder = start("vae", tmp_path, *FIRST)
    state = checkpoint.read_state(folder)
    torch.save({k: v for k, v in state.items() if k not in ("names", "config")}, folder / "training.pt")
    (folder / checkpoint.MARKER).write_text("{}")  # as before sums were kept
    with pytest.raises(ConfigError, match="has no config, names in its training state"):
        start("vae", tmp_path, *FIRST, "train.steps=2")


def test_parameters_are_told_apart_by_name(tmp_path: Path) -> None:
    folder = start("vae", tmp_path, *FIRST)
    state = checkpoint.read_state(folder)
    state["names"]["model"][0] += "_before"
    torch.save(state, folder / "training.pt")
    (folder / checkpoint.MARKER).write_text("{}")
    with pytest.raises(ConfigError, match="do not both train"):
        start("vae", tmp_path, *FIRST, "train.steps=2")


@pytest.mark.long
def test_adapter_runs_can_be_started_from_adapter_runs(tmp_path: Path) -> None:
    first = start("controlnet", tmp_path / "one", "train.steps=1", "train.ema=null")
    again = ["train.steps=1", "train.ema=null", "train.lr=0", f"train.init_from={tmp_path / 'one'}"]
    last = start("controlnet", tmp_path / "again", *again)
    a, b = weights(first), weights(last)
    assert all(torch.equal(a[k], b[k]) for k in a)
    more = "adapters.more={name: controlnet, hint_widths: [8, 16, 32], hint: edge}"
    first = start("controlnet", tmp_path / "two", "train.steps=1", "train.ema=null", more)
    last = start("controlnet", tmp_path / "two again", *again[:-1], more, f"train.init_from={tmp_path / 'two'}")
    for name in ("adapter.edge.safetensors", "adapter.more.safetensors"):
        a, b = load_file(first / name), load_file(last / name)
        assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ConfigError, match=r"init_from is .*, but this stage trains adapter\.edge, adapter\.more"):
        start("controlnet", tmp_path / "file", *again[:-1], more, f"train.init_from={first / name}")


def test_a_folder_that_is_no_run_keeps_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="so it is no run"):
        start("vae", tmp_path, *FIRST)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("config.yaml", "mine")]


@pytest.mark.long
def test_lines_of_steps_after_the_checkpoint_are_not_there_twice(tmp_path: Path) -> None:
    more = ["train.batch=2", "checkpoint.every=2", "checkpoint.keep_last=0"]
    start("vae", tmp_path, "train.steps=3", *more)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000003")  # as if interrupted after step 3's line
    start("vae", tmp_path, "train.steps=4", *more)
    assert [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_a_full_gpu_is_one_line_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(optim, "adamw", full)
    with pytest.raises(ConfigError, match=r"lower train\.micro_batch .*train\.checkpoint_activations=true") as caught:
        start("vae", tmp_path, *FIRST)
    assert "\n" not in str(caught.value)


def test_what_validation_would_refuse_is_refused_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = "validation.data={name: synthetic, size: 16, length: 2, seed: 1, hints: []}"
    with pytest.raises(ConfigError, match=r"adapter 'edge' wants hint 'edge'; .* \[\]: add it to data\.hints"):
        start("controlnet", tmp_path, "train.steps=2", data)
    assert "the loss does not read" not in caplog.text
    with pytest.raises(ConfigError, match=r"wants hint 'edg'; the data's hints are \['edge'\]; did you mean 'edge'\?"):
        start("controlnet", tmp_path, "adapters.edge.hint=edg", "adapters.edge.scale=0.5", "adapters.edge.end=0.9")
    assert "the loss does not read adapters.edge.scale, adapters.edge.end, which" in caplog.text
    assert not tmp_path.is_dir() or not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"stage\.preview_guidance is -1"):
        start("ldm", tmp_path, "train.steps=2", "stage.preview_guidance=-1")


def test_a_failing_validation_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ConfigError("cannot draw")

    monkeypatch.setattr("ldm.training.loop._validate", broken)
    data = "validation.data={name: synthetic, size: 16, length: 2, seed: 1}"
    with pytest.raises(ConfigError, match="cannot draw"):
        start("vae", tmp_path, "train.steps=2", "train.batch=2", data)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.name == "step-00000002"


def test_validation_and_checkpoints_are_no_part_of_the_throughput(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def tick(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr("ldm.training.loop.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("ldm.training.loop._validate", lambda *_: tick(100.0))
    step = optim.guarded_step
    monkeypatch.setattr("ldm.training.optim.guarded_step", lambda *a: (tick(1.0), step(*a))[1])
    data = "validation.data={name: synthetic, size: 16, length: 2, seed: 1}"
    more = ["train.steps=6", "train.batch=2", "log.every=2", "validation.every=3", "checkpoint.every=3"]
    start("vae", tmp_path, *more[:2], data, *more[2:])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["images_per_s"] for line in lines if "images_per_s" in line] == [2.0, 2.0, 2.0]


def test_an_error_during_training_gets_a_line_of_its_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.save

    def full(*args: object, **options: object) -> Path:
        raise ConfigError("no space left") if args[1] == 2 else save(*args, **options)  # pyright: ignore

    monkeypatch.setattr("ldm.training.checkpoint.save", full)
    with pytest.raises(SystemExit):
        train.main(
            ["--config", str(TINY / "vae.yaml"), *overrides("vae", tmp_path, "train.steps=3", "checkpoint.every=2")]
        )
    assert capfd.readouterr().err.splitlines()[-1] == "error: no space left"
