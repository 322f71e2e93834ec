"""The encoded data set on disk: equal to memory, made once, refused where it was made from something else."""

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import adapters  # noqa: F401  (registers them)
from ldm import build
from ldm.config import from_mapping
from ldm.convert import files
from ldm.data.images import ImageData
from ldm.registry import ConfigError
from ldm.training import cache_folder
from ldm.training.cache import LatentData, Latents
from ldm.training.cache_folder import Folder, Parts
from ldm.training.diffusion import DiffusionOptions, DiffusionStage
from ldm.training.distributed import ALONE

MODEL: dict[str, Any] = {
    "unet": {"name": "unet", "channels": [8], "blocks": 1, "depth": [0], "num_heads": 1, "groups": 4, "context_dim": 8},
    "vae": {"name": "kl", "channels": [8, 8], "blocks": 1, "groups": 4, "scale_factor": 1.0},
    "text": {"name": "clip", "width": 8, "layers": 1, "heads": 1, "merges": 20, "context_length": 8},
}
VIT = {"name": "vit", "image_size": 16, "patch": 8, "width": 8, "layers": 1, "heads": 1}
LOOK = {"look": {"name": "ip_adapter", "encoder": VIT}}
NAMES = ("a", "b", "c", "d", "e", "f", "g")  # pictures of the set: two parts


@pytest.fixture(scope="module", autouse=True)
def small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("cache", "cache_folder"):
            patch.setattr(f"ldm.training.{module}.PART", 4)
        patch.setattr("ldm.training.cache.ENCODE_BATCH", 2)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a set of captioned pictures with hints, each its own image prompt, and its cache.

    Two have the same caption.
    """
    folder = tmp_path_factory.mktemp("made")
    for kind in ("set", "set/line"):
        (folder / kind).mkdir()
        for i, name in enumerate(NAMES):
            Image.new("RGB", (16, 16), (30 * i, 90, 200)).save(folder / kind / f"{name}.png")
    for i, name in enumerate(NAMES):
        (folder / "set" / f"{name}.txt").write_text(f"picture {i % 6}")
    cached(stage(folder / "cache"), data(folder / "set"))
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """The set, moved: its files have other times. Its cache is beside it."""
    shutil.copytree(made, tmp_path, copy_function=shutil.copyfile, dirs_exist_ok=True)
    return tmp_path / "set"


def data(root: Path, **options: Any) -> ImageData:
    own = {"same": "file", "itself": True}
    node = {"name": "sidecar", "root": str(root), "size": 16, "hints": {"line": "line"}, "reference": own}
    return build.data({**node, **options})


def stage(folder: Path | None = None, seed: int = 0) -> DiffusionStage:
    torch.manual_seed(seed)
    node = {"name": "diffusion", "cache": True, "cache_dir": None if folder is None else str(folder)}
    built = build.stage(from_mapping({"model": MODEL, "adapters": LOOK, "stage": node}))
    assert isinstance(built, DiffusionStage)
    return built


def cached(this: DiffusionStage, of: ImageData) -> LatentData:
    found = this.cached(of, ALONE)
    assert isinstance(found, LatentData)
    return found


def batch(of: LatentData) -> Latents:
    return of.collate([of.load(i, torch.Generator().manual_seed(i)) for i in (5, 0, 6, 3)])


def tensors(of: Latents) -> list[torch.Tensor]:
    assert of.base.context is not None and of.base.vector is None
    return [of.mean, of.std, of.base.context, of.hints["line"], of.prompts["look"]]


def counted(this: DiffusionStage) -> list[int]:
    """Filled with the number of pictures of every call of the VAE's encoder from now on."""
    calls: list[int] = []
    first = next(m for m in this.vae.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    return calls


def test_disk_and_memory_give_the_same_bits_and_the_disk_is_filled_once(root: Path, tmp_path: Path) -> None:
    memory = cached(stage(), data(root))
    first, again = (stage(tmp_path / "new") for _ in range(2))
    calls = counted(first), counted(again)
    fresh, opened = cached(first, data(root)), cached(again, data(root, memory=False))  # memory changes no sample
    assert sum(calls[0]) == 7 and not calls[1]
    for of in (fresh, opened, pickle.loads(pickle.dumps(opened))):  # as other processes get it
        assert batch(of).keys == batch(memory).keys == ["f.png", "a.png", "g.png", "d.png"]
        assert all(torch.equal(a, b) for a, b in zip(tensors(batch(of)), tensors(batch(memory)), strict=True))
    assert batch(memory).std.min() > 0 and not torch.equal(*batch(memory).mean[:2])
    parts = {f"{name}-0000{i}.safetensors" for name in ("images", "prompts", "texts") for i in (0, 1)}
    assert {path.name for path in (tmp_path / "new").glob("[!.]*")} == {*parts, "index.safetensors", "manifest.json"}
    assert sum(len(Parts(tmp_path / "new", "texts", ())[i].tensors["context"]) for i in (0, 1)) == 6  # one is twice


def other_weights(name: str) -> Callable[[DiffusionStage, Path], None]:
    def change(this: DiffusionStage, root: Path) -> None:
        module = this.denoiser.heard["look"] if name == "look" else this.get_submodule(name)
        with torch.no_grad():
            next(module.parameters()).mul_(1.001)

    return change


def other_caption(this: DiffusionStage, root: Path) -> None:
    (root / "a.txt").write_text("another")


def other_pixel(this: DiffusionStage, root: Path) -> None:
    Image.new("RGB", (16, 16), (0, 90, 201)).save(root / "a.png")


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (other_weights("vae"), {}, r"VAE weights \(was [0-9a-f]{12}, is [0-9a-f]{12}\)"),
        (other_weights("text"), {}, "text encoder weights"),
        (other_weights("look"), {}, r"image encoder of look \(IPAdapter\) weights"),
        (other_caption, {}, "captions"),
        (other_pixel, {}, "data files"),
        (None, {"size": 32}, r"data.size \(was 16, is 32\)"),
        (None, {"crop": "none"}, r'data.crop \(was "center", is "none"\)'),
        (None, {"hints": {"line": "line", "palette": {"name": "color", "cell": 8}}}, "data.hints"),
    ],
)
def test_a_cache_made_from_something_else_is_refused_and_kept(
    change: Callable[[DiffusionStage, Path], None] | None,
    options: dict[str, Any],
    said: str,
    root: Path,
    tmp_path: Path,
) -> None:
    before = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    this = stage(tmp_path / "cache")
    if change:
        change(this, root)
    message = rf"stage.cache_dir .*cache was made with other {said}.*; remove that folder, or choose another"
    with pytest.raises(ConfigError, match=message) as caught:
        cached(this, data(root, **options))
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before


