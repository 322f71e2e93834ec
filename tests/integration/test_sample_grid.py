"""scripts/sample.py with a grid: sweeps from a config to files, with small random models."""

import json
import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from ldm import build, fast, generate, registry
from ldm import config as configs
from ldm.samplers import Sampler
from ldm.sampling import output
from ldm.sampling.sweep import expand
from ldm.schedule import Schedule
from scripts import sample, train
from tests.integration.test_sample import NET, TEXT, UNET, VAE, pixels, rank_main, refusal, save, write_config

TOWER = {"name": "vit", "image_size": 16, "patch": 8, "width": 16, "layers": 1, "heads": 2}
LONG = "sample.prompts=[" + ", ".join("a " * 14 * chunks for chunks in (5, 4)) + "]"  # 20 chunks each, side by side
SCALES = "grid={adapters.net.scale: [0, 0.5], sample.guidance.scale: [1, 3]}"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts, two seeds, a ControlNet and an IP-Adapter that has no hint."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    unet = registry.build("unet", UNET)
    nodes = {"unet": UNET, "vae": VAE, "text": TEXT}
    tower = registry.build("image", TOWER)
    encoder = TOWER | {"weights": save(tower, root / "tower.safetensors")}
    prompt = registry.build("adapter", {"name": "ip_adapter", "encoder": TOWER}, unet=unet, tower=tower)
    model = {k: n | {"weights": save(registry.build(k, n), root / f"{k}.safetensors")} for k, n in nodes.items()}
    adapters = {
        "net": NET | {"weights": save(registry.build("adapter", NET, unet=unet), root / "net.safetensors")},
        "ip": {"name": "ip_adapter", "encoder": encoder, "weights": save(prompt, root / "ip.safetensors")},
    }
    return write_config(root, model, adapters, ["a red apple", "an owl"], steps=2)


