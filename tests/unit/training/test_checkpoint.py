import errno
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.registry import ConfigError
from ldm.training import checkpoint
from ldm.training.checkpoint import Keep


def write(run: Path, step: int, value: float = 0.0, keep: int = 2) -> Path:
    weights = {"model": {"w": torch.full((2, 3), value)}, "adapter": {"a": torch.ones(1)}}
    state = {"step": step, "optimizer": {"m": torch.full((2,), value)}, "scaler": None}
    return checkpoint.save(run, step, weights, state, {"config": "seed: 0\n", "step": str(step)}, Keep(keep))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_by_torch(*args: Any, **kwargs: Any) -> None:
    """As `torch.save` tells it: closing its archive fails too, and that error comes out."""
    try:
        full_disk()
    finally:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598\nmore")


def test_checkpoint_has_shared_weights_state_and_marker(tmp_path: Path) -> None:
    folder = write(tmp_path, 7, value=0.5)
    assert folder == tmp_path / "checkpoints" / "step-00000007"
    assert sorted(content(folder)) == ["COMPLETE", "adapter.safetensors", "model.safetensors", "training.pt"]
    assert torch.equal(load_file(folder / "model.safetensors")["w"], torch.full((2, 3), 0.5))
    state = checkpoint.read_state(folder)
    assert state["step"] == 7 and torch.equal(state["optimizer"]["m"], torch.full((2,), 0.5))
    header = {"config": "seed: 0\n", "step": "7", "format": "pt"}
    assert checkpoint.read_metadata(folder / "model.safetensors") == header


def test_weights_have_the_rights_that_the_user_gives_new_files(tmp_path: Path) -> None:
    """The safetensors library writes files that nobody else may read."""
    (tmp_path / "new").touch()
    folder = write(tmp_path, 7)
    assert (folder / "model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_optimizer_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    net(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    folder = checkpoint.save(tmp_path, 1, {"model": net.state_dict()}, {"o": optimizer.state_dict()}, {}, Keep(1))
    other = torch.optim.AdamW(net.parameters(), fused=True)
    other.load_state_dict(checkpoint.read_state(folder)["o"])
    for p in net.parameters():
        assert all(torch.equal(v, other.state[p][k]) for k, v in optimizer.state[p].items())


def test_views_and_transposed_weights_can_be_saved(tmp_path: Path) -> None:
    wide = torch.randn(4, 6)
    folder = checkpoint.save(tmp_path, 1, {"model": {"view": wide[:, ::2], "t": wide.T}}, {}, {}, Keep(1))
    back = load_file(folder / "model.safetensors")
    assert torch.equal(back["view"], wide[:, ::2]) and torch.equal(back["t"], wide.T)


def test_state_is_never_unpickled(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    torch.save({"step": Path("x")}, folder / "training.pt")
    with pytest.raises(ConfigError, match="not readable") as caught:
        checkpoint.read_state(folder)
    assert isinstance(caught.value.__cause__, pickle.UnpicklingError)


@pytest.mark.parametrize("keep", [0, 4, 400])
def test_damaged_state_gets_one_line(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path, 1) / "training.pt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"training\.pt is not readable .* from the checkpoint before it") as caught:
        checkpoint.read_state(path.parent)
    assert "\n" not in str(caught.value)


def test_only_the_newest_complete_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        write(tmp_path, step)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-00000015", "step-00000020"]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-00000020"


def test_checkpoints_are_found_and_ordered_by_number_beyond_eight_digits(tmp_path: Path) -> None:
    for step in (99_999_998, 99_999_999, 100_000_000, 1_000_000_000):
        write(tmp_path, step, keep=0)
    (tmp_path / "checkpoints" / "step-2000000000.tmp").mkdir()
    (tmp_path / "checkpoints" / "step-1000000000").rename(tmp_path / "checkpoints" / "step-1000000000.damaged")
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-100000000"
    write(tmp_path, 100_000_001, keep=2)
    assert steps(tmp_path) == [100_000_000, 100_000_001]
    checkpoint.clear(tmp_path)
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"step-100000000", "step-100000001", "step-1000000000.damaged"}


def steps(run: Path) -> list[int]:
    return [int(folder.name[5:]) for folder in checkpoint.complete(run)]


def harm(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}" / "training.pt").write_bytes(b"")


@pytest.mark.parametrize(("keep", "left"), [(1, [3]), (2, [2, 3])])
def test_a_damaged_checkpoint_is_put_aside_and_sound_ones_are_kept(
    keep: int, left: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 4):
        write(tmp_path, step, keep=0)
    (tmp_path / "checkpoints" / "step-00000004.damaged" / "older").mkdir(parents=True)
    harm(tmp_path, 4)
    found = checkpoint.latest_sound(tmp_path)
    assert found == tmp_path / "checkpoints" / "step-00000002"
    assert "step-00000004 is damaged (training.pt is not what was written) and passed over; it is put aside as" in (
        caplog.text
    )
    write(tmp_path, 3, keep=keep)
    assert steps(tmp_path) == left and not any(checkpoint.damage(folder) for folder in checkpoint.complete(tmp_path))
    aside = content(tmp_path / "checkpoints" / "step-00000004.damaged")
    assert sorted(aside) == ["COMPLETE", "adapter.safetensors", "model.safetensors", "training.pt"]


def test_when_all_are_damaged_they_stay_where_they_are(tmp_path: Path) -> None:
    for step in (2, 4):
        write(tmp_path, step)
        harm(tmp_path, step)
    with pytest.raises(ConfigError, match="all 2 checkpoints"):
        checkpoint.latest_sound(tmp_path)
    assert steps(tmp_path) == [2, 4]


def test_what_was_just_saved_is_never_dropped_for_later_ones(tmp_path: Path) -> None:
    for step in (2, 4):
        write(tmp_path, step)
    write(tmp_path, 3, keep=1)
    assert steps(tmp_path) == [3, 4]


def test_an_old_checkpoint_that_cannot_be_removed_is_named_and_counts_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 5)
    real = checkpoint.shutil.rmtree

    def torn(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            (path / "model.safetensors").unlink()
            raise OSError(errno.EIO, "Input/output error")
        real(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", torn)
    assert write(tmp_path, 10, keep=1).name == "step-00000010" and steps(tmp_path) == [10]
    assert "step-00000005, which is not kept, could not be removed ([Errno 5] Input/output error)" in caplog.text
    checkpoint.clear(tmp_path)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]


def test_keep_zero_keeps_all(tmp_path: Path) -> None:
    for step in range(4):
        write(tmp_path, step, keep=0)
    assert len(checkpoint.complete(tmp_path)) == 4


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nothing") is None
    assert checkpoint.complete(tmp_path) == []


def test_half_written_checkpoints_do_not_count(tmp_path: Path) -> None:
    good = write(tmp_path, 5)
    (write(tmp_path, 10, keep=0) / checkpoint.MARKER).unlink()
    (tmp_path / "checkpoints" / "step-00000015.tmp").mkdir()
    assert checkpoint.complete(tmp_path) == [good]


def test_leftovers_of_a_crash_are_written_over(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / "step-00000005.tmp"
    left.mkdir(parents=True)
    (left / "junk").write_text("x")
    folder = write(tmp_path, 5)
    assert "junk" not in content(folder) and not left.exists()
    write(tmp_path, 5, value=2.0)
    assert load_file(folder / "model.safetensors")["w"].unique().item() == 2.0


@pytest.mark.parametrize(
    ("function", "failure"),
    [
        ("files.write", full_disk),
        ("torch.save", full_disk),
        ("torch.save", full_disk_by_torch),
        ("flush", full_disk),
    ],
)
def test_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, failure: Callable[..., None]
) -> None:
    old = write(tmp_path, 5, keep=1)
    before = content(tmp_path)
    monkeypatch.setattr(f"ldm.training.checkpoint.{function}", failure)
    with pytest.raises(ConfigError, match=r"step-00000010 could not be written \(disk is full\); .*intact") as caught:
        write(tmp_path, 10, keep=1)
    assert "\n" not in str(caught.value)
    assert content(tmp_path) == before and checkpoint.latest(tmp_path) == old
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [old.name]


def test_room_is_looked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write(tmp_path, 5)
    monkeypatch.setattr("ldm.training.checkpoint.shutil.disk_usage", lambda path: SimpleNamespace(free=35))
    monkeypatch.setattr("ldm.training.checkpoint.files.write", lambda *args: pytest.fail("something was written"))
    message = r"step-00000010 could not be written \(disk is full: needs 0\.0 GB, the disk has 0\.0 GB free\); older"
    with pytest.raises(ConfigError, match=message):
        write(tmp_path, 10)
    assert checkpoint.complete(tmp_path) == [old]


def test_run_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="could not be written"):
        write(tmp_path / "file", 1)


