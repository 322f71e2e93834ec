"""scripts/sample.py from a config to files, with small random models."""

import errno
import json
import multiprocessing
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import adapters  # noqa: F401  registers them
from ldm import config as configs
from ldm import registry
from ldm.prompts import read_prompts
from ldm.registry import ConfigError
from ldm.sampling import output, plan
from scripts import sample

ROOT = Path(__file__).resolve().parents[2]
UNET = {"name": "unet", "channels": [8, 16], "blocks": 1, "depth": [0, 1], "num_heads": 2, "groups": 4}
UNET |= {"context_dim": 16}
VAE = {"name": "kl", "channels": [8, 8], "blocks": 1, "groups": 4, "scale_factor": 1.0}
TEXT = {"name": "clip", "width": 16, "layers": 1, "heads": 2, "merges": 100, "context_length": 16}
NET = {"name": "controlnet", "hint_widths": [4, 8]}


def save(module: nn.Module, path: Path) -> str:
    for weight in module.parameters():
        if weight.ndim > 1 and not weight.any():  # what training starts at zero would hide everything else
            nn.init.normal_(weight, std=0.1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, path)
    return str(path)


def write_config(root: Path, model: dict[str, Any], nets: dict[str, Any], prompts: list[Any], steps: int) -> Path:
    """`config.yaml` of a run with a hint for the adapter "net", and the hint: two seeds, pictures of 16 pixels."""
    Image.effect_noise((32, 32), 90).save(root / "hint.png")
    settings = {
        "prompts": prompts,
        "hints": {"net": str(root / "hint.png")},
        "seeds": "3,5",
        "height": 16,
        "width": 16,
        "batch": 3,
        "sampler": {"name": "ddim", "steps": steps, "eta": 1.0},
        "precision": "fp32",
    }
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump({"model": model, "adapters": nets, "sample": settings}))
    return path