def test_a_set_that_moved_is_the_same_set(root: Path, tmp_path: Path) -> None:
    this = stage(tmp_path / "cache")
    calls = counted(this)
    cached(this, data(root))
    assert not calls


def test_precision_is_part_of_the_key(root: Path, tmp_path: Path) -> None:
    message = r"precision \(was torch.float32, is torch.bfloat16\)"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match=message):
        cached(stage(tmp_path / "cache"), data(root))


def test_an_interrupted_build_loses_one_part_and_goes_on(root: Path, tmp_path: Path) -> None:
    this, folder = stage(tmp_path / "new"), tmp_path / "new"
    first = next(m for m in this.vae.modules() if isinstance(m, nn.Conv2d))
    seen: list[int] = []

    def stop(_: nn.Module, args: tuple[torch.Tensor]) -> None:
        seen.append(len(args[0]))
        if sum(seen) > 4:
            raise KeyboardInterrupt

    first.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        cached(this, data(root))
    assert json.loads((folder / "manifest.json").read_text())["complete"] is False
    assert [path.name for path in folder.glob("*.safetensors")] == ["images-00000.safetensors"]
    (folder / "images-00001.safetensors.new").write_bytes(b"half")
    again = stage(folder)
    calls = counted(again)
    found = cached(again, data(root))
    assert sum(calls) == 3 and not list(folder.glob("*.new*"))
    pairs = zip(tensors(batch(found)), tensors(batch(cached(stage(), data(root)))), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ConfigError, match="VAE weights"):
        (folder / "manifest.json").write_text((folder / "manifest.json").read_text().replace("true", "false"))
        cached(stage(folder, seed=1), data(root))  # nor is half a cache taken for another's


def test_a_part_that_was_cut_is_made_again(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = batch(cached(stage(), data(root)))
    part = tmp_path / "cache" / "images-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    this = stage(tmp_path / "cache")
    calls = counted(this)
    again = batch(cached(this, data(root)))
    assert sum(calls) == 3 and "images-00001.safetensors is not what was written" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(tensors(good), tensors(again), strict=True))


def test_what_is_built_upon_is_compared_with_its_sums_first(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"complete": False}))
    for path in folder.glob("texts-*"):
        path.unlink()
    part = folder / "images-00000.safetensors"
    part.write_bytes(part.read_bytes().replace(b"picture 2", b"picture 3"))
    with pytest.raises(ConfigError, match=r"images-00000\.safetensors of .* is damaged .*remove that file"):
        cached(stage(folder), data(root))
    assert not list(folder.glob("texts-*"))
    part.unlink()
    assert all(
        map(torch.equal, tensors(batch(cached(stage(folder), data(root)))), tensors(batch(cached(stage(), data(root)))))
    )


def test_room_is_looked_for_before_a_part_is_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.training.checkpoint.shutil.disk_usage", lambda path: SimpleNamespace(free=16_000))
    with pytest.raises(ConfigError, match=r"could not be written \(disk is full: needs 0\.0 GB.*what is done is kept"):
        cached(stage(tmp_path / "new"), data(root))  # a part takes 9 kB, both more than there is
    assert not list((tmp_path / "new").glob("*.safetensors"))


