from typing import Any

import pytest
import torch

import adapters  # noqa: F401  (registers them)
from ldm import build, config
from ldm.denoiser import AdapterUse
from ldm.registry import ConfigError


def test_use_and_options_of_an_adapter_are_told_apart() -> None:
    use, options = build.split_use("edge", {"name": "controlnet", "scale": 1, "skip_scales": [1, 0.5]})
    assert use == AdapterUse(scale=1, skip_scales=(1, 0.5)) and options == {"name": "controlnet"}


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ("controlnet", "^adapters.edge is 'controlnet', must be a mapping of keys"),
        (None, "^adapters.edge is None, must be a mapping"),
        ({"guess": "nope"}, "^adapters.edge: guess is 'nope', must be bool"),
        ({"skip_scales": ["a"]}, r"^adapters.edge: skip_scales is \('a',\), must be a list"),
        ({"scale": "big"}, "^adapters.edge: scale is 'big', must be float"),
        ({"weights": 5}, "^adapters.edge: weights is 5, must be str"),
        ({"start": 2.0}, "^adapters.edge: start is 2.0"),
        ({"blocks": 3}, "^adapters.edge: blocks is 3, must be a mapping"),
        ({"extractor": 5}, r"^adapters.edge: extractor is 5, must be str \| a mapping"),
        ({"name": "t2i_adapter", "scal": 1}, r"^adapters.edge has the unknown key 'scal'; .*; did you mean 'scale'\?$"),
        (
            {"name": "t2i_adapter", "x": 1},
            "unknown key 'x'; keys: variant, .*, scales, .*, image, scale, .*, extractor$",
        ),
    ],
)
def test_adapter_that_makes_no_sense_is_refused(node: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build.split_use("edge", node)


@pytest.mark.parametrize("name", ["keys", "train", "a.b", "../a", "", "my edge"])
def test_name_that_no_module_can_have_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"adapters has the name '{name}', must be letters"):
        build.split_use(name, {"name": "controlnet"})


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"steps": "many"}, "^model.schedule: steps is 'many', must be int"),
        ({"beta_end": [1]}, r"^model.schedule: beta_end is \(1,\), must be float"),
        ({"stepz": 3}, r"^model.schedule: unknown keys \['stepz'\].*did you mean 'steps'"),
    ],
)
def test_schedule_of_another_type_is_refused(node: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build.schedule(config.from_mapping({"model": {"schedule": node}}))


@pytest.mark.parametrize(
    ("key", "said"), [("weights", "model.vae.weights is 5, must be the path"), ("weights_prefix", "is 5, must be text")]
)
def test_weights_that_are_no_path_are_refused(key: str, said: str) -> None:
    node = {"name": "kl", "channels": [8, 8], "groups": 4, key: 5}
    with pytest.raises(ConfigError, match=said):
        build.component("vae", node)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ({"scale": 0.5}, r"adapters\.image speaks through the text's own attention: its scale is 0\.5"),
        ({"blocks": {"mid": 0.0}}, "mask and blocks cannot act"),
        ({"extractor": "sketch"}, r"adapters\.image\.extractor is set"),
    ],
)
def test_keys_that_an_adapter_would_leave_unread_are_refused(use: dict[str, Any], message: str) -> None:
    tower = {"name": "vit", "image_size": 16, "patch": 8, "width": 16, "layers": 2, "heads": 2}
    unet = {"name": "unet", "channels": [8, 16], "blocks": 1, "depth": [0, 1], "num_heads": 2, "groups": 4}
    node = {"name": "ip_adapter_simple", "encoder": tower, "width": 64} | use
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        build.denoiser(config.from_mapping({"model": {"unet": unet}, "adapters": {"image": node}}))
