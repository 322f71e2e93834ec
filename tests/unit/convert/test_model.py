"""inspect, import and export: what they say of damaged, partial and foreign files, and that nothing in a file runs."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapters  # noqa: F401
from ldm import convert
from ldm.convert import detect, files, infer, model, pickles
from ldm.models.text import TextConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.registry import ConfigError
from scripts import convert as script
from tests.small import SD1

VAE_SMALL = VAEConfig(channels=(8, 16), blocks=1, groups=4)
PREFIX = "model.diffusion_model."


def unet_state() -> dict[str, torch.Tensor]:
    original = convert.original_unet(SD1).to_theirs(UNet(SD1).state_dict())
    return {PREFIX + key: value.clone() for key, value in original.items()}


def vae_state() -> dict[str, torch.Tensor]:
    original = convert.original_vae(VAE_SMALL).to_theirs(VAE(VAE_SMALL).state_dict())
    return {f"first_stage_model.{key}": value.clone() for key, value in original.items()}


class Evil:
    """Runs a command when unpickled the ordinary way."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


class Callback:
    """A class that the reader does not have, with state, items and arguments."""

    def __init__(self) -> None:
        self.state = {"best": torch.ones(3), "path": Path("x")}


def lightning(path: Path, trace: Path) -> dict[str, torch.Tensor]:
    """A `.ckpt` as trainers write them, with foreign classes and an attack beside the weights."""
    state = {**vae_state(), "betas": torch.rand(5, dtype=torch.float64)}
    tied = torch.randn(4, 6)
    state["alphas_cumprod"] = tied.t()[1:4]  # a strided view, as pickles may hold
    content = {"state_dict": state, "callbacks": {Callback: Callback()}, "evil": Evil(trace), "epoch": 3}
    torch.save(content, path)
    return state


def test_lightning_file_is_read_and_leaves_no_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    state = lightning(tmp_path / "model.ckpt", trace)
    read = files.read(tmp_path / "model.ckpt")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[k], state[k]) and read[k].dtype == state[k].dtype for k in state)
    model.import_model(tmp_path / "model.ckpt", tmp_path / "out")
    assert not trace.exists()
    torch.load(tmp_path / "model.ckpt", weights_only=False)
    assert trace.exists()  # the attack is real


@pytest.mark.parametrize("protocol", range(6))
def test_malicious_pickles_of_every_protocol_leave_no_trace(protocol: int, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"state_dict": {"a": Evil(trace)}}, protocol=protocol))
        archive.writestr("x/version", "3")
    with pytest.raises(ConfigError, match=r"holds (no|more than) tensors|not readable"):
        files.read(tmp_path / "x.ckpt")
    assert not trace.exists()
    assert isinstance(pickles.read(tmp_path / "x.ckpt")["state_dict"]["a"], pickles.Stub)


def attacks(trace: Path) -> dict[str, bytes]:
    """Every way in which a pickle's opcodes can call something, by hand."""
    touch = f"touch {trace}".encode()
    text = b"\x8c" + bytes([len(touch)]) + touch  # SHORT_BINUNICODE
    weights = b"X\x05\x00\x00\x00evil!"
    eval_text = f"V__import__('os').system('touch {trace}')\n".encode()
    return {
        "global reduce": b"\x80\x02cos\nsystem\n" + text + b"\x85R.",
        "stack global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + text + b"\x85R.",
        "dotted name": b"\x80\x04\x8c\x02os\x8c\x0d__dict__.pop\x93" + text + b"\x85R.",
        "inst": b"(" + eval_text + b"i__builtin__\neval\n.",
        "obj": b"(c__builtin__\neval\n" + eval_text + b"o.",
        "newobj": b"\x80\x02cos\nsystem\n" + text + b"\x85\x81.",
        "newobj_ex": b"\x80\x04cos\nsystem\n" + text + b"\x85}\x92.",
        "build": b"\x80\x02cos\nsystem\n)R}" + weights + text + b"sb.",
        "in a mapping": b"\x80\x02}X\x0a\x00\x00\x00state_dict}" + weights + b"cos\nsystem\n" + text + b"\x85Rss.",
        "torch's own": b"\x80\x02ctorch.storage\n_load_from_bytes\nC\x01.\x85R.",
    }


@pytest.mark.parametrize("name", attacks(Path("x")))
@pytest.mark.parametrize("shape", ["zip", "bare"])
def test_no_opcode_of_a_pickle_runs_code(name: str, shape: str, tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "x.ckpt"
    attack = attacks(trace)[name]
    if shape == "bare":
        path.write_bytes(attack)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", attack)
            archive.writestr("archive/version", "3")
            archive.writestr("archive/byteorder", "little")
    with pytest.raises(ConfigError, match=r"holds (no|more than) tensors|not readable") as caught:
        files.read(path)
    assert not trace.exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["global reduce", "stack global", "inst", "obj", "in a mapping"])
def test_those_attacks_are_real(name: str, tmp_path: Path) -> None:
    pickle.loads(attacks(tmp_path / "trace")[name])
    assert (tmp_path / "trace").exists()


