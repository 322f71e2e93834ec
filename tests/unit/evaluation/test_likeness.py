"""Measures of captions and of real pictures, on networks with known or random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ldm import registry
from ldm.evaluation.likeness import ClipT, DinoI, TokenDistance
from ldm.evaluation.measures import Measure
from ldm.models import lpips
from ldm.registry import ConfigError

VIT = {"name": "vit", "image_size": 8, "patch": 4, "width": 8, "layers": 2, "heads": 1}
TEXT = {"width": 8, "layers": 1, "heads": 1, "context_length": 8, "merges": 0}
CLIP = {"name": "clip", "text": TEXT, "image": VIT, "embed_dim": 6}
DINO = {"name": "dino", "image_size": 28, "patch": 14, "width": 8, "layers": 2, "heads": 2, "positions": 42}


def saved(kind: str, node: dict[str, Any], file: Path) -> dict[str, Any]:
    """A network with random weights in a file, as a node."""
    save_file(registry.build(kind, node).state_dict(), file)
    return {**node, "weights": str(file)}


def scores(m: Measure, pictures: torch.Tensor, hints: Any) -> torch.Tensor:
    return m.score(m.picture(pictures), m.hint(hints))


def test_clip_t_is_the_cosine_of_picture_and_caption(tmp_path: Path) -> None:
    m: ClipT = registry.build("measure", {"name": "clip_t", "clip": saved("clip", CLIP, tmp_path / "c.safetensors")})
    clip = m._clip.clip
    pictures, words = torch.rand(2, 3, 8, 8), ["a cat", "the sea"]
    with torch.no_grad():
        expected = (clip.encode_image(pictures * 2 - 1) * clip.encode_text(clip.text.ids(words))).sum(dim=-1)
    torch.testing.assert_close(scores(m, pictures, words), expected)
    assert m.reads == "caption" and m.more_is_better
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(scores(m, pictures, words), expected)


def test_clip_t_of_a_published_model_is_open_clips(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    (tmp_path / "none-b-8.json").write_text(json.dumps({"embed_dim": 6, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "none-b-8.json")
    theirs = open_clip.create_model("none-b-8").eval()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    m = ClipT(model="none-b-8", weights=str(tmp_path / "w.safetensors"))
    pictures, words = torch.rand(2, 3, 16, 16), ["a cat", "the sea"]
    told = open_clip.get_model_preprocess_cfg(theirs)
    mean, std = (torch.tensor(told[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        x = theirs.encode_image((pictures - mean) / std, normalize=True)
        y = theirs.encode_text(open_clip.get_tokenizer("none-b-8")(words), normalize=True)
    torch.testing.assert_close(scores(m, pictures, words), (x * y).sum(dim=-1))
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"other.safetensors are not those of none-b-8"):
        ClipT(model="none-b-8", weights=str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "takes clip, or model and weights"),
        ({"model": "ViT-B-32"}, "takes clip, or model and weights"),
        ({"clip": CLIP}, "clip_t.clip has no weights"),
        ({"model": "ViT-B-33", "weights": "w"}, "none of open_clip's names; did you mean"),
        ({"model": "ViT-B-32", "weights": "w"}, "clip_t.weights w does not exist"),
    ],
)
def test_clip_t_says_what_it_lacks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.build("measure", {"name": "clip_t", **options})


def test_token_distance_is_of_places(tmp_path: Path) -> None:
    m = TokenDistance(saved("image", VIT, tmp_path / "v.safetensors"))
    a, b = torch.rand(2, 2, 3, 8, 8)
    assert scores(m, a, a).tolist() == pytest.approx([0, 0], abs=1e-6)
    cosines = torch.nn.functional.cosine_similarity(m.tower.tokens(a * 2 - 1), m.tower.tokens(b * 2 - 1), dim=-1)
    torch.testing.assert_close(scores(m, a, b), 1 - cosines.mean(dim=1))
    assert not m.more_is_better
    with pytest.raises(ConfigError, match=r"token_distance\.encoder has no weights"):
        TokenDistance(VIT)


def test_lpips_is_that_of_its_network_and_needs_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x - y).abs().amax(dim=(1, 2, 3))

    with pytest.raises(ConfigError, match="LPIPS is unavailable: its weights file is 'none'"):
        registry.build("measure", {"name": "lpips", "weights": "none"})
    monkeypatch.setattr(lpips.LPIPS, "load", lambda _: Network())
    m = registry.build("measure", {"name": "lpips", "weights": "w"})
    assert scores(m, torch.full((1, 3, 16, 16), 0.75), torch.full((1, 3, 16, 16), 0.5)).item() == 0.5  # in [-1, 1]


def test_dino_is_timms_network_at_any_size_by_timms_own_names(tmp_path: Path) -> None:
    tower = registry.build("image", DINO)
    bare = {key.removeprefix("net."): value for key, value in tower.state_dict().items()}
    save_file({**bare, "mask_token": torch.zeros(1, 8)}, tmp_path / "dino.safetensors")
    node = {**DINO, "weights": str(tmp_path / "dino.safetensors")}
    m: DinoI = registry.build("measure", {"name": "dino_i", "encoder": node})
    x = torch.rand(1, 3, 28, 28)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        tokens = tower.net.forward_features((x - mean) / std)
    torch.testing.assert_close(m.tower(x * 2 - 1), tokens[:, 0])
    last = m.tower.tokens(x * 2 - 1, last=True)
    torch.testing.assert_close(m.tower.net.norm(last), tokens)
    assert m.tower.tokens(x * 2 - 1).shape == last.shape == (1, 5, 8)
    assert scores(m, x, x[:, None]).item() == pytest.approx(1, abs=1e-5)
    with pytest.raises(ConfigError, match=r"dino.image_size is 30, must be a multiple of dino.patch=14"):
        registry.build("image", {**DINO, "image_size": 30})
