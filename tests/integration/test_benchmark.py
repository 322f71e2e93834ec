"""The benchmark at its tiny scale: both sides agree, and ours asks less of torch. No times are asserted."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.control import Control
from ldm.denoiser import Denoiser
from ldm.models import attention
from ldm.models.unet import num_parameters
from ldm.registry import ConfigError
from ldm.training import optim

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from scripts import benchmark
from scripts.benchmarks import measure, networks, report, run, steps
from scripts.benchmarks.workloads import WORKLOADS

pytestmark = pytest.mark.long

CPU = torch.device("cpu")
STEPS = [name for name, work in WORKLOADS.items() if work.steps and not work.trains]
UNFUSED = {"text_to_image_bf16", "controlnet_image_bf16", "ip_step_bf16", "all_step_bf16"}
UNFUSED |= {"t2i_train_bf16", "ip_train_bf16"}  # attention as two products, which is faster, takes more operations

MASKED = {"seecoder_encode_fp32", "seecoder_encode_bf16"}  # timm marks the windows of shifted blocks for each picture


def sides(name: str, **more: Any) -> dict[str, Any]:
    return WORKLOADS[name].build(dataclasses.replace(run.setting(name, "tiny", "cpu"), **more))


@pytest.mark.parametrize("name", WORKLOADS)
def test_sides_agree_and_ours_asks_less(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work, runs = WORKLOADS[name], sides(name)
    assert measure.difference(runs["ours"](), runs["theirs"]()) <= work.tolerance
    if name in UNFUSED:
        monkeypatch.setattr(attention, "UNFUSED_KEYS", 0)
    ours, theirs = (run.figures(runs[side], work) for side in run.SIDES)
    assert ours["ops"] < theirs["ops"] or name in MASKED
    if work.steps and not work.trains:  # keys and values of the text are made once per picture
        assert ours["flops"] < theirs["flops"]
    assert ours["flops"] <= theirs["flops"]
    if work.steps:
        assert ours["syncs"] == 0
    if work.trains:
        assert ours["saved"] > 0 and theirs["saved"] > 0


@pytest.mark.parametrize("side", run.SIDES)
def test_every_adapter_of_a_step_is_heard(side: str) -> None:
    setting = dataclasses.replace(run.setting("all_step_fp32", "tiny", "cpu"), sides=(side,))
    outputs: list[torch.Tensor] = []
    for n in range(len(steps.ADAPTERS) + 1):
        torch.manual_seed(0)  # the networks that one more adapter joins are the same
        outputs.append(steps.denoising_step(setting, kinds=steps.ADAPTERS[:n])[side]())
    assert all(measure.difference(more, less) > 0.01 for less, more in pairwise(outputs))


@pytest.mark.parametrize("side", run.SIDES)
@pytest.mark.parametrize("name", ["t2i_train_bf16", "ip_train_bf16"])
def test_a_side_alone_trains_its_adapter(name: str, side: str) -> None:
    step = sides(name, sides=(side,))[side]
    (before, norm), (after, _) = step(), step()
    assert norm > 0 and after != before


def test_adapters_at_full_size_are_the_published_ones() -> None:
    scale, meta = networks.SCALES["full"], torch.device("meta")
    assert num_parameters(networks.their_t2i(scale, meta)) == 77_000_640
    ours, parts = networks.ip_adapter(scale, meta)
    assert num_parameters(ours) == 22_319_616
    assert parts["image_proj"]["proj.weight"].shape == (4 * 768, 1024)
    assert sorted(parts["ip_adapter"]) == sorted(f"{n}.to_{x}_ip.weight" for n in range(1, 32, 2) for x in "kv")


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_steps_compile_without_a_graph_break(name: str) -> None:
    assert measure.graph_breaks(sides(name, prepack=False)["ours"]) == 0


@pytest.mark.slow
def test_graph_breaks_are_seen() -> None:
    x = torch.ones(3)

    def run() -> torch.Tensor:
        return x + x.sum().item()

    assert measure.graph_breaks(run) == 1


def test_outputs_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "text_encode_fp32"
    work = WORKLOADS[name]
    other = {"ours": lambda: torch.ones(3), "theirs": lambda: torch.tensor([1.0, 1.0, 1.1])}
    monkeypatch.setitem(WORKLOADS, name, type(work)(lambda _: other, "fp32"))
    with pytest.raises(ConfigError, match=r"outputs differ by 9\.09e-02 .* nothing was timed"):
        run.row(name, run.Options("tiny", "cpu", 1, 1, False, None))


def test_counters_see_what_they_count() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    weight = torch.nn.Linear(8, 2, bias=False)
    found = measure.counts(lambda: weight(x).sum() * (x.sum() > 0).item())
    assert found.syncs == 1 and found.flops == 2 * 4 * 8 * 2 and found.by_op["mm"] == 1
    assert found.ops == sum(found.by_op.values()) - found.by_op["t"] - found.by_op["detach"]
    q = torch.randn(1, 2, 16, 8)
    attention = measure.counts(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert attention.flops == 2 * 2 * 2 * 16 * 16 * 8
    with measure.saved_bytes(weight) as saved:
        (x.exp() + weight(x).sum()).sum()
    assert saved() == 2 * x.numel() * 4  # x and exp(x); the weight is there anyway
    with measure.saved_bytes() as saved:
        weight(x).sum()
    assert saved() == x.numel() * 4  # nor does its transpose count, where the module is not named


def test_locked_encoder_keeps_no_activations() -> None:
    scale = networks.SCALES["tiny"]
    unet = networks.our_unet(scale, CPU, None)
    denoiser = Denoiser(unet, {"net": networks.our_controlnet(scale, CPU, unet, None)})
    optim.trainable(denoiser, ["adapters.*"])
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    base = Control(context=torch.randn(1, 5, scale.unet.context_dim))
    prepared = denoiser.prepare({"net": torch.rand(1, 3, 64, 64)})
    with measure.saved_bytes(denoiser) as saved:
        encoded = unet.encoder(x, t, base)
        assert saved() == 0
        control = denoiser.control(x, t, base, prepared)
        after_copy = saved()
        unet.decoder(encoded, base + control)
    assert 0 < after_copy < saved()


def test_results_grow_workload_by_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--scale", "tiny", "--pairs", "1", "--no-memory", "--threads", "1", "--out", str(tmp_path)]
    for name in ("vae_decode_fp32", "text_encode_fp32"):
        benchmark.main([name, *options])
    rows = json.loads((tmp_path / "performance.json").read_text())
    assert set(rows) == {"vae_decode_fp32", "text_encode_fp32"}
    row = rows["text_encode_fp32"]
    assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"] and row["ours"]["seconds"] > 0
    page = (tmp_path / "performance.md").read_text()
    assert f"{row['ratio']['median']:.3f}" in page and torch.__version__ in page
    assert "python scripts/benchmark.py text_encode_fp32 --scale tiny" in page
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["vae_decode_fp32", "text_encode_fp32"]


def test_a_missed_bar_is_said_with_its_reason() -> None:
    side = {"flops": 1e12, "ops": 5, "syncs": 0, "seconds": 1.0}
    row = {"ratio": {"median": 0.9, "min": 0.8, "max": 1.0}, "bar": 0.8, "difference": 1e-6, "why": "cold"}
    row |= {"ours": side, "theirs": side, "command": "c", "machine": {"device": "cpu"}}
    page = report.table({"x": row}, "x.json")
    assert "misses" in page and "- x: cold" in page
    assert "misses" not in report.table({"x": row | {"bar": 0.95}}, "x.json").replace("bar is missed", "")


def test_unknown_workload_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["unet_stp_fp32"])
    assert stopped.value.code == 2
    assert "did you mean 'unet_step_fp32'" in capsys.readouterr().err


@pytest.mark.slow
def test_peak_memory_of_each_side_apart() -> None:
    options = run.Options("tiny", "cpu", 1, 0, True, None)
    found = run.peak_apart("unet_step_fp32", "ours", options)
    assert 0 < found["before_mb"] <= found["peak_mb"] < 4000