def test_a_complete_cache_is_read_where_nothing_may_be_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    for name in ("cache_folder.os.replace", "cache_folder.Path.mkdir", "cache_folder.files.write", "lock.fcntl.flock"):
        monkeypatch.setattr(f"ldm.training.{name}", refuse)
    assert batch(cached(stage(tmp_path / "cache"), data(root))).keys
    with pytest.raises(ConfigError, match=r"stage.cache_dir .*new could not be written \(.*Permission denied"):
        cached(stage(tmp_path / "new"), data(root))


def test_a_part_with_a_damaged_header_is_named_with_the_way_out_which_works(root: Path, tmp_path: Path) -> None:
    part = tmp_path / "cache" / "images-00000.safetensors"
    content = bytearray(part.read_bytes())
    content[8] ^= 1  # the first letter of the header
    part.write_bytes(content)
    with pytest.raises(ConfigError, match=r"images-00000\.safetensors of .* is damaged .*remove that file") as caught:
        batch(cached(stage(tmp_path / "cache"), data(root)))
    assert "\n" not in str(caught.value)
    part.unlink()
    assert batch(cached(stage(tmp_path / "cache"), data(root))).keys


def test_another_folder_or_file_is_not_taken_for_a_cache(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set has files but no manifest.json, so it is no cache; choose a new"):
        cached(stage(root), data(root))
    with pytest.raises(ConfigError, match=r"a.txt could not be written \(.*File exists"):
        cached(stage(root / "a.txt"), data(root))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"has a manifest.json that is damaged"):
        cached(stage(tmp_path / "torn"), data(root))


def test_two_runs_do_not_make_one_cache_at_a_time(tmp_path: Path) -> None:
    first = Folder(tmp_path / "cache", dict, ALONE)
    with pytest.raises(ConfigError, match="is being made by another run; start again when that is done"):
        Folder(tmp_path / "cache", dict, ALONE)
    assert not first.complete
    first.finish({"captions": torch.zeros(1)})
    assert Folder(tmp_path / "cache", dict, ALONE).complete


def test_parts_are_mapped_not_read(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    files.write(tmp_path / "images-00000.safetensors", {"mean": torch.zeros(64, 2**18)}, {"keys": "[]"})  # 64 MiB
    before = resident()
    part = cache_folder.Parts(tmp_path, "images", ("keys",))[0]
    assert torch.stack([part.tensors["mean"][3]]).shape == (1, 2**18)
    assert resident() - before < 16 * 2**20


def test_a_folder_without_the_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stage.cache_dir is 'x' and stage.cache False; a folder needs stage.cache"):
        DiffusionOptions(cache_dir="x")


@pytest.mark.parametrize("name", ["images-00001", "texts-00000", "prompts-00000", "index"])
def test_a_flipped_bit_is_found_when_it_is_asked_for_and_its_file_is_made_anew(
    name: str, root: Path, tmp_path: Path
) -> None:
    good = batch(cached(stage(tmp_path / "cache"), data(root)))
    part = tmp_path / "cache" / f"{name}.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    message = rf"{name}\.safetensors of stage.cache_dir is damaged \(row \d is not what was written\); remove that file"
    with pytest.raises(ConfigError, match=message):
        of = cached(stage(tmp_path / "cache"), data(root))
        of.collate([of.load(i) for i in range(7)])
    part.unlink()
    again = batch(cached(stage(tmp_path / "cache"), data(root)))
    assert all(torch.equal(a, b) for a, b in zip(tensors(good), tensors(again), strict=True))


def test_a_letter_changed_in_a_header_that_stays_valid_is_found(root: Path, tmp_path: Path) -> None:
    part = tmp_path / "cache" / "images-00000.safetensors"
    assert part.read_bytes().count(b"picture 2") == 1
    part.write_bytes(part.read_bytes().replace(b"picture 2", b"picture 3"))
    with pytest.raises(
        ConfigError, match=r"images-00000\.safetensors of .* is damaged \(row 0 is not what was written"
    ):
        cached(stage(tmp_path / "cache"), data(root)).collate([(0, 0)])


def test_a_row_is_summed_up_once_and_parts_without_sums_count_as_sound(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summed: list[int] = []
    real = cache_folder._sum
    monkeypatch.setattr(cache_folder, "_sum", lambda row, begun: (summed.append(1), real(row, begun))[1])
    of = cached(stage(tmp_path / "cache"), data(root))
    first = [len(summed), batch(of) and len(summed), batch(of) and len(summed)]
    assert first[0] == 1 and first[1] > 5 and first[2] == first[1]  # the index; rows; none again
    for file in (tmp_path / "cache").glob("*.safetensors"):  # as they were before sums
        said = {k: v for k, v in cache_folder.checkpoint.read_metadata(file).items() if k not in ("crc32", "format")}
        found = {name: x.clone() for name, x in files.read(file).items()}
        size = file.stat().st_size
        files.write(file, found, said | {"pad": " " * (size - files.write(file, found, said | {"pad": ""}))})
        assert file.stat().st_size == size
    old = cached(stage(tmp_path / "cache"), data(root))
    assert batch(old).keys == batch(of).keys and len(summed) == first[1]