def small_models(root: Path) -> Path:
    """Fill a folder with weights, a hint and `config.yaml`: two prompts, two seeds, a ControlNet."""
    torch.manual_seed(0)
    unet = registry.build("unet", UNET)
    weights = {
        "unet": UNET | {"weights": save(unet, root / "unet.safetensors")},
        "vae": VAE | {"weights": save(registry.build("vae", VAE), root / "vae.safetensors")},
        "text": TEXT | {"weights": save(registry.build("text", TEXT), root / "text.safetensors")},
    }
    net = save(registry.build("adapter", NET, unet=unet), root / "net.safetensors")
    prompts = [{"prompt": "a red apple", "negative": "blue"}, "an owl"]
    write_config(root, weights, {"net": NET | {"weights": net}}, prompts, steps=3)
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def draw(models: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the script into a folder of this test; returns it."""

    def call(name: str, *overrides: str) -> Path:
        sample.main(["--config", str(models / "config.yaml"), f"out.dir={tmp_path / name}", *overrides])
        return tmp_path / name

    return call


def pixels(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*_s*.png"))
    assert files
    return {f.name: torch.frombuffer(bytearray(Image.open(f).tobytes()), dtype=torch.uint8).int() for f in files}


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run the script, which must fail with exit code 2 and one line; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sample.main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_a_run_writes_images_grid_records_and_config(draw: Callable[..., Path]) -> None:
    out = draw("out")
    names = ["00000_s3.png", "00000_s5.png", "00001_s3.png", "00001_s5.png"]
    assert sorted(p.name for p in out.iterdir()) == [*names, "config.yaml", "grid.png", "samples.jsonl"]
    records = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [r["file"] for r in records] == names
    assert [(r["prompt"], r["negative"], r["seed"]) for r in records[1:3]] == [
        ("a red apple", "blue", 5),
        ("an owl", "", 3),
    ]
    width, height = Image.open(out / "grid.png").size
    assert width > 3 * 128 and height > 2 * 128  # a hint and two seeds, enlarged; two prompts
    assert configs.load(out / "config.yaml").sample.seeds == "3,5"


def test_a_png_says_how_it_was_made_and_draws_itself_again(draw: Callable[..., Path], tmp_path: Path) -> None:
    out = draw("out")
    made = output.read_parameters(out / "00000_s5.png")
    assert (made["prompt"], made["negative"], made["seed"], made["size"]) == ("a red apple", "blue", 5, [16, 16])
    assert made["sampler"] == {"name": "ddim", "steps": 3, "eta": 1.0} and made["guidance"]["scale"] == 7.5
    assert made["adapters"]["net"]["scale"] == 1.0 and made["adapters"]["net"]["hint"].endswith("hint.png")
    unet = made["weights"]["model.unet"]
    assert unet["sha256"] == output.file_digest(Path(unet["file"]))
    (tmp_path / "again.yaml").write_text(json.dumps(made["config"]))
    sample.main(["--config", str(tmp_path / "again.yaml"), f"out.dir={tmp_path / 'again'}"])
    again = pixels(tmp_path / "again")
    assert list(again) == ["00000_s5.png"]
    assert (again["00000_s5.png"] - pixels(out)["00000_s5.png"]).abs().max() <= 1


def test_images_do_not_depend_on_the_batch(draw: Callable[..., Path]) -> None:
    three, one = pixels(draw("three")), pixels(draw("one", "sample.batch=1"))
    assert three.keys() == one.keys()
    assert all((three[name] - one[name]).abs().max() <= 1 for name in three)
    assert (three["00000_s3.png"] - three["00000_s5.png"]).abs().max() > 20


def test_hints_and_scale_matter_and_scale_zero_is_absent(draw: Callable[..., Path], models: Path) -> None:
    with_net, off = pixels(draw("with")), pixels(draw("off", "adapters.net.scale=0"))
    config = yaml.safe_load((models / "config.yaml").read_text())
    del config["adapters"], config["sample"]["hints"]
    (models / "plain.yaml").write_text(yaml.safe_dump(config))
    absent = pixels(draw("absent", "--config", str(models / "plain.yaml")))
    assert all(torch.equal(off[name], absent[name]) for name in off)
    assert any((with_net[name] - off[name]).abs().max() > 2 for name in off)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "CMYK", "I;16", "P", "L", "1"])
def test_hint_files_of_every_certain_kind_are_the_same_lines(mode: str, tmp_path: Path) -> None:
    lines = Image.new("L", (16, 16))
    lines.paste(255, (4, 4, 12, 6))
    wide = lines.convert("I").point(lambda v: v * 257).convert("I;16")
    picture = wide if mode == "I;16" else lines.convert("RGB").convert(mode)
    file = tmp_path / ("hint.tif" if mode == "CMYK" else "hint.png")
    picture.save(file)
    lines.save(tmp_path / "plain.png")
    assert torch.equal(plan.load_hint(file, (16, 16)), plan.load_hint(tmp_path / "plain.png", (16, 16)))


@pytest.mark.parametrize(
    ("size", "said"),
    [((1, 1), r"is 1x1 \(h w\), which shows nothing"), ((20_000, 20_000), r"has more than 67108864 pixels; shrink it")],
)
def test_hint_files_of_no_use_are_refused(size: tuple[int, int], said: str, tmp_path: Path) -> None:
    Image.new("1", size).save(tmp_path / "hint.png")
    for load in (lambda file: plan.load_hint(file, (16, 16)), lambda file: plan.load_reference(file, 16)):
        with pytest.raises(ValueError, match=said):
            load(tmp_path / "hint.png")


def rank_main(index: int, port: int, arguments: list[str]) -> None:
    """One process as torchrun starts it."""
    where = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in where.items()})
    sample.main(arguments)


def test_two_ranks_draw_what_one_draws(draw: Callable[..., Path], models: Path, tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    one = draw("one", "sample.batch=1")
    arguments = ["--config", str(models / "config.yaml"), "sample.batch=1", f"out.dir={tmp_path / 'two'}"]
    context = multiprocessing.get_context("fork")  # spawned ones would import torch again, twice
    ranks = [context.Process(target=rank_main, args=(i, port, arguments)) for i in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=120)
        assert rank.exitcode == 0
    a, b = pixels(one), pixels(tmp_path / "two")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (one / "samples.jsonl").read_text() == (tmp_path / "two" / "samples.jsonl").read_text()
    assert (one / "grid.png").read_bytes() == (tmp_path / "two" / "grid.png").read_bytes()


def test_long_prompts_are_reported_and_cut(
    draw: Callable[..., Path], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        out = draw("long", "sample.prompts=[a b c d e f g h i j k l m n o p q, short]")
    said = [r.getMessage() for r in caplog.records if "prompt cut" in r.getMessage()]
    assert len(said) == 1 and "its last 3 tokens do not fit into 14" in said[0]  # 17 letters, 16 less two marks
    cut = [json.loads(line)["tokens_cut"] for line in (out / "samples.jsonl").read_text().splitlines()]
    assert cut == [3, 3, 0, 0]


def test_long_prompts_in_chunks_are_read_whole(draw: Callable[..., Path]) -> None:
    prompts = "sample.prompts=[a b c d e f g h i j k l m n o p q, short]"
    parts = draw("chunks", prompts, "sample.long_prompts=chunks")
    cut = [json.loads(line)["tokens_cut"] for line in (parts / "samples.jsonl").read_text().splitlines()]
    assert cut == [0, 0, 0, 0]
    whole, short = pixels(parts), pixels(draw("cut", prompts))
    changed = {name for name in whole if (whole[name] - short[name]).abs().max() > 1}
    assert changed == {name for name in whole if name.startswith("00000")}  # the short prompt means the same


def test_the_same_settings_write_the_same_files_again(draw: Callable[..., Path]) -> None:
    out = draw("out")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    (out / "00000_s3.png").write_bytes(b"broken")
    draw("out")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_other_settings_never_overwrite(
    draw: Callable[..., Path], models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "models"
    shutil.copytree(models, moved)
    text = (moved / "config.yaml").read_text().replace(str(models), str(moved))
    (moved / "config.yaml").write_text(text)
    out = tmp_path / "out"
    base = ["--config", str(moved / "config.yaml"), f"out.dir={out}"]
    sample.main(base)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert "other sample.guidance.scale" in refusal(capsys, [*base, "sample.guidance.scale=2"])
    Image.new("RGB", (16, 16)).save(moved / "hint.png")
    assert "content of its prompts, hints or weights" in refusal(capsys, base)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert "did not write" in refusal(capsys, [*base, f"out.dir={tmp_path / 'mine'}"])
    assert "a file; name a folder" in refusal(capsys, [*base, f"out.dir={tmp_path / 'mine' / 'thesis.txt'}"])


def test_a_full_disk_is_one_line_and_leaves_no_half_file(
    draw: Callable[..., Path], models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = draw("out")
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(path: Path, data: bytes) -> int:
        path.open("wb").write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    line = refusal(capsys, ["--config", str(models / "config.yaml"), f"out.dir={out}"])
    assert "No space left on device" in line
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sample.sedes=1"], "did you mean 'seeds'"),
        (["sample.seeds=3-1"], "runs backwards"),
        (["sample.prompts=null"], "sample.prompts is not set"),
        (["sample.batch=0"], "sample.batch is 0"),
        (["sample.height=18", "sample.width=18"], "multiples of 4"),
        (["sample.height=32"], "not the same shape"),
        (["sample.precision=fp8"], "allowed: fp32, bf16, fp16"),
        (["sample.tile=2"], "sample.tile is 2"),
        (["sample.clip_skip=9"], "clip_skip is 9; allowed for this text encoder: 1.."),
        (["sample.long_prompts=chunk"], "did you mean 'chunks'"),
        (["sample.sampler.name=dim"], "did you mean 'ddim'"),
        (["sample.guidance.scale=-1"], "guidance.scale is -1"),
        (["sample.hints.nut=x.png"], "'nut', which is no adapter; adapters: net; did you mean 'net'"),
        (["sample.hints.net=nowhere.png"], "sample.hints.net is nowhere.png, which does not exist; correct the path"),
        (["sample.hints.net=3"], "sample.hints.net is 3"),
        (["model.vae.weights=5"], "model.vae.weights is 5, must be the path"),
        (["model.schedule.steps=many"], "model.schedule: steps is 'many', must be int"),
        (["model.unet.channels=[8,24]"], "of another architecture than UNet"),
        (["model.vae.weights=nowhere.safetensors"], "nowhere.safetensors"),
        (["--run", "nowhere"], "exclude each other"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    line = refusal(capsys, ["--config", str(models / "config.yaml"), f"out.dir={tmp_path / 'out'}", *overrides])
    assert said in line, line
    assert not (tmp_path / "out").exists()


def test_a_hint_that_no_prompt_hears_is_said(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = f"sample.prompts=[{{prompt: a, hints: {{net: {models / 'hint.png'}}}}}]"
    plan.plan(configs.load(models / "config.yaml", [own, f"sample.hints.net={models / 'hint.png'}"]))
    assert not caplog.text
    plan.plan(configs.load(models / "config.yaml", [own, "sample.hints.net=nowhere.png"]))
    assert "hint nowhere.png of net is heard by no prompt: all 1 have their own" in caplog.text


def test_a_folder_of_hints_is_matched_in_order(models: Path, tmp_path: Path) -> None:
    for name in ("b", "a"):
        Image.new("RGB", (16, 16), "white").save(tmp_path / f"{name}.png")
    (tmp_path / "LICENSE.txt").write_text("x")
    config = configs.load(models / "config.yaml", [f"sample.hints.net={tmp_path}"])
    assert [p.hints["net"].name for p in plan.plan(config).prompts] == ["a.png", "b.png"]
    with pytest.raises(ConfigError, match="2 images for 3 prompts"):
        plan.plan(configs.load(models / "config.yaml", [f"sample.hints.net={tmp_path}", "sample.prompts=[a,b,c]"]))


def test_a_hint_for_some_prompts_only_is_refused(models: Path) -> None:
    node = yaml.safe_load((models / "config.yaml").read_text())
    node["sample"] |= {"hints": {}, "prompts": [{"prompt": "a", "hints": {"net": "x.png"}}, "b"]}
    with pytest.raises(ConfigError, match=r"prompt 1 has hints for .*for all prompts or for none"):
        plan.plan(configs.from_mapping(node))


def test_a_run_folder_gives_config_and_newest_checkpoint(models: Path, tmp_path: Path) -> None:
    run = tmp_path / "run's"
    node: dict[str, Any] = yaml.safe_load((models / "config.yaml").read_text())
    node |= {"stage": {"name": "diffusion"}, "data": {"name": "synthetic", "size": 16}, "run": {"dir": str(run)}}
    node["adapters"]["net"]["weights"], node["sample"]["height"] = None, 64
    for step in (1, 2, 3):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        shutil.copy(models / "net.safetensors", folder / "adapter.safetensors")
        if step < 3:  # the third one is not complete
            (folder / "COMPLETE").write_text("{}")
    (run / "config.yaml").write_text(yaml.safe_dump(node))
    sample.main(["--run", str(run), "sample.seeds=1", "sample.prompts=a"])
    out = run / "samples" / "step-00000002"
    made = output.read_parameters(out / "00000_s1.png")
    assert made["weights"]["adapters.net"]["file"] == str(run / "checkpoints" / "step-00000002" / "adapter.safetensors")
    assert made["size"] == [16, 16]


def test_runs_that_draw_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no config.yaml" in refusal(capsys, ["--run", str(tmp_path)])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"vae": VAE}, "stage": {"name": "vae"}}))
    assert "no complete checkpoint" in refusal(capsys, ["--run", str(tmp_path)])
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    for name in ("COMPLETE", "model.safetensors"):
        (folder / name).write_text("{}")
    assert "stage 'vae', which draws nothing" in refusal(capsys, ["--run", str(tmp_path)])


def test_dry_run_and_print_config_write_nothing(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--config", str(models / "config.yaml"), f"out.dir={tmp_path / 'out'}"]
    sample.main([*base, "--dry-run", "model.unet.weights=nowhere.safetensors"])
    said = capsys.readouterr().out
    assert "2 prompts x 2 seeds = 4 images of 16x16" in said and "not there yet: nowhere.safetensors" in said
    sample.main([*base, "--print-config"])
    assert yaml.safe_load(capsys.readouterr().out)["sample"]["seeds"] == "3,5"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "sample").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_shipped_configs_are_complete(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = configs.load(path)
    for prompt in read_prompts(config.sample.prompts):
        assert prompt.hints.keys() <= config.adapters.keys()
        for file in prompt.hints.values():
            plan.load_hint(file, (config.sample.height, config.sample.width))
    assert config.out.dir == f"outputs/{path.parent.name}/{path.stem}"


def test_without_arguments_the_emoji_models_are_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    sample.main(["--print-config"])
    assert yaml.safe_load(capsys.readouterr().out)["out"]["dir"] == "outputs/emoji/ldm"