@pytest.mark.parametrize("keep", [0, 4, 40])
def test_truncated_weights_get_one_line(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ConfigError, match=rf"w\.safetensors is not readable .*has {keep} bytes.* download it again"
    ) as e:
        checkpoint.load_weights(nn.Linear(3, 2), path)
    assert "\n" not in str(e.value)


def test_missing_weights_suggest_a_name(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "canny.safetensors")
    with pytest.raises(ConfigError, match=r"cany\.safetensors do not exist; did you mean 'canny\.safetensors'"):
        checkpoint.load_weights(nn.Linear(3, 2), tmp_path / "cany.safetensors")
    with pytest.raises(ConfigError, match="do not exist"):
        checkpoint.load_weights(nn.Linear(3, 2), tmp_path / "no folder" / "w.safetensors")


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


def test_weights_load_into_the_module(tmp_path: Path) -> None:
    net, other = nn.Linear(3, 2), nn.Linear(3, 2)
    checkpoint.load_weights(other, saved(tmp_path / "w.safetensors", net.state_dict()))
    assert torch.equal(net.weight, other.weight) and torch.equal(net.bias, other.bias)


def test_prefix_picks_a_part_of_the_file(tmp_path: Path) -> None:
    net, other = nn.Linear(3, 2), nn.Linear(3, 2)
    tensors = {**{f"text.{k}": v for k, v in net.state_dict().items()}, "image.weight": torch.ones(1)}
    checkpoint.load_weights(other, saved(tmp_path / "w.safetensors", tensors), "text.")
    assert torch.equal(net.weight, other.weight)


def test_modules_keep_their_own_precision(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    path = saved(tmp_path / "w.safetensors", {k: v.bfloat16() for k, v in net.state_dict().items()})
    checkpoint.load_weights(net, path)
    assert net.weight.dtype == torch.float32


def test_keys_that_do_not_fit_are_grouped(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    tensors = dict(net.state_dict())
    for key in ("1.weight", "1.bias", "2.weight", "2.bias"):
        tensors[f"more.{key}"] = tensors.pop(key)
    tensors["0.weight"] = torch.ones(2, 4)
    with pytest.raises(ConfigError) as caught:
        checkpoint.load_weights(net, saved(tmp_path / "w.safetensors", tensors))
    assert str(caught.value) == (
        f"weights {tmp_path / 'w.safetensors'} are of another architecture than Sequential "
        "(4 missing: 1.bias and 3 like it; 4 unexpected: more.1.bias and 3 like it; "
        "1 mis-shaped: 0.weight (2, 4) (expected (2, 3))); change the config to theirs, or name other weights"
    )
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