def test_a_tensor_outside_its_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(4)}, "evil": Callback()}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {n: archive.read(n) for n in archive.namelist()}
    name = next(n for n in entries if n.endswith("data.pkl"))
    entries[name] = entries[name].replace(b"K\x04\x85", b"K\xff\x85")  # size (4,) -> (255,)
    with zipfile.ZipFile(path, "w") as archive:
        for key, value in entries.items():
            archive.writestr(key, value)
    with pytest.raises((ConfigError, pickle.UnpicklingError), match=r"not readable|damaged|no tensors"):
        files.read(path)


def test_lean_files_need_no_restricted_reader(tmp_path: Path) -> None:
    state = vae_state()
    for name, zipped in (("new.pth", True), ("old.pt", False)):
        torch.save({"state_dict": state}, tmp_path / name, _use_new_zipfile_serialization=zipped)
        read = files.read(tmp_path / name)
        assert all(torch.equal(read[k], state[k]) for k in state)


def test_written_files_are_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3),
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "turned": torch.randn(4, 6).t(),
        "flags": torch.tensor([True, False, True]),
        "none": torch.empty(0, 4),
    }
    files.write(tmp_path / "x.safetensors", tensors, {"a": "b"})
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[k], tensors[k]) and read[k].dtype == tensors[k].dtype for k in tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_sharded_and_single_network_folders(tmp_path: Path) -> None:
    state = {k: v.clone() for k, v in convert.diffusers_unet(SD1).to_theirs(UNet(SD1).state_dict()).items()}
    keys = sorted(state)
    halves = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, part in halves.items():
        save_file({k: state[k] for k in part}, tmp_path / name)
    index = {"weight_map": {k: name for name, part in halves.items() for k in part}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    ours = model.load(tmp_path, "unet")
    UNet(SD1).load_state_dict(ours)


def test_averaged_weights_are_taken_on_request(tmp_path: Path) -> None:
    state = unet_state()
    ema = {"model_ema." + k.removeprefix("model.").replace(".", ""): v + 1 for k, v in state.items()}
    save_file({**state, **ema, "model_ema.decay": torch.tensor(0.9999)}, tmp_path / "x.safetensors")
    plain = model.read([tmp_path / "x.safetensors"]).parts["unet"][1]
    averaged = model.read([tmp_path / "x.safetensors"], ema=True).parts["unet"][1]
    assert all(torch.equal(averaged[k], plain[k] + 1) for k in plain)
    save_file(state, tmp_path / "y.safetensors")
    with pytest.raises(ConfigError, match=r"lacks the averaged weights \(model_ema\.\*\)"):
        model.read([tmp_path / "y.safetensors"], ema=True)


def test_inspect_names_what_is_there_and_what_is_missing(tmp_path: Path) -> None:
    state = {**unet_state(), **vae_state(), "betas": torch.rand(5)}
    del state[PREFIX + "output_blocks.0.0.in_layers.0.weight"]
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "x.safetensors")
    lines: list[str] = []
    with pytest.raises(ConfigError, match=r"x\.safetensors: unet does not fit \(1 of 686 .*\); .*download it again"):
        lines.extend(model.inspect(tmp_path / "x.safetensors"))
    said = "\n".join(lines)
    assert "layout: original" in said and "not in this file: text" in said and "fp16" in said
    assert "custom UNet (channels (8, 16, 32, 32), depth (1, 1, 1, 0), in 4, context 12)" in said
    assert "1 of 686 tensors missing: decoder.levels.0.blocks.0.res.norm1.weight" in said
    assert "KL-VAE f=2" in said and "complete" in said and "buffers: betas" in said


