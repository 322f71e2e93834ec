"""A global batch in parts: the same run, also for a VAE and the discriminator that it plays against."""

from pathlib import Path

import pytest
import torch

from ldm.registry import ConfigError
from ldm.training import optim
from tests.integration.test_train import ADVERSARY, FIRST, start
from tests.small import figures

pytestmark = pytest.mark.long


@pytest.mark.parametrize("what", ["ldm", "vae"])
def test_accumulation_equals_one_big_batch(what: str, tmp_path: Path) -> None:
    more = ["train.steps=3", "train.batch=4", "train.ema=null"]
    more += ADVERSARY if what == "vae" else []
    start(what, tmp_path / "one", *more)
    start(what, tmp_path / "four", *more, "train.micro_batch=1")
    one, four = figures(tmp_path / "one"), figures(tmp_path / "four")
    assert four == pytest.approx(one, abs=1e-5, rel=1e-4)
    assert what != "vae" or sum("adversarial_weight" in name for name in one) == 2  # it begins behind the first step


def test_the_published_norm_of_the_discriminator_sees_parts_of_a_batch(tmp_path: Path) -> None:
    more = ["train.steps=2", "train.batch=4", "train.ema=null", *ADVERSARY, "stage.disc_norm=batch"]
    start("vae", tmp_path / "one", *more)
    start("vae", tmp_path / "two", *more, "train.micro_batch=2")
    assert figures(tmp_path / "one") != pytest.approx(figures(tmp_path / "two"), abs=1e-5, rel=1e-4)


def test_a_discriminator_wants_the_last_layer_trained(tmp_path: Path) -> None:
    frozen = ["train.trainable=[encoder.*]", "stage.disc_start=0"]
    with pytest.raises(ConfigError, match=r"leaves out decoder\.conv_out, at which the discriminator"):
        start("vae", tmp_path, "train.steps=1", "train.batch=2", *ADVERSARY, *frozen)


def test_the_discriminator_gets_no_gradient_from_the_generators_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, counts = optim.adamw, []

    def counting(parameters, cfg):
        parameters, i = list(parameters), len(counts)
        counts.append(0)

        def count(_: torch.Tensor) -> None:
            counts[i] += 1

        parameters[0].register_post_accumulate_grad_hook(count)
        return real(parameters, cfg)

    monkeypatch.setattr(optim, "adamw", counting)
    start("vae", tmp_path, *FIRST, "train.steps=3")
    assert counts == [3, 3]


def test_contrastive_training_refuses_to_split_its_batch(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="contrasts the samples of a batch"):
        start("clip", tmp_path, "train.steps=1", "train.micro_batch=4", "model.clip.image.image_size=16")
