"""Sums over what an encoded data set was made from."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import ldm.data  # noqa: F401  (registers the readers)
from ldm.registry import build
from ldm.training import cache_key

from ..data.conftest import picture_bytes, write_tar


def content(root: Path) -> dict[str, str]:
    return cache_key.content(build("data", {"name": "webdataset", "root": str(root), "size": 16}))


def write(root: Path, caption: str) -> None:
    write_tar(root / "0.tar", [("a.png", picture_bytes((9, 0, 0))), ("a.txt", caption.encode())])


def test_a_caption_within_a_shard_counts(tmp_path: Path) -> None:
    write(tmp_path, "one")
    before = content(tmp_path)
    write(tmp_path, "two")
    assert {name for name, value in content(tmp_path).items() if value != before[name]} == {"data files"}


def test_an_outline_tells_another_set_but_not_another_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write(tmp_path / "a", "one")
    named = {"name": "webdataset", "size": 16}
    before = cache_key.outline(build("data", {**named, "root": str(tmp_path / "a")}))
    os.utime(tmp_path / "a" / "0.tar", ns=(5, 5))
    (tmp_path / "a").rename(tmp_path / "b")
    assert cache_key.outline(build("data", {**named, "root": str(tmp_path / "b")})) == before
    write(tmp_path / "b", 3000 * "longer ")
    assert cache_key.outline(build("data", {**named, "root": str(tmp_path / "b")})) != before


def test_files_of_a_large_set_count_by_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "one")
    small = content(tmp_path)
    os.utime(tmp_path / "0.tar", ns=(5, 5))
    assert content(tmp_path) == small
    monkeypatch.setattr(cache_key, "HASHED", 100)
    large = content(tmp_path)
    assert large == content(tmp_path) != small
    os.utime(tmp_path / "0.tar", ns=(6, 6))
    assert content(tmp_path)["data files"] != large["data files"]


@dataclass(frozen=True)
class Options:
    layer: str = "last"


class Network(nn.Module):
    def __init__(self, layer: str = "last") -> None:
        super().__init__()
        self.config = Options(layer)
        self.linear = nn.Linear(2, 3)
        self.register_buffer("count", torch.tensor(1))


def test_weights_configs_and_types_of_a_network_count_but_not_their_layout() -> None:
    networks = [Network(), Network(), Network("penultimate"), Network().bfloat16(), Network()]
    for network in networks:
        network.load_state_dict(networks[0].state_dict())
    networks[-1].get_buffer("count").add_(1)
    sums = [cache_key.weights(network) for network in networks]
    assert sums[0] == sums[1] and len(set(sums)) == 4
    networks[1].linear.weight.data = networks[1].linear.weight.data.t().contiguous().t()
    assert not networks[1].linear.weight.is_contiguous() and cache_key.weights(networks[1]) == sums[0]


def test_differences_name_what_changed_with_short_sums() -> None:
    theirs, ours = {"a": "1", "b": "0" * 64, "gone": "x"}, {"a": "1", "b": "f" * 64, "new": "y"}
    assert cache_key.differences(theirs, ours) == [
        "b (was 000000000000, is ffffffffffff)",
        "new (was none, is y)",
        "gone (was x, is none)",
    ]