def test_near_names_are_offered(tmp_path: Path) -> None:
    state = unet_state()
    state[PREFIX + "output_blocks.0.0.in_layer.0.weight"] = state.pop(PREFIX + "output_blocks.0.0.in_layers.0.weight")
    save_file(state, tmp_path / "x.safetensors")
    said = r"1 of 686 .*1 unexpected: .*\(nearest: output_blocks.0.0.in_layers.0.weigh.*; its names are of no layout"
    with pytest.raises(ConfigError, match=said):
        model.import_model(tmp_path / "x.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def half_checkpoint() -> dict[str, torch.Tensor]:
    state = unet_state()
    return {key: state[key] for key in sorted(state)[: len(state) // 2]}


def with_nan() -> dict[str, torch.Tensor]:
    state = {key: value.half() for key, value in vae_state().items()}
    state["first_stage_model.encoder.conv_in.weight"][0] = torch.nan
    return state


BAD = {
    "lora": ({"lora_unet_down_blocks_0.lora_up.weight": torch.ones(2, 2)}, "this is a LoRA .*merge it into its base"),
    "peft": ({"unet.a.to_q.lora_A.weight": torch.ones(2, 2)}, "this is a LoRA"),
    "difference": ({"difference": torch.zeros(()), **vae_state()}, "'difference' ControlNet .*use the full"),
    "control_lora": ({"lora_controlnet": torch.zeros(()), "a.up": torch.ones(1)}, "this is a Control-LoRA"),
    "half": (half_checkpoint(), r"unet .*(missing|part of a checkpoint)"),
    "other": ({"head.weight": torch.ones(2)}, "no known model among 1 tensors .head.weight.; known: SD1/2"),
    "nan": (with_nan(), "vae has NaN or infinite values in 1 tensors .encoder.conv_in.weight.; download it again"),
    "stranger": ({**vae_state(), "x.y": torch.ones(2)}, "has 1 tensors of no known model: x.y"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_get_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, said = BAD[name]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=said) as caught:
        model.import_model(tmp_path / "x.safetensors", tmp_path / "out")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
def test_truncated_files_get_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    save_file(vae_state(), path) if name.endswith("tensors") else torch.save({"state_dict": vae_state()}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SystemExit) as stop:
        script.main(["inspect", str(path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "is not readable" in error and "again" in error


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    x = tmp_path / "x.safetensors"
    save_file(vae_state(), x)
    model.import_model(x, tmp_path / "ours")
    model.export([x], "diffusers", tmp_path / "folder")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    for act in (
        lambda: model.import_model(x, tmp_path / "ours"),
        lambda: model.export([x], "original", x),
        lambda: model.export([x], "diffusers", tmp_path / "folder"),
    ):
        with pytest.raises(ConfigError, match=r"exists already, and nothing is overwritten; give --out a new name"):
            act()
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}


def test_wrong_requests_say_what_is_allowed(tmp_path: Path) -> None:
    save_file(vae_state(), tmp_path / "x.safetensors")
    x = tmp_path / "x.safetensors"
    with pytest.raises(ConfigError, match="layout is 'sd', must be one of original, diffusers"):
        model.export([x], "sd", tmp_path / "y.safetensors")
    with pytest.raises(ConfigError, match="layout controlnet_original needs controlnet; given: vae"):
        model.export([x], "controlnet_original", tmp_path / "y.safetensors")
    with pytest.raises(ConfigError, match=r"must end in \.safetensors"):
        model.export([x], "original", tmp_path / "y.ckpt")
    with pytest.raises(ConfigError, match="holds vae, no unet"):
        model.load(x, "unet")
    with pytest.raises(ConfigError, match="has a second vae"):
        model.export([x, x], "original", tmp_path / "y.safetensors")
    with pytest.raises(ConfigError, match=r"do not exist; did you mean 'x\.safetensors'"):
        files.read(tmp_path / "xx.safetensors")
    with pytest.raises(ConfigError, match=r"zebra\.pth do not exist; correct the path, or get them: convert.py fetch"):
        files.read(tmp_path / "zebra.pth")
    with pytest.raises(ConfigError, match="is not a weight file"):
        files.read(Path(__file__))


def test_script_inspects_imports_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({**unet_state(), **vae_state()}, tmp_path / "x.safetensors")
    script.main(["inspect", str(tmp_path / "x.safetensors")])
    assert "layout: original" in capsys.readouterr().out
    script.main(["import", str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "ours")])
    back = str(tmp_path / "y.safetensors")
    script.main(["export", str(tmp_path / "ours"), "--layout", "original", "--out", back])
    old, new = load_file(tmp_path / "x.safetensors"), load_file(back)
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)


PROGRAM = """
import pathlib, resource, sys, threading
import adapters
from ldm.convert import model
from tests.unit.convert.test_model import BIG, detect
for config in BIG.values():
    detect.shapes(config)
own = lambda: int(pathlib.Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, first, most, done = peak(), own(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        most[0] = max(most[0], own())
thread = threading.Thread(target=watch)
thread.start()
model.import_model(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
done.set()
thread.join()
print(peak() - before, most[0] - first)
"""
BIG = {  # networks of SD1.5's size, 1.1 GB in half precision
    "control_model.": infer.ControlNetConfig(UNetConfig(), 3, (16, 32, 96, 256)),
    "first_stage_model.": VAEConfig(),
    "cond_stage_model.transformer.": TextConfig(),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_import_peaks_below_the_files_size_times_1_3(tmp_path: Path) -> None:
    """Resident memory above what the imports take. It counts mapped pages, which the kernel may take back any time;

    so what the process has of its own is measured apart: a copy of the file's tensors would show there.
    """
    tensors: dict[str, torch.Tensor] = {}
    for prefix, config in BIG.items():
        ours = {k: torch.full((1,), 0.5).half().expand(size) for k, size in detect.shapes(config).items()}
        naming = "transformers" if isinstance(config, TextConfig) else "original"
        tensors |= {prefix + k: v for k, v in infer.keymap(config, naming).to_theirs(ours).items()}
    size = files.write(tmp_path / "x.safetensors", tensors, {})
    assert size > 1e9
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "x.safetensors"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    resident, own = map(float, done.stdout.split())
    assert resident < 1.3 * size and own < 0.3 * size, (resident / size, own / size)