@pytest.fixture(scope="module")
def swept(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a sweep of two scales by two guidance scales wrote."""
    out = tmp_path_factory.mktemp("swept") / "out"
    sample.main(["--config", str(config), f"out.dir={out}", SCALES])
    return out


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("settings", [["adapters.net.scale=0.5", "sample.guidance.scale=3"], ["sample.hints={}"]])
def test_a_combination_is_a_plain_run_bit_for_bit(
    config: Path, swept: Path, tmp_path: Path, settings: list[str]
) -> None:
    """Scale 0 is the adapter absent: here, without its hint."""
    absent = len(settings) == 1
    if absent:
        node = yaml.safe_load(config.read_text())
        del node["sample"]["hints"]
        config, settings = tmp_path / "absent.yaml", ["sample.guidance.scale=3"]
        config.write_text(yaml.safe_dump(node))
    sample.main(["--config", str(config), f"out.dir={tmp_path / 'plain'}", *settings])
    plain, every = pixels(tmp_path / "plain"), pixels(swept)
    tag = f"net.scale={0 if absent else 0.5}_guidance.scale=3"
    assert len(every) == 4 * len(plain) == 16
    assert all(torch.equal(picture, every[f"{name[:-4]}_{tag}.png"]) for name, picture in plain.items())
    other = every["00000_s3_net.scale=0_guidance.scale=1.png"]
    assert (plain["00000_s3.png"] - other).abs().max() > 2


def test_files_records_and_chunks_say_their_combination(swept: Path) -> None:
    found = records(swept)
    assert [(r["prompt"], r["seed"], *r["combination"].values()) for r in found] == [
        (prompt, seed, scale, guidance)
        for prompt in ("a red apple", "an owl")
        for seed in (3, 5)
        for scale in (0, 0.5)
        for guidance in (1, 3)
    ]
    assert found[6]["file"] == "00000_s5_net.scale=0.5_guidance.scale=1.png"
    for record in found:
        made = output.read_parameters(swept / record["file"])
        assert made["combination"] == record["combination"]
        assert made["config"]["adapters"]["net"]["scale"] == record["combination"]["adapters.net.scale"]
        assert made["guidance"]["scale"] == record["combination"]["sample.guidance.scale"]
        assert (made["config"]["grid"], made["seed"]) == ({}, record["seed"])
    assert configs.load(swept / "config.yaml").grid["sample.guidance.scale"] == [1, 3]


def test_the_picture_has_the_last_axis_as_columns(config: Path, swept: Path, tmp_path: Path) -> None:
    wide, high = Image.open(swept / "grid.png").size
    assert 3 * 128 < wide < 5 * 128 and 8 * 128 < high < 9 * 128  # hint, two guidance scales; prompts x seeds x scales
    sweep = expand(configs.load(config, [SCALES]))
    assert sweep.columns == ("guidance.scale=1", "guidance.scale=3")
    assert sweep.rows[:3] == [
        "seed=3\nnet.scale=0\na red apple",
        "seed=3\nnet.scale=0.5\na red apple",
        "seed=5\nnet.scale=0\na red apple",
    ]
    axes = "grid={adapters.net.end: [0.5, 1.0], seed: [8-9], prompt: [red, {prompt: blue}]}"
    sweep = expand(configs.load(config, [axes]))
    assert (sweep.columns, sweep.rows) == (("red", "blue"), [f"end={e}\nseed={s}" for e in (0.5, 1.0) for s in (8, 9)])
    assert [(i.prompt.text, i.seed, job.uses["net"].end) for job, i in sweep.items()][:5] == [
        *[("red", 8, 0.5), ("blue", 8, 0.5), ("red", 9, 0.5), ("blue", 9, 0.5)],
        ("red", 8, 1.0),
    ]
    assert sweep.combination(*sweep.items()[1]) == {"adapters.net.end": 0.5, "seed": 8, "prompt": "blue"}


def test_the_axis_adapters_says_which_of_them_speak(config: Path) -> None:
    sweep = expand(
        configs.load(config, ["grid={adapters: [[], [net], [ip, net]], seed: [3]}", "adapters.ip.scale=0.5"])
    )
    scales = [{name: use.scale for name, use in job.uses.items()} for job in sweep.plans]
    assert scales == [{"net": 0, "ip": 0}, {"net": 1, "ip": 0}, {"net": 1, "ip": 0.5}]
    assert sweep.axes["adapters"] == ("prompt alone", "controlnet: net", "ip_adapter: ip + controlnet: net")
    assert len({job.tag for job in sweep.plans}) == 3


@pytest.mark.parametrize("value", ["[[nett]]", "[net]", "[[], {net: 1}]", "net"])
def test_a_wrong_list_of_adapters_is_refused(config: Path, value: str) -> None:
    with pytest.raises(registry.ConfigError, match=r"grid.adapters .*list"):
        expand(configs.load(config, [f"grid={{adapters: {value}}}"]))


def test_models_are_built_once_and_an_image_prompt_may_be_guided_apart(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []
    denoiser = build.denoiser

    def counting(cfg: configs.RunConfig) -> Any:
        built.append(1)
        return denoiser(cfg)

    monkeypatch.setattr(build, "denoiser", counting)
    out, hint = tmp_path / "out", config.parent / "hint.png"
    grid = "grid={sample.guidance.image: [null, 0, 4], seed: [3]}"
    sample.main(["--config", str(config), f"out.dir={out}", f"sample.hints.ip={hint}", "sample.prompts=an owl", grid])
    assert built == [1]
    drawn = list(pixels(out).values())
    assert len(drawn) == 3
    assert all((drawn[a] - drawn[b]).abs().max() > 2 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_texts_and_adapters_are_rehearsed_once_where_nothing_of_them_varies(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, bool]] = []
    rehearse = generate.rehearse

    def counting(models: generate.Models, request: generate.Request) -> None:
        asked.append((request.uses["net"].scale, request.guidance.on))
        rehearse(models, request)

    monkeypatch.setattr(generate, "rehearse", counting)
    axes = "sample.guidance.scale: [1, 2, 3], sample.sampler.steps: [1, 2], adapters.net.scale: [0.5, 1]"
    sample.main(["--config", str(config), f"out.dir={tmp_path / 'out'}", f"grid={{{axes}, seed: [3], prompt: [owl]}}"])
    assert asked == [(0.5, False), (1, False), (0.5, True), (1, True)]


def test_weights_are_looked_up_once_for_all_combinations(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots: list[str] = []
    weights_file = build.weights_file

    def counting(kind: str, node: configs.Node, slot: str) -> Path | None:
        slots.append(slot)
        return weights_file(kind, node, slot)

    monkeypatch.setattr(build, "weights_file", counting)
    assert len(expand(configs.load(config, [SCALES])).plans) == 4
    assert len(slots) == len(set(slots)) == 6  # UNet, VAE, text, two adapters, an image tower


def test_samplers_are_compared_at_equal_steps_unless_told_otherwise(config: Path) -> None:
    def steps(grid: str) -> list[int]:
        sweep = expand(configs.load(config, ["sample.sampler={name: ddim, steps: 7}", f"grid={{{grid}}}"]))
        return [job.config.sample.sampler["steps"] for job in sweep.plans]

    assert steps("sample.sampler.name: [ddim, euler, ddpm]") == [7, 7, 7]
    assert steps("sample.sampler.name: [ddim, euler], sample.sampler.steps: [3, 4]") == [3, 4, 3, 4]
    assert steps("sample.sampler: [{name: lcm, steps: 4}, {name: euler}]") == [4, 7]


def test_a_sampler_without_steps_is_refused_beside_those_with(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "_KNOWN", dict(vars(registry)["_KNOWN"]))

    def fixed(schedule: Schedule) -> Sampler:
        return registry.build("sampler", {"name": "ddim", "steps": 4}, schedule=schedule)

    registry.register("sampler", "fixed")(fixed)
    grid = "grid={sample.sampler.name: [ddim, fixed]}"
    line = refusal(capsys, ["--config", str(config), f"out.dir={tmp_path / 'out'}", "sample.sampler.eta=0", grid])
    assert "grid sample.sampler.name=fixed: sampler 'fixed': unknown keys ['steps']" in line


def test_blocks_of_a_grid_replace_those_of_the_config(config: Path) -> None:
    grid = "grid={adapters.ip.blocks: [{mid: 0}, {up: 1, down: 0}, null]}"
    sweep = expand(configs.load(config, ["adapters.ip.blocks={down: 0.5}", grid]))
    assert [job.uses["ip"].blocks for job in sweep.plans] == [{"mid": 0}, {"up": 1, "down": 0}, None]


def test_training_refuses_a_grid(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(config), "--dry-run", "grid={seed: [1]}"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: grid is for sampling; it has seed: drop it")


@pytest.mark.skipif(not fast.available(), reason="this torch lacks oneDNN's packed operations")
def test_prepacked_models_draw_the_same_and_the_first_batch_decides_their_layout(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, int]] = []  # when, pictures in the batch, packed weights

    def watched(function: Callable[..., Any], when: str) -> Callable[..., Any]:
        def call(models: generate.Models, request: generate.Request, *more: Any, **named: Any) -> Any:
            result = function(models, request, *more, **named)
            modules = (models.denoiser, models.vae, models.text)
            packed = [p for module in modules if module is not None for p in module.parameters() if p.is_mkldnn]
            seen.append((when, len(request.prompts), len(packed)))
            return result

        return call

    for name in ("rehearse", "images"):
        monkeypatch.setattr(generate, name, watched(getattr(generate, name), name))
    base = ["--config", str(config), f"out.dir={tmp_path / 'out'}"]
    sample.main([*base, "sample.prepack=false"])
    ordinary = pixels(tmp_path / "out")
    assert seen == [("rehearse", 1, 0), ("images", 3, 0), ("images", 1, 0)]
    seen.clear()
    sample.main([*base, f"out.dir={tmp_path / 'packed'}"])
    packed = pixels(tmp_path / "packed")
    assert [s[:2] for s in seen] == [("rehearse", 1), ("images", 3), ("images", 1)]
    assert seen[0][2] == 0 and seen[1][2] == seen[2][2] > 0
    assert all((packed[name] - ordinary[name]).abs().max() <= 1 for name in ordinary)


def test_settings_of_speed_and_memory_alone_may_change_in_a_folder(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for more in ([], ["sample.prepack=false", "sample.sliced=true", "sample.batch=1"]):
        sample.main(["--config", str(config), f"out.dir={out}", *more])
    saved = configs.load(out / "config.yaml").sample
    assert (saved.prepack, saved.sliced, saved.batch) == (False, True, 1)


def test_two_ranks_draw_the_same_sweep(config: Path, swept: Path, tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    arguments = ["--config", str(config), f"out.dir={tmp_path / 'two'}", SCALES]
    context = multiprocessing.get_context("fork")  # spawned ones would import torch again, twice
    ranks = [context.Process(target=rank_main, args=(i, port, arguments)) for i in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=120)
        assert rank.exitcode == 0
    a, b = pixels(swept), pixels(tmp_path / "two")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "two" / "samples.jsonl").read_bytes() == (swept / "samples.jsonl").read_bytes()


def test_dry_run_counts_combinations(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = "grid={adapters.net.scale: [0, 0.5, 1], sample.sampler.steps: [2, 7], seed: [1, 2, 4]}"
    sample.main(["--config", str(config), f"out.dir={tmp_path / 'out'}", "--dry-run", grid])
    said = capsys.readouterr().out
    assert "6 combinations of scale, steps x 2 prompts x 3 seeds = 36 images of 16x16" in said
    assert "2 or 7 steps each" in said
    assert not (tmp_path / "out").exists()


def test_dry_run_checks_clip_skip_without_weights(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(config), "--dry-run", "model.text.layers=2"]
    sample.main([*arguments, "grid={sample.clip_skip: [1, 2]}"])
    assert "2 combinations of clip_skip x 2 prompts x 2 seeds = 8 images" in capsys.readouterr().out
    assert "grid sample.clip_skip=3: " in refusal(capsys, [*arguments, "grid={sample.clip_skip: [1, 3]}"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["grid=[1]"], "grid is [1], must be a mapping"),
        (["grid={adapters.net.scale: []}"], "grid.adapters.net.scale is [], must be a list of at least one"),
        (["grid={seed: 1}"], "grid.seed is 1, must be a list"),
        (["grid={adapters.nut.scale: [1]}"], "did you mean 'adapters.net.scale'"),
        (
            ["grid={adapters.net.weights: [a, b]}"],
            "no sweep can change; allowed: prompt, seed, adapters, adapters.<name>.{scale",
        ),
        (["grid={sample.sampler: [{name: ddim}], sample.sampler.steps: [2]}"], "one inside the other"),
        (["grid={seed: [1, 1]}"], "grid.seed has 1 twice"),
        (["grid={seed: [-1]}"], "sample.seeds is '-1'"),
        (["grid={seed: [0-9999], adapters.net.end: [0.5, 1]}"], "grid asks for 40,000 images, allowed: up to 10,000"),
        (["grid={adapters.net.scale: [0, .nan]}"], "grid adapters.net.scale=NaN: adapters.net: scale is nan"),
        (["grid={adapters.net.start: [0, 0.9], adapters.net.end: [1, 0.5]}"], "start=0.9, adapters.net.end=0.5: "),
        (["grid={sample.guidance.scale: [2, -1]}"], "grid sample.guidance.scale=-1: guidance.scale is -1"),
        (["grid={sample.sampler.steps: [2, 2000]}"], "grid sample.sampler.steps=2000: "),
        (["grid={sample.sampler.name: [ddim, dim]}"], "grid sample.sampler.name=dim: sampler.name is 'dim'"),
        (["grid={sample.clip_skip: [1, 9]}"], "grid sample.clip_skip=9: clip_skip is 9"),
        (["grid={sample.strength: [0.5]}"], "without an image"),
        (
            [LONG, "grid={sample.long_prompts: [cut, chunks]}"],
            "long_prompts=chunks: prompts of 4, 5 chunks",
        ),
        (["grid={adapters.net.mask: [null, nowhere.png]}"], "adapters.net.mask is nowhere.png, which does not exist"),
        (["grid={adapters.net.skip_scales: [null, [1, 1]]}"], "skip_scales has 2 entries; this adapter has 4 skips"),
        (["grid={adapters.net.blocks: [null, {dwon: 0}]}"], "blocks has 'dwon'; this UNet has"),
        (["grid={adapters.net.blocks: [null, {up: 0}]}"], "blocks has 'up', where this adapter says nothing"),
        (["sample.guidance.image=2"], "sample.guidance.image is 2, but no prompt has an image prompt"),
    ],
)
def test_a_bad_grid_is_one_line_before_anything_is_drawn(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    line = refusal(capsys, ["--config", str(config), f"out.dir={tmp_path / 'out'}", *overrides])
    assert said in line, line
    assert not (tmp_path / "out").exists()
